"""How much memory a call needs on top of what is held before it. Imports nothing but the standard library."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")


class Peak:
    """Measures the call inside a `with`, over this process and its children; Linux only.

    The peaks of the processes are added up, as if all came at the same time. Children that start inside do not count.

    Attributes:
        mb: megabytes (1e6 bytes) above what was held before, or None where the system does not tell.

    >>> with Peak() as peak:
    ...     block = bytearray(50_000_000)
    >>> peak.mb is None or peak.mb > 45
    True
    """

    def __init__(self) -> None:
        self.mb: float | None = None
        self._before: dict[int, int] = {}

    def __enter__(self) -> Peak:
        try:
            self._before = {pid: _reset(pid) for pid in family(os.getpid())}
        except (OSError, KeyError, ValueError):
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            grown = [max(0, _kilobytes(pid, "VmHWM") - before) for pid, before in self._before.items()]
        except (OSError, KeyError, ValueError):
            grown = []
        self.mb = sum(grown) * 1024 / 1e6 if grown else None


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    parents = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        parents[int(path.parent.name)] = int(after_name[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _reset(pid: int) -> int:
    """Make the peak of a process what it holds now, and return that in kilobytes."""
    (PROC / str(pid) / "clear_refs").write_text("5")
    return _kilobytes(pid, "VmRSS")


def _kilobytes(pid: int, name: str) -> int:
    lines = (PROC / str(pid) / "status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])
