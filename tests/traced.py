"""A recorder that behaves as a CUDA graph does, without a GPU: what was recorded runs, not what is written."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx


class Traced:
    """Runs work the first time; then traces it into its tensor operations, and runs those alone from there on.

    Numbers and tensors that Python held while it was traced are in it for good. Work that looks into a tensor cannot be
    traced, and runs as it is. Results stay where they were at first, and are spoilt when work of the same name, which
    shares the memory of graphs, runs with other shapes.

    Attributes:
        replays: how often each key ran without its work.
        refused: names of work that could not be traced.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Any] = {}
        self._results: dict[Any, tuple[torch.Tensor, ...]] = {}
        self.replays: dict[Any, int] = {}
        self.refused: set[Any] = set()

    def run(self, key: tuple[Hashable, ...], work: Callable[[], Any]) -> Any:
        if key in self._graphs:
            self.replays[key] = self.replays.get(key, 0) + 1
            return self._given(key, self._graphs[key]())
        if key[0] in self.refused or key not in self._seen:
            self._seen.add(key)
            return work()
        results: list[Any] = []

        def traced() -> Any:
            results.append(work())
            return results[-1]

        try:
            self._graphs[key] = make_fx(traced)()
        except RuntimeError as error:
            if "trying to get value out of a tracing tensor" not in str(error):
                raise
            self.refused.add(key[0])
            return work()
        # Tracing has run it, and an operation that moves rows must not run twice; results are of the tracer's kind.
        return self._given(key, self._graphs[key]()) if key[0] == "score" else None

    def _given(self, key: Any, results: Any) -> Any:
        if results is None:
            return None
        for other, spoilt in self._results.items():
            if other != key and other[0] == key[0]:
                for tensor in spoilt:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        kept = self._results.setdefault(key, tuple(result.clone() for result in results))
        for tensor, result in zip(kept, results, strict=True):
            tensor.copy_(result)
        return kept
