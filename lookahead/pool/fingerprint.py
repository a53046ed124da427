"""What tells tokenizers apart: the token of every id."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

_KNOWN: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()


def fingerprint(tokenizer: Any) -> str:
    """Return a digest of the vocabulary of `tokenizer` (of transformers or of tokenizers), added tokens included.

    Two tokenizers with one fingerprint give every id the same meaning, so a pool of one serves the other. Computed once
    for a tokenizer, unless it is given more tokens.
    """
    size = tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else len(tokenizer)
    try:
        known = _KNOWN.get(tokenizer)
        if known is None or known[0] != size:
            known = _KNOWN[tokenizer] = (size, _digest(tokenizer))
        return known[1]
    except TypeError:  # cannot be referred to weakly
        return _digest(tokenizer)


def _digest(tokenizer: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
