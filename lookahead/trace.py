"""What happened in one step, for whoever learns from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import Draft, FloatArray, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One verified draft of one batch row.

    Attributes:
        row: the row of the batch.
        draft: what was verified, as it ran (cut and deduplicated).
        path: [A] int32, the nodes whose key-value rows stay, from the root (0) down; A - 1 drafted tokens were
            accepted.
        tokens: [T] int64, the tokens that were committed, in order; the last one is the model's own pick.
        top_tokens: [N, k] int32, the k likeliest successors of every node by the model's raw logits, best first.
        top_logits: [N, k] float32, their raw logits.
        foreseen: returns, for some nodes ([n] int), the tokens that the noise of their positions would draw; where that
            is known, else None. To be called in `observe` only.
        rows: nodes that each row of the batch ran in this pass.
        seconds: what the pass took, from the drafts to the picks.
    """

    row: int
    draft: Draft
    path: IntArray
    tokens: NDArray[np.int64]
    top_tokens: IntArray
    top_logits: FloatArray
    foreseen: Callable[[IntArray], IntArray] | None = None
    rows: int = 0
    seconds: float = 0.0

    @property
    def accepted(self) -> int:
        """The number of drafted tokens that were accepted."""
        return len(self.path) - 1


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass over the trees of all rows.

    Attributes:
        nodes: nodes of the largest tree, its root included; every row of the batch runs that many.
        committed: tokens that each row committed.
        draft_s: seconds spent proposing.
        model_s: seconds in the model call, as the host sees it; on a GPU the device may still be at work.
        rest_s: seconds in mask, walk, cache and learning.
    """

    nodes: int
    committed: tuple[int, ...]
    draft_s: float
    model_s: float
    rest_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of `generate()` did, prefill left out.

    Attributes:
        tokens: generated columns, the first of which came from the prefill.
        passes: the passes after the prefill.
    """

    tokens: int
    passes: tuple[Pass, ...]

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens a model pass yields for a row, the prefill counted as a pass (MAT)."""
        return self.tokens / (len(self.passes) + 1)
