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
    from lookahead.script import Scripts

_PLAIN = frozenset({NAME, "attention_mask", "position_ids", "use_cache", "logits_to_keep"})
"""Inputs of a prompt that is tokens and nothing else."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What came of the pass over a prompt.

    Attributes:
        logits: [B, 1, V], the last ones.
        seconds: that it took.
        written: whether it ran as the model is written, though a recording could have run it.
    """

    logits: Tensor
    seconds: float
    written: bool

    def tell(self, scripts: Scripts | None, model: Any, cache: TreeCache) -> None:
        """Let the recordings of a model know, of which one may be worth its time by now."""
        if scripts is not None and self.written:
            scripts.prefilled(model, cache, self.seconds)


def prefill(
    model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any], scripts: Scripts | None
) -> Prefill:
    """Run the prompt [B, N] through `model` and fill its cache, as recorded where it is."""
    begin, logits = time.perf_counter(), None
    ordinary = scripts is not None and is_ordinary(input_ids, config, model_kwargs)
    if scripts is not None and ordinary:
        logits = scripts.prefill(input_ids, model_kwargs[NAME])
    recorded = logits is not None
    if logits is None:
        logits = model._prefill(input_ids, config, model_kwargs).logits[:, -1:].clone()
    return Prefill(logits, time.perf_counter() - begin, ordinary and not recorded)


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
