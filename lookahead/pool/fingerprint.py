"""What tells tokenizers apart: the token of every id."""

from __future__ import annotations

import hashlib
from typing import Any


def fingerprint(tokenizer: Any) -> str:
    """Return a digest of the vocabulary of `tokenizer` (of transformers or of tokenizers), added tokens included.

    Two tokenizers with one fingerprint give every id the same meaning, so a pool of one serves the other.
    """
    digest = hashlib.blake2b(digest_size=16)
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
