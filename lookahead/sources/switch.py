"""Whether the window runs: it rests where its rows cost more time than its n-grams save."""

from __future__ import annotations

from collections import deque

import numpy as np

RECENT = 64  # passes that the price of a row is estimated from
LEAST = 16  # passes before anything is estimated or compared
BLOCK = 24  # passes of a trial
TRIALS = 2  # blocks with the window, and as many without
CHEAP = 0.1  # of a pass's time is what the window may cost to be worth a trial
LASTING = 512  # passes before what was found is tried again


class Switch:
    """Switches between passes with and without the window, by tokens per second.

    What a row costs is estimated at no cost, from the passes as they come: trees differ in size. Only where the rows of
    the window would be cheap is it tried, in turns with passes without it. Where all trees are of one size, a single
    pass with the window shows the price.

    Args:
        probes: rows of the window.

    Attributes:
        on: whether the window runs in the next pass.
    """

    def __init__(self, probes: int) -> None:
        self.on = False
        self._probes = probes
        self._passes: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._left = LEAST  # passes until the next decision
        self._row = 0
        self._trying = self._peeking = False
        self._rates: tuple[list[float], list[float]] = ([], [])  # tokens per second, without and with the window
        self._tokens, self._seconds = 0, 0.0

    def observe(self, rows: int, seconds: float, tokens: int, row: int = 0) -> None:
        """Take in what one row of the batch got from a pass over `rows` rows: `tokens` tokens.

        Args:
            row: rows come in rising order, so a smaller one begins the next pass.
        """
        self._tokens += tokens
        same, self._row = bool(self._passes) and row > self._row, row
        if same:
            return
        self._passes.append((rows, seconds))
        typical = float(np.median([one[1] for one in tuple(self._passes)]))  # other threads may append meanwhile
        self._seconds += min(seconds, 3 * typical)  # a hiccup of the machine says nothing of the window
        self._left -= 1
        if self._left <= 0:
            self._decide()
            self._tokens, self._seconds = 0, 0.0

    def _decide(self) -> None:
        """Go on with the trial, end it with the better way, or begin one where the price allows it."""
        if self._trying:
            self._rates[self.on].append(self._tokens / max(self._seconds, 1e-9))
        elif not self.on or self._peeking:
            price, peeked = self._price(), self._peeking
            self.on = self._peeking = price is None and not peeked
            if price is None or price > CHEAP:
                self._left = 1 if self._peeking else LASTING if peeked else LEAST
                return
        if self._trying and all(len(rates) >= TRIALS for rates in self._rates):
            without, with_it = (sum(rates) for rates in self._rates)
            self.on, self._left, self._trying = with_it > without, LASTING, False
        else:
            self.on, self._left, self._trying = self.on ^ self._trying, BLOCK, True
        if not self._trying:
            self._rates = ([], [])

    def _price(self) -> float | None:
        """Return the part of a pass's time that the window would add, by a line through recent passes.

        None where they are all of one size.
        """
        rows, seconds = np.array(tuple(self._passes)).T
        usual = seconds <= 3 * np.median(seconds)
        rows, seconds = rows[usual], seconds[usual]
        if np.ptp(rows) < min(4, self._probes):
            return None
        slope = np.polyfit(rows, seconds, 1)[0]
        return float(max(slope, 0.0) * self._probes / seconds.mean())
