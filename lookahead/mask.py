"""The attention masks of a pass over token trees: what a node may see, for every kind of layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lookahead.sources.kernels import kernel


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back a layer looks: everywhere, over the last `sliding` tokens, or to the start of a chunk of `chunk`."""

    sliding: int = 0
    chunk: int = 0

    @property
    def whole(self) -> bool:
        """Whether it looks everywhere."""
        return not (self.sliding or self.chunk)


class TreeMasks:
    """The masks of all kinds of layers, from one record of what every slot of the cache holds.

    Layers that do not look everywhere measure distances in places of the text, padding included, as `transformers`
    does: slot s of the prompt is at place s, and the k-th generated token of a row k places behind the prompt.

    Args:
        prompt_mask: [B, P] bool, true where the prompt holds a token and not padding.
        reaches: of each kind of layer, by the name that the model knows it by.
        keyed: whether the model takes a mask for each kind, by name; otherwise there is one kind.

    Attributes:
        windows: whether some layers do not look everywhere.
    """

    def __init__(
        self, prompt_mask: Tensor, dtype: torch.dtype, reaches: Mapping[str, Reach], *, keyed: bool = False
    ) -> None:
        self._reaches, self._keyed, self._dtype, self._device = dict(reaches), keyed, dtype, prompt_mask.device
        self._prompt = prompt_mask.shape[1]
        shown = prompt_mask.cpu().numpy()
        self._places = np.where(shown, np.arange(self._prompt), _HIDDEN)
        self._first = np.where(shown.any(1), shown.argmax(1), self._prompt)
        self._counts = [0] * len(shown)
        self.windows = any(not reach.whole for reach in self._reaches.values())
        self._whole = TreeMask(prompt_mask, dtype) if any(reach.whole for reach in self._reaches.values()) else None

    def tree(self, ancestors: Tensor, places: NDArray[np.int64] | None, used: int) -> Any:
        """Return the mask, or the masks by name, for trees behind `used` slots.

        Args:
            ancestors: [B, N, N] bool, on the host.
            places: [B, N] of the nodes; None will do where there are no windows.
        """
        if self._whole is not None and not (self.windows or self._keyed):
            return self._whole.tree(ancestors.to(self._device), used)
        made: dict[Reach, Tensor] = {}
        for reach in set(self._reaches.values()):
            if self._whole is not None and reach.whole:
                made[reach] = self._whole.tree(ancestors.to(self._device), used)
            else:
                assert places is not None
                made[reach] = self._window(reach, ancestors, places, used)
        if not self._keyed:
            return next(iter(made.values()))
        return {name: made[reach] for name, reach in self._reaches.items()}

    def _window(self, reach: Reach, ancestors: Tensor, places: NDArray[np.int64], used: int) -> Tensor:
        batch, size, _ = ancestors.shape
        shown = np.empty((batch, 1, size, used + size), np.bool_)
        _show(self._reserved(used), places, self._first, ancestors.numpy(), used, reach.sliding, reach.chunk, shown)
        mask = torch.full(shown.shape, torch.finfo(self._dtype).min, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(torch.from_numpy(shown).to(self._device), 0)

    def keep(self, counts: Sequence[int], used: int) -> None:
        """Show, behind `used` slots, the next `counts[b]` to row b and hide the rest of those any row kept."""
        if self._whole is not None:
            self._whole.keep(counts, used)
        if self.windows:
            places = self._reserved(used + max(counts))
            places[:, used : used + max(counts)] = _HIDDEN
            for row, count in enumerate(counts):
                places[row, used : used + count] = self._prompt + self._counts[row] + np.arange(count)
                self._counts[row] += count

    def hide(self, row: int, slots: Sequence[int]) -> None:
        """Hide `slots`, which hold the latest tokens of batch row `row`."""
        if self._whole is not None:
            self._whole.hide(row, slots)
        if self.windows:
            self._places[row, list(slots)] = _HIDDEN
            self._counts[row] -= len(slots)

    def realign(self, counts: Sequence[int]) -> None:
        """Show the first `counts[b]` slots behind the prompt to row b and hide all later ones."""
        if self._whole is not None:
            self._whole.realign(counts)
        if self.windows:
            self._places[:, self._prompt :] = _HIDDEN
            self._counts = [0] * len(counts)
            whole, self._whole = self._whole, None
            self.keep(counts, self._prompt)
            self._whole = whole

    def _reserved(self, slots: int) -> NDArray[np.int64]:
        """Return the places of at least so many slots."""
        have = self._places.shape[1]
        if slots > have:
            self._places = np.pad(self._places, ((0, 0), (0, slots - have + 256)), constant_values=_HIDDEN)
        return self._places


_HIDDEN = -1


class TreeMask:
    """The additive attention mask of a pass, [B, 1, N, S + N], kept up to date instead of built anew.

    Columns of kept slots change only when slots are kept, dropped or moved; the square of the tree is written each
    pass.

    Args:
        prompt_mask: [B, P] bool, true where the prompt holds a token and not padding.
    """

    def __init__(self, prompt_mask: Tensor, dtype: torch.dtype) -> None:
        self.hidden = torch.finfo(dtype).min
        self._hidden_bits = _as_bits(torch.full((1,), self.hidden, dtype=dtype))[0]
        batch, self.prompt = prompt_mask.shape
        self.buffer = torch.full((batch, 1, 1, self.prompt), self.hidden, dtype=dtype, device=prompt_mask.device)
        self.buffer[:, 0, 0, :].masked_fill_(prompt_mask, 0)
        self._look()
        self._kept = range(0)  # slots that every row kept, and that are not shown yet

    def tree(self, ancestors: Tensor, used: int) -> Tensor:
        """Return the mask for trees with `ancestors` ([B, N, N] bool) behind `used` slots."""
        rows, kept = ancestors.shape[-1], self._kept
        self._reserve(rows, used + rows)
        if self._bits is not None:
            _draw(self._bits, kept.start, kept.stop, ancestors.numpy(), used, self._hidden_bits)
            self._kept = range(0)
        else:
            self._catch_up()
            self.buffer[:, 0, :rows, used : used + rows].fill_(self.hidden).masked_fill_(ancestors, 0)
        return self.buffer[:, :, :rows, : used + rows]

    def hide(self, row: int, slots: Sequence[int]) -> None:
        """Hide `slots` from batch row `row`."""
        self._catch_up()
        self.buffer[row, :, :, list(slots)] = self.hidden

    def keep(self, counts: Sequence[int], used: int) -> None:
        """Show, behind `used` slots, the next `counts[b]` to row b and hide the rest of those any row kept."""
        most = max(counts)
        if min(counts) == most and (not self._kept or self._kept.stop == used):
            self._kept = range(self._kept.start if self._kept else used, used + most)
            return
        self._catch_up()
        self._reserve(1, used + most)
        columns = self.buffer[..., used : used + most]
        columns.zero_()
        if min(counts) < most:
            holes = torch.arange(most)[None] >= torch.tensor(counts)[:, None]
            columns.masked_fill_(holes.to(columns.device)[:, None, None], self.hidden)

    def realign(self, counts: Sequence[int]) -> None:
        """Show the first `counts[b]` slots behind the prompt to row b and hide all later ones."""
        self._kept = range(0)
        self.buffer[..., self.prompt :] = self.hidden
        self.keep(counts, self.prompt)

    def _catch_up(self) -> None:
        """Show what every row kept; passes over single tokens need no mask, so it can wait."""
        if self._kept:
            self._reserve(1, self._kept.stop)
            self.buffer[..., self._kept.start : self._kept.stop] = 0
            self._kept = range(0)

    def _reserve(self, rows: int, columns: int) -> None:
        """Grow the buffer; the row stride stays a multiple of 16, which fused GPU kernels ask for."""
        batch, _, have_rows, have = self.buffer.shape
        if rows <= have_rows and columns <= have:
            return
        wide = have if columns <= have else -(-(columns + max(256, columns // 4)) // 16) * 16
        new = self.buffer.new_full((batch, 1, max(rows, have_rows), wide), self.hidden)
        new[..., :have] = self.buffer[:, :, :1].expand(-1, -1, new.shape[2], -1)
        self.buffer = new
        self._look()

    def _look(self) -> None:
        """Look at the buffer as whole numbers, which the host writes far quicker than a tensor's slices."""
        self._bits = _as_bits(self.buffer) if self.buffer.device.type == "cpu" else None


_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_bits(values: Tensor) -> NDArray[Any]:
    """Return the same memory as whole numbers; numpy has no bfloat16."""
    return values.view(_WHOLE[values.element_size()]).numpy()


@kernel
def _draw(bits, start, stop, ancestors, used, hidden):  # type: ignore[no-untyped-def]
    """Show the slots from `start` to `stop`, and write the square of the trees behind `used` slots.

    Args:
        bits: [B, 1, R, S]; 0.0 is 0 in every float format.
        ancestors: [B, N, N].
    """
    for row in range(bits.shape[0]):
        for i in range(bits.shape[2]):
            for j in range(start, stop):
                bits[row, 0, i, j] = 0
        for i in range(ancestors.shape[1]):
            for j in range(ancestors.shape[1]):
                bits[row, 0, i, used + j] = 0 if ancestors[row, i, j] else hidden


@kernel
def _show(places, queries, first, ancestors, used, sliding, chunk, shown):  # type: ignore[no-untyped-def]
    """Fill `shown` [B, 1, N, used + N]: which slots each node sees.

    Args:
        places: [B, S] of the slots, -1: hidden.
        queries: [B, N] places of the nodes.
        first: [B] the place of the first token, from which chunks are counted.
    """
    for row in range(queries.shape[0]):
        for i in range(queries.shape[1]):
            at, start = queries[row, i], np.int64(0)
            if sliding > 0:
                start = at - sliding + 1
            if chunk > 0:
                start = first[row] + (at - first[row]) // chunk * chunk
            start = max(start, np.int64(0))
            for slot in range(used):
                shown[row, 0, i, slot] = places[row, slot] >= start
            for j in range(queries.shape[1]):
                shown[row, 0, i, used + j] = ancestors[row, i, j] and queries[row, j] >= start
