"""What the grammar allows after a node, as the kernels see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.grammar.masks import Words
from lookahead.grammar.spelling import CLOSES, QUOTE, Spelling, spelling
from lookahead.grammar.values import Chain, Key
from lookahead.sources.kernels import inner

ENDED = 0
"""The state after which only end tokens follow, see `lookahead.grammar.matcher`."""

FEW = 64
"""So many allowed tokens are looked at one by one."""

STATE, ALLOWED, MAXIMAL, CLOSERS, GROUP, FORCED = 0, 1, 2, 3, 4, 5  # in `now`
BUCKETS = 12
_CLOSERS = 8


class Guide(NamedTuple):
    """The masks of a matcher, and a way to ask it for more of them.

    Of the allowed tokens those are *maximal* that no other allowed one begins with: a model hardly ever writes a word
    in smaller pieces than it could.

    `now` holds the state (-1: free), how many tokens are allowed, how many of the few are maximal, how many closers
    there are, and the kind of token that they are (`QUOTE` inside of a string, else `CLOSES`, 0: there are none), and
    whether one token alone may follow and the text may not end.
    """

    masks: Words  # [S, W] of the matcher's states
    spelling: Spelling
    keys: IntArray  # the tokens of the keys that a schema names, one key after the other
    starts: IntArray  # [K + 1] where each key starts in `keys`
    values: IntArray  # the tokens of values that stood behind them, one value after the other
    value_starts: IntArray  # [C + 1] where each value starts in `values`
    value_places: IntArray  # [C] where it was found, see `lookahead.grammar.values`
    key_values: IntArray  # [K + 1] where the values of each key start
    ends: IntArray  # [E] tokens that end the text: never drafted
    address: NDArray[np.int64]  # [1] of the function that enters a state, 0: there is no grammar
    now: NDArray[np.int64]  # [6] of the node asked about, see below
    few: IntArray  # [FEW] the allowed tokens where they are few, rising
    covered: NDArray[np.bool_]  # [FEW] not maximal
    closers: IntArray  # [FEW] the maximal ones of those that close what was begun
    closing: IntArray  # [FEW] all of those


def no_guide() -> Guide:
    """Return the guide of a text that follows no grammar."""
    return guide(np.zeros((0, 0), np.uint32), spelling(()), (), (), (), 0)


def guide(
    masks: Words,
    spelling: Spelling,
    keys: Sequence[Key],
    values: Sequence[Chain],
    ends: Sequence[int],
    address: int,
) -> Guide:
    """Return what kernels need to know of a matcher.

    Args:
        values: of the keys, ordered by key.
        address: of a C function (state, token) -> state whose mask is computed, -1 where nothing may follow; called
            with the state -1 it enters the root.
    """
    return Guide(
        masks=masks,
        spelling=spelling,
        keys=_flat([key.tokens for key in keys]),
        starts=_starts([key.tokens for key in keys]),
        values=_flat([value.tokens for value in values]),
        value_starts=_starts([value.tokens for value in values]),
        value_places=np.array([value.place for value in values], np.int32),
        key_values=np.searchsorted([value.key for value in values], range(len(keys) + 1)).astype(np.int32),
        ends=np.array(sorted(set(ends)), np.int32),
        address=np.array([address], np.int64),
        now=np.array([-1, 0, 0, 0, 0, 0], np.int64),
        few=np.zeros(FEW, np.int32),
        covered=np.zeros(FEW, np.bool_),
        closers=np.zeros(FEW, np.int32),
        closing=np.zeros(FEW, np.int32),
    )


def _flat(lists: Sequence[Sequence[int]]) -> IntArray:
    return np.array([token for tokens in lists for token in tokens], np.int32)


def _starts(lists: Sequence[Sequence[int]]) -> IntArray:
    return np.cumsum([0, *map(len, lists)], dtype=np.int32)


@intrinsic
def _call(typingctx, address, state, token):  # type: ignore[no-untyped-def]
    """Call the C function at `address`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(64)
        function = builder.inttoptr(arguments[0], ir.FunctionType(word, [word, word]).as_pointer())
        return builder.call(function, arguments[1:])

    return types.int64(types.int64, types.int64, types.int64), generate


@inner
def enter(guide, tree, node):  # type: ignore[no-untyped-def]
    """Look at what may follow `node`; return whether anything may that is worth drafting."""
    guide.now[STATE] = -1
    if guide.address[0] == 0:
        return True
    new = tree.nodes[node]
    above = np.int64(tree.nodes[new.parent].state) if node > 0 else np.int64(-1)
    state = _call(guide.address[0], above, np.int64(new.token)) if node == 0 or above > 0 else np.int64(ENDED)
    # Where nothing may follow, or it is not known what, nothing is permitted: the mask of ENDED holds end tokens alone.
    new.state = state if 0 < state < guide.masks.shape[0] else ENDED
    guide.now[STATE] = new.state
    return _count(guide, guide.masks[new.state]) > 0


@inner
def limited(guide):  # type: ignore[no-untyped-def]
    """Return whether a grammar says what may follow the node asked about."""
    return guide.now[STATE] >= 0


@inner
def permits(guide, token):  # type: ignore[no-untyped-def]
    """Return whether `token` (not negative) may follow and does not end the text."""
    for end in guide.ends:
        if token == end:
            return False
    return holds(guide.masks[guide.now[STATE]], token)


@inner
def holds(mask, token):  # type: ignore[no-untyped-def]
    """Return whether `token` (not negative) is in `mask`."""
    return token < 32 * mask.shape[0] and (mask[token >> 5] >> np.uint32(token & 31)) & np.uint32(1) != 0


@inner
def bucket(guide):  # type: ignore[no-untyped-def]
    """Return how much is allowed: 0 no grammar, 1 to 8 by the number of maximal tokens, then by that of all."""
    if guide.now[STATE] < 0:
        return 0
    allowed, maximal = guide.now[ALLOWED], guide.now[MAXIMAL]
    if allowed > FEW:
        return 9 if allowed < 512 else 10 if allowed < 4096 else 11
    if maximal < 4:
        return maximal
    return 4 if maximal < 6 else 5 if maximal < 9 else 6 if maximal < 17 else 7 if maximal < 33 else 8


@inner
def _count(guide, mask):  # type: ignore[no-untyped-def]
    """Count the allowed tokens; where they are few, list them."""
    allowed = np.int64(0)
    for w in range(mask.shape[0]):
        allowed += _ones(mask[w])
    whole = allowed
    for end in guide.ends:
        allowed -= (mask[end >> 5] >> np.uint32(end & 31)) & np.uint32(1)
    guide.now[FORCED] = allowed == 1 and whole == 1
    guide.now[ALLOWED], guide.now[MAXIMAL], guide.now[CLOSERS], guide.now[GROUP] = allowed, 0, 0, 0
    if allowed > 1:
        _find_closers(guide)
    if 0 < allowed <= FEW:
        _list(guide, mask)
    return allowed


@inner
def _ones(word):  # type: ignore[no-untyped-def]
    word = word - ((word >> np.uint32(1)) & np.uint32(0x55555555))
    word = (word & np.uint32(0x33333333)) + ((word >> np.uint32(2)) & np.uint32(0x33333333))
    word = (word + (word >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    return ((word * np.uint32(0x01010101)) >> np.uint32(24)) & np.uint32(0xFF)  # the product is of 64 bits in numba


@inner
def _list(guide, mask):  # type: ignore[no-untyped-def]
    n = np.int64(0)
    for w in range(mask.shape[0]):
        if mask[w] != 0:
            for b in range(32):
                token = 32 * w + b
                if (mask[w] >> np.uint32(b)) & np.uint32(1) and permits(guide, token):
                    guide.few[n], guide.covered[n] = token, False
                    n += 1
    maximal = n
    for i in range(n):
        shorter = shorter_than(guide, np.int64(guide.few[i]))
        while shorter >= 0:
            if permits(guide, shorter):
                at = place_of(guide, n, shorter)
                maximal -= not guide.covered[at]
                guide.covered[at] = True
            shorter = shorter_than(guide, shorter)
    guide.now[MAXIMAL] = maximal


@inner
def _find_closers(guide):  # type: ignore[no-untyped-def]
    """List the maximal ones of the allowed tokens that close a string, or else a value."""
    found, group, n = guide.closing, np.int64(0), np.int64(0)
    for token in guide.spelling.closers:
        if (n < FEW or group != QUOTE) and permits(guide, token):
            kind = kind_of(guide, token) & (QUOTE | CLOSES)
            if group == 0 or (kind == QUOTE and group != QUOTE):
                group, n = kind, np.int64(0)
            if kind == group and n < FEW:
                found[n], guide.covered[n] = token, False
                n += 1
    for i in range(n):
        shorter = shorter_than(guide, found[i])
        while shorter >= 0:
            for j in range(n):
                guide.covered[j] |= found[j] == shorter
            shorter = shorter_than(guide, shorter)
    maximal = np.int64(0)
    for i in range(n):
        if not guide.covered[i] and maximal < _CLOSERS:
            guide.closers[maximal] = found[i]
            maximal += 1
    guide.now[CLOSERS], guide.now[GROUP] = maximal, group


@inner
def shorter_than(guide, token):  # type: ignore[no-untyped-def]
    """Return the longest token that `token` begins with, -1: there is none."""
    known = guide.spelling.shorter
    return np.int64(known[token]) if token < known.shape[0] else np.int64(-1)


@inner
def kind_of(guide, token):  # type: ignore[no-untyped-def]
    """Return the kinds of `token`, see `Spelling`."""
    kinds = guide.spelling.kinds
    return np.int64(kinds[token]) if token < kinds.shape[0] else np.int64(0)


@inner
def closes(guide, token):  # type: ignore[no-untyped-def]
    """Return whether `token`, though it may not follow, says that what may close does."""
    return guide.now[CLOSERS] > 0 and kind_of(guide, token) & guide.now[GROUP] != 0


@inner
def place_of(guide, n, token):  # type: ignore[no-untyped-def]
    """Return where `token` stands among the first `n` of the few; it is there."""
    low, high = np.int64(0), n - 1
    while low < high:
        middle = (low + high) // 2
        if guide.few[middle] < token:
            low = middle + 1
        else:
            high = middle
    return low
