"""Which of the sources run that take time even when nothing of theirs is accepted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lookahead.sources.codes import GRAMMAR, JACOBI, POOL
from lookahead.switch import Switch
from lookahead.trace import Step

SPELLS = {"jacobi": 24, "pool": 8, "grammar": 8}
"""Passes of a trial: a window has to fill before it can bring anything."""

CODES = {"jacobi": JACOBI, "pool": POOL, "grammar": GRAMMAR}
EXPLORE = 0.001  # part of the time that trials of one source may take


class Paid:
    """Switches sources on and off by one rule: what their accepted nodes are worth against what they take.

    A node counts for the source that says most of it, so a source that only confirms what others know earns nothing.

    Args:
        names: of the sources that may rest.
        resting: those of them that begin at rest.
    """

    def __init__(self, names: Iterable[str], *, resting: Iterable[str] = ()) -> None:
        off = set(resting)
        self.switches = {name: Switch(explore=EXPLORE, spell=SPELLS[name], on=name not in off) for name in names}
        self._pass: dict[str, tuple[float, float, bool]] = {}  # gain, price, whether it ran, over the rows so far
        self._row, self._seconds = -1, 0.0

    def runs(self, name: str) -> bool:
        """Whether a source runs in the next pass; always, if it is none that may rest."""
        switch = self.switches.get(name)
        return switch is None or switch.on

    def observe(self, step: Step, prices: Mapping[str, float], ran: Mapping[str, bool]) -> None:
        """Take in what one row got from a pass.

        Args:
            prices: seconds that each source took for this row, or would have taken.
            ran: whether it ran.
        """
        if step.token_s == 0.0:
            return
        if step.row <= self._row:
            self._end_pass()
        self._row, self._seconds = step.row, step.seconds
        codes = step.draft.source[step.path[1:]]
        for name in self.switches:
            if name in prices and (step.frugal or name == "jacobi"):
                worth = float(np.count_nonzero(codes == CODES[name])) * step.token_s if ran[name] else 0.0
                gain, price, _ = self._pass.get(name, (0.0, 0.0, False))
                self._pass[name] = gain + worth, price + prices[name], ran[name]

    def _end_pass(self) -> None:
        """Tell the switches of the pass that has ended; rows come in rising order."""
        for name, (gain, price, ran) in self._pass.items():
            switch = self.switches[name]
            if not ran:
                switch.quote(price)
            switch.observe(self._seconds, gain=gain, price=price)
        self._pass.clear()


class Timing:
    """Seconds that drafting takes a node, with a source and without it."""

    def __init__(self) -> None:
        self._means = {True: 0.0, False: 0.0}
        self._counts = {True: 0, False: 0}

    def add(self, seconds: float, nodes: int, *, with_it: bool) -> None:
        """Take in the time of one draft."""
        self._counts[with_it] += 1
        part = 1.0 / min(self._counts[with_it], 32)
        self._means[with_it] += (seconds / (nodes + 1) - self._means[with_it]) * part

    def price(self, nodes: int) -> float:
        """Return what the source takes for a draft of `nodes` nodes; all of the time while it is not known without."""
        return max(self._means[True] - self._means[False], 0.0) * (nodes + 1)
