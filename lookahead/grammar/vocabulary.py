"""A tokenizer as grammars see it: the bytes of every token."""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from lookahead.errors import GrammarError
from lookahead.grammar.spelling import spelling

_KNOWN: weakref.WeakKeyDictionary[Any, Vocabulary] = weakref.WeakKeyDictionary()


class Vocabulary:
    """The tokens of one tokenizer, read once and kept as long as the tokenizer lives; see `Vocabulary.of`.

    Attributes:
        engine: the grammar engine's view of the tokenizer.
        size: number of tokens.
        end: the token that the tokenizer calls the end of a text, None where it names none.
        bytes: the bytes that each token stands for; empty for special tokens.
        spelling: what drafting wants to know of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = _backend(tokenizer)
        end = getattr(tokenizer, "eos_token_id", None)
        self.end: int | None = None if end is None else int(end)
        self.size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.engine = _engine(backend, self.end, self.size)
        special = self.engine.is_special_token
        self.bytes = [b"" if special(i) else self.engine.decode_bytes([i]) for i in range(self.size)]
        self.spelling = spelling(self.bytes)
        self.compiled: OrderedDict[str, Any] = OrderedDict()  # see `lookahead.grammar.grammar.compiled`

    @staticmethod
    def of(tokenizer: Any) -> Vocabulary:
        """Return the vocabulary of a fast Hugging Face tokenizer, or of a `tokenizers.Tokenizer`.

        Raises:
            GrammarError: a tokenizer that gives no bytes for its tokens, as slow ones do.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        try:
            known = _KNOWN.get(tokenizer)
        except TypeError:  # cannot be referred to weakly
            return Vocabulary(tokenizer)
        # A tokenizer may be given more tokens later, or another end.
        if known is None or known.size < _length(tokenizer) or known.end != getattr(tokenizer, "eos_token_id", None):
            known = _KNOWN[tokenizer] = Vocabulary(tokenizer)
        return known

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text` as it stands in the middle of other text."""
        return list(self.engine.tokenize_str(text))

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, special ones left out."""
        return b"".join(self.bytes[token] for token in tokens if 0 <= token < self.size)


def _backend(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise GrammarError(
            f"a grammar needs the bytes of all tokens, which a {type(tokenizer).__name__} does not tell; pass the "
            "model's fast tokenizer (AutoTokenizer.from_pretrained)"
        )
    return backend


def _engine(backend: Any, end: int | None, size: int) -> Any:
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    text = copy.to_str()
    if end is None or copy.get_vocab_size() < size:
        text, end = _filled(text, size, end)
    try:
        return LLTokenizer(text, eos_token=end)
    except ValueError as error:
        raise GrammarError(f"the grammar engine cannot read this tokenizer: {error}") from error


def _filled(text: str, size: int, end: int | None) -> tuple[str, int]:
    """Return a tokenizer's JSON with special tokens for numbers that no token has, and its end token.

    The engine counts tokens instead of reading their numbers, and takes token 0 for the end where none is named.
    """
    data = json.loads(text)
    vocab, added = data["model"].get("vocab", {}), {token["id"]: token for token in data["added_tokens"]}
    known = {*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *added}
    own = max(known - added.keys(), default=-1)
    for i in [*sorted(set(range(size)) - known), *([size] if end is None else [])]:
        token = {"id": i, "content": f"<|no token {i}|>", "special": True}
        added[i] = token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        if i < own:
            vocab[token["content"]] = i
    data["added_tokens"] = [added[i] for i in sorted(added)]
    return json.dumps(data), size if end is None else end


def _length(tokenizer: Any) -> int:
    size = getattr(tokenizer, "get_vocab_size", None)
    return int(size()) if size is not None else len(tokenizer)
