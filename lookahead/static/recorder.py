"""Who runs the work of a pass: as it is written, or as a CUDA graph that was recorded of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


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
    """Runs work as CUDA graphs: the first time as it is, which warms up; the second time it is recorded.

    Work that cannot be recorded, because it waits for the device or is of another kind on each call, goes on as it is.

    Args:
        device: a CUDA device.

    Attributes:
        recordings: what was recorded, or could not be.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pools: dict[Hashable, Any] = {}
        self._seen: set[tuple[Hashable, ...]] = set()
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
        if key not in self._seen:
            self._seen.add(key)
            return self._beside(work)
        return self._recorded(key, work)

    def _beside(self, work: Callable[[], Any]) -> Any:
        """Run `work` in another stream than usual, as recording does, so that libraries get ready for that."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def _recorded(self, key: tuple[Hashable, ...], work: Callable[[], Any]) -> Any:
        begin, before = time.perf_counter(), torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pools.get(key[0]), stream=self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        except Exception as error:  # a model may do anything; recording has run nothing yet
            torch.cuda.synchronize(self._device)
            self._refused.add(key[0])
            self.recordings.append(Recording(key, time.perf_counter() - begin, 0, refused=_said(error)))
            return work()
        self._pools.setdefault(key[0], graph.pool())
        self._graphs[key] = graph, result
        nbytes = torch.cuda.memory_reserved(self._device) - before
        self.recordings.append(Recording(key, time.perf_counter() - begin, nbytes))
        graph.replay()
        return result


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
