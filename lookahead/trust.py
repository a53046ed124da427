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
_START = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])  # claims are chances
_TEXTS = 8  # that count for what is usual
_FIRST = np.array([60.0, 15.0, 15.0, 15.0, 60.0, 15.0, 15.0])  # how firmly that is believed when a text begins,
_FIRM = np.array([10.0, 0.3, 0.3, 0.3, 10.0, 0.3, 0.3])  # and later on
_N, _UNDER = len(_START), 4  # coefficients, and the first of those for nodes under the root
_RANKS = 4097
_SHARE, _GUIDED = 0.75, 0.25  # of a draft's own chances in what its nodes are expected to bring, and that under a
# grammar, whose texts are more alike; the rest is the usual of their rank
_BEFORE = 16.0  # drafts that earlier texts under a grammar count for at most in what is usual of a rank
_DOUBT, _OFTEN = 4.0, 48.0  # drafts that an average needs to be believed half, and after which old ones fade


class Trust:
    """Turns the path weights of drafts into chances, by what became of earlier nodes.

    The log-odds of a chance are a line in the log-odds of the claim (Platt 1999) and the logs of the depth and of the
    rank, that is how many nodes of the draft claim more; another one for the nodes under the root. They are fitted
    online by Newton's method with a short memory: how far a drafter can be believed differs from text to text. A
    drafter that gives all its nodes the weight 1 is found out by the depth. What a grammar forces is as likely as what
    is above it.

    Chances of one draft err together, and drafts that promise much keep less. So what the n-th node of a draft brings,
    by falling claims, is expected to lie between its own chance and what n-th nodes brought of late.

    Args:
        usual: the line that it begins with, and comes back to.
        ranks: [2, R] of n-th nodes of earlier drafts, how many were right, and all of them; None: nothing is known.
        share: of a node's own chance in what it is expected to bring.

    Attributes:
        drafts: that were taken in.
        ranks: [2, R] n-th nodes that were right, and all; what it began with included.
    """

    def __init__(
        self,
        usual: NDArray[np.float64] = _START,
        ranks: NDArray[np.float64] | None = None,
        share: float = _SHARE,
    ) -> None:
        self._line, self._usual, self._share = usual.copy(), usual, share
        self._known = np.diag(_FIRST)
        self.ranks = np.zeros((2, _RANKS)) if ranks is None else ranks.copy()
        self.drafts = 0

    def chances(self, draft: Draft) -> FloatArray:
        """Return [N] float32: the chance that each node is accepted; never more than its parent's, 0 for probes."""
        chances = np.ones(len(draft), np.float32)
        _judge(draft.parents, draft.weight, draft.probe, draft.source, self._line, chances)
        return chances

    def expect(self, draft: Draft, expected: NDArray[np.float64]) -> int:
        """Add to `expected` [M + 1] what 0, 1, … nodes of a draft are expected to bring; return how many it has."""
        tree = draft.parents, draft.weight, draft.probe, draft.source
        return int(_add(*tree, self._line, self.ranks, self._share, expected))

    def claims(self, gains: FloatArray, part: float = 1.0, out: FloatArray | None = None) -> FloatArray:
        """Return [A] float32: the least claims of the first, second, … nodes that are expected to bring `gains`.

        Args:
            part: of the gains that they are to bring.
            out: [A], takes what is returned.
        """
        claims = np.empty_like(gains) if out is None else out
        _claim(self._line, self.ranks, self._share, gains, part, claims)
        return claims

    def observe(self, draft: Draft, tokens: NDArray[np.int64]) -> None:
        """Take in the tokens that followed the root of a draft, whether its nodes ran or not."""
        if len(draft) < 2:
            return
        self.drafts += 1
        tree = draft.tokens, draft.parents, draft.weight, draft.probe, draft.depth, draft.source
        _observe(*tree, tokens, self._usual, self._line, self._known, self.ranks)

    @property
    def line(self) -> NDArray[np.float64]:
        """[7] what turns claims into chances: slope, intercept, slopes by depth and rank; for nodes under the root the
        same but for the depth.
        """
        return self._line


class UsualTrust:
    """How far drafts could be believed in earlier texts: each begins with it, and soon goes its own way.

    Args:
        guided: whether the texts follow a grammar. Then they are alike, and what was usual of the ranks is handed on.
    """

    def __init__(self, *, guided: bool = False) -> None:
        self._line, self._texts = _START.copy(), 0
        self._guided, self._ranks = guided, np.zeros((2, _RANKS))
        self._before = self._ranks  # what the last text began with
        self._last = Trust()

    def begin(self) -> Trust:
        """Return the trust of another text; what the one before it has shown is taken in now."""
        if self._last.drafts:
            self._texts += 1
            self._line += (self._last.line - self._line) / min(self._texts, _TEXTS)
            self._ranks = (1.0 - 1.0 / _TEXTS) * self._ranks + np.maximum(self._last.ranks - self._before, 0.0)
        if self._guided:
            seen = self._ranks[1]
            self._before = self._ranks * (np.minimum(seen, _BEFORE) / np.maximum(seen, 1e-9))
        share = _GUIDED if self._guided else _SHARE
        self._last = Trust(self._line.copy(), self._before, share)
        return self._last


@njit(cache=True)
def _certain(weight, source):  # type: ignore[no-untyped-def]
    """Return whether a grammar allows nothing else."""
    return weight == 1.0 and source == _GRAMMAR


@njit(cache=True)
def _chance(line, claim, depth, rank, x):  # type: ignore[no-untyped-def]
    """Return the chance of a node, and set what it is a line in."""
    odds = np.log(max(claim, 1e-6) / max(1.0 - claim, 1e-6))
    odds = max(min(odds, _WIDEST), -_WIDEST)
    x[:] = 0.0
    if depth == 1:
        x[4], x[5], x[6] = odds, 1.0, np.log(1.0 + rank)
    else:
        x[0], x[1], x[2], x[3] = odds, 1.0, np.log(depth), np.log(1.0 + rank)
    z = 0.0
    for a in range(_N):
        z += line[a] * x[a]
    return 1.0 / (1.0 + np.exp(-z))


@njit(cache=True)
def _claim(line, ranks, share, gains, part, claims):  # type: ignore[no-untyped-def]
    """Do the reverse of `_expect`, for nodes of any depth."""
    least = 0.0
    for rank in range(len(gains)):
        seen = ranks[1, rank] + _DOUBT
        own = share + (1.0 - share) * _DOUBT / seen
        chance = (part * gains[rank] - (1.0 - share) * ranks[0, rank] / seen) / own
        chance = min(max(chance, 1e-6), 1.0 - 1e-6)
        z, late = np.log(chance / (1.0 - chance)), np.log(1.0 + rank)
        under = (z - line[5] - line[6] * late) / line[4]
        odds = min(under, (z - line[1] - line[2] * _DEEP - line[3] * late) / line[0])
        least = max(least, 1.0 / (1.0 + np.exp(-max(min(odds, _WIDEST), -_WIDEST))))
        claims[rank] = least


@njit(cache=True)
def _order(parents, weight, source, probe):  # type: ignore[no-untyped-def]
    """Return of all nodes the claims (path weights), depths and ranks, and the acceptable ones by falling claims.

    What a grammar forces is no deeper than what is above it.
    """
    n, count = len(parents), 0
    claims, depth, ranks = np.ones(n, np.float32), np.zeros(n, np.int64), np.zeros(n, np.int64)
    for i in range(1, n):
        above = parents[i]
        claims[i] = claims[above] * weight[i]
        depth[i] = depth[above] + (0 if _certain(weight[i], source[i]) else 1)
    order = np.argsort(-claims, kind="mergesort")
    for i in order:
        ranks[i] = count
        if i > 0 and not probe[i]:
            order[count] = i
            count += 1
    return claims, depth, ranks, order[:count]


@njit(cache=True)
def _judge(parents, weight, probe, source, line, chances):  # type: ignore[no-untyped-def]
    """Fill chances, 1 at the root; return claims, depths and ranks, and the order of the nodes."""
    x = np.empty(_N)
    claims, depth, ranks, order = _order(parents, weight, source, probe)
    for i in range(1, len(parents)):
        chance = chances[parents[i]]
        if not _certain(weight[i], source[i]):
            chance = min(_chance(line, claims[i], depth[i], ranks[i], x), chance)
        chances[i] = 0.0 if probe[i] or claims[i] == 0.0 else chance
    return claims, depth, ranks, order


@njit(cache=True)
def _expect(parents, weight, probe, source, line, ranks, share, out):  # type: ignore[no-untyped-def]
    chances = np.ones(len(parents), np.float32)
    _, _, _, order = _judge(parents, weight, probe, source, line, chances)
    for rank, i in enumerate(order):
        usual = (ranks[0, rank] + _DOUBT * chances[i]) / (ranks[1, rank] + _DOUBT)
        out[rank] = share * chances[i] + (1.0 - share) * usual if chances[i] > 0.0 else 0.0
    return len(order)


@njit(cache=True)
def _add(parents, weight, probe, source, line, ranks, share, expected):  # type: ignore[no-untyped-def]
    gains = np.empty(len(parents), np.float32)
    used, brings = _expect(parents, weight, probe, source, line, ranks, share, gains), 0.0
    for n in range(1, len(expected)):
        brings += gains[n - 1] if n <= used else 0.0
        expected[n] += brings
    return used


@njit(cache=True)
def _observe(known, parents, weight, probe, places, source, tokens, usual, line, firm, ranks):  # type: ignore[no-untyped-def]
    """Move the line (by a step of Newton's method), how firmly it is known, and the counts of the n-th nodes."""
    n = len(parents)
    chances = np.ones(n, np.float32)
    claims, depth, late, order = _judge(parents, weight, probe, source, line, chances)
    # 1 on the way of the text, 0 off it, -1 beyond its last token, where nobody knows.
    there, slope, curvature = np.ones(n, np.int8), np.zeros(_N), np.zeros((_N, _N))
    for i in range(1, n):
        there[i] = there[parents[i]]
        if there[i] == 1:
            there[i] = -1 if places[i] > len(tokens) else known[i] == tokens[places[i] - 1]
    under, deeper, x = 0.0, 0.0, np.empty(_N)
    for i in range(1, n):
        if there[i] < 0 or probe[i] or _certain(weight[i], source[i]) or claims[i] == 0.0:
            continue
        chance = _chance(line, claims[i], depth[i], late[i], x)
        if depth[i] == 1:
            under += 1.0
        else:
            deeper += 1.0
        for a in range(_N):
            slope[a] += (there[i] - chance) * x[a]
            for b in range(_N):
                curvature[a, b] += chance * (1.0 - chance) * x[a] * x[b]
    _rank(order, chances, there, ranks)
    for a in range(_N):
        worth = min(1.0, _WORTH / max(under if a >= _UNDER else deeper, 1.0))
        slope[a] = worth * slope[a] + (1.0 - _MEMORY) * _FIRM[a] * (usual[a] - line[a])
        for b in range(_N):
            firm[a, b] = _MEMORY * firm[a, b] + worth * curvature[a, b]
        firm[a, a] += (1.0 - _MEMORY) * _FIRM[a]  # what fades is replaced by the belief in the start
    _solve(firm.copy(), slope)
    for a in range(_N):
        line[a] += slope[a]
    line[0], line[_UNDER] = max(line[0], 0.1), max(line[_UNDER], 0.1)
    line[_UNDER - 1], line[_N - 1] = min(line[_UNDER - 1], 0.0), min(line[_N - 1], 0.0)  # by rank


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
def _rank(order, chances, there, ranks):  # type: ignore[no-untyped-def]
    """Count which of the nodes, by falling claims, were right."""
    for rank, i in enumerate(order[: ranks.shape[1]]):
        if ranks[1, rank] >= _OFTEN:
            ranks[0, rank] *= 0.5
            ranks[1, rank] *= 0.5
        ranks[0, rank] += chances[i] if there[i] < 0 else there[i]
        ranks[1, rank] += 1.0
