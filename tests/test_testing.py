"""`lookahead.testing`: what it takes for equal is equal, and what it excuses is rounding."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import JSON_VOCAB, PAD, VOCAB, json_tokenizer, tiny, tokenizer
from transformers import DynamicCache, LogitsProcessor, TextStreamer

from lookahead import Grammar, InvalidArgument, Lookahead
from lookahead.cache import NAME, TreeCache
from lookahead.draft import Draft
from lookahead.sampling import NoiseLedger
from lookahead.testing import Adversary, Oracle, Outcome, assert_exact, calls, difference, drafters
from lookahead.testing.call import Call
from lookahead.testing.replay import judge
from lookahead.testing.rounding import cap, measure

MODEL = tiny("llama")
IDS = torch.tensor([[5, 9, 17, 5, 9, 17, 30]])
ORACLE = functools.partial(Oracle, vocab=VOCAB, error=0.1)
PADDED = {
    "input_ids": torch.tensor([[PAD, PAD, 7, 8], [9, 10, 11, 12]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
}
SAMPLED = {"do_sample": True, "temperature": 1.3}
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
few = settings(max_examples=12, suppress_health_check=list(HealthCheck))


class Memorious(LogitsProcessor):
    """A processor that counts its calls, and prefers another token in each."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls % VOCAB] += 2.0
        return scores


class Uncopyable(Memorious):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("holds a file")


def siblings_visible() -> Any:
    return mock.patch.object(Draft, "ancestors", lambda draft: np.tril(np.ones((len(draft), len(draft)), np.bool_)))


# assert_exact


@pytest.mark.parametrize("options", [{}, SAMPLED, ALL, {"repetition_penalty": 1.4, "eos_token_id": [3, 8]}])
@pytest.mark.parametrize("drafts", [{}, {"drafter": ORACLE, "nodes": 12}, {"settings": {"sources": ("prompt",)}}])
def test_exact_calls_pass(options: dict[str, Any], drafts: dict[str, Any]) -> None:
    plain = MODEL.generate(IDS, max_new_tokens=16, **options | {"do_sample": False})
    output = assert_exact(MODEL, IDS, max_new_tokens=16, **options, **drafts)
    if not options.get("do_sample"):
        ids = [one if isinstance(one, torch.Tensor) else one.sequences for one in (plain, output)]
        assert torch.equal(*ids)


def test_oracle_is_accepted_in_batches() -> None:
    oracles: list[Oracle] = []

    def knowing(answers: Any) -> Oracle:
        oracles.append(Oracle(answers, VOCAB, error=0.0))
        return oracles[-1]

    la: list[Lookahead] = []
    with mock.patch("lookahead.testing.exact.Lookahead", lambda *a, **k: la.append(Lookahead(*a, **k)) or la[-1]):
        assert_exact(MODEL, **PADDED, max_new_tokens=24, drafter=knowing, nodes=24)
    assert len(oracles[0].answers) == 2
    assert la[0].last is not None
    assert la[0].last.tokens_per_pass > 4


def test_every_run_has_its_own_copies() -> None:
    cache, processor = DynamicCache(config=MODEL.config), Memorious()
    assert_exact(MODEL, IDS, max_new_tokens=8, logits_processor=[processor], **{NAME: cache})
    assert processor.calls == 0
    assert cache.get_seq_length() == 0
    with pytest.raises(InvalidArgument, match=r"logits_processor.*fresh="):
        assert_exact(MODEL, IDS, max_new_tokens=8, logits_processor=[Uncopyable()])
    made = []

    def fresh() -> dict[str, Any]:
        made.append(Uncopyable())
        return {"logits_processor": [made[-1]]}

    assert_exact(MODEL, IDS, max_new_tokens=8, fresh=fresh)
    assert sorted({one.calls for one in made}) in ([8], [0, 8])


def test_streamers_stop_strings_and_grammars_are_compared() -> None:
    words = tokenizer()
    assert_exact(MODEL, IDS, tokenizer=words, max_new_tokens=24, stop_strings=["a", "7"], streamer=TextStreamer(words))
    model = tiny("llama", vocab_size=JSON_VOCAB)
    grammar = Grammar.json_schema({"type": "array", "items": {"type": "boolean"}})
    assert_exact(model, IDS, tokenizer=json_tokenizer(), max_new_tokens=24, grammar=grammar)


def test_equal_errors_are_equal_and_others_are_not() -> None:
    assert_exact(MODEL, IDS, max_new_tokens=-1)
    with pytest.raises(AssertionError, match=r"plain returns, ours raises RuntimeError") as caught:  # noqa: SIM117
        with mock.patch.object(TreeCache, "keep", side_effect=RuntimeError("planted")):
            assert_exact(MODEL, IDS, max_new_tokens=8)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_generator_is_put_back() -> None:
    before = torch.get_rng_state()
    assert_exact(MODEL, IDS, max_new_tokens=4, do_sample=True, seed=7)
    assert torch.equal(before, torch.get_rng_state())


def test_differences_are_located() -> None:
    def several() -> None:
        for seed in range(9):
            assert_exact(MODEL, IDS, max_new_tokens=24, drafter=ORACLE, nodes=16, seed=seed, allow_ties=True, **SAMPLED)

    with siblings_visible(), pytest.raises(AssertionError, match="plain picks") as caught:
        several()
    said = str(caught.value)
    assert said.startswith("sequences differ first in row 0, column ")
    assert "no numeric tie" in said
    assert "two best scores are" in said


# Strategies


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_drawn_calls_are_exact(family: str) -> None:
    model = tiny(family)

    @few
    @given(calls(model, tokenizer(), most_new=16), drafters(model))
    def check(call: dict[str, Any], drafts: dict[str, Any]) -> None:
        assert_exact(model, tokenizer=tokenizer(), **call, **drafts)

    check()


def test_drawn_calls_find_planted_faults() -> None:
    @settings(max_examples=80, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
    @given(calls(MODEL), drafters(MODEL))
    def check(call: dict[str, Any], drafts: dict[str, Any]) -> None:
        assert_exact(MODEL, **call, **drafts)

    with siblings_visible(), pytest.raises(AssertionError):
        check()


def test_drawn_calls_reach_what_they_are_for() -> None:
    seen: set[str] = set()

    @settings(max_examples=150, database=None)
    @given(calls(MODEL, tokenizer()), drafters(MODEL))
    def look(call: dict[str, Any], drafts: dict[str, Any]) -> None:
        seen.update(call, drafts)
        seen.update({"padding"} if bool((call["attention_mask"] == 0).any()) else ())
        seen.update({"batch"} if len(call["input_ids"]) > 1 else ())
        seen.add(f"{drafts['nodes'] == 'auto'}")
        assert call["input_ids"].shape == call["attention_mask"].shape

    look()
    assert seen >= {
        "padding", "batch", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size",
        "eos_token_id", "min_new_tokens", "output_logits", "stop_strings", "drafter", "True", "False",
    }  # fmt: skip


def test_hypothesis_is_asked_for_by_name() -> None:
    with mock.patch.dict(sys.modules, {"hypothesis": None}), pytest.raises(ImportError, match=r"decoding\[test\]"):
        calls(MODEL)


# Numeric ties


def outcome(model: Any, seed: int = 0, **options: Any) -> tuple[Call, Outcome]:
    call = Call(model, None, {"input_ids": IDS, "max_new_tokens": 12, "pad_token_id": PAD, **options})
    return call, call.run(model.generate, seed, plain=True)


def changed(found: Outcome, column: int, token: int) -> Outcome:
    """Return an outcome with another generated token."""
    ids = found.sequences.clone()
    ids[0, IDS.shape[1] + column] = token
    return replace(found, output=ids)


@pytest.mark.parametrize("options", [{}, SAMPLED, SAMPLED | {"top_k": 5, "repetition_penalty": 1.3}])
def test_plain_agrees_with_itself(options: dict[str, Any]) -> None:
    call, found = outcome(tiny("llama", dtype="float32"), **options)
    judged = judge(tiny("llama", dtype="float32"), call.plainly, found, seed=0)
    assert judged.places == judged.faults == ()
    assert judged.rounding is not None
    assert 0 < judged.rounding.allowed < 1e-3


def test_margin_of_a_pick_is_that_of_the_scores() -> None:
    model = tiny("llama", dtype="float32")
    call, found = outcome(model, **ALL)
    scores = found.output.scores[4][0]
    second = int(scores.topk(2).indices[1])
    judged = judge(model, call.plainly, changed(found, 4, second), seed=0)
    assert (judged.places[0].column, judged.places[0].ours) == (4, second)
    assert judged.places[0].margin == judged.places[0].lead == pytest.approx(float(scores.topk(2).values.diff().abs()))
    assert not judged.ties


def test_margin_of_a_draw_is_that_of_its_race() -> None:
    model = tiny("llama", dtype="float32")
    call, found = outcome(model, seed=3, **SAMPLED, **ALL)
    torch.manual_seed(3)
    race = found.output.scores[4][0].log_softmax(-1) - NoiseLedger(1, IDS.device).noise(4, VOCAB)[0].log()
    second = int(race.topk(2).indices[1])
    judged = judge(model, call.plainly, changed(found, 4, second), seed=3)
    assert judged.places[0].margin == pytest.approx(float(race.topk(2).values.diff().abs()), rel=1e-4)
    assert not judged.ties


def twins(apart: float) -> tuple[Any, int, int]:
    """Return a model that writes two tokens for one, `apart` from each other; and both."""
    model = copy.deepcopy(tiny("llama", dtype="float32"))
    token = int(model.generate(IDS, max_new_tokens=4, pad_token_id=PAD)[0, -1])
    twin = 40 if token != 40 else 41
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[twin] = weight[token]
        model.get_output_embeddings().weight[twin] *= 1 - apart
    return model, token, twin


@pytest.mark.parametrize(("apart", "tie"), [(1e-7, True), (1e-3, False)])
def test_twins_are_ties(apart: float, tie: bool) -> None:
    model, token, twin = twins(apart)
    call, found = outcome(model)
    column = found.sequences[0, IDS.shape[1] :].tolist().index(token)
    judged = judge(model, call.plainly, changed(found, column, twin), seed=0)
    assert [place.column for place in judged.places][:1] == [column]
    assert judged.places[0].tie == tie
    assert judged.ties == (tie and all(place.tie for place in judged.places))


def test_what_is_behind_a_tie_is_judged_too() -> None:
    model, token, twin = twins(1e-7)
    call, found = outcome(model)
    column = found.sequences[0, IDS.shape[1] :].tolist().index(token)
    other = changed(changed(found, column, twin), column + 2, 33)
    judged = judge(model, call.plainly, other, seed=0)
    assert judged.places[0].tie
    assert not judged.ties


def test_faults_beside_the_tokens_are_no_ties() -> None:
    model = tiny("llama", dtype="float32")
    call, found = outcome(model, **ALL)
    short = replace(found, output=found.sequences[:, :-1])
    assert "end elsewhere" in judge(model, call.plainly, short, seed=0).faults[0]
    drawn = replace(found, generator=torch.Generator().manual_seed(5).get_state())
    assert "generator" in judge(model, call.plainly, drawn, seed=0).faults[0]
    logits = [table.clone() for table in found.output.logits]
    logits[5][0, 7] += 0.01
    moved = replace(found, output=type(found.output)(sequences=found.sequences, logits=tuple(logits)))
    judged = judge(model, call.plainly, moved, seed=0)
    assert "logits of column 5" in judged.faults[0]
    assert not judged.ties


def faulty(size: float, dtype: str = "float32") -> Any:
    """Return a model whose passes over several tokens behind a cache are wrong by `size`."""
    model = copy.deepcopy(tiny("llama", dtype=dtype))
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).to(model.dtype) * size
    forward = model.forward

    @functools.wraps(forward)
    def wrong(*args: Any, **kwargs: Any) -> Any:
        cached, ids = kwargs[NAME].get_seq_length(), kwargs["input_ids"]
        outputs = forward(*args, **kwargs)
        if ids.shape[1] > 1 and cached:
            outputs.logits = outputs.logits + bias
        return outputs

    model.forward = wrong
    return model


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.3)])
def test_noise_of_a_faulty_model_excuses_only_so_much(dtype: str, limit: float) -> None:
    model = faulty(2.0, dtype)
    call, found = outcome(model)
    rounding = measure(model, call.plainly, found.sequences[:, IDS.shape[1] :])
    assert rounding.noise > rounding.spread / 2
    assert rounding.allowed == pytest.approx(limit * rounding.spread)


@pytest.mark.parametrize(("context", "largest"), [(512, 32), (20, 13)])
def test_rounding_behind_short_texts_is_measured_with_passes_as_large_as_drafts(context: int, largest: int) -> None:
    """Kernels differ by size; what fills a pass up is not looked at, and stays within the model's context."""
    model = copy.deepcopy(MODEL)
    model.config.max_position_embeddings = context
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    call, found = outcome(model)
    sizes.clear()
    text = found.sequences[:, IDS.shape[1] :][:, :4]
    rounding = measure(model, call.plainly, text)
    hook.remove()
    assert max(size for size in sizes if size != IDS.shape[1]) == largest
    assert 0.0 <= rounding.noise < 1e-4


def test_limits_are_those_of_the_dtype() -> None:
    cpu = torch.device("cpu")
    assert [cap(dtype, cpu) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)] == [
        1e-9, 1e-4, pytest.approx(0.0375), 0.3,
    ]  # fmt: skip
    with mock.patch.object(torch, "get_float32_matmul_precision", return_value="high"):
        assert cap(torch.float32, cpu) == 2e-3


def test_allowed_ties_do_not_excuse_a_fault() -> None:
    model = faulty(0.3)

    def several() -> None:
        for seed in range(6):
            assert_exact(model, IDS, max_new_tokens=24, drafter=ORACLE, nodes=12, seed=seed, allow_ties=True)

    with pytest.raises(AssertionError, match="no numeric tie"):
        several()


@few
@given(calls(tiny("llama", dtype="bfloat16"), most_new=24), st.integers(0, 99))
def test_low_precision_is_exact_but_for_ties(call: dict[str, Any], seed: int) -> None:
    model = tiny("llama", dtype="bfloat16")
    call = {name: value for name, value in call.items() if name not in ALL}
    assert_exact(model, **call, drafter=ORACLE, nodes=12, seed=seed, allow_ties=True)


def test_outcomes_that_differ_are_told_apart() -> None:
    _, found = outcome(MODEL, **ALL)
    assert difference(found, found) is None
    assert "row 0, column 9" in str(difference(found, _with_token(found, 2)))
    assert "generator" in str(difference(found, replace(found, generator=found.generator.flip(0))))  # type: ignore[union-attr]
    assert "streamer" in str(difference(found, replace(found, streamed=["end"])))
    assert Adversary([[1]], VOCAB).start(np.zeros(3, np.int32)) is not None


def _with_token(found: Outcome, column: int) -> Outcome:
    output = copy.deepcopy(found.output)
    output.sequences[0, IDS.shape[1] + column] += 1
    return replace(found, output=output)
