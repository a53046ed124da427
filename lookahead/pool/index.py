"""A run: documents that never change, indexed by context.

One row for every token, and for the end of every document, in the order of its context (see sort.py). What stands in a
row is enough to go on from it in either direction: the symbol that followed, and the row of the context that is one
token shorter at its new end (the psi function of compressed suffix arrays, Grossi and Vitter 2000). So the text itself
is not kept: 7 bytes a token, 8 where tokens need more than 16 bits, and what little the frequent contexts take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.errors import PoolDamaged
from lookahead.pool.sort import merge_contexts, sort_contexts
from lookahead.sources.kernels import background_kernel, inner

CHUNK = 1 << 22
"""Tokens that are sorted at once; longer texts are merged from sorted chunks."""

FREQUENT = 64
"""Contexts of one or two tokens that stood more often than this have their commonest successors listed."""

LISTED = 8
"""Successors in such a list."""

WORDS = 4 + 2 * LISTED
_SHARE = 160  # at most one listed context for so many rows
_LANES = 8  # documents that are walked at a time, so that they wait for memory together
_MIX = 0x2545F4914F6CDD1D


class Run(NamedTuple):
    """Arrays of N rows, S symbols (a symbol is a token + 1, 0 the end of a document) and D documents."""

    back: NDArray[np.uint32]  # [N] row of the context without its newest token
    low: NDArray[np.uint16]  # [N] the symbol that followed, its lower 16 bits
    high: NDArray[np.uint8]  # [N] and the bits above; empty where all symbols fit into 16
    lcp: NDArray[np.uint8]  # [N] tokens in common with the context of the row before
    starts: NDArray[np.uint32]  # [S + 1] first row of the contexts whose newest symbol is s
    listed: NDArray[np.uint32]  # [H, WORDS] frequent contexts, see `_list_frequent`
    ends: NDArray[np.uint32]  # [D] row of the end of each document, oldest first
    lengths: NDArray[np.uint32]  # [D] its rows: tokens + 1
    digests: NDArray[np.uint64]  # [D] what names its contents, 0: nothing

    @property
    def tokens(self) -> int:
        return len(self.back) - len(self.ends)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self)


_KINDS = (np.uint32, np.uint16, np.uint8, np.uint8, np.uint32, np.uint32, np.uint32, np.uint32, np.uint64)


class Sorted(NamedTuple):
    """A text and its positions by context: what a run is made from."""

    text: IntArray  # [1 + N]
    order: IntArray  # [N]
    lcp: NDArray[np.uint8]  # [N]


def as_run(arrays: Mapping[str, NDArray[Any]], file: Path) -> Run:
    """Return the run whose arrays were read from `file`.

    Raises:
        PoolDamaged: they do not fit together. Kernels check what indexes into them, so wrong numbers do no harm.
    """
    if set(arrays) != set(Run._fields):
        raise PoolDamaged(f"{file} is not a segment of a pool: it holds {', '.join(sorted(arrays))}")
    run = Run(**arrays)
    rows, documents, slots = len(run.back), len(run.ends), len(run.listed)
    fits = (
        len(run.low) == len(run.lcp) == rows
        and len(run.high) in (0, rows)
        and len(run.lengths) == len(run.digests) == documents
        and len(run.starts) > 0
        and run.listed.ndim == 2
        and run.listed.shape[1] == WORDS
        and slots > 0
        and slots & (slots - 1) == 0
        and all(arrays[name].dtype == kind for name, kind in zip(Run._fields, _KINDS, strict=True))
    )
    if not fits:
        raise PoolDamaged(f"{file} is not a segment of a pool: its arrays do not fit together")
    return run


def documents_within(run: Run, tokens: int) -> int:
    """Return how many of the oldest documents hold `tokens` tokens together, or just above."""
    held = np.cumsum(run.lengths, dtype=np.int64) - np.arange(1, len(run.lengths) + 1)
    return min(int(np.searchsorted(held, tokens)) + 1, len(held))


def build(documents: Sequence[IntArray], digests: Sequence[int] | None = None) -> Run:
    """Index `documents`, oldest first: int32 arrays of tokens >= 0."""
    lengths = np.array([len(document) + 1 for document in documents], np.uint32)
    text = np.zeros(1 + int(lengths.sum()), np.int32)
    at = 1
    for document in documents:
        np.add(document, 1, out=text[at : at + len(document)])
        at += len(document) + 1
    names = np.zeros(len(lengths), np.uint64) if digests is None else np.array(digests, np.uint64)
    return _run(_sort(text, lengths), lengths, names)


def merge(runs: Sequence[Run], skip: int = 0) -> Run:
    """Index the documents of `runs` together, oldest first, the `skip` oldest documents left out.

    Raises:
        ValueError: a run is damaged, and it shows.
    """
    for run in runs:
        _require_sound(run)
    lengths = np.concatenate([run.lengths for run in runs])
    names = np.concatenate([run.digests for run in runs])
    text = np.zeros(1 + int(lengths.astype(np.int64).sum()), np.int32)
    parts, at = [], 0
    for run in runs:
        parts.append((_unpacked(run, text, at), np.asarray(run.lcp)))
        at += len(run.back)
    if skip:
        gone = int(lengths[:skip].astype(np.int64).sum())
        parts = [_without(order, lcp, gone) for order, lcp in parts]
        text, lengths, names = text[gone:], lengths[skip:], names[skip:]
        text[0] = 0
    return _run(_merge_all(text, parts), lengths, names)


def documents(run: Run) -> list[IntArray]:
    """Return the documents of `run`, oldest first.

    Raises:
        ValueError: it is damaged, and it shows.
    """
    _require_sound(run)
    text = np.zeros(1 + len(run.back), np.int32)
    _unpacked(run, text, 0)
    ends = np.cumsum(run.lengths, dtype=np.int64)
    return [text[end - length + 1 : end] - 1 for end, length in zip(ends.tolist(), run.lengths.tolist(), strict=True)]


def _require_sound(run: Run) -> None:
    if not (run.lengths > 0).all() or int(run.lengths.sum(dtype=np.int64)) != len(run.back):
        raise ValueError("the lengths of the documents do not add up to the rows")


def _unpacked(run: Run, text: IntArray, offset: int) -> IntArray:
    """Write the documents of `run` to text[offset + 1:]; return the position of every row."""
    order = np.empty(len(run.back), np.int32)
    if _unpack(run, text, offset, order, np.zeros((3, _LANES), np.int64)):
        raise ValueError("the rows do not lead back through the documents")
    return order


def _sort(text: IntArray, lengths: NDArray[np.uint32]) -> Sorted:
    symbols = int(text.max()) + 1
    parts, first, rows = [], 1, 0
    for i, length in enumerate(lengths):
        rows += int(length)
        if rows >= CHUNK or i + 1 == len(lengths):
            order, lcp = np.empty(rows, np.int32), np.empty(rows, np.uint8)
            sort_contexts(text, first, order, lcp, symbols)
            parts.append((order, lcp))
            first, rows = first + rows, 0
    return _merge_all(text, parts)


def _merge_all(text: IntArray, parts: list[tuple[IntArray, NDArray[np.uint8]]]) -> Sorted:
    """Merge neighbours until one is left; parts stand in the order of the text."""
    parts = [part for part in parts if len(part[0])]
    while len(parts) > 1:
        i = min(range(len(parts) - 1), key=lambda k: len(parts[k][0]) + len(parts[k + 1][0]))
        (order_a, lcp_a), (order_b, lcp_b) = parts[i : i + 2]
        order = np.empty(len(order_a) + len(order_b), np.int32)
        lcp = np.empty(len(order), np.uint8)
        merge_contexts(text, order_a, lcp_a, order_b, lcp_b, order, lcp)
        parts[i : i + 2] = [(order, lcp)]
    order, lcp = parts[0] if parts else (np.empty(0, np.int32), np.empty(0, np.uint8))
    return Sorted(text, order, lcp)


def _run(sorted_: Sorted, lengths: NDArray[np.uint32], digests: NDArray[np.uint64]) -> Run:
    text, order, lcp = sorted_
    symbols = int(text.max()) + 1
    rows = np.empty(len(order) + 1, np.uint32)
    back, low = np.empty(len(order), np.uint32), np.empty(len(order), np.uint16)
    high = np.empty(len(order) if symbols > 1 << 16 else 0, np.uint8)
    starts = np.zeros(symbols + 1, np.uint32)
    _link(text, order, rows, back, low, high, starts)
    ends = rows[np.cumsum(lengths, dtype=np.int64)]
    run = Run(back, low, high, lcp, starts, np.zeros((1, WORDS), np.uint32), ends, lengths, digests)
    return run._replace(listed=_list_frequent(text, order, run))


def _list_frequent(text: IntArray, order: IntArray, run: Run) -> NDArray[np.uint32]:
    """Return an open-addressing table of the frequent contexts of one and of two tokens.

    A record is the newest symbol (0: free), the one before (0: a context of one token), how many rows the context has,
    how many different successors, and of its `LISTED` commonest successors the symbols, then the counts.
    """
    least = FREQUENT
    while True:
        found = _count_frequent(run.lcp, least)
        if found <= len(order) // _SHARE:
            break
        least *= 2
    table = np.zeros((1 << (found * 3 // 2).bit_length(), WORDS), np.uint32)
    symbols = len(run.starts) - 1
    _fill_frequent(text, order, run, least, np.zeros(symbols, np.uint32), np.empty(symbols, np.int32), table)
    return table


@background_kernel
def _link(text, order, rows, back, low, high, starts):  # type: ignore[no-untyped-def]
    """Fill `rows` (the row of every position), and the columns of a run."""
    for row in range(order.shape[0]):
        rows[order[row]] = row
    for row in range(order.shape[0]):
        position = order[row]
        newest, symbol = text[position - 1], text[position]
        back[row] = rows[position - 1] if newest != 0 else 0
        low[row] = symbol & 0xFFFF
        if high.shape[0] > 0:
            high[row] = symbol >> 16
        starts[newest + 1] += 1
    for symbol in range(starts.shape[0] - 1):
        starts[symbol + 1] += starts[symbol]


@background_kernel
def _unpack(run, text, offset, order, lanes):  # type: ignore[no-untyped-def]
    """Write the documents of `run` to text[offset + 1:] and the position of every row to `order`.

    Every document is walked from its end to its beginning. Returns whether a row leads astray: to no row, to one that
    was met before, across a document's end, or has more in common with another than there is before it.

    Args:
        lanes: [3, n] zeros: for n documents at a time the row, its position, and that of the document's first row.
    """
    n, position, taken, walking = run.back.shape[0], offset + 1, 0, 0
    for i in range(n):
        order[i] = 0
    while True:
        for lane in range(lanes.shape[1]):
            if lanes[1, lane] != lanes[2, lane]:
                row, last = np.int64(run.back[lanes[0, lane]]), False
            elif taken < run.ends.shape[0]:
                row, last = np.int64(run.ends[taken]), True
                lanes[2, lane] = position
                position += run.lengths[taken]
                lanes[1, lane] = position
                taken += 1
                walking += 1
            else:
                continue
            if row >= n or position > text.shape[0]:
                return True
            at, symbol = lanes[1, lane] - 1, _symbol(run, row)
            if (symbol == 0) != last:
                return True
            text[at], order[row] = symbol, at
            lanes[0, lane], lanes[1, lane] = row, at
            walking -= at == lanes[2, lane]
        if walking == 0 and taken == run.ends.shape[0]:
            break
    astray = False
    for i in range(n):
        astray |= order[i] == 0 or run.lcp[i] >= order[i]
    return astray


@inner
def _symbol(run, row):  # type: ignore[no-untyped-def]
    symbol = np.int64(run.low[row])
    if run.high.shape[0] > 0:
        symbol |= np.int64(run.high[row]) << 16
    return symbol


def _without(order: IntArray, lcp: NDArray[np.uint8], gone: int) -> tuple[IntArray, NDArray[np.uint8]]:
    """Leave out the positions up to `gone` and move the others down by it."""
    kept = int(np.count_nonzero(order > gone))
    left, shared = np.empty(kept, np.int32), np.empty(kept, np.uint8)
    _leave_out(order, lcp, gone, left, shared)
    return left, shared


@background_kernel
def _leave_out(order, lcp, gone, left, shared):  # type: ignore[no-untyped-def]
    at, least = 0, np.uint8(255)
    for i in range(order.shape[0]):
        least = min(least, lcp[i])
        if order[i] > gone:
            left[at], shared[at] = order[i] - gone, least if at > 0 else np.uint8(0)
            at += 1
            least = np.uint8(255)


@background_kernel
def _count_frequent(lcp, least):  # type: ignore[no-untyped-def]
    """Return how many contexts of one token and of two stand in more than `least` rows."""
    found, n = 0, lcp.shape[0]
    for depth in range(1, 3):
        begin = 0
        for row in range(1, n + 1):
            if row == n or lcp[row] < depth:
                found += row - begin > least
                begin = row
    return found


@background_kernel
def _fill_frequent(text, order, run, least, counts, seen, table):  # type: ignore[no-untyped-def]
    n = order.shape[0]
    for depth in range(1, 3):
        begin = 0
        for row in range(1, n + 1):
            if row == n or run.lcp[row] < depth:
                if row - begin > least:
                    newest = np.int64(text[order[begin] - 1])
                    before = np.int64(text[order[begin] - 2]) if depth == 2 and newest > 0 else np.int64(0)
                    # A context that ends before it is `depth` tokens long is no context of that length.
                    if newest > 0 and (depth == 1 or before > 0):
                        record = table[slot_of_listed(table, newest, before)]
                        record[0], record[1], record[2] = newest, before, row - begin
                        _list_successors(run, begin, row, counts, seen, record)
                begin = row


@inner
def slot_of_listed(table, newest, before):  # type: ignore[no-untyped-def]
    """Return the slot of the context (before, newest), or the free one where it belongs."""
    mask = table.shape[0] - 1
    slot = hash_listed(newest, before) & mask
    while table[slot, 0] != 0 and (table[slot, 0] != newest or table[slot, 1] != before):
        slot = (slot + 1) & mask
    return slot


@inner
def hash_listed(newest, before):  # type: ignore[no-untyped-def]
    state = (np.int64(newest) + (np.int64(before) << 24)) * _MIX
    return (state ^ (state >> 29)) >> 7


@inner
def _list_successors(run, begin, end, counts, seen, record):  # type: ignore[no-untyped-def]
    """Write the commonest successors of the rows begin … end - 1 to `record`, the commonest first."""
    distinct = 0
    for row in range(begin, end):
        symbol = _symbol(run, row)
        if counts[symbol] == 0:
            seen[distinct] = symbol
            distinct += 1
        counts[symbol] += 1
    record[3] = distinct
    for rank in range(min(LISTED, distinct)):
        best = rank
        for i in range(rank, distinct):
            more = counts[seen[i]] > counts[seen[best]]
            if more or (counts[seen[i]] == counts[seen[best]] and seen[i] < seen[best]):
                best = i
        seen[rank], seen[best] = seen[best], seen[rank]
        record[4 + rank], record[4 + LISTED + rank] = seen[rank], counts[seen[rank]]
    for i in range(distinct):
        counts[seen[i]] = 0
