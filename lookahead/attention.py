"""Attention of many nodes with a mask, where several heads of queries share the keys and values of one.

`transformers` copies those for every head before it calls torch's attention with a mask; with long contexts the copies
take longer than all the rest. Here they are shown to it several times instead, which gives the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lookahead_sdpa"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what `transformers` computes by "sdpa".

    Args:
        query: [B, H * G, N, D], for H heads of keys.
        key, value: [B, H, S, D].
        attention_mask: [B, 1, N, S], added to the scores; other kinds, and what else differs from a pass over a tree,
            are left to `transformers`.

    Returns:
        [B, N, H * G, D], and None.
    """
    batch, heads, nodes, width = query.shape
    groups = heads // key.shape[1]
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if (
        attention_mask is None
        or attention_mask.dtype != query.dtype
        or attention_mask.shape[:3] != (batch, 1, nodes)
        or special
        or groups == 1
        or nodes == 1
        or heads % key.shape[1]
        or groups != getattr(module, "num_key_value_groups", groups)
    ):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    rows = batch * key.shape[1]
    keys, values = (one.reshape(rows, 1, *one.shape[2:]).expand(-1, groups, -1, -1) for one in (key, value))
    mask = attention_mask if batch == 1 else _repeated(attention_mask, key.shape[1])
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, groups, nodes, width), keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, heads, nodes, -1).transpose(1, 2).contiguous(), None


class _Repeated(threading.local):
    """The mask of the pass that runs, and what was made of it for all heads of keys: the same in all layers."""

    def __init__(self) -> None:
        self.masks: dict[int, tuple[Tensor, Tensor]] = {}


_MADE = _Repeated()


def _repeated(mask: Tensor, heads: int) -> Tensor:
    """Return [B * heads, 1, N, S]."""
    if torch.compiler.is_compiling():
        return mask.repeat_interleave(heads, 0)
    made = _MADE.masks.get(id(mask))
    if made is None or made[0] is not mask or len(made[1]) != heads * len(mask):
        made = _MADE.masks[id(mask)] = mask, mask.repeat_interleave(heads, 0)
    return made[1]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

_LOCK = threading.Lock()
_PASSES: dict[int, int] = {}  # that run now, by the identity of their config


@contextmanager
def shared_heads(config: Any) -> Iterator[None]:
    """Let the model of a text config that attends by "sdpa" do so by `attend` meanwhile, where heads share keys."""
    heads, keys = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if not (isinstance(heads, int) and isinstance(keys, int) and keys < heads):
        yield
        return
    with _LOCK:
        count = _PASSES.get(id(config), 0)
        wanted = config._attn_implementation == (NAME if count else "sdpa")
        if wanted:
            _PASSES[id(config)] = count + 1
            config._attn_implementation = NAME
    try:
        yield
    finally:
        _MADE.masks.clear()
        if wanted:
            with _LOCK:
                _PASSES[id(config)] -= 1
                if not _PASSES[id(config)]:
                    del _PASSES[id(config)]
                    config._attn_implementation = "sdpa"


def implementation_of(config: Any) -> Any:
    """Return how the model of a text config attends, whatever passes of ours run just now."""
    kind = config._attn_implementation
    return "sdpa" if kind == NAME else kind
