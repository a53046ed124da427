"""Token Recycling: what the model itself held likely after a token when it last saw it (Luo et al. 2024, section 3).

Every verified node leaves the top of its logits behind, accepted or not; here under its last two tokens and under its
last one. The table outlives the request.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import FloatArray, IntArray
from lookahead.sources.evidence import BY_PAIR, BY_TOKEN, FAVOURITE, deny, log_odds, row_of
from lookahead.sources.guide import limited, permits
from lookahead.sources.kernels import inner, kernel

SLOTS = 1 << 16
"""Slots for pairs, and at most so many for tokens."""

_MIX = 0x2545F4914F6CDD1D


class Recycled(NamedTuple):
    """Successors by key, one slot a key; where two keys meet, the newer one stays.

    The first `SLOTS` slots are for pairs of tokens, the others for single ones; without any, nothing is recycled.
    """

    key: NDArray[np.int64]  # [S] 0: free
    tokens: IntArray  # [S, k] best first
    chance: FloatArray  # [S, k] softmax over these k logits, 0: no token


def empty_tables(vocab_size: int | None, width: int = 8) -> Recycled:
    """Return tables for `width` successors of each key; a smaller vocabulary has a slot for each token."""
    singles = SLOTS if vocab_size is None else min(SLOTS, 1 << vocab_size.bit_length())
    return _empty(SLOTS + singles, width)


def no_tables() -> Recycled:
    """Return the tables of a grower that does not recycle."""
    return _empty(0, 0)


def _empty(slots: int, width: int) -> Recycled:
    return Recycled(np.zeros(slots, np.int64), np.zeros((slots, width), np.int32), np.zeros((slots, width), np.float32))


@kernel
def remember(recycled, before, tokens, parents, top_tokens, top_logits):  # type: ignore[no-untyped-def]
    """Store the top of the logits of every node; `before` is the token before the root, -1: none."""
    for i in range(tokens.shape[0]):
        above = np.int64(tokens[parents[i]] if i > 0 else before)
        _store(recycled, _single(tokens[i]), _single_slot(recycled, tokens[i]), top_tokens[i], top_logits[i])
        if above >= 0:
            key = _pair(above, tokens[i])
            _store(recycled, key, _pair_slot(key), top_tokens[i], top_logits[i])


@inner
def ask_recycled(recycled, before, token, heat, evidence):  # type: ignore[no-untyped-def]
    """Add what the model held likely after the pair of `before` (-1: none) and `token`, and after `token`.

    Args:
        heat: one over the temperature.
    """
    if recycled.key.shape[0] == 0:
        return
    if before >= 0:
        key = _pair(before, token)
        _ask(recycled, key, _pair_slot(key), BY_PAIR, heat, evidence)
    _ask(recycled, _single(token), _single_slot(recycled, token), BY_TOKEN, heat, evidence)


@inner
def _ask(recycled, key, slot, column, heat, evidence):  # type: ignore[no-untyped-def]
    if recycled.key[slot] != key:
        return
    whole, free = np.float32(0.0), not limited(evidence.guide)
    for r in range(recycled.tokens.shape[1]):
        if free or permits(evidence.guide, recycled.tokens[slot, r]):
            whole += _heated(recycled.chance[slot], r, heat)
    if whole <= 0.0:
        return
    deny(evidence, column, np.float32(-3.0))
    for r in range(recycled.tokens.shape[1]):
        chance = _heated(recycled.chance[slot], r, heat) / whole
        j = row_of(evidence, recycled.tokens[slot, r]) if chance > 0.0 else -1
        if j >= 0:
            evidence.x[j, column] = log_odds(chance)
            if evidence.rows[j].recycled == 0.0:
                evidence.rows[j].recycled = chance
                evidence.x[j, FAVOURITE] = r == 0


@inner
def _heated(chances, r, heat):  # type: ignore[no-untyped-def]
    """Return chance r, of chances that fall, at another temperature, up to a factor."""
    return chances[r] if heat == 1.0 or chances[r] == 0.0 else (chances[r] / chances[0]) ** heat


@inner
def favourite(recycled, before, token):  # type: ignore[no-untyped-def]
    """Return what the model held likeliest after the pair, else after `token`; -1: it has seen neither."""
    if recycled.key.shape[0] == 0:
        return np.int64(-1)
    key = _pair(before, token)
    slot = _pair_slot(key)
    if before >= 0 and recycled.key[slot] == key:
        return np.int64(recycled.tokens[slot, 0])
    slot = _single_slot(recycled, token)
    return np.int64(recycled.tokens[slot, 0]) if recycled.key[slot] == _single(token) else np.int64(-1)


@inner
def _single(token):  # type: ignore[no-untyped-def]
    return np.int64(token) + 1


@inner
def _single_slot(recycled, token):  # type: ignore[no-untyped-def]
    return SLOTS + (np.int64(token) & (recycled.key.shape[0] - SLOTS - 1))


@inner
def _pair(before, token):  # type: ignore[no-untyped-def]
    state = ((np.int64(before) + 1) * _MIX) ^ np.int64(token)
    state = (state ^ (state >> 31)) * _MIX
    return (state ^ (state >> 31)) | 1


@inner
def _pair_slot(key):  # type: ignore[no-untyped-def]
    return (key >> 20) & (SLOTS - 1)


@inner
def _store(recycled, key, slot, tokens, logits):  # type: ignore[no-untyped-def]
    width = tokens.shape[0]
    if width > recycled.tokens.shape[1]:
        width = recycled.tokens.shape[1]
    if width == 0 or not np.isfinite(logits[0]):
        return
    total = np.float32(0.0)
    recycled.key[slot] = key
    for j in range(recycled.tokens.shape[1]):
        recycled.chance[slot, j] = 0.0
    for j in range(width):
        recycled.tokens[slot, j] = tokens[j]
        recycled.chance[slot, j] = np.exp(logits[j] - logits[0])
        total += recycled.chance[slot, j]
    for j in range(width):
        recycled.chance[slot, j] /= total
