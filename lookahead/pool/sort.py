"""Contexts in order: which positions of a text follow like contexts.

A text is an int32 array of symbols (a symbol is a token + 1) in which 0 ends every document; one more 0 stands before
the first. The context of position p is text[p - 1], text[p - 2], … back to the nearest 0. Positions are sorted by
their contexts, newest token first, as far as `DEPTH` tokens; equal contexts stand in the order of the text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.sources.kernels import background_kernel, inner

DEPTH = 32
"""Tokens of a context that count."""

_FEW = 12  # contexts that are sorted by insertion


def sort_contexts(text: IntArray, first: int, order: IntArray, lcp: NDArray[np.uint8], symbols: int) -> None:
    """Sort the positions from `first` on, by multikey quicksort (Bentley and Sedgewick 1997).

    Args:
        text: see above; `symbols` is above them all.
        order: [N] becomes the sorted positions first, …, first + N - 1.
        lcp: [N] becomes the tokens that each context has in common with the one before.
    """
    n = len(order)
    room = np.zeros(symbols + 1, np.int64), np.empty(n, np.int32), np.empty((n // 2 + 2, 4), np.int32)
    _sort(text, first, order, lcp, *room)


@background_kernel
def _sort(text, first, order, lcp, ends, keys, stack):  # type: ignore[no-untyped-def]
    _by_newest(text, first, order, ends)
    begin = np.int64(0)
    for symbol in range(ends.shape[0] - 1):
        end = ends[symbol]
        if end > begin:
            lcp[begin] = 0
            if symbol == 0:
                for i in range(begin, end):
                    lcp[i] = 0
            else:
                _sort_bucket(text, order, lcp, keys, stack, begin, end)
        begin = end


@inner
def _by_newest(text, first, order, ends):  # type: ignore[no-untyped-def]
    """Sort positions by the newest token alone; `ends`, all 0, becomes where each token's contexts end."""
    for p in range(first, first + order.shape[0]):
        ends[text[p - 1] + 1] += 1
    for symbol in range(ends.shape[0] - 1):
        ends[symbol + 1] += ends[symbol]
    for p in range(first, first + order.shape[0]):
        symbol = text[p - 1]
        order[ends[symbol]] = p
        ends[symbol] += 1


@inner
def _sort_bucket(text, order, lcp, keys, stack, begin, end):  # type: ignore[no-untyped-def]
    """Sort contexts that have their newest token in common; a job is (begin, end, tokens in common, keys known)."""
    top = _push(stack, 0, begin, end, 1, 0)
    while top > 0:
        top -= 1
        low, high, depth, known = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
        if depth == DEPTH:
            _tie(order, lcp, low, high, depth)
            continue
        if high - low <= _FEW:
            _insert_each(text, order, lcp, low, high, depth)
            continue
        if known == 0:
            for i in range(low, high):
                keys[i] = text[order[i] - 1 - depth]
        pivot = _median(keys[low], keys[(low + high) // 2], keys[high - 1])
        left, right = _part(order, keys, low, high, pivot)
        if left > low:
            lcp[left] = depth
            top = _push(stack, top, low, left, depth, 1)
        if right < high:
            lcp[right] = depth
            top = _push(stack, top, right, high, depth, 1)
        if pivot == 0:
            _tie(order, lcp, left, right, depth)
        else:
            top = _push(stack, top, left, right, depth + 1, 0)


@inner
def _push(stack, top, low, high, depth, known):  # type: ignore[no-untyped-def]
    if high - low < 2:
        return top
    stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = low, high, depth, known
    return top + 1


@inner
def _median(a, b, c):  # type: ignore[no-untyped-def]
    if a > b:
        a, b = b, a
    return a if c < a else c if c < b else b


@inner
def _part(order, keys, low, high, pivot):  # type: ignore[no-untyped-def]
    """Bring smaller keys to the front and larger ones to the back; return where the equal ones begin and end."""
    left, at, right = low, low, high
    while at < right:
        key = keys[at]
        if key < pivot:
            order[at], order[left] = order[left], order[at]
            keys[at], keys[left] = keys[left], key
            left += 1
            at += 1
        elif key > pivot:
            right -= 1
            order[at], order[right] = order[right], order[at]
            keys[at], keys[right] = keys[right], key
        else:
            at += 1
    return left, right


@inner
def _insert_each(text, order, lcp, low, high, depth):  # type: ignore[no-untyped-def]
    for i in range(low + 1, high):
        position, at = order[i], i
        while at > low and _before(text, position, order[at - 1], depth):
            order[at] = order[at - 1]
            at -= 1
        order[at] = position
    for i in range(low + 1, high):
        lcp[i] = common(text, order[i - 1], order[i], depth)


@inner
def common(text, p, q, depth):  # type: ignore[no-untyped-def]
    """Return how many tokens the contexts of p and q have in common, given that it is `depth` or more."""
    while depth < DEPTH:
        symbol = text[p - 1 - depth]
        if symbol == 0 or symbol != text[q - 1 - depth]:
            break
        depth += 1
    return depth


@inner
def _before(text, p, q, depth):  # type: ignore[no-untyped-def]
    depth = common(text, p, q, depth)
    if depth < DEPTH:
        a, b = text[p - 1 - depth], text[q - 1 - depth]
        if a != b:
            return a < b
    return p < q


@inner
def _tie(order, lcp, low, high, depth):  # type: ignore[no-untyped-def]
    """Put equal contexts in the order of the text (heapsort)."""
    n = high - low
    for root in range(n // 2 - 1, -1, -1):
        _sift(order, low, root, n)
    for end in range(n - 1, 0, -1):
        order[low], order[low + end] = order[low + end], order[low]
        _sift(order, low, 0, end)
    for i in range(low + 1, high):
        lcp[i] = depth


@inner
def _sift(order, low, root, n):  # type: ignore[no-untyped-def]
    while 2 * root + 1 < n:
        child = 2 * root + 1
        if child + 1 < n and order[low + child + 1] > order[low + child]:
            child += 1
        if order[low + root] >= order[low + child]:
            return
        order[low + root], order[low + child] = order[low + child], order[low + root]
        root = child


@background_kernel
def merge_contexts(text, order_a, lcp_a, order_b, lcp_b, order, lcp):  # type: ignore[no-untyped-def]
    """Merge two sorted parts of a text, all positions of A before those of B (LCP merge: Ng and Kakehi 2008).

    What the two next contexts have in common with the last one taken mostly tells which is smaller, so the text is
    read only where that is equal.
    """
    a, b, n_a, n_b = 0, 0, order_a.shape[0], order_b.shape[0]
    with_a, with_b = 0, 0
    for at in range(n_a + n_b):
        if a < n_a and b < n_b and with_a == with_b:
            shared = common(text, order_a[a], order_b[b], with_a)
            from_b = shared < DEPTH and text[order_b[b] - 1 - shared] < text[order_a[a] - 1 - shared]
            taken = with_a
            if from_b:
                with_a = shared
            else:
                with_b = shared
        else:
            from_b = a == n_a or (b < n_b and with_b > with_a)
            taken = with_b if from_b else with_a
        lcp[at] = taken
        if from_b:
            order[at] = order_b[b]
            b += 1
            with_b = lcp_b[b] if b < n_b else 0
        else:
            order[at] = order_a[a]
            a += 1
            with_a = lcp_a[a] if a < n_a else 0
