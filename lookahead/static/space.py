"""What static passes of one model and batch size need: cache, boards, masks and recorded graphs, for many requests."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookahead.families import Family
from lookahead.static.board import Board
from lookahead.static.cache import StaticCache
from lookahead.static.mask import StaticMasks
from lookahead.static.recorder import Graphs, Recorder

KEPT = 2  # spaces of a model between requests


class Space:
    """Tensors of fixed shapes for the passes of one batch, and who runs them.

    Args:
        cache: an ordinary cache after a prefill, for an example.
        slots: the capacity of the static one.
        family: how drafts run through the model.
        device: where the inputs of the model go.
        recorder: runs the work of passes.

    Attributes:
        cache: keys and values.
    """

    def __init__(
        self, cache: DynamicCache, slots: int, family: Family, device: torch.device, recorder: Recorder
    ) -> None:
        with torch.inference_mode(False):  # what is made inside could never be written to outside
            self.cache = StaticCache(cache, slots=slots)
            batch = len(self.cache.lengths)
            self._shown = torch.ones((batch, slots), dtype=torch.bool, device=device)
            self._first = torch.zeros(batch, dtype=torch.int64, device=device)
        self._family, self._device = family, device
        self._boards: dict[int, Board] = {}
        self._masks: dict[int, StaticMasks] = {}
        self.recorder = recorder
        self._left: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self, cache: DynamicCache, prompt: Tensor | None) -> None:
        """Take over what an ordinary cache holds behind a prompt; `prompt` ([B, P] bool) says what is not padding."""
        self._arrive()
        self.cache.load(cache)
        self._shown.fill_(True)
        self._first.zero_()
        if prompt is not None:
            self._shown[:, : prompt.shape[1]] = prompt
            length = prompt.new_full((), prompt.shape[1], dtype=torch.int64)
            self._first[:] = torch.where(prompt.any(1), prompt.to(torch.int64).argmax(1), length)

    def follow(self, other: Space) -> None:
        """Go on where a smaller space is full."""
        self._arrive()
        self.cache.follow(other.cache)
        self._shown.fill_(True)
        self._shown[:, : other.cache.prompt] = other._shown[:, : other.cache.prompt]
        self._first.copy_(other._first)

    def leave(self) -> None:
        """Tell that nothing more will be done here, until it begins anew, in another stream of the device perhaps."""
        if self._left is not None:
            self._left.record(torch.cuda.current_stream(self._device))

    def _arrive(self) -> None:
        if self._left is not None:
            torch.cuda.current_stream(self._device).wait_event(self._left)

    def board(self, rows: int) -> Board:
        """Return the board of passes over `rows` nodes."""
        if rows not in self._boards:
            with torch.inference_mode(False):
                self._boards[rows] = Board(len(self.cache.lengths), rows, self._device)
        return self._boards[rows]

    def masks(self, rows: int) -> StaticMasks:
        """Return the masks of passes over `rows` nodes."""
        if rows not in self._masks:
            reaches, keyed = dict(self._family.reaches), self._family.keyed
            dtype = self.cache.attention[0].dtype
            with torch.inference_mode(False):
                self._masks[rows] = StaticMasks(self._shown, self._first, rows, dtype, reaches, keyed=keyed)
        return self._masks[rows]

    @property
    def nbytes(self) -> int:
        """Memory of the cache and, as measured while they were recorded, of the graphs."""
        recordings = self.recorder.recordings if isinstance(self.recorder, Graphs) else []
        return self.cache.nbytes + sum(one.nbytes for one in recordings)


class Spaces:
    """The spaces of one model that no request uses right now; the latest `KEPT` of them."""

    def __init__(self) -> None:
        self._free: OrderedDict[Hashable, Space] = OrderedDict()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Space]:
        with self._lock:
            return iter(list(self._free.values()))

    def take(self, key: Hashable) -> Space | None:
        """Return a space that was left under this key, which is the caller's now."""
        with self._lock:
            return self._free.pop(key, None)

    def leave(self, key: Hashable, space: Space) -> None:
        """Keep a space for the next request of its kind."""
        space.leave()
        with self._lock:
            self._free[key] = space
            while len(self._free) > KEPT:
                self._free.popitem(last=False)

    def clear(self) -> None:
        """Free all of them, with their graphs."""
        with self._lock:
            self._free.clear()


_OF: WeakKeyDictionary[Any, Spaces] = WeakKeyDictionary()
_MAKING = threading.Lock()


def spaces_of(model: Any) -> Spaces:
    """Return the spaces that are kept for `model`, as long as there is the model."""
    with _MAKING:
        return _OF.setdefault(model, Spaces())
