"""The peer's end of a line protocol: token ids come in, greedy continuations go out, one JSON object a line.

The script of a peer is started with one argument, a JSON object of settings. It writes

    {"ready": true, "about": {name: version}, "settings": {...}}      or      {"error": reason}

and then, for every line `{"ids": [...], "new": int, "ignore_eos": bool, "schema": null or {...}}`,

    {"tokens": [...], "seconds": float, "passes": int or null, "peak_mb": float or null, "error": null or reason}

until its input ends. Tokens include the end of the sequence; passes are forward calls of the model, the prefill
included. The other end is `outside.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

if TYPE_CHECKING:
    from lookahead.bench.peak import Peak
else:  # a script's own folder is on the module path of an interpreter that has no `lookahead`
    from peak import Peak


class Reply(NamedTuple):
    """What a peer generated; seconds are those of its generate call alone."""

    tokens: list[int]
    seconds: float
    passes: int | None


class Peer(Protocol):
    """A system that is ready to generate.

    Attributes:
        packages: whose versions say what ran.
        settings: what a reader of its figures must know.
    """

    packages: tuple[str, ...]
    settings: dict[str, Any]

    def generate(self, ids: list[int], new: int, *, ignore_eos: bool, schema: dict[str, Any] | None) -> Reply: ...

    def close(self) -> None: ...


def serve(start: Callable[[dict[str, Any]], Peer], settings: str) -> int:
    """Make a peer of the settings, answer standard input, and return an exit code."""
    out = _own_stdout()
    try:
        peer = start(json.loads(settings))
        warm_up(peer)
    except Exception as error:
        _say(out, {"error": _reason(error)})
        raise  # the traceback goes to standard error
    about = {name: version(name) for name in peer.packages}
    _say(out, {"ready": True, "about": about, "settings": peer.settings})
    try:
        for line in sys.stdin:
            _say(out, answer(peer, json.loads(line)))
    finally:
        peer.close()
    return 0


def warm_up(peer: Peer) -> None:
    """Run a short prompt twice: the first calls pay for what is set up once."""
    for _ in range(2):
        peer.generate(list(range(3, 35)), 16, ignore_eos=True, schema=None)


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one request; an error is an answer too."""
    try:
        with Peak() as peak:
            reply = peer.generate(
                request["ids"], request["new"], ignore_eos=request["ignore_eos"], schema=request["schema"]
            )
    except Exception as error:
        return {"tokens": [], "seconds": 0.0, "passes": None, "peak_mb": None, "error": _reason(error)}
    return reply._asdict() | {"peak_mb": peak.mb, "error": None}


def _own_stdout() -> TextIO:
    """Return standard output; what anything else prints there, child processes too, goes to standard error."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _say(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
