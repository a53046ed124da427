"""The same texts by several systems, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lookahead.bench.systems import PLAIN, Answer, CannotRun, System
from lookahead.bench.workloads import Item

Say = Callable[[str, float], object]


@dataclass(frozen=True, slots=True)
class Score:
    """What a system did on a workload; or, where it could not run, why.

    Attributes:
        seconds: sum over the texts of the median over the rounds.
        ratio: seconds of plain `generate()` over these.
        least, most: the smallest and the largest such ratio of a single round.
        tokens_per_pass: tokens over forward passes, both summed over the texts; None: passes are not known.
        identical: whether every output of every round was that of plain `generate()`.
        differing: texts whose output was another one.
        peak_mb: memory that the most demanding call needed on top of what was held before it.
        settings: of the system.
        reason: why it could not run; then all others are None.
    """

    seconds: float | None = None
    ratio: float | None = None
    least: float | None = None
    most: float | None = None
    tokens_per_pass: float | None = None
    identical: bool | None = None
    differing: int | None = None
    peak_mb: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


@dataclass
class Contest:
    """Runs every text by every system, once a round; who goes first changes from text to text and round to round.

    Args:
        items: the texts.
        systems: the first one is plain `generate()`, which all others are compared with.
        absent: systems that cannot run at all, and why.
    """

    items: Sequence[Item]
    systems: Sequence[System]
    absent: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    _answers: dict[tuple[int, str], list[Answer]] = field(default_factory=dict)
    _reasons: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.systems[0].name == PLAIN

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(item.workload for item in self.items))

    def warm_up(self, say: Say = lambda text, part: None, *, new: int | None = None) -> None:
        """Run the first text of every workload by every system, untimed; at most `new` tokens of it."""
        firsts = {item.workload: item for item in reversed(self.items)}
        for number, workload in enumerate(self.workloads):
            say("warming up", number / len(firsts))
            first = firsts[workload]
            for system in self.systems:
                self._run(system, first if new is None else replace(first, new=min(new, first.new)))

    def round(self, say: Say = lambda text, part: None) -> None:
        """Run every text once by every system."""
        for index, item in enumerate(self.items):
            turn = (self.rounds + index) % len(self.systems)
            for place, system in enumerate([*self.systems[turn:], *self.systems[:turn]]):
                part = (index + place / len(self.systems)) / len(self.items)
                say(f"round {self.rounds + 1}: {item.workload}, {system.name}", part)
                answer = self._run(system, item)
                if answer is not None:
                    self._answers.setdefault((index, system.name), []).append(answer)
        self.rounds += 1

    def _run(self, system: System, item: Item) -> Answer | None:
        """Return what a system makes of a text; once it cannot do one of a workload, it does none."""
        if (item.workload, system.name) in self._reasons:
            return None
        try:
            return system.run(item)
        except CannotRun as error:
            self._reasons[item.workload, system.name] = str(error)
        return None

    def scores(self) -> dict[str, dict[str, Score]]:
        """Return, by workload and system, what came of it; the systems that could not run come last."""
        found = {}
        for workload in self.workloads:
            by_system = {system.name: self._score(workload, system) for system in self.systems}
            found[workload] = by_system | {name: Score(reason=why) for name, why in self.absent.items()}
        return found

    def _score(self, workload: str, system: System) -> Score:
        if (reason := self._reasons.get((workload, system.name))) is not None:
            return Score(reason=reason, settings=dict(system.settings))
        texts = [index for index, item in enumerate(self.items) if item.workload == workload]
        answers = {index: self._answers[index, system.name] for index in texts}
        plain = {index: self._answers[index, PLAIN] for index in texts}
        ratios = [
            sum(plain[i][number].seconds for i in texts) / sum(answers[i][number].seconds for i in texts)
            for number in range(self.rounds)
        ]
        seconds, plain_s = _seconds(answers), _seconds(plain)
        differing = [i for i in texts if any(one.tokens != plain[i][0].tokens for one in answers[i])]
        peaks = [one.peak_mb for group in answers.values() for one in group if one.peak_mb is not None]
        return Score(
            seconds=seconds,
            ratio=plain_s / seconds,
            least=min(ratios),
            most=max(ratios),
            tokens_per_pass=_tokens_per_pass([one for group in answers.values() for one in group]),
            identical=not differing,
            differing=len(differing),
            peak_mb=max(peaks, default=None),
            settings=dict(system.settings),
        )


def _seconds(answers: dict[int, list[Answer]]) -> float:
    return sum(statistics.median(one.seconds for one in group) for group in answers.values())


def _tokens_per_pass(answers: list[Answer]) -> float | None:
    passes = [one.passes for one in answers if one.passes is not None]
    return sum(len(one.tokens) for one in answers) / sum(passes) if len(passes) == len(answers) else None
