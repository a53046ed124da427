"""The pass over the prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookahead.cache import NAME, TreeCache

if TYPE_CHECKING:
    from lookahead.script import Script, Scripts

_PLAIN = frozenset({NAME, "attention_mask", "position_ids", "use_cache", "logits_to_keep"})
"""Inputs of a prompt that is tokens and nothing else."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What came of the pass over a prompt.

    Attributes:
        logits: [B, 1, V], the last ones; None: it has not run, and is to run together with the first draft.
        width: of logits.
        seconds: that it took.
        written: whether it ran as the model is written, though a recording could have run it.
        opens: whether it could have run together with a draft.
        opening: the recording that is to run it so.
    """

    logits: Tensor | None
    width: int
    seconds: float = 0.0
    written: bool = False
    opens: bool = False
    opening: Script | None = None

    def tell(self, scripts: Scripts | None, model: Any, cache: TreeCache) -> None:
        """Let the recordings of a model know, of which one may be worth its time by now."""
        if scripts is not None and (self.written or self.opens):
            scripts.prefilled(model, cache, self.seconds, opens=self.opens)


def prefill(
    model: Any,
    input_ids: Tensor,
    config: Any,
    model_kwargs: dict[str, Any],
    scripts: Scripts | None,
    *,
    opens: bool = False,
) -> Prefill:
    """Run the prompt [B, N] through `model` and fill its cache, as recorded where it is.

    Args:
        opens: whether it may run together with a draft; where that is recorded, it is left to.
    """
    begin, logits = time.perf_counter(), None
    if scripts is not None and opens and scripts.opening is not None:
        return Prefill(None, scripts.opening.width, opens=True, opening=scripts.opening)
    ordinary = scripts is not None and (opens or is_ordinary(input_ids, config, model_kwargs))
    if scripts is not None and ordinary:
        logits = scripts.prefill(input_ids, model_kwargs[NAME])
    recorded = logits is not None
    if logits is None:
        logits = model._prefill(input_ids, config, model_kwargs).logits[:, -1:].clone()
    return Prefill(logits, logits.shape[-1], time.perf_counter() - begin, ordinary and not recorded, opens)


def is_ordinary(input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a prompt is tokens without padding at places 0, 1, …, behind an empty cache, and nothing else."""
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    mask, positions, cache = (given.get(name) for name in ("attention_mask", "position_ids", NAME))
    return (
        given.keys() <= _PLAIN
        and input_ids.shape[1] > 1
        and config.prefill_chunk_size is None
        and isinstance(cache, DynamicCache)
        and not cache.get_seq_length()
        and (mask is None or (mask.shape == input_ids.shape and bool((mask != 0).all())))
        and (positions is None or _counts(positions, input_ids.shape[1]))
    )


def _counts(positions: Tensor, tokens: int) -> bool:
    """Whether positions [B, N] are 0, 1, … in every row."""
    return positions.shape[-1] == tokens and bool((positions == torch.arange(tokens)).all())
