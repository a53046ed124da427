"""The last values of something that now and then takes far longer than usual."""

from __future__ import annotations

from collections import deque


class Recent:
    """The last `length` values; their median takes no notice of a few that are off, as when something is compiled."""

    def __init__(self, length: int) -> None:
        self._values: deque[float] = deque(maxlen=length)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Take in a value, for which the oldest one is forgotten."""
        self._values.append(value)

    def copy(self) -> Recent:
        """Return the same values apart."""
        other = Recent(self._values.maxlen or 0)
        other._values.extend(self._values)
        return other

    @property
    def total(self) -> float:
        """The sum."""
        return sum(self._values)

    @property
    def median(self) -> float:
        """The median, of two the smaller; 0 where there are none."""
        return sorted(self._values)[(len(self._values) - 1) // 2] if self._values else 0.0

    @property
    def mean(self) -> float:
        """The mean, values above three times the median counted as that."""
        most = 3.0 * self.median
        return sum(min(value, most) for value in self._values) / max(len(self._values), 1)
