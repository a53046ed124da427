"""What the demo shows: a table of rows, and one output coloured by model pass."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lookahead.compare import Row
from lookahead.screen import grid
from lookahead.stream import HALF_CHARACTER, decode

COLOURS = ("black on cyan", "black on yellow", "black on magenta", "black on green", "white on blue")
MARK = "|"  # ends a pass where there are no colours
ROOMY, WIDE, MEDIUM = 92, 80, 54  # terminals that all columns of the table fit into, or most
COLUMNS = (  # heading, and how wide the terminal must be for it
    ("task", 0),
    ("kind", WIDE),
    ("tokens", MEDIUM),
    ("passes", MEDIUM),
    ("tokens\nper pass", 0),
    ("plain", WIDE),
    ("lookahead", WIDE),
    ("ratio", 0),
    ("identical", 0),
)


def table(rows: Sequence[Row], width: int) -> Table:
    """Return the rows as a table that fits `width` columns, with a line for each kind's median ratio."""
    shown = [i for i, (_, needed) in enumerate(COLUMNS) if width >= needed]
    columns = [[COLUMNS[i][0], *(_cells(row)[i] for row in rows)] for i in shown]
    words = [i < 2 or i == len(COLUMNS) - 1 for i in shown]
    result = grid(columns, words, width, gap=1 if width < ROOMY else 2)
    for kind in dict.fromkeys(row.task.kind for row in rows):
        members = [row for row in rows if row.task.kind == kind]
        for row in members:
            result.add_row(*(_cells(row)[i] for i in shown))
        median = statistics.median(row.ratio for row in members)
        total = ["median" if width >= WIDE else f"median {kind}", kind, "", "", "", "", "", f"{median:.2f}x", ""]
        result.add_row(*(total[i] for i in shown), style="bold")
    return result


def _cells(row: Row) -> list[str]:
    return [
        row.task.name,
        row.task.kind,
        str(row.tokens),
        str(row.passes),
        f"{row.tokens / row.passes:.2f}",
        f"{row.plain_s:.2f} s",
        f"{row.lookahead_s:.2f} s",
        f"{row.ratio:.2f}x",
        "yes" if row.identical else "NO",
    ]


def legend(*, colour: bool) -> str:
    """Return the line that explains `coloured`."""
    if colour:
        return "tokens on one colour came from one model pass; without colour: one pass, one token"
    return f"a {MARK} ends what came from one model pass; without it: one pass, one token"


def coloured(tokenizer: Any, row: Row, *, colour: bool) -> Text:
    """Return the row's output with the tokens of each pass marked."""
    text, runs = Text(), 0
    for piece, tokens in _pieces(tokenizer, row):
        if tokens == 1:
            text.append(piece)
        elif colour:
            text.append(piece, style=COLOURS[runs % len(COLOURS)])
            runs += 1
        else:
            text.append(piece + MARK)
    return text


def _pieces(tokenizer: Any, row: Row) -> Iterator[tuple[str, int]]:
    """Yield the text and the number of tokens of each pass; half a character waits for the next pass."""
    trial = row.trials[0]
    counts = [1] * trial.run.prefills + [*(one.committed[0] for one in trial.run.passes)]
    end, shown, waiting = 0, 0, 0
    for count in counts:
        end, waiting = end + count, waiting + count
        text = decode(tokenizer, trial.new_ids[:end])
        if text.endswith(HALF_CHARACTER) and end < len(trial.new_ids):
            continue
        yield text[shown:], waiting
        shown, waiting = len(text), 0
