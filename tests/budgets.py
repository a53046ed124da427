"""Budgets that decide at random, for the law that no budget changes an output."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from lookahead import Budget, Draft
from lookahead.purse import Choice, Purse


class Dice(Budget):
    """Throws dice: who drafts, from which chance on, and how many nodes run; nothing that is learnt counts."""

    def __init__(self, most: int, seed: int) -> None:
        super().__init__(most=most)
        self.random = random.Random(seed)

    def begin(self, rows: int, kind: Any = (), **where: Any) -> Purse:
        purse = super().begin(rows, kind, **where)
        purse.__class__ = DicePurse
        purse.random = self.random  # type: ignore[attr-defined]
        return purse


class DicePurse(Purse):
    """The purse of `Dice`."""

    random: random.Random

    def asks(self, row: int) -> bool:
        return self.most > 0 and self.random.random() < 0.7

    def trusts(self, row: int) -> bool:
        return self.random.random() < 0.5

    def prepare(self, rows: int, context: int) -> None:
        super().prepare(rows, context)
        least = self.random.choice((0.0, 0.05, 0.5, 2.0))
        self.floors = np.linspace(0, least, self.most + 1, dtype=np.float32) if self.random.random() < 0.7 else None

    def choose(self, drafts: Mapping[int, Draft], rows: int) -> tuple[Choice, Mapping[int, Draft]]:
        choice, _ = super().choose(drafts, rows)
        nodes = min(self.random.choice((0, 1, 2, self.most // 2, self.most)), self.most)
        chances = {row: self._trust.chances(draft) for row, draft in drafts.items()}
        kept = {row: draft.trim(nodes, chances[row]) for row, draft in drafts.items()}
        return Choice(nodes if drafts else 0, choice.why, choice.expected, choice.token_s, choice.row_s), kept


class Clock:
    """A clock that goes on by anything from nothing to seconds, whatever happens."""

    def __init__(self, seed: int) -> None:
        self._random, self._now = random.Random(seed), 0.0

    def perf_counter(self) -> float:
        self._now += self._random.choice((0.0, 1e-5, 1e-4, 1e-4, 1e-3, 0.1)) * self._random.random()
        return self._now
