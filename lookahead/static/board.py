"""What the host tells the device about a pass: written into one buffer, sent in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lookahead.draft import Draft

_TOKENS, _POSITIONS, _DEPTH, _PARENTS = range(4)


class Board:
    """The trees of a pass over `rows` nodes in each of `batch` rows, on the device in tensors that stay where they are.

    Attributes:
        tokens, positions, depth: [B, N] int64; nodes beyond a draft repeat its root.
        parents: [B, N] int64; -1 for what cannot be accepted: the root, probes, nodes beyond the draft.
        used: [B] int64, the slots that each row has used.
        ancestors: [B, N, N] bool; each node is its own.
        picks: [B, N] int64, for the tokens that follow the nodes, once they are known.
        order: [B, N] int64, for the nodes whose rows are to stand in the slots of the pass.
    """

    def __init__(self, batch: int, rows: int, device: torch.device) -> None:
        numbers = (4 * rows + 1) * batch
        size = 8 * numbers + batch * rows * rows
        self._far = device.type != "cpu"
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._sent = torch.zeros(size, dtype=torch.uint8, device=device) if self._far else self._host
        self.rows = rows
        table, self.used, self.ancestors = _views(self._sent, batch, rows)
        self.tokens, self.positions, self.depth, self.parents = table
        self.picks, self.order = torch.zeros((2, batch, rows), dtype=torch.int64, device=device)
        host = _views(self._host, batch, rows)
        self._table: NDArray[np.int64] = host[0].numpy()
        self._used: NDArray[np.int64] = host[1].numpy()
        self._ancestors: NDArray[np.bool_] = host[2].numpy()

    def write(self, drafts: Sequence[Draft], positions: NDArray[np.int64], used: Sequence[int]) -> None:
        """Say which drafts run, at which position each root stands ([B]), and how many slots each row has used."""
        if self._copied is not None:
            self._copied.synchronize()  # as a rule that has been so for long
        table, diagonal = self._table, np.arange(self.rows)
        for row, draft in enumerate(drafts):
            n = len(draft)
            table[_TOKENS, row, :n], table[_TOKENS, row, n:] = draft.tokens, draft.tokens[0]
            table[_DEPTH, row, :n], table[_DEPTH, row, n:] = draft.depth, 0
            table[_PARENTS, row] = -1
            table[_PARENTS, row, :n][~draft.probe] = draft.parents[~draft.probe]
            self._ancestors[row] = False
            self._ancestors[row, diagonal, diagonal] = True
            self._ancestors[row, :n, :n] = draft.ancestors()
        table[_POSITIONS] = positions[:, None] + table[_DEPTH]
        self._used[:] = used
        if self._far:
            self._sent.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _views(buffer: Tensor, batch: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a buffer's table [4, B, N] and counts [B], both int64, and its square [B, N, N] of bool."""
    numbers = (4 * rows + 1) * batch
    whole = buffer[: 8 * numbers].view(torch.int64)
    table, used = whole[: 4 * rows * batch].view(4, batch, rows), whole[4 * rows * batch :]
    return table, used, buffer[8 * numbers :].view(torch.bool).view(batch, rows, rows)
