"""The file operations that a commit consists of: a crash between any two of them must lose nothing.

Whatever changes a directory of the store goes through a function of this module, so that tests can stop the process at
each of them in turn. POSIX: a file that is mapped stays readable after it was removed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lookahead.errors import PoolDamaged, PoolError

TEMPORARY = ".tmp"

Bytes = bytes | bytearray | memoryview


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Yield the descriptor of a temporary file that becomes `path`, whole and synced, when the block ends.

    When the block raises, `path` stays as it was; the temporary file is left for the next sweep.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    descriptor = create(temporary)
    try:
        yield descriptor
        sync(descriptor)
    finally:
        os.close(descriptor)
    replace(temporary, path)


def create(path: Path) -> int:
    """Return the descriptor of a new, empty file."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def write(descriptor: int, data: Bytes) -> None:
    """Append all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def overwrite(descriptor: int, data: Bytes) -> None:
    """Write `data` over the beginning of the file."""
    if os.pwrite(descriptor, data, 0) != len(data):
        raise OSError("a header was written in part")


def sync(descriptor: int) -> None:
    """Return when the contents of the file are on the disk."""
    os.fsync(descriptor)


def replace(source: Path, target: Path) -> None:
    """Give `source` the name `target`, at once."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file."""
    os.unlink(path)


def sync_directory(path: Path) -> None:
    """Return when the names in the directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turn what the operating system says about a write into an error of ours."""
    try:
        yield
    except OSError as error:
        raise PoolError(
            f"{directory} cannot be written ({error}); what was committed before is intact: make room, or check the "
            "permissions, and try again"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a file that is lost or on a bad disk into an error of ours."""
    try:
        yield
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        if error.errno != errno.EIO:  # of the rest, such as too many open files, the file is innocent
            raise
        raise damaged(path, f"cannot be read ({error})") from error


def damaged(file: Path, what: str) -> PoolDamaged:
    """Return the error that says what is wrong with `file`, and how to open the pool without it."""
    return PoolDamaged(f'{file} {what}; Pool.open("{file.parent}", damaged="skip") opens the rest of the pool')
