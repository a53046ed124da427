"""A store without a readable manifest: each segment's header keeps enough to write it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lookahead.errors import PoolDamaged, PoolNotFound
from lookahead.pool import files, manifest
from lookahead.pool.arrayfile import ArrayFile
from lookahead.pool.manifest import Entry, Manifest


def read_manifest(directory: Path, raw: bytes | None, *, skip: bool) -> tuple[Manifest, dict[str, PoolDamaged]]:
    """Return what the manifest says; if it is damaged and to be skipped, what the segments say."""
    path = directory / manifest.FILE
    try:
        if raw is None:
            raise missing(directory)
        return manifest.decode(raw, path), {}
    except PoolDamaged as problem:
        if not skip:
            raise
        return _recover(directory, problem)


def missing(directory: Path) -> PoolDamaged:
    """Return the problem of a directory that holds segments and no manifest.

    Raises:
        PoolNotFound: it holds no segments either.
    """
    if any(segment_names(directory)):
        return files.damaged(directory / manifest.FILE, "is missing")
    what = "is no pool" if directory.exists() else "does not exist"
    raise PoolNotFound(f'{directory} {what}; Pool("{directory}") makes one, and so does `lookahead pool build`')


def segment_names(directory: Path) -> list[str]:
    """Return the names of all segments in the directory, named by a manifest or not, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if manifest.is_name(path.name, "segment"))


def _recover(directory: Path, problem: PoolDamaged) -> tuple[Manifest, dict[str, PoolDamaged]]:
    """Return a manifest of all segments that are whole; what each one's header keeps is enough to write it."""
    problems = {manifest.FILE: problem}
    entries, settings, generation = [], None, 0
    for name in segment_names(directory):
        generation = max(generation, manifest.generation_of(name))
        try:
            segment = ArrayFile.open(directory / name)
        except PoolDamaged as other:
            problems[name] = other
        else:
            entry, settings = _entry_of(segment)
            entries.append(entry)
    if settings is None:
        raise PoolDamaged(f"{directory / manifest.FILE} is lost, and with it the pool: delete {directory}")
    states = sorted(path.name for path in directory.iterdir() if manifest.is_name(path.name, "state"))
    return Manifest(generation, settings, tuple(entries), states[-1] if states else None), problems


def _entry_of(segment: ArrayFile) -> tuple[Entry, dict[str, Any]]:
    """Return the entry of a segment, and the settings of the store when it was written."""
    counts = dict(segment.meta)
    settings = counts.pop("settings")
    return Entry(segment.path.name, nbytes=segment.nbytes, checksum=segment.checksum, **counts), settings
