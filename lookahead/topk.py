"""The likeliest tokens of many rows of logits in one look at them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lookahead.draft import FloatArray, IntArray
from lookahead.sources.kernels import inner, kernel

TOP = 8
"""Successors of every node that drafters may learn from."""

LANE = 64  # logits whose maximum is looked at first; most lanes hold none of the best
_FEW = 1 << 19  # logits that one thread looks through before several have begun
_NAN, _ALL, _SIGN = np.int32(0x7F800000), np.int32(0x7FFFFFFF), np.int32(31)  # bits of float32: beyond them is NaN, …


def best_tokens(logits: Tensor, count: int) -> tuple[IntArray, FloatArray]:
    """Return the `count` largest of each row, best first: tokens [N, count] int32 and logits [N, count] float32.

    Of equal logits the lower token comes first, and a NaN counts as the largest, so column 0 equals `argmax`.

    Args:
        logits: [N, V] float32 on any device.
    """
    count = min(count, logits.shape[-1])
    if logits.device.type != "cpu":
        tokens, values = best_there(logits, count)
        return tokens.to(torch.int32).cpu().numpy(), values.cpu().numpy()
    logits = logits.detach().contiguous()
    rows, width = logits.shape
    lanes, held = width // LANE, logits.numpy()
    peaks = np.empty((rows, lanes), np.int32)
    if rows * width <= _FEW:
        _find_peaks(held.view(np.int32), peaks)
    elif lanes:
        found = torch.unflatten(logits[:, : lanes * LANE], -1, (lanes, LANE)).amax(-1)
        _rank(found.numpy().view(np.int32), peaks)
    top_tokens = np.empty((rows, count), np.int32)
    top_values = np.empty((rows, count), np.float32)
    scratch = np.empty((2, count), np.int32)
    _best(held, peaks, top_tokens, top_values, *scratch)
    return top_tokens, top_values


def best_there(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row where the logits are, without waiting for the device.

    As `best_tokens`, but of equal logits any may come first, except in column 0, and any may be the last.

    Args:
        logits: [N, V] of any float type.

    Returns:
        tokens [N, count] int64, and logits [N, count] float32.
    """
    logits = logits.float() if logits.device.type == "cpu" else logits  # there short floats are slow
    rows, width = logits.shape
    count = min(count, width)
    lanes = width // LANE
    if lanes > 2 * count:
        # Sorting a few lanes is much less work than sorting all; what is left of a row is always looked at.
        peaks = logits[:, : lanes * LANE].reshape(rows, lanes, LANE).amax(-1)
        within = torch.arange(LANE, device=logits.device)
        chosen = peaks.topk(count, sorted=False).indices
        rest = torch.arange(lanes * LANE, width, device=logits.device).expand(rows, -1)
        places = torch.cat([(chosen[:, :, None] * LANE + within).flatten(1), rest], 1)
        values, at = logits.gather(1, places).topk(count)
        tokens = places.gather(1, at)
        if width > lanes * LANE:
            peaks = torch.cat([peaks, logits[:, lanes * LANE :].amax(-1, keepdim=True)], 1)
        lane = (peaks.argmax(-1, keepdim=True) * LANE + within).clamp(max=width - 1)
        first = lane.gather(1, logits.gather(1, lane).argmax(-1, keepdim=True))
    else:
        values, tokens = logits.topk(count)
        first = logits.argmax(-1, keepdim=True)
    # topk may name another of several equal tokens first; then the two change places, if both are there.
    tokens = torch.where(tokens == first, tokens[:, :1], tokens)
    tokens[:, :1] = first
    return tokens, values.float()


@kernel
def _find_peaks(bits, peaks):  # type: ignore[no-untyped-def]
    """Fill `peaks` [N, V // LANE] with the largest of each lane of `bits` [N, V] of float32, as `_rank` does."""
    for row in range(peaks.shape[0]):
        for lane in range(peaks.shape[1]):
            top, size, start = ~_ALL, np.int32(0), lane * LANE
            for i in range(LANE):
                value = bits[row, start + i]
                top, size = max(top, _ordered(value)), max(size, value & _ALL)
            peaks[row, lane] = _ranked(top, size)


@kernel
def _rank(bits, ranks):  # type: ignore[no-untyped-def]
    """Fill `ranks` [N, L] with whole numbers that rise as the float32 with these `bits` do, for `_before`."""
    for row in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            ranks[row, i] = _ranked(_ordered(bits[row, i]), bits[row, i] & _ALL)


@inner
def _ordered(bits):  # type: ignore[no-untyped-def]
    return bits ^ ((bits >> _SIGN) & _ALL)  # below 0 all others turn


@inner
def _ranked(top, size):  # type: ignore[no-untyped-def]
    """Return the largest of what has these ordered bits, and those without signs, at most: NaN is, -0.0 is 0.0."""
    return _ALL if size > _NAN else top + np.int32(top == -1)


@kernel
def _best(logits, peaks, top_tokens, top_values, chosen, heights):  # type: ignore[no-untyped-def]
    """Fill both tables.

    Args:
        peaks: [N, V // LANE] the maximum of each full lane, as a rank.
        chosen: [count] room for lanes, and `heights` for their maxima.
    """
    rows, width = logits.shape
    lanes = peaks.shape[1]
    for row in range(rows):
        # What is in none of the best lanes has the maxima of so many others before it.
        held = 0
        for lane in range(lanes):
            held = _insert(chosen, heights, held, lane, peaks[row, lane])
        filled, held = held, 0
        tokens, values = top_tokens[row], top_values[row]
        for i in range(filled):
            for token in range(chosen[i] * LANE, (chosen[i] + 1) * LANE):
                held = _insert(tokens, values, held, token, logits[row, token])
        for token in range(lanes * LANE, width):
            held = _insert(tokens, values, held, token, logits[row, token])


@inner
def _insert(tokens, values, held, token, value):  # type: ignore[no-untyped-def]
    """Put `token` where it belongs among the `held` best; return how many there are now."""
    count = tokens.shape[0]
    if held == count:
        if value < values[count - 1] or not _before(token, value, tokens[count - 1], values[count - 1]):
            return held
        held -= 1
    j = held
    while j > 0 and _before(token, value, tokens[j - 1], values[j - 1]):
        tokens[j], values[j] = tokens[j - 1], values[j - 1]
        j -= 1
    tokens[j], values[j] = token, value
    return held + 1


@inner
def _before(token, value, other, at):  # type: ignore[no-untyped-def]
    """Return whether `token` comes before `other`: NaN is the largest, and of equal values the lower token is first."""
    if value > at or (value == at and token < other):
        return True
    return np.isnan(value) and (not np.isnan(at) or token < other)
