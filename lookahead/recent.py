"""What something took of late, where it now and then takes far longer than usual."""

from __future__ import annotations

from collections import deque

import numpy as np

RECENT = 16  # passes that are looked at
_LEAST = 8  # drafts before anything is said of them
_TEXTS, _FEW, _BEFORE = 4, 4, 1.0  # texts that count, passes that make one, and those that earlier ones are worth


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
    def trimmed(self) -> float:
        """The mean without the largest value, where there are more than two."""
        values = sorted(self._values)
        values = values[:-1] if len(values) > 2 else values
        return sum(values) / max(len(values), 1)

    @property
    def mean(self) -> float:
        """The mean, values above three times the median counted as that."""
        most = 3.0 * self.median
        return sum([value if value < most else most for value in self._values]) / max(len(self._values), 1)


class Rate:
    """Seconds a token took of late in one text.

    Args:
        usual_token_s: what was usual in other texts, taken for as much as `_BEFORE` passes say; 0: not known.
        usual_s: seconds that a pass counts for at most, likewise.

    Attributes:
        token_s: seconds a token; 0 before anything is known.
        usual_s: seconds that a pass counts for at most.
        passes: that were taken in.
    """

    def __init__(self, usual_token_s: float = 0.0, usual_s: float = 0.0) -> None:
        self._seconds, self._tokens = Recent(RECENT), Recent(RECENT)
        self._before = usual_token_s
        self.token_s, self.usual_s = usual_token_s, usual_s
        self.passes = 0

    def add(self, seconds: float, tokens: int) -> None:
        """Take in a pass. One that took far longer than usual counts as a long one, no more."""
        self.passes += 1
        self._seconds.add(seconds)
        self._tokens.add(tokens)
        self.usual_s = 3.0 * self._seconds.median
        total, known = self._tokens.total, len(self._seconds)
        if total:
            self.token_s = self._seconds.mean * known / total
            if self._before and self.token_s:  # a coarse clock may stand still
                self.token_s *= (self._before / self.token_s) ** (_BEFORE / (_BEFORE + known))


class UsualRate:
    """Seconds a token took in earlier texts: each begins with it, and soon goes its own way."""

    def __init__(self) -> None:
        self._texts, self._token_s = 0, 0.0
        self._last = Rate()

    def begin(self) -> Rate:
        """Return the rate of another text; what the one before it has shown is taken in now."""
        last = self._last
        if last.passes >= _FEW and last.token_s:
            self._texts += 1
            usual = self._token_s or last.token_s
            self._token_s = usual * (last.token_s / usual) ** (1.0 / min(self._texts, _TEXTS))
        self._last = Rate(self._token_s, last.usual_s)
        return self._last


class Slope:
    """What one more node costs to draft: a line through recent drafts."""

    def __init__(self) -> None:
        self._drafts: deque[tuple[int, float]] = deque(maxlen=2 * RECENT)

    def add(self, nodes: int, seconds: float) -> None:
        """Take in drafts of `nodes` nodes in all."""
        self._drafts.append((nodes, seconds))

    @property
    def value(self) -> float:
        """Seconds a node; 0 while drafts are few, or all of one size."""
        if len(self._drafts) < _LEAST:
            return 0.0
        nodes, seconds = np.array(self._drafts).T
        usual = seconds <= 3.0 * np.median(seconds)
        nodes, seconds = nodes[usual] - nodes[usual].mean(), seconds[usual]
        spread = float(nodes @ nodes)
        return max(float(nodes @ seconds) / spread, 0.0) if spread > len(nodes) else 0.0
