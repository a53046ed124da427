"""What drafting under a grammar wants to know of tokens: what they begin with, which ones close, which ones count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray

QUOTE, CLOSES, KEY_END, STRING_START, SEPARATES, KEY_START = 1, 2, 4, 8, 16, 32
"""Kinds of tokens, bits of `Spelling.kinds`: begins with a quotation mark; with a comma or a closing bracket; ends a
key of a JSON object; ends with a quotation mark, behind which a string may begin; holds neither letters nor digits;
ends with a bracket and a quotation mark, behind which a key begins."""

_STRUCTURE = frozenset(b'"{}[],: ')


class Spelling(NamedTuple):
    """Arrays about a vocabulary of V tokens."""

    shorter: IntArray  # [V] the longest other token that each one begins with, -1: none
    kinds: NDArray[np.uint8]  # [V] see above
    closers: IntArray  # tokens of JSON's structure alone that begin with what ends a string or a value
    counted: IntArray  # [V] the same token with the next number, -1: it is no number, or there is no such token


def spelling(tokens: Sequence[bytes]) -> Spelling:
    """Return what is to be known of a vocabulary, given the bytes of its tokens (empty: special)."""
    kinds = np.array([_kind(token) for token in tokens], np.uint8)
    closers = [i for i, token in enumerate(tokens) if kinds[i] & (QUOTE | CLOSES) and _STRUCTURE.issuperset(token)]
    return Spelling(_shorter(tokens), kinds, np.array(closers, np.int32), _counted(tokens))


def _kind(token: bytes) -> int:
    return (
        QUOTE * token.startswith(b'"')
        | CLOSES * token.startswith((b",", b"}", b"]"))
        | KEY_END * (b'":' in token)
        | STRING_START * token.endswith(b'"')
        | KEY_START * token.endswith(b'{"')
        | SEPARATES * (bool(token) and token.isascii() and not any(chr(byte).isalnum() for byte in token))
    )


def _shorter(tokens: Sequence[bytes]) -> IntArray:
    """Return for each token the longest other one that it begins with.

    >>> _shorter([b"a", b"abc", b"ab", b""]).tolist()
    [-1, 2, 0, -1]
    """
    found = np.full(len(tokens), -1, np.int32)
    begun: list[int] = []  # tokens that may begin the next one, each beginning with the one before it
    for i in sorted(range(len(tokens)), key=tokens.__getitem__):
        while begun and not (tokens[i].startswith(tokens[begun[-1]]) and tokens[i] != tokens[begun[-1]]):
            begun.pop()
        found[i] = begun[-1] if begun else -1
        if tokens[i]:
            begun.append(i)
    return found


def _counted(tokens: Sequence[bytes]) -> IntArray:
    """Return for each number the token of the next one, written alike.

    >>> _counted([b"9", b"10", b" 07", b" 08", b"x"]).tolist()
    [1, -1, 3, -1, -1]
    """
    known = {token: i for i, token in enumerate(tokens)}
    found = np.full(len(tokens), -1, np.int32)
    for i, token in enumerate(tokens):
        digits = token.removeprefix(b" ")
        if digits.isdigit() and len(digits) < 10:
            after = str(int(digits) + 1).encode().rjust(len(digits), b"0")
            found[i] = known.get(token[: len(token) - len(digits)] + after, -1)
    return found
