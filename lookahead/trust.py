"""How far the weights of a drafter can be believed: claimed chances against what was accepted."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lookahead.draft import Draft, FloatArray

_CLAIMS, _DEPTHS = 16, 8  # classes: of the claimed chance, two a power of two; of the depth, doubling
_DOUBT = 4.0  # accepted nodes that a class needs before it is believed half
_MEMORY = 256.0  # claimed acceptances after which old ones fade


class Trust:
    """Turns the path weights of drafts into chances, by what became of earlier nodes of the same claim and depth.

    A drafter that gives all its nodes the weight 1 is found out, depth by depth.
    """

    def __init__(self) -> None:
        self._claimed = np.zeros((_CLAIMS, _DEPTHS))
        self._hits = np.zeros((_CLAIMS, _DEPTHS))

    def chances(self, draft: Draft) -> FloatArray:
        """Return [N] float32: the chance that each node is accepted; never more than its parent's, 0 for probes."""
        found: FloatArray = _chances(
            draft.parents, draft.weight, draft.probe, draft.depth, self._claimed, self._hits
        )
        return found

    def observe(self, draft: Draft, path: NDArray[np.int32]) -> None:
        """Take in which nodes of a draft that ran were accepted."""
        _learn(draft.parents, draft.weight, draft.probe, draft.depth, path, self._claimed, self._hits)


@njit(cache=True)
def _class(claim, depth):  # type: ignore[no-untyped-def]
    kind = _CLAIMS - 1 if claim <= 2.0**-_CLAIMS else min(int(-2.0 * np.log2(claim)), _CLAIMS - 1)
    level = 0
    while depth > 1 and level < _DEPTHS - 1:
        depth = (depth + 1) >> 1
        level += 1
    return kind, level


@njit(cache=True)
def _chances(parents, weight, probe, depth, claimed, hits):  # type: ignore[no-untyped-def]
    claim, chance = np.ones(len(parents)), np.ones(len(parents), np.float32)
    for i in range(1, len(parents)):
        claim[i] = claim[parents[i]] * weight[i]
        kind, level = _class(claim[i], depth[i])
        known = (hits[kind, level] + _DOUBT) / (claimed[kind, level] + _DOUBT)
        chance[i] = 0.0 if probe[i] else min(claim[i] * known, chance[parents[i]])
    return chance


@njit(cache=True)
def _learn(parents, weight, probe, depth, path, claimed, hits):  # type: ignore[no-untyped-def]
    claim = np.ones(len(parents))
    accepted = np.zeros(len(parents), np.bool_)
    for node in path:
        accepted[node] = True
    for i in range(1, len(parents)):
        claim[i] = claim[parents[i]] * weight[i]
        if not probe[i]:
            kind, level = _class(claim[i], depth[i])
            if claimed[kind, level] > _MEMORY:
                claimed[kind, level] *= 0.5
                hits[kind, level] *= 0.5
            claimed[kind, level] += claim[i]
            hits[kind, level] += accepted[i]
