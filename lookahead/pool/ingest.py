"""Texts into a pool: tokenized many at a time, and none that the pool holds already."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lookahead.draft import IntArray
from lookahead.errors import InvalidInput
from lookahead.pool.corpus import Document, Skipped
from lookahead.pool.pool import Pool

PIECE = 1 << 16
"""Longer texts, in characters, are tokenized in pieces that end with a line, and joined again to one document. At a
seam, tokens may differ from those of the whole text; in return a long file is tokenized by all cores."""

BATCH = 1 << 21
"""Characters that are tokenized together."""


@dataclass(slots=True)
class Tally:
    """What has been done so far.

    Attributes:
        documents: added.
        tokens: in those.
        known: documents that were in the pool already.
    """

    documents: int = 0
    tokens: int = 0
    known: int = 0


def ingest(
    pool: Pool,
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    tally: Tally | None = None,
    skipped: Skipped | None = None,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Add documents to a pool; those whose digests are in it are not tokenized again.

    Ctrl-C comes through between documents only, so that what was added is whole; a second one comes at once.

    Args:
        pool: open for writing; not flushed at the end.
        documents: see `lookahead.pool.corpus.documents`.
        tokenizer: of transformers or of tokenizers.
        tally: where to count; what is there when an error ends this was added.
        skipped: where to count documents that have no tokens.
        report: called after every document that was read or added.

    >>> with Pool("pool", tokenizer=tokenizer) as pool:
    ...     ingest(pool, documents(["src"]), tokenizer)
    """
    tally, skipped = tally or Tally(), skipped or Skipped()
    encode = encoder(tokenizer)

    def unknown() -> Iterator[Document]:
        for document in documents:
            if document.digest in pool:
                tally.known += 1
                report(tally)
            else:
                yield document

    for batch in _batches(unknown()):
        tokens = encode([document.text for document in batch])
        with undivided():
            for document, found in zip(batch, tokens, strict=True):
                if pool.add(found, digest=document.digest):
                    tally.documents += 1
                    tally.tokens += len(found)
                elif len(found):
                    tally.known += 1
                else:
                    skipped.add("without tokens", document.name)
                report(tally)
    return tally


def encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[IntArray]]:
    """Return a function that gives the tokens of texts, nothing cut off and no special tokens put in."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "encode_batch_fast"):
        return lambda texts: [
            np.array(tokens, np.int32) for tokens in tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        ]
    if backend.truncation is not None or backend.padding is not None:
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()

    def encode(texts: Sequence[str]) -> list[IntArray]:
        parts = [pieces(text) for text in texts]
        every = [piece for some in parts for piece in some]
        try:
            encoded = iter(backend.encode_batch_fast(every, add_special_tokens=False))
        except Exception as error:  # tokenizers raises nothing more specific
            raise InvalidInput(f"the tokenizer cannot take this text ({error}); give another tokenizer") from error
        return [np.concatenate([np.array(next(encoded).ids, np.int32) for _ in some]) for some in parts]

    return encode


def pieces(text: str, size: int = PIECE) -> list[str]:
    """Cut a text after line ends into pieces of at most `size` characters; within a line only if it is longer.

    >>> pieces("one\\ntwo\\nthree", 6)
    ['one\\n', 'two\\n', 'three']
    """
    parts, begin = [], 0
    while len(text) - begin > size:
        end = text.rfind("\n", begin, begin + size) + 1 or begin + size
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def undivided() -> Iterator[None]:
    """Hold back Ctrl-C until the block has ended; a second one comes through."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def note(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
