"""How many nodes a pass may cost: as many as pay, by a cost curve and chances that are learnt on the way."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from lookahead.cost import CostCurve, Costs, assumed_slope
from lookahead.curves import Curves
from lookahead.errors import InvalidArgument
from lookahead.purse import ASKING, Purse
from lookahead.recent import Slope, UsualRate
from lookahead.static.shapes import MAX_NODES, Counts
from lookahead.switch import Switch
from lookahead.trust import UsualTrust

_Key = tuple[int, tuple[Hashable, str, str]]  # rows, and the kind of pass, device, model


class _Usual(threading.local):
    """The budgets of this thread by model, as long as there is the model."""

    def __init__(self) -> None:
        self.budgets: WeakKeyDictionary[Any, Budget] = WeakKeyDictionary()


_USUAL = _Usual()


class Budget:
    """Runs as many nodes as pay: of the likeliest ones the prefix that gives the most tokens a second.

    What it learns outlives a request: what a pass costs (`lookahead.cost`), how far the weights of drafts can be
    believed (`lookahead.trust`), and how long a token takes. It changes how fast a text comes, never the text.

    Args:
        most: drafted nodes that a row may ever run.
        explore: part of the time that may be spent on finding out: passes of other sizes, drafts where none has paid.
        curves: a file written by `lookahead calibrate`; what it knows of this model and machine is where learning
            starts. One that knows nothing of them changes nothing.

    Raises:
        InvalidArgument: a number out of range.
        InvalidInput: `curves` cannot be read.

    >>> la = Lookahead(model, budget=Budget(most=128))
    """

    def __init__(self, *, most: int = 64, explore: float = 0.01, curves: str | Path | None = None) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= MAX_NODES:
            raise InvalidArgument(f"most={most!r}; give a whole number from 0 (plain decoding) to {MAX_NODES}")
        if isinstance(explore, bool) or not isinstance(explore, int | float) or not 0.0 <= explore <= 1.0:
            raise InvalidArgument(f"explore={explore!r}; give a part of the time, from 0 to 1")
        self.most, self.explore = most, float(explore)
        self.fixed = False
        self.saved = 0.0  # seconds that passes of other sizes may cost
        self._stored = None if curves is None else Curves.load(curves)
        self._curves: dict[_Key, CostCurve] = {}
        self._rates: dict[_Key, UsualRate] = {}
        self._trusts: dict[_Key, UsualTrust] = {}
        self._switches: dict[_Key, Switch] = {}
        self._growths: dict[_Key, Slope] = {}

    @classmethod
    def usual(cls, model: Any) -> Budget:
        """Return the budget that all `Lookahead` of a model share in this thread, unless given another, or a drafter.

        What was learnt of a model by one call is known to the next, also where each makes a `Lookahead` of its own.
        """
        return _USUAL.budgets.setdefault(model, cls())

    @classmethod
    def of(cls, nodes: int) -> Budget:
        """Return the budget that always runs the `nodes` likeliest nodes, and rests never."""
        if isinstance(nodes, bool) or not isinstance(nodes, int) or not 0 <= nodes <= MAX_NODES:
            raise InvalidArgument(f'nodes={nodes!r}; give "auto", or a whole number from 0 (plain) to {MAX_NODES}')
        budget = cls(most=nodes, explore=0.0)
        budget.fixed = True
        return budget

    def begin(
        self,
        rows: int,
        kind: Hashable = (),
        *,
        device: str = "cpu",
        model: str = "",
        guided: bool = False,
        counts: Counts | None = None,
        measured: Costs | None = None,
    ) -> Purse:
        """Return what the batch of one call may spend.

        Args:
            rows: the batch size.
            kind: of its passes, as far as it matters for what they cost.
            device: the type of the device that the model runs on.
            model: names it, among the stored curves too.
            guided: whether a grammar says what may be drafted.
            counts: how many rows passes run for their nodes; None: one for each.
            measured: seconds of passes by their nodes, where somebody has measured them.
        """
        key = rows, ((kind, counts), device, model)
        if key not in self._curves:
            self._curves[key] = self._new_curve(rows, device, model, counts, measured)
            self._rates[key], self._trusts[key] = UsualRate(), UsualTrust(guided=guided)
            self._switches[key], self._growths[key] = Switch(explore=ASKING * self.explore), Slope()
        trust, rate = self._trusts[key].begin(), self._rates[key].begin()
        curve, growing, usual = self._curves[key], self._growths[key], self._switches[key]
        return Purse(self, rows, curve, growing, trust, rate, usual, guided=guided, counts=counts)

    def _new_curve(
        self,
        rows: int,
        device: str,
        model: str,
        counts: Counts | None,
        measured: Costs | None,
    ) -> CostCurve:
        """Return a curve that starts from one that was stored or measured, or else from the nearest batch size's."""
        slope = assumed_slope(device)
        stored = None if self._stored is None else self._stored.find(model, rows)
        if counts is not None and (counts.fixed or device == "cpu"):  # those are not the passes that were measured
            stored = None
        if stored is not None:
            return CostCurve(slope=slope, known=stored, measured=True)
        if measured is not None:  # in a few passes, which may have been disturbed
            return CostCurve(slope=slope, known=measured)
        known = [
            (batch, curve)
            for (batch, (_, *where)), curve in self._curves.items()
            if curve.passes and where == [device, model]
        ]
        if not known:
            return CostCurve(slope=slope)
        other, curve = min(known, key=lambda one: abs(math.log(one[0] / rows)))
        return CostCurve(slope=slope, known=lambda nodes: curve.seconds(np.maximum(nodes * rows / other, 1.0)))
