"""Where the time of a run went, why it drafted as it did, and what each source earned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from typing import Any

from lookahead.trace import WHY, Pass, Run

PARTS = {
    "draft": "draft_s",
    "mask": "mask_s",
    "forward": "model_s",
    "verify": "verify_s",
    "cache": "cache_s",
    "learn": "learn_s",
}
"""The measured parts of a pass, and the fields of `Pass` that hold them."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sums over some passes.

    Attributes:
        passes: how many.
        nodes: of the largest tree of each.
        expected: tokens that all rows were expected to commit.
        committed: tokens that all rows committed.
    """

    passes: int
    nodes: int
    expected: float
    committed: int

    @classmethod
    def of(cls, passes: Sequence[Pass]) -> Group:
        """Return the sums over `passes`."""
        return cls(
            len(passes),
            sum(one.nodes for one in passes),
            fsum(one.expected for one in passes),
            sum(sum(one.committed) for one in passes),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Worth:
    """What a source did over a run.

    Attributes:
        run: its nodes that ran.
        accepted: those of them that were accepted.
        priced: passes it was in that knew what a token was worth; only they are in what follows.
        earned_s: seconds that its accepted nodes were worth.
        cost_s: seconds that its nodes cost, and what was measured besides.
    """

    run: int
    accepted: int
    priced: int
    earned_s: float
    cost_s: float

    @classmethod
    def of(cls, name: str, passes: Sequence[Pass]) -> Worth:
        """Return what source `name` did in `passes`, each of which has it."""
        shares = [one.sources[name] for one in passes]
        priced = [(one, one.sources[name]) for one in passes if one.token_s > 0]
        return cls(
            sum(share.run for share in shares),
            sum(share.accepted for share in shares),
            len(priced),
            fsum(share.accepted * one.token_s for one, share in priced),
            fsum(share.run * _node_s(one) + share.seconds for one, share in priced),
        )

    @property
    def hit_rate(self) -> float:
        """Accepted nodes among those that ran; 0 where none ran."""
        return self.accepted / self.run if self.run else 0.0

    @property
    def net_s(self) -> float:
        """Seconds earned above the cost."""
        return self.earned_s - self.cost_s

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes and properties by name."""
        return asdict(self) | {"hit_rate": self.hit_rate, "net_s": self.net_s}


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run amounts to, its prefill left out.

    Attributes:
        tokens: generated columns.
        rows: rows of the batch; 0 where there was no pass.
        forwards: passes of the model, the prefill counted.
        tokens_per_pass: mean tokens that each of them yields for a row.
        all: every pass.
        chosen: the passes whose number of nodes was chosen, not given.
        seconds: by part, as `PARTS` and then `other`, which is the step without them: below 0 where parts overlapped.
        why: the passes by their reason.
        sources: what each source did, those with the most accepted nodes first.
        unpriced: passes with sources that did not know yet what a token was worth.
    """

    tokens: int
    rows: int
    forwards: int
    tokens_per_pass: float
    all: Group
    chosen: Group
    seconds: Mapping[str, float]
    why: Mapping[str, Group]
    sources: Mapping[str, Worth]
    unpriced: int

    @property
    def step_s(self) -> float:
        """Seconds of all passes."""
        return fsum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Return all totals for JSON.

        The keys: `tokens`, `rows`, `passes` (the prefill counted), `tokens_per_pass`; `all`, `chosen` and each reason
        in `why` with the sums `passes`, `nodes`, `expected`, `committed`; `seconds` by part: `draft`, `mask`,
        `forward`, `verify`, `cache`, `learn`, `other`, `step`; each source in `sources` with `run`, `accepted`,
        `hit_rate`, `priced`, `earned_s`, `cost_s`, `net_s`; `unpriced`.
        """
        return {
            "tokens": self.tokens,
            "rows": self.rows,
            "passes": self.forwards,
            "tokens_per_pass": self.tokens_per_pass,
            "all": self.all.as_dict(),
            "chosen": self.chosen.as_dict(),
            "seconds": {**self.seconds, "step": self.step_s},
            "why": {why: group.as_dict() for why, group in self.why.items()},
            "sources": {name: worth.as_dict() for name, worth in self.sources.items()},
            "unpriced": self.unpriced,
        }


def explain(run: Run) -> Totals:
    """Return what `run` amounts to."""
    passes = run.passes
    return Totals(
        run.tokens,
        run.rows,
        run.forwards,
        run.tokens_per_pass,
        Group.of(passes),
        Group.of([one for one in passes if one.why != "fixed"]),
        _seconds(passes),
        _reasons(passes),
        _sources(passes),
        sum(1 for one in passes if one.sources and not one.token_s > 0),
    )


def _seconds(passes: Sequence[Pass]) -> dict[str, float]:
    parts = {part: fsum(getattr(one, field) for one in passes) for part, field in PARTS.items()}
    return parts | {"other": fsum(one.step_s for one in passes) - fsum(parts.values())}


def _reasons(passes: Sequence[Pass]) -> dict[str, Group]:
    """Group passes by reason, in the order of `WHY`; reasons of later versions come last."""
    members: dict[str, list[Pass]] = {why: [] for why in WHY}
    for one in passes:
        members.setdefault(one.why, []).append(one)
    return {why: Group.of(group) for why, group in members.items() if group}


def _sources(passes: Iterable[Pass]) -> dict[str, Worth]:
    members: dict[str, list[Pass]] = {}
    for one in passes:
        for name in one.sources:
            members.setdefault(name, []).append(one)
    worths = {name: Worth.of(name, group) for name, group in members.items()}
    return dict(sorted(worths.items(), key=lambda item: (-item[1].accepted, item[0])))


def _node_s(one: Pass) -> float:
    """Seconds of one more node in one row: `row_s` is the price of one in every row."""
    return one.row_s / max(len(one.committed), 1)
