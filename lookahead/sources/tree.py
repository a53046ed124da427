"""A token tree while it grows: its nodes, and the successors that wait to become one, the likeliest first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import FloatArray, IntArray
from lookahead.sources.alignment import FIELDS
from lookahead.sources.evidence import COLUMNS, WIDTH
from lookahead.sources.kernels import Records, inner, records


class Tree(NamedTuple):
    """Room for N nodes and for the M = N * WIDTH successors that they may have."""

    nodes: Records  # [N] see `empty_tree`
    place: NDArray[np.int64]  # [N, FIELDS] alignment of the nodes
    items: Records  # [M] see `empty_tree`
    x: FloatArray  # [M, COLUMNS] evidence of the items
    heap: IntArray  # [M] waiting items
    used: NDArray[np.int64]  # [3] see below


NODES, WAITING, ITEMS = 0, 1, 2  # in `used`


def empty_tree(budget: int) -> Tree:
    """Return room for `budget` nodes below the root.

    A node and an item (a successor that waits) hold their token, parent, weight and source, and `chance`, the product
    of weights from the root. A node also knows its depth and the item it was; an item what the mixer needs to learn:
    the sets of weights that it used and the alignment's cell.
    """
    n, m = budget + 1, max(budget, 1) * WIDTH
    common = {"token": "i4", "parent": "i4", "weight": "f4", "chance": "f4", "source": "u1"}
    return Tree(
        nodes=records(n, **common, depth="i4", item="i4"),
        place=np.zeros((n, FIELDS), np.int64),
        items=records(m, **common, set1="i4", set2="i4", set3="i4", cell="i4"),
        x=np.zeros((m, COLUMNS), np.float32),
        heap=np.zeros(m, np.int32),
        used=np.zeros(3, np.int64),
    )


@inner
def plant(tree, token, place):  # type: ignore[no-untyped-def]
    """Begin a tree with the root alone; `place` is its alignment."""
    root = tree.nodes[0]
    root.token, root.parent, root.weight, root.chance, root.source = token, -1, 1.0, 1.0, 0
    root.depth, root.item = 0, -1
    for i in range(FIELDS):
        tree.place[0, i] = place[i]
    tree.used[NODES], tree.used[WAITING], tree.used[ITEMS] = 1, 0, 0


@inner
def suffix_of(tree, node, tail, out):  # type: ignore[no-untyped-def]
    """Write the last tokens up to `node`, newest first; `tail` ends with the root's. Return how many."""
    n, room = 0, out.shape[0]
    while node > 0 and n < room:
        out[n] = tree.nodes[node].token
        node = tree.nodes[node].parent
        n += 1
    at = tail.shape[0] - 1
    while at >= 0 and n < room:
        out[n] = tail[at]
        at -= 1
        n += 1
    return n


@inner
def wait(tree, item):  # type: ignore[no-untyped-def]
    """Put `item` on the heap."""
    heap, items = tree.heap, tree.items
    at = tree.used[WAITING]
    tree.used[WAITING] += 1
    while at > 0:
        above = (at - 1) // 2
        if items[heap[above]].chance >= items[item].chance:
            break
        heap[at] = heap[above]
        at = above
    heap[at] = item


@inner
def take(tree):  # type: ignore[no-untyped-def]
    """Make the likeliest waiting item a node and return it, -1 when none waits or no room is left."""
    node = tree.used[NODES]
    if tree.used[WAITING] == 0 or node == tree.nodes.shape[0]:
        return -1
    at = _pop(tree)
    new, item = tree.nodes[node], tree.items[at]
    new.token, new.parent, new.source = item.token, item.parent, item.source
    new.weight, new.chance = item.weight, item.chance
    new.depth, new.item = tree.nodes[item.parent].depth + 1, at
    tree.used[NODES] = node + 1
    return node


@inner
def _pop(tree):  # type: ignore[no-untyped-def]
    heap, items = tree.heap, tree.items
    top, size = heap[0], tree.used[WAITING] - 1
    tree.used[WAITING] = size
    item, at = heap[size], 0
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and items[heap[below + 1]].chance > items[heap[below]].chance:
            below += 1
        if items[heap[below]].chance <= items[item].chance:
            break
        heap[at] = heap[below]
        at = below
    heap[at] = item
    return top


@inner
def locate(tree, tokens, parents, nodes):  # type: ignore[no-untyped-def]
    """Fill `nodes` with the node of `tree` that each verified node was, -1 for another drafter's."""
    nodes[0] = 0
    for i in range(1, tokens.shape[0]):
        nodes[i] = -1
        above = nodes[parents[i]]
        if above < 0:
            continue
        for j in range(above + 1, tree.used[NODES]):
            if tree.nodes[j].parent == above and tree.nodes[j].token == tokens[i]:
                nodes[i] = j
                break
