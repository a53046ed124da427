"""A token tree while it grows: its nodes, and the successors that wait to become one, the likeliest first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.sources.alignment import FIELDS
from lookahead.sources.kernels import Records, inner, records


class Tree(NamedTuple):
    """Room for N nodes and for the successors that wait to become one: never more than there is room for."""

    nodes: Records  # [N] see `empty_tree`
    place: NDArray[np.int64]  # [N, FIELDS] alignment of the nodes
    items: Records  # [N] see `empty_tree`
    queue: IntArray  # [N] waiting items, the likeliest last
    used: NDArray[np.int64]  # [5] see below


NODES, WAITING, ITEMS = 0, 1, 2  # in `used`
CURSOR, OFFSET = 3, 4  # in `used`: of the next root

_ALMOST = np.float32(0.7)


def empty_tree(budget: int) -> Tree:
    """Return room for `budget` nodes below the root.

    A node and an item (a successor that waits) hold their token, parent, weight and source, `given`, the weight without
    what noise says of it, `chance`, the product of weights from the root, and where they are among the keys (see
    `keys.move`). A node also knows its depth, and its state in the grammar, -1 until it is asked about.
    """
    n = budget + 1
    common = {"token": "i4", "parent": "i4", "weight": "f4", "given": "f4", "chance": "f4", "source": "u1"}
    common |= {"cursor": "i4", "offset": "i4"}
    return Tree(
        nodes=records(n, **common, depth="i4", state="i4"),
        place=np.zeros((n, FIELDS), np.int64),
        items=records(n, **common),
        queue=np.zeros(n, np.int32),
        used=np.array([0, 0, 0, -1, 0], np.int64),
    )


@inner
def plant(tree, token, place):  # type: ignore[no-untyped-def]
    """Begin a tree with the root alone; `place` is its alignment."""
    root = tree.nodes[0]
    root.token, root.parent, root.weight, root.chance, root.source = token, -1, 1.0, 1.0, 0
    root.state = -1
    root.given, root.depth, root.cursor, root.offset = 1.0, 0, tree.used[CURSOR], tree.used[OFFSET]
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
def wait(tree, chance):  # type: ignore[no-untyped-def]
    """Return the item of a successor that waits with this chance, -1 where likelier ones fill the tree."""
    items, queue, waiting = tree.items, tree.queue, tree.used[WAITING]
    if waiting == tree.nodes.shape[0] - tree.used[NODES]:
        if waiting == 0 or items[queue[0]].chance >= chance:
            return -1
        item = _drop(queue, waiting)
    else:
        item = tree.used[ITEMS]
        tree.used[ITEMS] += 1
        tree.used[WAITING] += 1
        waiting += 1
    at = waiting - 1
    while at > 0 and items[queue[at - 1]].chance >= chance:
        queue[at] = queue[at - 1]
        at -= 1
    queue[at] = item
    items[item].chance = chance
    return item


@inner
def has_room_below(tree, node):  # type: ignore[no-untyped-def]
    """Return whether it is worth asking what follows `node`, the newest.

    Not where the tree fills with others that are almost as likely as the node itself: its successors are less likely.
    """
    room = tree.nodes.shape[0] - tree.used[NODES]
    if tree.used[WAITING] < room:
        return True
    return room > 0 and tree.items[tree.queue[0]].chance < _ALMOST * tree.nodes[node].chance


@inner
def _drop(queue, waiting):  # type: ignore[no-untyped-def]
    item = queue[0]
    for i in range(waiting - 1):
        queue[i] = queue[i + 1]
    return item


@inner
def take(tree, floors):  # type: ignore[no-untyped-def]
    """Make the likeliest waiting item a node and return it, -1 when none is likely enough, or no room is left.

    Args:
        floors: [N] the chance that a node must have when so many are there already.
    """
    if tree.used[WAITING] == 0:
        return -1
    if tree.items[tree.queue[tree.used[WAITING] - 1]].chance < floors[tree.used[NODES]]:
        return -1
    tree.used[WAITING] -= 1
    node, at = tree.used[NODES], tree.queue[tree.used[WAITING]]
    new, item = tree.nodes[node], tree.items[at]
    new.token, new.parent, new.source = item.token, item.parent, item.source
    new.weight, new.given, new.chance = item.weight, item.given, item.chance
    new.cursor, new.offset, new.state = item.cursor, item.offset, -1
    new.depth = tree.nodes[item.parent].depth + 1
    tree.used[NODES] = node + 1
    return node


@inner
def best_child(tree, node):  # type: ignore[no-untyped-def]
    """Return the likeliest child of `node`, -1: it has none."""
    best = np.int64(-1)
    for i in range(node + 1, tree.used[NODES]):
        if tree.nodes[i].parent == node and (best < 0 or tree.nodes[i].chance > tree.nodes[best].chance):
            best = np.int64(i)
    return best
