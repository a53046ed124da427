"""The first law: drafting never changes the output, whoever drafts and however `generate()` is called.

`pytest tests/test_law.py --law-examples 3000 --law-seed 1` runs 3,000 cases that nobody has seen before.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from law import (
    BATTERY,
    MANY_EOS,
    Case,
    assert_exact,
    assert_steps_fit,
    drafter,
    model_of,
    probes_of,
    run,
    shapes_of,
)
from models import ATTENTION, FAMILIES, RELEASE, WORDS, tiny
from transformers import TopKLogitsWarper
from users import CRITERIA, PROCESSORS

from lookahead import Lookahead, UnsupportedModel
from lookahead.cache import TreeCache
from lookahead.progress import Progress
from lookahead.static.choice import static_of
from lookahead.support import family_of

pytestmark = [
    pytest.mark.law,
    pytest.mark.filterwarnings(
        "ignore:Passing `(repetition_penalty|no_repeat_ngram_size)` with `inputs_embeds`:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:Passing `encoder_:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning"),
]

token = st.sampled_from(WORDS)
tokens = st.lists(token, min_size=1, max_size=3, unique=True).map(tuple)
chance = st.sampled_from((0.2, 0.5, 0.8, 0.95))

ANY_OPTION = {
    "repetition_penalty": st.sampled_from((0.8, 1.3, 2.0)),
    "no_repeat_ngram_size": st.sampled_from((2, 3)),
    "min_new_tokens": st.integers(1, 30),
    "min_length": st.integers(1, 30),
    "bad_words_ids": st.lists(tokens, min_size=1, max_size=4).map(tuple),
    "sequence_bias": st.lists(st.tuples(tokens, st.sampled_from((-4.0, 3.0))), min_size=1, max_size=4).map(tuple),
    "suppress_tokens": tokens,
    "begin_suppress_tokens": tokens,
    "forced_bos_token_id": token,
    "forced_eos_token_id": token,
    "encoder_repetition_penalty": st.sampled_from((0.7, 1.5)),
    "encoder_no_repeat_ngram_size": st.sampled_from((2, 3)),
    "remove_invalid_values": st.just(True),
    "renormalize_logits": st.just(True),
    "prefix_allowed_tokens_fn": st.just("recorded"),
    "watermarking_config": st.sampled_from(("lefthash", "selfhash")),
    "guidance_scale": st.sampled_from((1.5, 0.5)),
    "max_time": st.just(1e6),
    "num_return_sequences": st.sampled_from((2, 3)),
    "prefill_chunk_size": st.integers(1, 5),
}
SAMPLING_OPTION = {
    "temperature": st.sampled_from((0.5, 0.8, 1.7)),
    "top_k": st.sampled_from((1, 4, 20)),
    "top_p": chance,
    "top_h": st.sampled_from((0.3, 0.7)),
    "min_p": st.sampled_from((0.02, 0.2)),
    "typical_p": chance,
    "epsilon_cutoff": st.sampled_from((0.01, 0.05)),
    "eta_cutoff": st.sampled_from((0.01, 0.05)),
}
LIMIT = {
    "all_nodes": st.just(0),
    "ahead": st.integers(1, 4),
    "chunk": st.integers(1, 9),
    "realign": st.integers(1, 6),
    "block": st.integers(1, 4),
    "foreseen": st.integers(0, 4),
    "room": st.sampled_from((0, 47, 48, 100, 400)),
    "slots": st.integers(1, 40),
    "known": st.integers(0, 8),
}
STOP_STRINGS = ((), (), (), ("a",), ("th", "9"), ("ab", "ca", "e"))
GROWN = ("prompt", "pool", "prompt+pool+recycle", "recycle+prompt", "jacobi", "leaping", "prompt+recycle+jacobi")
DRAFTERS = ("oracle", "oracle", "oracle", "relay", "relay", "adversary", "adversary", *GROWN)


@st.composite
def some_of(draw: Any, table: dict[str, Any], most: int) -> tuple[tuple[str, Any], ...]:
    """Draw up to `most` of the entries of `table`, with values."""
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=most, unique=True))
    return tuple((name, draw(table[name])) for name in names)


def few(table: dict[str, Any]) -> Any:
    """Draw up to two names of `table`."""
    return st.lists(st.sampled_from(sorted(table)), max_size=2, unique=True).map(tuple)


@st.composite
def cases(draw: Any, **fixed: Any) -> Case:
    """Draw any case that plain `generate()` can serve."""
    sample, cache = draw(st.booleans()), draw(st.sampled_from(("own", "own", "own", "user", "full", "new")))
    options = dict(draw(some_of(ANY_OPTION, 3)) + (draw(some_of(SAMPLING_OPTION, 3)) if sample else ()))
    eos = draw(st.sampled_from(((), (1,), (4,), (1, 7), (3, 17, 31), MANY_EOS)))
    if eos and draw(st.booleans()):
        options["exponential_decay_length_penalty"] = (draw(st.integers(0, 12)), draw(st.sampled_from((1.02, 1.3))))
    plain_inputs = cache == "own" and draw(st.integers(0, 3)) > 0
    embeds = draw(st.sampled_from(("alone", "with ids"))) if cache == "own" and not plain_inputs else "no"
    where = draw(st.sampled_from(("object", "object", "function", "custom")))
    if cache != "own" or not sample:  # plain generate() cannot do these on a cache that it is given
        options.pop("num_return_sequences", None)
    if "num_return_sequences" in options and draw(st.booleans()):
        options["guidance_scale"] = 1.5
    elif "guidance_scale" in options:
        options["negative_prompt_ids"] = draw(st.lists(token, min_size=1, max_size=4).map(tuple))
    if embeds != "no":
        options.pop("prefill_chunk_size", None)
        options.pop("guidance_scale", None)
        options.pop("negative_prompt_ids", None)
    if RELEASE < (5, 21) and cache in ("full", "new"):  # there chunks run what the cache holds again
        options.pop("prefill_chunk_size", None)
    attention = draw(st.sampled_from(ATTENTION))
    mask = draw(st.sampled_from(("full", "left", "left", "holes", "none"))) if cache == "own" else "left"
    arguments = {
        "family": draw(st.sampled_from(sorted(FAMILIES))),
        "attention": attention,
        # transformers' eager attention makes NaN of padding in float64
        "dtype": "float32" if attention == "eager" and mask in ("left", "holes") else "float64",
        "seed": draw(st.integers(0, 2**20)),
        "rows": draw(st.sampled_from((2, 3, 1, 4))),
        "prompt": draw(st.integers(1, 12)),
        "mask": mask,
        "new": draw(st.sampled_from((16, 24, 32, 40, 8, 2, 1))),
        "sample": sample,
        "eos": eos,
        "options": tuple(options.items()),
        "processors": draw(few(PROCESSORS)) if draw(st.integers(0, 2)) == 2 else (),
        "criteria": draw(few(CRITERIA)) if draw(st.integers(0, 2)) == 2 else (),
        "stop_strings": () if where == "custom" else draw(st.sampled_from(STOP_STRINGS)),
        "output": draw(st.sampled_from(("ids", "ids", "dict", "scores", "all"))),
        "streamer": where != "custom" and draw(st.booleans()),
        "embeds": embeds,
        "cache": cache,
        "drafter": draw(st.sampled_from(DRAFTERS)),
        "error": draw(st.sampled_from((0.0, 0.1, 0.3, 0.0, 0.1, 1.0))),
        "nodes": draw(st.sampled_from((16, 48, 8, 32, 3, 1, 0))),
        "budget": draw(st.sampled_from(("fixed", "dice", "clock"))),
        "door": where,
        "calls": draw(st.sampled_from((1, 1, 2))),
        "limits": draw(some_of(LIMIT, 3)),
        "way": draw(st.sampled_from(("dynamic", "recorded", "recorded", "static", "static", "invariant"))),
    }
    return in_its_way(Case(**arguments | fixed))


def in_its_way(case: Case) -> Case:
    """Return the case, in passes of other shapes where it does not go in those that it names."""
    if case.way == "invariant" and (case.nodes > 31 or probes_of(case)):
        case = replace(case, way="static")
    try:
        static_of(model_of(case), family_of(model_of(case)), **shapes_of(case))
    except UnsupportedModel:
        return replace(case, way="dynamic")
    return case


QUICK = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@settings(settings.get_profile("law"), suppress_health_check=QUICK)
@given(case=cases())
def test_drafting_never_changes_the_output(case: Case) -> None:
    result = assert_exact(case)
    if result.error is not None:
        event("plain generate() refuses or fails, and so do we")
    elif any(len(set(one.committed)) > 1 for one in result.last.passes):
        event("rows accept different lengths")
    elif any(max(one.committed) > 1 for one in result.last.passes):
        event("drafts are accepted")


@pytest.mark.parametrize("case", BATTERY, ids=lambda case: f"{case.family}-{case.seed}")
def test_battery_of_the_planted_bugs(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float32(family: str, attention: str) -> None:
    base = Case(family=family, attention=attention, dtype="float32", rows=3, mask="left", new=32, eos=(4, 9))
    assert_exact(replace(base, seed=1))
    assert_exact(replace(base, seed=2, sample=True, options=(("temperature", 0.9), ("top_k", 12))))
    assert_exact(replace(base, seed=3, rows=1, drafter="prompt+recycle", calls=2))
    assert_exact(replace(base, seed=4, sample=True, drafter="prompt+recycle+jacobi", calls=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_turns_on_the_users_cache(family: str) -> None:
    for cache in ("user", "full", "new"):
        assert_exact(
            Case(family=family, seed=5, rows=2, mask="left", cache=cache, eos=(4,), sample=True, door="custom")
        )


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("rows", [1, 3])
def test_text_that_fills_the_position_table_exactly(family: str, rows: int) -> None:
    """One position more and the model would fail: drafts may not look past the end."""
    prompt, new = 7, 17
    model = tiny(family, max_position_embeddings=prompt + new)
    with mock.patch("law.tiny", return_value=model):
        for seed, who in enumerate(("oracle", "adversary", "relay", "prompt+recycle", "jacobi", "prompt+leaping")):
            case = Case(family=family, seed=seed, rows=rows, prompt=prompt, new=new, drafter=who, error=0.0, nodes=48)
            assert_exact(case)


def test_text_longer_than_every_buffer() -> None:
    """Keys, mask, token and context buffers all grow; nothing is patched small."""
    result = assert_exact(Case(rows=2, new=700, prompt=3, mask="left", error=0.02, nodes=40, output="dict"))
    assert result.sequences.shape[1] == 703
    assert_exact(Case(new=900, error=0.0, nodes=1000, sample=True, output="ids"))
    assert_exact(Case(family="gpt2", rows=3, new=600, drafter="relay", nodes=48, output="dict", sample=True))


def test_equal_scores_are_resolved_as_plain_does() -> None:
    """A model whose tokens come in pairs with equal logits: always the first of them, drafted or not."""
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight.data[1::2] = model.lm_head.weight.data[::2]
    with mock.patch("law.tiny", return_value=model):
        for options in ((), (("repetition_penalty", 1.2),), (("suppress_tokens", (4, 6, 9)),)):
            for rows in (1, 3):
                assert_exact(Case(seed=rows, rows=rows, new=30, options=options))


@settings(settings.get_profile("side_law"), suppress_health_check=QUICK)
@given(case=cases(eos=(4, 9), criteria=(), stop_strings=(), cache="own", calls=1, door="object"))
def test_steps_tell_drafters_what_happened(case: Case) -> None:
    if case.nodes > 0:
        assert_steps_fit(case)


@settings(settings.get_profile("side_law"), suppress_health_check=QUICK)
@given(case=cases(cache="own", calls=1))
def test_run_adds_up(case: Case) -> None:
    result = assert_exact(case)
    if result.error is not None:
        return
    run, columns = result.last, len(result.answers[0])
    assert run.tokens == columns
    assert len(run.passes) <= columns - run.prefills
    for one in run.passes:
        assert 1 <= one.nodes <= case.nodes + probes_of(case) + 1
        assert all(0 <= n <= one.nodes for n in one.committed)
        assert min(one.draft_s, one.mask_s, one.model_s, one.verify_s, one.cache_s, one.learn_s, one.outside_s) >= 0
    if case.nodes == 0:
        assert [max(one.committed) for one in run.passes] == [1] * (columns - run.prefills)
    if not (case.eos or case.criteria or case.stop_strings):
        assert all(
            sum(one.committed[row] for one in run.passes) == columns - run.prefills
            for row in range(len(result.answers))
        )
    assert run.tokens_per_pass == columns / run.forwards


# The law says nothing where nothing happens: these hold that the cases above reach what they are meant to reach.


def test_oracle_cases_accept_deeply_and_raggedly() -> None:
    ragged, deep = 0, 0
    for seed in range(10):
        result = assert_exact(Case(seed=seed, rows=3, mask="left", new=40, error=0.2, nodes=16, sample=seed % 2 == 0))
        passes = result.last.passes
        ragged += sum(len(set(one.committed)) > 1 for one in passes) / len(passes)
        deep += max(max(one.committed) for one in passes) > 4
    assert ragged / 10 > 0.5
    assert deep > 5


def test_relay_cases_close_holes_and_wait_for_slow_rows() -> None:
    realigned, waits = [], []
    realign, is_open = TreeCache.realign, Progress.is_open

    def watched_realign(self: Any) -> None:
        realigned.append(self.used)
        realign(self)

    def watched_open(self: Any, row: int) -> bool:
        waits.append(self.length[row] - self.settled >= 3)
        return is_open(self, row)

    with mock.patch.object(TreeCache, "realign", watched_realign), mock.patch.object(Progress, "is_open", watched_open):
        limits = (("realign", 1), ("ahead", 3))
        assert_exact(Case(rows=4, new=40, drafter="relay", limits=limits[:1]))
        assert realigned
        waits.clear()
        assert_exact(Case(rows=4, new=40, drafter="relay", limits=limits))
        assert any(waits)


@pytest.mark.parametrize("limit", [1 << 16, 0])
def test_pure_processors_run_on_all_nodes_at_once_or_on_the_path_alone(limit: int) -> None:
    shapes = []
    call = TopKLogitsWarper.__call__

    def watched(self: Any, ids: Any, scores: Any) -> Any:
        shapes.append(scores.shape[0])
        return call(self, ids, scores)

    case = Case(rows=2, new=24, sample=True, options=(("top_k", 5),), error=0.0, limits=(("all_nodes", limit),))
    with mock.patch.object(TopKLogitsWarper, "__call__", watched):
        assert_exact(case)
    assert (max(shapes) > 2) == (limit > 0)


def test_drafters_learn_and_their_drafts_are_accepted() -> None:
    for sources in ("prompt", "recycle", "pool", "prompt+pool+recycle"):
        result = assert_exact(Case(family="gpt2", new=40, drafter=sources, calls=3, nodes=16))
        assert result.last.tokens_per_pass > 1.2, sources


@pytest.mark.gpu
@pytest.mark.parametrize("case", BATTERY, ids=lambda case: f"{case.family}-{case.seed}")
def test_battery_on_cuda_in_float32(case: Case) -> None:
    assert_exact(replace(case, device="cuda", dtype="float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_cuda_in_float32(family: str) -> None:
    for sample in (False, True):
        for rows in (1, 4):
            assert_exact(
                Case(
                    family=family,
                    device="cuda",
                    dtype="float32",
                    rows=rows,
                    mask="left",
                    sample=sample,
                    eos=(4,),
                    new=40,
                )
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_report_agreement_in_low_precision(dtype: str, capsys: Any) -> None:
    """Printed, not asserted: in low precision a pass over many tokens rounds otherwise than one over a single token."""
    report = agreement(dtype, "cuda")
    with capsys.disabled():
        print(f"\n{dtype} on {torch.cuda.get_device_name()}: {report}")


def test_agreement_is_whole_where_the_law_holds() -> None:
    assert agreement("float64", "cpu", families=("llama", "gpt2")) == "100.0% of 240 tokens before the first difference"


def agreement(dtype: str, device: str, families: Any = tuple(FAMILIES)) -> str:
    """Return the share of tokens that come before the first one that differs from plain."""
    same, total = 0, 0
    for family in families:
        for seed in range(3):
            case = Case(family=family, dtype=dtype, device=device, seed=seed, new=40, output="ids")
            plain = run(case, tiny(family, "sdpa", dtype, device).generate)
            la = Lookahead(tiny(family, "sdpa", dtype, device), drafter=drafter(case, plain), nodes=case.nodes)
            a, b = plain.answers[0], run(case, la.generate).answers[0]
            same += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
            total += len(a)
    return f"{same / total:.1%} of {total} tokens before the first difference"
