"""The attention masks of a pass over token trees, drawn where the model runs, in tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lookahead.mask import Reach
from lookahead.static.board import Board


class StaticMasks:
    """The additive masks [B, 1, N, S] of all kinds of layers, for one number of nodes.

    Layers that do not look everywhere measure distances in places of the text, as in `lookahead.mask.TreeMasks`. Here
    slot s of a row that has used `u` slots holds what is at place s, or node s - u of its tree.

    Args:
        prompt: [B, S] bool, false where a slot of the prompt holds padding.
        first: [B] int64, the place of the first token of each row.
        reaches: of each kind of layer, by the name that the model knows it by.
        keyed: whether the model takes a mask for each kind, by name.
    """

    def __init__(
        self, prompt: Tensor, first: Tensor, rows: int, dtype: torch.dtype, reaches: Mapping[str, Reach], *, keyed: bool
    ) -> None:
        batch, slots = prompt.shape
        self._prompt, self._first, self._reaches, self._keyed = prompt, first, dict(reaches), keyed
        self._hidden = torch.finfo(dtype).min
        self._columns = torch.arange(slots, device=prompt.device)
        self._masks = {
            reach: torch.full((batch, 1, rows, slots), self._hidden, dtype=dtype, device=prompt.device)
            for reach in set(self._reaches.values())
        }

    def draw(self, board: Board) -> Any:
        """Return the mask, or the masks by name, of what is on the board."""
        node = self._columns - board.used[:, None]  # [B, S], which node of the tree a slot holds
        within = (node >= 0) & (node < board.rows)
        index = node.clamp(0, board.rows - 1)
        drawn = board.ancestors.gather(2, index[:, None].expand(-1, board.rows, -1)) & within[:, None]
        shown = drawn | (self._prompt & (node < 0))[:, None]
        for reach, mask in self._masks.items():
            seen = shown if reach.whole else shown & self._reached(reach, board, index, within)
            mask.fill_(self._hidden).masked_fill_(seen[:, None], 0)
        if not self._keyed:
            return next(iter(self._masks.values()))
        return {name: self._masks[reach] for name, reach in self._reaches.items()}

    def _reached(self, reach: Reach, board: Board, index: Tensor, within: Tensor) -> Tensor:
        """Return [B, N, S] bool: which slots are near enough to each node."""
        queries = board.used[:, None] + board.depth
        places = torch.where(within, queries.gather(1, index), self._columns)
        start = queries - reach.sliding + 1
        if reach.chunk:
            start = queries - (queries - self._first[:, None]) % reach.chunk
        near: Tensor = places[:, None] >= start[:, :, None]
        return near
