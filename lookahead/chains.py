"""Drafts for a serving engine: a chain for each request of a batch, whose requests come, go and change places."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.errors import InvalidArgument
from lookahead.later import Later
from lookahead.memory import Memory, PoolLike, Remember
from lookahead.pool.pool import Pool, combined
from lookahead.sources.chain import Batch, Drafts, Tools, draft, empty_room
from lookahead.sources.growth import empty_scratch
from lookahead.sources.mixer import fresh_weights, restore
from lookahead.sources.recycle import no_tables
from lookahead.texts import Rows
from lookahead.worth import Worth

MOST = 1024
"""Tokens of a chain at most."""

_CHUNK = 32  # tokens that a request writes before others may draft from them
_LOOK, _SOON = 16, 4  # steps after which the pools are looked at again; where a request has come
_RECENT = 1 << 18  # tokens of running requests that are kept beside the pools
_LARGEST_TOKEN = int(np.iinfo(np.int32).max)

Lengths = NDArray[np.int64]


class Chains:
    """Drafts from the n-grams of each request, of the others, and of pools, one chain for each row of a batch.

    Drafts can make an engine faster or slower, never change what it writes, as long as it verifies them.

    Args:
        most: tokens of a chain at most.
        pool: a pool, a directory or several of either, see `Lookahead`; the first is added to when a request has left.
        remember: what is added, see `Lookahead`.
        min_chance: a chain ends where the chance that all of it is accepted falls below this.
        worth: says how far chains run; None: as far as `min_chance` says.
        write_s: seconds after which what was generated is on the disk, also where no further step is made: an engine
            may be killed.
        vocab_size: tokens at or above it are never drafted; None: no limit known.

    Raises:
        InvalidArgument: a number out of range.
        PoolError: a directory that cannot be used; see `Pool`.

    >>> chains = Chains(8)
    >>> chains.propose(np.array([[1, 2, 3, 4, 1, 2, 3, 0, 0, 0]], np.int32), np.array([7]), [1])
    [[4]]
    """

    def __init__(
        self,
        most: int,
        *,
        pool: PoolLike | Sequence[PoolLike] | None = None,
        remember: Remember = "output",
        min_chance: float = 0.2,
        worth: Worth | None = None,
        write_s: float = 5.0,
        vocab_size: int | None = None,
    ) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST:
            raise InvalidArgument(f"most={most!r}; give a whole number of drafted tokens from 1 to {MOST}")
        if isinstance(min_chance, bool) or not isinstance(min_chance, int | float) or not 0.0 < min_chance <= 1.0:
            raise InvalidArgument(f"min_chance={min_chance!r}; give a chance above 0, 1 at most")
        self.most, self.min_chance = most, float(min_chance)
        self._memory = Memory(pool, None, remember)
        self._recent = Pool(max_tokens=_RECENT)
        self._asked = (self._recent, *self._memory.pools)
        self._worth, self._limit = worth, _LARGEST_TOKEN if vocab_size is None else vocab_size
        self._rows = Rows(most + 1)
        self._tools = Tools(no_tables(), fresh_weights(), empty_scratch(), empty_room(most + 1))
        calibration = next((one.calibration for one in self._memory.pools if one.calibration), None)
        if calibration is not None:
            restore(self._tools.weights, calibration)
        self._snapshot, self._version = combined(self._asked), 1
        self._rows.ask(len(self._snapshot.views))
        self._steps, self._looked = 0, -_LOOK
        self._writing = Later(write_s, self.write)
        self._lock = Lock()  # held while texts are looked at
        self._ran: Lengths = np.zeros(0, np.int64)  # drafted tokens of each row in the last step
        self._ended = self._drafting_s = 0.0

    def propose(self, tokens: IntArray, lengths: NDArray[Any], new: Sequence[int]) -> list[list[int]]:
        """Return for each row of the batch what is likely to follow.

        Args:
            tokens: [B, L] the rows, at least `lengths` tokens of each; L is the most that a text may ever have.
            lengths: [B] tokens of each text.
            new: [B] how many of them were generated in the last step; a row without any is not drafted for.
        """
        with self._lock:
            drafts = self._propose(tokens, lengths, new)
        if self._memory.remember is not None:
            self._writing.ask()
        return drafts

    def _propose(self, tokens: IntArray, lengths: NDArray[Any], new: Sequence[int]) -> list[list[int]]:
        began, count = time.perf_counter(), len(new)
        generated, there = np.array(new, np.int64), np.array(lengths[:count], np.int64)
        rows = np.ascontiguousarray(tokens[:count], np.int32)
        last = self._rows.owner
        begun, gone = self._rows.recognise(rows, there, generated)
        if not begun and (generated > 0).all():
            self._account(last, there, generated, began)
        self._give(gone)
        self._look(begun)
        drafted, kept = self._draft(rows, there)
        self._ran = kept
        drafts = [row[:n] for row, n in zip(drafted.tolist(), kept.tolist(), strict=True)]
        self._ended = time.perf_counter()
        self._drafting_s = self._ended - began
        return drafts

    def _draft(self, rows: IntArray, lengths: Lengths) -> tuple[IntArray, Lengths]:
        """Return [B, most] drafted tokens, and [B] how many of them are to run."""
        owner, shape = self._rows.owner, (len(lengths), self.most)
        most = np.clip(rows.shape[1] - lengths - 1, 0, self.most)
        if self._worth is not None and not self._worth.drafts:
            most[:] = 0
        batch = Batch(rows, lengths, owner, most)
        drafts = Drafts(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(len(lengths), np.int32))
        runs = self._snapshot.views
        draft(self._rows.arrays, self._tools, runs, self._version, batch, drafts, self.min_chance, self._limit)
        if self._worth is None:
            return drafts.tokens, drafts.size.astype(np.int64)
        drafting = max(int((owner >= 0).sum()), 1)
        return drafts.tokens, self._worth.cut(drafts.chances, drafts.size, rows=drafting, context=_mean(lengths))

    def _account(self, last: Lengths, lengths: Lengths, new: Lengths, now: float) -> None:
        """Tell what the step that has ended took and brought; it read no prompt."""
        if self._worth is None or not self._ended:
            return
        ran = dict(zip(last.tolist(), self._ran.tolist(), strict=True))
        drafted = sum(ran.get(text, 0) for text in self._rows.owner.tolist())
        self._worth.observe(
            rows=len(new),
            drafted=drafted,
            tokens=int(new.sum()),
            seconds=now - self._ended,
            drafting_s=self._drafting_s,
            context=_mean(lengths),
        )

    def _give(self, gone: Sequence[int]) -> None:
        """Let others draft from what requests wrote."""
        rows = self._rows
        for text in [*gone, *rows.grown(_CHUNK)]:
            self._recent.add(rows.show(text))
        if gone and self._memory.remember is not None:
            self._memory.add([rows.give(text) for text in gone])
        rows.forget()

    def write(self) -> bool:
        """Let the pool be written; where no step was made of late, with what is there of the requests of the last one.

        Returns whether there was one. Done by itself, in a thread of its own.
        """
        with self._lock:
            idle = time.perf_counter() - self._ended >= self._writing.seconds
            if idle:
                self._memory.add([self._rows.give(text) for text in self._rows.running()])
        self._memory.flush()
        return not idle

    def _look(self, begun: int) -> None:
        """See what the pools have got."""
        self._steps += 1
        if self._steps - self._looked < (_SOON if begun else _LOOK):
            return
        self._looked = self._steps
        snapshot = combined(self._asked)
        if list(map(id, snapshot.runs)) != list(map(id, self._snapshot.runs)):
            self._snapshot, self._version = snapshot, self._version + 1
            self._rows.ask(len(snapshot.views))

    def close(self) -> None:
        """Give the pools what running requests wrote, and close those that were opened here."""
        self._writing.stop()
        with self._lock:
            self._memory.add([self._rows.give(text) for text in self._rows.running()])
        self._memory.close()


def _mean(lengths: Lengths) -> int:
    return int(lengths.mean()) if len(lengths) else 0


def warm_up() -> None:
    """Compile, or load, all that `Chains` runs."""
    chains, tokens = Chains(2, worth=Worth(slope=0.0)), np.ones((2, 4 * _CHUNK), np.int32)
    for length in range(8, 4 * _CHUNK, _CHUNK // 2):
        chains.propose(tokens, np.full(2, length), [1, 1])
    chains.propose(tokens[:1], np.full(1, 4 * _CHUNK), [1])
