"""How far the weights of drafts can be believed: claimed chances against what the model said."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lookahead.draft import Draft, FloatArray
from lookahead.sources.codes import GRAMMAR

_GRAMMAR = GRAMMAR
_WIDEST = 6.0  # log-odds of a claim
_MEMORY = 0.98  # of what is known, after one more draft
_WORTH = 4.0  # nodes that a draft counts for at most: they are right or wrong together
_START = np.array([1.0, 0.0, 0.0, 1.0, 0.0])  # claims are chances
_FIRM = np.array([10.0, 0.3, 0.3, 10.0, 0.3])  # how firmly that is believed
_N = len(_START)
_RANKS = 4097
_SHARE = 0.5  # of a draft's own chances in what its nodes are expected to bring; the rest is the usual of their rank
_DOUBT, _OFTEN = 4.0, 48.0  # drafts that an average needs to be believed half, and after which old ones fade


class Trust:
    """Turns the path weights of drafts into chances, by what became of earlier nodes.

    The log-odds of a chance are a line in the log-odds of the claim (Platt 1999) and the log of the depth, another one
    for the nodes under the root, fitted online by Newton's method with a short memory: how far a drafter can be
    believed differs from text to text. A drafter that gives all its nodes the weight 1 is found out by the depth. What
    a grammar forces is as likely as what is above it.

    Chances of one draft err together, and drafts that promise much keep less. So what the n-th node of a draft brings,
    by falling claims, is expected to lie between its own chance and what n-th nodes brought of late.
    """

    def __init__(self) -> None:
        self._line = _START.copy()
        self._known = np.diag(_FIRM)
        self._ranks = np.zeros((2, _RANKS))  # n-th nodes that were right, and all

    def gains(self, draft: Draft) -> FloatArray:
        """Return [A] float32: what the acceptable nodes below the root are expected to bring, by falling claims."""
        out = np.empty(len(draft), np.float32)
        used = _expect(draft.path_weight(), self.chances(draft), draft.probe, self._ranks, out)
        gains: FloatArray = out[:used]
        return gains

    def chances(self, draft: Draft) -> FloatArray:
        """Return [N] float32: the chance that each node is accepted; never more than its parent's, 0 for probes."""
        chances = np.ones(len(draft), np.float32)
        _judge(draft.parents, draft.weight, draft.probe, draft.source, self._line, chances)
        return chances

    def observe(self, draft: Draft, tokens: NDArray[np.int64]) -> None:
        """Take in the tokens that followed the root of a draft, whether its nodes ran or not."""
        if len(draft) < 2:
            return
        slope, known = np.zeros(_N), np.zeros((_N, _N))
        there = np.ones(len(draft), np.int8)
        arrays = draft.tokens, draft.parents, draft.weight, draft.probe, draft.depth, draft.source
        counted = _learn(*arrays, tokens, self._line, there, slope, known)
        _rank(draft.path_weight(), self.chances(draft), draft.probe, there, self._ranks)
        worth = min(1.0, _WORTH / max(counted, 1.0))
        # What fades is replaced by the belief in the start.
        self._known = _MEMORY * self._known + (1.0 - _MEMORY) * np.diag(_FIRM) + worth * known
        slope = worth * slope + (1.0 - _MEMORY) * _FIRM * (_START - self._line)
        self._line = self._line + np.linalg.solve(self._known, slope)
        self._line[[0, 3]] = np.maximum(self._line[[0, 3]], 0.1)


@njit(cache=True)
def _certain(weight, source):  # type: ignore[no-untyped-def]
    """Return whether a grammar allows nothing else."""
    return weight == 1.0 and source == _GRAMMAR


@njit(cache=True)
def _chance(line, claim, depth, x):  # type: ignore[no-untyped-def]
    """Return the chance of a node, and set what it is a line in."""
    odds = np.log(max(claim, 1e-6) / max(1.0 - claim, 1e-6))
    odds = max(min(odds, _WIDEST), -_WIDEST)
    x[:] = 0.0
    if depth == 1:
        x[3], x[4] = odds, 1.0
    else:
        x[0], x[1], x[2] = odds, 1.0, np.log(depth)
    z = 0.0
    for a in range(_N):
        z += line[a] * x[a]
    return 1.0 / (1.0 + np.exp(-z))


@njit(cache=True)
def _judge(parents, weight, probe, source, line, chances):  # type: ignore[no-untyped-def]
    claims, depth, x = np.ones(len(parents)), np.zeros(len(parents), np.int64), np.empty(_N)
    for i in range(1, len(parents)):
        above, certain = parents[i], _certain(weight[i], source[i])
        claims[i], depth[i] = claims[above] * weight[i], depth[above] + (0 if certain else 1)
        chance = chances[above]
        if not certain:
            chance = min(_chance(line, claims[i], depth[i], x), chance)
        chances[i] = 0.0 if probe[i] or claims[i] == 0.0 else chance


@njit(cache=True)
def _learn(known, parents, weight, probe, places, source, tokens, line, there, slope, curvature):  # type: ignore[no-untyped-def]
    """Add what the nodes of a draft say to slope and curvature of the likelihood; return how many say something.

    Args:
        there: set to 1 for nodes on the way of the text, 0 off it, -1 beyond its last token, where nobody knows.
    """
    n = len(parents)
    claims, depth, x = np.ones(n), np.zeros(n, np.int64), np.empty(_N)
    counted = 0.0
    for i in range(1, n):
        above, certain = parents[i], _certain(weight[i], source[i])
        claims[i], depth[i] = claims[above] * weight[i], depth[above] + (0 if certain else 1)
        there[i] = there[above]
        if there[above] == 1:
            there[i] = -1 if places[i] > len(tokens) else known[i] == tokens[places[i] - 1]
        if there[i] < 0 or probe[i] or certain or claims[i] == 0.0:
            continue
        chance = _chance(line, claims[i], depth[i], x)
        counted += 1.0
        for a in range(_N):
            slope[a] += (there[i] - chance) * x[a]
            for b in range(_N):
                curvature[a, b] += chance * (1.0 - chance) * x[a] * x[b]
    return counted


@njit(cache=True)
def _expect(claims, chances, probe, ranks, out):  # type: ignore[no-untyped-def]
    rank = 0
    for i in np.argsort(-claims, kind="mergesort"):
        if i > 0 and not probe[i]:
            usual = (ranks[0, rank] + _DOUBT * chances[i]) / (ranks[1, rank] + _DOUBT)
            out[rank] = _SHARE * chances[i] + (1.0 - _SHARE) * usual if chances[i] > 0.0 else 0.0
            rank += 1
    return rank


@njit(cache=True)
def _rank(claims, chances, probe, there, ranks):  # type: ignore[no-untyped-def]
    """Count which of the nodes, by falling claims, were right."""
    rank = 0
    for i in np.argsort(-claims, kind="mergesort"):
        if i > 0 and not probe[i] and rank < ranks.shape[1]:
            if ranks[1, rank] >= _OFTEN:
                ranks[0, rank] *= 0.5
                ranks[1, rank] *= 0.5
            ranks[0, rank] += chances[i] if there[i] < 0 else there[i]
            ranks[1, rank] += 1.0
            rank += 1
