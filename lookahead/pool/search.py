"""Where a context stands in a run, and what followed the contexts that are most like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.pool.index import LISTED, WORDS, Run, hash_listed
from lookahead.pool.sort import DEPTH
from lookahead.sources.kernels import Records, inner, kernel, loader, records

LENGTHS = np.array([1, 2, 4, 8, 16], np.int64)
"""Lengths of the suffixes whose successors are counted, rising."""

ROWS = 32
"""Rows of a run that are looked at for one context: the most similar ones."""

_LEVEL = np.array([np.searchsorted(LENGTHS, length, "right") - 1 for length in range(DEPTH + 1)])

NAMES = 64
"""Successors that are told apart."""

_SLOTS = 4 * NAMES
_NEAR = 16  # rows that are quicker compared one by one


class Heard(NamedTuple):
    """What all runs say of the successors of one context."""

    tokens: IntArray  # [NAMES]
    counts: IntArray  # [NAMES, lengths] rows after a suffix of at least that length
    totals: NDArray[np.int64]  # [lengths] the same for all successors, those without a name included
    used: NDArray[np.int64]  # [2] names in use, tokens of the longest match
    slots: IntArray  # [_SLOTS] open addressing: 1 + the index of a name, 0: free


def empty_heard() -> Heard:
    """Return room for what is said of one context."""
    n = len(LENGTHS)
    counts, totals = np.zeros((NAMES, n), np.int32), np.zeros(n, np.int64)
    return Heard(np.zeros(NAMES, np.int32), counts, totals, np.zeros(2, np.int64), np.zeros(_SLOTS, np.int32))


def views(runs: Sequence[Run]) -> Records:
    """Return where the arrays of `runs` lie in memory, one record a run; keep the runs as long as this is used.

    Kernels read runs through addresses, so that one compiled kernel serves any number of them, mapped from a file or
    not, and none has to be unpacked at each call.
    """
    names = ("back", "low", "high", "lcp", "starts", "listed")
    fields = dict.fromkeys((*names, "rows", "symbols", "wide", "slots"), "i8")
    table = records(len(runs), **fields)
    for record, run in zip(table, runs, strict=True):
        for name in names:
            record[name] = getattr(run, name).ctypes.data
        record["rows"], record["symbols"] = len(run.back), len(run.starts) - 1
        record["wide"], record["slots"] = len(run.high) > 0, len(run.listed)
    return table


_load8, _load16, _load32 = (loader(kind, types.int64) for kind in (types.uint8, types.uint16, types.uint32))


@inner
def symbol_after(run, row):  # type: ignore[no-untyped-def]
    """Return the symbol that followed the context of `row`."""
    symbol = _load16(run.low, row)
    if run.wide != 0:
        symbol |= _load8(run.high, row) << 16
    return symbol


@inner
def follow(run, row, token):  # type: ignore[no-untyped-def]
    """Return before which row a context belongs that goes on with `token` after one that belongs before `row`."""
    symbol = np.int64(token) + 1
    if symbol >= run.symbols:
        return np.int64(run.rows)
    low, high = _bucket(run, symbol)
    # The contexts of a bucket stand in the order of what comes before their newest token.
    while low < high:
        middle = (low + high) >> 1
        if _load32(run.back, middle) < row:
            low = middle + 1
        else:
            high = middle
    return low


@inner
def _bucket(run, symbol):  # type: ignore[no-untyped-def]
    """Return the rows whose newest symbol is `symbol`; within the run even where a file is damaged."""
    low, high = _load32(run.starts, symbol), _load32(run.starts, symbol + 1)
    return min(low, run.rows), min(high, run.rows)


@inner
def matched(run, row, suffix, length):  # type: ignore[no-untyped-def]
    """Return how many tokens the context of `row` has in common with `suffix`, newest first, `length` tokens."""
    n = 0
    while n < length and n < DEPTH and 0 <= row < run.rows:
        symbol = np.int64(suffix[n]) + 1
        if symbol >= run.symbols:
            break
        low, high = _bucket(run, symbol)
        if row < low or row >= high:
            break
        n += 1
        row = _load32(run.back, row)
    return n


@inner
def find_spot(run, row, suffix, length, spot):  # type: ignore[no-untyped-def]
    """Write to `spot` that `suffix` belongs before `row`, and what it has in common with the rows on either side."""
    spot[0], spot[1], spot[2] = row, matched(run, row - 1, suffix, length), matched(run, row, suffix, length)


@inner
def descend(run, above, token, suffix, length, spot):  # type: ignore[no-untyped-def]
    """Write to `spot` where the suffix belongs that goes on with `token` after the one at the spot `above`.

    Args:
        suffix: the longer one, newest first, `length` tokens.
    """
    symbol, row = np.int64(token) + 1, follow(run, above[0], token)
    spot[0], spot[1], spot[2] = row, 0, 0
    if symbol >= run.symbols:
        return
    low, high = _bucket(run, symbol)
    if row > low:
        before = _load32(run.back, row - 1)
        shared, at = above[1], above[0] - 1
        if at - before <= _NEAR:
            while at > before and shared > 0:
                shared = min(shared, _load8(run.lcp, at))
                at -= 1
            spot[1] = min(shared + 1, DEPTH)
        else:
            spot[1] = matched(run, row - 1, suffix, min(length, shared + 1))
    if row < high:
        after = _load32(run.back, row)
        shared, at = above[2], above[0]
        if after - at <= _NEAR:
            while at < after and at + 1 < run.rows and shared > 0:
                at += 1
                shared = min(shared, _load8(run.lcp, at))
            spot[2] = min(shared + 1, DEPTH)
        else:
            spot[2] = matched(run, row, suffix, min(length, shared + 1))


def longest(runs: Records, context: IntArray) -> int:
    """Return how many of the last tokens of `context` stand together in one of `runs`, `DEPTH` at most."""
    return int(_longest(runs, context[-DEPTH:][::-1].astype(np.int64), np.zeros(3, np.int64)))


@kernel
def _longest(runs, suffix, spot):  # type: ignore[no-untyped-def]
    found = 0
    for k in range(runs.shape[0]):
        _locate(runs[k], suffix, spot)
        found = max(found, spot[1], spot[2])
    return found


@inner
def _locate(run, suffix, spot):  # type: ignore[no-untyped-def]
    row, n = np.int64(0), suffix.shape[0]
    for i in range(n):
        row = follow(run, row, suffix[n - 1 - i])
    find_spot(run, row, suffix, n, spot)


def interval(run: Any, context: IntArray, length: int) -> tuple[int, int]:
    """Return the rows (first, last + 1) of one run whose contexts end with the last `length` tokens of `context`."""
    bounds = np.zeros(3, np.int64)
    _interval(run, context[-DEPTH:][::-1].astype(np.int64), length, bounds)
    return int(bounds[0]), int(bounds[1])


@kernel
def _interval(run, suffix, length, bounds):  # type: ignore[no-untyped-def]
    _locate(run, suffix, bounds)
    first, above, below = bounds[0], bounds[1], bounds[2]
    end = first
    while above >= length and first > 0:
        first -= 1
        above = min(above, _load8(run.lcp, first))
    while below >= length and end < run.rows:
        end += 1
        below = min(below, _load8(run.lcp, end)) if end < run.rows else np.int64(0)
    bounds[0], bounds[1] = first, end


@inner
def hush(heard):  # type: ignore[no-untyped-def]
    """Forget what was heard."""
    heard.used[0] = heard.used[1] = 0
    for k in range(heard.totals.shape[0]):
        heard.totals[k] = 0
    for i in range(heard.slots.shape[0]):
        heard.slots[i] = 0


@inner
def name_of(heard, token):  # type: ignore[no-untyped-def]
    """Return the index of the name `token`, a new one if need be; -1 when all are in use."""
    slot = np.int64(token) & (heard.slots.shape[0] - 1)
    while heard.slots[slot] > 0:
        j = np.int64(heard.slots[slot] - 1)
        if heard.tokens[j] == token:
            return j
        slot = (slot + 1) & (heard.slots.shape[0] - 1)
    n = heard.used[0]
    if n == heard.tokens.shape[0]:
        return np.int64(-1)
    heard.tokens[n], heard.slots[slot] = token, n + 1
    for k in range(heard.totals.shape[0]):
        heard.counts[n, k] = 0
    heard.used[0] = n + 1
    return n


@inner
def _add(heard, symbol, count, first, last):  # type: ignore[no-untyped-def]
    """Count `symbol` after the suffixes `first` … `last` of `LENGTHS`."""
    if count == 0:
        return
    for k in range(first, last + 1):
        heard.totals[k] += count
    if symbol == 0:
        return
    j = name_of(heard, symbol - 1)
    if j >= 0:
        for k in range(first, last + 1):
            heard.counts[j, k] += count


@inner
def listen(run, spot, suffix, heard):  # type: ignore[no-untyped-def]
    """Add what `run` says of the successors of `suffix`, which belongs at `spot`.

    The `ROWS` rows are counted whose contexts have most in common with the suffix. Suffixes of one and two tokens that
    are frequent have their commonest successors listed instead, counted over all their rows.
    """
    up, down, above, below = spot[0] - 1, spot[0], spot[1], spot[2]
    longest = max(above, below)
    heard.used[1] = max(heard.used[1], longest)
    if longest == 0:
        return
    slot_1, slot_2 = _listed(run, suffix[0] + 1, 0), np.int64(-1)
    if slot_1 >= 0 and longest > 1:
        slot_2 = _listed(run, suffix[0] + 1, suffix[1] + 1)
    first = 0 if slot_1 < 0 else 1 if slot_2 < 0 else 2
    least, lcp, rows = LENGTHS[first], run.lcp, run.rows
    symbol, k, count = np.int64(-1), np.int64(0), 0
    for _ in range(ROWS):
        shared = max(above, below)
        if shared < least:
            break
        # From both sides in turn where both are equally like the suffix.
        if below > above or (below == above and spot[0] - up > down - spot[0]):
            at = down
            down += 1
            below = min(below, _load8(lcp, down)) if down < rows else np.int64(0)
        else:
            at = up
            above = min(above, _load8(lcp, up)) if up > 0 else np.int64(0)
            up -= 1
        after, level = symbol_after(run, at), _LEVEL[shared]
        if after != symbol or level != k:
            _add(heard, symbol, count, first, k)
            symbol, k, count = after, level, 0
        count += 1
    _add(heard, symbol, count, first, k)
    if slot_1 >= 0:
        _tell(run, slot_1, 0, heard)
    if slot_2 >= 0:
        _tell(run, slot_2, 1, heard)


@inner
def _listed(run, newest, before):  # type: ignore[no-untyped-def]
    """Return the slot of a frequent context, -1 if it is none."""
    mask = run.slots - 1
    slot = hash_listed(newest, before) & mask
    for _ in range(run.slots):
        symbol = _load32(run.listed, slot * WORDS)
        if symbol == 0:
            break
        if symbol == newest and _load32(run.listed, slot * WORDS + 1) == before:
            return np.int64(slot)
        slot = (slot + 1) & mask
    return np.int64(-1)


@inner
def _tell(run, slot, k, heard):  # type: ignore[no-untyped-def]
    """Add the listed successors of a frequent context, which is LENGTHS[k] tokens long."""
    record = slot * WORDS
    # In a damaged file counts may exceed the rows, and symbols what a symbol can be.
    rest = min(_load32(run.listed, record + 2), run.rows)
    for i in range(LISTED):
        count = min(_load32(run.listed, record + 4 + LISTED + i), rest)
        if count == 0:
            break
        _add(heard, _load32(run.listed, record + 4 + i) & 0xFFFFFF, count, k, k)
        rest -= count
    heard.totals[k] += rest
