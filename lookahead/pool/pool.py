"""`Pool`: n-grams that outlive a request, in memory and on disk."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lookahead.draft import IntArray
from lookahead.errors import InvalidArgument, PoolDamaged, PoolError, PoolMismatch, PoolNotFound
from lookahead.pool.files import TEMPORARY
from lookahead.pool.fingerprint import fingerprint
from lookahead.pool.index import Run, as_run, build, documents_within, merge
from lookahead.pool.levels import to_give_up, to_merge
from lookahead.pool.lock import HOLDER, LOCK
from lookahead.pool.manifest import FILE
from lookahead.pool.search import interval, views
from lookahead.pool.store import Entry, NewSegment, Store
from lookahead.sources.kernels import Records

LIVE = 1 << 20
"""Tokens that are kept in memory until they are written as a segment."""

LIMIT = 200_000_000
"""Tokens of a pool that is given no other limit."""

_LARGEST_TOKEN = (1 << 24) - 2
_BEGUN = (LOCK, HOLDER, FILE + TEMPORARY)  # what is there of a pool whose maker was killed


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run that is written (in a pool in memory: that would be), and its file."""

    run: Run
    entry: Entry | None


class Snapshot(NamedTuple):
    """What a pool holds at one moment; unchanged by what is added later."""

    runs: tuple[Run, ...]
    views: Records


class Pool:
    """Text of earlier requests or of a corpus, indexed so that what followed any context is found in microseconds.

    A pool can only make drafts better or worse, never change an output. Documents are added at the young end; where
    the limit is reached, the oldest go. What is added can be drafted from at the next request. It is written to the
    disk when `live_tokens` have come together, at `flush()`, at `close()` and when the process ends in order.

    Adding, merging and drafting may happen in different threads. Merging runs in a thread of its own.

    Args:
        path: the directory; made if it is not there. None: in memory only.
        tokenizer: of whose tokens the pool is; checked against what the directory says. None: not checked.
        max_tokens: limit; the oldest documents leave first. Kept in the directory; None: the one that is kept there,
            or `LIMIT`.
        max_bytes: a second limit, of the size of all segments.
        live_tokens: how many may be in memory, not yet written.
        read_only: open beside a writer, and add nothing.
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
        self.max_tokens = LIMIT if max_tokens is None else max_tokens
        self.max_bytes, self.read_only = max_bytes, read_only
        self._pending: list[tuple[IntArray, int]] = []
        self._waiting = 0  # tokens in _pending
        self._live: tuple[Run, ...] = ()
        self._segments: tuple[Segment, ...] = ()
        self._snapshot: Snapshot | None = None
        self._known: set[int] | None = None
        self._keep: Callable[[], bytes] | None = None
        self._lock = threading.RLock()  # held for moments
        self._working = threading.RLock()  # held by the thread that writes and merges; taken before the other
        self._writing = 0  # runs of the live index that are being written
        self._worker = threading.Thread()
        self._failure: Exception | None = None
        self._closed = False
        self._tokenizer: str | None = None  # fingerprint
        self._store = None if self.path is None else _open(self.path, read_only, damaged)
        try:
            self._load(max_tokens)
            self.require(tokenizer)
        except BaseException:
            if self._store is not None:
                self._store.close()
            raise
        self.live_tokens = max(1, min(live_tokens, self.max_tokens // 4))
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
        with self._lock:
            return sum(run.tokens for run in self._runs()) + self._waiting

    @property
    def documents(self) -> int:
        with self._lock:
            return sum(len(run.ends) for run in self._runs()) + len(self._pending)

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes, mapped from files or not."""
        with self._lock:
            return sum(run.nbytes for run in self._runs()) + 4 * self._waiting

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments, oldest first, without the live index."""
        return self._segments

    @property
    def problems(self) -> tuple[PoolError, ...]:
        """What was left out because it is damaged (`damaged="skip"`)."""
        return () if self._store is None else self._store.problems

    @property
    def settings(self) -> dict[str, Any]:
        """What the directory says of the pool: the tokenizer's fingerprint, and what builders keep there."""
        return {} if self._store is None else self._store.settings

    def require(self, tokenizer: Any) -> None:
        """Check that the pool is of `tokenizer`; a pool that does not know its tokenizer yet takes this one.

        Raises:
            PoolMismatch: it is of another one.
        """
        if tokenizer is None:
            return
        mark = fingerprint(tokenizer)
        if self._tokenizer is not None and mark != self._tokenizer:
            raise PoolMismatch(
                f"{self.path or 'the pool in memory'} is of another tokenizer (fingerprint {self._tokenizer}, this one "
                f"has {mark}); build one for this tokenizer in a directory of its own"
            )
        self._tokenizer = mark
        self._set("tokenizer", mark)

    def __contains__(self, digest: int) -> bool:
        """Return whether a document with this digest is in the pool."""
        with self._lock:
            return digest in self._digests()

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return f"<Pool {where}: {self.tokens:,} tokens in {len(self._segments)} segments>"

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
        with self._lock:
            self._require_writer()
            known = self._digests()
            if len(document) == 0 or digest in known:
                return False
            known.add(digest)
            self._pending.append((document, digest))
            self._waiting += len(document)
            full = self._waiting + sum(run.tokens for run in self._live) >= self.live_tokens
        if full:
            self.settle()
            self._start_work(flush=True)
        return True

    def flush(self) -> None:
        """Write what was added; when this returns, it is on the disk. Merging may still go on."""
        self._require_writer()
        self.settle()
        self._work(flush=True, merging=False)
        self._start_work(flush=False)

    def settle(self) -> None:
        """Wait until the thread that writes and merges has nothing left to do.

        Raises:
            PoolError: it failed; nothing that was committed is lost.
        """
        if self._worker.is_alive():
            self._worker.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise PoolError(f"writing the pool {self.path or 'in memory'} failed: {failure}") from failure

    def compact(self) -> None:
        """Flush, and merge all segments into one: the quickest to ask."""
        self._require_writer()
        self.settle()
        with self._working:
            self._work(flush=True, merging=False)
            if len(self._segments) > 1:
                self._merge(slice(0, len(self._segments)))

    def prune(self, max_tokens: int) -> int:
        """Give up the oldest documents until at most `max_tokens` are left; return how many tokens went."""
        _require_whole("max_tokens", max_tokens, 0)
        self._require_writer()
        self.settle()
        with self._working:
            self._work(flush=True, merging=False)
            return self._give_up(sum(segment.run.tokens for segment in self._segments) - max_tokens)

    def close(self) -> None:
        """Flush, and let another writer in. What was handed out stays usable."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            if not self.read_only:
                try:
                    self.settle()
                finally:  # what failed before may succeed now
                    self._work(flush=True, merging=False)
        finally:
            if self._store is not None:
                self._store.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Asking.

    def snapshot(self) -> Snapshot:
        """Return all that can be drafted from now, newly added documents included."""
        with self._lock:
            if self._pending:
                self._index_pending()
            if self._snapshot is None:
                runs = self._runs()
                self._snapshot = Snapshot(runs, views(runs))
            return self._snapshot

    def longest_match(self, context: ArrayLike) -> int:
        """Return how many of the last tokens of `context` (at most 32) stand together somewhere in the pool."""
        snapshot, suffix = self.snapshot(), _checked(context)
        return max((interval(view, suffix, 1)[2] for view in snapshot.views), default=0)

    def successors(self, context: ArrayLike, length: int | None = None) -> Counter[int]:
        """Return how often each token followed the last `length` (at most 32) tokens of `context`.

        None: the longest suffix that occurs. Ends of documents are left out.
        """
        if length is not None:
            _require_whole("length", length, 0)
        snapshot, suffix = self.snapshot(), _checked(context)
        if length is None:
            length = max((interval(view, suffix, 1)[2] for view in snapshot.views), default=0)
        counts: Counter[int] = Counter()
        for run, view in zip(*snapshot, strict=True):
            begin, end, _ = interval(view, suffix, length)
            symbols = run.low[begin:end].astype(np.int64)
            if len(run.high):
                symbols |= run.high[begin:end].astype(np.int64) << 16
            for symbol, count in zip(*np.unique(symbols[symbols > 0], return_counts=True), strict=True):
                counts[int(symbol) - 1] += int(count)
        return counts

    def refresh(self) -> bool:
        """Take over what the writer of a read-only pool committed since; return whether there was anything."""
        with self._lock:
            if self._store is None or not self.read_only or not self._store.refresh():
                return False
            self._load_segments()
            self._known = None
            return True

    def verify(self) -> None:
        """Read every byte from the disk and compare checksums.

        Raises:
            PoolDamaged: a file differs. A pool opened with `damaged="skip"` goes on without it.
        """
        if self._store is None:
            return
        with self._working:
            self._store.verify()
            with self._lock:
                self._load_segments()
                self._known = None

    # Calibration: what the grower learnt about this pool, kept beside it.

    @property
    def calibration(self) -> bytes | None:
        """What a grower learnt with this pool: as it was last written; of a pool in memory, as it is now."""
        if self._store is not None:
            return self._store.state()
        return None if self._keep is None else self._keep()

    def keep_calibration(self, current: Callable[[], bytes]) -> None:
        """Write what `current()` returns with every commit."""
        self._keep = current

    # Inside.

    def _load(self, max_tokens: int | None) -> None:
        if self._store is None:
            return
        self.max_tokens = max_tokens or self._store.settings.get("max_tokens", LIMIT)
        self._tokenizer = self._store.settings.get("tokenizer")
        if max_tokens is not None:
            self._set("max_tokens", max_tokens)
        self._load_segments()

    def _set(self, name: str, value: Any) -> None:
        """Keep a setting with the pool, where it is on a disk and open for writing."""
        if self._store is None or self.read_only:
            return
        with self._working:
            if self._store.settings.get(name) != value:
                self._store.commit(self._store.entries, settings={**self._store.settings, name: value})

    def _load_segments(self) -> None:
        assert self._store is not None
        held = {segment.entry.name: segment for segment in self._segments if segment.entry is not None}
        self._segments = tuple(
            held.get(entry.name) or Segment(as_run(self._store.load(entry), self._store.path / entry.name), entry)
            for entry in self._store.entries
        )
        self._snapshot = None

    def _runs(self) -> tuple[Run, ...]:
        return (*(segment.run for segment in self._segments), *self._live)

    def _digests(self) -> set[int]:
        if self._known is None:
            self._known = {int(name) for run in self._runs() for name in run.digests}
            self._known |= {digest for _, digest in self._pending}
        return self._known

    def _require_writer(self) -> None:
        if self._closed:
            raise PoolError(f"the pool {self.path or 'in memory'} is closed")
        if self.read_only:
            raise PoolError(f"{self.path} is open for reading only; open it without read_only=True to add to it")

    def _index_pending(self) -> None:
        """Index the documents that wait; small runs are merged here, so that there are never many."""
        run = build([document for document, _ in self._pending], [digest for _, digest in self._pending])
        self._pending, self._waiting = [], 0
        taken, live = self._live[: self._writing], [*self._live[self._writing :], run]
        if some := to_merge([len(run.back) for run in live]):
            live[some] = [merge(live[some])]
        self._live = (*taken, *live)
        self._snapshot = None

    def _start_work(self, *, flush: bool) -> None:
        with self._lock:
            if not self._worker.is_alive():
                self._worker = threading.Thread(
                    target=self._try_work, args=(flush,), name="lookahead-pool", daemon=True
                )
                self._worker.start()

    def _try_work(self, flush: bool) -> None:
        try:
            self._work(flush=flush, merging=True)
        except Exception as failure:
            self._failure = failure

    def _work(self, *, flush: bool, merging: bool) -> None:
        """Write the live index, keep to the limits, merge segments."""
        with self._working:
            if flush:
                self._write_live()
                self._keep_to_limits()
            while merging and (some := to_merge([len(segment.run.back) for segment in self._segments])):
                self._merge(some)

    def _write_live(self) -> None:
        with self._lock:
            if self._pending:
                self._index_pending()
            runs = self._live
            self._writing = len(runs)
        try:
            if runs:
                run = runs[0] if len(runs) == 1 else merge(runs)
                self._replace(slice(len(self._segments), None), run, written=len(runs))
        finally:
            self._writing = 0

    def _keep_to_limits(self) -> None:
        self._give_up(to_give_up(sum(segment.run.tokens for segment in self._segments), self.max_tokens))
        while self.max_bytes is not None:
            tokens, nbytes = (sum(getattr(s.run, name) for s in self._segments) for name in ("tokens", "nbytes"))
            if not (gone := to_give_up(nbytes, self.max_bytes)) or not self._segments:
                break
            # At least one: what is not of tokens may be all that is too large.
            self._give_up(max(1, -(-gone * tokens // nbytes)))

    def _merge(self, some: slice, skip: int = 0) -> None:
        """Merge some segments into one, the `skip` oldest documents left out."""
        segments = self._segments[some]
        try:
            run = merge([segment.run for segment in segments], skip)
        except ValueError as error:
            names = ", ".join(segment.entry.name for segment in segments if segment.entry is not None)
            raise PoolDamaged(
                f'{names} of {self.path}: {error}; Pool.open("{self.path}", damaged="skip").verify() finds which, and '
                "goes on without it"
            ) from error
        self._replace(some, run)

    def _give_up(self, tokens: int) -> int:
        """Drop the oldest documents with at least `tokens` tokens together; return how many went."""
        gone = 0
        while gone < tokens and self._segments:
            oldest = self._segments[0].run
            skip = documents_within(oldest, tokens - gone)
            gone += int(oldest.lengths[:skip].sum(dtype=np.int64)) - skip
            if skip == len(oldest.ends):
                self._replace(slice(0, 1), None)
            else:
                self._merge(slice(0, 1), skip)
            with self._lock:
                self._known = None
        return gone

    def _replace(self, some: slice, run: Run | None, *, written: int = 0) -> None:
        """Put `run` in the place of some segments, on the disk first; `written` runs of the live index are in it."""
        segments = list(self._segments)
        segments[some] = [] if run is None else [Segment(run, None)]
        if self._store is None:
            self._publish(segments, written)
            return
        state, generation = None if self._keep is None else self._keep(), self._store.generation
        try:
            self._store.commit([segment.entry or _as_segment(segment.run) for segment in segments], state=state)
        finally:
            # Also where it failed, or was interrupted, when all was committed already.
            if self._store.generation > generation:
                self._publish(None, written)

    def _publish(self, segments: list[Segment] | None, written: int) -> None:
        """Let others see `segments` (None: what the store holds) and the live index without what is in them."""
        with self._lock:
            if segments is None:
                self._load_segments()
            else:
                self._segments = tuple(segments)
                self._snapshot = None
            self._live, self._writing = self._live[written:], 0

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


def _as_segment(run: Run) -> NewSegment:
    return NewSegment(run._asdict(), tokens=run.tokens, documents=len(run.ends))


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
    """Return what several pools hold together, as one."""
    snapshots = [pool.snapshot() for pool in dict.fromkeys(pools)]
    if len(snapshots) == 1:
        return snapshots[0]
    runs = tuple(run for snapshot in snapshots for run in snapshot.runs)
    return Snapshot(runs, views(runs))
