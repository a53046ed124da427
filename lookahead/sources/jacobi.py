"""Jacobi lookahead as a source: n-grams that the model wrote in its window (Fu et al. 2024, sections 3.1 and 3.2).

The window (see `lookahead.sources.window`) runs guesses of coming tokens through the model beside the draft. What the
model makes of them pass after pass are n-grams; here they are kept, and asked for what follows a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.errors import InvalidArgument
from lookahead.sources.evidence import BY_WINDOW, WINDOW_HERE, WINDOW_LENGTH, WINDOW_RANK, deny, log_odds, row_of
from lookahead.sources.kernels import inner

SLOTS = 1 << 12
"""Keys that n-grams are kept of; where two meet, the newer one stays."""

LARGEST = 64
"""No window is wider, no n-gram longer, and of no key are more kept."""

_MIX = 0x2545F4914F6CDD1D
_LONGER = np.float32(4.0)  # what one more matching token is worth
_ESCAPE, _MOST = np.float32(4.0), np.float32(1e12)


@dataclass(frozen=True, slots=True)
class Jacobi:
    """Lookahead decoding as a source of the default drafter: the model drafts for itself in a window of guesses.

    The window's rows run in every pass beside the drafted nodes, and are never accepted. `probes` says how many.

    The n-grams of a text take 16 kB times verify times (ngram - 1), about 1 MB as they come.

    Args:
        window: guesses of coming positions (W of the paper).
        ngram: tokens of an n-gram (N); a guess is refined over `ngram - 1` passes.
        verify: n-grams kept of one key, its first token (G).
        shift: "one": the window moves by one token a pass, as in the paper; "accepted": by as many as were accepted.
        switch: "auto": beside other sources the window rests where its rows cost more time than it earns; "on": it
            always runs.

    Raises:
        InvalidArgument: a number out of range, or another word.

    >>> la = Lookahead(model, sources=("prompt", "recycle", Jacobi(window=7, verify=7)))
    """

    window: int = 15
    ngram: int = 5
    verify: int = 15
    shift: Literal["one", "accepted"] = "one"
    switch: Literal["auto", "on"] = "auto"

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ngram", 3), ("verify", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
                raise InvalidArgument(f"{name}={value!r}; give a whole number from {least} to {LARGEST}")
        for name, words in (("shift", ("one", "accepted")), ("switch", ("auto", "on"))):
            if getattr(self, name) not in words:
                raise InvalidArgument(f"{name}={getattr(self, name)!r}; give {' or '.join(map(repr, words))}")

    @property
    def probes(self) -> int:
        """Rows that the window adds to a pass at most."""
        widths = [self.window + self.ngram - 2 - filled for filled in range(self.ngram - 1)]
        return max(width - 1 + filled * width for filled, width in enumerate(widths))


class Ngrams(NamedTuple):
    """n-grams by their first token, the newest first; without slots, nothing is kept."""

    key: NDArray[np.int64]  # [S] first token + 1, 0: free
    held: IntArray  # [S] n-grams of this key
    tokens: IntArray  # [S, G, N - 1] what follows the first token
    column: IntArray  # [S, G] the position of the first token when the window wrote it
    root: NDArray[np.int64]  # [1] the position of the root of the tree that asks


def empty_ngrams(options: Jacobi) -> Ngrams:
    """Return room for the n-grams of one text."""
    return _empty(SLOTS, options.verify, options.ngram - 1)


def no_ngrams() -> Ngrams:
    """Return the n-grams of a text without a window."""
    return _empty(0, 0, 0)


def _empty(slots: int, most: int, length: int) -> Ngrams:
    return Ngrams(
        key=np.zeros(slots, np.int64),
        held=np.zeros(slots, np.int32),
        tokens=np.zeros((slots, most, length), np.int32),
        column=np.zeros((slots, most), np.int32),
        root=np.zeros(1, np.int64),
    )


@inner
def slot_of_key(ngrams, token):  # type: ignore[no-untyped-def]
    """Return the slot of n-grams that start with `token`."""
    return (((np.int64(token) + 1) * _MIX) >> 40) & (ngrams.key.shape[0] - 1)


@inner
def keep_ngram(ngrams, first, follow, column):  # type: ignore[no-untyped-def]
    """Keep `first` and `follow` ([N - 1]) as the newest n-gram of its key; of too many, that written longest ago goes.

    Args:
        column: the position of `first` in the text.
    """
    slot = slot_of_key(ngrams, first)
    if ngrams.key[slot] != first + 1:
        ngrams.key[slot], ngrams.held[slot] = first + 1, 0
    known, held = ngrams.tokens[slot], ngrams.held[slot]
    at = 0
    while at < held and not _equal(known[at], follow):
        at += 1
    if at == held:
        if held < known.shape[0]:
            ngrams.held[slot] = held + 1
        else:
            at -= 1
    for r in range(at, 0, -1):
        for i in range(follow.shape[0]):
            known[r, i] = known[r - 1, i]
        ngrams.column[slot, r] = ngrams.column[slot, r - 1]
    for i in range(follow.shape[0]):
        known[0, i] = follow[i]
    ngrams.column[slot, 0] = column


@inner
def _equal(a, b):  # type: ignore[no-untyped-def]
    same = True
    for i in range(a.shape[0]):
        same = same and a[i] == b[i]
    return same


@inner
def ask_ngrams(ngrams, suffix, length, depth, evidence):  # type: ignore[no-untyped-def]
    """Add what the n-grams that the path ends with go on with; longer and newer ones weigh more.

    Args:
        suffix: the last tokens, newest first, `length` of them.
        depth: of the node that holds the newest one.
    """
    if ngrams.key.shape[0] == 0:
        return
    own = evidence.worth
    own[:] = 0.0
    total, weight = np.float32(0.0), np.float32(1.0)
    for n in range(1, min(ngrams.tokens.shape[2], length) + 1):
        weight = min(weight * _LONGER, _MOST)
        slot = slot_of_key(ngrams, suffix[n - 1])
        if ngrams.key[slot] != suffix[n - 1] + 1:
            continue
        for r in range(ngrams.held[slot]):
            follow, same = ngrams.tokens[slot, r], True
            for i in range(n - 1):
                same = same and follow[i] == suffix[n - 2 - i]
            j = row_of(evidence, np.int64(follow[n - 1])) if same else np.int64(-1)
            if j >= 0:
                if total == 0.0:
                    deny(evidence, BY_WINDOW, np.float32(-3.0))
                own[j] += weight / np.float32(1 + r)
                total += weight / np.float32(1 + r)
                _describe(evidence, j, n, r, ngrams.column[slot, r] + n - 1 == ngrams.root[0] + depth)
    for j in range(evidence.size[0] if total > 0.0 else 0):
        if own[j] > 0.0:
            evidence.x[j, BY_WINDOW] = log_odds(own[j] / (total + _ESCAPE))


@inner
def _describe(evidence, j, n, r, here):  # type: ignore[no-untyped-def]
    """Say of successor j how long the longest n-gram is that names it, how new, and whether it was written here."""
    row, x = evidence.rows[j], evidence.x[j]
    if n > row.window:
        row.window = n
        x[WINDOW_LENGTH], x[WINDOW_RANK] = np.float32(0.5 * n), np.float32(1.0) / np.float32(1 + r)
    if here:
        x[WINDOW_HERE] = 1.0
