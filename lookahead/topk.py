"""The likeliest tokens of many rows of logits in one look at them."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lookahead.draft import FloatArray, IntArray

LANE = 64  # logits whose maximum is looked at first; most lanes hold none of the best


def best_tokens(logits: Tensor, count: int) -> tuple[IntArray, FloatArray]:
    """Return the `count` largest of each row, best first: tokens [N, count] int32 and logits [N, count] float32.

    Of equal logits the lower token comes first, and a NaN counts as the largest, so column 0 equals `argmax`.

    Args:
        logits: [N, V] float32 on any device.
    """
    count = min(count, logits.shape[-1])
    if logits.device.type != "cpu":
        values, tokens = logits.topk(count)
        tokens[:, 0] = logits.argmax(-1)  # topk may name another of several equal tokens
        return tokens.to(torch.int32).cpu().numpy(), values.cpu().numpy()
    logits = logits.detach().contiguous()
    rows, width = logits.shape
    lanes = width // LANE
    peaks = (
        torch.unflatten(logits[:, : lanes * LANE], -1, (lanes, LANE)).amax(-1) if lanes else logits.new_empty((rows, 0))
    )
    top_tokens = np.empty((rows, count), np.int32)
    top_values = np.empty((rows, count), np.float32)
    _best(logits.numpy(), peaks.numpy(), top_tokens, top_values)
    return top_tokens, top_values


@njit(cache=True)
def _best(logits, peaks, top_tokens, top_values):  # type: ignore[no-untyped-def]
    """Fill both tables; `peaks` [N, V // LANE] holds the maximum of each full lane."""
    rows, width = logits.shape
    count, lanes = top_tokens.shape[1], peaks.shape[1]
    for row in range(rows):
        tokens, values, scores = top_tokens[row], top_values[row], logits[row]
        # So many lanes hold a logit that is at least as large: what is smaller is none of the best.
        tokens[:], values[:] = -1, -np.inf
        for lane in range(lanes if lanes >= count else 0):
            if not peaks[row, lane] <= values[count - 1] or tokens[count - 1] < 0:
                _insert(tokens, values, lane, peaks[row, lane])
        least = values[count - 1]
        tokens[:], values[:] = -1, -np.inf
        for lane in range(lanes + 1):
            if lane < lanes and peaks[row, lane] < least:
                continue
            end = width if lane == lanes else (lane + 1) * LANE
            for token in range(lane * LANE, end):
                if not scores[token] <= values[count - 1] or tokens[count - 1] < 0:
                    _insert(tokens, values, token, scores[token])


@njit(cache=True)
def _insert(tokens, values, token, value):  # type: ignore[no-untyped-def]
    """Put `token` behind all entries that are at least as large; NaN is the largest."""
    j = tokens.shape[0]
    while j > 0 and (tokens[j - 1] < 0 or (not np.isnan(values[j - 1]) and not value <= values[j - 1])):
        if j < tokens.shape[0]:
            tokens[j], values[j] = tokens[j - 1], values[j - 1]
        j -= 1
    if j < tokens.shape[0]:
        tokens[j], values[j] = token, value
