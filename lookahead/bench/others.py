"""Systems that run in environments of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lookahead.bench.outside import Outside, PeerFailed
from lookahead.bench.systems import Answer, CannotRun
from lookahead.bench.workloads import Item

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Peer:
    """How to start one.

    Attributes:
        name: in the table.
        environment: the folder of its interpreter's environment.
        script: its end of the protocol.
        settings: for the script.
        constrained: whether it can keep to a JSON Schema.
    """

    name: str
    environment: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    constrained: bool = False


PEERS = (
    Peer("LookaheadDecoding (15, 5, 15)", "lade", "lade_run.py", {"system": "lade"}),
    Peer("vLLM", "vllm", "vllm_run.py", {"system": "plain"}, constrained=True),
    Peer("vLLM n-gram", "vllm", "vllm_run.py", {"system": "ngram"}, constrained=True),
    Peer("vLLM suffix", "vllm", "vllm_run.py", {"system": "suffix"}, constrained=True),
)


class Started:
    """A peer that runs; see `System`."""

    def __init__(self, peer: Peer, outside: Outside) -> None:
        self.name, self._peer, self._outside = peer.name, peer, outside
        self.settings: dict[str, Any] = {**outside.settings, **outside.about}

    def run(self, item: Item) -> Answer:
        if item.grammar is not None and (item.schema is None or not self._peer.constrained):
            raise CannotRun("cannot keep to a grammar")
        try:
            answer = self._outside.run(list(item.ids), item.new, schema=item.schema, ignore_eos=not item.ends)
        except PeerFailed as error:
            raise CannotRun(str(error)) from error
        return Answer(answer.tokens, answer.seconds, answer.passes, answer.peak_mb)


def interpreter(folder: Path, peer: Peer) -> Path:
    """Return the interpreter of a peer's environment below `folder`.

    Raises:
        CannotRun: there is none.
    """
    place = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    python = folder / peer.environment / place
    if not python.exists():
        raise CannotRun(f"no environment {folder / peer.environment}; benchmarks/peers.sh {peer.environment} makes it")
    return python


def started(
    stack: ExitStack,
    folder: Path,
    model: Path,
    *,
    dtype: str,
    threads: int,
    compiled: bool = True,
    peers: Sequence[Peer] = PEERS,
) -> tuple[list[Started], dict[str, str]]:
    """Return the peers that start, and why the others do not; `stack` ends them.

    Args:
        folder: holds their environments.
        model: a checkpoint on the disk.
        compiled: let those that compile the model do so, which takes a minute and more, but is how they come.
    """
    running, absent = [], {}
    for peer in peers:
        try:
            python = interpreter(folder, peer)
            settings = {"model": str(model), "dtype": dtype, "threads": threads, "compile": compiled, **peer.settings}
            running.append(Started(peer, stack.enter_context(Outside(python, HERE / peer.script, settings))))
        except (CannotRun, PeerFailed) as error:
            absent[peer.name] = str(error)
    return running, absent
