"""The bundled grammars: one file each, in llguidance's Lark dialect or as a plain regular expression."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lookahead.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Entry:
    """A bundled grammar; `text` is what `Grammar.lark` or, for a regex, `Grammar.regex` takes."""

    name: str
    kind: Literal["lark", "regex"]
    description: str  # one sentence: the first line of the file
    text: str


def names() -> list[str]:
    """Return the names of the bundled grammars, sorted.

    >>> names()[:2]
    ['arithmetic', 'csv']
    """
    return sorted(path.stem for path in folder().iterdir() if path.suffix in (".lark", ".regex"))


def read(name: str) -> Entry:
    """Return the bundled grammar of that name, or raise `InvalidArgument` with the names that come close.

    >>> read("uuid").kind
    'regex'
    """
    if name not in names():
        raise InvalidArgument(_unknown(name))
    lark, regex = folder() / f"{name}.lark", folder() / f"{name}.regex"
    text = (lark if lark.exists() else regex).read_text(encoding="utf-8")
    description = text.partition("\n")[0].lstrip("/# ")
    if lark.exists():
        return Entry(name, "lark", description, text)
    return Entry(name, "regex", description, pattern(text))


def pattern(text: str) -> str:
    r"""Join a `.regex` file: lines that begin with `#` are its header, all others are stripped and put together.

    >>> pattern("# Even digits.\n[02468]\n+\n")
    '[02468]+'
    """
    return "".join(line.strip() for line in text.splitlines() if not line.startswith("#"))


def folder() -> Path:
    """Return where the files lie: inside of an installed package, or beside it in a working copy."""
    package = Path(__file__).parents[1]
    installed = package / "grammars"
    return installed if installed.is_dir() else package.parent / "grammars"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(names())}"
    return f"no bundled grammar is called {name!r}; {hint}"
