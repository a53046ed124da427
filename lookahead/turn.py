"""One step of the loop while it goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lookahead.draft import Draft
from lookahead.purse import Choice


@dataclass(slots=True)
class Turn:
    """One step while it goes on.

    Attributes:
        starts: columns that each row had before it.
        going: rows that may pick a token of their own.
        asked: those of them that draft.
        context: slots of the key-value cache in use.
        offered: what the drafters of the rows that draft proposed.
        proposed: what of that may run, of which `drafts` are a part.
        asking_s: for each row that drafts, the seconds of its draft and of what is learnt from it.
        prepared_s, model_s: what inputs and model took of the pass.
        costs: of the drafters, by row: seconds that single sources took.
        laps: the seconds of drafting, verifying, keeping and learning.
        opens: whether it ran the prompt, too.
    """

    starts: list[int]
    going: list[int]
    asked: list[int]
    context: int
    begin: float
    drafts: list[Draft] = field(default_factory=list)
    choice: Choice = Choice(0, "rests", 0.0)  # noqa: RUF009 - it does not change
    best: Any = None
    paths: list[list[int]] = field(default_factory=list)
    offered: dict[int, Draft] = field(default_factory=dict)
    proposed: dict[int, Draft] = field(default_factory=dict)
    masks: int = 0
    asking_s: dict[int, float] = field(default_factory=dict)
    prepared_s: float = 0.0
    model_s: float = 0.0
    costs: dict[int, Mapping[str, float]] = field(default_factory=dict)
    laps: list[float] = field(default_factory=list)
    opens: bool = False

    @property
    def size(self) -> int:
        """Nodes that every row runs."""
        return max(len(draft) for draft in self.drafts)

    @property
    def seconds(self) -> float:
        """The time of the laps so far."""
        return sum(self.laps)

    def lap(self) -> None:
        """End a part of the step."""
        self.laps.append(time.perf_counter() - self.begin - self.seconds)
