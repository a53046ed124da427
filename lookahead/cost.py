"""What a pass costs: seconds as a function of nodes, context and grammar work, learnt from the passes themselves.

The curve is a sum of ramps between knots, plus terms in context and grammar masks, all with coefficients of zero or
more: so it rises with everything, in straight pieces. It is fitted by least squares of relative errors (with the active
set of Lawson and Hanson 1974) to the faster half of the last passes of each size, since what disturbs a pass slows it
down. Beyond the largest pass so far it rises by the geometric mean of its last slope and the one that is assumed: a
jump where the machine takes another way to multiply says little of what lies behind it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
from numba import njit
from numpy.typing import NDArray

KNOTS = np.array((1, 2, 3, 5, 8, 12, 17, 25, 33, 49, 65, 97, 129, 257, 513, 1025, 2049, 4097), np.float64)
"""Nodes of a tree, root included, between which seconds rise in a straight line."""

_SIZES = KNOTS.tolist()
_RAMPS = len(KNOTS) - 1
_CONTEXT, _SQUARE, _MASKS = _RAMPS + 1, _RAMPS + 2, _RAMPS + 3  # columns; column 0 is the base
_COLUMNS = _RAMPS + 4
_LENGTHS, _KEPT = 8, 8  # classes of context length, and passes kept of each class and knot
_LONG, _WIDE = 1024.0, 32.0  # units of context and of nodes where they are multiplied
_ENOUGH, _STALE = 6, 1024  # passes of a size that are enough, and after which they are old
_OFTEN, _EVERY = 32, 2  # passes of a size after which but one of so many is looked at
_RARELY = 64  # passes after which it is fitted anew at the latest
_SINCE, _SLOWER = 32, 1.3  # passes that are later, and how much slower even the fastest of them is
_ALONE = 0.1  # weight of a pass that is the only one of its size
_CHANGE = 0.1  # weight of "the slope goes on", in passes
_PRIOR = 0.3  # weight of the assumed slope beside that
_AGAINST = 0.02  # weight against a context that costs anything
_ANCHOR = 64  # passes after which a pass over one node is old: all others are judged by it

Seconds = NDArray[np.float64]

Costs = Callable[[Seconds], Seconds]
"""Seconds of passes over so many nodes, [N]."""

_SLOPES, _SLOPE_ELSEWHERE = {"cpu": 0.02}, 0.002


def assumed_slope(device: str) -> float:
    """Return what one more node is assumed to cost on a type of device, as a part of a pass over one."""
    return _SLOPES.get(device, _SLOPE_ELSEWHERE)


class CostCurve:
    """Seconds of a pass for one batch size.

    Args:
        slope: what one more node in every row is assumed to cost before anything is known, as a part of a pass over
            one.
        known: seconds by nodes (root included) at no context, from another curve or an earlier process; trusted as one
            pass each.
        measured: whether `known` was measured on this very machine, so that nothing needs to be found out.

    Attributes:
        passes: that were taken in.
    """

    def __init__(self, *, slope: float = 0.02, known: Costs | None = None, measured: bool = False) -> None:
        if not (math.isfinite(slope) and slope >= 0):
            raise ValueError(f"slope={slope}; give a part of a pass, 0 or more")
        self.passes = self._largest = 0
        self._measured = measured
        self._slope, self._known = slope, None if known is None else known(KNOTS)
        shape = (len(KNOTS) * _LENGTHS, _KEPT)
        self._kinds = np.zeros((*shape, 3))  # nodes, context, masks
        self._times = np.zeros(shape)  # 0: none
        self._next, self._seen = [0] * shape[0], np.zeros(shape[0], np.int64)  # the next slot; the latest pass
        self._counts, self._last = [0] * len(KNOTS), [0] * len(KNOTS)  # passes of each size, and the latest of them
        self._fit = _assumed(slope)
        self._fitted, self._due = 0, 1  # passes that were looked at, and when all is fitted anew
        if self._known is not None:
            self._refit()

    def add(self, nodes: int, seconds: float, *, context: int = 0, masks: int = 0) -> None:
        """Take in a pass over trees of `nodes` nodes behind `context` tokens, in which `masks` masks were computed."""
        if not (seconds > 0 and math.isfinite(seconds)):
            return
        knot = _knot(nodes)
        self.passes += 1
        self._largest = max(self._largest, nodes)
        self._counts[knot] += 1
        self._last[knot] = self.passes
        if self._counts[knot] > _OFTEN and self._counts[knot] % _EVERY:
            return
        at = knot * _LENGTHS + _length(context)
        slot = self._next[at] % _KEPT
        self._kinds[at, slot], self._times[at, slot] = (nodes, context, masks), seconds
        self._next[at] += 1
        self._seen[at] = self.passes
        self._fitted += 1

    def seconds(self, nodes: NDArray[np.int64] | Seconds, *, context: int = 0, masks: int = 0) -> Seconds:
        """Return the expected seconds of passes over `nodes` ([N]) nodes.

        Before anything is known, in units of a pass over one node.
        """
        if self._fitted >= self._due:
            self._refit()
            self._due = self._fitted + min(max(self._fitted // 4, 1), _RARELY)
        found: Seconds = np.empty(len(nodes))
        _price(np.asarray(nodes, np.float64), float(context), float(masks), self._fit, KNOTS, found)
        return found

    def hoped(self, nodes: int) -> float:
        """Return what a pass over `nodes` nodes may cost at best, for sizes of which little is known."""
        one, found = (float(value) for value in self.seconds(np.array([1.0, float(nodes)])))
        if nodes == 1:
            seen = next((size for size, count in zip(_SIZES, self._counts, strict=True) if count), 1.0)
            return min(found, float(self.seconds(np.array([seen]))[0]) / seen)
        return min(one * (1.0 + self._slope * (nodes - 1)), found)

    def unknown(self, most: int) -> list[int]:
        """Return the knots up to `most` of whose size too few passes were taken in, or none for long."""
        few = [count < _ENOUGH and not self._measured for count in self._counts]
        found = [int(size) for size in KNOTS[few] if size <= most]
        if self.passes - self._last[0] > _ANCHOR and self.passes > _ANCHOR and 1 not in found:
            found.insert(0, 1)
        if self.passes > _STALE:
            old = [self.passes - last > _STALE for last in self._last]
            found += [int(size) for size in KNOTS[old] if size <= most]
        return found

    def _refit(self) -> None:
        used = np.flatnonzero(self._times[:, 0] > 0)
        least = np.where(self._times[used] > 0, self._times[used], np.inf).min(1)
        used = used[~_outdated(used // _LENGTHS, used % _LENGTHS, self._seen[used], least)]
        columns = _columns(*np.moveaxis(self._kinds[used], -1, 0))
        kept, trust = _believed(self._times[used] / np.maximum(columns @ self._fit, 1e-300))
        rows, times = columns[kept], self._times[used][kept]
        if self._known is not None:
            rows = np.concatenate([rows, _columns(KNOTS, 0, 0)])
            times = np.concatenate([times, self._known])
            trust = np.concatenate([trust, 1.0 / (1.0 + np.array(self._counts))])
        if len(times):
            self._fit = _fit(rows, times, trust, self._slope, self._fit)
        if len(times) and self._known is None:
            self._hope_beyond()

    def _hope_beyond(self) -> None:
        """Let the curve rise less steeply than at its end where it has not been, if that is steeper than assumed."""
        beyond, width = np.flatnonzero(KNOTS[:-1] >= self._largest), np.diff(KNOTS)
        assumed = self._slope * self._fit[0] * width[beyond]
        ramps = self._fit[beyond + 1]
        self._fit[beyond + 1] = np.where(ramps > assumed, np.sqrt(ramps * assumed), ramps)


def knot_of(nodes: int) -> int:
    """Return the knot that passes over `nodes` nodes are counted under."""
    return int(KNOTS[_knot(nodes)])


def _knot(nodes: int) -> int:
    return bisect_right(_SIZES, nodes) - 1


def _length(context: int) -> int:
    return min(max(int(context) // 64, 1).bit_length() - 1, _LENGTHS - 1)


@njit(cache=True)
def _price(nodes, context, masks, fit, knots, out):  # type: ignore[no-untyped-def]
    """Fill `out` with what `_columns(nodes, context, masks) @ fit` is."""
    whole = fit.sum()
    for n in range(len(nodes)):
        total = fit[0] + context / _LONG * (fit[_CONTEXT] + nodes[n] / _WIDE * fit[_SQUARE]) + masks * fit[_MASKS]
        for ramp in range(_RAMPS):
            if nodes[n] >= knots[ramp + 1]:
                total += fit[ramp + 1]
            else:
                part = (nodes[n] - knots[ramp]) / (knots[ramp + 1] - knots[ramp])
                total += max(part, 0.0) * fit[ramp + 1]
                break
        out[n] = max(total, 1e-9 * whole)  # masks may have explained all there was


def _assumed(slope: float) -> Seconds:
    """Return the coefficients of a curve that rises by `slope` a node from 1."""
    return np.concatenate([[1.0], slope * np.diff(KNOTS), np.zeros(_COLUMNS - 1 - _RAMPS)])


def _columns(nodes: Seconds, context: Seconds | int, masks: Seconds | int) -> Seconds:
    """Return [*N, COLUMNS]: what the coefficients are multiplied by."""
    out = np.empty((*nodes.shape, _COLUMNS))
    out[..., 0] = 1.0
    out[..., 1 : _RAMPS + 1] = np.clip((nodes[..., None] - KNOTS[:-1]) / np.diff(KNOTS), 0.0, 1.0)
    out[..., _CONTEXT] = context / _LONG
    out[..., _SQUARE] = context / _LONG * nodes / _WIDE
    out[..., _MASKS] = masks
    return out


def _outdated(
    knots: NDArray[np.int64], lengths: NDArray[np.int64], seen: NDArray[np.int64], least: Seconds
) -> NDArray[np.bool_]:
    """Return which classes of passes tell of another machine: smaller passes behind less have since taken far longer.

    A curve that rises cannot follow both, and relative errors would have it follow the fast ones.
    """
    smaller = (knots[:, None] > knots) & (lengths[:, None] >= lengths)
    slower = (seen > seen[:, None] + _SINCE) & (least > _SLOWER * least[:, None])
    return np.asarray((smaller & slower).any(1))


def _believed(times: Seconds) -> tuple[NDArray[np.bool_], Seconds]:
    """Return which of the passes of each class are taken for usual, and their weights.

    The faster half of them: what disturbs a pass only ever slows it down, most of all the first one of its size. Where
    there is only one, it counts little.
    """
    there = times > 0.0
    count = there.sum(1)
    rank = np.argsort(np.argsort(np.where(there, times, np.inf), axis=1), axis=1)
    kept = there & (rank < np.maximum((count + 1) // 2, 1)[:, None])
    weight = np.where(count == 1, _ALONE, 1.0)[:, None] * np.ones(times.shape)
    return kept, weight[kept]


def _beside() -> Seconds:
    """Return [COLUMNS, COLUMNS], the part of the normal equations that knows no passes: that the slope goes on."""
    width = np.diff(KNOTS)
    gram = 1e-7 * np.diag(np.concatenate([[1.0], 1.0 / width**2, np.ones(_COLUMNS - 1 - _RAMPS)]))
    gram[_CONTEXT, _CONTEXT] = gram[_SQUARE, _SQUARE] = _AGAINST  # nodes explain rather than context
    for ramp in range(1, _RAMPS):
        row = np.zeros(_COLUMNS)
        row[ramp + 1], row[ramp] = width[ramp - 1] / width[ramp], -1.0
        gram += _CHANGE**2 * np.outer(row, row)
    gram[1, 1] += (_PRIOR * _CHANGE) ** 2
    return gram


_BESIDE = _beside()


def _fit(rows: Seconds, times: Seconds, trust: Seconds, slope: float, before: Seconds) -> Seconds:
    """Return coefficients of 0 or more: relative least squares, and "the slope goes on" beside them.

    Args:
        trust: weights of the passes.
        slope: of the first ramp before anything is known, as a part of a pass.
        before: what was found last, from which the search begins.
    """
    scale = float(np.median(times))
    relative = rows * (scale / times)[:, None]
    weighted = relative * trust[:, None]
    gram, right = weighted.T @ relative + _BESIDE, weighted.sum(0)
    right[1] += (_PRIOR * _CHANGE) ** 2 * slope
    unit = np.sqrt(np.diag(gram))
    fit = _positive(gram / np.outer(unit, unit), right / unit, before / scale * unit) / unit
    # A row costs no more than a pass of its own: where only large passes are known, that says how dear a small one is.
    values = np.cumsum(fit[: _RAMPS + 1])
    seen = int(np.flatnonzero(rows[:, : _RAMPS + 1].any(0))[-1]) + 1
    values = np.maximum(values, float((values[:seen] / KNOTS[:seen]).max()))
    fit[0], fit[1 : _RAMPS + 1] = values[0], np.diff(values)
    return fit * scale


def _positive(gram: Seconds, right: Seconds, start: Seconds) -> Seconds:
    """Return the x >= 0 that minimises x'Gx / 2 - r'x (Lawson and Hanson 1974, chapter 23), found from any x >= 0."""
    free = start > 1e-14
    x = _inside(gram, right, np.where(free, start, 0.0), free)
    pull, least = right - gram @ x, 1e-10 * max(1.0, float(np.abs(right).max()))
    for _ in range(3 * len(right)):
        if free.all() or pull[~free].max() <= least:
            break
        free[np.argmax(np.where(free, -np.inf, pull))] = True
        x = _inside(gram, right, x, free)
        pull = right - gram @ x
    return x


def _inside(gram: Seconds, right: Seconds, x: Seconds, free: NDArray[np.bool_]) -> Seconds:
    """Return the best x of those whose only entries above 0 are `free`; those that would fall below 0 stop being so."""
    while free.any():
        new = np.zeros(len(x))
        new[free] = _solved(gram[np.ix_(free, free)], right[free])
        below = free & (new <= 0.0)
        if not below.any():
            return new
        part = float((x[below] / np.maximum(x[below] - new[below], 1e-300)).min())
        x = x + part * (new - x)
        free &= x > 1e-14
        x[~free] = 0.0
    return np.zeros(len(x))


def _solved(gram: Seconds, right: Seconds) -> Seconds:
    try:
        return np.asarray(np.linalg.solve(gram, right), np.float64)
    except np.linalg.LinAlgError:  # times that are many decades apart
        return np.asarray(np.linalg.lstsq(gram, right, rcond=None)[0], np.float64)
