"""A drafter that writes down what drafters are told."""

from __future__ import annotations

from typing import Any

import numpy as np

from lookahead import Draft, Drafter, Step
from lookahead.sources.noise import Noise


class Watcher(Drafter):
    """Passes everything on to another drafter and writes down what it saw."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.rows: list[WatcherRow] = []

    def start(self, context: Any) -> Drafter:
        self.rows.append(WatcherRow(self.inner.start(context), context.tolist()))
        return self.rows[-1]

    def propose(self, context: Any, budget: int) -> Draft:
        raise AssertionError("propose() belongs to the object that start() returns")


class WatcherRow(Drafter):
    """What was seen of one row.

    Attributes:
        prompt: the context at the start.
        contexts: the context of every `propose`.
        drafts: what the inner drafter proposed.
        steps: every `Step`.
        drawn: what every node of it would draw, where that is known.
    """

    def __init__(self, inner: Drafter, prompt: list[int]) -> None:
        self.inner, self.prompt, self.probes = inner, prompt, inner.probes
        self.contexts: list[list[int]] = []
        self.drafts: list[Draft] = []
        self.steps: list[Step] = []
        self.drawn: list[Any] = []

    def foresee(self, noise: Noise) -> bool:
        return self.inner.foresee(noise)

    def propose(self, context: Any, budget: int) -> Draft:
        self.contexts.append(context.tolist())
        self.drafts.append(self.inner.propose(context, budget))
        return self.drafts[-1]

    def observe(self, step: Step) -> None:
        self.steps.append(step)
        self.drawn.append(None if step.foreseen is None else step.foreseen(np.arange(len(step.draft), dtype=np.int32)))
        self.inner.observe(step)
