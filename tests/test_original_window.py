"""The twin of the original rule of lookahead decoding, against a loop over plain lists and examples worked by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import WORDS, tiny
from original_window import OriginalRow, OriginalWindow

from lookahead import Draft, Lookahead, Step

Model = Callable[[list[int]], int]
SETTINGS = [(15, 5, 15), (7, 5, 7), (1, 3, 1), (5, 3, 2), (2, 6, 3)]


def by_place(text: list[int]) -> int:
    """Return the next token, easy to work out by hand."""
    return (3 * text[-1] + len(text) - 1) % 7


def by_context(text: list[int]) -> int:
    """Return a next token that depends on all of the text, if mostly on its end."""
    return (3 * text[-1] + 2 * text[-2] + (sum(text) % 11 == 0)) % 7


def same(text: list[int]) -> int:
    return text[-1]


def drive(rule: OriginalWindow, model: Model, prompt: list[int], *, nodes: int = 4000) -> Iterator[Any]:
    """Yield the row, its draft and the text after every pass, the first token of the text being the prefill's."""
    row, text = rule.start(np.array(prompt, np.int32)), [*prompt, model(prompt)]
    while True:
        draft = row.propose(np.array(text, np.int32), nodes).deduplicate().cut(nodes)
        said = [model(text + draft.tokens[draft.path(node)[1:]].tolist()) for node in range(len(draft))]
        path = walk(draft, said)
        tokens = [said[node] for node in path]
        likeliest = np.array(said, np.int32)[:, None]
        row.observe(Step(0, draft, np.array(path, np.int32), np.array(tokens), likeliest, np.zeros(likeliest.shape)))
        text = text + tokens
        yield row, draft, text


def walk(draft: Draft, said: list[int]) -> list[int]:
    path = [0]
    while (child := draft.child(path[-1], said[path[-1]])) is not None:
        path.append(child)
    return path


def plain(model: Model, prompt: list[int], length: int) -> list[int]:
    text = list(prompt)
    while len(text) < length:
        text.append(model(text))
    return text


def rule_on_lists(model: Model, prompt: list[int], rule: OriginalWindow) -> Iterator[Any]:
    """Yield text, levels and n-grams after every pass of the original rule."""
    draw, text, ngrams = random.Random(10), list(prompt), {}
    levels = [[draw.choice(text) for _ in range(rule.window + rule.ngram - 3)]]
    text.append(model(text))
    while True:
        hit = [model(text)]
        if len(levels) == rule.ngram - 1:
            for guess in ngrams.get(text[-1], []):
                count = 0
                while count < rule.ngram - 1 - rule.faithful and guess[count] == model(text + list(guess[:count])):
                    count += 1
                if count >= len(hit):
                    hit = [*guess[:count], model(text + list(guess[:count]))]
            said = []
            for i in range(rule.window):
                column = [level[i] for level in levels[1:]]
                said.append(model(text + levels[0][:i] + column))
                key = levels[0][i - 1] if i else text[-1]
                others = [guess for guess in ngrams.get(key, []) if guess != (*column, said[i])]
                ngrams[key] = [*others, (*column, said[i])][-rule.guesses :]
            skip = len(hit) - 1 if rule.shift == "accepted" else 0
            levels = [levels[1][1 + skip :], *(level[skip:] for level in levels[2:]), said[skip:]]
            for i, level in enumerate(levels):
                while len(level) < rule.window - (i == 0):
                    level.append(draw.choice(text))
        elif len(levels) == 1:
            levels = [levels[0][1:], [model(text + levels[0][: i + 1]) for i in range(len(levels[0]))]]
        else:
            columns = range(1, len(levels[1]))
            said = [model(text + levels[0][:i] + [level[i] for level in levels[1:]]) for i in columns]
            levels = [level[1:] for level in levels] + [said]
        text = text + hit
        yield text, levels, ngrams


def test_two_columns_by_hand():
    passes = drive(OriginalWindow(window=2, ngram=3, guesses=2), by_place, [1, 1])
    row, draft, text = next(passes)  # behind 4, at place 2: the guesses 1 and 1, which say 3 + 3 and 3 + 4
    assert text == [1, 1, 4, 0]
    assert (draft.tokens.tolist(), draft.parents.tolist()) == ([4, 1, 1], [-1, 0, 1])
    assert draft.probe.tolist() == [False, True, True]
    assert (row.levels, row.ngrams) == ([[1], [6, 0]], {})
    row, draft, text = next(passes)  # behind 0, at place 3: 6 says 18 + 4; 0 behind 1 says 0 + 5
    assert text == [1, 1, 4, 0, 3]
    assert (draft.tokens.tolist(), draft.parents.tolist()) == ([0, 1, 6, 0], [-1, 0, 0, 1])
    assert (row.levels, row.ngrams) == ([[0], [1, 5]], {0: [(6, 1)], 1: [(0, 5)]})
    row, draft, text = next(passes)  # behind 3, at place 4: 1 says 3 + 5; 5 behind 0 says 15 + 6
    assert text == [1, 1, 4, 0, 3, 6]
    assert (row.levels, row.ngrams) == ([[5], [1, 0]], {0: [(6, 1), (5, 0)], 1: [(0, 5)], 3: [(1, 1)]})


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("shift", ["one", "accepted"])
@pytest.mark.parametrize(("window", "ngram", "guesses"), SETTINGS)
def test_equals_the_rule_on_lists(window: int, ngram: int, guesses: int, shift: str, faithful: bool):
    rule = OriginalWindow(window=window, ngram=ngram, guesses=guesses, shift=shift, faithful=faithful)
    prompt = [3, 1, 4, 1, 5, 2, 6, 5]
    ours, wanted = drive(rule, by_context, prompt), rule_on_lists(by_context, prompt, rule)
    for _ in range(80):
        (row, _, text), (right, levels, ngrams) = next(ours), next(wanted)
        assert (text, row.levels, row.ngrams) == (right, levels, ngrams)
    assert text == plain(by_context, prompt, len(text))
    assert len(text) > len(prompt) + 81, "no draft was accepted, so that little was compared"


@pytest.mark.parametrize(("window", "ngram", "guesses"), SETTINGS)
def test_the_window_fits_its_probes(window: int, ngram: int, guesses: int):
    rule = OriginalWindow(window=window, ngram=ngram, guesses=guesses)
    row = rule.start(np.array([3, 1, 4], np.int32))
    assert isinstance(row, OriginalRow)
    most, passes = sum(map(len, row.levels)), drive(rule, by_context, [3, 1, 4, 1, 5])
    for _ in range(30):
        row, draft, _ = next(passes)
        most = max(most, sum(map(len, row.levels)))
        assert draft.probe.sum() <= rule.probes + guesses
    assert most == rule.probes == row.probes


@pytest.mark.parametrize(("faithful", "tokens"), [(True, 4), (False, 5)])
def test_a_full_match(faithful: bool, tokens: int):
    passes = drive(OriginalWindow(window=4, ngram=5, guesses=4, faithful=faithful), same, [6, 6])
    lengths = [2 + 1] + [len(next(passes)[2]) for _ in range(8)]
    assert np.diff(lengths).tolist() == [1] * 4 + [tokens] * 4  # 3 passes fill the window, the next finds n-grams


@pytest.mark.parametrize("shift", ["one", "accepted"])
def test_a_cut_draft_learns_what_has_run(shift: str):
    prompt, rule = [3, 1, 4, 1, 5], OriginalWindow(window=7, ngram=5, guesses=7, shift=shift)
    passes, whole = drive(rule, by_context, prompt, nodes=12), drive(rule, by_context, prompt)
    for _ in range(60):
        row, draft, text = next(passes)
        next(whole)
        assert [len(level) for level in row.levels][-1] >= 7
        assert len(draft) <= 13
    assert text == plain(by_context, prompt, len(text))
    kept, all_kept = (sum(map(len, each.ngrams.values())) for each in (row, next(whole)[0]))
    assert kept < all_kept


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("shift", ["one", "accepted"])
@pytest.mark.parametrize("nodes", [6, 28])
def test_the_output_is_that_of_plain_generate(shift: str, faithful: bool, nodes: int):
    model, prompt = tiny("llama"), torch.tensor([[WORDS[3], WORDS[1], WORDS[4], WORDS[1], WORDS[5]]])
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 80, "do_sample": False}
    window = OriginalWindow(window=7, ngram=5, guesses=7, shift=shift, faithful=faithful)
    la = Lookahead(model, drafter=window, nodes=nodes)
    assert torch.equal(la.generate(prompt, **arguments), model.generate(prompt, **arguments))
    assert la.last is not None
    assert la.last.tokens_per_pass > 1.1


@pytest.mark.parametrize("wrong", [{"window": 0}, {"ngram": 2}, {"guesses": 0}, {"shift": "two"}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OriginalWindow(**wrong)
