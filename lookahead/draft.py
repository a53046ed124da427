"""The token tree that one forward pass verifies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lookahead.errors import InvalidDraft

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A token tree under the last committed token.

    Node 0 is that token itself; every other node is a guess of what follows its parent.

    Attributes:
        tokens: [N] int32, the token of each node.
        parents: [N] int32, `parents[i] < i` and `parents[0] == -1`.
        weight: [N] float32 in [0, 1], the estimated chance that a node is accepted given that its parent was.
        source: [N] uint8, which source proposed the node (0: unknown). Only statistics read it.
        probe: [N] bool, nodes that run through the model but are never accepted; nor is anything below them.

    Raises:
        InvalidDraft: shapes differ, a parent does not come before its child, a token is negative, or a
            weight lies outside [0, 1].
    """

    tokens: IntArray
    parents: IntArray
    weight: FloatArray = None  # type: ignore[assignment]
    source: NDArray[np.uint8] = None  # type: ignore[assignment]
    probe: BoolArray = None  # type: ignore[assignment]
    depth: IntArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokens = _column("tokens", self.tokens, np.int32)
        n = tokens.shape[0]
        columns = {
            "tokens": tokens,
            "parents": _column("parents", self.parents, np.int32),
            "weight": _column("weight", _default(self.weight, np.ones, n), np.float32),
            "source": _column("source", _default(self.source, np.zeros, n), np.uint8),
            "probe": _column("probe", _default(self.probe, np.zeros, n), np.bool_),
        }
        for name, column in columns.items():
            if column.shape[0] != n:
                raise InvalidDraft(f"{name} has {column.shape[0]} entries, tokens has {n}; give every node one of each")
        if n == 0:
            raise InvalidDraft(
                "a draft needs node 0, the last committed token; use Draft.root(token) to propose nothing"
            )
        depth = np.empty(n, np.int32)
        bad = _check(columns["tokens"], columns["parents"], columns["weight"], depth)
        if bad:
            raise InvalidDraft(_explain(bad, columns))
        for name, column in (*columns.items(), ("depth", depth)):
            column.flags.writeable = False
            object.__setattr__(self, name, column)

    @classmethod
    def root(cls, token: int) -> Draft:
        """Return the draft that proposes nothing."""
        if token < 0:
            raise InvalidDraft(f"node 0 holds the token {token}; token ids are not negative")
        draft = object.__new__(cls)
        for name, value in _ROOT.items():
            object.__setattr__(draft, name, value)
        tokens = np.array([token], np.int32)
        tokens.flags.writeable = False
        object.__setattr__(draft, "tokens", tokens)
        return draft

    @classmethod
    def chain(cls, tokens: Sequence[int], *, weight: float = 1.0, source: int = 0) -> Draft:
        """Return a tree without branches; `tokens[0]` is the last committed token.

        >>> Draft.chain([7, 8, 9]).parents.tolist()
        [-1, 0, 1]
        """
        n = len(tokens)
        return cls(
            np.asarray(tokens, np.int32),
            np.arange(-1, n - 1, dtype=np.int32),
            np.full(n, weight, np.float32),
            np.full(n, source, np.uint8),
        )

    @classmethod
    def merge(cls, drafts: Iterable[Draft]) -> Draft:
        """Return one tree with the nodes of all `drafts`, which must share node 0's token.

        The same token under the same parent becomes one node; it keeps the larger weight (and that draft's source). A
        probe and an acceptable node stay two nodes.

        >>> Draft.merge([Draft.chain([1, 2, 3]), Draft.chain([1, 2, 4])]).parents.tolist()
        [-1, 0, 1, 1]
        """
        parts = list(drafts)
        if not parts:
            raise InvalidDraft("Draft.merge() needs at least one draft")
        if len({int(d.tokens[0]) for d in parts}) > 1:
            raise InvalidDraft("Draft.merge() joins trees under one token, but the drafts start with different ones")
        offsets = np.cumsum([0] + [len(d) for d in parts])
        parents = np.concatenate(
            [np.where(d.parents < 0, -1, d.parents + o) for d, o in zip(parts, offsets, strict=False)]
        )
        columns = [np.concatenate([getattr(d, c) for d in parts]) for c in ("tokens", "weight", "source", "probe")]
        return _assemble(parents.astype(np.int32), *columns)

    def deduplicate(self) -> Draft:
        """Return the tree with equal siblings joined (see `merge`); itself when there are none."""
        if len(self) < 2 or not _has_twins(self.tokens, self.parents, self.probe):
            return self
        return _assemble(self.parents, self.tokens, self.weight, self.source, self.probe)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Draft):
            return NotImplemented
        names = ("tokens", "parents", "weight", "source", "probe")
        return all(np.array_equal(getattr(self, c), getattr(other, c)) for c in names)

    def path_weight(self) -> FloatArray:
        """Return [N] float32: the chance that each node is accepted, the product of weights from the root."""
        return _path_weight(self.parents, self.weight)  # type: ignore[no-any-return]

    def ancestors(self) -> BoolArray:
        """Return [N, N] bool: `[i, j]` is true where j is i or an ancestor of i, that is, where i may attend to j."""
        return _ancestors(self.parents)  # type: ignore[no-any-return]

    def child(self, node: int, token: int) -> int | None:
        """Return the acceptable child of `node` that holds `token`, or None.

        >>> Draft.chain([7, 8, 9]).child(0, 8)
        1
        """
        found = _child(self.tokens, self.parents, self.probe, node, token)
        return None if found < 0 else int(found)

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root down to `node`, both included."""
        nodes = [node]
        while nodes[-1] > 0:
            nodes.append(int(self.parents[nodes[-1]]))
        return nodes[::-1]

    def cut(self, nodes: int, *, depth: int | None = None) -> Draft:
        """Return the best `nodes` nodes below the root by path weight, none deeper than `depth`.

        A kept node's parent is always kept; ties go to the earlier node.
        """
        if nodes < 0 or (depth is not None and depth < 0):
            raise InvalidDraft(f"cannot cut to nodes={nodes}, depth={depth}; both must be 0 or more")
        if len(self) <= nodes + 1 and (depth is None or len(self) <= depth + 1 or int(self.depth.max()) <= depth):
            return self
        limit = len(self) if depth is None else depth
        keep, parents = _best(self.parents, self.depth, self.path_weight(), nodes, limit)
        return self._only(keep, parents)

    def trim(self, nodes: int, chances: FloatArray | None = None) -> Draft:
        """Return the `nodes` acceptable nodes of the largest `chances`, and all probes with what is above them.

        Args:
            chances: [N], of no node more than of its parent; nodes of chance 0 go. None: path weights.
        """
        if len(self) == 1:
            return self
        if chances is None:
            keep, parents = _lightened(self.parents, self.probe, self.weight, nodes)
        else:
            keep, parents = _trimmed(self.parents, self.probe, chances, nodes)
        return self if len(keep) == len(self) else self._only(keep, parents)

    def spine(self, last: int | None = None) -> Draft:
        """Return the chain from the root that is expected to bring most; probes are left out.

        Args:
            last: a token behind which nothing may come.

        >>> Draft.merge([Draft.chain([1, 2, 3]), Draft.chain([1, 4], weight=0.9)]).spine().tokens.tolist()
        [1, 2, 3]
        """
        if len(self) == 1:
            return self
        keep = _spine(self.parents, self.weight, self.probe)
        if last is not None:
            ends = np.flatnonzero(self.tokens[keep] == last)
            keep = keep[: ends[0] + 1] if len(ends) else keep
        return self if len(keep) == len(self) else self._only(keep, np.arange(-1, len(keep) - 1, dtype=np.int32))

    def _only(self, keep: NDArray[np.int64], parents: IntArray) -> Draft:
        """Return the nodes `keep` of this draft, whose parents are among them."""
        if len(keep) == 1:
            return Draft.root(int(self.tokens[0]))
        columns = {name: getattr(self, name)[keep] for name in ("tokens", "weight", "source", "probe", "depth")}
        return Draft.sound(parents=parents, **columns)

    @classmethod
    def sound(cls, **columns: Any) -> Draft:
        """Return the draft of columns that are known to be sound, all of them, and nobody else's."""
        draft = object.__new__(cls)
        for name, column in columns.items():
            column.flags.writeable = False
            object.__setattr__(draft, name, column)
        return draft


def _frozen(value: float, dtype: Any) -> NDArray[Any]:
    array = np.array([value], dtype)
    array.flags.writeable = False
    return array


# What all drafts without guesses share; one is made for every idle row of every pass.
_ROOT = {
    "parents": _frozen(-1, np.int32),
    "weight": _frozen(1, np.float32),
    "source": _frozen(0, np.uint8),
    "probe": _frozen(0, np.bool_),
    "depth": _frozen(0, np.int32),
}


def _default(value: Any, make: Any, n: int) -> Any:
    return make(n) if value is None else value


def _column(name: str, value: Any, dtype: Any) -> NDArray[Any]:
    """Return `value` as a fresh 1-D array of `dtype`; refuse what would change in the conversion."""
    array = np.asarray(value)
    if array.ndim != 1:
        raise InvalidDraft(f"{name} must be one-dimensional, not of shape {array.shape}")
    if array.dtype != dtype and array.size and np.issubdtype(dtype, np.integer) and not _fits(array, dtype):
        raise InvalidDraft(f"{name} must hold whole numbers that fit {np.dtype(dtype).name}")
    return np.array(array, dtype=dtype)


def _fits(array: NDArray[Any], dtype: Any) -> bool:
    with np.errstate(invalid="ignore"):
        return np.issubdtype(array.dtype, np.number) and bool(np.all(array.astype(dtype) == array))


def _explain(bad: int, columns: dict[str, NDArray[Any]]) -> str:
    kind, node = bad % 4, bad // 4
    if kind == 1:
        return f"node {node} has parent {columns['parents'][node]}; parents[0] is -1 and parents[i] lies in [0, i)"
    if kind == 2:
        return f"node {node} holds the token {columns['tokens'][node]}; token ids are not negative"
    return f"node {node} has weight {columns['weight'][node]}; a weight is a chance in [0, 1]"


def _assemble(parents: IntArray, tokens: Any, weight: Any, source: Any, probe: Any) -> Draft:
    """Join equal siblings of a forest whose roots (parent -1) all stand for node 0."""
    index: dict[tuple[int, int, bool], int] = {}
    place = np.empty(len(tokens), np.int32)
    kept: list[int] = []
    out_parents: list[int] = []
    out_weight: list[float] = []
    for i in range(len(tokens)):
        above = -1 if parents[i] < 0 else int(place[parents[i]])
        key = (above, int(tokens[i]), bool(probe[i]))
        if key not in index:
            index[key] = len(kept)
            kept.append(i)
            out_parents.append(above)
            out_weight.append(float(weight[i]))
        place[i] = j = index[key]
        if weight[i] > out_weight[j]:
            kept[j], out_weight[j] = i, float(weight[i])
    return Draft(
        tokens[kept], np.array(out_parents, np.int32), np.array(out_weight, np.float32), source[kept], probe[kept]
    )


@njit(cache=True)
def _check(tokens, parents, weight, depth):  # type: ignore[no-untyped-def]
    """Fill `depth`; return 0, or 4 * node + (1 parent, 2 token, 3 weight) of the first bad node."""
    for i in range(tokens.shape[0]):
        if (i == 0 and parents[i] != -1) or (i > 0 and (parents[i] < 0 or parents[i] >= i)):
            return 4 * i + 1
        if tokens[i] < 0:
            return 4 * i + 2
        if not (weight[i] >= 0.0 and weight[i] <= 1.0):
            return 4 * i + 3
        depth[i] = 0 if i == 0 else depth[parents[i]] + 1
    return 0


@njit(cache=True)
def _path_weight(parents, weight):  # type: ignore[no-untyped-def]
    out = np.empty(parents.shape[0], np.float32)
    out[0] = 1.0
    for i in range(1, parents.shape[0]):
        out[i] = out[parents[i]] * weight[i]
    return out


@njit(cache=True)
def _ancestors(parents):  # type: ignore[no-untyped-def]
    n = parents.shape[0]
    out = np.zeros((n, n), np.bool_)
    for i in range(n):
        if i > 0:
            out[i, : parents[i] + 1] = out[parents[i], : parents[i] + 1]
        out[i, i] = True
    return out


@njit(cache=True)
def _child(tokens, parents, probe, node, token):  # type: ignore[no-untyped-def]
    for i in range(node + 1, tokens.shape[0]):
        if parents[i] == node and tokens[i] == token and not probe[i]:
            return i
    return -1


@njit(cache=True)
def _has_twins(tokens, parents, probe):  # type: ignore[no-untyped-def]
    for i in range(1, tokens.shape[0]):
        for j in range(parents[i] + 1, i):
            if parents[j] == parents[i] and tokens[j] == tokens[i] and probe[j] == probe[i]:
                return True
    return False


@njit(cache=True)
def _spine(parents, weight, probe):  # type: ignore[no-untyped-def]
    """Return the nodes of the best chain, the root first."""
    n = parents.shape[0]
    brings, follows = np.zeros(n), np.full(n, -1)
    for i in range(n - 1, 0, -1):
        if not probe[i]:
            worth, above = weight[i] * (1.0 + (brings[follows[i]] if follows[i] >= 0 else 0.0)), parents[i]
            brings[i] = worth
            if follows[above] < 0 or worth >= brings[follows[above]]:
                follows[above] = i
    keep, count, at = np.empty(n, np.int64), 0, 0
    while at >= 0:
        keep[count] = at
        count += 1
        at = follows[at]
    return keep[:count]


@njit(cache=True)
def _renumbered(kept, parents):  # type: ignore[no-untyped-def]
    """Return the kept nodes in order and their new parents; the parent of a kept node is kept."""
    place = np.cumsum(kept) - 1
    keep = np.nonzero(kept)[0]
    out = np.empty(keep.shape[0], np.int32)
    for k in range(keep.shape[0]):
        out[k] = -1 if k == 0 else place[parents[keep[k]]]
    return keep, out


@njit(cache=True)
def _best(parents, depth, path_weight, nodes, max_depth):  # type: ignore[no-untyped-def]
    """Return the kept nodes in order and their new parents; a child never outranks its parent in the order used."""
    n = parents.shape[0]
    order = np.argsort(-path_weight, kind="mergesort")
    kept = np.zeros(n, np.bool_)
    kept[0] = True
    left = nodes
    for i in order:
        if left > 0 and not kept[i] and depth[i] <= max_depth and kept[parents[i]]:
            kept[i] = True
            left -= 1
    return _renumbered(kept, parents)


@njit(cache=True)
def _lightened(parents, probe, weight, nodes):  # type: ignore[no-untyped-def]
    return _trimmed(parents, probe, _path_weight(parents, weight), nodes)


@njit(cache=True)
def _trimmed(parents, probe, chances, nodes):  # type: ignore[no-untyped-def]
    """Return the kept nodes in order and their new parents."""
    n = parents.shape[0]
    kept = np.zeros(n, np.bool_)
    kept[0] = True
    order = np.argsort(-chances, kind="mergesort")
    left = nodes
    for i in order:
        if left > 0 and i > 0 and not probe[i] and chances[i] > 0.0:
            kept[i] = True
            left -= 1
    for i in range(n - 1, 0, -1):
        kept[i] = kept[i] or probe[i]
        if kept[i]:
            kept[parents[i]] = True
    return _renumbered(kept, parents)
