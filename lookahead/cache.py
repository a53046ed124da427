"""The key-value cache that takes the rows of a whole token tree and keeps those of the accepted path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from lookahead.errors import UnsupportedCache

NAME = "cache" if "cache" in {one.name for one in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What `transformers` calls a cache among inputs and outputs: "cache" since 5.24."""

Held = tuple[Tensor, Tensor]
"""Keys and values of a layer, [B, H, S, D] each."""

BLOCK = 128  # slots; a buffer grows by a quarter of itself, and by no less than this
REALIGN = 128  # slots; holes are closed when they are this many and half of what was generated
_NOTHING: Mapping[int, Held] = MappingProxyType({})


class TreeLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention layer in a buffer that is longer than what it holds.

    The first `used` slots are kept; a pass writes its rows behind them and they count only once they are kept.

    Args:
        keys, values: [B, H, S, D] what it holds; copied.
        room: slots to allocate beyond it.
        used: slots of them that are kept; then they are taken over as the buffers. None: all.

    Attributes:
        keys, values: what the latest pass attended to.
    """

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, room: int, *, used: int | None = None) -> None:
        self._shown = 0
        super().__init__()
        self.used = keys.shape[-2] if used is None else used
        self.dtype, self.device = keys.dtype, keys.device
        self._keys, self._values = keys, values
        if used is None:
            self._keys, self._values = (_enlarged(one, self.used, self.used + room) for one in (keys, values))
        self.is_initialized = True
        self.show(self.used)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, N, D] rows behind the kept ones and return kept and new rows, [B, H, used + N, D]."""
        end = self.used + key_states.shape[-2]
        self.reserve(end)
        self._keys[:, :, self.used : end] = key_states
        self._values[:, :, self.used : end] = value_states
        self.show(end)
        return self.keys, self.values

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values with room for more, [B, H, S, D]."""
        return self._keys, self._values

    def reserve(self, slots: int) -> None:
        """Have room for `slots` slots."""
        if slots <= self._keys.shape[-2]:
            return
        more = slots + max(BLOCK, slots // 4)
        self._keys = _enlarged(self._keys, self.used, more)
        self._values = _enlarged(self._values, self.used, more)
        self.show(self.used)

    def get_seq_length(self) -> int:
        return self.used

    def keep(self, nodes: Tensor | None, count: int) -> None:
        """Keep `count` slots of the pass: slot i takes the row of `nodes[b, i]` ([B, count]; None: the first rows)."""
        if nodes is not None:
            tail = slice(self.used, self.used + count)
            for buffer in (self._keys, self._values):
                buffer[:, :, tail] = _rows(buffer[:, :, self.used :], nodes.to(buffer.device))
        self.used += count

    def realign(self, slots: Tensor, start: int, count: int) -> None:
        """Move the slots `slots[b]` ([B, count]) to `start`, so that `start + count` slots are used."""
        for buffer in (self._keys, self._values):
            buffer[:, :, start : start + count] = _rows(buffer, slots.to(buffer.device))
        self.used = start + count
        self.show(self.used)

    def ordinary(self, slots: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Return fresh keys and values of `slots` ([B, count]; None: the first `count`)."""
        keys, values = (
            buffer[:, :, :count].clone() if slots is None else _rows(buffer, slots.to(buffer.device))
            for buffer in (self._keys, self._values)
        )
        return keys, values

    def release(self) -> None:
        """Free the buffers."""
        self._keys = self._values = self._keys[:, :, :0].clone()
        self.show(0)

    def show(self, end: int) -> None:
        """Let `keys` and `values` be the first `end` slots."""
        self._shown = end

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self._shown]

    @keys.setter
    def keys(self, _: Any) -> None:
        """Leave to the buffers what a layer that holds nothing yet says of itself."""

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self._shown]

    @values.setter
    def values(self, _: Any) -> None:
        """Leave it to the buffers, too."""


class TreeCache(Cache):  # type: ignore[misc]
    """A `transformers` cache for verifying token trees, one per batch row.

    All rows share the slots; a row that accepts less than another leaves *holes*, which the mask hides. Holes are
    closed now and then by `realign`. The prompt's slots never move.

    Args:
        cache: the ordinary cache after the prefill; its tensors are taken over, layer by layer.
        rows: the batch size.
        room: slots to allocate beyond the prompt; more are added when needed.
        filled: buffers of layers of a `cache` that holds nothing, by their numbers: keys and values of the prompt, of
            `slots` slots, with the rows of a pass behind them; taken over.

    Attributes:
        attention: its layers that hold keys and values.
    """

    def __init__(
        self, cache: DynamicCache, *, rows: int, room: int, filled: Mapping[int, Held] = _NOTHING, slots: int = 0
    ) -> None:
        require_ordinary(cache)
        layers: list[Any] = []
        try:
            for i, layer in enumerate(cache.layers):
                if i in filled:
                    layers.append(TreeLayer(*filled[i], room, used=slots))
                    continue
                holds = layer.keys is not None and layer.keys.numel() > 0
                layers.append(TreeLayer(layer.keys, layer.values, room) if holds else layer)
                layer.keys = layer.values = None
        except BaseException:
            for layer, taken in zip(cache.layers, layers, strict=False):
                layer.keys, layer.values = taken.keys, taken.values
            raise
        super().__init__(layers=layers)
        self.attention = [layer for layer in layers if isinstance(layer, TreeLayer)]
        self.prompt = self.used
        self._slots: list[list[int]] = [[] for _ in range(rows)]

    @property
    def device(self) -> torch.device:
        """Where its first keys are."""
        return self.attention[0].device

    @property
    def used(self) -> int:
        """Slots in use, holes included."""
        return self.attention[0].used

    def buffers(self, nodes: int) -> list[Tensor]:
        """Return keys and values of all layers, one after the other, with room for a pass over so many nodes.

        The layers show what that pass attends to.
        """
        for layer in self.attention:
            layer.reserve(layer.used + nodes)
            layer.show(layer.used + nodes)
        return [buffer for layer in self.attention for buffer in layer.buffers]

    @property
    def has_holes(self) -> bool:
        """Whether some row does not hold all slots behind the prompt."""
        return any(len(slots) != self.used - self.prompt for slots in self._slots)

    def generated(self, row: int) -> list[int]:
        """Return the slots behind the prompt that hold the tokens of `row`, in order."""
        return self._slots[row]

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, for each batch row, the pass's rows at `paths[b]` (node numbers, in order); drop all others."""
        count = max(len(path) for path in paths)
        if count == 0:
            return
        start = self.used
        nodes = None
        if any(list(path) != list(range(count)) for path in paths):
            # A hole takes the row of node 0, which is sound; a wrong guess may hold NaN, which no mask stops.
            table = np.zeros((len(paths), count), np.int64)
            for row, path in enumerate(paths):
                table[row, : len(path)] = path
            nodes = self._index(table)
        for layer in self.attention:
            layer.keep(nodes, count)
        for slots, path in zip(self._slots, paths, strict=True):
            slots.extend(range(start, start + len(path)))

    @property
    def complete(self) -> int:
        """The number of generated tokens that every row holds."""
        return min(len(slots) for slots in self._slots)

    def drop(self, row: int, count: int) -> list[int]:
        """Forget the last `count` tokens of `row` and return their slots, which are holes from now on."""
        kept = len(self._slots[row]) - count
        dropped = self._slots[row][kept:]
        del self._slots[row][kept:]
        return dropped

    def wants_realign(self) -> bool:
        """Whether holes take enough of the cache that closing them pays."""
        generated = self.used - self.prompt
        longest = max(len(slots) for slots in self._slots)
        return generated - longest >= REALIGN and 2 * longest <= generated

    def realign(self) -> None:
        """Move every row's slots together, right behind the prompt."""
        count = max(len(slots) for slots in self._slots)
        table = self._padded(count)
        index = self._index(table)
        for layer in self.attention:
            layer.realign(index, self.prompt, count)
        self._slots = [list(range(self.prompt, self.prompt + len(slots))) for slots in self._slots]

    def give_back(self, cache: DynamicCache, tokens: int) -> None:
        """Fill `cache` with the prompt and the first `tokens` generated tokens of every row, as a plain run would.

        The layers are freed one by one as this goes on, so this cache is spent. Rows that hold fewer tokens cannot be
        expressed in an ordinary cache: callers see to it that all have them.
        """
        count = self.prompt + tokens
        held = [[*range(self.prompt), *slots[:tokens]] for slots in self._slots]
        index = None if all(slots == list(range(count)) for slots in held) else self._index(np.array(held, np.int64))
        for layer, target in zip(self.layers, cache.layers, strict=False):
            if isinstance(layer, TreeLayer):
                fill(target, *layer.ordinary(index, count))
                layer.release()

    def _padded(self, count: int) -> NDArray[np.int64]:
        table = np.zeros((len(self._slots), count), np.int64)
        for row, slots in enumerate(self._slots):
            table[row, : min(count, len(slots))] = slots[:count]
        return table

    def _index(self, table: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(table).to(self.attention[0].device)


def require_ordinary(cache: Any) -> None:
    """Raise `UnsupportedCache` unless `cache` is a `DynamicCache` whose layers keep positions, all or the last ones."""
    kind = type(cache).__name__
    advice = f"leave {NAME} and cache_implementation out, pass a DynamicCache, or call model.generate()"
    if type(cache) is not DynamicCache:
        raise UnsupportedCache(f"the cache is a {kind}, which cannot drop rejected tokens here; {advice}")
    if getattr(cache, "offloading", False):
        raise UnsupportedCache(f"the cache is offloaded, which is not supported here; {advice}")
    for i, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and not (_is_dummy(layer) or is_state(layer)):
            name = type(layer).__name__
            raise UnsupportedCache(
                f"layer {i} of the {kind} is a {name}, which cannot drop rejected tokens; "
                "call model.generate() for this model"
            )


def length_of(cache: Any, tokens: int) -> int:
    """Return how many tokens `cache` has seen; states do not tell, so for them it is `tokens`."""
    keys = any(getattr(layer, "keys", None) is not None for layer in cache.layers)
    return int(cache.get_seq_length()) if keys else tokens


def fill_all(cache: Any, opened: Any) -> None:
    """Let `cache` hold what the cache `opened` holds, which was made of it, after passes over it."""
    for i, layer in enumerate(opened.layers):
        if i == len(cache.layers):
            cache.layers.append(layer)
        target = cache.layers[i]
        if layer is not target and getattr(layer, "keys", None) is not None and layer.keys.numel():
            fill(target, layer.keys, layer.values)


def apart(cache: Any) -> tuple[Any, DynamicCache | None]:
    """Return the cache of the text itself, and that of the encoder's states, where there is one."""
    if type(cache) is EncoderDecoderCache:
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


def joined(cache: Any, cross: DynamicCache | None) -> Any:
    """Return what `apart` takes apart."""
    return cache if cross is None else EncoderDecoderCache(cache, cross)


def opened(cache: DynamicCache) -> DynamicCache:
    """Return a cache with what `cache` holds, whose layers keep every position; `cache` itself if they do.

    Where a window has dropped positions there are zeros now: nothing looks there again.
    """
    if not any(type(layer) is DynamicSlidingWindowLayer or _is_dummy(layer) for layer in cache.layers):
        return cache
    new = DynamicCache()
    new.layers = [layer if _is_dummy(layer) or is_state(layer) else _whole(layer) for layer in cache.layers]
    return new


def is_state(layer: Any) -> bool:
    """Whether a layer keeps a state, alone or beside keys and values of all positions."""
    return type(layer).__name__ in ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer")


def _whole(layer: Any) -> DynamicLayer:
    """Return a layer with what `layer` holds, that keeps every position."""
    new = DynamicLayer()
    if layer.is_initialized and layer.get_seq_length():
        new.lazy_initialization(layer.keys, layer.values)
        dropped = layer.get_seq_length() - layer.keys.shape[-2]
        new.keys, new.values = (
            torch.cat([states.new_zeros((*states.shape[:2], dropped, states.shape[3])), states], dim=-2)
            for states in (layer.keys, layer.values)
        )
    return new


def _is_dummy(layer: Any) -> bool:
    """Whether a layer stands for one that needs no cache, as where layers share keys and values."""
    return type(layer).__name__ == "DummyLayer"


def fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Let an ordinary layer hold `keys` and `values` ([B, H, S, D] of all positions), as after passes over them."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length = keys.shape[-2]
        last = layer.sliding_window - 1
        keys, values = (states[:, :, max(states.shape[-2] - last, 0) :].clone() for states in (keys, values))
    layer.keys, layer.values = keys, values


def _enlarged(states: Tensor, used: int, slots: int) -> Tensor:
    """Return a buffer of `slots` slots that starts with the first `used` of `states` ([B, H, S, D]).

    The others may hold anything: a pass writes its rows before it looks at them.
    """
    batch, heads, _, width = states.shape
    buffer = states.new_empty((batch, heads, slots, width))
    buffer[:, :, :used] = states[:, :, :used]
    return buffer


def _rows(states: Tensor, index: Tensor) -> Tensor:
    """Return [B, H, K, D]: for each batch row the slots `index[b]` ([B, K]) of `states` ([B, H, S, D])."""
    if index.shape[0] == 1:
        return states.index_select(2, index[0])
    shape = (-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index[:, None, :, None].expand(shape))
