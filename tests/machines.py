"""A machine made of numbers, to spend a budget on: passes take what a function says, drafts are right by chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lookahead.budget import Budget
from lookahead.draft import Draft
from lookahead.purse import Choice, Spent

Price = Callable[[int], float]
NEVER = 10**6  # a token that nobody drafts


@dataclass
class Row:
    """One row of a batch: its drafter proposes a chain.

    Attributes:
        claim: the weight of every node.
        truth: the chance that a node is right if its parent was.
        nodes: how many there are.
        open: whether the row goes on.
    """

    claim: float
    truth: float
    nodes: int = 24
    open: bool = True

    def draft(self, most: int, floors: np.ndarray | None) -> Draft:
        """Return what is proposed, as far as nodes are worth it."""
        chain = Draft.chain(range(1, min(self.nodes, most) + 2), weight=self.claim)
        if floors is None:
            return chain
        worth = chain.path_weight()[1:] >= floors[1 : len(chain)]
        return chain.cut(len(worth) if worth.all() else int(worth.argmin()))


@dataclass(frozen=True)
class Ran:
    """One pass.

    Attributes:
        size: nodes of every row, root included.
        asked: how many rows drafted.
        tokens: that each open row committed.
        asking_s: seconds of their drafts.
        seconds: of the whole step.
    """

    choice: Choice
    size: int
    asked: int
    tokens: Mapping[int, int]
    asking_s: float
    seconds: float


class Machine:
    """Decodes a batch without a model.

    Args:
        price: seconds of a pass over so many nodes.
        asking: seconds of one draft.
        noise: how much passes of one size differ.
        hiccups: chance of a pass that takes 2 to 50 times as long.
        first: how many times as long the first pass takes.
        model: which model it stands for.

    Attributes:
        passes: all that ran.
    """

    def __init__(
        self,
        budget: Budget,
        price: Price,
        *rows: Row,
        asking: float = 0.02,
        noise: float = 0.03,
        hiccups: float = 0.0,
        first: float = 1.0,
        seed: int = 0,
        model: str = "",
    ) -> None:
        self.budget, self.price, self.rows, self.asking = budget, price, rows, asking
        self.noise, self.hiccups, self.first = noise, hiccups, first
        self.purse, self.random = budget.begin(len(rows), model=model), np.random.default_rng(seed)
        self.passes: list[Ran] = []

    def run(self, passes: int) -> list[Ran]:
        """Let so many passes go by, and return them."""
        for _ in range(passes):
            self.passes.append(self._step())
        return self.passes[-passes:]

    def _step(self) -> Ran:
        going = [row for row, one in enumerate(self.rows) if one.open]
        asked = [row for row in going if self.purse.asks(row)]
        if asked:
            self.purse.prepare(len(asked), 100)
        proposed = {row: self.rows[row].draft(self.purse.most, self.purse.floors) for row in asked}
        choice, drafts = self.purse.choose(proposed, len(going))
        size = max([1, *(len(draft) for draft in drafts.values())])
        followed, tokens = {row: self._text(row) for row in going}, dict.fromkeys(going, 1)
        for row, draft in drafts.items():
            tokens[row] += min(len(followed[row]) - 1, len(draft) - 1)
        pass_s, asking_s = self._seconds(size), dict.fromkeys(asked, self.asking)
        spent = Spent(
            size=size,
            context=100,
            masks=0,
            pass_s=pass_s,
            step_s=pass_s + sum(asking_s.values()),
            asking_s=asking_s,
            grown=(sum(len(draft) - 1 for draft in proposed.values()), sum(asking_s.values())),
            tokens=tokens,
            choice=choice,
        )
        self.purse.observe(spent, [(proposed[row], followed[row][: tokens[row]]) for row in asked])
        return Ran(choice, size, len(asked), tokens, sum(asking_s.values()), spent.step_s)

    def _text(self, row: int) -> np.ndarray:
        """Return what follows the root of a row: what its drafter knows, and then another token."""
        right = self.random.random(64) < self.rows[row].truth
        count = min(64 if right.all() else int(right.argmin()), self.rows[row].nodes)
        return np.array([*range(2, 2 + count), NEVER], np.int64)

    def _seconds(self, size: int) -> float:
        seconds = self.price(size) * float(np.exp(self.noise * self.random.standard_normal()))
        if self.random.random() < self.hiccups:
            seconds *= float(self.random.uniform(2, 50))
        seconds, self.first = seconds * self.first, 1.0
        return seconds


def lost(passes: Sequence[Ran], price: Price) -> float:
    """Return the seconds that drafts and their nodes took, by what passes cost without noise and hiccups."""
    return sum(one.asking_s + price(one.size) - price(1) for one in passes)


def speedup(passes: Sequence[Ran], price: Price) -> float:
    """Return the time of plain decoding for the same tokens over that of the passes."""
    plain = sum(sum(one.tokens.values()) / len(one.tokens) for one in passes) * price(1)
    return plain / sum(one.seconds for one in passes)


def whys(passes: Sequence[Ran]) -> Counter[str]:
    return Counter(one.choice.why for one in passes)
