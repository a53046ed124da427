"""The shapes that passes have: few, so that each is prepared once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COUNTS = (1, 8, 16, 32, 64)
"""Rows of a pass; beyond the last one, its multiples."""

FIXED = 32
"""Rows of every pass whose output may not depend on drafts."""

MAX_NODES = 4096
"""Drafted nodes of a row that anybody may ask for."""

STEP = 256  # slots; capacities that are to be few are 1, 2, 3, 4, 6, 8, 12, 16, … times this
_FINE = 64  # slots; others are multiples of this


@dataclass(frozen=True, slots=True)
class Counts:
    """How many rows a pass runs for so many nodes.

    Args:
        fixed: the same for all; 0: the least of `COUNTS` that is enough.

    >>> Counts().rows(9), Counts(fixed=32).rows(9)
    (16, 32)
    """

    fixed: int = 0

    @property
    def most(self) -> int:
        """Nodes below the root that a pass can have."""
        return self.fixed - 1 if self.fixed else MAX_NODES

    def rows(self, nodes: int) -> int:
        """Return how many rows run for `nodes` nodes, the root included."""
        if self.fixed:
            assert nodes <= self.fixed
            return self.fixed
        last = COUNTS[-1]
        return next((count for count in COUNTS if count >= nodes), -(-nodes // last) * last)

    def table(self, most: int) -> NDArray[np.int64]:
        """Return the rows of 1, 2, … `most` nodes: [most]."""
        return np.array([self.rows(nodes) for nodes in range(1, most + 1)], np.int64)


def capacity(slots: int, *, few: bool) -> int:
    """Return the least capacity of a cache that has so many slots.

    Args:
        few: there are to be few of them, since each is recorded in graphs; otherwise none is much too large.

    >>> capacity(256, few=True), capacity(257, few=True), capacity(1100, few=True), capacity(1100, few=False)
    (256, 512, 1536, 1152)
    """
    if not few:
        return -(-max(slots, 1) // min(_FINE, STEP)) * min(_FINE, STEP)
    steps = -(-max(slots, 1) // STEP)
    power = 1 << (steps.bit_length() - 1)
    return STEP * next(size for size in (power, power + power // 2, 2 * power) if size >= steps)
