"""Random walks through a bundled grammar: text that its masks allow; and whether a given text is accepted."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from string import ascii_lowercase, ascii_uppercase, digits

import llguidance

from lookahead.grammar import library

BYTES = llguidance.LLTokenizer("byte")
KINDS = (ascii_lowercase, ascii_uppercase, digits, "_", "\"'", "([{<", ")]}>", " \n\t")
WORD, ODD = "word", "odd"


class Vocabulary:
    """A tokenizer of the 256 bytes, some words and an end token."""

    def __init__(self, words: tuple[str, ...]):
        self.tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words] + [b"<end>"]
        self.eos_token_id, self.bos_token_id = len(self.tokens) - 1, None
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@dataclass(frozen=True)
class Walk:
    """How to walk: words to offer beside single bytes, and the tokens that lead to an end."""

    words: tuple[str, ...] = ()
    closing: tuple[str, ...] = ("0", "x", '"', "]", "}")
    budget: int = 40  # tokens, before it heads for the end
    limit: int = 160  # tokens, after which it gives up

    def run(self, name: str, seed: int) -> str | None:
        """Return a text that the grammar accepts, or None if none was reached within the limit."""
        vocabulary, tokenizer = _vocabulary(self.words + self.closing)
        matcher, draw, text = matcher_of(name, tokenizer), random.Random(seed), b""
        budget = draw.randrange(self.budget)
        for length in range(self.limit):
            allowed = tokens_allowed(matcher, vocabulary.eos_token_id)
            if matcher.is_accepting() and (not allowed or length >= budget or draw.random() < 0.03):
                return text.decode()
            if length >= budget:
                allowed = [token for token in allowed if vocabulary.tokens[token] in self._ends()] or allowed
            token = draw.choice(allowed if length >= budget else _of_one_kind(draw, allowed))
            assert matcher.consume_token(token), matcher.get_error()
            text += vocabulary.tokens[token]
        return None

    def _ends(self) -> set[bytes]:
        return {each.encode() for each in self.closing}


def tokens_allowed(matcher: llguidance.LLMatcher, end: int) -> list[int]:
    """Return the tokens that the mask allows, without the end token."""
    bits = matcher.compute_logit_bias()
    assert not matcher.is_error(), matcher.get_error()
    return [token for token, bit in enumerate(bits) if bit and token != end]


def matcher_of(name: str, tokenizer: llguidance.LLTokenizer = BYTES) -> llguidance.LLMatcher:
    """Return a fresh matcher of the bundled grammar; one that does not compile fails the test."""
    entry = library.read(name)
    build = llguidance.LLMatcher.grammar_from_regex if entry.kind == "regex" else llguidance.LLMatcher.grammar_from_lark
    matcher = llguidance.LLMatcher(tokenizer, build(entry.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(name: str, text: str) -> bool:
    """Feed the text byte by byte and ask whether it may end there."""
    matcher, data = matcher_of(name), text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


def _of_one_kind(draw: random.Random, allowed: list[int]) -> list[int]:
    """Draw a kind first, so that a kind of many, such as bytes beyond ASCII, comes no more often than the others."""
    kinds: dict[str, list[int]] = {}
    for token in allowed:
        kinds.setdefault(_kind(token), []).append(token)
    if WORD in kinds and draw.random() < 0.5:
        return kinds[WORD]
    if len(kinds) > 1 and draw.random() < 0.9:
        kinds.pop(ODD, None)
    return kinds[draw.choice(sorted(kinds))]


def _kind(token: int) -> str:
    if token > 255:
        return WORD
    if token > 127:
        return ODD
    return next((kind for kind in KINDS if chr(token) in kind), chr(token))


@cache
def _vocabulary(words: tuple[str, ...]) -> tuple[Vocabulary, llguidance.LLTokenizer]:
    vocabulary = Vocabulary(tuple(dict.fromkeys(word for word in words if len(word.encode()) > 1)))
    return vocabulary, llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))
