"""What `lookahead explain` does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from lookahead.errors import InvalidInput
from lookahead.explain import Totals, Worth, explain
from lookahead.trace import WHY, Pass, Run

if TYPE_CHECKING:
    from rich.table import Table

STANDARD_INPUT = "-"
UNKNOWN = "-"
LONGEST = 24  # letters of a name that are shown
ROOMY = 72  # columns of a terminal that has room for wide gaps


def run(args: argparse.Namespace) -> int:
    """Say what a trace amounts to."""
    trace = read_trace(args.trace)
    if args.json:
        print(json.dumps(explain(trace).as_dict(), indent=2))
    else:
        _show(trace, steps=args.steps)
    return 0


def read_trace(file: str) -> Run:
    """Return the trace in a file, or in standard input for `-`."""
    if file != STANDARD_INPUT:
        return Run.load(file)
    from lookahead.tracefile import read

    if sys.stdin is None:
        raise InvalidInput("there is no standard input; give a file")
    return read(sys.stdin.buffer.read(), "standard input")


def _show(trace: Run, *, steps: bool) -> None:
    from lookahead.screen import Screen

    totals, screen = explain(trace), Screen()
    width = screen.width
    screen.write(fill(summary(totals), width))
    if not trace.passes:
        return
    tables = [times(totals, width), reasons(totals, width), meanings(totals)]
    tables += [sources(totals, width)] if totals.sources else []
    for table in tables:
        screen.write("")
        screen.print(table)
    if totals.unpriced:
        screen.write("\n" + fill(unpriced(totals), width))
    if steps:
        screen.write("")
        screen.print(passes(trace.passes, width))


def summary(totals: Totals) -> str:
    """Return in one line how far a pass got, and how far it was expected to."""
    chosen = totals.chosen
    said = f"{_many(totals.tokens, 'token', 'tokens')} in {_many(totals.forwards, 'pass', 'passes')}"
    said += f" with the prefill, {totals.tokens_per_pass:.2f} tokens per pass"
    said += f" in each of {totals.rows} rows" if totals.rows > 1 else ""
    if not chosen.passes:
        return said
    expected, came = _each(chosen.expected, chosen.passes), _each(chosen.committed, chosen.passes)
    return f"{said}; {expected} a pass expected, {came} came"


def times(totals: Totals, width: int) -> Table:
    """Return the seconds by part of a pass."""
    rows = [
        (part, f"{seconds:.3f}", f"{1e3 * seconds / totals.all.passes:.3f}", _share(seconds, totals.step_s))
        for part, seconds in (*totals.seconds.items(), ("step", totals.step_s))
    ]
    return _fit(("time", "seconds", "ms a pass", "share"), rows, width, drop=(1,))


def reasons(totals: Totals, width: int) -> Table:
    """Return what came of the passes, by why they ran as many nodes."""
    rows = [
        (
            _plain(why),
            f"{group.passes:,}",
            f"{group.nodes / group.passes:.1f}",
            _expected(group.expected, group.passes),
            _each(group.committed, group.passes),
        )
        for why, group in totals.why.items()
    ]
    return _fit(("why", "passes", "nodes", "expected", "came"), rows, width, drop=(2,))


def meanings(totals: Totals) -> Table:
    """Return the sentences for the reasons that a run had."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for why in totals.why:
        table.add_row(_plain(why), WHY.get(why, "a reason that this version does not know"))
    return table


def sources(totals: Totals, width: int) -> Table:
    """Return what each source did, and whether it earned what it cost."""
    rows = [
        (
            _plain(name),
            f"{worth.run:,}",
            f"{worth.accepted:,}",
            _share(worth.accepted, worth.run),
            *_milliseconds(worth),
        )
        for name, worth in totals.sources.items()
    ]
    headings = ("source", "nodes", "accepted", "hit rate", "earned ms", "cost ms", "net ms")
    return _fit(headings, rows, width, drop=(3, 5, 4, 1))


def unpriced(totals: Totals) -> str:
    """Return in one line what `earned`, `cost` and `net` leave out."""
    count = _many(totals.unpriced, "pass", "passes")
    return f"{count} did not know yet what a token is worth: earned, cost and net leave that out"


def passes(given: Sequence[Pass], width: int) -> Table:
    """Return a line for each pass, in order."""
    rows = [
        (
            str(i),
            str(one.nodes),
            _expected(one.expected, 1),
            str(sum(one.committed)),
            _plain(one.why),
            f"{1e3 * one.step_s:.2f}",
        )
        for i, one in enumerate(given, 1)
    ]
    return _fit(("pass", "nodes", "expected", "came", "why", "ms"), rows, width, drop=(2, 1), words=(4,))


def _fit(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    drop: Sequence[int],
    words: Sequence[int] = (0,),
) -> Table:
    """Return a table without the first columns of `drop` where the terminal is too narrow for them."""
    from lookahead.screen import grid

    columns, gap = list(zip(headings, *rows, strict=True)), 2 if width >= ROOMY else 1
    sizes, shown = [max(map(len, column)) for column in columns], list(range(len(columns)))
    for i in drop:
        if sum(sizes[j] + gap for j in shown) - gap > width:
            shown.remove(i)
    table = grid([columns[i] for i in shown], [i in words for i in shown], width, gap=gap)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def _milliseconds(worth: Worth) -> list[str]:
    if not worth.priced:
        return [UNKNOWN] * 3
    return [f"{1e3 * seconds:.1f}" for seconds in (worth.earned_s, worth.cost_s, worth.net_s)]


def _many(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _each(total: float, count: int) -> str:
    return f"{total / count:.2f}"


def _expected(tokens: float, count: int) -> str:
    """Return what a pass was expected to bring: with its own token it is never 0, unless nothing was foretold."""
    return _each(tokens, count) if tokens else UNKNOWN


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else UNKNOWN


def _plain(text: str) -> str:
    """Return a name from a file as any terminal can show it."""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in text)
