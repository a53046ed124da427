"""Where in the text the row is copying from, through edits: the same place goes on after a replaced word.

A place is an int64 vector. It follows the text token by token; where the text departs, it waits a few tokens for the
text to come back to the same place or a little further on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lookahead.sources.evidence import COPIED, DIVERTED, REGAINED, deny, log_odds
from lookahead.sources.forced import row_or_closer
from lookahead.sources.kernels import inner

AT = 0  # the token that comes next, if copying goes on; -1: not aligned
RUN = 1  # tokens copied so far, halved at every edit
GAP = 2  # tokens since the text departed, 0: it has not
ANCHOR, ANCHOR_GAP, REJOINED = 3, 4, 5  # AT and GAP before the text came back, until REJOINED tokens confirm it
FIELDS = 6

CELLS = 512
_SKIP = 4  # most tokens of the old text that an edit may leave out
_WAIT = 8  # most tokens that an edit may put in
_CONFIRM = 3
_TRUSTED = 16  # a run so long is not given up for another match while it waits


def lost() -> NDArray[np.int64]:
    """Return a place that is not aligned."""
    return np.array([-1, 0, 0, -1, 0, 0], np.int64)


@inner
def expected(place, tokens, size):  # type: ignore[no-untyped-def]
    """Return the token that comes next if copying goes on, -1 where that is no good guess."""
    if place[AT] < 0 or place[GAP] > 0 or place[RUN] < 4 or place[AT] >= size:
        return np.int64(-1)
    return np.int64(tokens[place[AT]])


@inner
def settled(place):  # type: ignore[no-untyped-def]
    """Return whether the run is so long that no other match is looked for."""
    unsure = place[GAP] > 0 or place[ANCHOR] >= 0
    return place[AT] >= 0 and place[RUN] >= (_TRUSTED if unsure else 8)


@inner
def align(place, at, length):  # type: ignore[no-untyped-def]
    """Continue at `at`, where a suffix of `length` tokens ended, unless a longer run is under way."""
    if place[AT] < 0 or place[GAP] > 0 or length > place[RUN]:
        place[AT], place[RUN], place[GAP], place[ANCHOR] = at, length, 0, -1


@inner
def advance(place, tokens, size, token):  # type: ignore[no-untyped-def]
    """Move on by `token`; `tokens[:size]` is the text that may be copied."""
    if place[AT] < 0:
        return
    if place[GAP] > 0:
        for skip in range(_SKIP + 1):
            if place[AT] + skip < size and tokens[place[AT] + skip] == token:
                place[ANCHOR], place[ANCHOR_GAP], place[REJOINED] = place[AT], place[GAP] + 1, 0
                place[AT], place[RUN], place[GAP] = place[AT] + skip + 1, place[RUN] // 2, 0
                return
        place[GAP] += 1
    elif place[AT] < size and tokens[place[AT]] == token:
        place[AT] += 1
        place[RUN] += 1
        if place[ANCHOR] >= 0:
            place[ANCHOR_GAP] += 1
            place[REJOINED] += 1
            if place[REJOINED] >= _CONFIRM:
                place[ANCHOR] = -1
    elif place[ANCHOR] >= 0:
        place[AT], place[GAP], place[ANCHOR] = place[ANCHOR], place[ANCHOR_GAP] + 1, -1
    else:
        place[GAP] = 1
    if place[GAP] > _WAIT:
        place[AT], place[RUN], place[GAP], place[ANCHOR] = -1, 0, 0, -1


@inner
def ask_alignment(place, tokens, size, trials, evidence):  # type: ignore[no-untyped-def]
    """Add the token that comes next; after an edit, the tokens where the text may come back.

    Args:
        trials: [CELLS, 2] hits and trials of what was said before.
    """
    if place[AT] < 0:
        return
    for skip in range(1 if place[GAP] == 0 else _SKIP + 1):
        if place[AT] + skip >= size:
            break
        j = row_or_closer(evidence, tokens[place[AT] + skip])
        if j < 0 or evidence.rows[j].cell > 0:
            continue
        cell = cell_of(place, skip)
        evidence.rows[j].cell = cell
        odds = log_odds(trials[cell, 0] / trials[cell, 1])
        if place[GAP] == 0:
            deny(evidence, DIVERTED, -odds)
            evidence.x[j, DIVERTED] = 0.0
            evidence.x[j, COPIED] = odds
        else:
            evidence.x[j, REGAINED] = odds


@inner
def cell_of(place, skip):  # type: ignore[no-untyped-def]
    """Return which trials tell how often the text goes on where the place is, `skip` tokens left out."""
    if place[GAP] == 0:
        run = place[RUN] // 2 if place[RUN] < 62 else 31
        return 1 + run + 32 * (place[ANCHOR] >= 0)
    run = place[RUN] // 4 if place[RUN] < 12 else 3
    return 100 + 4 * (8 * place[GAP] + skip) + run


@inner
def state_of(place):  # type: ignore[no-untyped-def]
    """Return 0 not aligned, 1 a short run, 2 a long one, 3 after an edit."""
    if place[AT] < 0:
        return 0
    if place[GAP] > 0:
        return 3
    return 1 if place[RUN] < _TRUSTED else 2
