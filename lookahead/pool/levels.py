"""When segments are merged, and how much is given up where a pool is full."""

from __future__ import annotations

from collections.abc import Sequence

FAN = 4
"""Segments of about one size that are merged into one."""

LARGEST = 1 << 30
"""Rows of a segment at most; larger pools have several."""

_ROOM = 8  # a full pool gives up 1/_ROOM of its limit at once, so that it is not rewritten at every step


def to_merge(sizes: Sequence[int]) -> slice | None:
    """Return which neighbours to merge, given the sizes of all, oldest first; None: leave them.

    A segment is merged with the younger ones once there are `FAN` of them and they outweigh it. So every token is
    rewritten a few times only, and the number of segments grows with the logarithm of the pool's size.

    >>> to_merge([64, 16, 16, 16, 16])
    slice(1, 5, None)
    """
    for first in range(len(sizes) - FAN + 1):
        rest = sum(sizes[first + 1 :])
        if 4 * sizes[first] <= 3 * rest and sizes[first] + rest <= LARGEST:
            return slice(first, len(sizes))
    return None


def to_give_up(tokens: int, limit: int) -> int:
    """Return how many of the oldest tokens to give up, so that a pool of `tokens` keeps to its limit.

    >>> to_give_up(1_000, 800)
    300
    """
    return 0 if tokens <= limit else tokens - limit + limit // _ROOM
