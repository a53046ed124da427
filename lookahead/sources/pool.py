"""The pools as a source: what followed the longest suffixes of the context in text of other requests.

Successors of suffixes of several lengths are counted together and blended as PPM does (Cleary and Witten 1984): each
length takes its share of the weight that the longer ones left. The mixer gets the counts of every length beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import FloatArray, IntArray
from lookahead.pool.search import LENGTHS, Heard, descend, empty_heard, find_spot, follow, hush, listen, name_of, views
from lookahead.pool.sort import DEPTH
from lookahead.sources.evidence import (
    FIRST_POOL,
    POOL_BLEND,
    POOL_COUNT,
    POOL_ONLY,
    POOL_RIVALS,
    clip,
    deny,
    log_count,
    log_odds,
    row_of,
)
from lookahead.sources.guide import CLOSERS, closes, limited, permits
from lookahead.sources.kernels import Records, inner

_NONE = np.zeros(0, np.int32)
_LEAST = np.float32(0.001)  # a chance that is not worth a row


class Pooled(NamedTuple):
    """The runs of all pools, and where a row's context and the nodes of its tree stand in them."""

    runs: Records  # [R] see `views`
    before: NDArray[np.int64]  # [R] the row before which the context belongs
    spots: NDArray[np.int64]  # [N, R, 3] of every node, see `find_spot`
    heard: Heard
    distinct: IntArray  # [lengths] different successors after a suffix
    share: FloatArray  # [lengths] what one of its counts adds to the blend


def pooled(runs: Records, nodes: int) -> Pooled:
    """Return room to ask `runs` about a tree of `nodes` nodes, the root included."""
    n = len(LENGTHS)
    return Pooled(
        runs=runs,
        before=np.zeros(len(runs), np.int64),
        spots=np.zeros((nodes, len(runs), 3), np.int64),
        heard=empty_heard(),
        distinct=np.zeros(n, np.int32),
        share=np.zeros(n, np.float32),
    )


def no_pool() -> Pooled:
    """Return what a grower without pools asks."""
    return pooled(views(()), 0)


class Reader:
    """Tells what of a context the pools have not read yet."""

    def __init__(self) -> None:
        self._seen, self._last = 0, _NONE

    def fresh(self, context: IntArray, pooled: Pooled) -> IntArray:
        """Return the tokens of `context` to read on with.

        Where it does not extend the last one, reading starts again, at the last tokens: none before them count.
        """
        if len(pooled.runs) == 0:
            return _NONE
        seen, last = self._seen, self._last
        if seen == 0 or len(context) < seen or context[seen - len(last) : seen].tobytes() != last.tobytes():
            pooled.before[:] = 0
            seen = max(0, len(context) - DEPTH)
        self._seen, self._last = len(context), np.array(context[-DEPTH:], np.int32)
        return np.array(context[seen:], np.int32)


@inner
def read_on(pooled, new):  # type: ignore[no-untyped-def]
    """Go on with the tokens `new` of the context."""
    for k in range(pooled.runs.shape[0]):
        row = pooled.before[k]
        for i in range(new.shape[0]):
            row = follow(pooled.runs[k], row, new[i])
        pooled.before[k] = row


@inner
def ask_pool(pooled, tree, node, suffix, length, evidence):  # type: ignore[no-untyped-def]
    """Find where `node` stands in every run, and add what they say of its successors."""
    heard = pooled.heard
    length = min(length, DEPTH)
    hush(heard)
    # The youngest first: where there are more successors than names, theirs are kept.
    for i in range(pooled.runs.shape[0]):
        k = pooled.runs.shape[0] - 1 - i
        run, spot = pooled.runs[k], pooled.spots[node, k]
        if node == 0:
            find_spot(run, pooled.before[k], suffix, length, spot)
        else:
            descend(run, pooled.spots[tree.nodes[node].parent, k], suffix[0], suffix, length, spot)
        listen(run, spot, suffix, heard)
    if heard.used[1] > 0:
        if limited(evidence.guide):
            _limit(heard, evidence.guide)
        _blend(pooled, evidence)
        for name in range(heard.used[0]):
            _tell(pooled, name, evidence)


@inner
def _limit(heard, guide):  # type: ignore[no-untyped-def]
    """Forget what may not follow; what would close counts for what may."""
    closers = guide.now[CLOSERS]
    for name in range(heard.used[0]):
        token = heard.tokens[name]
        if permits(guide, token):
            continue
        moves = closes(guide, token)
        for k in range(LENGTHS.shape[0]):
            count = heard.counts[name, k]
            heard.totals[k] -= count
            heard.counts[name, k] = 0
            for i in range(closers if moves and count > 0 else 0):
                other = name_of(heard, guide.closers[i])
                if other >= 0:
                    heard.counts[other, k] += (count + closers - 1) // closers
                    heard.totals[k] += (count + closers - 1) // closers


@inner
def _blend(pooled, evidence):  # type: ignore[no-untyped-def]
    """Divide the weight between the lengths."""
    heard, rest = pooled.heard, np.float32(1.0)
    deny(evidence, POOL_BLEND, log_odds(np.float32(0.0)))
    for i in range(LENGTHS.shape[0]):
        k = LENGTHS.shape[0] - 1 - i
        total, distinct = heard.totals[k], 0
        for name in range(heard.used[0]):
            distinct += heard.counts[name, k] > 0
        pooled.distinct[k], pooled.share[k] = distinct, 0.0
        if total > 0:
            escape = np.float32(0.5 * distinct / (total + 0.5 * distinct))
            deny(evidence, FIRST_POOL + k, clip(log_count(0) - log_count(total)))
            pooled.share[k] = rest * (np.float32(1.0) - escape) / np.float32(total)
            rest *= escape


@inner
def _tell(pooled, name, evidence):  # type: ignore[no-untyped-def]
    """Add one successor."""
    heard, chance, longest = pooled.heard, np.float32(0.0), 0
    for k in range(LENGTHS.shape[0]):
        chance += pooled.share[k] * np.float32(heard.counts[name, k])
    j = row_of(evidence, heard.tokens[name]) if chance >= _LEAST else np.int64(-1)
    if j < 0:
        return
    row, x = evidence.rows[j], evidence.x[j]
    for k in range(LENGTHS.shape[0]):
        count = heard.counts[name, k]
        if count > 0:
            x[FIRST_POOL + k] = clip(log_count(count) - log_count(heard.totals[k] - count))
            longest = k
    row.pooled, row.pool_blend = longest + 1, chance
    x[POOL_BLEND] = log_odds(chance)
    x[POOL_ONLY] = pooled.distinct[longest] == 1
    x[POOL_COUNT], x[POOL_RIVALS] = log_count(heard.counts[name, longest]), log_count(pooled.distinct[longest])
