"""The grammar as a source: it names what may follow where that is little, and so chains what is forced.

Inside of a string or a number nearly everything may follow; there it names what would close it, and lets the other
sources' word for another closing token, which may not follow here, count for that.
"""

from __future__ import annotations

import numpy as np

from lookahead.sources.evidence import COVERED, NAMED, log_odds, row_of
from lookahead.sources.guide import ALLOWED, CLOSERS, FEW, FORCED, MAXIMAL, closes, limited, permits, place_of
from lookahead.sources.kernels import inner

_NAMED = 16  # more of them are not worth a row each


@inner
def is_forced(guide):  # type: ignore[no-untyped-def]
    """Return whether one token only may follow, and the text may not end."""
    return limited(guide) and guide.now[FORCED] != 0


@inner
def name_closers(evidence):  # type: ignore[no-untyped-def]
    """Give the first rows to the tokens that close what was begun."""
    guide = evidence.guide
    if not limited(guide):
        return
    odds = log_odds(np.float32(1.0) / np.float32(1 + guide.now[CLOSERS]))
    for i in range(guide.now[CLOSERS]):
        j = row_of(evidence, guide.closers[i])
        evidence.rows[j].named = 2
        evidence.x[j, NAMED] = odds


@inner
def row_or_closer(evidence, token):  # type: ignore[no-untyped-def]
    """Return `row_of`, or the row of the only closer where `token` would close and may not."""
    j, guide = row_of(evidence, token), evidence.guide
    if j < 0 and limited(guide) and guide.now[CLOSERS] == 1 and not permits(guide, token) and closes(guide, token):
        return np.int64(0)
    return j


@inner
def name_few(evidence):  # type: ignore[no-untyped-def]
    """Name the maximal ones of a few allowed tokens, and tell of all named ones whether they are maximal."""
    guide = evidence.guide
    allowed, maximal = guide.now[ALLOWED], guide.now[MAXIMAL]
    if not limited(guide) or allowed > FEW:
        return
    odds = log_odds(np.float32(1.0) / np.float32(maximal)) if maximal > 1 else np.float32(2.0)
    if maximal <= _NAMED:
        for i in range(allowed):
            if not guide.covered[i]:
                j = row_of(evidence, guide.few[i])
                if j >= 0:
                    evidence.rows[j].named = max(evidence.rows[j].named, 1)
                    evidence.x[j, NAMED] = odds
    for j in range(evidence.size[0]):
        if guide.covered[place_of(guide, allowed, np.int64(evidence.rows[j].token))]:
            evidence.x[j, COVERED] = np.float32(1.0)
