"""Chances of tokens that are drawn, where the noise that draws them is known.

The token that is drawn is that with the largest p / q. From an estimate of p and the known q follows who would win the
race; how far to trust the estimate is learnt online, by a small mixer of its own behind the first.
"""

from __future__ import annotations

import numpy as np

from lookahead.draft import FloatArray
from lookahead.sources.evidence import RACE, log_odds, row_of
from lookahead.sources.kernels import inner, inner_sum
from lookahead.sources.noise import DOUBT, FIRST, SHOWN
from lookahead.sources.online import adapt, logistic

BIAS, GIVEN, MARGIN, ALONE, UNSEEN = range(RACE)
PLACES, LEVELS, DOUBTS, CERTAINTIES = 4, 8, 3, 4
SETS = (2 * PLACES + LEVELS * CERTAINTIES) * DOUBTS
"""Sets of weights: by the place in the race, for tokens that sources name and for others; and by the chance before the
race, and how certain the model was when it last saw what comes before; all of them by the model's doubts of late."""

_RATE = np.float32(0.05)
_LEAST = np.float32(0.02)  # of the chance is left for tokens that nobody names
_FAR, _NEVER, _TINY = np.float32(6.0), np.float32(80.0), np.float32(1e-12)


def untrained_race() -> FloatArray:
    """Return weights that mostly keep to the estimates."""
    weights = np.zeros((SETS, RACE), np.float32)
    weights[: 2 * PLACES * DOUBTS, [MARGIN, ALONE, UNSEEN]] = 0.6, 0.5, 1.0
    weights[2 * PLACES * DOUBTS :, GIVEN] = 4.0
    return weights


@inner
def known_ahead(noise, depth):  # type: ignore[no-untyped-def]
    """Return where the noise is of what follows a node of `depth`; -1: it is not known."""
    if depth >= noise.state[SHOWN]:
        return np.int64(-1)
    return (noise.state[FIRST] + depth) % noise.blocks.shape[0]


@inner
def ask_usual(noise, at, evidence):  # type: ignore[no-untyped-def]
    """Name the tokens that the noise favours; return how many rows were named before."""
    named = evidence.size[0]
    for i in range(noise.tokens.shape[1]):
        j = row_of(evidence, np.int64(noise.tokens[at, i]))
        if j >= named:
            evidence.rows[j].usual = noise.chances[at, i]
    return named


@inner
def run_race(weights, noise, at, named, evidence):  # type: ignore[no-untyped-def]
    """Replace the weights of all successors by their chances of being drawn.

    Args:
        named: rows whose weights are estimates; the others get a share of what these leave.
    """
    rows, size, left = evidence.rows, evidence.size[0], _share(evidence, named)
    best, second = -_NEVER, -_NEVER
    for j in range(size):
        score = -_NEVER
        if 0 <= rows[j].token < noise.blocks.shape[1]:
            score = np.float32(np.log((rows[j].weight + _TINY) / (noise.blocks[at, rows[j].token] + _TINY)))
        rows[j].score = score
        if score > best:
            best, second = score, best
        elif score > second:
            second = score
    certainty = _certainty(evidence, named)
    for j in range(size):
        _describe(evidence, j, named, best, second, left)
        rows[j].place += 2 * PLACES * noise.state[DOUBT]
        rows[j].level += LEVELS * (certainty + CERTAINTIES * noise.state[DOUBT])
        rows[j].weight = _chance(weights, rows[j], evidence.race[j])


@inner
def _share(evidence, named):  # type: ignore[no-untyped-def]
    """Share what the named rows leave of all chances among the others; return it."""
    left = np.float32(1.0)
    for j in range(named):
        left -= evidence.rows[j].weight
    left = max(left, _LEAST)
    for j in range(named, evidence.size[0]):
        row = evidence.rows[j]
        row.given = row.weight = left * row.usual
    return left


@inner
def _certainty(evidence, named):  # type: ignore[no-untyped-def]
    """Return how certain the model was: 0 where it has not been seen here, then 1 to 3."""
    top = np.float32(0.0)
    for j in range(named):
        top = max(top, evidence.rows[j].recycled)
    return 0 if top == 0.0 else 1 if top < 0.6 else 2 if top < 0.95 else 3


@inner
def _describe(evidence, j, named, best, second, left):  # type: ignore[no-untyped-def]
    row, x, place = evidence.rows[j], evidence.race[j], 0
    for i in range(evidence.size[0]):
        place += 1 if evidence.rows[i].score > row.score else 0
    given, rival = row.weight, second if place == 0 else best
    pace = np.float32(np.exp(-row.score))  # q / p
    x[BIAS], x[GIVEN] = 1.0, log_odds(given) * np.float32(0.25)
    x[MARGIN] = min(max(row.score - rival, -_FAR), _FAR) * np.float32(0.5)
    x[ALONE] = -min(pace * (np.float32(1.0) - given), _FAR) * np.float32(0.3)
    x[UNSEEN] = -min(pace * left, _FAR) * np.float32(0.3)
    row.place = (place if place < PLACES else PLACES - 1) + (PLACES if j >= named else 0)
    level = int((log_odds(given) + np.float32(7.0)) * np.float32(LEVELS / 14.0))  # log-odds lie between -7 and 7
    row.level = 2 * PLACES * DOUBTS + level


@inner
def _chance(weights, row, x):  # type: ignore[no-untyped-def]
    return logistic(_weigh(weights.race[row.place], weights.race[row.level], x))


@inner_sum
def _weigh(a, b, x):  # type: ignore[no-untyped-def]
    z = np.float32(0.0)
    for i in range(RACE):
        z += (a[i] + b[i]) * x[i]
    return z


@inner
def learn_race(weights, evidence, token):  # type: ignore[no-untyped-def]
    """Learn that `token` was drawn, from the rows as `run_race` left them."""
    for j in range(evidence.size[0]):
        row, x = evidence.rows[j], evidence.race[j]
        error = np.float32(row.token == token) - row.weight
        for s in (row.place, row.level):
            for i in range(RACE):
                adapt(weights.race, weights.race_energy, s, i, error * x[i], _RATE)
