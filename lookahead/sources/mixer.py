"""One chance from all evidence: logistic mixing with online learning, as in context-mixing compressors (Mahoney 2005).

The weights of a successor are a sum of three sets, picked by the longest context that knows it, by its standing with
the alignment and by its rank among the recycled logits. They learn from every verified node whose parent was accepted
and outlive the request.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lookahead.draft import FloatArray
from lookahead.sources.alignment import CELLS
from lookahead.sources.evidence import (
    BLEND,
    BY_PAIR,
    BY_TOKEN,
    COLUMNS,
    COPIED,
    EXACT,
    FAVOURITE,
    FIRST_EDIT,
    FIRST_GUEST,
    GUESTS,
    REGAINED,
)
from lookahead.sources.kernels import inner, inner_sum

_ALIGNMENTS, _RANKS = 24, 4
_SECOND = EXACT.shape[0] + 1
_THIRD = _SECOND + _ALIGNMENTS
_RATE, _SLOWEST = np.float32(0.2), np.float32(5000.0)
_MEMORY = 250.0  # trials after which old ones fade
_WIDEST = np.float32(8.0)  # log-odds


class Weights(NamedTuple):
    """What the mixer has learned."""

    w: FloatArray  # [sets, COLUMNS]
    energy: FloatArray  # [sets, COLUMNS] summed squares of the gradient (Duchi et al. 2011, Adagrad)
    trials: FloatArray  # [CELLS, 2] hits and trials of what the alignment said


def fresh_weights() -> Weights:
    """Return weights that trust the blend of the exact contexts, and where there is none, the other sources."""
    w = np.zeros((_THIRD + _RANKS, COLUMNS), np.float32)
    w[1:_SECOND, BLEND] = 1.0
    w[1:_SECOND, BY_PAIR] = 0.3
    w[0, BLEND] = 0.1
    w[1:_SECOND, FIRST_GUEST : FIRST_GUEST + GUESTS] = 0.5
    w[0, [COPIED, REGAINED, BY_PAIR, *range(FIRST_GUEST, FIRST_GUEST + GUESTS)]] = 1.0
    w[0, BY_TOKEN] = 0.3
    trials = np.tile(np.array([1.0, 2.0], np.float32), (CELLS, 1))
    return Weights(w, np.ones_like(w), trials)


@inner
def choose_sets(evidence, j, alignment):  # type: ignore[no-untyped-def]
    """Return the three sets of weights for successor j; `alignment` is the state of the node's place."""
    row, x, edit, rank = evidence.rows[j], evidence.x[j], 0, 0
    if evidence.absent[FIRST_EDIT] != 0.0:
        edit = 1 if x[FIRST_EDIT] > 0.0 else 2
    if evidence.absent[BY_PAIR] != 0.0 or evidence.absent[BY_TOKEN] != 0.0:
        rank = 1 if row.recycled == 0.0 else 2 if x[FAVOURITE] > 0.0 else 3
    return row.longest, _SECOND + (alignment * 2 + (row.cell > 0)) * 3 + edit, _THIRD + rank


@inner
def chance_of(weights, x, sets):  # type: ignore[no-untyped-def]
    """Return the chance that the evidence `x` gives, strictly between 0 and 1."""
    z = _weigh(weights.w[sets[0]], weights.w[sets[1]], weights.w[sets[2]], x)
    # Far enough out that the error there moves nothing.
    z = _WIDEST if z > _WIDEST else -_WIDEST if z < -_WIDEST else z
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-z))


@inner_sum
def _weigh(first, second, third, x):  # type: ignore[no-untyped-def]
    z = np.float32(0.0)
    for i in range(COLUMNS):
        z += (first[i] + second[i] + third[i]) * x[i]
    return z


@inner
def learn(weights, x, sets, cell, hit):  # type: ignore[no-untyped-def]
    """Move the weights towards what happened to one node."""
    error = np.float32(hit) - chance_of(weights, x, sets)
    for s in sets:
        for i in range(COLUMNS):
            gradient = error * x[i]
            if gradient != 0.0:
                if weights.energy[s, i] < _SLOWEST:
                    weights.energy[s, i] += gradient * gradient
                weights.w[s, i] += _RATE * gradient / np.sqrt(weights.energy[s, i])
    if cell > 0:
        trial = weights.trials[cell]
        if trial[1] > _MEMORY:
            trial[0], trial[1] = trial[0] * 0.5, trial[1] * 0.5
        trial[0] += hit
        trial[1] += 1
