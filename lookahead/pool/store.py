"""A directory of immutable segments of numpy arrays, of which a manifest says which ones count.

A commit writes new files under names that nobody used before, syncs them, and then puts a new manifest in the place of
the old one: whoever opens the directory sees all of a commit or nothing of it, whenever the writer was killed. Files
that are no longer named go last. Readers need no lock and write nothing; what they have mapped stays valid when a
writer removes it.

**What opening checks.** The manifest, the size and header of every file, and checksums of the data: of all of it up to
8 MiB, of blocks drawn at random in a larger pool, because opening must not read a gigabyte. So damage deep
in a large segment can go unseen until `verify`. It can make drafts worse, never an output wrong: a draft is only ever
compared with what the model picks, and whoever reads the arrays checks what it uses as an index.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from numpy.typing import NDArray

from lookahead.errors import InvalidArgument, PoolDamaged, PoolError
from lookahead.pool import files, manifest, recovery, snapshot
from lookahead.pool.arrayfile import ArrayFile, Arrays, write_arrays
from lookahead.pool.lock import WriterLock
from lookahead.pool.manifest import Entry, Manifest
from lookahead.pool.snapshot import Snapshot

__all__ = ["Entry", "NewSegment", "Store"]

Damaged = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True, eq=False)
class NewSegment:
    """A segment to be written.

    Attributes:
        arrays: by name; of numbers, of any shape.
        tokens: how many tokens they hold; the store only keeps the figure.
        documents: likewise.
        created: in seconds since 1970; None: now.
    """

    arrays: Arrays
    tokens: int
    documents: int
    created: int | None = None


class Store:
    """An open store; made by `create` or `open`. One thread at a time.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path, view: Snapshot, lock: WriterLock | None, skip: bool) -> None:
        self.path = path
        self._view = view
        self._lock = lock
        self._skip = skip
        self._mark: tuple[int, ...] | None = None  # of the manifest that was last read, None: not known
        self._closed = False

    @classmethod
    def create(cls, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Store:
        """Make an empty store, and the directory if need be; return it open for writing.

        Raises:
            PoolError: the directory holds a pool already, or cannot be written.
            PoolBusy: another writer is making one there.
            InvalidArgument: the settings are not JSON.
        """
        directory, settings = Path(path), manifest.plain(settings)
        with files.explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(directory)
        try:
            if snapshot.manifest_bytes(directory) is not None or recovery.segment_names(directory):
                raise PoolError(f'{directory} holds a pool already; Pool.open("{directory}") opens it')
            with files.explained(directory):
                manifest.publish(directory, Manifest(0, settings))
                files.sync_directory(directory.absolute().parent)
            return cls(directory, snapshot.take(directory, skip=False, known={}), lock, False)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool, damaged: Damaged = "raise") -> Store:
        """Open the store at `path`.

        Args:
            path: the directory.
            writable: take the lock and clear away what a killed writer left. Without it nothing is written.
            damaged: "raise", or "skip" to open the rest; `problems` then says what was left out, and the next commit
                renames those files to `NAME.damaged`. A lost manifest is put together from the segments: what was
                removed since the last commit may come back.

        Raises:
            PoolNotFound: no pool is there.
            PoolBusy: another writer holds it.
            PoolDamaged: a file is missing, truncated or corrupted; with "skip": and nothing else is left.
            PoolTooNew: a newer version of this library wrote it.
        """
        directory = Path(path)
        if damaged not in ("raise", "skip"):
            raise InvalidArgument(f'damaged={damaged!r}; give "raise" or "skip"')
        if snapshot.manifest_bytes(directory) is None:
            recovery.missing(directory)  # before the lock makes a file in a directory that is not ours
        lock = WriterLock(directory) if writable else None
        try:
            store = cls(directory, snapshot.take(directory, skip=damaged == "skip", known={}), lock, damaged == "skip")
            if writable:
                store._sweep()
            return store
        except BaseException:
            if lock:
                lock.release()
            raise

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The committed segments, oldest first."""
        return self._view.manifest.entries

    @property
    def settings(self) -> dict[str, Any]:
        """What the caller keeps with the store: a copy."""
        return dict(self._view.manifest.settings)

    @property
    def generation(self) -> int:
        """How many commits led to what is open."""
        return self._view.manifest.generation

    @property
    def problems(self) -> tuple[PoolDamaged, ...]:
        """What was left out because it is damaged, a lost state included."""
        return tuple(self._view.problems.values())

    @property
    def writable(self) -> bool:
        """Whether `commit` is served."""
        return self._lock is not None and self._lock.held

    def state(self) -> bytes | None:
        """Return what was last committed as state; None if nothing was, or if it is damaged (see `problems`)."""
        return self._view.state

    def load(self, entry: Entry) -> dict[str, NDArray[Any]]:
        """Return the arrays of a segment: mapped, read-only, aligned to 64 bytes; they outlive the store.

        Raises:
            InvalidArgument: the store has no such segment, or has it no longer.
        """
        return self._segment(entry).arrays()

    def refresh(self) -> bool:
        """Take over what a writer committed since; return whether there was anything.

        Raises:
            PoolDamaged: what is new is damaged; what was open stays open.
        """
        self._require_open()
        mark = snapshot.manifest_mark(self.path)
        if mark is not None and mark == self._mark:
            return False
        raw = snapshot.manifest_bytes(self.path)
        if raw == self._view.raw:
            self._mark = mark
            return False
        view = snapshot.take(self.path, skip=self._skip, known=self._view.segments)
        changed = view.raw != self._view.raw
        self._view, self._mark = view, mark if view.raw == raw else None
        return changed

    def verify(self, entry: Entry | None = None) -> None:
        """Read a segment (None: all) from the disk and compare every byte with the checksums.

        Raises:
            PoolDamaged: something differs. In a store opened with "skip" the segment is left out instead.
        """
        segments = [self._segment(entry)] if entry else list(self._view.segments.values())
        problems = snapshot.check((segment, None) for segment in segments)
        if problems and self.refresh():
            self.verify()  # a writer removed files meanwhile: what is missing may just be replaced
        elif problems and not self._skip:
            raise next(iter(problems.values()))
        else:
            self._view = self._view.without(problems)

    def commit(
        self,
        segments: Sequence[Entry | NewSegment],
        *,
        settings: Mapping[str, Any] | None = None,
        state: bytes | None = None,
    ) -> None:
        """Publish, all at once, what the store holds from now on.

        When this returns, the commit is on the disk. When it raises, nothing of what was committed before is lost.

        Args:
            segments: all of it in order, oldest first: entries that stay, and new segments. Other entries are removed.
            settings: None keeps them.
            state: a small blob that may be lost without harm; None keeps it.

        Raises:
            PoolError: the store is open for reading, or the disk refuses.
            InvalidArgument: an entry that the store does not have, or twice; arrays of something other than numbers;
                settings that are not JSON.
        """
        if not self.writable:
            raise PoolError(f"{self.path} is open for reading, or closed; open it for writing to commit")
        kept = [segment for segment in segments if isinstance(segment, Entry)]
        for entry in kept:
            self._segment(entry)
        if len(set(kept)) < len(kept):
            raise InvalidArgument(f"a segment is named twice in a commit to {self.path}")
        try:
            with files.explained(self.path):
                self._publish(segments, self.settings if settings is None else manifest.plain(settings), state)
        except BaseException:
            # Wherever it stopped, the manifest on the disk says what was committed.
            with contextlib.suppress(PoolError, OSError):
                self._look()
                self._sweep()
            raise
        self._sweep()

    def _publish(self, segments: Sequence[Entry | NewSegment], settings: dict[str, Any], state: bytes | None) -> None:
        old = self._view.manifest
        generation = old.generation + 1
        entries = tuple(
            segment if isinstance(segment, Entry) else self._write(segment, generation, number, settings)
            for number, segment in enumerate(segments)
        )
        name = old.state
        if state is not None:
            name = manifest.new_name(generation, 0, "state")
            snapshot.write_state(self.path / name, state)
        self._move_damaged_aside()
        manifest.publish(self.path, Manifest(generation, settings, entries, name))
        self._look()

    def _write(self, new: NewSegment, generation: int, number: int, settings: dict[str, Any]) -> Entry:
        name = manifest.new_name(generation, number, "segment")
        created = time.time() if new.created is None else new.created
        counts = {"tokens": int(new.tokens), "documents": int(new.documents), "created": int(created)}
        nbytes, checksum = write_arrays(self.path / name, new.arrays, {**counts, "settings": settings})
        return Entry(name, nbytes=nbytes, checksum=checksum, **counts)

    def _move_damaged_aside(self) -> None:
        for name in self._view.problems:
            with contextlib.suppress(FileNotFoundError):
                files.replace(self.path / name, self.path / f"{name}.damaged")

    def _look(self) -> None:
        self._view = snapshot.take(self.path, skip=self._skip, known=self._view.segments)

    def _sweep(self) -> None:
        """Remove the files that no manifest names: replaced ones, and what a killed writer left."""
        says = self._view.manifest
        named = {entry.name for entry in says.entries} | {says.state} | set(self._view.problems)
        for path in self.path.iterdir():
            ours = manifest.is_name(path.name.removesuffix(files.TEMPORARY))
            if (ours and path.name not in named) or path.name == manifest.FILE + files.TEMPORARY:
                # What is committed is committed: a file that cannot be removed now is swept another time.
                with contextlib.suppress(OSError):
                    files.remove(path)

    def _segment(self, entry: Entry) -> ArrayFile:
        self._require_open()
        if entry not in self.entries:
            raise InvalidArgument(f"{self.path} has no segment {entry.name}, or has it no longer; see its entries")
        return self._view.segments[entry.name]

    def _require_open(self) -> None:
        if self._closed:
            raise PoolError(f"{self.path} was closed; open it again")

    def close(self) -> None:
        """Let another writer in. Arrays that were loaded stay valid."""
        self._closed = True
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
