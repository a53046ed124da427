"""The budget at work on one batch: who drafts, how many nodes run, and what is learnt from what that took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lookahead.cost import CostCurve, Seconds, knot_of
from lookahead.draft import Draft, FloatArray
from lookahead.recent import RECENT, Rate, Recent, Slope
from lookahead.switch import MARGIN, Switch
from lookahead.trust import Trust

if TYPE_CHECKING:
    from lookahead.budget import Budget
    from lookahead.static.shapes import Counts

SIZES, ASKING = 0.3, 0.4  # of what may be explored: passes of other sizes, and drafts which have not paid lately
_HELD = 4.0  # passes over one node: what is saved up for passes of other sizes at most
_FRESH, _SELDOM = 8, 32  # passes after which prices are computed anew; where nothing is chosen by them
_EARNS, _GUIDED = 1.4, 1.0  # times its price is what a node has to bring: the best of many guesses is less than it
# looks; what a grammar allows are few, and believed by what it forces
_CAUTION = 0.7  # of that is what it needs to be drafted: more may be found out in the meantime
_YOUNG = 32  # passes before which the curve changes with every one
_IDLE = 4  # passes at rest of which but one is looked at


class Choice(NamedTuple):
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


class Spent(NamedTuple):
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
        choice: what was chosen for it.
    """

    size: int
    context: int
    masks: int
    pass_s: float
    step_s: float
    asking_s: Mapping[int, float]
    grown: tuple[int, float]
    tokens: Mapping[int, int]
    choice: Choice


class Purse:
    """The budget at work on one batch.

    Args:
        guided: whether a grammar says what may be drafted.
        counts: how many rows passes run for their nodes; None: one for each.

    Attributes:
        floors: [most + 1] the chance below which a node is not worth drafting when so many are there already, root
            included; None: any is.
    """

    def __init__(
        self,
        budget: Budget,
        rows: int,
        curve: CostCurve,
        growing: Slope,
        trust: Trust,
        rate: Rate,
        usual: Switch,
        *,
        guided: bool = False,
        counts: Counts | None = None,
    ) -> None:
        self._budget, self._curve, self._trust, self._rate, self._usual = budget, curve, trust, rate, usual
        self._switches = [Switch(explore=ASKING * budget.explore) for _ in range(rows)]
        for switch in self._switches:
            switch.follow(usual)
        self._counts = counts
        self._most = min(budget.most, counts.most if counts else budget.most)
        self._sizes = np.arange(1, self._most + 2)
        self._runs = self._sizes if counts is None else counts.table(self._most + 1)  # rows of so many nodes
        self._seconds = self._hull = np.zeros(0)
        self._prices: FloatArray = np.zeros(0, np.float32)  # of nodes, when so many are there already
        self._priced_at, self._known = _FRESH - _SELDOM, False  # when prices were computed, and whether in real seconds
        self._unknown: list[int] = []
        self._hopes: dict[int, float] = {}  # seconds of passes over sizes that little is known of, by size
        self._turns = 0
        self._elapsed_s = 0.0  # since the switches were told of it
        self._base = Recent(RECENT)  # seconds of a step outside of its pass
        self._growing = growing
        self._earns = _GUIDED if guided else _EARNS
        self._last = Choice(0, "fixed", 0.0)
        self._explored_at = self._offered_at = -_FRESH
        self._explores_from = 0.0  # seconds that an exploring pass would have been worth
        self.floors: FloatArray | None = None

    @property
    def most(self) -> int:
        """Nodes that a row may draft."""
        return self._most

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
        if self._turns - self._priced_at >= every or (self._curve.passes < _YOUNG and not self._budget.fixed):
            self._priced_at = self._turns
            self._seconds = self._curve.seconds(self._runs, context=context)
            self._hull = _rising(np.diff(self._seconds))
            self._prices = (self._hull + self._growing.value).astype(np.float32)
            self._unknown = self._untried()
            self._known = self._curve.passes > 0
            self._hopes.clear()
        if self._budget.fixed:
            return
        token_s = self._rate.token_s
        if token_s == 0.0 or not self._known or self._may_explore_beyond():
            self.floors = None
            return
        self.floors = np.zeros(len(self._sizes), np.float32)
        self._trust.claims(self._prices, _CAUTION * self._earns / (token_s * max(rows, 1)), self.floors[1:])

    def choose(self, drafts: Mapping[int, Draft], rows: int) -> tuple[Choice, Mapping[int, Draft]]:
        """Return how many nodes of each row run, and the drafts cut to that.

        Args:
            drafts: of the rows that drafted.
            rows: how many rows commit a token in any case.
        """
        if not drafts:
            self._last = self._unasked(rows, float(rows))
            return self._last, drafts
        if self._budget.fixed:  # nothing is judged: what drafts claim is what is expected
            claimed = sum(_claimed(draft.parents, draft.weight, draft.probe) for draft in drafts.values())
            self._last = self._unasked(rows, rows + claimed)
            return self._last, drafts
        expected, probes, filled = np.full(self.most + 1, float(rows)), 0, 1
        for draft in drafts.values():
            nodes = self._trust.expect(draft, expected)
            # What no draft can fill is no choice.
            probes, filled = max(probes, len(draft) - 1 - nodes), max(filled, min(nodes, self.most) + 1)
        self._last = self._weighed(expected[:filled], probes)
        nodes = self._last.nodes
        return self._last, {row: draft.trim(nodes) for row, draft in drafts.items()}

    def _unasked(self, rows: int, expected: float) -> Choice:
        """Return the choice where there is none."""
        why, nodes = ("fixed", self.most) if self._budget.fixed else ("rests", 0)
        token_s = self._rate.token_s if self._known else 0.0
        return Choice(nodes, why, expected, token_s, self._row_s(0))

    def _weighed(self, expected: Seconds, probes: int) -> Choice:
        """Return the choice among `len(expected)` numbers of nodes; `expected` are the tokens of each, for all rows."""
        seconds, known = self._with_probes(probes)[: len(expected)], self._known
        nodes, token_s = _best(expected, seconds, self._base.median, self._rate.token_s if known else 0.0, self._earns)
        why = "pays" if nodes else "none pays"
        other = self._explored(expected, seconds, nodes, token_s)
        if other is not None:
            nodes, why = other, "explores"
            self._explored_at = self._turns + 1
        row_s = float(seconds[nodes] - seconds[nodes - 1]) if nodes else self._row_s(probes)
        if self._counts is not None:  # where rows come many at a time, most nodes would seem to cost nothing
            row_s = self._row_s(probes + nodes)
        return Choice(nodes, why, float(expected[nodes]), token_s if known else 0.0, row_s if known else 0.0)

    def observe(self, spent: Spent, followed: Iterable[tuple[Draft, NDArray[np.int64]]]) -> None:
        """Learn from a pass, and from what was proposed in it with the tokens that `followed`."""
        if self.most == 0:
            return
        self.follow(followed)
        self._turns += 1
        self._elapsed_s += min(spent.step_s, self._rate.usual_s or spent.step_s)
        if not (spent.asking_s or self._budget.fixed) and self._turns % _IDLE:
            return  # a step that rests has little to tell, and is to cost nothing
        count = sum(spent.tokens.values())
        rows = spent.size if self._counts is None else self._counts.rows(spent.size)
        self._curve.add(rows, spent.pass_s, context=spent.context, masks=spent.masks)
        self._rate.add(spent.step_s, count)
        self._base.add(max(spent.step_s - spent.pass_s, 0.0))
        if spent.asking_s:
            self._growing.add(*spent.grown)
        if self._budget.fixed:
            return
        budget = self._budget
        if spent.choice.why == "explores":
            self._unknown = self._untried()
            budget.saved -= max(spent.pass_s - self._explores_from, 0.0)
        if self._known:
            held = _HELD * float(self._seconds[0])
            budget.saved = min(budget.saved + SIZES * budget.explore * self._elapsed_s, held)
            self._judge(spent, count)
        self._elapsed_s = 0.0

    def follow(self, followed: Iterable[tuple[Draft, NDArray[np.int64]]]) -> None:
        """Learn how far drafts can be believed from what was proposed with the tokens that `followed`."""
        for draft, tokens in () if self._budget.fixed else followed:
            self._trust.observe(draft, tokens)

    def _judge(self, spent: Spent, tokens: int) -> None:
        """Tell the switch of each row what drafting brought it, against plain decoding."""
        rows = max(len(spent.tokens), 1)
        plain_s = float(self._seconds[0])
        extra_s = self._seconds_of(spent.size) - plain_s
        more = tokens - rows
        # What the next pass may be expected to bring, if the last one was expected to.
        promised = ((spent.choice.expected - rows) * plain_s / rows - extra_s) / max(len(spent.asking_s), 1)
        for row, count in spent.tokens.items():
            gain, price = 0.0, 0.0
            if row in spent.asking_s:
                # What ran for nothing is charged to all that drafted.
                share = (count - 1) / more if more > 0 else 1.0 / len(spent.asking_s)
                gain = (count - 1) * plain_s / rows - extra_s * share
                price = min(spent.asking_s[row], self._rate.usual_s)  # compiling is no price
                if spent.choice.why == "explores":  # its size was not chosen to pay
                    gain = max(gain, price)
            self._switches[row].observe(self._elapsed_s / rows, gain=gain, price=price)
            if price and promised >= MARGIN * price:
                self._switches[row].extend()
            if row in spent.asking_s:
                self._usual.note(gain, price)

    def _untried(self) -> list[int]:
        """Return the sizes that too little is known of; where passes have few row counts, the first size of each."""
        if self._counts is None:
            return self._curve.unknown(self.most + 1)
        rows, first = np.unique(self._runs, return_index=True)
        unknown = self._curve.unknown(int(rows[-1]))
        return [int(size) + 1 for count, size in zip(rows.tolist(), first, strict=True) if knot_of(count) in unknown]

    def _row_s(self, nodes: int) -> float:
        """Return what the next node costs where so many run."""
        at = min(nodes, len(self._hull) - 1)
        return float(self._hull[at]) if at >= 0 and self._known else 0.0

    def _seconds_of(self, size: int) -> float:
        """Return the expected seconds of a pass over `size` nodes."""
        if size <= len(self._seconds):
            return float(self._seconds[size - 1])
        return float(self._with_probes(size - len(self._sizes))[-1])

    def _with_probes(self, probes: int) -> Seconds:
        """Return the seconds of 0, 1, … nodes below the root beside `probes` others."""
        if probes == 0:
            return self._seconds
        sizes = self._sizes + probes
        slope = float(self._hull[-1]) if len(self._hull) else 0.0
        beyond: Seconds = np.maximum(sizes - self._sizes[-1], 0) * slope
        return beyond + np.interp(sizes, self._sizes, self._seconds)

    def _may_explore_beyond(self) -> bool:
        """Whether a pass that is larger than usual is wanted, and may be paid for."""
        if not self._unknown or self._curve.passes < _FRESH or self._turns < self._offered_at + _FRESH:
            return False
        unknown = [size for size in self._unknown if size - 1 > self._last.nodes]
        if not unknown or self._budget.saved <= 0.0:
            return False
        hoped = self._hoped(min(unknown))
        if hoped - float(self._seconds[self._last.nodes]) > self._budget.saved:
            return False
        self._offered_at = self._turns  # so many nodes take time to draft, whether they run or not
        return True

    def _hoped(self, size: int) -> float:
        """Return what a pass over `size` nodes may cost at best, by the latest prices."""
        if size not in self._hopes:
            self._hopes[size] = self._curve.hoped(int(self._runs[size - 1]))
        return self._hopes[size]

    def _explored(self, expected: Seconds, seconds: Seconds, nodes: int, token_s: float) -> int | None:
        """Return another number of nodes, of which too little is known, where trying it may cost no more than is saved.

        What it costs is hoped for, not feared: one slow pass would keep its size from ever being tried again.
        """
        if self._curve.passes < _FRESH or self._turns < self._explored_at + _FRESH or self._budget.saved <= 0.0:
            return None
        for size in [size for size in self._unknown if size <= len(expected)]:
            rows = int(self._runs[size - 1])
            other = size - 1
            if self._counts is not None:  # as many nodes as run in the same rows
                other = int(np.searchsorted(self._runs[: len(expected)], rows, side="right")) - 1
            loss = token_s * float(expected[nodes] - expected[other]) - float(seconds[nodes]) + self._hoped(size)
            if self._runs[nodes] != rows and loss <= self._budget.saved:
                self._explores_from = float(seconds[nodes]) - token_s * float(expected[nodes] - expected[other])
                return other
        return None


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
def _claimed(parents, weight, probe):  # type: ignore[no-untyped-def]
    """Return how many tokens a draft claims to bring: the sum of the path weights of its acceptable nodes."""
    chances, claimed = np.ones(len(parents), np.float32), 0.0
    for i in range(1, len(parents)):
        chances[i] = chances[parents[i]] * weight[i]
        claimed += 0.0 if probe[i] else chances[i]
    return claimed


@njit(cache=True)
def _best(expected, seconds, base_s, late_s, earns):  # type: ignore[no-untyped-def]
    """Return how many nodes to run, and the seconds that a token is worth.

    A token is worth what it takes otherwise: half that is told by the best that this very step can do, half by what
    passes did of late (the geometric mean), since neither alone is what the next passes will do. More nodes run where
    they bring `earns` times what they cost.
    """
    best, own_s = 0, (seconds[0] + base_s) / expected[0]
    for n in range(1, len(expected)):
        each = (seconds[n] + base_s) / expected[n]
        if each <= own_s:
            best, own_s = n, each
    # Never more than plain decoding takes.
    late_s = min(late_s, (seconds[0] + base_s) / expected[0])
    token_s = np.sqrt(own_s * late_s) if late_s > 0.0 else own_s
    best = 0
    for n in range(1, len(expected)):
        more_s, dearer_s = token_s * (expected[n] - expected[best]), seconds[n] - seconds[best]
        if more_s >= earns * dearer_s and expected[n] > expected[best]:
            best = n
    return best, token_s
