"""The sources against naive twins, and laws of what learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from lookahead.draft import IntArray
from lookahead.sources import alignment, evidence, mixer, prompt, recycle, tree
from lookahead.sources.alignment import advance, ask_alignment, expected, lost
from lookahead.sources.evidence import CONTEXTS, EXACT, FIRST_SPARSE, FIRST_WRITTEN, SPARSE, WIDTH, WRITTEN, Evidence
from lookahead.sources.mixer import (
    LAYOUT,
    SHIPPED,
    Weights,
    chance_of,
    fresh_weights,
    learn,
    untrained_weights,
)
from lookahead.sources.nodes import find_nodes
from lookahead.sources.prompt import REACH, Prompt, ask_contexts, hash_contexts, look_up
from lookahead.sources.recycle import Recycled, ask_recycled, remember

texts = st.lists(st.integers(0, 4), max_size=60)


# What kernels call has no entry from Python: these are the doors that the tests use.
@njit
def ask_index(index, suffix, written, states, slots, at_root, found):  # type: ignore[no-untyped-def]
    evidence.clear(found)
    hash_contexts(suffix, suffix.shape[0], written, states)
    look_up(index, states, slots)
    ask_contexts(index, slots, at_root, found)


@njit
def insert(index, new):  # type: ignore[no-untyped-def]
    prompt.insert(index, new, np.empty(REACH, np.int64), np.empty(CONTEXTS, np.int64))


def feed(text: Prompt, context: Any) -> None:
    new = text.fresh(np.array(context, np.int32))
    insert(text.index, new)


def fed(before: Any, after: Any = ()) -> Prompt:
    """An index of a prompt and of generated text."""
    text = Prompt(np.array(before, np.int32))
    feed(text, before)
    feed(text, [*before, *after])
    return text


@njit
def ask_table(recycled, before, token, heat, found):  # type: ignore[no-untyped-def]
    evidence.clear(found)
    ask_recycled(recycled, before, token, heat, found)


@njit
def ask_place(place, tokens, trials, found):  # type: ignore[no-untyped-def]
    evidence.clear(found)
    ask_alignment(place, tokens, tokens.shape[0], trials, found)


@njit
def move_on(place, tokens, token):  # type: ignore[no-untyped-def]
    advance(place, tokens, tokens.shape[0], token)


@njit
def next_token(place, tokens):  # type: ignore[no-untyped-def]
    return expected(place, tokens, tokens.shape[0])


@njit
def chance(weights, x, sets):  # type: ignore[no-untyped-def]
    return chance_of(weights, x, sets)


@njit
def learn_one(weights, x, sets, cell, hit):  # type: ignore[no-untyped-def]
    learn(weights, x, sets, cell, hit)


@njit
def take_all(grown, chances, out, floors):  # type: ignore[no-untyped-def]
    tree.plant(grown, 0, np.zeros(alignment.FIELDS, np.int64))
    for token in range(chances.shape[0]):
        item = tree.wait(grown, chances[token])
        if item >= 0:
            grown.items[item].token, grown.items[item].parent = token, 0
    for i in range(out.shape[0]):
        out[i] = tree.take(grown, floors)


def locate(grown: tree.Tree, tokens: IntArray, parents: IntArray) -> IntArray:
    nodes = np.empty(tokens.shape[0], np.int32)
    known = grown.nodes[: grown.used[tree.NODES]]
    find_nodes(tokens, parents, known["token"], known["parent"], nodes)
    return nodes


def ask(index: prompt.Index, suffix: list[int], written: int, at_root: bool = True) -> Evidence:
    """Ask about the suffix (newest token first)."""
    found, contexts = evidence.empty_evidence(), evidence.CONTEXTS
    states, slots = np.zeros(contexts, np.int64), np.zeros(contexts, np.int64)
    ask_index(index, np.array(suffix[:REACH], np.int64), written, states, slots, at_root, found)
    return found


def rows(found: Evidence) -> Any:
    return found.rows[: found.size[0]].view(np.recarray)


def said(found: Evidence, column: int) -> dict[int, float]:
    """What a column says of every token that was named."""
    return {int(row.token): float(x[column]) for row, x in zip(rows(found), found.x, strict=False)}


def followers(text: list[int], suffix: list[int], skip: int, length: int, since: int) -> list[int]:
    """The tokens after every place where text agrees with `suffix` (newest first), `skip` tokens left out."""
    wanted = suffix[skip : skip + length]
    if len(wanted) < length:
        return []
    ends = range(max(skip + length, since + length), len(text))
    return [text[e] for e in ends if text[e - skip - length : e - skip][::-1] == wanted]


def log_odds_of(seen: list[int], token: int) -> float:
    if not seen:
        return 0.0
    count = seen.count(token)
    odds = np.log(count + 0.4) - np.log(len(seen) - count + 0.4) if count else np.log(0.4) - np.log(len(seen) + 0.4)
    return float(np.clip(odds, -4.0, 4.0))


def blend_of(text: list[int], suffix: list[int], token: int) -> float:
    """PPM over the exact contexts, from long to short."""
    rest, total = 1.0, 0.0
    for order in reversed(EXACT.tolist()):
        seen = followers(text, suffix, 0, order, 0) if order <= len(suffix) else []
        if not seen or rest < 1e-5:
            continue
        distinct = len(set(seen))
        escape = 0.5 * distinct / (len(seen) + 1.0 + 0.5 * distinct)
        newest = seen[-1] == token
        total += rest * (1.0 - escape) * (seen.count(token) + newest) / (len(seen) + 1.0)
        rest *= escape
    return total


@given(texts, texts)
def test_contexts_equal_naive(before: list[int], after: list[int]) -> None:
    index, text = fed(before, after), before + after
    suffix = text[::-1]
    found = ask(index.index, suffix[:REACH], len(after))
    for token in {int(row.token) for row in rows(found)}:
        for k, order in enumerate(EXACT.tolist()):
            seen = followers(text, suffix, 0, order, 0) if order <= min(len(text), REACH) else []
            if k > 5:  # shorter ones may be left out once the longer ones are sure
                assert said(found, k)[token] == pytest.approx(log_odds_of(seen, token), abs=1e-4)
        for k, (skip, length) in enumerate(SPARSE.tolist(), FIRST_SPARSE):
            seen = followers(text, suffix, skip, length, 0)
            assert said(found, k)[token] == pytest.approx(log_odds_of(seen, token), abs=1e-4)
        for k, length in enumerate(WRITTEN.tolist(), FIRST_WRITTEN):
            seen = followers(text, suffix, 0, length, len(before)) if length <= len(after) else []
            assert said(found, k)[token] == pytest.approx(log_odds_of(seen, token), abs=1e-4)


@given(texts)
def test_blend_and_longest_equal_naive(text: list[int]) -> None:
    index, suffix = fed(text), text[::-1][:REACH]
    found = ask(index.index, suffix, 0)
    for row in rows(found):
        token = int(row.token)
        assert float(row.blend) == pytest.approx(blend_of(text, suffix, token), abs=1e-4)
        known = [k for k, n in enumerate(EXACT) if n <= len(suffix) and token in followers(text, suffix, 0, int(n), 0)]
        assert row.longest == max(known) + 1
    assert {int(row.token) for row in rows(found)} <= set(text)
    assert found.size[0] > 0 or not text


@given(texts, texts)
def test_below_the_root_the_empty_context_names_nothing(before: list[int], after: list[int]) -> None:
    index, suffix = fed(before, after).index, [*before, *after][::-1][:REACH]
    all_rows, below = (ask(index, suffix, len(after), at_root) for at_root in (True, False))
    known, known_below = ({int(row.token): int(row.longest) for row in rows(f)} for f in (all_rows, below))
    assert {t for t, longest in known_below.items() if longest > 0} == {t for t, n in known.items() if n > 1}
    for k in range(evidence.CONTEXTS):
        wanted = said(all_rows, k)
        for token, odds in said(below, k).items():
            assert odds == wanted[token] or (k == 0 and known_below[token] == 0)


@given(texts, st.lists(st.integers(0, 7), max_size=5))
def test_feeding_in_pieces_changes_nothing(text: list[int], cuts: list[int]) -> None:
    whole, pieces = Prompt(np.zeros(0, np.int32)), Prompt(np.zeros(0, np.int32))
    feed(whole, text)
    for size in np.cumsum(cuts):
        feed(pieces, text[:size])
    feed(pieces, text)
    for name in ("tokens", "slots", "successors", "used", "place"):
        assert np.array_equal(getattr(whole.index, name), getattr(pieces.index, name))


def test_growing_out_of_the_first_room_loses_nothing() -> None:
    text = np.random.default_rng(0).integers(0, 50, 3000).astype(np.int32)
    grown, whole = Prompt(text[:10]), Prompt(text[:10])
    for size in range(10, 3001, 130):
        feed(grown, text[:size])
    feed(whole, text)
    suffix = text[::-1][:REACH].tolist()
    for a, b in zip(ask(grown.index, suffix, 2990)[:-1], ask(whole.index, suffix, 2990)[:-1], strict=True):
        assert np.array_equal(a, b)


def test_another_context_starts_again() -> None:
    index, other = fed(range(100)), np.arange(50, 90, dtype=np.int32)
    feed(index, other)
    fresh = fed(other)
    assert index.index.used.tolist() == fresh.index.used.tolist()
    assert np.array_equal(index.index.tokens[:40], other)


def test_a_context_keeps_a_bounded_list() -> None:
    text = np.tile(np.array([[0], [1]]), (1, 1000))
    text[1] = np.arange(1, 1001)
    found = ask(fed(text.T.ravel()).index, [0], 0)
    assert found.size[0] <= WIDTH
    assert 1000 in {int(row.token) for row in rows(found)}


# --- alignment --------------------------------------------------------------------------------------------------


def after(steps: list[int], text: IntArray, at: int, run: int) -> Any:
    place = lost()
    place[alignment.AT], place[alignment.RUN] = at, run
    for token in steps:
        move_on(place, text, token)
    return place


def test_copying_goes_on() -> None:
    text = np.arange(20, dtype=np.int32)
    place = after([5, 6, 7], text, 5, 4)
    assert next_token(place, text) == 8
    assert place[alignment.RUN] == 7


@pytest.mark.parametrize("put_in", [1, 2, 5])
@pytest.mark.parametrize("left_out", [0, 1, 4])
def test_the_place_survives_an_edit(put_in: int, left_out: int) -> None:
    text = np.arange(40, dtype=np.int32)
    new = list(range(90, 90 + put_in))
    rest = [5 + left_out, 6 + left_out]
    place = after([*new, *rest], text, 5, 20)
    assert place[alignment.AT] == 7 + left_out
    assert next_token(place, text) == 7 + left_out


def test_a_false_return_is_taken_back() -> None:
    text = np.arange(40, dtype=np.int32)
    # 6 looks like a return, 91 shows that it was none; 5 and 6 follow where the edit began.
    place = after([90, 6, 91, 5, 6], text, 5, 20)
    assert next_token(place, text) == 7


def test_a_place_is_given_up_after_a_while() -> None:
    text = np.arange(40, dtype=np.int32)
    assert after([90] * 20, text, 5, 20)[alignment.AT] == -1


@given(texts, texts, st.integers(0, 70), st.integers(0, 40))
def test_any_text_keeps_a_place_sound(text: list[int], steps: list[int], at: int, run: int) -> None:
    tokens = np.array([9, *text], np.int32)
    place = after(steps, tokens, min(at, len(text)), run)
    assert -1 <= place[alignment.AT] <= len(tokens) + len(steps)
    assert -1 <= next_token(place, tokens) < 10
    found, trials = evidence.empty_evidence(), fresh_weights().trials
    ask_place(place, tokens, trials, found)
    for row in rows(found):
        assert 0 < row.cell < alignment.CELLS
        assert row.token in tokens


# --- recycle ----------------------------------------------------------------------------------------------------


COLD = np.float32(1.0)


def softmax(logits: Any, heat: float = 1.0) -> Any:
    weights = np.exp((logits - logits[0]) * heat)
    return weights / weights.sum()


@given(st.data())
def test_recycled_equal_naive(data: st.DataObject) -> None:
    recycled, heat = recycle.empty_tables(40), data.draw(st.sampled_from((1.0, 2.0, 0.5)))
    pairs: dict[tuple[int, int], Any] = {}
    single: dict[int, Any] = {}
    for _ in range(data.draw(st.integers(1, 4))):
        size, before = data.draw(st.integers(1, 6)), data.draw(st.integers(-1, 5))
        tokens = np.array(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)), np.int32)
        parents = np.array([-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, size)], np.int32)
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        tops = np.array([rng.permutation(40)[:8] for _ in range(size)], np.int32)
        logits = -np.sort(-rng.normal(size=(size, 8)).astype(np.float32))
        remember(recycled, before, tokens, parents, tops, logits)
        for i in range(size):
            entry = {int(t): float(c) for t, c in zip(tops[i], softmax(logits[i], heat), strict=True)}
            above = before if i == 0 else int(tokens[parents[i]])
            single[int(tokens[i])] = entry
            if above >= 0:
                pairs[above, int(tokens[i])] = entry
    before, token = data.draw(st.integers(-1, 5)), data.draw(st.integers(0, 5))
    found = evidence.empty_evidence()
    ask_table(recycled, np.int64(before), np.int64(token), np.float32(heat), found)
    best = pairs.get((before, token)) or single.get(token) or {}
    got = {int(r.token): float(r.recycled) for r in rows(found) if r.recycled > 0}
    for token_, value in best.items():
        assert got[token_] == pytest.approx(value, rel=1e-4)
    assert set(got) == set(best) | set(single.get(token, {}))


def test_recycled_logits_speak_at_any_temperature() -> None:
    """Nearly greedy, the likeliest takes all; it must not fade with the others."""
    recycled = recycle.empty_tables(40)
    tops, logits = np.array([[5, 6, 7]], np.int32), np.array([[1.0, 0.5, -3.0]], np.float32)
    remember(recycled, -1, np.array([3], np.int32), np.array([-1], np.int32), tops, logits)
    for heat in (50.0, 1e6, 1e30):
        found = evidence.empty_evidence()
        ask_table(recycled, np.int64(-1), np.int64(3), np.float32(heat), found)
        assert {int(r.token): float(r.recycled) for r in rows(found) if r.recycled > 1e-6} == {5: pytest.approx(1.0)}


def test_a_large_vocabulary_shares_slots() -> None:
    recycled = recycle.empty_tables(300_000)
    assert recycled.key.nbytes + recycled.tokens.nbytes + recycled.chance.nbytes < 16e6
    tokens = np.array([7, 7 + recycle.SLOTS], np.int32)
    tops = np.array([[1, 2], [3, 4]], np.int32)
    remember(recycled, -1, tokens[:1], np.array([-1], np.int32), tops[:1], np.zeros((1, 2), np.float32))
    remember(recycled, -1, tokens[1:], np.array([-1], np.int32), tops[1:], np.zeros((1, 2), np.float32))
    found = evidence.empty_evidence()
    ask_table(recycled, np.int64(-1), np.int64(7), COLD, found)
    assert found.size[0] == 0
    ask_table(recycled, np.int64(-1), np.int64(tokens[1]), COLD, found)
    assert set(said(found, 0)) == {3, 4}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_odd_logits_are_left_out(bad: float) -> None:
    recycled: Recycled = recycle.empty_tables(40)
    logits = np.array([[bad, 0.0], [1.0, bad]], np.float32)
    tops = np.array([[1, 2], [3, 4]], np.int32)
    remember(recycled, -1, np.array([5, 6], np.int32), np.array([-1, 0], np.int32), tops, logits)
    for token in (5, 6):
        found = evidence.empty_evidence()
        ask_table(recycled, np.int64(-1), np.int64(token), COLD, found)
        assert np.isfinite(found.x).all()


# --- mixer and tree ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 999), st.booleans()), max_size=60), st.integers(0, 11))
def test_chances_stay_chances(trials: list[tuple[int, bool]], first: int) -> None:
    weights: Weights = fresh_weights()
    sets = np.array([first, 12 + first, 36, 40, 60, 100, 5000])
    for seed, hit in trials:
        x = np.random.default_rng(seed).uniform(-7, 7, evidence.COLUMNS).astype(np.float32)
        learn_one(weights, x, sets, 1 + seed % 50, hit)
        assert 0.0 < chance(weights, x, sets) < 1.0
    assert np.isfinite(weights.w).all()
    assert (weights.trials[:, 0] <= weights.trials[:, 1]).all()


SETS = np.array([3, 14, 36, 40, 60, 100, 5000])


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_mixer_learns_how_often_evidence_is_right(share: float) -> None:
    weights, rng = fresh_weights(), np.random.default_rng(0)
    x = np.zeros(evidence.COLUMNS, np.float32)
    x[evidence.BIAS], x[evidence.COPIED] = 1.0, 2.0
    for _ in range(3000):
        learn_one(weights, x, SETS, 5, rng.random() < share)
    assert chance(weights, x, SETS) == pytest.approx(share, abs=0.08)
    assert weights.trials[5, 0] / weights.trials[5, 1] == pytest.approx(share, abs=0.08)
    assert chance(untrained_weights(), x, SETS) == pytest.approx(0.5, abs=0.01), "other evidence unasked"


def test_the_shipped_weights_fit() -> None:
    """Where this fails, columns or sets have changed: run examples/train_weights.py again."""
    untrained, fresh = untrained_weights(), fresh_weights()
    with np.load(Path(mixer.__file__).with_name("weights.npz")) as file:
        shipped = Weights(*(file[name] for name in Weights._fields))
        assert file["layout"] == LAYOUT
    assert shipped.w.shape == shipped.energy.shape == untrained.w[:SHIPPED].shape
    assert shipped.trials.shape == untrained.trials.shape
    assert shipped.race.shape == shipped.race_energy.shape == untrained.race.shape
    for learnt, start, before in zip(shipped, fresh, untrained, strict=True):
        assert learnt.dtype == np.float32
        assert np.isfinite(learnt).all()
        assert np.array_equal(start[: len(learnt)], learnt)
        assert np.array_equal(start[len(learnt) :], before[len(learnt) :])
    assert min(shipped.energy.min(), shipped.race_energy.min()) >= 1.0
    assert (shipped.trials > 0).all()
    assert (shipped.trials[:, 0] <= shipped.trials[:, 1]).all()


def test_growers_do_not_share_what_they_learn() -> None:
    one, start = fresh_weights(), fresh_weights()
    learn_one(one, np.ones(evidence.COLUMNS, np.float32), SETS, 5, True)
    assert not np.array_equal(one.w, start.w)
    assert all(np.array_equal(a, b) for a, b in zip(fresh_weights(), start, strict=True))


@given(st.lists(st.floats(0, 1, width=32), max_size=40), st.integers(0, 20))
def test_the_likeliest_are_taken_in_order(chances: list[float], budget: int) -> None:
    grown, order = tree.empty_tree(budget), np.zeros(budget + 1, np.int64)
    take_all(grown, np.array(chances, np.float32), order, np.zeros(budget + 1, np.float32))
    taken = min(budget, len(chances))
    assert order.tolist() == [*range(1, taken + 1), *[-1] * (budget + 1 - taken)]
    nodes = grown.nodes[1 : taken + 1]
    assert nodes["chance"].tolist() == sorted(chances, reverse=True)[:taken]
    assert [chances[token] for token in nodes["token"]] == nodes["chance"].tolist()
    assert len(set(nodes["token"].tolist())) == taken


@settings(max_examples=50)
@given(st.data())
def test_locate_equals_naive(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    grown = tree.empty_tree(size - 1)
    grown.used[tree.NODES] = size
    paths: dict[tuple[int, ...], int] = {(): 0}
    of_node: list[tuple[int, ...]] = [()]
    for node in range(1, size):
        parent = data.draw(st.integers(0, node - 1))
        token = data.draw(st.integers(0, 9).filter(lambda t, p=parent: (*of_node[p], t) not in paths))
        grown.nodes[node]["token"], grown.nodes[node]["parent"] = token, parent
        of_node.append((*of_node[parent], token))
        paths[of_node[node]] = node
    steps = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=12))
    tokens, parents, here = [0], [-1], [()]
    for i, (token, above) in enumerate(steps, 1):
        parents.append(above % i)
        tokens.append(token)
        here.append((*here[parents[i]], token))
    found = locate(grown, np.array(tokens, np.int32), np.array(parents, np.int32))
    assert found.tolist() == [paths.get(path, -1) for path in here]
