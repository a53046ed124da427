"""Passes of fixed shapes: their parts against naive twins, replays of what was recorded, independence of drafts."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from law import Case, assert_exact, door, drafter, lookahead_of, model_of, run
from models import EXPERTS, FAMILIES, tiny
from test_law import DRAFTERS, QUICK, cases
from traced import Traced
from transformers import DynamicCache
from zoo import zoo

import lookahead.static.target as target
from lookahead import Draft, InvalidArgument, Lookahead, UnsupportedModel
from lookahead.calibrate import measure
from lookahead.mask import Reach, TreeMasks
from lookahead.progress import Stops
from lookahead.static.board import Board
from lookahead.static.cache import StaticCache
from lookahead.static.mask import StaticMasks
from lookahead.static.shapes import COUNTS, FIXED, Counts, capacity
from lookahead.static.space import KEPT, spaces_of
from lookahead.static.target import StaticTarget, accepted_order
from lookahead.testing import Oracle
from lookahead.topk import best_there, best_tokens
from lookahead.verify import descend

TREES = sorted(FAMILIES)


# Shapes


@given(nodes=st.integers(1, 300), slots=st.integers(1, 10**6))
def test_shapes_are_few_and_large_enough(nodes: int, slots: int) -> None:
    rows = Counts().rows(nodes)
    assert rows >= nodes
    assert rows in COUNTS or (rows > COUNTS[-1] and rows % COUNTS[-1] == 0 and rows - nodes < COUNTS[-1])
    assert slots <= capacity(slots, few=True) <= max(1.5 * slots, 256) + 256
    assert slots <= capacity(slots, few=False) < slots + 64
    assert Counts().table(nodes)[-1] == rows
    assert Counts(FIXED).rows(min(nodes, FIXED)) == FIXED


def test_capacities_are_few() -> None:
    assert len({capacity(slots, few=True) for slots in range(1, 1 << 15)}) < 20


# What is found on the device, against what the host finds


@st.composite
def drafts(draw: Any, most: int = 12) -> Draft:
    """Draw a tree without twins, in which a few nodes are probes."""
    size = draw(st.integers(1, most))
    parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]
    tokens = [draw(st.integers(0, 5)) for _ in range(size)]
    probe = [False] + [draw(st.integers(0, 4)) == 0 for _ in range(1, size)]
    for i in range(1, size):
        if any(parents[j] == parents[i] and tokens[j] == tokens[i] for j in range(1, i)):
            tokens[i] = 10 + i
        probe[i] = probe[i] or probe[max(parents[i], 0)]
    return Draft(tokens=np.array(tokens), parents=np.array(parents), probe=np.array(probe))


@given(data=st.data())
def test_the_accepted_nodes_are_those_of_the_walk(data: Any) -> None:
    trees = data.draw(st.lists(drafts(), min_size=1, max_size=3))
    rows = Counts().rows(max(map(len, trees)))
    board = Board(len(trees), rows, torch.device("cpu"))
    board.write(trees, np.zeros(len(trees), np.int64), [0] * len(trees))
    picks = torch.tensor([[data.draw(st.integers(0, 5)) for _ in range(rows)] for _ in trees])
    order = accepted_order(board.tokens, board.parents, board.ancestors, picks)
    for row, draft in enumerate(trees):
        nodes, picked = np.empty(len(draft), np.int32), np.empty(len(draft), np.int64)
        count = descend(draft.tokens, draft.parents, draft.probe, picks[row].numpy(), nodes, picked)
        assert order[row, :count].tolist() == nodes[:count].tolist()
        assert order[row, count:].tolist() == list(range(count, rows))


@given(data=st.data(), vocab=st.sampled_from((3, 40, 700, 4000, 4001)), count=st.sampled_from((1, 8)))
def test_the_best_tokens_are_the_same_where_the_logits_are(data: Any, vocab: int, count: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    for row, at in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, vocab - 1)), max_size=4)):
        logits[row, at] = data.draw(st.sampled_from((float("nan"), float("inf"), -float("inf"), 4.0, 4.0)))
    tokens, values = best_there(logits, count)
    expected, heights = best_tokens(logits, count)
    assert tokens[:, 0].tolist() == expected[:, 0].tolist()
    assert np.array_equal(values.numpy(), heights, equal_nan=True)
    found = logits.gather(1, tokens)
    assert torch.equal(found[:, 1:].nan_to_num(), values[:, 1:].nan_to_num())


REACHES = (
    {"a": Reach()},
    {"a": Reach(sliding=4)},
    {"a": Reach(), "b": Reach(sliding=3)},
    {"a": Reach(chunk=4), "b": Reach()},
)


@given(data=st.data(), reaches=st.sampled_from(REACHES))
def test_masks_are_those_of_passes_of_any_shape(data: Any, reaches: dict[str, Reach]) -> None:
    """Where no row is ahead, slots are the same; the rest of the capacity is hidden."""
    trees = data.draw(st.lists(drafts(), min_size=1, max_size=3))
    batch, size, prompt = len(trees), max(map(len, trees)), data.draw(st.integers(1, 7))
    shown = torch.tensor([[data.draw(st.booleans()) for _ in range(prompt - 1)] + [True] for _ in range(batch)])
    kept, rows = data.draw(st.integers(0, 6)), Counts().rows(size)
    dynamic = TreeMasks(shown, torch.float32, reaches, keyed=True)
    if kept:
        dynamic.keep([kept] * batch, prompt)
    used, slots = prompt + kept, prompt + kept + rows + data.draw(st.integers(0, 5))
    ancestors = np.zeros((batch, size, size), np.bool_)
    places = np.full((batch, size), used)
    for row, draft in enumerate(trees):
        ancestors[row, range(size), range(size)] = True
        ancestors[row, : len(draft), : len(draft)] = draft.ancestors()
        places[row, : len(draft)] += draft.depth
    expected = dynamic.tree(torch.from_numpy(ancestors), places, used)
    first = torch.where(shown.any(1), shown.long().argmax(1), prompt)
    shown = torch.cat([shown, torch.ones(batch, slots - prompt, dtype=torch.bool)], 1)
    board = Board(batch, rows, torch.device("cpu"))
    board.write(trees, np.zeros(batch, np.int64), [used] * batch)
    drawn = StaticMasks(shown, first, rows, torch.float32, reaches, keyed=True).draw(board)
    for name in reaches:
        assert torch.equal(drawn[name][:, :, :size, : used + size], expected[name])
        assert (drawn[name][:, :, :size, used + size :] == torch.finfo(torch.float32).min).all()


# The cache


@given(data=st.data(), batch=st.integers(1, 3))
def test_a_row_holds_what_it_kept(data: Any, batch: int) -> None:
    ordinary, prompt = DynamicCache(), data.draw(st.integers(1, 4))
    ordinary.update(*(torch.randn(batch, 2, prompt, 3) for _ in range(2)), 0)
    held = [ordinary.layers[0].keys[row].clone() for row in range(batch)]
    cache = StaticCache(ordinary, slots=64)
    cache.load(ordinary)
    for _ in range(data.draw(st.integers(0, 5))):
        rows = torch.randn(batch, 2, 8, 3)
        used = torch.tensor([[prompt + length] for length in cache.lengths])
        cache.where.index = used + torch.arange(8)
        cache.update(rows, rows, 0)
        order = torch.stack([torch.randperm(8) for _ in range(batch)])
        cache.attention[0].move(used + order, used + torch.arange(8))
        counts = [data.draw(st.integers(0, 8)) for _ in range(batch)]
        cache.keep(counts)
        for row, count in enumerate(counts):
            held[row] = torch.cat([held[row], rows[row][:, order[row, :count]]], 1)
        if data.draw(st.booleans()):
            row = data.draw(st.integers(0, batch - 1))
            count = data.draw(st.integers(0, cache.lengths[row]))
            cache.drop(row, count)
            held[row] = held[row][:, : held[row].shape[1] - count]
        if data.draw(st.booleans()):
            cache.forget_behind()
        if data.draw(st.booleans()):
            larger = StaticCache(cache, slots=cache.slots + 8)
            larger.follow(cache)
            cache = larger
    for row in range(batch):
        end = prompt + cache.lengths[row]
        assert torch.equal(cache.attention[0].keys[row, :, :end], held[row])
    cache.forget_behind()
    assert all((cache.attention[0].values[row, :, prompt + n :] == 0).all() for row, n in enumerate(cache.lengths))
    given = DynamicCache()
    given.update(torch.zeros(batch, 2, 1, 3), torch.zeros(batch, 2, 1, 3), 0)
    cache.give_back(given, cache.complete)
    assert torch.equal(given.layers[0].keys, torch.stack([one[:, : prompt + cache.complete] for one in held]))


# Recorded work


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "mixtral", "gemma3_text", "gpt_oss"])
def test_what_was_recorded_serves_later_texts(family: str) -> None:
    """Replays know nothing of what Python knows: every length, mask and place of a later text is in the tensors."""
    made: list[Traced] = []

    def recorder() -> Traced:
        made.append(Traced())
        return made[-1]

    if family not in FAMILIES:
        zoo(family)
    spaces_of(model_of(Case(family=family))).clear()
    base = Case(family=family, way="static", new=24, calls=2, output="ids")
    apart = mock.patch.object(StaticTarget, "runs_apart", True)  # steps are accounted for while the next one runs
    with mock.patch.object(target, "Plainly", recorder), apart:
        assert_exact(replace(base, seed=1, drafter="adversary"))
        assert_exact(replace(base, seed=2, prompt=40, drafter="oracle"))
        assert_exact(replace(base, seed=3, rows=3, mask="left", drafter="relay", sample=True, eos=(1, 7)))
        assert_exact(replace(base, seed=4, rows=2, mask="left", options=(("repetition_penalty", 1.3),)))
        if family == "llama":
            assert_exact(replace(base, seed=5, rows=2, grammar=("regex:[a-f]{3,30}", ""), drafter="prompt+recycle"))
    spaces_of(model_of(base)).clear()
    if any("score" in one.refused for one in made):
        assert family in (*EXPERTS, "gpt_oss"), "only experts look into tensors"
    else:
        assert sum(n for one in made for (name, _), n in one.replays.items() if name == "score") > 20


def test_spaces_are_used_again_and_few_are_kept() -> None:
    model = tiny("llama", vocab_size=50)
    la, ids = Lookahead(model, static=True), torch.tensor([[3, 4, 5, 6]])
    spaces_of(model).clear()
    la.generate(ids, max_new_tokens=20)
    (first,) = spaces_of(model)
    la.generate(ids, max_new_tokens=22)
    assert list(spaces_of(model)) == [first]
    for tokens in (300, 600, 900):
        la.generate(ids, max_new_tokens=tokens, eos_token_id=None)
    assert len(list(spaces_of(model))) == KEPT
    assert first not in list(spaces_of(model))
    with pytest.raises(ZeroDivisionError):
        la.generate(ids, max_new_tokens=20, stopping_criteria=[lambda *_: 1 / 0])
    assert len(list(spaces_of(model))) <= KEPT


@pytest.mark.parametrize("new", [20, 59, 60, 61, 124])
def test_a_text_of_known_length_never_moves_to_a_larger_cache(new: int) -> None:
    model, ids = tiny("llama", vocab_size=56), torch.tensor([[3, 4, 5, 6]])
    plain = model.generate(ids, max_new_tokens=new)
    spaces_of(model).clear()
    oracle = Oracle([plain[0, 4:].tolist()], 56, error=0.2)
    assert torch.equal(Lookahead(model, drafter=oracle, nodes=50, static=True).generate(ids, max_new_tokens=new), plain)
    assert len(list(spaces_of(model))) == 1


def test_a_space_serves_only_the_model_as_it_was() -> None:
    """A graph reads weights where they were, and runs the code that ran."""
    model = tiny("llama", vocab_size=52)
    la, ids = Lookahead(model, static=True), torch.tensor([[3, 4, 5, 6]])
    spaces_of(model).clear()

    def space_after(change: Any) -> Any:
        change()
        assert torch.equal(la.generate(ids, max_new_tokens=20), model.generate(ids, max_new_tokens=20))
        return list(spaces_of(model))[-1]

    first = space_after(lambda: None)
    assert space_after(lambda: model.lm_head.weight.data.mul_(-1)) is first
    moved = space_after(lambda: setattr(model.lm_head.weight, "data", model.lm_head.weight.data * -1))
    assert moved is not first
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: -output)
    hooked = space_after(lambda: None)
    assert hooked not in (first, moved)
    hook.remove()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore")  # what torch.compile says is its own affair
def test_compiled_passes_write_the_same() -> None:
    assert_exact(Case(way="compiled", new=24, calls=2, seed=1, nodes=6, output="ids", dtype="float32"))


def test_what_is_kept_for_a_model_goes_with_it() -> None:
    model = copy.deepcopy(tiny("llama"))
    la = Lookahead(model, invariant=True)
    la.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=12)
    held = weakref.ref(next(iter(spaces_of(model))).cache)
    gone = weakref.ref(model)
    del la, model
    gc.collect()
    assert gone() is None
    assert held() is None


# Options


def test_what_cannot_be_served_is_refused_by_name() -> None:
    llama = tiny("llama")
    with pytest.raises(InvalidArgument, match="static='yes'"):
        Lookahead(llama, static="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="invariant=1;"):
        Lookahead(llama, invariant=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"compile=True takes .*leave static=False out"):
        Lookahead(llama, static=False, compile=True)
    with pytest.raises(InvalidArgument, match="leave static=False out"):
        Lookahead(llama, static=False, invariant=True)
    with pytest.raises(InvalidArgument, match="give 31 at most"):
        Lookahead(llama, nodes=32, invariant=True)
    with pytest.raises(InvalidArgument, match="window of guesses"):
        Lookahead(llama, sources=["jacobi"], invariant=True)
    with pytest.raises(UnsupportedModel, match=r"static=True does not serve Bloom.*leave static out"):
        Lookahead(zoo("bloom"), static=True)
    with pytest.raises(UnsupportedModel, match=r"invariant=True does not serve Mixtral.*experts.*leave invariant out"):
        Lookahead(tiny("mixtral"), invariant=True)


def test_an_output_without_a_limit_cannot_be_independent_of_drafts() -> None:
    class Endless(Stops):
        def __init__(self, criteria: Any) -> None:
            super().__init__(criteria)
            self.max_length = None

    with (
        mock.patch("lookahead.engine.Stops", Endless),
        pytest.raises(InvalidArgument, match="give max_new_tokens"),
    ):
        Lookahead(tiny("llama"), invariant=True).generate(torch.tensor([[3, 4]]), max_new_tokens=4)


def test_on_a_cpu_shapes_are_free_unless_asked_for() -> None:
    assert Lookahead(tiny("llama"))._counts is None
    assert Lookahead(tiny("llama"), static=False)._counts is None
    assert Lookahead(tiny("llama"), static=True)._counts == Counts()
    assert Lookahead(tiny("llama"), invariant=True)._counts == Counts(FIXED)


# Independence of drafts


@st.composite
def invariant_cases(draw: Any) -> Case:
    """Draw any call in low and single precision; whatever may draft."""
    dtype = draw(st.sampled_from(("float32", "bfloat16")))
    family = draw(st.sampled_from([name for name in TREES if name not in EXPERTS]))
    drafter = draw(st.sampled_from([name for name in DRAFTERS if "jacobi" not in name and name != "leaping"]))
    nodes = draw(st.sampled_from((31, 16, 8, 3, 1)))
    fixed = {"drafter": drafter, "nodes": nodes, "embeds": "no", "cache": "own", "calls": 1}
    case: Case = draw(cases(dtype=dtype, way="invariant", family=family, **fixed))
    mask = case.mask if case.attention == "sdpa" else "full"
    return replace(case, mask=mask, output="all", poison=False, limits=())


@settings(settings.get_profile("third_law"), suppress_health_check=QUICK)
@given(case=invariant_cases())
def test_no_draft_moves_a_bit(case: Case) -> None:
    """Tokens, logits, scores and the generator, with any drafter and budget, and with none."""
    event(f"{case.dtype}, {'as plain fails' if assert_invariant(case) else 'compared'}")


def assert_invariant(case: Case) -> bool:
    """Raise AssertionError unless drafts change nothing; return whether the call is refused in both ways."""
    assert case.way == "invariant"
    model = model_of(case)
    none = Lookahead(model, nodes=0, invariant=True)
    alone = run(case, door(replace(case, door="object"), model, none), none)
    la = lookahead_of(case, model, alone)
    la.drafter = drafter(case, alone) if case.drafter in ("oracle", "relay", "adversary") else la.drafter
    ours = run(case, door(case, model, la), la)
    assert repr(ours.error) == repr(alone.error), case
    assert torch.equal(ours.generator, alone.generator), case
    if alone.error is not None:
        return True
    assert torch.equal(ours.sequences, alone.sequences), case
    for name in ("logits", "scores"):
        mine, theirs = getattr(ours.output, name), getattr(alone.output, name)
        assert len(mine) == len(theirs)
        for column, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{case}: {name} of column {column}"
    return False


def test_without_one_shape_drafts_do_move_bits() -> None:
    """What the law above rules out is there to be seen, so that it can fail."""
    model, ids = (
        tiny("llama", dtype="float32"),
        torch.randint(3, 48, (1, 40), generator=torch.Generator().manual_seed(0)),
    )
    arguments = {"max_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True}

    def moved(**way: bool) -> int:
        none = Lookahead(model, nodes=0, **way).generate(ids, **arguments)
        oracle = Oracle([none.sequences[0, 40:].tolist()], 48, error=0.2)
        ours = Lookahead(model, nodes=12, drafter=oracle, **way).generate(ids, **arguments)
        assert torch.equal(ours.sequences, none.sequences)
        return sum(not torch.equal(a, b) for a, b in zip(ours.logits, none.logits, strict=True))

    assert moved(static=False) > 0
    assert moved(static=True) > 0
    assert moved(invariant=True) == 0


@pytest.mark.gpu
@settings(settings.get_profile("side_law"), suppress_health_check=QUICK)
@given(case=invariant_cases())
def test_no_draft_moves_a_bit_on_cuda(case: Case) -> None:
    assert_invariant(replace(case, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", TREES)
def test_graphs_are_recorded_and_exact_on_cuda(family: str) -> None:
    base = Case(family=family, way="static", device="cuda", dtype="float32", new=36, calls=3, output="ids")
    assert_exact(replace(base, seed=1, drafter="adversary"))
    assert_exact(replace(base, seed=3, rows=3, mask="left", drafter="relay", sample=True, eos=(1, 7)))
    for one in spaces_of(model_of(base)):
        names = {recording.key[0] for recording in one.recorder.recordings if not recording.refused}  # type: ignore[attr-defined]
        assert "score" in names or family in EXPERTS


def test_passes_are_calibrated_as_decoding_has_them() -> None:
    """Where fixed shapes are the default, they are what is measured."""
    model, ran = tiny("llama", vocab_size=54), list[int]()

    class Watched(StaticTarget):
        def _scored(self, rows: int) -> Any:
            ran.append(rows)
            return super()._scored(rows)

    with (
        mock.patch("lookahead.calibrate.static_of", return_value=True),
        mock.patch("lookahead.calibrate.StaticTarget", Watched),
    ):
        curve = measure(model, context=16, most=12, rounds=2)
    assert set(ran) == {1, 8, 16}
    assert list(curve.seconds) == sorted(curve.seconds)
