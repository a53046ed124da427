"""A likely text behind the root: the likeliest path of the tree, and on from its end what the row's sources say."""

from __future__ import annotations

import numpy as np

from lookahead.sources.kernels import inner, kernel
from lookahead.sources.prompt import TOKENS, mix, slot_of
from lookahead.sources.recycle import favourite
from lookahead.sources.tree import best_child


@kernel
def look_ahead(tree, index, recycled, tail, seeds, ahead):  # type: ignore[no-untyped-def]
    """Fill `ahead` with a likely token of each position behind the root.

    Args:
        tail: [T] int32, the last tokens, which end with the root's.
        seeds: [S] int32, tokens to take where nothing is known.
    """
    before = np.int64(tail[-2]) if tail.shape[0] > 1 else np.int64(-1)
    last, node = np.int64(tail[-1]), np.int64(0)
    for i in range(ahead.shape[0]):
        node = best_child(tree, node) if node >= 0 else node
        token = np.int64(tree.nodes[node].token) if node >= 0 else _successor(index, recycled, before, last, seeds, i)
        ahead[i] = token
        before, last = last, token


@inner
def _successor(index, recycled, before, last, seeds, salt):  # type: ignore[no-untyped-def]
    """Return what followed `before` and `last`: by the model's logits, else in the prompt, else one of the seeds."""
    token = favourite(recycled, before, last)
    if token >= 0:
        return token
    if index.used[TOKENS] > 0:
        one = mix(np.int64(1), last)
        for state in (mix(one, before), one):
            slot = index.slots[slot_of(index.slots, state)]
            if slot.key != 0:
                return np.int64(index.successors[slot.head].token)
    return np.int64(seeds[(mix(last, salt) >> 7) % seeds.shape[0]]) if seeds.shape[0] > 0 else last
