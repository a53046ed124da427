"""One chance from all evidence: logistic mixing with online learning, as in context-mixing compressors (Mahoney 2005).

The weights of a successor are a sum of seven sets, picked by the longest context that knows it, by its standing with
the alignment, by its rank among the recycled logits and by the n-gram of the window that names it, by the longest
suffix in the pools that knows it, by what the grammar allows beside it, by the token before it and by the token itself.
They learn at every accepted node from what followed it, from all successors that were considered there, and outlive the
request. They start from what they learnt of other text beforehand.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lookahead.draft import FloatArray
from lookahead.pool.search import LENGTHS
from lookahead.sources.alignment import CELLS
from lookahead.sources.evidence import (
    BLEND,
    BY_PAIR,
    BY_TOKEN,
    BY_WINDOW,
    COLUMNS,
    COPIED,
    COVERED,
    ECHO,
    EXACT,
    FAVOURITE,
    FIRST_EDIT,
    FIRST_GUEST,
    FROM_OUTPUT,
    FROM_PROMPT,
    FROM_SCHEMA,
    GUESTS,
    NAMED,
    ORDER,
    POOL_BLEND,
    REGAINED,
)
from lookahead.sources.guide import BUCKETS, bucket
from lookahead.sources.kernels import inner, inner_sum
from lookahead.sources.online import adapt_all, logistic
from lookahead.sources.race import untrained_race

SETS = 7
"""Sets of weights that are added up for one successor."""

_ALIGNMENTS, _RANKS, _POOLED, _TOKENS = 24, 3 * 4, 3 * (LENGTHS.shape[0] + 1), 1 << 12
_SECOND = EXACT.shape[0] + 1
_THIRD = _SECOND + _ALIGNMENTS
_FOURTH = _THIRD + _RANKS
_FIFTH = _FOURTH + _POOLED
_SIXTH = _FIFTH + 3 * BUCKETS
_SEVENTH = _SIXTH + _TOKENS
_RATE = np.float32(0.05)
_MEMORY = 250.0  # trials after which old ones fade


LAYOUT = 3
"""Of what is saved; another number for another meaning of sets or columns."""

SHIPPED = _SIXTH
"""So many sets, the first ones, say nothing of tokens: what they learn from some text holds for any other."""

_HEADER = b"mixer %d\n" % LAYOUT
_START = Path(__file__).with_name("weights.npz")


class Weights(NamedTuple):
    """What the mixer has learned."""

    w: FloatArray  # [sets, COLUMNS]
    energy: FloatArray  # [sets, COLUMNS] summed squares of the gradient (Duchi et al. 2011, Adagrad)
    trials: FloatArray  # [CELLS, 2] hits and trials of what the alignment said
    race: FloatArray  # [SETS of the race, RACE], see `lookahead.sources.race`
    race_energy: FloatArray  # likewise


def fresh_weights() -> Weights:
    """Return the weights that a grower starts from: learnt beforehand (`examples/train_weights.py`), none by token."""
    weights, start = untrained_weights(), _start()
    if start is not None:
        for array, learnt in zip(weights, start, strict=True):
            array[: len(learnt)] = learnt
    return weights


@cache
def _start() -> Weights | None:
    """Read what was learnt beforehand; None where it is of another layout, as it is until it is learnt again."""
    with np.load(_START) as file:
        arrays = [file[name] for name in Weights._fields if name in file]
        if len(arrays) < len(Weights._fields):
            return None
        start = Weights(*arrays)
        fits = int(file["layout"]) == LAYOUT and start.w.shape == (SHIPPED, COLUMNS) and len(start.trials) == CELLS
    return start if fits else None


def untrained_weights() -> Weights:
    """Return weights that trust the blend of the exact contexts, and where there is none, the other sources."""
    w = np.zeros((_SEVENTH + _TOKENS, COLUMNS), np.float32)
    w[1:_SECOND, BLEND] = 1.0
    w[1:_SECOND, POOL_BLEND] = 0.2
    w[1:_SECOND, BY_PAIR] = 0.3
    w[0, BLEND] = 0.1
    w[1:_SECOND, FIRST_GUEST : FIRST_GUEST + GUESTS] = 0.5
    w[0, [COPIED, REGAINED, BY_PAIR, *range(FIRST_GUEST, FIRST_GUEST + GUESTS)]] = 1.0
    w[0, POOL_BLEND] = 0.9
    w[0, BY_TOKEN] = 0.3
    w[0, BY_WINDOW] = 0.9
    w[_FIFTH:_SIXTH, [NAMED, COVERED, ORDER, ECHO]] = 1.0, -2.0, 0.5, 0.5
    w[_FIFTH:_SIXTH, [FROM_PROMPT, FROM_SCHEMA, FROM_OUTPUT]] = 1.5, 1.0, 1.0
    trials = np.tile(np.array([1.0, 2.0], np.float32), (CELLS, 1))
    race = untrained_race()
    return Weights(w, np.ones_like(w), trials, race, np.ones_like(race))


def save(weights: Weights) -> bytes:
    """Return what `restore` reads."""
    return _HEADER + b"".join(array.astype("<f4").tobytes() for array in weights)


def restore(weights: Weights, saved: bytes) -> bool:
    """Set `weights` to saved ones; return False and leave them if another version of this file saved those."""
    if not saved.startswith(_HEADER) or len(saved) != len(_HEADER) + sum(array.nbytes for array in weights):
        return False
    at = len(_HEADER)
    for array in weights:
        array[:] = np.frombuffer(saved, "<f4", array.size, at).reshape(array.shape)
        at += array.nbytes
    return True


@inner
def choose_sets(evidence, j, alignment, before, sets):  # type: ignore[no-untyped-def]
    """Write to `sets` which weights successor j uses.

    Args:
        alignment: the state of the node's place.
        before: the node's token.
    """
    row, x, edit, rank = evidence.rows[j], evidence.x[j], 0, 0
    if evidence.absent[FIRST_EDIT] != 0.0:
        edit = 1 if x[FIRST_EDIT] > 0.0 else 2
    if evidence.absent[BY_PAIR] != 0.0 or evidence.absent[BY_TOKEN] != 0.0:
        rank = 1 if row.recycled == 0.0 else 2 if x[FAVOURITE] > 0.0 else 3
    shorter = 0 if row.longest == 0 else 1 if row.longest <= row.pooled else 2
    sets[0] = row.longest
    sets[1] = _SECOND + (alignment * 2 + (row.cell > 0)) * 3 + edit
    sets[2] = _THIRD + 3 * rank + (0 if row.window == 0 else 1 if row.window < 3 else 2)
    sets[3] = _FOURTH + row.pooled * 3 + shorter
    sets[4] = _FIFTH + 3 * bucket(evidence.guide) + (1 if x[COVERED] > 0.0 else 2 if row.named == 2 else 0)
    sets[5] = _SIXTH + (before & (_TOKENS - 1))
    sets[6] = _SEVENTH + (row.token & (_TOKENS - 1))


@inner
def chance_of(weights, x, sets):  # type: ignore[no-untyped-def]
    """Return the chance that the evidence `x` gives, strictly between 0 and 1."""
    w = weights.w
    return logistic(_weigh(w[sets[0]], w[sets[1]], w[sets[2]], w[sets[3]], w[sets[4]], w[sets[5]], w[sets[6]], x))


@inner_sum
def _weigh(a, b, c, d, e, f, g, x):  # type: ignore[no-untyped-def]
    z = np.float32(0.0)
    for i in range(COLUMNS):
        z += (a[i] + b[i] + c[i] + d[i] + e[i] + f[i] + g[i]) * x[i]
    return z


@inner
def learn(weights, x, sets, cell, hit):  # type: ignore[no-untyped-def]
    """Move the weights towards what happened to one node."""
    error = np.float32(hit) - chance_of(weights, x, sets)
    for k in range(SETS):
        adapt_all(weights.w[sets[k]], weights.energy[sets[k]], error, x, _RATE)
    if cell > 0:
        learn_trial(weights, cell, hit)


@inner
def learn_trial(weights, cell, hit):  # type: ignore[no-untyped-def]
    """Count one more trial of what the alignment says."""
    trial = weights.trials[cell]
    if trial[1] > _MEMORY:
        trial[0], trial[1] = trial[0] * 0.5, trial[1] * 0.5
    trial[0] += hit
    trial[1] += 1
