"""The pools that a `Lookahead` drafts from, and what it adds to them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np

from lookahead.draft import IntArray
from lookahead.errors import InvalidArgument, PoolError
from lookahead.pool.pool import Pool
from lookahead.pool.sort import DEPTH

PoolLike = Pool | str | os.PathLike[str]
Remember = Literal["output", "all"] | None

_POOL_LIKE = (Pool, str, os.PathLike)


class Memory:
    """Pools, opened where a path was given, and the rule for what of a request is kept in the first of them.

    Args:
        given: a pool, the directory of one (made if it is not there), or several of either; None: no pool.
        tokenizer: of whose tokens the pools must be; None: not checked.
        remember: "output": add what was generated, with the last tokens of the prompt, which it is found by; "all":
            the whole prompt too; None: add nothing.

    Raises:
        InvalidArgument: something that is no pool, or another word for `remember`.
        PoolError: a directory that cannot be used; see `Pool`.
    """

    def __init__(self, given: PoolLike | Iterable[PoolLike] | None, tokenizer: Any, remember: Remember) -> None:
        if remember not in ("output", "all", None):
            raise InvalidArgument(f'remember={remember!r}; give "output", "all" or None')
        some: tuple[Any, ...] = ()
        if isinstance(given, Iterable) and not isinstance(given, _POOL_LIKE):
            some = tuple(given)
        elif given is not None:
            some = (given,)
        for pool in some:
            if not isinstance(pool, _POOL_LIKE):
                raise InvalidArgument(f"pool has a {type(pool).__name__}; give lookahead.Pool objects or directories")
        self._opened: list[Pool] = []
        self._failure: PoolError | None = None
        try:
            self.pools = tuple(pool if isinstance(pool, Pool) else self._open(pool, tokenizer) for pool in some)
            for pool in self.pools:
                pool.require(tokenizer)
        except BaseException:
            self.close()
            raise
        self.remember = remember if self.pools and not self.pools[0].read_only else None

    def _open(self, path: str | os.PathLike[str], tokenizer: Any) -> Pool:
        pool = Pool(path, tokenizer=tokenizer)
        self._opened.append(pool)
        return pool

    def add(self, contexts: Sequence[tuple[IntArray, IntArray]]) -> None:
        """Keep what the option says of (prompt, generated tokens) of every row.

        A pool that cannot be written costs no output: `check` tells of it, and nothing is added from then on.
        """
        try:
            for prompt, generated in contexts:
                if self.remember is not None and len(generated):
                    begin = 0 if self.remember == "all" else max(0, len(prompt) - DEPTH)
                    self.pools[0].add(np.concatenate([prompt[begin:], generated]))
        except PoolError as failure:
            self.remember, self._failure = None, failure

    def flush(self) -> None:
        """Write what was added; as with `add`, a pool that cannot be written costs no output."""
        try:
            if self.remember is not None:
                self.pools[0].flush()
        except PoolError as failure:
            self.remember, self._failure = None, failure

    def check(self) -> None:
        """Raise, once, what kept earlier outputs from being added."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Close the pools that were opened here."""
        with ExitStack() as stack:  # all of them, also where one fails
            stack.callback(self.check)
            for pool in self._opened:
                stack.callback(pool.close)
