"""What one manifest names, opened and checked: the view of a store at one moment."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lookahead.errors import PoolDamaged
from lookahead.pool import files, manifest, recovery
from lookahead.pool.arrayfile import BLOCK, ArrayFile
from lookahead.pool.manifest import Entry, Manifest

CHECKED = 8 * BLOCK  # bytes of data: a store of no more is compared with its checksums at opening
SAMPLED = 2  # blocks that are drawn of a larger one: they may have to come from a slow disk

_STATE_MAGIC = b"LKHSTATE"

Segments = dict[str, ArrayFile]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """An open view of a store.

    Attributes:
        raw: the bytes of the manifest, None where it was missing.
        manifest: what it says, less what was left out.
        segments: the open file of each entry.
        state: the caller's state, or None.
        problems: what was left out, by file name.
    """

    raw: bytes | None
    manifest: Manifest
    segments: Segments
    state: bytes | None
    problems: dict[str, PoolDamaged]

    def without(self, problems: dict[str, PoolDamaged]) -> Snapshot:
        """Return the same view with the segments left out that have problems."""
        segments = {name: segment for name, segment in self.segments.items() if name not in problems}
        entries = tuple(entry for entry in self.manifest.entries if entry.name in segments)
        says = replace(self.manifest, entries=entries)
        return Snapshot(self.raw, says, segments, self.state, self.problems | problems)


def take(directory: Path, *, skip: bool, known: Mapping[str, ArrayFile]) -> Snapshot:
    """Return the present view; files in `known` are neither opened nor checked again.

    Raises:
        PoolNotFound: nothing of a pool is there.
        PoolTooNew: the manifest has a newer format.
        PoolDamaged: something is damaged and not to be skipped, or nothing is left.
    """
    raw = manifest_bytes(directory)
    while True:
        snapshot = _open(directory, raw, skip, known)
        # What a writer replaced while we looked is not damaged: each turn means that one more commit was made.
        if not snapshot.problems or (now := manifest_bytes(directory)) == raw:
            break
        raw = now
    fatal = [problem for name, problem in snapshot.problems.items() if not manifest.is_name(name, "state")]
    if fatal and not skip:
        raise fatal[0]
    return snapshot


def manifest_bytes(directory: Path) -> bytes | None:
    """Return what is in the manifest, None when there is none."""
    try:
        return (directory / manifest.FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def manifest_mark(directory: Path) -> tuple[int, ...] | None:
    """Return what tells one manifest from the next without reading it: each is a new file. None when there is none."""
    try:
        found = os.stat(directory / manifest.FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def check(segments: Iterable[tuple[ArrayFile, Sequence[int] | None]]) -> dict[str, PoolDamaged]:
    """Check the given blocks (None: all) of each segment; return the damaged ones by name."""
    problems = {}
    for segment, numbers in segments:
        try:
            segment.check(numbers)
        except PoolDamaged as problem:
            problems[segment.path.name] = problem
    return problems


def write_state(path: Path, state: bytes) -> None:
    """Write the caller's state with its checksum."""
    with files.replacing(path) as descriptor:
        files.write(descriptor, _STATE_MAGIC + zlib.crc32(state).to_bytes(4, "little") + state)


def _read_state(path: Path) -> bytes:
    with files.reading(path):
        raw = path.read_bytes()
    magic, checksum, state = raw[:8], raw[8:12], raw[12:]
    if magic != _STATE_MAGIC or checksum != zlib.crc32(state).to_bytes(4, "little"):
        raise files.damaged(path, "is corrupted")
    return state


def _open(directory: Path, raw: bytes | None, skip: bool, known: Mapping[str, ArrayFile]) -> Snapshot:
    says, problems = recovery.read_manifest(directory, raw, skip=skip)
    segments, damaged = _open_segments(directory, says.entries, known)
    damaged |= check(_sample([segment for name, segment in segments.items() if name not in known]))
    state = None
    if says.state is not None:
        try:
            state = _read_state(directory / says.state)
        except PoolDamaged:
            what = f"{directory / says.state} is missing or corrupted: what was learnt is lost, and is learnt anew"
            problems[says.state] = PoolDamaged(what)
            says = replace(says, state=None)
    return Snapshot(raw, says, segments, state, problems).without(damaged)


def _open_segments(
    directory: Path, entries: Iterable[Entry], known: Mapping[str, ArrayFile]
) -> tuple[Segments, dict[str, PoolDamaged]]:
    segments, problems = {}, {}
    for entry in entries:
        try:
            segment = known.get(entry.name) or ArrayFile.open(directory / entry.name)
            if (segment.nbytes, segment.checksum) != (entry.nbytes, entry.checksum):
                raise files.damaged(segment.path, "is not the file that the manifest names")
            segments[entry.name] = segment
        except PoolDamaged as problem:
            problems[entry.name] = problem
    return segments, problems


def _sample(segments: Sequence[ArrayFile]) -> list[tuple[ArrayFile, list[int]]]:
    """Return the blocks to check: all of them, or where that is above `CHECKED`, some drawn at random."""
    blocks = [(segment, number) for segment in segments for number in range(segment.blocks)]
    if sum(segment.block_bytes(number) for segment, number in blocks) > CHECKED:
        # A generator of our own: opening a pool must not disturb the caller's draws.
        blocks = random.Random().sample(blocks, SAMPLED)
    drawn: dict[ArrayFile, list[int]] = {}
    for segment, number in blocks:
        drawn.setdefault(segment, []).append(number)
    return list(drawn.items())
