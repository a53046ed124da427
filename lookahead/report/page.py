"""One HTML file that shows a run."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template

from lookahead.errors import InvalidArgument
from lookahead.report.data import data
from lookahead.report.embed import embedded
from lookahead.trace import Run

TITLE = "A run of lookahead"
SCRIPTS = ("run.js", "words.js", "text.js", "tree.js", "timeline.js", "tables.js", "player.js")
HEIGHT = 760  # pixels of the page in a notebook
UNKNOWN = "–"


def page(run: Run, *, title: str = TITLE, row: int = 0) -> str:
    """Return a page that shows `run` pass by pass: its text, its token trees, its time.

    It needs no network, and nothing that a model wrote can run in it. Without a tokenizer it shows ids.

    Args:
        title: its heading.
        row: the row of the batch that it shows first.

    Raises:
        InvalidArgument: there is no such row.
    """
    if not 0 <= row < max(run.rows, 1):
        raise InvalidArgument(f"row={row!r}; the run has {run.rows} rows, give a number from 0")
    run = run.worded()
    style, script = _asset("page.css"), _script()
    return Template(_asset("page.html")).substitute(
        title=_shown(title),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        figures="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures(run).items()),
        style=style,
        script=script,
        data=embedded(data(run, row)),
    )


def fragment(run: Run) -> str:
    """Return the page in a frame of its own, for a notebook."""
    about = f"{run.tokens} tokens in {run.forwards} passes"
    return (
        f'<iframe title="{about}" sandbox="allow-scripts" width="100%" height="{HEIGHT}" '
        f'style="border:0;width:100%;height:{HEIGHT}px" srcdoc="{escape(page(run))}"></iframe>'
    )


def figures(run: Run) -> dict[str, str]:
    """Return what a run amounts to, by name."""
    written = sum(map(len, run.outputs)) or run.tokens * max(run.rows, 1)
    rows = f" in {run.rows:,} rows" if run.rows > 1 else ""
    timed = run.seconds > 0
    return {
        "tokens": f"{written:,}{rows}",
        "passes": f"{run.forwards:,}",
        "tokens per pass": f"{run.tokens_per_pass:.2f}",
        "seconds": f"{run.seconds:.2f}" if timed else UNKNOWN,
        "tokens per second": f"{written / run.seconds:,.0f}" if timed else UNKNOWN,
    }


def _shown(text: str) -> str:
    """Return `text` for HTML, without characters that are no text."""
    return escape(re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _script() -> str:
    return "\n".join(map(_asset, SCRIPTS))


@cache
def _asset(name: str) -> str:
    return files("lookahead.report").joinpath(name).read_text(encoding="utf-8")
