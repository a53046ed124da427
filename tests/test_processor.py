"""Grammars under plain `model.generate()`: what comes out is in the grammar, and ends exactly where it may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from models import EOS, JSON_VOCAB, PAD, json_tokenizer, tiny
from torch import Tensor
from transformers import LogitsProcessor

import lookahead
from lookahead.errors import GrammarError, InvalidArgument
from lookahead.grammar.grammar import Grammar
from lookahead.grammar.matcher import Matcher
from lookahead.grammar.processor import GrammarProcessor
from lookahead.grammar.vocabulary import Vocabulary

PROMPT = 5
PAIRS = Grammar.regex("(ab|[0-9]{1,2})(, (ab|[0-9]{1,2})){0,4}")
LIST = Grammar.json_schema({"type": "array", "items": {"enum": ["a", 1, None, "né"]}, "maxItems": 4})
SHORT = Grammar.choice(["true", "false", "null"])


@pytest.fixture
def model() -> Any:
    return tiny("llama", vocab_size=JSON_VOCAB)


def prompts(rows: int, seed: int = 0, length: int = PROMPT) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(3, len(json_tokenizer()), (rows, length))


def plain(model: Any, ids: Tensor, processor: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    given = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": EOS, "attention_mask": torch.ones_like(ids)}
    processors = processor if isinstance(processor, list) else [processor]
    return model.generate(ids, logits_processor=processors, **given | options)


def text(tokens: Sequence[int]) -> str:
    return Vocabulary.of(json_tokenizer()).decode(tokens).decode()


def answer(row: Tensor, start: int = PROMPT, ends: Sequence[int] = (EOS,)) -> tuple[list[int], bool]:
    """Return what was generated up to the end token, and whether there was one."""
    tokens = row[start:].tolist()
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return (tokens, False) if end is None else (tokens[:end], True)


class Seen(LogitsProcessor):
    """Writes down the ids and scores behind the grammar's processor."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append((input_ids, scores.clone()))
        return scores


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("grammar", [PAIRS, LIST, SHORT], ids=["regex", "schema", "choice"])
def test_end_token_exactly_where_the_grammar_accepts(model: Any, grammar: Grammar, sample: bool) -> None:
    ended = 0
    for seed in range(4):
        seen = Seen()
        ids = prompts(3, seed)
        out = plain(model, ids, [grammar.processor(json_tokenizer()), seen], do_sample=sample)
        for row in range(3):
            tokens, complete = answer(out[row])
            ended += complete
            assert not complete or grammar.accepts(text(tokens))
            assert out[row, PROMPT + len(tokens) + 1 :].tolist() == [PAD] * (out.shape[1] - PROMPT - len(tokens) - 1)
        for before, scores in seen.steps:
            for row in range(3):
                tokens, complete = answer(before[row])
                allowed = scores[row] > -torch.inf
                if complete:
                    assert allowed.nonzero().flatten().tolist() == [EOS]
                else:
                    assert allowed.any()
                    assert bool(allowed[EOS]) == grammar.accepts(text(tokens))
                    assert not allowed[[0, 2]].any()
                    assert not allowed[len(json_tokenizer()) :].any()
    assert ended > 3


def test_allowed_scores_are_the_models_own(model: Any) -> None:
    out = plain(
        model,
        prompts(2),
        LIST.processor(json_tokenizer()),
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(out.scores) == out.sequences.shape[1] - PROMPT
    for scores, logits in zip(out.scores, out.logits, strict=True):
        allowed = scores > -torch.inf
        assert torch.equal(scores[allowed], logits[allowed])
        assert (logits > -torch.inf).all(), "the raw logits are left alone"


def test_a_grammar_for_each_row_and_free_rows(model: Any) -> None:
    ids = prompts(3)
    free = plain(model, ids, [])
    mixed = plain(model, ids, GrammarProcessor([LIST, None, SHORT], json_tokenizer()))
    for row, grammar in ((0, LIST), (2, SHORT)):
        alone = plain(model, ids[row : row + 1], grammar.processor(json_tokenizer()))[0]
        assert answer(mixed[row]) == answer(alone)
    assert answer(mixed[1])[0][: free.shape[1] - PROMPT] == answer(free[1])[0][: mixed.shape[1] - PROMPT]
    assert grammar.accepts(text(answer(mixed[2])[0]))


def test_rows_of_one_prompt_share_its_grammar(model: Any) -> None:
    processor = GrammarProcessor([SHORT, None, LIST], json_tokenizer())
    out = plain(model, prompts(3), processor, do_sample=True, num_return_sequences=2)
    assert out.shape[0] == 6
    for row, grammar in ((0, SHORT), (1, SHORT), (4, LIST), (5, LIST)):
        tokens, complete = answer(out[row])
        assert complete == grammar.accepts(text(tokens))


def test_one_object_serves_one_call_after_another(model: Any) -> None:
    """Prompts may be the same, longer, shorter, others, more, or the last output and what was said to it."""
    processor = LIST.processor(json_tokenizer())
    first = plain(model, prompts(2), processor)
    turn = torch.cat([first, prompts(2, 3, 1)], 1)
    others = (prompts(2, 1), prompts(3), prompts(1, 2, 9), prompts(2, 0, 2), prompts(2), turn)
    for ids in (prompts(2), *others, prompts(2)):
        again = plain(model, ids, processor)
        assert torch.equal(again, plain(model, ids, LIST.processor(json_tokenizer())))
    assert torch.equal(again, first)


def test_token_by_token_is_the_same_as_at_once(model: Any) -> None:
    """A user who calls generate() for every token, on what came out of the last call."""
    ids = prompts(1)
    whole = plain(model, ids, SHORT.processor(json_tokenizer()))
    processor = SHORT.processor(json_tokenizer())
    while ids.shape[1] < whole.shape[1]:
        ids = plain(model, ids, processor, max_new_tokens=1)
    assert torch.equal(ids, whole)


def test_beams_change_places(model: Any) -> None:
    for grammar in (PAIRS, LIST, SHORT):
        out = plain(model, prompts(2), grammar.processor(json_tokenizer()), num_beams=4, num_return_sequences=3)
        assert out.shape[0] == 6
        for row in out:
            tokens, complete = answer(row)
            assert grammar.accepts(text(tokens)) or not complete
            assert complete or len(tokens) == 40
    rows = plain(model, prompts(2), GrammarProcessor([SHORT, LIST], json_tokenizer()), num_beams=3)
    assert SHORT.accepts(text(answer(rows[0])[0]))
    assert LIST.accepts(text(answer(rows[1])[0])) or not answer(rows[1])[1]


def test_assisted_generation_goes_back(model: Any) -> None:
    for grammar in (PAIRS, LIST):
        alone = plain(model, prompts(1), grammar.processor(json_tokenizer()))
        assisted = plain(model, prompts(1), grammar.processor(json_tokenizer()), prompt_lookup_num_tokens=3)
        assert torch.equal(alone, assisted)
        other = tiny("qwen2", vocab_size=JSON_VOCAB)
        assisted = plain(model, prompts(1), grammar.processor(json_tokenizer()), assistant_model=other)
        assert torch.equal(alone, assisted)


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 12},
        {"min_length": 20},
        {"forced_eos_token_id": EOS, "max_new_tokens": 3},
        {"forced_bos_token_id": 20},
        {"suppress_tokens": [EOS]},
        {"suppress_tokens": list(range(3, 100))},
        {"begin_suppress_tokens": list(range(100))},
        {"bad_words_ids": [[65], [66, 67]]},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"sequence_bias": [[[EOS], 20.0]]},
        {"sequence_bias": [[[70], float("-inf")]]},
        {"do_sample": True, "top_k": 3, "top_p": 0.6, "temperature": 0.7},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"max_new_tokens": 1},
    ],
    ids=lambda options: "+".join(options),
)  # fmt: skip
def test_beside_other_processors(model: Any, options: dict[str, Any]) -> None:
    """Where others forbid all that the grammar allows, any token comes, and the row may only end; nothing breaks."""
    for grammar in (PAIRS, SHORT):
        try:
            out = plain(model, prompts(2), grammar.processor(json_tokenizer()), **options)
        except RuntimeError as error:
            assert "probability tensor" in str(error)  # noqa: PT017 - sampling where nothing is left
            continue
        left = options.keys() & {"forced_eos_token_id", "forced_bos_token_id", "min_new_tokens", "min_length",
                                 "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
                                 "no_repeat_ngram_size"}  # fmt: skip
        for row in out:
            tokens, complete = answer(row)
            assert left or not complete or grammar.accepts(text(tokens))


def test_prompt_as_embeddings_alone(model: Any) -> None:
    ids = prompts(2)
    embeds = model.get_input_embeddings()(ids).detach()
    for _ in range(2):
        processor = LIST.processor(json_tokenizer())
        for _ in range(2):
            out = model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones_like(ids),
                logits_processor=[processor],
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=EOS,
            )
            for row in out:
                tokens, complete = answer(row, 0)
                assert complete
                assert LIST.accepts(text(tokens))
    from_ids = plain(model, ids, LIST.processor(json_tokenizer()))
    assert [answer(row, 0) for row in out] == [answer(row) for row in from_ids]


def test_several_end_tokens(model: Any) -> None:
    """An end token that is a letter as well ends texts and is no letter any more."""
    letter = json_tokenizer().convert_tokens_to_ids("1")
    grammar = Grammar.regex("[0-9]{2,8}")
    found = set()
    for seed in range(6):
        processor = grammar.processor(json_tokenizer(), eos_token_id=[EOS, letter])
        out = plain(model, prompts(2, seed), processor, eos_token_id=[EOS, letter], do_sample=True)
        for row in out:
            tokens, complete = answer(row, ends=(EOS, letter))
            assert complete
            assert grammar.accepts(text(tokens))
            assert "1" not in text(tokens).replace("10", "").replace("12", "")
            found.add(int(row[PROMPT + len(tokens)]))
    assert found == {EOS, letter}


def test_generation_without_end_token_runs_to_its_length(model: Any) -> None:
    """The grammar still puts its end token, and nothing else, behind the text."""
    out = plain(model, prompts(1), SHORT.processor(json_tokenizer()), eos_token_id=None)
    tokens, complete = answer(out[0])
    assert complete
    assert SHORT.accepts(text(tokens))
    assert out[0, PROMPT + len(tokens) :].tolist() == [EOS] * (40 - len(tokens))


def test_scores_given_are_left_as_they_were(model: Any) -> None:
    processor, scores = SHORT.processor(json_tokenizer()), torch.zeros(1, JSON_VOCAB)
    got = processor(prompts(1), scores)
    assert (scores == 0).all()
    assert got.data_ptr() != scores.data_ptr()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        again = SHORT.processor(json_tokenizer())(prompts(1), scores.to(dtype))
        assert again.dtype == dtype
        assert torch.equal(again.float(), got)


def test_what_is_refused(model: Any) -> None:
    tokenizer: Any = json_tokenizer()
    with pytest.raises(InvalidArgument, match=r"2.*, but there are 3 rows"):
        plain(model, prompts(3), GrammarProcessor([LIST, SHORT], tokenizer))
    with pytest.raises(InvalidArgument, match="empty list"):
        GrammarProcessor([], tokenizer)
    for wrong in ("[a-z]+", {"type": "null"}, None, 5, [LIST, "x"]):
        with pytest.raises(InvalidArgument, match=r"give a lookahead\.Grammar"):
            GrammarProcessor(wrong, tokenizer)
    for ends in ([], [-1], -1):
        with pytest.raises(InvalidArgument, match="give one or more token ids"):
            LIST.processor(tokenizer, eos_token_id=ends)
    with pytest.raises(GrammarError, match="cannot write"):
        Grammar.regex("日本").processor(tokenizer)
    with pytest.raises(GrammarError, match="fast tokenizer"):
        LIST.processor("gpt2")


def test_dead_end_in_the_middle_is_an_error_and_the_object_serves_again(model: Any) -> None:
    processor = Grammar.regex("a{3}日|b").processor(json_tokenizer())
    only_a = json_tokenizer().convert_tokens_to_ids("b")
    with pytest.raises(GrammarError, match="its vocabulary cannot write"):
        plain(model, prompts(1), processor, bad_words_ids=[[only_a]])
    only_b = json_tokenizer().convert_tokens_to_ids("a")
    out = plain(model, prompts(1), processor, bad_words_ids=[[only_b]])
    assert text(answer(out[0])[0]) == "b"


@pytest.mark.parametrize("drafter", [None, lookahead.Grower(sources=())])
def test_an_engine_that_fails_between_two_picks_changes_nothing(model: Any, drafter: Any) -> None:
    """What cannot be settled is found out by the pick, if the row gets there: here it never fails."""
    ids, tokenizer = prompts(2), json_tokenizer()
    expected = plain(model, ids, LIST.processor(tokenizer))
    la = lookahead.Lookahead(model, tokenizer, drafter=drafter)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": EOS, "attention_mask": torch.ones_like(ids)}
    with mock.patch.object(Matcher, "settle", side_effect=GrammarError("made to fail")) as settle:
        out = la.generate(ids, grammar=LIST, **options)
    assert settle.called
    assert torch.equal(out, expected)
