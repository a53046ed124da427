"""What a pool holds: segments that are written, and a live index that is not yet; when each becomes the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lookahead.draft import IntArray
from lookahead.errors import PoolDamaged, PoolError
from lookahead.pool.index import Run, as_run, build, documents_within, merge
from lookahead.pool.levels import to_give_up, to_merge
from lookahead.pool.search import views
from lookahead.pool.store import Entry, NewSegment, Store
from lookahead.sources.kernels import Records

PATIENCE = 60.0
"""Seconds after which what is added is written although there is little of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run that is written (in a pool in memory: that would be), and its file."""

    run: Run
    entry: Entry | None


class Snapshot(NamedTuple):
    """What a pool holds at one moment; unchanged by what is added later."""

    runs: tuple[Run, ...]
    views: Records


class Shelf:
    """The documents of a pool. Any thread may add or look; one at a time writes.

    Args:
        store: where segments are written; None: they stay in memory.
        name: of the pool, for messages.
        writable: whether anything may be added.
        max_tokens, max_bytes, live_tokens: see `Pool`.

    Attributes:
        segments: oldest first, without the live index.
        state: gives what is written beside the segments with every commit; None: nothing.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        name: str,
        writable: bool,
        max_tokens: int,
        max_bytes: int | None,
        live_tokens: int,
    ) -> None:
        self._store, self._name, self._writable = store, name, writable
        self.max_tokens, self.max_bytes, self.live_tokens = max_tokens, max_bytes, live_tokens
        self.segments: tuple[Segment, ...] = ()
        self.state: Callable[[], bytes] | None = None
        self._pending: list[tuple[IntArray, int]] = []  # documents that are not indexed yet, with their digests
        self._waiting = 0  # tokens in _pending
        self._live: tuple[Run, ...] = ()
        self._writing = 0  # runs of the live index that are being written
        self._snapshot: Snapshot | None = None
        self._known: set[int] | None = None
        self._lock = threading.RLock()  # held for moments
        self._working = threading.RLock()  # held by the thread that writes and merges; taken before the other
        self._worker = threading.Thread()
        self._failure: Exception | None = None
        self._written = time.monotonic()
        self._closed = False
        if store is not None:
            self._load()

    # Looking.

    @property
    def tokens(self) -> int:
        with self._lock:
            return sum(run.tokens for run in self._runs()) + self._waiting

    @property
    def documents(self) -> int:
        with self._lock:
            return sum(len(run.ends) for run in self._runs()) + len(self._pending)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(run.nbytes for run in self._runs()) + 4 * self._waiting

    def __contains__(self, digest: int) -> bool:
        with self._lock:
            return digest in self._digests()

    def snapshot(self) -> Snapshot:
        """Return all that is held, what waits to be indexed included."""
        with self._lock:
            if self._pending:
                self._index_pending()
            if self._snapshot is None:
                runs = self._runs()
                self._snapshot = Snapshot(runs, views(runs))
            return self._snapshot

    # Changing.

    def add(self, document: IntArray, digest: int) -> bool:
        """Add a document; return False if it is empty, or there already."""
        with self._lock:
            self._require_writer()
            known = self._digests()
            if len(document) == 0 or digest in known:
                return False
            known.add(digest)
            self._pending.append((document, digest))
            self._waiting += len(document)
            full = self._waiting + sum(run.tokens for run in self._live) >= self.live_tokens
            late = self._store is not None and time.monotonic() - self._written > PATIENCE
        if full:
            self.settle()
        if full or late:
            self._start_work(flush=True)
        return True

    def flush(self) -> None:
        """Write what was added."""
        self._require_writer()
        self.settle()
        self._work(flush=True, merging=False)
        self._start_work(flush=False)

    def settle(self) -> None:
        """Wait until the thread that writes and merges has nothing left to do, and raise what stopped it."""
        if self._worker.is_alive():
            self._worker.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise PoolError(f"writing the pool {self._name} failed: {failure}") from failure

    def compact(self) -> None:
        """Write what was added, and merge all segments into one."""
        self._require_writer()
        self.settle()
        with self._working:
            self._work(flush=True, merging=False)
            if len(self.segments) > 1:
                self._merge(slice(0, len(self.segments)))

    def prune(self, max_tokens: int) -> int:
        """Give up the oldest documents until at most `max_tokens` are left; return how many tokens went."""
        self._require_writer()
        self.settle()
        with self._working:
            self._work(flush=True, merging=False)
            return self._give_up(sum(segment.run.tokens for segment in self.segments) - max_tokens)

    def keep_setting(self, name: str, value: Any) -> None:
        """Keep a setting with the pool, where it is on a disk and open for writing."""
        if self._store is None or not self._writable:
            return
        with self._working:
            if self._store.settings.get(name) != value:
                self._store.commit(self._store.entries, settings={**self._store.settings, name: value})

    def refresh(self) -> bool:
        """Take over what another process committed; return whether there was anything."""
        with self._lock:
            if self._store is None or self._writable or not self._store.refresh():
                return False
            self._load()
            self._known = None
            return True

    def verify(self) -> None:
        """Compare every byte on the disk with its checksum."""
        if self._store is not None:
            with self._working:
                self._store.verify()
                with self._lock:
                    self._load()
                    self._known = None

    def close(self) -> None:
        """Write what was added, and let another writer in."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            if self._writable:
                try:
                    self.settle()
                finally:  # what failed before may succeed now
                    self._work(flush=True, merging=False)
        finally:
            if self._store is not None:
                self._store.close()

    # Inside.

    def _load(self) -> None:
        """Let others see what the store holds."""
        assert self._store is not None
        held = {segment.entry.name: segment for segment in self.segments if segment.entry is not None}
        self.segments = tuple(
            held.get(entry.name) or Segment(as_run(self._store.load(entry), self._store.path / entry.name), entry)
            for entry in self._store.entries
        )
        self._snapshot = None

    def _runs(self) -> tuple[Run, ...]:
        return (*(segment.run for segment in self.segments), *self._live)

    def _digests(self) -> set[int]:
        if self._known is None:
            self._known = {int(name) for run in self._runs() for name in run.digests}
            self._known |= {digest for _, digest in self._pending}
        return self._known

    def _require_writer(self) -> None:
        if self._closed:
            raise PoolError(f"the pool {self._name} is closed")
        if not self._writable:
            raise PoolError(f"{self._name} is open for reading only; open it without read_only=True to add to it")

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
                self._written = time.monotonic()
                self._write_live()
                self._keep_to_limits()
            while merging and (some := to_merge([len(segment.run.back) for segment in self.segments])):
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
                self._replace(slice(len(self.segments), None), run, written=len(runs))
        finally:
            self._writing = 0

    def _keep_to_limits(self) -> None:
        self._give_up(to_give_up(sum(segment.run.tokens for segment in self.segments), self.max_tokens))
        while self.max_bytes is not None:
            tokens, nbytes = (sum(getattr(s.run, name) for s in self.segments) for name in ("tokens", "nbytes"))
            if not (gone := to_give_up(nbytes, self.max_bytes)) or not self.segments:
                break
            # At least one: what is not of tokens may be all that is too large.
            self._give_up(max(1, -(-gone * tokens // nbytes)))

    def _merge(self, some: slice, skip: int = 0) -> None:
        """Merge some segments into one, the `skip` oldest documents left out."""
        segments = self.segments[some]
        try:
            run = merge([segment.run for segment in segments], skip)
        except ValueError as error:
            names = ", ".join(segment.entry.name for segment in segments if segment.entry is not None)
            raise PoolDamaged(
                f"{names} of {self._name}: {error}; "
                f'Pool.open("{self._name}", damaged="skip").verify() finds which, and goes on without it'
            ) from error
        self._replace(some, run)

    def _give_up(self, tokens: int) -> int:
        """Drop the oldest documents with at least `tokens` tokens together; return how many went."""
        gone = 0
        while gone < tokens and self.segments:
            oldest = self.segments[0].run
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
        segments = list(self.segments)
        segments[some] = [] if run is None else [Segment(run, None)]
        if self._store is None:
            self._publish(segments, written)
            return
        state, generation = None if self.state is None else self.state(), self._store.generation
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
                self._load()
            else:
                self.segments = tuple(segments)
                self._snapshot = None
            self._live, self._writing = self._live[written:], 0


def _as_segment(run: Run) -> NewSegment:
    return NewSegment(run._asdict(), tokens=run.tokens, documents=len(run.ends))
