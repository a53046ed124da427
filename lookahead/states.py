"""The cache of a model whose layers keep a state: what was rejected cannot be cut from a state, only run again without.

A pass over a chain leaves every state behind its last token. Where all of the chain was accepted, that is right.
Otherwise the states from before the pass are put back, and the accepted tokens are *pending*: they run again at the
start of the next pass, which costs rows, but no pass of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lookahead.cache import fill_all

MOST = 16  # pending tokens; then a pass runs without a draft, behind which nothing is pending


@final
class StateCache:
    """A `transformers` cache of attention layers and states, all rows of which go on by as many tokens.

    Args:
        cache: after the prefill; used as it is.
        rows: the batch size.
        prompt: tokens of the prompt.

    Attributes:
        cache: what the model is given.
        prompt: tokens of the prompt.
        pending: [B, P] int64, accepted tokens that no state has seen.
    """

    has_holes = False

    def __init__(self, cache: Any, *, rows: int, prompt: int) -> None:
        self.cache, self.prompt = cache, prompt
        self.pending: NDArray[np.int64] = np.zeros((rows, 0), np.int64)
        self._seen = 0  # generated tokens that are in the states
        self._before: list[tuple[dict[str, Any], int]] | None = None  # what was before the pass that is running
        self._ran = 0

    @property
    def device(self) -> torch.device:
        """Where its first layer is."""
        return next(_tensors(self.cache)).device

    @property
    def used(self) -> int:
        """Tokens that are held, pending ones included."""
        return self.prompt + self.complete

    @property
    def complete(self) -> int:
        """The number of generated tokens that every row holds."""
        return self._seen + int(self.pending.shape[1])

    @property
    def full(self) -> bool:
        """Whether so many tokens are pending that the next pass should run nothing else."""
        return bool(self.pending.shape[1] >= MOST)

    def begin(self, tokens: int) -> None:
        """Get ready for a pass over `tokens` tokens, the pending ones included; one that was begun before is undone."""
        if self._before is not None:
            self._undo()
        self._before, self._ran = [_saved(layer) for layer in self.cache.layers], tokens

    def keep(self, kept: NDArray[np.int64]) -> None:
        """Keep `kept` ([B, K]), the first tokens of the chains that ran behind the pending ones."""
        count = kept.shape[1]
        if self.pending.shape[1] + count == self._ran:
            self._seen += self._ran
            self.pending, self._before = kept[:, :0], None
            return
        self._undo()
        self.pending = np.concatenate([self.pending, kept], axis=1)

    def take(self) -> list[int]:
        """Return the last pending token of each row, which is not held any more."""
        last: list[int] = self.pending[:, -1].tolist()
        self.pending = self.pending[:, :-1]
        return last

    def give_back(self, cache: Any) -> None:
        """Let `cache`, whose states these are, have the keys and values too; nothing may be pending.

        A pass that was begun and not kept, as where somebody's code has failed behind it, is undone.
        """
        if self._before is not None:
            self._undo()
        fill_all(cache, self.cache)

    def _undo(self) -> None:
        """Put everything back to where it was before the pass."""
        assert self._before is not None
        for layer, (before, length) in zip(self.cache.layers, self._before, strict=True):
            vars(layer).update(before)
            if _length(layer):  # of a pass that has failed, not all layers hold the tokens
                layer.keys, layer.values = (states[..., :length, :] for states in (layer.keys, layer.values))
        self._before = None


def _saved(layer: Any) -> tuple[dict[str, Any], int]:
    """Return a copy of the states of a layer, and how many keys and values it has, which can be cut instead."""
    states = {name: _copied(value) for name, value in vars(layer).items() if name not in ("keys", "values")}
    return states, _length(layer)


def _length(layer: Any) -> int:
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or not keys.numel() else int(keys.shape[-2])


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return value


def _tensors(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        for value in vars(layer).values():
            parts: Sequence[Any] = list(value.values()) if isinstance(value, dict) else [value]
            yield from (part for part in parts if isinstance(part, Tensor))
