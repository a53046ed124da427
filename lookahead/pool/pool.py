"""`Pool`: n-grams that outlive a request, in memory and on disk."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lookahead.draft import IntArray
from lookahead.errors import InvalidArgument, PoolDamaged, PoolError, PoolMismatch, PoolNotFound
from lookahead.pool.files import TEMPORARY
from lookahead.pool.fingerprint import fingerprint
from lookahead.pool.index import documents
from lookahead.pool.lock import HOLDER, LOCK
from lookahead.pool.manifest import FILE
from lookahead.pool.search import interval, longest, views
from lookahead.pool.shelf import Segment, Shelf, Snapshot
from lookahead.pool.store import Store

LIVE = 1 << 20
"""Tokens that are kept in memory until they are written as a segment."""

LIMIT = 200_000_000
"""Tokens of a pool that is given no other limit."""

_LARGEST_TOKEN = (1 << 24) - 2
_BEGUN = (LOCK, HOLDER, FILE + TEMPORARY)  # what is there of a pool whose maker was killed


class Pool:
    """Text of earlier requests or of a corpus, indexed so that what followed any context is found in microseconds.

    A pool can only make drafts better or worse, never change an output. Documents are added at the young end; where
    the limit is reached, the oldest go. What is added can be drafted from at the next request. It is written to the
    disk when `live_tokens` have come together, at the latest when something is added a minute after the last time, at
    `flush()`, at `close()` and when the process ends in order.

    Adding, merging and drafting may happen in different threads. Merging runs in a thread of its own.

    Args:
        path: the directory; made if it is not there. None: in memory only.
        tokenizer: of whose tokens the pool is; checked against what the directory says. None: not checked.
        max_tokens: limit; the oldest documents leave first. Kept in the directory; None: the one that is kept there,
            or `LIMIT`.
        max_bytes: a second limit, of the size of all segments.
        live_tokens: how many may be in memory, not yet written.
        read_only: open beside a writer, and add nothing; what the writer commits is seen when a request begins.
        damaged: what to do about a damaged file: "raise", or "skip" to use the rest; see `problems`.

    Raises:
        PoolMismatch: the directory's pool is of another tokenizer.
        PoolBusy: another process writes to it; `read_only=True` is possible still.
        PoolDamaged, PoolTooNew: a file of it cannot be read.
        InvalidArgument: a limit below 1.

    >>> pool = Pool()
    >>> pool.add([1, 2, 3, 4])
    True
    >>> pool.longest_match([9, 2, 3]), pool.successors([2, 3])
    (2, Counter({4: 1}))
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        tokenizer: Any = None,
        max_tokens: int | None = None,
        max_bytes: int | None = None,
        live_tokens: int = LIVE,
        read_only: bool = False,
        damaged: Literal["raise", "skip"] = "raise",
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_bytes", max_bytes), ("live_tokens", live_tokens)):
            if value is not None:
                _require_whole(name, value, 1)
        if path is None and read_only:
            raise InvalidArgument("a pool in memory cannot be read-only: it would stay empty; give a path")
        self.path = None if path is None else Path(path)
        self.read_only = read_only
        self._unread: PoolError | None = None
        self._store = None if self.path is None else _open(self.path, read_only, damaged)
        try:
            settings = self.settings
            limit = max_tokens or settings.get("max_tokens", LIMIT)
            self._shelf = Shelf(
                self._store,
                name=self._name,
                writable=not read_only,
                max_tokens=limit,
                max_bytes=max_bytes,
                live_tokens=max(1, min(live_tokens, limit // 4)),
            )
            if max_tokens is not None:
                self._shelf.keep_setting("max_tokens", max_tokens)
            self._tokenizer: str | None = settings.get("tokenizer")  # fingerprint
            self.require(tokenizer)
        except BaseException:
            if self._store is not None:
                self._store.close()
            raise
        if self._store is not None and not read_only:
            atexit.register(_close, weakref.ref(self))

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: Any) -> Pool:
        """Open the pool at `path`, which must be there; `options` as for `Pool`.

        Raises:
            PoolNotFound: there is none.
        """
        if not Path(path).is_dir() or not any(Path(path).iterdir()):
            raise PoolNotFound(f'{path} is no pool; Pool("{path}") or `lookahead pool build {path} …` makes one')
        return cls(path, **options)

    # What it holds.

    @property
    def tokens(self) -> int:
        """Tokens in the pool, those that wait to be indexed included."""
        return self._shelf.tokens

    @property
    def documents(self) -> int:
        """Documents in the pool."""
        return self._shelf.documents

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes, mapped from files or not."""
        return self._shelf.nbytes

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, oldest first, without the live index."""
        return self._shelf.segments

    @property
    def max_tokens(self) -> int:
        """The limit; the oldest documents leave first."""
        return self._shelf.max_tokens

    @property
    def live_tokens(self) -> int:
        """How many tokens may be in memory, not yet written."""
        return self._shelf.live_tokens

    @property
    def problems(self) -> tuple[PoolError, ...]:
        """What was left out because it is damaged (`damaged="skip"`), and why what is newer cannot be read."""
        left_out = () if self._store is None else self._store.problems
        return left_out if self._unread is None else (*left_out, self._unread)

    @property
    def settings(self) -> dict[str, Any]:
        """What the directory says of the pool: the tokenizer's fingerprint, and what builders keep there."""
        return {} if self._store is None else self._store.settings

    def require(self, tokenizer: Any) -> None:
        """Check that the pool is of `tokenizer`; a pool that does not know its tokenizer yet takes this one.

        Raises:
            PoolMismatch: it is of another one.
        """
        if tokenizer is not None:
            self._require_mark(fingerprint(tokenizer), "this one has")

    def _require_mark(self, mark: str, whose: str) -> None:
        if self._tokenizer is not None and mark != self._tokenizer:
            raise PoolMismatch(
                f"the pool {self._name} is of another tokenizer (fingerprint {self._tokenizer}, {whose} {mark}); "
                "build one for this tokenizer in a directory of its own"
            )
        self._tokenizer = mark
        self._shelf.keep_setting("tokenizer", mark)

    def __contains__(self, digest: int) -> bool:
        """Return whether a document with this digest is in the pool."""
        return digest in self._shelf

    def __repr__(self) -> str:
        return f"<Pool {self._name}: {self.tokens:,} tokens in {len(self.segments)} segments>"

    # Adding.

    def add(self, tokens: ArrayLike, *, digest: int | None = None) -> bool:
        """Add one document; return False if it was empty, or in the pool already.

        Args:
            tokens: [L] token ids.
            digest: 64 bits that name the document; None: taken from the tokens.

        Raises:
            PoolError: the pool is read-only or closed; or writing an earlier document failed.
            InvalidArgument: not a sequence of token ids.
        """
        document = _checked(tokens)
        if digest is None:
            digest = int.from_bytes(hashlib.blake2b(document.tobytes(), digest_size=8).digest(), "little")
        elif not isinstance(digest, int) or not 0 <= digest < 1 << 64:
            raise InvalidArgument(f"digest={digest!r}; give 64 bits as a whole number")
        return self._shelf.add(document, digest)

    def absorb(self, other: Pool) -> int:
        """Add the documents of another pool, oldest first, that are not here yet; return how many these were.

        Raises:
            PoolError: the pool is read-only or closed.
            PoolMismatch: the other one is of another tokenizer.
            PoolDamaged: the other one is damaged; what stands before that was added.
            InvalidArgument: not a pool, or this one.
        """
        if not isinstance(other, Pool) or other is self:
            what = "this pool itself" if other is self else f"a {type(other).__name__}"
            raise InvalidArgument(f"absorb() was given {what}; give another lookahead.Pool")
        if other._tokenizer is not None:
            self._require_mark(other._tokenizer, f"{other._name} has")
        added = 0
        for run in other.snapshot().runs:
            try:
                texts = documents(run)
            except ValueError as error:
                raise PoolDamaged(f"{other._name}: {error}") from error
            for text, digest in zip(texts, run.digests.tolist(), strict=True):
                added += self.add(text, digest=digest or None)
        return added

    def flush(self) -> None:
        """Write what was added; when this returns, it is on the disk. Merging may still go on."""
        self._shelf.flush()

    def settle(self) -> None:
        """Wait until the thread that writes and merges has nothing left to do.

        Raises:
            PoolError: it failed; nothing that was committed is lost.
        """
        self._shelf.settle()

    def compact(self) -> None:
        """Flush, and merge all segments into one: the quickest to ask."""
        self._shelf.compact()

    def prune(self, max_tokens: int) -> int:
        """Give up the oldest documents until at most `max_tokens` are left; return how many tokens went."""
        _require_whole("max_tokens", max_tokens, 0)
        return self._shelf.prune(max_tokens)

    def close(self) -> None:
        """Flush, and let another writer in. What was handed out stays usable."""
        self._shelf.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Asking.

    def snapshot(self) -> Snapshot:
        """Return all that can be drafted from now, newly added documents included.

        A read-only pool looks first whether its writer has committed something. What cannot be read leaves it as it
        was, for drafts are no reason to stop; `problems` then says what it is, and `refresh` raises it.
        """
        if self.read_only:
            try:
                self.refresh()
            except PoolError as problem:
                self._unread = problem
        return self._shelf.snapshot()

    def longest_match(self, context: ArrayLike) -> int:
        """Return how many of the last tokens of `context` (at most 32) stand together somewhere in the pool."""
        return longest(self.snapshot().views, _checked(context))

    def successors(self, context: ArrayLike, length: int | None = None) -> Counter[int]:
        """Return how often each token followed the last `length` (at most 32) tokens of `context`.

        None: the longest suffix that occurs. Ends of documents are left out.
        """
        if length is not None:
            _require_whole("length", length, 0)
        snapshot, suffix = self.snapshot(), _checked(context)
        if length is None:
            length = longest(snapshot.views, suffix)
        counts: Counter[int] = Counter()
        for run, view in zip(*snapshot, strict=True):
            begin, end = interval(view, suffix, length)
            symbols = run.low[begin:end].astype(np.int64)
            if len(run.high):
                symbols |= run.high[begin:end].astype(np.int64) << 16
            for symbol, count in zip(*np.unique(symbols[symbols > 0], return_counts=True), strict=True):
                counts[int(symbol) - 1] += int(count)
        return counts

    def refresh(self) -> bool:
        """Take over what the writer of a read-only pool committed since; return whether there was anything.

        Called by itself when a request begins; some 10 µs where there is nothing new.

        Raises:
            PoolDamaged, PoolTooNew: that cannot be read; what was open stays open.
        """
        changed = self._shelf.refresh()
        self._unread = None
        return changed

    def verify(self) -> None:
        """Read every byte from the disk and compare checksums.

        Raises:
            PoolDamaged: a file differs. A pool opened with `damaged="skip"` goes on without it.
        """
        self._shelf.verify()

    # Calibration: what the grower learnt about this pool, kept beside it.

    @property
    def calibration(self) -> bytes | None:
        """What a grower learnt with this pool: as it was last written; of a pool in memory, as it is now."""
        if self._store is not None:
            return self._store.state()
        return None if self._shelf.state is None else self._shelf.state()

    def keep_calibration(self, current: Callable[[], bytes]) -> None:
        """Write what `current()` returns with every commit."""
        self._shelf.state = current

    @property
    def _name(self) -> str:
        return "in memory" if self.path is None else str(self.path)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _open(path: Path, read_only: bool, damaged: Literal["raise", "skip"]) -> Store:
    if read_only or (path.is_dir() and any(file.name not in _BEGUN for file in path.iterdir())):
        return Store.open(path, writable=not read_only, damaged=damaged)
    return Store.create(path, {})


def _close(reference: weakref.ref[Pool]) -> None:
    pool = reference()
    if pool is not None:
        pool.close()


def _require_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgument(f"{name}={value!r}; give a whole number from {least}")


def _checked(tokens: ArrayLike) -> IntArray:
    """Return token ids as an array of our own."""
    try:
        array: NDArray[Any] = np.array(tokens)
    except ValueError as error:
        raise InvalidArgument(f"a document is one sequence of token ids: {error}") from error
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgument(f"a document is one sequence of token ids, not {array.ndim}D of {array.dtype}")
    if array.min() < 0 or array.max() > _LARGEST_TOKEN:
        raise InvalidArgument(f"token {array.min() if array.min() < 0 else array.max()} is no token id")
    return array.astype(np.int32)


def combined(pools: Sequence[Pool]) -> Snapshot:
    """Return what several pools hold together, as one: the first pool's last, where the youngest runs stand."""
    snapshots = [pool.snapshot() for pool in reversed(dict.fromkeys(pools))]
    if len(snapshots) == 1:
        return snapshots[0]
    runs = tuple(run for snapshot in snapshots for run in snapshot.runs)
    return Snapshot(runs, views(runs))
