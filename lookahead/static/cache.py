"""A key-value cache that never changes its shape: every row of a batch keeps its tokens one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lookahead.cache import fill, require_ordinary


class Slots:
    """Where the rows of the pass that runs go: [B, N] int64, for all layers."""

    def __init__(self) -> None:
        self.index = torch.zeros((1, 1), dtype=torch.int64)


class StaticLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention layer, [B, H, S, D] for S slots, of which a pass sees all; a mask hides most.

    Args:
        keys, values: of any length; their shapes, dtype and device are taken.
        slots: how many there are to be.
        where: to which of them a pass writes.
    """

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, slots: int, where: Slots) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = (
            states.new_zeros((*states.shape[:2], slots, states.shape[3])) for states in (keys, values)
        )
        self.is_initialized = True
        self._where = where

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, N, D] rows to the slots of the pass; return all slots, [B, H, S, D]."""
        write(self.keys, self._where.index, key_states)
        write(self.values, self._where.index, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return a number that is no length: a graph would keep it for ever, and positions are given anyhow."""
        return 1

    def load(self, keys: Tensor, values: Tensor) -> None:
        """Hold `keys` and `values` in the first slots, and nothing in the others."""
        count = keys.shape[-2]
        for buffer, states in ((self.keys, keys), (self.values, values)):
            buffer[:, :, :count] = states
            buffer[:, :, count:] = 0  # what a mask hides is multiplied by 0, which no NaN survives

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the rows of slots `source[b]` ([B, N]) to slots `target[b]`."""
        for buffer in (self.keys, self.values):
            write(buffer, target, read(buffer, source))


class StaticCache(Cache):  # type: ignore[misc]
    """A `transformers` cache of fixed shape for verifying token trees, one per batch row.

    A row has its prompt in the first slots and its generated tokens right behind, as many as it has: rows that run
    ahead of others leave no holes. A pass writes its nodes behind those; the accepted ones are moved together.

    Args:
        cache: an ordinary cache, whose layers are taken for examples.
        slots: how many each layer has.

    Attributes:
        where: the slots that the pass writes to.
        attention: its layers that hold keys and values.
        prompt: slots of the prompt.
        lengths: generated tokens that each row holds.
    """

    def __init__(self, cache: DynamicCache, *, slots: int) -> None:
        self.where, self.slots = Slots(), slots
        layers: list[Any] = []
        for layer in cache.layers:
            holds = layer.keys is not None and layer.keys.numel() > 0
            layers.append(StaticLayer(layer.keys, layer.values, slots, self.where) if holds else layer)
        super().__init__(layers=layers)
        self.attention: list[StaticLayer] = [layer for layer in layers if isinstance(layer, StaticLayer)]
        self.prompt = 0
        self.lengths = [0] * self.attention[0].keys.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its first keys are."""
        return self.attention[0].device

    @property
    def used(self) -> int:
        """Slots in use by the row that has most."""
        return self.prompt + max(self.lengths)

    @property
    def complete(self) -> int:
        """The number of generated tokens that every row holds."""
        return min(self.lengths)

    @property
    def nbytes(self) -> int:
        """What its keys and values take."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.attention)

    def load(self, cache: DynamicCache) -> None:
        """Hold what the ordinary `cache` holds behind a prompt, layer by layer, which is freed there."""
        require_ordinary(cache)
        self.prompt, self.lengths = int(cache.get_seq_length()), [0] * len(self.lengths)
        for own, layer in zip(self.layers, cache.layers, strict=True):
            if isinstance(own, StaticLayer):
                own.load(layer.keys, layer.values)
                layer.keys = layer.values = None

    def follow(self, other: StaticCache) -> None:
        """Hold what a smaller cache holds."""
        self.prompt, self.lengths = other.prompt, list(other.lengths)
        for own, layer in zip(self.attention, other.attention, strict=True):
            own.load(layer.keys, layer.values)

    def forget_behind(self) -> None:
        """Clear what is behind the slots of all rows, such as keys of a guess that have no numbers."""
        for layer in self.attention:
            for buffer in (layer.keys, layer.values):
                for row, length in enumerate(self.lengths):
                    buffer[row, :, self.prompt + length :] = 0

    def keep(self, counts: Sequence[int]) -> None:
        """Count the first `counts[b]` slots behind those of each row as its own."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def drop(self, row: int, count: int) -> None:
        """Forget the last `count` tokens of `row`."""
        self.lengths[row] -= count

    def give_back(self, cache: DynamicCache, tokens: int) -> None:
        """Fill `cache` with the prompt and the first `tokens` generated tokens of every row, as a plain run would."""
        count = self.prompt + tokens
        for own, layer in zip(self.layers, cache.layers, strict=False):
            if isinstance(own, StaticLayer):
                fill(layer, *(buffer[:, :, :count].clone() for buffer in (own.keys, own.values)))


def write(buffer: Tensor, slots: Tensor, states: Tensor) -> None:
    """Write [B, H, N, D] states to slots [B, N] of a buffer [B, H, S, D], in place."""
    if len(slots) == 1:
        buffer.index_copy_(2, slots[0], states)
    else:
        buffer.scatter_(2, slots[:, None, :, None].expand(states.shape), states)


def read(buffer: Tensor, slots: Tensor) -> Tensor:
    """Return the states [B, H, N, D] at slots [B, N] of a buffer [B, H, S, D]."""
    if len(slots) == 1:
        return buffer.index_select(2, slots[0])
    batch, heads, _, width = buffer.shape
    return buffer.gather(2, slots[:, None, :, None].expand(batch, heads, slots.shape[1], width))
