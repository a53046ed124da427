"""The attention mask of a pass over token trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lookahead.sources.kernels import kernel


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
