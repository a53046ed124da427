"""What `lookahead pool` says: progress on standard error, figures on standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lookahead.pool.manifest import Entry

if TYPE_CHECKING:
    from lookahead.pool.corpus import Corpus
    from lookahead.pool.ingest import Tally

EVERY = 10.0  # seconds between lines where no terminal watches
FRAME = 0.1  # between changes of the bar


class Progress:
    """How far a corpus is read: a bar where a person watches standard error, else a line now and then.

    Args:
        corpus: what is read.
        quiet: say nothing.
    """

    def __init__(self, corpus: Corpus, *, quiet: bool = False) -> None:
        self._corpus, self._quiet = corpus, quiet
        self._begin = self._last = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._quiet:
            return self
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("reading", total=self._corpus.total_bytes, figures="")
            self._bar.start()
        elif self._corpus.sources:
            self._write(f"reading {plural(len(self._corpus.sources), 'file')}, {size(self._corpus.total_bytes)}")
        return self

    def __call__(self, tally: Tally) -> None:
        """Show how far it is, if that is due."""
        now = time.perf_counter()
        if self._quiet or now - self._last < (EVERY if self._bar is None else FRAME):
            return
        self._last = now
        files = f"{self._corpus.files_read:,}/{len(self._corpus.sources):,} files"
        figures = f"{files}, {count(tally.tokens)} tokens, {rate(tally.tokens, now - self._begin)}"
        if self._bar is None:
            self._write(figures)
        else:
            self._bar.update(self._task, completed=self._corpus.bytes_read, figures=figures)

    def say(self, what: str) -> None:
        """Name what is done after reading."""
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=self._corpus.total_bytes)
        elif not self._quiet:
            self._write(what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _write(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True, highlight=False),
        refresh_per_second=5,
        transient=True,
    )


def rows(parts: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Return lines beside their headings; a heading without lines is left out.

    >>> print(rows([("one", ["a", "b"]), ("three", ["c"])]))
    one    a
           b
    three  c
    """
    given = list(parts)
    width = max(len(heading) for heading, _ in given)
    return "\n".join(
        f"{'' if i else heading:{width}}  {line}" for heading, lines in given for i, line in enumerate(lines)
    )


def holdings(tokens: int, documents: int, entries: Sequence[Entry]) -> str:
    """Return in one line how much a pool holds."""
    nbytes = sum(entry.nbytes for entry in entries)
    each = f", {nbytes / tokens:.2f} bytes a token" if tokens else ""
    return (
        f"{tokens:,} tokens in {plural(documents, 'document')}, {plural(len(entries), 'segment')}, {size(nbytes)}{each}"
    )


def segments(entries: Sequence[Entry], now: float) -> list[str]:
    """Return a table of segments, oldest first."""
    if not entries:
        return []
    table = [("name", "tokens", "documents", "size", "age")]
    table += [
        (entry.name, f"{entry.tokens:,}", f"{entry.documents:,}", size(entry.nbytes), age(now - entry.created))
        for entry in entries
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count(number: float) -> str:
    """Return a number in three digits or so.

    >>> count(950), count(1_234_567)
    ('950', '1.23 M')
    """
    if number < 1e3:
        return f"{number:.0f}"
    return f"{number / 1e3:.0f} k" if number < 1e6 else f"{number / 1e6:.2f} M"


def rate(tokens: int, seconds: float) -> str:
    return f"{count(tokens / max(seconds, 1e-9))} tokens/s"


def size(nbytes: int) -> str:
    """Return a size on the disk.

    >>> size(950), size(1_234_567), size(2_000_000_000)
    ('950 B', '1.2 MB', '2.0 GB')
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.1f} {unit}"
    return f"{nbytes} B"


def age(seconds: float) -> str:
    """Return how long ago something was.

    >>> age(5), age(7200)
    ('5 s', '2 h')
    """
    for limit, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
