"""How far the chains of a batch are worth running, by what the engine's steps have taken."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lookahead.cost import CostCurve
from lookahead.draft import FloatArray, IntArray
from lookahead.recent import Recent
from lookahead.switch import Switch

EXPLORE = 0.01
"""Part of the time that drafting may take where it has not paid."""

_SPELL = 8  # steps of such a trial
_YOUNG, _OFTEN, _SELDOM = 32, 16, 128  # steps at first, and after how many of them another number of tokens runs
_RECENT, _WAITED = 16, 8.0  # steps of late, and how many times their median is no step but a wait for requests


class Worth:
    """Chooses which drafted tokens of a batch run: as many of the likeliest as give the most tokens a second.

    Args:
        slope: what one more row of a step is assumed to cost before anything is known, as a part of a step of one row.
    """

    def __init__(self, *, slope: float) -> None:
        self._curve = CostCurve(slope=slope)
        self._switch = Switch(explore=EXPLORE, spell=_SPELL)
        self._steps = Recent(_RECENT)
        self._turns = self._tried = 0

    @property
    def drafts(self) -> bool:
        """Whether the next step is worth drafting for at all."""
        return self._switch.on

    def observe(
        self, *, rows: int, drafted: int, tokens: int, seconds: float, drafting_s: float, context: int = 0
    ) -> None:
        """Take in a step that read no prompt.

        Args:
            rows: requests that it went on with.
            drafted: tokens that it verified beside.
            tokens: that came of it.
            seconds: from the drafts to the next call.
            drafting_s: what drafting took before it.
            context: the mean length of the requests.
        """
        usual = self._steps.median
        self._steps.add(seconds)
        if usual and seconds > _WAITED * usual:
            return
        self._curve.add(rows + drafted, seconds, context=context)
        plain_s, own_s = self._curve.seconds(np.array([rows, rows + drafted]), context=context).tolist()
        gain = max(tokens - rows, 0) * plain_s / rows - max(own_s - plain_s, 0.0)
        on = self._switch.on
        self._switch.observe(seconds + drafting_s, gain=gain if on else 0.0, price=drafting_s if on else 0.0)

    def cut(self, chances: FloatArray, drafted: IntArray, *, rows: int, context: int = 0) -> NDArray[np.int64]:
        """Return [B] how many of its drafted tokens each row runs.

        Args:
            chances: [B, N] that a token is accepted, falling along a row; `drafted`: [B] how many there are.
            rows: requests that bring a token in any case.
            context: the mean length of the requests.
        """
        self._turns += 1
        there = np.arange(chances.shape[1]) < drafted[:, None]
        falling = np.sort(chances[there].astype(np.float64))[::-1]
        expected = rows + np.concatenate([[0.0], np.cumsum(falling)])
        best = int(np.argmax(expected / self._curve.seconds(rows + np.arange(len(expected)), context=context)))
        if self._turns % (_OFTEN if self._turns <= _YOUNG else _SELDOM) == 0:
            best = self._other(best, len(falling))
        least = falling[best - 1] if best else np.inf
        kept: NDArray[np.int64] = (there & (chances >= least)).sum(1)
        return kept

    def _other(self, best: int, most: int) -> int:
        """Return another number of tokens than seems best: of what has never run it is not known what it takes."""
        self._tried += 1
        others = [number for number in (0, (most + 1) // 2, most) if number != best]
        return others[self._tried % len(others)] if others else best
