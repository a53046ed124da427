"""Which tokens may follow, as packed bits: bit `t & 31` of word `t >> 5` is token t."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Words = NDArray[np.uint32]


def words(size: int) -> int:
    """Return how many words hold `size` bits."""
    return -(-size // 32)


def forbid(scores: Tensor, masks: Words) -> None:
    """Set to -inf, in place, every score whose bit is 0.

    Args:
        scores: [N, V] floating point on any device.
        masks: [N, W] with 32 * W >= V.
    """
    import torch

    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64) and scores.stride(-1) == 1:
        _forbid(scores.detach().numpy(), masks)
        return
    packed = torch.from_numpy(masks.view(np.int32)).to(scores.device)
    bits = (packed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=scores.device)) & 1
    scores.masked_fill_(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)


def best_allowed(logits: Tensor, mask: Words) -> int:
    """Return what `argmax` returns after `forbid`.

    Args:
        logits: [V] on any device, left as they are.
        mask: [W] with 32 * W >= V.
    """
    if logits.device.type == "cpu":
        return int(_best_allowed(logits.detach().float().contiguous().numpy(), mask))
    scores = logits.float()[None].clone()
    forbid(scores, mask[None])
    return int(scores.argmax())


@njit(cache=True)
def finish(masks, state, written, size, own_ends, ends, may_end):  # type: ignore[no-untyped-def]
    """Turn what a grammar engine wrote to the first words of a mask into ours; return whether anything is allowed.

    Args:
        masks: [S, W] one mask a state.
        written: words that the engine wrote; its bits beyond `size` tokens, and its end tokens, count for nothing.
        ends: the end tokens of ours, allowed where the text `may_end`.
    """
    mask, some = masks[state], False
    for w in range(mask.shape[0]):
        left = size - 32 * w
        if w >= written or left <= 0:
            mask[w] = 0
        elif left < 32:
            mask[w] &= np.uint32((1 << left) - 1)
    for end in own_ends:
        if end < 32 * mask.shape[0]:
            mask[end >> 5] &= ~np.uint32(1 << (end & 31))
    for end in ends:
        bit = np.uint32(1 << (end & 31))
        mask[end >> 5] = mask[end >> 5] | bit if may_end else mask[end >> 5] & ~bit
    for word in mask:
        some |= word != 0
    return some


@njit(cache=True)
def _forbid(scores, masks):  # type: ignore[no-untyped-def]
    for n in range(scores.shape[0]):
        for w in range(-(-scores.shape[1] // 32)):
            word, end = masks[n, w], min(32, scores.shape[1] - 32 * w)
            if word == 0xFFFFFFFF:
                continue
            for b in range(end):
                if not (word >> np.uint32(b)) & np.uint32(1):
                    scores[n, 32 * w + b] = -np.inf


@njit(cache=True)
def _best_allowed(logits, mask):  # type: ignore[no-untyped-def]
    """Of equal ones the first, a NaN above all; token 0 where nothing allowed is above -inf, as `argmax` has it."""
    best, top = 0, -np.inf
    for w in range(-(-logits.shape[0] // 32)):
        word = mask[w]
        if word == 0:
            continue
        for b in range(min(32, logits.shape[0] - 32 * w)):
            if (word >> np.uint32(b)) & np.uint32(1):
                value = logits[32 * w + b]
                if np.isnan(value):
                    return 32 * w + b
                if value > top:
                    best, top = 32 * w + b, value
    return best
