"""A program in an environment of its own, asked prompt by prompt; the other end is `serving.py`."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

LAST_LINES = 15  # of what a peer said, in the reason of its failure
ENDING_S = 20.0  # for a peer to end by itself


class PeerFailed(Exception):
    """A peer that cannot be started, ended, took too long, or answered with an error."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer generated.

    Attributes:
        tokens: ids, the end of the sequence included.
        seconds: of the peer's generate call alone.
        passes: forward passes of its model, the prefill included; None where it does not tell.
        peak_mb: megabytes that the call needed on top of what was held before; None likewise.
    """

    tokens: list[int]
    seconds: float
    passes: int | None
    peak_mb: float | None


class Outside:
    """A peer's process, for the time of a `with`. It is ended with all its children, whatever happens.

    Args:
        python: the interpreter of its environment.
        script: what that runs, `lade_run.py` for one.
        settings: for the script, ready for JSON.
        start_s, answer_s: seconds that it may take to be ready, and to answer.

    Attributes:
        about: its packages and their versions.
        settings: what a reader of its figures must know, as it says.

    Raises:
        PeerFailed: by entering, and by `run`. A peer that answers with an error can be asked again; one that ended,
            took too long or answered something else is lost, and further questions are refused with the same reason.

    >>> with Outside(".peers/lade/bin/python", "lookahead/bench/lade_run.py", settings) as peer:
    ...     peer.run([5, 6, 7], 32).tokens
    """

    def __init__(
        self,
        python: str | Path,
        script: str | Path,
        settings: Mapping[str, Any],
        *,
        start_s: float = 300.0,
        answer_s: float = 600.0,
    ) -> None:
        self.about: dict[str, str] = {}
        self.settings: dict[str, Any] = {}
        self._command = [str(python), str(script), json.dumps(dict(settings))]
        self._start_s, self._answer_s = start_s, answer_s
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._lost: PeerFailed | None = None

    def __enter__(self) -> Outside:
        self._said: BinaryIO = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                start_new_session=True,
                env=_environment(),
            )
        except OSError as error:
            self._said.close()
            raise PeerFailed(f"{self._command[0]}: {error.strerror}; see benchmarks/peers.sh") from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            ready = self._next(self._start_s)
            if "error" in ready:
                raise self._failed(ready["error"])
            if ready.get("ready") is not True or not {"about", "settings"} <= ready.keys():
                raise self._failed(f"not ready: {ready}")
        except BaseException:
            self._end(0.0)
            raise
        self.about, self.settings = ready["about"], ready["settings"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(ENDING_S if kind is None else 0.0)

    def run(
        self, ids: Sequence[int], new: int, *, ignore_eos: bool = False, schema: Mapping[str, Any] | None = None
    ) -> Answer:
        """Return up to `new` greedy tokens after `ids`, JSON of a schema where there is one."""
        request = {"ids": list(ids), "new": new, "ignore_eos": ignore_eos, "schema": schema and dict(schema)}
        if self._lost is not None:
            raise self._lost
        self._ask(request)
        reply = self._next(self._answer_s)
        if reply.get("error") is not None:
            raise self._failed(reply["error"])
        try:
            return Answer(reply["tokens"], reply["seconds"], reply["passes"], reply["peak_mb"])
        except KeyError as error:
            raise self._lose(f"an answer without {error}") from None

    @property
    def _name(self) -> str:
        return Path(self._command[1]).name

    def _read(self) -> None:
        """Pass on what the peer writes, and an empty line when it has closed its output."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone; what it last said comes first
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise self._lose(f"no answer in {seconds:g} s") from None
        if not line:
            raise self._lose("it has ended")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise self._lose(f"not an answer: {line[:200].decode(errors='replace').rstrip()!r}")
        return message

    def _lose(self, reason: str) -> PeerFailed:
        """End a peer that would answer another question than the last one, and return the error."""
        self._kill()
        self._lost = self._failed(reason)
        return self._lost

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # none of its group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _failed(self, reason: object) -> PeerFailed:
        """Return the error, with the last lines of what the peer said."""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 20_000))
        said = self._said.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        return PeerFailed("\n    ".join([f"{self._name}: {reason}", *said]))

    def _end(self, seconds: float) -> None:
        """Let the peer end by itself for so long, then end it and all that it started."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # the peer is gone, and something was left to write
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if self._lost is None:
            self._kill()
        self._reader.join()
        process.stdout.close()
        self._said.close()


def _environment() -> dict[str, str]:
    """Return this process's environment without what would lead the peer to our packages or number of threads."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    return {name: value for name, value in os.environ.items() if name not in ours}
