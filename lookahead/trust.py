"""How far the weights of drafts can be believed: claimed chances against what the model said."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lookahead.draft import Draft, FloatArray
from lookahead.sources.codes import GRAMMAR

_GRAMMAR = GRAMMAR
_WIDEST = 6.0  # log-odds of a claim
_DEEP = np.log(3.0)  # of a node that is not under the root, as far as one depth stands for all
_MEMORY = 0.98  # of what is known, after one more draft
_WORTH = 4.0  # nodes that a draft counts for at most: they are right or wrong together
_START = np.array([1.0, 0.0, 0.0, 1.0, 0.0])  # claims are chances
_TEXTS = 8  # that count for what is usual
_FIRST = np.array([60.0, 15.0, 15.0, 60.0, 15.0])  # how firmly that is believed when a text begins,
_FIRM = np.array([10.0, 0.3, 0.3, 10.0, 0.3])  # and later on
_N, _UNDER = len(_START), 3  # coefficients, and the first of those for nodes under the root
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

    Args:
        usual: the line that it begins with, and comes back to.

    Attributes:
        drafts: that were taken in.
    """

    def __init__(self, usual: NDArray[np.float64] = _START) -> None:
        self._line, self._usual = usual.copy(), usual
        self._known = np.diag(_FIRST)
        self._ranks = np.zeros((2, _RANKS))  # n-th nodes that were right, and all
        self.drafts = 0

    def chances(self, draft: Draft) -> FloatArray:
        """Return [N] float32: the chance that each node is accepted; never more than its parent's, 0 for probes."""
        claims, chances = np.ones(len(draft), np.float32), np.ones(len(draft), np.float32)
        _judge(draft.parents, draft.weight, draft.probe, draft.source, self._line, claims, chances)
        return chances

    def expect(self, draft: Draft, expected: NDArray[np.float64]) -> int:
        """Add to `expected` [M + 1] what 0, 1, … nodes of a draft are expected to bring; return how many it has."""
        return int(_add(draft.parents, draft.weight, draft.probe, draft.source, self._line, self._ranks, expected))

    def claims(self, gains: FloatArray, part: float = 1.0, out: FloatArray | None = None) -> FloatArray:
        """Return [A] float32: the least claims of the first, second, … nodes that are expected to bring `gains`.

        Args:
            part: of the gains that they are to bring.
            out: [A], takes what is returned.
        """
        claims = np.empty_like(gains) if out is None else out
        _claim(self._line, self._ranks, gains, part, claims)
        return claims

    def observe(self, draft: Draft, tokens: NDArray[np.int64]) -> None:
        """Take in the tokens that followed the root of a draft, whether its nodes ran or not."""
        if len(draft) < 2:
            return
        self.drafts += 1
        tree = draft.tokens, draft.parents, draft.weight, draft.probe, draft.depth, draft.source
        _observe(*tree, tokens, self._usual, self._line, self._known, self._ranks)

    @property
    def line(self) -> NDArray[np.float64]:
        """[5] what turns claims into chances: slope, intercept, slope by depth; slope and intercept under the root."""
        return self._line


class UsualTrust:
    """How far drafts could be believed in earlier texts: each begins with it, and soon goes its own way."""

    def __init__(self) -> None:
        self._line, self._texts = _START.copy(), 0
        self._last = Trust()

    def begin(self) -> Trust:
        """Return the trust of another text; what the one before it has shown is taken in now."""
        if self._last.drafts:
            self._texts += 1
            self._line += (self._last.line - self._line) / min(self._texts, _TEXTS)
        self._last = Trust(self._line.copy())
        return self._last


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
def _claim(line, ranks, gains, part, claims):  # type: ignore[no-untyped-def]
    """Do the reverse of `_expect`, for nodes of any depth."""
    least = 0.0
    for rank in range(len(gains)):
        seen = ranks[1, rank] + _DOUBT
        own = _SHARE + (1.0 - _SHARE) * _DOUBT / seen
        chance = (part * gains[rank] - (1.0 - _SHARE) * ranks[0, rank] / seen) / own
        chance = min(max(chance, 1e-6), 1.0 - 1e-6)
        z = np.log(chance / (1.0 - chance))
        odds = min((z - line[4]) / line[3], (z - line[1] - line[2] * _DEEP) / line[0])
        least = max(least, 1.0 / (1.0 + np.exp(-max(min(odds, _WIDEST), -_WIDEST))))
        claims[rank] = least


@njit(cache=True)
def _judge(parents, weight, probe, source, line, claims, chances):  # type: ignore[no-untyped-def]
    """Fill claims (path weights) and chances; both are 1 at the root."""
    depth, x = np.zeros(len(parents), np.int64), np.empty(_N)
    for i in range(1, len(parents)):
        above, certain = parents[i], _certain(weight[i], source[i])
        claims[i], depth[i] = claims[above] * weight[i], depth[above] + (0 if certain else 1)
        chance = chances[above]
        if not certain:
            chance = min(_chance(line, claims[i], depth[i], x), chance)
        chances[i] = 0.0 if probe[i] or claims[i] == 0.0 else chance


@njit(cache=True)
def _expect(parents, weight, probe, source, line, ranks, out):  # type: ignore[no-untyped-def]
    n, rank = len(parents), 0
    claims, chances = np.ones(n, np.float32), np.ones(n, np.float32)
    _judge(parents, weight, probe, source, line, claims, chances)
    for i in np.argsort(-claims, kind="mergesort"):
        if i > 0 and not probe[i]:
            usual = (ranks[0, rank] + _DOUBT * chances[i]) / (ranks[1, rank] + _DOUBT)
            out[rank] = _SHARE * chances[i] + (1.0 - _SHARE) * usual if chances[i] > 0.0 else 0.0
            rank += 1
    return rank


@njit(cache=True)
def _add(parents, weight, probe, source, line, ranks, expected):  # type: ignore[no-untyped-def]
    gains = np.empty(len(parents), np.float32)
    used, brings = _expect(parents, weight, probe, source, line, ranks, gains), 0.0
    for n in range(1, len(expected)):
        brings += gains[n - 1] if n <= used else 0.0
        expected[n] += brings
    return used


@njit(cache=True)
def _observe(known, parents, weight, probe, places, source, tokens, usual, line, firm, ranks):  # type: ignore[no-untyped-def]
    """Move the line (by a step of Newton's method), how firmly it is known, and the counts of the n-th nodes."""
    n = len(parents)
    claims, chances = np.ones(n, np.float32), np.ones(n, np.float32)
    _judge(parents, weight, probe, source, line, claims, chances)
    # 1 on the way of the text, 0 off it, -1 beyond its last token, where nobody knows.
    there, slope, curvature = np.ones(n, np.int8), np.zeros(_N), np.zeros((_N, _N))
    under, deeper = _learn(known, parents, weight, probe, places, source, tokens, line, there, slope, curvature)
    _rank(claims, chances, probe, there, ranks)
    for a in range(_N):
        worth = min(1.0, _WORTH / max(under if a >= _UNDER else deeper, 1.0))
        slope[a] = worth * slope[a] + (1.0 - _MEMORY) * _FIRM[a] * (usual[a] - line[a])
        for b in range(_N):
            firm[a, b] = _MEMORY * firm[a, b] + worth * curvature[a, b]
        firm[a, a] += (1.0 - _MEMORY) * _FIRM[a]  # what fades is replaced by the belief in the start
    _solve(firm.copy(), slope)
    for a in range(_N):
        line[a] += slope[a]
    line[0], line[3] = max(line[0], 0.1), max(line[3], 0.1)


@njit(cache=True)
def _solve(matrix, x):  # type: ignore[no-untyped-def]
    """Solve matrix @ y = x for a positive definite matrix; y replaces x."""
    n = len(x)
    for k in range(n):
        for i in range(k + 1, n):
            factor = matrix[i, k] / matrix[k, k]
            x[i] -= factor * x[k]
            for j in range(k, n):
                matrix[i, j] -= factor * matrix[k, j]
    for k in range(n - 1, -1, -1):
        for j in range(k + 1, n):
            x[k] -= matrix[k, j] * x[j]
        x[k] /= matrix[k, k]


@njit(cache=True)
def _learn(known, parents, weight, probe, places, source, tokens, line, there, slope, curvature):  # type: ignore[no-untyped-def]
    """Add what the nodes of a draft say to slope and curvature of the likelihood.

    Return how many nodes under the root, and how many deeper ones, say something.

    Args:
        there: set to 1 for nodes on the way of the text, 0 off it, -1 beyond its last token, where nobody knows.
    """
    n = len(parents)
    claims, depth, x = np.ones(n), np.zeros(n, np.int64), np.empty(_N)
    under, deeper = 0.0, 0.0
    for i in range(1, n):
        above, certain = parents[i], _certain(weight[i], source[i])
        claims[i], depth[i] = claims[above] * weight[i], depth[above] + (0 if certain else 1)
        there[i] = there[above]
        if there[above] == 1:
            there[i] = -1 if places[i] > len(tokens) else known[i] == tokens[places[i] - 1]
        if there[i] < 0 or probe[i] or certain or claims[i] == 0.0:
            continue
        chance = _chance(line, claims[i], depth[i], x)
        if depth[i] == 1:
            under += 1.0
        else:
            deeper += 1.0
        for a in range(_N):
            slope[a] += (there[i] - chance) * x[a]
            for b in range(_N):
                curvature[a, b] += chance * (1.0 - chance) * x[a] * x[b]
    return under, deeper


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
