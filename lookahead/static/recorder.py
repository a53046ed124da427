"""Who runs the work of a pass: as it is written, or as a CUDA graph that was recorded of it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_ONE_AT_A_TIME = threading.RLock()  # torch records one graph in a process
_STREAMS: dict[torch.device, Any] = {}  # where it is recorded
_WAITS = "synchronizing CUDA operation"


class Recorder(Protocol):
    """Runs work that reads and writes tensors that stay where they are.

    The work must not depend on anything else that changes between calls with the same key, nor wait for the device.
    What it returns is good until it runs again.
    """

    def run(self, key: tuple[Hashable, ...], work: Callable[[], Any]) -> Any:
        """Run `work`, of which there is one for each key; return what it returns."""


class Plainly:
    """Runs all work as it is: without a GPU, or where nothing can be recorded."""

    def run(self, key: tuple[Hashable, ...], work: Callable[[], Any]) -> Any:
        return work()


@dataclass(frozen=True, slots=True)
class Recording:
    """What became of the work of one key.

    Attributes:
        key: its name first, then its shapes.
        seconds: that recording took.
        nbytes: device memory that it reserved.
        refused: why it runs without a graph; "": it does not.
    """

    key: tuple[Hashable, ...]
    seconds: float
    nbytes: int
    refused: str = ""


class Graphs:
    """Runs work as CUDA graphs: at first as it is, which warms up and tells whether it waits; then it is recorded.

    Work that cannot be recorded, because it waits for the device or is of another kind on each call, goes on as it is.

    Args:
        device: a CUDA device.
        warm: how often work runs before it is recorded.

    Attributes:
        recordings: what was recorded, or could not be.
    """

    def __init__(self, device: torch.device, *, warm: int = 1) -> None:
        self._device, self._warm = device, warm
        if device not in _STREAMS:
            _STREAMS[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream = _STREAMS[device]
        self._pools: dict[Hashable, Any] = {}
        self._ran: dict[tuple[Hashable, ...], int] = {}
        self._graphs: dict[tuple[Hashable, ...], tuple[Any, Any]] = {}
        self._refused: set[Hashable] = set()
        self.recordings: list[Recording] = []

    def run(self, key: tuple[Hashable, ...], work: Callable[[], Any]) -> Any:
        """Run `work` or replay its graph. Keys that begin alike never run at once, and share the memory of graphs."""
        found = self._graphs.get(key)
        if found is not None:
            found[0].replay()
            return found[1]
        if key[0] in self._refused:
            return work()
        if self._ran.get(key, 0) < self._warm:
            result = self._beside(key, work)
            self._ran[key] = self._ran.get(key, 0) + 1
            return result
        return self._recorded(key, work)

    def _beside(self, key: tuple[Hashable, ...], work: Callable[[], Any]) -> Any:
        """Run `work` in the stream that it is recorded in, so that libraries get ready for that."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _waits(self._device) as waits:
            result = work()
        current.wait_stream(self._stream)
        if waits:
            self._refuse(key, 0.0, "it waits for the device")
        return result

    def _recorded(self, key: tuple[Hashable, ...], work: Callable[[], Any]) -> Any:
        with _ONE_AT_A_TIME:
            begin, graph, failure = time.perf_counter(), torch.cuda.CUDAGraph(), ""
            current = torch.cuda.current_stream(self._device)
            torch.cuda.empty_cache()
            before, result = torch.cuda.memory_reserved(self._device), None
            try:
                with torch.cuda.graph(
                    graph, pool=self._pools.get(key[0]), stream=self._stream, capture_error_mode="thread_local"
                ):
                    result = work()
            except Exception as error:  # a model may do anything; recording has run nothing yet
                failure = _said(error)
            if failure:
                del graph
                torch.cuda.set_stream(current)  # which torch does not see to
                _tidy(self._device)
                self._refuse(key, time.perf_counter() - begin, failure)
                return work()
            nbytes = torch.cuda.memory_reserved(self._device) - before
        self._pools.setdefault(key[0], graph.pool())
        self._graphs[key] = graph, result
        self.recordings.append(Recording(key, time.perf_counter() - begin, nbytes))
        graph.replay()
        return result

    def _refuse(self, key: tuple[Hashable, ...], seconds: float, reason: str) -> None:
        self._refused.add(key[0])
        self.recordings.append(Recording(key, seconds, 0, refused=reason))


@contextmanager
def _waits(device: torch.device) -> Iterator[list[str]]:
    """Yield a list that afterwards says what has waited for the device meanwhile, as far as torch tells."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in said:
        if _WAITS in str(one.message):
            found.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _tidy(device: torch.device) -> None:
    """Leave the random generator usable after a recording that has failed: one that succeeds ends its state."""
    with suppress(Exception):
        torch.cuda.synchronize(device)
    with suppress(Exception), torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            spare = torch.zeros(1, device=device)
            graph.capture_begin()
            spare.add_(1)
            graph.capture_end()
        torch.cuda.synchronize(device)


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
