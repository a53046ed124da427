"""How many nodes a pass may cost: as many as pay, by a cost curve and chances that are learnt on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lookahead.cost import CostCurve, Seconds
from lookahead.curves import Curves
from lookahead.draft import Draft, FloatArray
from lookahead.errors import InvalidArgument
from lookahead.recent import Recent
from lookahead.switch import Switch
from lookahead.trust import Trust

MAX_NODES = 4096
RECENT = 16  # passes that the rate of late is averaged over
SIZES, ASKING = 0.2, 0.5  # of what may be explored: passes of other sizes, and drafts which have not paid lately
_HELD = 16.0  # passes over one node: what is saved up for passes of other sizes at most
_FRESH, _SELDOM = 8, 32  # passes after which prices are computed anew; where nothing is chosen by them
_CAUTION = 0.8  # of the chance that a node needs is what it needs to be drafted: it may claim too little
_SLOPE = {"cpu": 0.02}  # of a pass: what one more node in every row is assumed to cost, by device
_SLOPE_ELSEWHERE = 0.002


@dataclass(frozen=True, slots=True)
class Choice:
    """How many nodes run, and why.

    Attributes:
        nodes: acceptable nodes below the root that a row may run.
        why: see `lookahead.trace.WHY`.
        expected: tokens that the rows which drafted are expected to commit.
        token_s: seconds that a token was worth; 0: not known.
        row_s: seconds that one more node in every row would cost; 0: not known.
    """

    nodes: int
    why: str
    expected: float
    token_s: float = 0.0
    row_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What a pass took and brought.

    Attributes:
        size: nodes of every row, root included.
        context: slots of the key-value cache before the pass.
        masks: of a grammar, computed while the pass was verified.
        pass_s: seconds from the inputs of the model to the kept rows.
        step_s: seconds of the whole step.
        asking_s: for each row that drafted, the seconds of its draft and of what was learnt from it.
        grown: nodes that were drafted, and the seconds that this took.
        tokens: for each open row, what it committed.
    """

    size: int
    context: int
    masks: int
    pass_s: float
    step_s: float
    asking_s: Mapping[int, float]
    grown: tuple[int, float]
    tokens: Mapping[int, int]


class Budget:
    """Runs as many nodes as pay: of the likeliest ones the prefix that gives the most tokens a second.

    What it learns outlives a request: what a pass costs (`lookahead.cost`), how far the weights of drafts can be believed
    (`lookahead.trust`), and how long a token takes. It changes how fast a text comes, never the text.

    Args:
        most: drafted nodes that a row may ever run.
        explore: part of the time that may be spent on finding out: passes of other sizes, drafts where none has paid.
        curves: a file written by `lookahead calibrate`; what it knows of this model and machine is where learning starts.

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
        self.trust = Trust()
        self.saved = 0.0  # seconds that passes of other sizes may cost
        self._stored = None if curves is None else Curves.load(curves)
        self._curves: dict[Hashable, CostCurve] = {}
        self._rates: dict[Hashable, Rate] = {}
        self._switches: dict[Hashable, Switch] = {}

    @property
    def stored(self) -> bool:
        """Whether curves were given that were measured beforehand."""
        return self._stored is not None

    @classmethod
    def of(cls, nodes: int) -> Budget:
        """Return the budget that always runs the `nodes` likeliest nodes, and rests never."""
        if isinstance(nodes, bool) or not isinstance(nodes, int) or not 0 <= nodes <= MAX_NODES:
            raise InvalidArgument(f'nodes={nodes!r}; give "auto", or a whole number from 0 (plain) to {MAX_NODES}')
        budget = cls(most=nodes, explore=0.0)
        budget.fixed = True
        return budget

    def begin(self, rows: int, kind: Hashable = (), *, device: str = "cpu", model: str = "") -> Purse:
        """Return what the batch of one call may spend.

        Args:
            rows: the batch size.
            kind: of its passes, as far as it matters for what they cost.
            device: the type of the device that the model runs on.
            model: its name among the stored curves.
        """
        key = rows, kind
        if key not in self._curves:
            self._curves[key] = self._new_curve(rows, device, model)
            self._rates[key] = Rate()
            self._switches[key] = Switch(explore=ASKING * self.explore)
        return Purse(self, rows, self._curves[key], self._rates[key], self._switches[key])

    def _new_curve(self, rows: int, device: str, model: str) -> CostCurve:
        """Return a curve that starts from the stored one, or else from that of the nearest batch size, if any."""
        slope = _SLOPE.get(device, _SLOPE_ELSEWHERE)
        stored = None if self._stored is None else self._stored.find(model, rows)
        if stored is not None:
            return CostCurve(slope=slope, known=stored)
        near = min(
            ((abs(np.log(other / rows)), other, curve) for (other, _), curve in self._curves.items() if curve.passes),
            key=lambda one: one[:2],
            default=None,
        )
        if near is None:
            return CostCurve(slope=slope)
        _, other, curve = near
        return CostCurve(slope=slope, known=lambda nodes: curve.seconds(np.maximum(nodes * rows / other, 1.0)))


class Rate:
    """Seconds a token took of late.

    Attributes:
        token_s: seconds a token; 0 before anything is known.
    """

    def __init__(self) -> None:
        self._seconds, self._tokens = Recent(RECENT), Recent(RECENT)
        self.token_s = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        """Take in a pass. One that took far longer than usual counts as a long one, no more."""
        self._seconds.add(seconds)
        self._tokens.add(tokens)
        total = self._tokens.total
        self.token_s = self._seconds.mean * len(self._seconds) / total if total else 0.0


class Purse:
    """The budget at work on one batch.

    Attributes:
        floors: [most + 1] the chance below which a node is not worth drafting when so many are there already, root
            included; None: any is.
    """

    def __init__(self, budget: Budget, rows: int, curve: CostCurve, rate: Rate, usual: Switch) -> None:
        self._budget, self._curve, self._rate, self._usual = budget, curve, rate, usual
        self._switches = [Switch(explore=ASKING * budget.explore) for _ in range(rows)]
        for switch in self._switches:
            switch.follow(usual)
        self._sizes = np.arange(1, budget.most + 2)
        self._seconds = self._hull = np.zeros(0)
        self._priced_at = -_FRESH
        self._unknown: list[int] = []
        self._turns = 0
        self._base = Recent(RECENT)  # seconds of a step outside of its pass
        self._growing, self._node_s = Slope(), 0.0
        self._last = Choice(0, "fixed", 0.0)
        self._explores_from = 0.0  # seconds that an exploring pass would have been worth
        self.floors: FloatArray | None = None

    @property
    def most(self) -> int:
        """Nodes that a row may draft."""
        return self._budget.most

    @property
    def frugal(self) -> bool:
        """Whether sources that do not pay are to rest."""
        return not self._budget.fixed

    def asks(self, row: int) -> bool:
        """Whether `row` drafts in this pass."""
        return self.most > 0 and (self._budget.fixed or self._switches[row].on)

    def trusts(self, row: int) -> bool:
        """Whether drafting pays for `row`, and is not only tried."""
        return self._budget.fixed or self._switches[row].paying

    def prepare(self, rows: int, context: int) -> None:
        """Compute the prices of the next pass, in which `rows` rows draft behind `context` tokens."""
        every = _SELDOM if self._budget.fixed else _FRESH
        if self._turns - self._priced_at >= every or (self._turns < every and not self._budget.fixed):
            self._priced_at = self._turns
            self._seconds = self._curve.seconds(self._sizes, context=context)
            self._hull = _rising(np.diff(self._seconds))
            self._node_s = self._growing.value
            self._unknown = self._curve.unknown(self.most + 1)
        if self._budget.fixed:
            return
        token_s = self._rate.token_s
        if token_s == 0.0 or self._curve.passes == 0 or self._may_explore_beyond():
            self.floors = None
            return
        floors = np.empty(len(self._sizes), np.float32)
        floors[0] = 0.0
        floors[1:] = _CAUTION * (self._hull + self._node_s) / (token_s * max(rows, 1))
        self.floors = floors

    def choose(self, drafts: Mapping[int, Draft], rows: int) -> tuple[Choice, Mapping[int, Draft]]:
        """Return how many nodes of each row run, and the drafts cut to that.

        Args:
            drafts: of the rows that drafted.
            rows: how many rows commit a token in any case.
        """
        if not drafts:
            self._last = self._unasked(rows, float(rows))
            return self._last, drafts
        trust = self._budget.trust
        chances = {row: trust.chances(draft) for row, draft in drafts.items()}
        expected, probes = np.full(self.most + 1, float(rows)), 0
        for row, draft in drafts.items():
            probes = max(probes, add_likeliest(chances[row], draft.probe, expected))
        if self._budget.fixed:
            self._last = self._unasked(rows, float(expected[-1]))
            return self._last, drafts
        # What the largest draft cannot fill is no choice.
        filled = max(len(draft) for draft in drafts.values()) - probes
        self._last = self._weighed(expected[: max(filled, 1)], probes)
        nodes = self._last.nodes
        return self._last, {row: draft.trim(nodes, chances[row]) for row, draft in drafts.items()}

    def _unasked(self, rows: int, expected: float) -> Choice:
        """Return the choice where there is none."""
        why, nodes = ("fixed", self.most) if self._budget.fixed else ("rests", 0)
        return Choice(nodes, why, expected, self._rate.token_s, self._row_s(0))

    def _weighed(self, expected: Seconds, probes: int) -> Choice:
        """Return the choice among `len(expected)` numbers of nodes; `expected` are the tokens of each, for all rows."""
        seconds, known = self._with_probes(probes)[: len(expected)], self._curve.passes > 0
        nodes, token_s = _best(expected, seconds, self._base.median, self._rate.token_s if known else 0.0)
        why = "pays" if nodes else "none pays"
        other = self._explored(expected, seconds, nodes, token_s)
        if other is not None:
            nodes, why = other, "explores"
        row_s = float(seconds[nodes] - seconds[nodes - 1]) if nodes else self._row_s(probes)
        return Choice(nodes, why, float(expected[nodes]), token_s if known else 0.0, row_s if known else 0.0)

    def observe(self, spent: Spent, followed: Iterable[tuple[Draft, NDArray[np.int64]]]) -> None:
        """Learn from a pass, and from what was proposed in it with the tokens that `followed`."""
        for draft, tokens in followed:
            self._budget.trust.observe(draft, tokens)
        if self.most == 0:
            return
        tokens = sum(spent.tokens.values())
        self._turns += 1
        self._curve.add(spent.size, spent.pass_s, context=spent.context, masks=spent.masks)
        self._rate.add(spent.step_s, tokens)
        self._base.add(max(spent.step_s - spent.pass_s, 0.0))
        if spent.asking_s:
            self._growing.add(*spent.grown)
        if self._budget.fixed:
            return
        budget = self._budget
        if self._last.why == "explores":
            self._unknown = self._curve.unknown(self.most + 1)
            budget.saved -= max(spent.pass_s - self._explores_from, 0.0)
        if len(self._seconds):
            held = _HELD * float(self._seconds[0])
            budget.saved = min(budget.saved + SIZES * budget.explore * spent.step_s, held)
        self._judge(spent, tokens)

    def _judge(self, spent: Spent, tokens: int) -> None:
        """Tell the switch of each row what drafting brought it, against plain decoding."""
        rows = max(len(spent.tokens), 1)
        plain_s = float(self._seconds[0]) if len(self._seconds) else 0.0
        extra_s = self._seconds_of(spent.size) - plain_s
        more = max(tokens - rows, 1)
        for row, count in spent.tokens.items():
            gain, price = 0.0, 0.0
            if row in spent.asking_s:
                gain = (count - 1) * plain_s / rows - extra_s * (count - 1) / more
                price = spent.asking_s[row]
            self._switches[row].observe(spent.step_s / rows, gain=gain, price=price)
            if row in spent.asking_s:
                self._usual.note(gain, price)

    def _row_s(self, probes: int) -> float:
        """Return what the next node costs where none runs yet."""
        at = min(probes, len(self._hull) - 1)
        return float(self._hull[at]) if at >= 0 and self._curve.passes else 0.0

    def _seconds_of(self, size: int) -> float:
        """Return the expected seconds of a pass over `size` nodes."""
        if size <= len(self._seconds):
            return float(self._seconds[size - 1])
        return float(self._with_probes(size - len(self._sizes))[-1]) if len(self._seconds) else 0.0

    def _with_probes(self, probes: int) -> Seconds:
        """Return the seconds of 0, 1, … nodes below the root beside `probes` others."""
        if probes == 0:
            return self._seconds
        return np.interp(self._sizes + probes, self._sizes, self._seconds) + np.maximum(
            self._sizes + probes - self._sizes[-1], 0
        ) * (self._hull[-1] if len(self._hull) else 0.0)

    def _may_explore_beyond(self) -> bool:
        """Whether a pass that is larger than usual is wanted, and may be paid for."""
        unknown = [size for size in self._unknown if size - 1 > self._last.nodes]
        if not unknown or self._curve.passes < _FRESH:
            return False
        return self._curve.hoped(min(unknown)) - float(self._seconds[self._last.nodes]) <= self._budget.saved

    def _explored(self, expected: Seconds, seconds: Seconds, nodes: int, token_s: float) -> int | None:
        """Return another number of nodes of which too little is known, where trying it seems to cost no more than is saved.

        What it costs is hoped for, not feared: one slow pass would keep its size from ever being tried again.
        """
        if self._curve.passes < _FRESH:
            return None
        for size in [size for size in self._unknown if size <= len(expected)]:
            hoped = min(self._curve.hoped(size), float(seconds[size - 1]))
            loss = token_s * float(expected[nodes] - expected[size - 1]) - float(seconds[nodes]) + hoped
            if size - 1 != nodes and loss <= self._budget.saved:
                self._explores_from = float(seconds[nodes]) - token_s * float(expected[nodes] - expected[size - 1])
                return size - 1
        return None


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
        if len(self._drafts) < _FRESH:
            return 0.0
        nodes, seconds = np.array(self._drafts).T
        usual = seconds <= 3.0 * np.median(seconds)
        nodes, seconds = nodes[usual] - nodes[usual].mean(), seconds[usual]
        spread = float(nodes @ nodes)
        return max(float(nodes @ seconds) / spread, 0.0) if spread > len(nodes) else 0.0


@njit(cache=True)
def add_likeliest(chances, probe, expected):  # type: ignore[no-untyped-def]
    """Add to `expected` ([most + 1]) what the 0, 1, … likeliest acceptable nodes below the root bring; count the probes."""
    probes, used = 0, 0
    best = np.empty(len(chances), np.float32)
    for i in range(1, len(chances)):
        if probe[i]:
            probes += 1
        else:
            best[used] = -chances[i]
            used += 1
    best[:used].sort()
    total = 0.0
    for i in range(1, len(expected)):
        if i <= used:
            total -= best[i - 1]
        expected[i] += total
    return probes


@njit(cache=True)
def _rising(slopes):  # type: ignore[no-untyped-def]
    """Return the slopes of the lower convex hull of what rises by `slopes` (pool adjacent violators)."""
    n = slopes.shape[0]
    value, width, out = np.empty(n), np.empty(n, np.int64), np.empty(n)
    blocks = 0
    for i in range(n):
        value[blocks], width[blocks] = slopes[i], 1
        blocks += 1
        while blocks > 1 and value[blocks - 2] >= value[blocks - 1]:
            a, b = width[blocks - 2], width[blocks - 1]
            value[blocks - 2] = (value[blocks - 2] * a + value[blocks - 1] * b) / (a + b)
            width[blocks - 2] = a + b
            blocks -= 1
    at = 0
    for i in range(blocks):
        for _ in range(width[i]):
            out[at] = value[i]
            at += 1
    return out


@njit(cache=True)
def _best(expected, seconds, base_s, late_s):  # type: ignore[no-untyped-def]
    """Return how many nodes to run, and the seconds that a token is worth.

    A token is worth what it takes otherwise: half that is told by the best that this very step can do, half by what
    passes did of late (the geometric mean), since neither alone is what the next passes will do.
    """
    best, own_s = 0, (seconds[0] + base_s) / expected[0]
    for n in range(1, len(expected)):
        each = (seconds[n] + base_s) / expected[n]
        if each <= own_s:
            best, own_s = n, each
    token_s = np.sqrt(own_s * late_s) if late_s > 0.0 else own_s
    best = 0
    for n in range(1, len(expected)):
        if token_s * (expected[n] - expected[best]) >= seconds[n] - seconds[best] and expected[n] > expected[best]:
            best = n
    return best, token_s
