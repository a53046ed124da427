"""The window of Jacobi lookahead against the rule of the paper on plain lists, and what becomes of its probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from unittest import mock
from zlib import crc32

import numpy as np
import pytest
import torch
from drafters import Watcher
from hypothesis import given, settings
from hypothesis import strategies as st
from law import Case, assert_exact
from models import JSON_VOCAB, VOCAB, json_tokenizer, tiny
from numba import njit

from lookahead import Draft, Grower, Jacobi, Lookahead, Step
from lookahead.cache import NAME, TreeCache
from lookahead.errors import InvalidArgument
from lookahead.grammar.grammar import Grammar, compiled
from lookahead.grammar.matcher import Matcher
from lookahead.grammar.vocabulary import Vocabulary
from lookahead.grow import SOURCES, Row
from lookahead.sources import evidence
from lookahead.sources.codes import JACOBI
from lookahead.sources.evidence import BY_WINDOW, WINDOW_HERE, WINDOW_LENGTH, WINDOW_RANK, Evidence, log_odds
from lookahead.sources.jacobi import SLOTS, Ngrams, ask_ngrams, empty_ngrams, keep_ngram
from lookahead.sources.tree import NODES
from lookahead.sources.window import UNKNOWN

Model = Callable[[list[int]], int]
Gram = tuple[int, ...]
Cut = tuple[int, int] | None  # nodes and depth

sizes = st.builds(
    Jacobi,
    window=st.integers(1, 7),
    ngram=st.integers(3, 6),
    verify=st.sampled_from((1, 2, 3, 8)),
    shift=st.sampled_from(("one", "accepted")),
    switch=st.just("on"),
)
prompts = st.lists(st.integers(0, 6), min_size=1, max_size=12)


def array(tokens: Sequence[int]) -> Any:
    context = np.array(tokens, np.int32)
    context.flags.writeable = False
    return context


def model_of(seed: int, vocab: int = 7, order: int = 2) -> Model:
    """Return a model that looks at the last tokens and, now and then, at where it is."""

    def model(text: list[int]) -> int:
        return crc32(bytes([seed % 251, len(text) % 19 == 0, *text[-order:]])) % vocab

    return model


def row_of(options: Jacobi, text: Sequence[int], *sources: Any, **arguments: Any) -> Row:
    row = Grower(sources=(*sources, options), min_chance=0.0, **arguments).start(array(text))
    assert isinstance(row, Row)
    return row


def verify(draft: Draft, model: Model, text: list[int], *, drawn: bool = False) -> Step:
    """Run `draft` through `model`; what is `drawn` is not what is likeliest."""
    said = [model(text + draft.tokens[draft.path(node)[1:]].tolist()) for node in range(len(draft))]
    path = [0]
    while (child := draft.child(path[-1], said[path[-1]])) is not None:
        path.append(child)
    tokens, picks = [said[node] for node in path], np.array(said, np.int32)
    top = (picks[:, None] + np.arange(1 if drawn else 0, 3)) % VOCAB
    logits = -np.cumsum(np.ones(top.shape, np.float32), 1)
    return Step(0, draft, np.array(path), np.array(tokens), top, logits, picks.__getitem__ if drawn else None)


# The rule on lists


def slot_of(token: int) -> int:
    mixed = (token + 1) * 0x2545F4914F6CDD1D % 2**64
    return (mixed >> 40) % SLOTS


@dataclass
class Kept:
    """n-grams on lists: of every slot the key, and what follows it with the place of the key, the newest first."""

    most: int
    slots: dict[int, tuple[int, list[tuple[Gram, int]]]] = field(default_factory=dict)

    def keep(self, key: int, follow: Gram, place: int) -> None:
        had, known = self.slots.get(slot_of(key), (key, []))
        others = [one for one in known if had == key and one[0] != follow]
        self.slots[slot_of(key)] = key, [(follow, place), *others][: self.most]

    def of(self, key: int) -> list[tuple[Gram, int]]:
        had, known = self.slots.get(slot_of(key), (key, []))
        return known if had == key else []


def kept(ngrams: Ngrams) -> dict[int, tuple[int, list[tuple[Gram, int]]]]:
    """Return our n-grams as `Kept` has them."""
    found = {}
    for slot in np.flatnonzero(ngrams.key).tolist():
        held = range(ngrams.held[slot])
        grams = [(tuple(ngrams.tokens[slot, r].tolist()), int(ngrams.column[slot, r])) for r in held]
        found[slot] = int(ngrams.key[slot]) - 1, grams
    return found


class OnLists:
    """The window on lists. Level 0 has no entry for the last token, the others have; None: a guess not yet made."""

    def __init__(self, options: Jacobi) -> None:
        self.options, self.ngrams = options, Kept(options.verify)
        self.levels: list[list[int | None]] = [[None] * (options.window + options.ngram - 3)]

    def begin(self, ours: list[list[int]]) -> list[int]:
        """Take from our window the guesses that were to be made; return those."""
        assert [len(level) for level in ours] == [len(level) for level in self.levels]
        made = []
        for level, theirs in zip(self.levels, ours, strict=True):
            for i, guess in enumerate(theirs):
                assert level[i] in (None, guess)
                made += [guess] if level[i] is None else []
                level[i] = guess
        return made

    def columns(self) -> list[list[int]]:
        """Return the guesses behind the last token that lead to what each column says next."""
        first, *others = self.levels
        return [[*first[:i], *(level[i] for level in others)] for i in range(len(first) + 1)]  # type: ignore[misc]

    def end(self, said: list[int | None], text: list[int], accepted: int) -> None:
        """Take in what the model said behind every column; None where it was not asked."""
        first, *others = self.levels
        if len(self.levels) < self.options.ngram - 1:
            self.levels = [level[1:] for level in self.levels] + [said[1:]]
            return
        for i, last in enumerate(said):
            follow = tuple(level[i] for level in others)
            if last is not None:
                key = text[-1] if i == 0 else first[i - 1]
                self.ngrams.keep(key, (*follow, last), len(text) - 1 + i)  # type: ignore[arg-type]
        skip = accepted if self.options.shift == "accepted" else 0
        self.levels = [others[0][1 + skip :], *(level[skip:] for level in others[1:]), said[skip:]]
        for i, level in enumerate(self.levels):
            level += [None] * (self.options.window - (i == 0) - len(level))


def guesses(row: Row) -> list[list[int]]:
    assert row._window is not None
    levels, (filled, columns) = row._window.guesses.levels, row._window.guesses.state.tolist()
    return [levels[level, 1 if level == 0 else 0 : columns].tolist() for level in range(filled + 1)]


def node_of(draft: Draft, tokens: Sequence[int]) -> int | None:
    """Return the node behind `tokens`, probe or not; None: it did not run."""
    node: int | None = 0
    for token in tokens:
        found = np.flatnonzero((draft.parents == node) & (draft.tokens == token))
        assert len(found) <= 1
        if len(found) == 0:
            return None
        node = int(found[0])
    return node


def follow_along(
    options: Jacobi, model: Model, text: list[int], passes: int, *, cuts: Sequence[Cut] = (None,), drawn: bool = False
) -> Iterator[tuple[OnLists, Row, Step]]:
    """Run both windows side by side; after each pass they must hold the same guesses and n-grams."""
    row, naive, prompt, nodes = row_of(options, text), OnLists(options), set(text), 6
    for number in range(passes):
        whole = row.propose(array(text), nodes)
        assert whole == whole.deduplicate()
        assert (~whole.probe).sum() <= nodes + 1
        assert whole.probe.sum() <= options.probes == row.probes
        made = naive.begin(guesses(row))
        assert set(made) <= prompt | set(whole.tokens[~whole.probe].tolist())
        cut = cuts[number % len(cuts)]
        draft = whole if cut is None else whole.cut(cut[0], depth=cut[1])
        step = verify(draft, model, text, drawn=drawn)
        columns = naive.columns()
        assert all(node_of(whole, column) is not None for column in columns)
        ends = [node_of(draft, column) for column in columns]
        row.observe(step)
        naive.end(
            [None if end is None else model(text + columns[i]) for i, end in enumerate(ends)], text, step.accepted
        )
        assert kept(row._ngrams) == naive.ngrams.slots
        yield naive, row, step
        text = text + step.tokens.tolist()


@settings(max_examples=60)
@given(sizes, prompts, st.integers(0, 250), st.integers(1, 3), st.booleans())
def test_the_window_equals_the_rule_on_lists(options: Jacobi, text: list[int], seed: int, order: int, drawn: bool):
    for _ in follow_along(options, model_of(seed, order=order), text, 25, drawn=drawn):
        pass


@settings(max_examples=60)
@given(
    sizes,
    prompts,
    st.integers(0, 250),
    st.lists(st.none() | st.tuples(st.integers(0, 30), st.integers(0, 8)), min_size=1, max_size=6),
)
def test_what_a_cut_takes_away_is_guessed_anew(options: Jacobi, text: list[int], seed: int, cuts: list[Cut]):
    """So it is near the end of a text and of the position table; a pass that gave no numbers runs the root alone."""
    for _ in follow_along(options, model_of(seed), text, 25, cuts=cuts):
        pass


@pytest.mark.parametrize("shift", ["one", "accepted"])
@pytest.mark.parametrize(("width", "ngram", "verify"), [(1, 3, 1), (5, 3, 2), (2, 6, 3), (15, 5, 15)])
def test_long_runs_fill_keep_evict_and_accept(width: int, ngram: int, verify: int, shift: Any):
    options = Jacobi(window=width, ngram=ngram, verify=verify, shift=shift, switch="on")
    accepted, evicted, most = 0, False, 0
    for naive, _, step in follow_along(options, model_of(5, vocab=9), [3, 1, 4, 1, 5, 2, 6, 5], 120):
        accepted += step.accepted
        held = [grams for _, grams in naive.ngrams.slots.values()]
        most = max(most, int(step.draft.probe.sum()))
        evicted = evicted or max(map(len, held), default=0) == verify
    assert accepted > 10
    assert evicted or verify > 9
    assert most <= options.probes
    assert len(naive.levels) == ngram - 1


@settings(max_examples=40)
@given(sizes)
def test_probes_are_as_many_as_the_window_can_have(options: Jacobi):
    """Distinct tokens everywhere, so that no guess stands where another does: the bound is met and never exceeded."""
    counter, seen = iter(range(10, 10**6)), 0
    row, text = row_of(options, [1, 2, 3]), [1, 2, 3]

    def never_seen(*given: Any) -> None:
        given[-1][:] = [next(counter) for _ in given[-1]]

    for _ in range(options.ngram + 2):
        with mock.patch("lookahead.grow.look_ahead", never_seen):
            draft = row.propose(array(text), 0)
        assert draft.probe.sum() <= options.probes
        seen = max(seen, int(draft.probe.sum()))
        step = verify(draft, lambda _: next(counter), text)
        row.observe(step)
        text = text + step.tokens.tolist()
    assert seen == options.probes


# n-grams


@njit
def keep_all(ngrams, firsts, follows, columns):  # type: ignore[no-untyped-def]
    for i in range(firsts.shape[0]):
        keep_ngram(ngrams, np.int64(firsts[i]), follows[i], columns[i])


@njit
def ask(ngrams, suffix, depth, found):  # type: ignore[no-untyped-def]
    evidence.clear(found)
    ask_ngrams(ngrams, suffix, suffix.shape[0], depth, found)


def naive_ask(
    ngrams: Kept, length: int, text: list[int]
) -> tuple[dict[int, float], dict[int, tuple[int, int]], set[int]]:
    """Return the share of every successor of `text`, the length and rank of the longest n-gram that names it, and those
    that were written at this very place."""
    worth: dict[int, float] = {}
    longest: dict[int, tuple[int, int]] = {}
    here, total = set(), 0.0
    for n in range(1, min(length, len(text)) + 1):
        for rank, (follow, place) in enumerate(ngrams.of(text[-n])):
            if list(follow[: n - 1]) == text[len(text) - n + 1 :]:
                token = follow[n - 1]
                worth[token] = worth.get(token, 0.0) + 4.0**n / (1 + rank)
                total += 4.0**n / (1 + rank)
                if n > longest.get(token, (0, 0))[0]:
                    longest[token] = n, rank
                if place == len(text) - n:
                    here.add(token)
    return {token: one / (total + 4.0) for token, one in worth.items()}, longest, here


def rows(found: Evidence) -> Any:
    return found.rows[: found.size[0]].view(np.recarray)


@settings(max_examples=150)
@given(st.integers(3, 6), st.integers(1, 4), st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), max_size=40),
       st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())  # fmt: skip
def test_ngrams_equal_naive(ngram: int, most: int, grams: list[list[int]], text: list[int], data: st.DataObject):
    ours, naive = empty_ngrams(Jacobi(ngram=ngram, verify=most)), Kept(most)
    places = [data.draw(st.integers(0, 8)) for _ in grams]
    for gram, place in zip(grams, places, strict=True):
        naive.keep(gram[0], tuple(gram[1:ngram]), place)
    given_ = np.array(grams, np.int32).reshape(-1, 6)
    keep_all(ours, given_[:, 0].copy(), given_[:, 1:ngram].copy(), np.array(places, np.int32))
    assert kept(ours) == naive.slots
    found, depth = evidence.empty_evidence(), data.draw(st.integers(0, len(text) - 1))
    ours.root[0] = len(text) - 1 - depth
    ask(ours, np.array(text[::-1], np.int64), depth, found)
    share, longest, here = naive_ask(naive, ngram - 1, text)
    assert {int(row.token) for row in rows(found)} == set(share)
    for row, x in zip(rows(found), found.x, strict=False):
        token = int(row.token)
        assert x[BY_WINDOW] == pytest.approx(float(log_odds(share[token])), abs=1e-4)
        n, rank = longest[token]
        assert row.window == n
        assert x[WINDOW_LENGTH] == pytest.approx(0.5 * n)
        assert x[WINDOW_RANK] == pytest.approx(1 / (1 + rank))
        assert x[WINDOW_HERE] == (token in here)
    assert found.absent[BY_WINDOW] == (-3.0 if share else 0.0)


def test_keys_that_meet_in_a_slot_take_turns():
    one, other = 5, next(token for token in range(6, 10**6) if slot_of(token) == slot_of(5))
    ngrams, found = empty_ngrams(Jacobi(ngram=3, verify=2)), evidence.empty_evidence()
    follows, places = np.array([[7, 8], [9, 10], [11, 12]], np.int32), np.zeros(3, np.int32)
    keep_all(ngrams, np.array([one, one, other], np.int32), follows, places)
    assert kept(ngrams) == {slot_of(one): (other, [((11, 12), 0)])}
    ask(ngrams, np.array([one], np.int64), 0, found)
    assert found.size[0] == 0
    ask(ngrams, np.array([other], np.int64), 0, found)
    assert rows(found).token.tolist() == [11]


# In the grower


def watched(sources: Any, model: Any, ids: Any, **arguments: Any) -> tuple[Any, list[Step], Lookahead]:
    """Return what `generate` gives, and the steps of the first row."""
    watcher = Watcher(Grower(sources=sources, vocab_size=int(model.config.vocab_size)))
    la = Lookahead(model, drafter=watcher, nodes=16)
    out = la.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    return out, watcher.rows[0].steps, la


OPTIONS = Jacobi(window=8, ngram=4, verify=8, switch="on")
IDS = torch.arange(3, 11)[None]


@pytest.mark.parametrize(("sample", "ahead"), [(False, 16), (True, 0), (True, 16)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_the_window_alone_drafts_what_is_accepted(family: str, sample: bool, ahead: int):
    """Nobody else is asked: what is accepted was written by the model itself in its window, much of it for the first
    time, so that no n-gram of the text could have told."""
    torch.manual_seed(0)
    options: Any = {"do_sample": True, "temperature": 0.8} if sample else {"do_sample": False}
    with mock.patch("lookahead.foresight.AHEAD", ahead):
        _, steps, la = watched((OPTIONS,), tiny(family), IDS, max_new_tokens=100, **options)
    text, pairs, accepted, first = [*IDS[0].tolist(), int(steps[0].draft.tokens[0])], set[Any](), 0, 0
    for step in steps:
        assert (step.foreseen is not None) == (sample and ahead > 0)
        for node, token in zip(step.path[1:], step.tokens.tolist(), strict=False):
            pairs |= set(pairwise(text))
            by_window = step.draft.source[node] == SOURCES.index("jacobi")
            accepted, first = accepted + by_window, first + (by_window and (text[-1], token) not in pairs)
            assert by_window or step.foreseen is not None, "nobody but the window and the noise is there to draft"
            text.append(token)
        text.append(int(step.tokens[-1]))
    assert la.last is not None
    assert la.last.tokens_per_pass > (1.1 if sample else 1.5)
    assert accepted > 8
    assert first > 4


def test_nodes_say_that_they_come_from_the_window():
    assert SOURCES[JACOBI] == "jacobi"
    row, text, seen = row_of(OPTIONS, [1, 2, 3, 4]), [1, 2, 3, 4], set()
    model = model_of(3)
    for _ in range(20):
        draft = row.propose(array(text), 8)
        assert (draft.source[draft.probe] == JACOBI).all()
        assert (draft.weight[draft.probe] == 0).all()
        seen |= set(draft.source[1:][~draft.probe[1:]].tolist())
        step = verify(draft, model, text)
        row.observe(step)
        text = text + step.tokens.tolist()
    assert seen == {JACOBI}


@settings(max_examples=40)
@given(sizes, prompts, st.integers(0, 250), st.integers(0, 12), st.booleans())
def test_the_window_takes_no_room_from_other_drafts(
    options: Jacobi, text: list[int], seed: int, nodes: int, recycles: bool
):
    """Probes come behind the tree and on top of the budget; no acceptable node hangs below one."""
    row, model = row_of(options, text, "prompt", *(["recycle"] if recycles else [])), model_of(seed)
    for _ in range(8):
        draft = row.propose(array(text), nodes)
        tree = row._tree.nodes[: row._tree.used[NODES]]
        assert draft.tokens[: len(tree)].tolist() == tree["token"].tolist()
        assert draft.probe.tolist() == [False] * len(tree) + [True] * (len(draft) - len(tree))
        assert len(tree) <= nodes + 1
        assert draft.probe.sum() <= options.probes
        assert draft.deduplicate().cut(nodes + row.probes) is draft
        step = verify(draft, model, text)
        row.observe(step)
        text = text + step.tokens.tolist()


def test_only_accepted_nodes_stay_in_the_cache():
    """After every pass keys and values are those of the text, and of nothing else that ran."""
    model, longest = tiny("llama"), []
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=60, do_sample=False)
    wanted, keep = model(plain)[NAME].layers, TreeCache.keep

    def compared(self: Any, paths: Any) -> None:
        keep(self, paths)
        longest.append(len(paths[0]))
        assert self.used == IDS.shape[1] + sum(longest)
        for ours, theirs in zip(self.layers, wanted, strict=True):
            assert torch.allclose(ours.keys[:, :, : self.used], theirs.keys[:, :, : self.used])
            assert torch.allclose(ours.values[:, :, : self.used], theirs.values[:, :, : self.used])

    with mock.patch.object(TreeCache, "keep", compared):
        out, steps, _ = watched(("prompt", OPTIONS), model, IDS, max_new_tokens=60, do_sample=False)
    assert torch.equal(out, plain)
    assert max(longest) > 1
    assert min(int(step.draft.probe.sum()) for step in steps[5:20]) > 10


def test_a_guess_that_a_probe_holds_is_not_accepted():
    """The model says what the window guessed, and yet the pass gives one token: nobody drafted it."""
    row, text = row_of(OPTIONS, [4] * 6), [4] * 6
    draft = row.propose(array(text), 0)
    assert draft.tokens.tolist() == [4] * (OPTIONS.window + OPTIONS.ngram - 2)
    step = verify(draft, lambda _: 4, text)
    assert step.accepted == 0
    result = assert_exact(Case(drafter="jacobi", nodes=1, new=12, seed=3))
    assert all(sum(one.committed) <= 2 for one in result.last.passes)


def test_a_window_that_rests_starts_again():
    grower = Grower(sources=("recycle", Jacobi(window=4, ngram=3, verify=4)), min_chance=0.0)
    text, model = [1, 2, 3, 4], model_of(3)
    row = grower.start(array(text))
    assert isinstance(row, Row)
    assert grower.window_runs is False
    for on in (False, True, True, True, False, True):
        grower.paid.switches["jacobi"].on = on
        draft = row.propose(array(text), 4)
        assert draft.probe.any() == on
        step = verify(draft, model, text)
        row.observe(step)
        text = text + step.tokens.tolist()
        if not on:
            assert (row._window.guesses.levels == UNKNOWN).all()  # type: ignore[union-attr]
    assert kept(row._ngrams), "what was written before stays"


def test_without_a_window_there_are_no_probes():
    row = Grower(sources=("prompt", "recycle")).start(array([1, 2, 1, 2]))
    assert row.probes == 0
    assert not row.propose(array([1, 2, 1, 2]), 8).probe.any()
    assert Grower(sources="jacobi").jacobi == Jacobi()
    assert Grower(sources=OPTIONS).jacobi == OPTIONS
    assert "jacobi" in Grower(sources=("jacobi", "prompt")).paid.switches
    assert "jacobi" not in Grower(sources=("jacobi",)).paid.switches, "nobody else is there to draft"
    assert "jacobi" not in Grower(sources=OPTIONS).paid.switches


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "window=0; give a whole number from 1 to 64"),
        ({"window": 65}, "window=65"),
        ({"window": True}, "window=True"),
        ({"window": 2.0}, "window=2.0"),
        ({"ngram": 2}, "ngram=2; give a whole number from 3 to 64"),
        ({"ngram": 100}, "ngram=100"),
        ({"verify": 0}, "verify=0"),
        ({"verify": "4"}, "verify='4'"),
        ({"shift": "two"}, "shift='two'; give 'one' or 'accepted'"),
        ({"switch": "off"}, "switch='off'; give 'auto' or 'on'"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], message: str):
    with pytest.raises(InvalidArgument, match=message):
        Jacobi(**wrong)


@pytest.mark.parametrize(("width", "ngram", "probes"), [(15, 5, 59), (7, 5, 27), (1, 3, 1), (2, 3, 3)])
def test_probes_of_known_sizes(width: int, ngram: int, probes: int):
    """(N - 1) W - 1 where the window is wide; while it fills, a narrow one may have more."""
    assert Jacobi(window=width, ngram=ngram).probes == probes


# Under a grammar


GRAMMARS = ("[0-9]{2,6}(, [0-9]{2,6})*", "(ab|abc|the )*", "[a-z ]+")


def bits(mask: Any) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize("pattern", GRAMMARS)
@pytest.mark.parametrize("seed", range(3))
def test_guesses_that_are_known_to_be_forbidden_are_replaced(pattern: str, seed: int):
    """A model that wants anything, and a grammar: guesses below nodes of the tree are allowed where one can tell, and
    what the model picks in the window is of a kind that the grammar has allowed somewhere."""
    rng, text, prompt = np.random.default_rng(seed), [], rng_tokens(seed)
    matcher = Matcher(compiled(Grammar.regex(pattern), Vocabulary.of(json_tokenizer())), (1,), JSON_VOCAB)
    row = row_of(OPTIONS, prompt, "prompt", "recycle", vocab_size=JSON_VOCAB)
    assert row.obey(matcher)
    below, replaced, union = 0, 0, set[int]()
    for _ in range(30):
        matcher.settle(text)
        draft = row.propose(array(prompt + text), 8)
        allowed = {}
        for node in np.flatnonzero(~draft.probe).tolist():
            allowed[node] = bits(matcher.mask(matcher.follow(text + draft.tokens[draft.path(node)[1:]].tolist())))
        for node in np.flatnonzero(draft.probe).tolist():
            above = int(draft.parents[node])
            siblings = (draft.parents == above) & ~draft.probe
            if above in allowed and siblings.any() and row._tree.nodes["state"][above] > 0:
                assert int(draft.tokens[node]) in allowed[above]
                below += 1
        for node in np.flatnonzero(row._tree.nodes["state"][: row._tree.used[NODES]] > 0).tolist():
            union |= allowed[node]
        tops = np.array([rng.permutation(JSON_VOCAB)[:8] for _ in range(len(draft))], np.int32)
        path, tokens = [0], []
        while path[-1] is not None:
            choice = sorted(allowed[path[-1]] - {1})
            tokens.append(int(rng.choice(choice)))
            path.append(draft.child(path[-1], tokens[-1]))
        row.observe(
            Step(0, draft, np.array(path[:-1]), np.array(tokens), tops, -np.cumsum(np.ones(tops.shape, np.float32), 1))
        )
        text = text + tokens
        replaced += newest_is_seen(row, tops, union)
    assert below > 0 or pattern != GRAMMARS[2]
    assert replaced > 20


def rng_tokens(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, JSON_VOCAB, 30).tolist()


def newest_is_seen(row: Row, tops: Any, union: set[int]) -> int:
    """Check the picks that were taken in last; return how many are not the likeliest token."""
    picks = guesses(row)[-1]
    said = [next((t for t in top if t in union), top[0]) for top in tops.tolist()]
    assert set(picks) <= {*said, UNKNOWN}
    return sum(pick not in set(tops[:, 0].tolist()) for pick in picks)


@pytest.mark.parametrize("drafter", ["jacobi+grammar", "prompt+recycle+leaping+grammar"])
@pytest.mark.parametrize("sample", [False, True])
def test_the_law_holds_under_a_grammar(drafter: str, sample: bool):
    schema = '{"type": "object", "properties": {"name": {"type": "string"}, "kind": {"enum": ["ab", "abc"]}}}'
    for seed, grammar in enumerate((schema, f"regex:{GRAMMARS[0]}", ("", schema, "regex:(ab|[0-9]{1,3})*"))):
        rows = len(grammar) if isinstance(grammar, tuple) else 1 + seed
        case = Case(seed=seed, rows=rows, mask="left", new=40, eos=(1,), sample=sample, drafter=drafter)
        assert_exact(replace(case, grammar=grammar, calls=2))
