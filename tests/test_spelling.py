"""What is known of tokens, and what the kernels make of a mask, against naive twins."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from lookahead.grammar.masks import words
from lookahead.grammar.spelling import CLOSES, KEY_END, QUOTE, SEPARATES, STRING_START, spelling
from lookahead.sources import guide as guides
from lookahead.sources.guide import ALLOWED, CLOSERS, FEW, FORCED, GROUP, MAXIMAL, STATE, Guide, guide, no_guide

pieces = st.text(st.sampled_from('"{}[],: ab19é0'), max_size=4).map(str.encode)
vocabularies = st.lists(pieces, max_size=40)


# --- tokens -----------------------------------------------------------------------------------------------------


@given(vocabularies)
def test_shorter_equals_naive(tokens: list[bytes]) -> None:
    found = spelling(tokens).shorter
    for token, shorter in zip(tokens, found.tolist(), strict=True):
        begins = [other for other in tokens if other and other != token and token.startswith(other)]
        assert (tokens[shorter] if shorter >= 0 else b"") == max(begins, key=len, default=b"")


@given(vocabularies)
def test_kinds_and_closers_equal_naive(tokens: list[bytes]) -> None:
    said = spelling(tokens)
    for i, token in enumerate(tokens):
        text, kinds = token.decode(), int(said.kinds[i])
        assert bool(kinds & QUOTE) == (text[:1] == '"')
        assert bool(kinds & CLOSES) == (text[:1] in (",", "}", "]"))
        assert bool(kinds & KEY_END) == ('":' in text)
        assert bool(kinds & STRING_START) == (text[-1:] == '"')
        assert bool(kinds & SEPARATES) == (text != "" and all(c.isascii() and not c.isalnum() for c in text))
        closes = text[:1] in ('"', ",", "}", "]") and text != "" and set(text) <= set('"{}[],: ')
        assert (i in said.closers) == closes
    assert said.closers.tolist() == sorted(said.closers.tolist())


numbers = st.builds(
    lambda space, zeros, number: f"{space}{'0' * zeros}{number}".encode(),
    st.sampled_from(["", " ", "  "]),
    st.integers(0, 2),
    st.integers(0, 120),
)


@given(st.lists(numbers | pieces, max_size=40))
def test_counted_equals_naive(tokens: list[bytes]) -> None:
    found = spelling(tokens).counted.tolist()
    for token, next_one in zip(tokens, found, strict=True):
        text = token.decode()
        digits = text[1:] if text[:1] == " " else text
        wanted = None
        if digits and all(c in "0123456789" for c in digits):
            wanted = (text[: len(text) - len(digits)] + str(int(digits) + 1).zfill(len(digits))).encode()
        assert (tokens[next_one] if next_one >= 0 else None) == (wanted if wanted in tokens else None)


def test_odd_tokens_have_a_spelling_too() -> None:
    odd = [b"", b"", b"\xff", b"\xc3", b"9" * 5000, b" ", b'"', b'"', b"\x00", "٣".encode()]
    said = spelling(odd)
    assert said.shorter.tolist() == [-1] * len(odd)
    assert said.counted.tolist() == [-1] * len(odd)
    assert said.closers.tolist() == [6, 7]
    assert [len(array) for array in spelling(())] == [0, 0, 0, 0]


# --- masks ------------------------------------------------------------------------------------------------------
# What kernels call has no entry from Python: these are the doors that the tests use.


@njit
def look(known, state):  # type: ignore[no-untyped-def]
    known.now[0] = state
    return guides._count(known, known.masks[state])


@njit
def permit(known, tokens, out):  # type: ignore[no-untyped-def]
    for i in range(tokens.shape[0]):
        out[i] = guides.permits(known, tokens[i])


@njit
def closing(known, tokens, out):  # type: ignore[no-untyped-def]
    for i in range(tokens.shape[0]):
        out[i] = guides.closes(known, tokens[i])


@njit
def bucket(known):  # type: ignore[no-untyped-def]
    return guides.bucket(known)


@njit
def ones(word):  # type: ignore[no-untyped-def]
    return guides._ones(word)


TOKENS = ["", *map("".join, (p for n in (1, 2, 3) for p in product('",}] :a', repeat=n)))]


def looked(tokens: list[bytes], allowed: set[int], ends: Any = (), more: int = 0) -> tuple[Guide, int]:
    """Look at a mask that allows `allowed`, of a model that knows `more` tokens than the tokenizer."""
    masks = np.zeros((3, words(len(tokens) + more)), np.uint32)
    for token in allowed:
        masks[2, token >> 5] |= np.uint32(1 << (token & 31))
    known = guide(masks, spelling(tokens), (), (), ends, 0)
    return known, look(known, 2)


def covered(tokens: list[bytes], token: int, others: list[int]) -> bool:
    """Whether another token begins with this one."""
    spelled = [tokens[o] for o in others if o < len(tokens) and token < len(tokens)]
    return token < len(tokens) and tokens[token] != b"" and any(
        other.startswith(tokens[token]) and other != tokens[token] for other in spelled
    )  # fmt: skip


@settings(max_examples=200)
@given(st.randoms(use_true_random=False), st.sampled_from([0, 1, 2, 8, 60, 64, 65, 66, 300]), st.integers(0, 80))
def test_what_a_mask_allows_equals_naive(random: Any, many: int, more: int) -> None:
    tokens = [text.encode() for text in random.sample(TOKENS, random.choice([70, len(TOKENS)]))]
    size = len(tokens) + more
    allowed = set(random.sample(range(size), min(many, size)))
    ends = random.choices(range(size), k=random.randrange(4))  # some of them may be named twice
    known, count = looked(tokens, allowed, ends, more)
    left = sorted(allowed - set(ends))
    assert count == known.now[ALLOWED] == len(left)
    assert bool(known.now[FORCED]) == (len(left) == len(allowed) == 1)
    asked = np.arange(32 * known.masks.shape[1] + 40)
    said = np.zeros(len(asked), np.bool_)
    permit(known, asked, said)
    assert np.flatnonzero(said).tolist() == left
    if len(left) <= FEW:
        assert known.few[: len(left)].tolist() == left
        naive = [covered(tokens, token, left) for token in left]
        assert known.covered[: len(left)].tolist() == naive
        assert known.now[MAXIMAL] == naive.count(False)
    if len(left) > 1:
        check_closers(known, tokens, left)
    else:
        assert known.now[CLOSERS] == 0
    check_bucket(known)


def check_closers(known: Guide, tokens: list[bytes], left: list[int]) -> None:
    quoting = [t for t in left if t in known.spelling.closers and tokens[t][:1] == b'"']
    closing_ = [t for t in left if t in known.spelling.closers and tokens[t][:1] != b'"']
    group = (quoting or closing_)[:FEW]
    maximal = [t for t in group if not covered(tokens, t, group)][:8]
    assert known.now[CLOSERS] == len(maximal)
    assert known.closers[: len(maximal)].tolist() == maximal
    assert known.now[GROUP] == (QUOTE if quoting else CLOSES if closing_ else 0)
    asked, said = np.arange(len(tokens) + 50), np.zeros(len(tokens) + 50, np.bool_)
    closing(known, asked, said)
    begins = (b'"',) if quoting else (b",", b"}", b"]")
    naive = [t for t in range(len(tokens)) if group and tokens[t].startswith(begins)]
    assert np.flatnonzero(said).tolist() == naive


def check_bucket(known: Guide) -> None:
    allowed, maximal = int(known.now[ALLOWED]), int(known.now[MAXIMAL])
    if allowed > FEW:
        assert bucket(known) == (9 if allowed < 512 else 10 if allowed < 4096 else 11)
    else:
        ranges = [range(n, n + 1) for n in range(4)] + [range(4, 6), range(6, 9), range(9, 17), range(17, 33)]
        assert bucket(known) == next((i for i, r in enumerate(ranges) if maximal in r), 8)


@pytest.mark.parametrize("allowed", [64, 65, 511, 512, 4095, 4096, 9000])
def test_buckets_of_many(allowed: int) -> None:
    known, count = looked([], set(range(3, 3 + allowed)), (0, 5, 5), more=10_000)
    assert count == allowed - 1
    check_bucket(known)
    assert 0 < bucket(known) < guides.BUCKETS


def test_quotation_marks_are_found_behind_any_number_of_other_closers() -> None:
    tokens = [("}" * n).encode() for n in range(1, 120)] + [b'"', b'",', b"a"]
    known, _ = looked(tokens, set(range(len(tokens))))
    assert known.now[GROUP] == QUOTE
    assert [tokens[t] for t in known.closers[: known.now[CLOSERS]]] == [b'",']


def test_a_free_text_has_no_bucket() -> None:
    known = no_guide()
    assert known.now[STATE] == -1
    assert bucket(known) == 0


@given(st.integers(0, 2**32 - 1))
def test_ones_equals_naive(word: int) -> None:
    assert ones(np.uint32(word)) == word.bit_count()
