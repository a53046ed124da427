"""What calls of `generate_json` and its kin leave to the next: a pool for each grammar, a grower for each model."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lookahead.errors import InvalidArgument, PoolError
from lookahead.grammar.grammar import Grammar
from lookahead.grow import Grower
from lookahead.pool.fingerprint import fingerprint
from lookahead.pool.pool import Pool
from lookahead.sources.mixer import restore, save

MAX_TOKENS = 100_000
"""Tokens that are kept of a grammar; about 1 MB."""

SCHEMAS = 32
"""Grammars that are kept of a model; the one that was not used for the longest time goes first."""


class SchemaMemory:
    """What earlier calls leave to draft from: a pool for each grammar, a grower for each model. No text depends on it.

    The pools of the `SCHEMAS` grammars that were used last are open. Without a directory, what was in the others is
    forgotten.

    Args:
        directory: where the pools are kept, a subdirectory for each grammar and tokenizer; None: in memory only. While
            a pool is open, no other process can write to it.
        max_tokens: limit of each pool.

    >>> with SchemaMemory("memory") as memory:
    ...     generate_json(model, tokenizer, prompt, Invoice, memory=memory)
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, max_tokens: int = MAX_TOKENS) -> None:
        self.directory = None if directory is None else Path(directory)
        self.max_tokens = max_tokens
        self._open: OrderedDict[str, Pool] = OrderedDict()
        self._growers: weakref.WeakKeyDictionary[Any, Grower] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def pool(self, grammar: Grammar, tokenizer: Any) -> Pool:
        """Return the pool of the texts of `grammar` in the tokens of `tokenizer`.

        Raises:
            PoolError: its directory cannot be used; see `Pool`.
        """
        name = _name(grammar, tokenizer)
        with self._lock:
            if name not in self._open:
                self._open[name] = self._make(name, tokenizer)
                if len(self._open) > SCHEMAS:
                    oldest = self._open.popitem(last=False)[1]
                    if self.directory is not None:  # one in memory may be in use; it goes when nobody has it
                        oldest.close()
            self._open.move_to_end(name)
            return self._open[name]

    def grower(self, model: Any, pool: Pool) -> Grower:
        """Return what drafts for `model`; what it learns is kept, and where `pool` has a directory, written there."""
        with self._lock:
            grower = self._growers.get(model)
            if grower is None:
                grower = self._growers[model] = Grower(vocab_size=int(model.config.vocab_size))
                if pool.calibration:
                    restore(grower.weights, pool.calibration)
        pool.keep_calibration(partial(save, grower.weights))
        return grower

    def at(self, directory: str | os.PathLike[str]) -> SchemaMemory:
        """Return a memory with pools in a directory and the growers of this one."""
        other = SchemaMemory(directory, max_tokens=self.max_tokens)
        other._growers = self._growers
        return other

    def close(self) -> None:
        """Write and close the pools."""
        with self._lock, ExitStack() as stack:  # all of them, also where one fails
            for pool in self._open.values():
                stack.callback(pool.close)
            self._open = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __enter__(self) -> SchemaMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, name: str, tokenizer: Any) -> Pool:
        if self.directory is None:
            return Pool(max_tokens=self.max_tokens)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = error.strerror or error
            raise PoolError(f"memory {self.directory}: {why}; give a directory that can be written to") from error
        return Pool(self.directory / name, tokenizer=tokenizer, max_tokens=self.max_tokens)


MemoryLike = bool | str | os.PathLike[str] | SchemaMemory

_OF_MODELS: weakref.WeakKeyDictionary[Any, SchemaMemory] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def memory_of(model: Any) -> SchemaMemory:
    """Return the memory of `model`, which lives as long as the model."""
    with _LOCK:
        return _OF_MODELS.setdefault(model, SchemaMemory())


@contextmanager
def opened(memory: MemoryLike, model: Any) -> Iterator[SchemaMemory | None]:
    """Give the memory that `memory=` of a call means; one that is opened here is closed again."""
    if isinstance(memory, SchemaMemory):
        yield memory
    elif memory is False:
        yield None
    elif memory is True:
        yield memory_of(model)
    elif isinstance(memory, str | os.PathLike) and os.fspath(memory):
        with memory_of(model).at(memory) as kept:
            yield kept
    else:
        raise InvalidArgument(f"memory={memory!r}; give True, False, a directory or a SchemaMemory")


def _name(grammar: Grammar, tokenizer: Any) -> str:
    digest = hashlib.blake2b(f"{fingerprint(tokenizer)} {grammar.kind} {grammar.source}".encode(), digest_size=8)
    return digest.hexdigest()
