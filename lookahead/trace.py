"""What happened in one step, for whoever learns from it."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

# Numba comes with drafts; a trace is read without.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lookahead.draft import Draft, FloatArray, IntArray
    from lookahead.trees import Tree
    from lookahead.wording import Wording


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
        seconds: what the pass took, from the drafts to the kept rows.
        token_s: seconds that a token was worth when the nodes were chosen; 0: not known.
        row_s: seconds that one more node in every row would have cost; 0: not known.
        drafting: rows of the batch that drafted.
        frugal: whether sources that do not pay are to rest.
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
    token_s: float = 0.0
    row_s: float = 0.0
    drafting: int = 1
    frugal: bool = False

    @property
    def accepted(self) -> int:
        """The number of drafted tokens that were accepted."""
        return len(self.path) - 1


@dataclass(frozen=True, slots=True)
class Share:
    """What one source had in a pass, over all rows of the batch.

    Attributes:
        run: its nodes that ran through the model, probes included.
        accepted: those of them that were accepted.
        seconds: what it took besides, where that is measured: queries of a pool, masks of a grammar, laying a window.
    """

    run: int = 0
    accepted: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass over the trees of all rows.

    Attributes:
        nodes: nodes of the largest tree, its root included; every row of the batch runs that many.
        committed: tokens that each row committed.
        expected: tokens that all rows together were expected to commit.
        why: why so many nodes, one of `WHY`.
        token_s: seconds that a token was worth when the nodes were chosen; 0: not known yet.
        row_s: seconds that one more node in every row would have cost; 0: not known yet.
        draft_s: seconds spent proposing, and choosing among what was proposed.
        mask_s: seconds spent on the inputs of the model: tokens, positions, attention mask.
        model_s: seconds in the model call: on a CPU, of the host; on a GPU, of the device.
        verify_s: seconds spent picking, walking the trees, and waiting for the device.
        cache_s: seconds spent keeping the accepted rows.
        learn_s: seconds in which drafters learnt.
        step_s: seconds of the whole step.
        sources: what each source had in it, by name.
        trees: what was drafted in it, of each row that drafted anything.
        opens: whether it ran the prompt, too; what that took is told as the prefill, see `Run.prefill_s`.
    """

    nodes: int
    committed: tuple[int, ...]
    expected: float = 0.0
    why: str = "fixed"
    token_s: float = 0.0
    row_s: float = 0.0
    draft_s: float = 0.0
    mask_s: float = 0.0
    model_s: float = 0.0
    verify_s: float = 0.0
    cache_s: float = 0.0
    learn_s: float = 0.0
    step_s: float = 0.0
    sources: Mapping[str, Share] = field(default_factory=dict)
    trees: Sequence[Tree] = ()
    opens: bool = False

    @property
    def outside_s(self) -> float:
        """Seconds outside the model call."""
        return self.step_s - self.model_s


WHY = {
    "fixed": "a number of nodes was given",
    "pays": "these nodes were worth more than they cost",
    "none pays": "nothing that was drafted was worth a row",
    "rests": "drafting has not paid lately, so nothing was drafted",
    "explores": "to learn what a pass of this size costs and brings",
}
"""Why a pass ran as many nodes as it did."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of `generate()` did. In a notebook it shows itself, pass by pass.

    Attributes:
        tokens: generated columns.
        passes: the passes over trees. The first one may have run the prompt, too (`Pass.opens`); otherwise there was a
            pass before it, the prefill, which the first token came from.
        prefill_s: seconds of the pass over the prompt, and what drafters did with that.
        prompts: of each row, the tokens that its drafter knew when it began: the prompt without padding, and what an
            encoder read. array("i").
        outputs: of each row, the tokens that it generated, without padding. array("i").
        wording: what the tokens say; None: not known, or not asked for yet, see `worded`.
        tokenizer: of the model, where that is known; not saved.
    """

    tokens: int
    passes: tuple[Pass, ...]
    prefill_s: float = 0.0
    prompts: tuple[array[int], ...] = ()
    outputs: tuple[array[int], ...] = ()
    wording: Wording | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def prefills(self) -> int:
        """Passes over nothing but the prompt, each of which gave a token: 1, or 0 where the first draft ran with it."""
        return 0 if self.passes and self.passes[0].opens else 1

    @property
    def forwards(self) -> int:
        """Passes of the model, the prefill counted."""
        return self.prefills + len(self.passes)

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens a model pass yields for a row, the prefill counted as a pass (MAT)."""
        return self.tokens / self.forwards

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 where that is not known."""
        return len(self.passes[0].committed) if self.passes else len(self.outputs)

    @property
    def seconds(self) -> float:
        """Seconds of the prefill and all passes."""
        return self.prefill_s + sum(one.step_s for one in self.passes)

    def worded(self, tokenizer: Any = None) -> Run:
        """Return the run with its `wording`, where a tokenizer is known: this one, or the run's own."""
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None or (self.wording is not None and tokenizer is self.tokenizer):
            return self
        from lookahead.wording import worded

        drafted = [token for one in self.passes for tree in one.trees for token in tree.tokens]
        used = [*drafted, *(token for row in self.outputs for token in row)]
        return replace(self, wording=worded(tokenizer, self.prompts, self.outputs, used), tokenizer=tokenizer)

    def _repr_html_(self) -> str:
        """Return the page of `lookahead.report` for a notebook."""
        from lookahead.report.page import fragment

        return fragment(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON Lines, a header and then one line a pass; times to the nanosecond.

        Raises:
            OSError: it cannot be written.
        """
        from lookahead import tracefile

        tracefile.write(self.worded(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Read back what `save` wrote.

        Raises:
            InvalidInput: there is no such file, or it is no trace; the message names file and line.
        """
        from lookahead import tracefile

        return tracefile.load(path)
