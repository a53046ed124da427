"""The terminal: plain lines, and tables that keep their figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Screen(Console):
    """A console for plain lines that leaves a closed pipe to the caller; without `colour` it writes no escape codes."""

    def __init__(self, *, colour: bool = True) -> None:
        super().__init__(color_system="auto" if colour else None, highlight=False, markup=False, emoji=False)

    @property
    def has_colour(self) -> bool:
        """Whether colours reach whoever reads this."""
        return self.is_terminal and self.color_system is not None and not self.no_color

    def write(self, text: str | Text) -> None:
        """Write `text` and leave its wrapping to the terminal."""
        self.print(text, soft_wrap=True)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def grid(columns: Sequence[Sequence[str]], words: Sequence[bool], width: int, *, gap: int) -> Table:
    """Return a table, rows to be added, whose first column is cut where `width` is too small for all.

    Args:
        columns: of each column its heading and its cells.
        words: whether a column holds words, which stand on the left.
        gap: blanks between columns.
    """
    sizes = [max(len(line) for text in column for line in text.split("\n")) for column in columns]
    first = max(1, width - sum(size + gap for size in sizes[1:]))
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, gap))
    for i, column in enumerate(columns):
        side: Literal["left", "right"] = "left" if words[i] else "right"
        table.add_column(column[0], justify=side, max_width=None if i else first, no_wrap=True)
    return table
