"""The index of the pool against naive twins, on sound arrays and on damaged ones."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import DEPTH, Document, Twin, array, assert_same_runs, collections, common, decoded, run_apart, run_of

from lookahead.errors import PoolDamaged
from lookahead.pool import index, search
from lookahead.pool.index import Run, as_run, documents_within, merge
from lookahead.pool.levels import FAN, to_give_up, to_merge
from lookahead.pool.search import LENGTHS, ROWS, Heard, empty_heard, interval, longest, views
from lookahead.sources.kernels import kernel

DAMAGES = 6_000
PAGE = mmap.PAGESIZE


# What kernels call has no entry from Python: this is the door that the tests use.
@kernel
def walk(run, suffix, start, spots, heard):  # type: ignore[no-untyped-def]
    """Find the oldest `start` tokens of a context, go down token by token to all of it, and listen there.

    Args:
        suffix: the context, newest first, and room for a copy.
        spots: [1 + tokens, 3] becomes the spot of every prefix of the context from `start` on.
    """
    n = suffix.shape[1]
    row = np.int64(0)
    for i in range(max(0, start - DEPTH), start):
        row = search.follow(run, row, suffix[0, n - 1 - i])
    search.find_spot(run, row, suffix[0, n - start :], min(start, DEPTH), spots[start])
    for i in range(start, n):
        # Whoever asks keeps a context newest first, so that it is another array for every prefix.
        for k in range(i + 1):
            suffix[1, k] = suffix[0, n - 1 - i + k]
        search.descend(run, spots[i], suffix[1, 0], suffix[1], i + 1, spots[i + 1])
    search.hush(heard)
    search.listen(run, spots[n], suffix[0], heard)


@kernel
def slot_of(run, newest, before):  # type: ignore[no-untyped-def]
    return search._listed(run, newest, before)


def walked(view: Any, context: Sequence[int], start: int) -> tuple[Any, Heard]:
    spots, heard = np.full((len(context) + 1, 3), -1, np.int64), empty_heard()
    suffix = np.zeros((2, len(context)), np.int64)
    suffix[0] = context[::-1]
    walk(view, suffix, start, spots, heard)
    return spots, heard


def contexts_of(documents: Sequence[Document]) -> Any:
    """Contexts that occur, that go on differently after a while, and that occur nowhere."""
    tokens = sorted({token for document in documents for token in document} | {0, 3})
    token = st.sampled_from([*tokens, tokens[-1] + 1, (1 << 24) - 2])
    noise = st.lists(token, max_size=40)
    if not any(documents):
        return noise
    piece = st.sampled_from([document for document in documents if document]).flatmap(
        lambda document: st.tuples(st.integers(0, len(document)), st.integers(0, len(document))).map(
            lambda cut: list(document[min(cut) : max(cut)])
        )
    )
    return st.one_of(
        piece,
        st.tuples(st.lists(token, max_size=2), piece, st.lists(token, max_size=2)).map(
            lambda parts: [*parts[0], *parts[1], *parts[2]]
        ),
        noise,
    )


with_context = collections.flatmap(lambda documents: st.tuples(st.just(documents), contexts_of(documents)))


def chain(seed: int, documents: int, length: int, symbols: int) -> list[Document]:
    """Documents of a skewed random walk over tokens, long enough for frequent contexts."""
    draws = np.random.default_rng(seed)
    favourites = draws.integers(0, symbols, (symbols, 3))
    texts = []
    for _ in range(documents):
        text = [int(draws.integers(symbols))]
        while len(text) < length:
            rare = draws.random() < 0.15
            text.append(int(draws.integers(symbols) if rare else favourites[text[-1], draws.integers(3)]))
        texts.append(tuple(text))
    return texts


# --- what a run holds -------------------------------------------------------------------------------------------


@given(collections)
@settings(max_examples=200)
def test_a_run_equals_naive(documents: list[Document]) -> None:
    run, twin = run_of(documents, list(range(1, len(documents) + 1))), Twin(documents)
    symbols = run.low.astype(np.int64)
    if len(run.high):
        symbols |= run.high.astype(np.int64) << 16
    assert (len(run.high) > 0) == (max((symbol for _, symbol in twin.rows), default=0) > 0xFFFF)
    assert symbols.tolist() == [symbol for _, symbol in twin.rows]
    assert run.lcp.tolist() == twin.lcp()
    assert run.back.tolist() == twin.back()
    assert run.ends.tolist() == twin.ends()
    assert run.starts.tolist() == twin.starts()
    assert run.lengths.tolist() == [len(document) + 1 for document in documents]
    assert run.digests.tolist() == list(range(1, len(documents) + 1))
    assert run.tokens == sum(map(len, documents))
    assert decoded(run) == documents


@pytest.mark.parametrize("chunk", [1, 50, 400])
def test_sorting_in_chunks_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*chain(0, 8, 60, 3), (), (1,) * 90, (1,) * 70]
    whole = run_of(documents)
    monkeypatch.setattr(index, "CHUNK", chunk)
    assert_same_runs(run_of(documents), whole)


@given(st.lists(collections, min_size=1, max_size=4), st.integers(0, 12))
def test_merged_runs_equal_one_built_at_once(groups: list[list[Document]], skip: int) -> None:
    documents = [document for group in groups for document in group]
    names, runs, skip = np.arange(1, len(documents) + 1), [], min(skip, len(documents))
    for group in groups:
        at = sum(len(run.ends) for run in runs)
        runs.append(run_of(group, names[at : at + len(group)].tolist()))
    assert_same_runs(merge(runs), run_of(documents, names.tolist()))
    assert_same_runs(merge(runs, skip), run_of(documents[skip:], names[skip:].tolist()))


@pytest.mark.parametrize("symbols", [3, 40, 300])
def test_merged_long_runs_equal_one_built_at_once(symbols: int) -> None:
    documents = chain(symbols, 20, 200, symbols)
    runs = [run_of(documents[:9]), run_of([]), run_of(documents[9:10]), run_of(documents[10:])]
    for skip in (0, 1, 9, 12, 20):
        assert_same_runs(merge(runs, skip), run_of(documents[skip:]))


@pytest.mark.parametrize(("seed", "symbols", "length"), [(0, 2, 300), (1, 4, 300), (2, 30, 900), (3, 1, 200)])
def test_frequent_contexts_equal_naive(seed: int, symbols: int, length: int) -> None:
    documents = [*chain(seed, 9, length, symbols), (0,), ()]
    run, wanted = run_of(documents), Twin(documents).listed()
    records = {(int(row[0]), int(row[1])): row for row in run.listed if row[0]}
    assert wanted
    assert records.keys() == wanted.keys()
    view = views([run])[0]
    for context, (rows, distinct, commonest) in wanted.items():
        record = run.listed[slot_of(view, *context)]
        assert (record[0], record[1], record[2], record[3]) == (*context, rows, distinct)
        width = len(commonest)
        assert list(zip(record[4:].tolist(), record[4 + index.LISTED :].tolist(), strict=False))[:width] == commonest
        assert not record[4 + width : 4 + index.LISTED].any()
        assert not record[4 + index.LISTED + width :].any()
    assert slot_of(view, 1 << 20, 0) == -1


@given(collections, st.integers(0, 200))
def test_documents_within_equals_naive(documents: list[Document], tokens: int) -> None:
    counts = [sum(map(len, documents[:n])) for n in range(len(documents) + 1)]
    naive = next((n for n in range(1, len(documents) + 1) if counts[n] >= tokens), len(documents))
    assert documents_within(run_of(documents), tokens) == naive


@given(st.lists(st.integers(1, 1000), max_size=60))
def test_merging_keeps_runs_few_and_rewrites_each_token_seldom(sizes: list[int]) -> None:
    runs: list[int] = []
    rewritten = 0
    for size in sizes:
        runs.append(size)
        while (some := to_merge(runs)) is not None:
            assert some.stop == len(runs)
            assert len(runs[some]) >= FAN
            rewritten += sum(runs[some])
            runs[some] = [sum(runs[some])]
    total = sum(sizes)
    assert sum(runs) == total
    assert len(runs) <= 4 + 4 * np.log2(total + 1)
    assert rewritten <= total * (1 + np.log2(total + 1))


@given(st.integers(0, 10_000), st.integers(1, 5_000))
def test_what_is_given_up_makes_room(tokens: int, limit: int) -> None:
    gone = to_give_up(tokens, limit)
    assert (gone == 0) == (tokens <= limit)
    assert 0 <= gone <= tokens
    assert tokens - gone <= limit
    assert gone == 0 or tokens - gone >= limit - limit // 8


# --- asking -----------------------------------------------------------------------------------------------------


@given(with_context, st.integers(0, 60))
@settings(max_examples=250)
def test_find_and_descend_equal_naive(case: tuple[list[Document], list[int]], start: int) -> None:
    documents, context = case
    view, twin = views([run := run_of(documents)])[0], Twin(documents)
    start = min(start, len(context))
    spots, heard = walked(view, context, start)
    contexts = [row[0] for row in twin.rows]
    for size in range(start, len(context) + 1):
        suffix = tuple(context[:size][::-1])[:DEPTH]
        row, above, below = spots[size].tolist()
        first = sum(other < suffix for other in contexts)
        # Equal contexts are one place as far as 32 tokens tell.
        last = sum(other <= suffix for other in contexts) if size > DEPTH else first
        assert first <= row <= last
        assert above == (common(contexts[row - 1], suffix) if row > 0 else 0)
        assert below == (common(contexts[row], suffix) if row < len(contexts) else 0)
        assert max(above, below) == twin.longest(suffix)
    assert heard.used[1] == twin.longest(context[::-1])
    assert len(run.back) == len(contexts)


@given(with_context, st.integers(0, 33))
@settings(max_examples=250)
def test_interval_equals_naive(case: tuple[list[Document], list[int]], length: int) -> None:
    documents, context = case
    runs, twin = views([run := run_of(documents)]), Twin(documents)
    first, end = interval(runs[0], array(context), length)
    suffix = context[::-1]
    assert longest(runs, array(context)) == twin.longest(suffix)
    if length > min(len(suffix), DEPTH):
        assert first == end
        return
    rows = [row for row, (other, _) in enumerate(twin.rows) if common(other, suffix) >= length]
    assert list(range(first, end)) == rows
    assert len(run.back) == len(twin.rows)


def assert_heard(documents: list[Document], context: list[int], start: int) -> None:
    run, twin, suffix = run_of(documents), Twin(documents), context[::-1]
    _, heard = walked(views([run])[0], context, min(start, len(context)))
    names = {int(token): heard.counts[i] for i, token in enumerate(heard.tokens[: heard.used[0]])}
    assert len(names) == heard.used[0]
    listed = twin.listed()
    keys = [(suffix[0] + 1, 0)] if suffix else []
    keys += [(suffix[0] + 1, suffix[1] + 1)] if len(suffix) > 1 else []
    spoken = [k for k, key in enumerate(keys) if key in listed]
    for k, length in enumerate(LENGTHS.tolist()):
        followed = Counter(twin.after(suffix, length))
        total, counts = int(heard.totals[k]), {token: int(row[k]) for token, row in names.items()}
        assert sum(counts.values()) <= total <= followed.total()
        assert all(count <= followed[token + 1] for token, count in counts.items())
        if followed.total() <= ROWS:
            assert counts == {token: followed[token + 1] for token in names}
            assert {token + 1 for token in names} >= followed.keys() - {0}
            assert total == followed.total()
        elif k in spoken:
            assert total == followed.total()
            for symbol, count in listed[keys[k]][2]:
                assert symbol == 0 or counts[symbol - 1] == count
        else:
            assert total == ROWS


@given(with_context, st.integers(0, 60))
@settings(max_examples=250)
def test_what_is_heard_equals_naive(case: tuple[list[Document], list[int]], start: int) -> None:
    assert_heard(*case, start)


@pytest.mark.parametrize("symbols", [2, 5, 40])
def test_what_is_heard_of_frequent_contexts_equals_naive(symbols: int) -> None:
    documents = chain(symbols, 12, 200, symbols)
    draws = np.random.default_rng(symbols)
    for length in (1, 2, 3, 5, 9, 20, 40):
        at = int(draws.integers(0, 200 - length))
        assert_heard(documents, list(documents[draws.integers(12)][at : at + length]), length // 2)


def test_what_several_runs_say_is_added_up() -> None:
    groups = [chain(seed, 2, 15, 3) for seed in range(3)]
    context = [0, 1]
    heard, suffix = empty_heard(), np.array([context[::-1], [0, 0]], np.int64)
    totals, longest = np.zeros(len(LENGTHS), np.int64), 0
    for view in views(runs := [run_of(group) for group in groups]):
        walk(view, suffix, 0, np.zeros((3, 3), np.int64), heard)
        totals += heard.totals
        longest = max(longest, int(heard.used[1]))
    twin = Twin([document for group in groups for document in group])
    assert totals.tolist() == [len(twin.after(context[::-1], length)) for length in LENGTHS.tolist()]
    assert longest == twin.longest(context[::-1])
    assert len(runs) == 3


# --- damaged arrays ---------------------------------------------------------------------------------------------


def test_arrays_that_do_not_fit_are_named() -> None:
    run, file = run_of([(1, 2, 3), (4,)]), Path("some/file")
    assert_same_runs(as_run(run._asdict(), file), run)
    for name in Run._fields:
        arrays = run._asdict()
        worse = [arrays[name].astype(np.int64), arrays[name][:0], np.repeat(arrays[name], 3, axis=0)]
        if name == "high":  # empty is fine
            worse = [arrays[name].astype(np.int64), np.zeros(2, np.uint8)]
        elif name == "starts":  # of any length
            worse.pop()
        for other in worse:
            with pytest.raises(PoolDamaged, match="some/file"):
                as_run({**arrays, name: other}, file)
        with pytest.raises(PoolDamaged, match="some/file"):
            as_run({key: value for key, value in arrays.items() if key != name}, file)
    with pytest.raises(PoolDamaged):
        as_run({**run._asdict(), "more": run.low}, file)


class Guarded:
    """A copy of an array between two pages that nobody may touch."""

    def __init__(self, source: Any, at_end: bool) -> None:
        room = -(-max(source.nbytes, 1) // PAGE) * PAGE
        self._map = mmap.mmap(-1, room + 2 * PAGE)
        whole = np.frombuffer(self._map, np.uint8)
        begin = PAGE + (room - source.nbytes if at_end else 0)
        self.array = whole[begin : begin + source.nbytes].view(source.dtype).reshape(source.shape)
        self.array[...] = source
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for page in (whole.ctypes.data, whole.ctypes.data + PAGE + room):
            assert protect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0


def damage(draws: Any, array: Any) -> None:
    """Put some random numbers into an array."""
    flat, highest = array.reshape(-1), int(np.iinfo(array.dtype).max)
    for _ in range(int(draws.integers(1, 6))):
        at = int(draws.integers(len(flat)))
        near = int(flat[at]) + int(draws.integers(-3, 4))
        choices = (0, highest, int(draws.integers(highest, endpoint=True)), int(draws.integers(len(flat) + 2)), near)
        flat[at] = min(max(int(choices[draws.integers(len(choices))]), 0), highest)
    if draws.random() < 0.1:
        flat[:] = draws.integers(0, highest, len(flat), array.dtype, endpoint=True)


def ask_everything(run: Run, contexts: Sequence[Sequence[int]]) -> None:
    view = views([run])[0]
    for context in contexts:
        for start in (0, len(context) // 2, len(context)):
            _, heard = walked(view, context, start)
            assert 0 <= heard.used[0] <= search.NAMES
            assert 0 <= heard.used[1] <= DEPTH
            names, counts = heard.tokens[: heard.used[0]], heard.counts[: heard.used[0]]
            assert (names >= 0).all()
            assert (names < 1 << 24).all()
            assert (counts >= 0).all()
            assert (counts.sum(0) <= heard.totals).all()
        for length in (0, 1, 5):
            first, end = interval(view, array(context), length)
            assert 0 <= first <= end <= len(run.back)
        assert 0 <= longest(views([run]), array(context)) <= DEPTH


SAMPLES = {
    "small": [(1, 2, 3, 1, 2), (), (2,)],
    "deep": [(1, 2) * 40, (1, 2) * 35, (3,) * 50],
    "frequent": [*chain(1, 6, 160, 3), (0,)],
    "wide": [(70_000, 1, 70_000, 2), (65_535, 65_536) * 20],
    "empty": [(), ()],
}


@pytest.mark.parametrize("past", [-1, 0])
def test_a_read_out_of_bounds_is_seen(past: int) -> None:
    guarded = Guarded(np.arange(PAGE // 4, dtype=np.uint32), at_end=True).array
    address = guarded.ctypes.data + (guarded.nbytes if past == 0 else past)

    def act() -> None:
        faulthandler.disable()  # this one is wanted
        ctypes.string_at(address, 1)

    assert run_apart(act) == -signal.SIGSEGV


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("sample", SAMPLES)
def test_asking_damaged_arrays_stays_within_them(sample: str, at_end: bool) -> None:
    documents = SAMPLES[sample]
    run = run_of(documents)
    contexts = [*[list(document[:40]) for document in documents if document][:3], [1], [2, 1, 9, 1, 2], []]
    ask_everything(run, contexts)  # compiled before the fork

    def act() -> None:
        draws = np.random.default_rng(at_end)
        guarded = Run(*(Guarded(array, at_end).array for array in run))
        names = [name for name in ("back", "low", "high", "lcp", "starts", "listed") if len(getattr(run, name))]
        for _ in range(DAMAGES // (2 * len(SAMPLES))):
            some = draws.choice(names, size=int(draws.integers(1, 3)))
            for name in some:
                damage(draws, getattr(guarded, name))
            ask_everything(guarded, contexts)
            for name in some:
                getattr(guarded, name)[...] = getattr(run, name)

    assert run_apart(act) == 0


@pytest.mark.parametrize("sample", SAMPLES)
def test_merging_damaged_arrays_raises_or_gives_some_run(sample: str) -> None:
    run, other = run_of(SAMPLES[sample]), run_of([(1, 2, 3)])
    merge([run, other], 1)  # compiled before the fork

    def act() -> None:
        draws = np.random.default_rng(0)
        names = [name for name in ("back", "low", "lcp", "ends", "lengths", "starts") if len(getattr(run, name))]
        for _ in range(300):
            arrays = {name: value.copy() for name, value in run._asdict().items()}
            for name in draws.choice(names, size=int(draws.integers(1, 3))):
                damage(draws, arrays[name])
            try:
                merged = merge([Run(**arrays), other], int(draws.integers(0, 2)))
            except ValueError:
                continue
            assert len(merged.back) <= len(run.back) + len(other.back)
            ask_everything(merged, [[1, 2], [1]])

    assert run_apart(act) == 0
