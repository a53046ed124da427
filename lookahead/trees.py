"""The token trees of a run, kept small while it goes on."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from lookahead.draft import Draft


@dataclass(frozen=True, slots=True)
class Tree:
    """What one row drafted in a pass, in plain numbers.

    Attributes:
        row: the row of the batch.
        ran: nodes that ran through the model, the root included; those behind them were proposed, but a grammar or the
            budget pruned them.
        tokens: of every node; node 0 holds the last committed token.
        parents: `parents[i] < i`; of node 0 it is -1.
        chances: how likely each node was said to be accepted, given that its parent was.
        sources: codes of who proposed each node; `lookahead.sources.codes.name_of` names them.
        probes: nodes that ran and can't be accepted.
        path: nodes that were accepted, from the root down.
    """

    row: int
    ran: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    chances: tuple[float, ...]
    sources: tuple[int, ...]
    probes: tuple[int, ...]
    path: tuple[int, ...]

    def __post_init__(self) -> None:
        size = len(self.tokens)
        if not 0 < self.ran <= size or {len(self.parents), len(self.chances), len(self.sources)} != {size}:
            raise ValueError("a tree whose nodes all have a token, parent, chance and source")
        if self.parents[0] != -1 or any(not 0 <= parent < i for i, parent in enumerate(self.parents) if i):
            raise ValueError("a tree whose parents come before their children")
        if any(not 0 < node < self.ran for node in self.probes):
            raise ValueError("a tree whose probes ran")
        steps = zip(self.path, self.path[1:], strict=False)
        if self.path[:1] not in ((), (0,)) or any(b >= self.ran or self.parents[b] != a for a, b in steps):
            raise ValueError("a tree whose path goes from its root from child to child")


class Grown(Sequence[Tree]):
    """The trees of a pass, each packed into its bytes and unpacked when it is asked for.

    Args:
        drafts: of each row that drafted, its number, what the drafter proposed, what of that ran, and the path.
    """

    __slots__ = ("_packed",)

    def __init__(self, drafts: Iterable[tuple[int, Draft, Draft, Sequence[int]]]) -> None:
        self._packed = [
            (row, _packed(ran), None if offered is ran else _packed(offered), tuple(path))
            for row, offered, ran, path in drafts
            if len(offered) > 1 or len(ran) > 1
        ]

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tree, ...]: ...
    def __getitem__(self, index: int | slice) -> Tree | tuple[Tree, ...]:
        if isinstance(index, slice):
            return tuple(_tree(*packed) for packed in self._packed[index])
        return _tree(*self._packed[index])

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Grown | tuple) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(tuple(self))


Packed = tuple[bytes, bytes, bytes, bytes, bytes]


def _packed(draft: Draft) -> Packed:
    columns = (draft.tokens, draft.parents, draft.weight, draft.source, draft.probe)
    return tuple(column.tobytes() for column in columns)  # type: ignore[return-value]


def _unpacked(packed: Packed) -> list[Any]:
    return [array(kind, column).tolist() for kind, column in zip("iifBB", packed, strict=True)]


def _tree(row: int, ran: Packed, offered: Packed | None, path: tuple[int, ...]) -> Tree:
    """Return the tree that ran, and behind it the nodes that were proposed and did not run."""
    tokens, parents, chances, sources, probes = _unpacked(ran)
    size = len(tokens)
    if offered is not None:
        # Equal siblings are joined, but for a probe beside another node, so that this names a node.
        known = {(parents[i], tokens[i], probes[i]): i for i in range(size)}
        place: list[int] = []
        for token, parent, chance, source, probe in zip(*_unpacked(offered), strict=True):
            above = place[parent] if parent >= 0 else -1
            node = known.setdefault((above, token, probe), len(tokens))
            place.append(node)
            if node == len(tokens):
                for column, value in zip(
                    (tokens, parents, chances, sources), (token, above, chance, source), strict=True
                ):
                    column.append(value)
    guesses = tuple(i for i in range(size) if probes[i])
    return Tree(row, size, tuple(tokens), tuple(parents), tuple(chances), tuple(sources), guesses, path)
