"""Whether something that costs time even when it brings nothing is worth its price."""

from __future__ import annotations

from lookahead.recent import Recent

RECENT = 32  # turns that gain and price are averaged over
LEAST = 8  # turns before anything is judged
MARGIN = 1.2  # of gain over price: both are estimates, and nothing may make a text slower
_HELD = 4.0  # prices of a spell that are saved up at most


class Switch:
    """Stays on while it gains more than it costs; is tried again only as far as a small part of the time pays for it.

    Args:
        explore: part of the time that may be spent on trying what has not paid.
        spell: turns that a trial takes.
        on: whether it begins on.

    Attributes:
        on: whether it is on in the next turn.
        paying: whether it is on because it pays, or has not been judged yet.
        gain: seconds a turn, the average of late while it was on.
        price: seconds a turn, averages of late; one that is far off counts little.
    """

    def __init__(self, *, explore: float = 0.01, spell: int = 1, on: bool = True) -> None:
        self.on = self.paying = on
        self.gain = self.price = 0.0
        self._explore, self._spell = explore, spell
        self._saved = 0.0
        self._prices = Recent(2 * LEAST)
        self._quoted = False  # whether its price is known
        self._turns = self._left = 0

    def follow(self, other: Switch) -> None:
        """Begin where `other` has got to, which was about the like, with one turn to prove it wrong."""
        self.gain, self.price, self.paying = other.gain, other.price, other.paying
        self._prices, self._quoted = other._prices.copy(), other._quoted
        self._turns, self._left, self.on = min(other._turns, LEAST), 1, True

    def quote(self, price: float) -> None:
        """Tell what a turn would cost now, while it is off."""
        self.price, self._quoted = price, True
        self.paying = self._turns >= LEAST and self.gain >= MARGIN * price

    def observe(self, seconds: float, *, gain: float = 0.0, price: float = 0.0) -> None:
        """Take in one turn.

        Args:
            seconds: that went by in it.
            gain: seconds that it saved, where it was on.
            price: seconds that it took.
        """
        self._saved += self._explore * seconds
        if self.on:
            self._left -= 1
            if not self.paying:
                self._saved -= max(price - gain, 0.0)
            self.note(gain, price)
        whole = self.price * self._spell
        self._saved = min(self._saved, _HELD * max(whole, self.price))
        if not (self.paying or (self.on and self._left > 0)):
            self.on = self._explore > 0.0 and self._quoted and whole <= self._saved
            self._left = self._spell
        elif self.paying:
            self.on = True

    def extend(self) -> None:
        """Stay on for another turn, because the last one promised to pay; as long as such promises do not cost much."""
        if self._saved > -_HELD * self.price:
            self.on, self._left = True, max(self._left, 1)

    def note(self, gain: float, price: float) -> None:
        """Take in what a turn that was on gained and cost, and judge."""
        self._turns += 1
        part = 1.0 / min(self._turns, RECENT)
        self.gain += (gain - self.gain) * part
        self._prices.add(price)
        self.price, self._quoted = self._prices.trimmed, True
        if self._turns >= LEAST:
            self.paying = self.gain >= MARGIN * self.price
