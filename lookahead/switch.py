"""Whether something that costs time even when it brings nothing is worth its price."""

from __future__ import annotations

RECENT = 32  # turns that gain and price are averaged over
LEAST = 8  # turns before anything is judged
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
        gain, price: seconds a turn, averages of late while it was on.
    """

    def __init__(self, *, explore: float = 0.01, spell: int = 1, on: bool = True) -> None:
        self.on = self.paying = on
        self.gain = self.price = 0.0
        self._explore, self._spell = explore, spell
        self._saved = 0.0
        self._turns = self._left = 0

    def follow(self, other: Switch) -> None:
        """Begin where `other` has got to, which was about something of the same kind, with one turn to prove it wrong."""
        self.gain, self.price, self.paying = other.gain, other.price, other.paying
        self._turns, self._left, self.on = min(other._turns, LEAST), 1, True

    def quote(self, price: float) -> None:
        """Tell what a turn would cost, as long as it has not been on."""
        if self._turns == 0:
            self.price = price

    def observe(self, seconds: float, *, gain: float = 0.0, price: float = 0.0) -> None:
        """Take in one turn.

        Args:
            seconds: that went by in it.
            gain: seconds that it saved, where it was on.
            price: seconds that it took.
        """
        self._saved += self._explore * seconds
        if self.on:
            if not self.paying:
                self._saved -= max(price - gain, 0.0)
                self._left -= 1
            self.note(gain, price)
        whole = self.price * self._spell
        self._saved = min(self._saved, _HELD * max(whole, self.price))
        if self.paying or (self.on and self._left > 0):
            self.on = True
        else:
            self.on = 0.0 < whole <= self._saved
            self._left = self._spell

    def note(self, gain: float, price: float) -> None:
        """Take in what a turn that was on gained and cost, and judge."""
        self._turns += 1
        part = 1.0 / min(self._turns, RECENT)
        self.gain += (gain - self.gain) * part
        self.price += (price - self.price) * part
        self.paying = self._turns < LEAST or self.gain >= self.price
