"""A pool that many processes fill: each writes a part of its own beside it, which is brought in later."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lookahead.errors import PoolBusy, PoolError, PoolNotFound
from lookahead.pool.manifest import FILE
from lookahead.pool.pool import Pool

PATIENCE = 30.0
"""Seconds to wait for processes that are making a pool, or still ending."""

_LIVE = ".live"
_PAUSE = 0.1


def live_parts(pool: str | os.PathLike[str]) -> Path:
    """Return the directory of the live parts of a pool."""
    path = Path(pool)
    return path.with_name(path.name + _LIVE)


def open_shared(pool: str | os.PathLike[str], tokenizer: Any) -> Pool:
    """Return the pool open for reading, made if it is not there, whoever else makes it now.

    Raises:
        PoolError: it cannot be used; see `Pool`.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(PoolNotFound):
            return Pool.open(pool, tokenizer=tokenizer, read_only=True)
        try:
            Pool(pool, tokenizer=tokenizer).close()
        except PoolError as problem:
            is_made = isinstance(problem, PoolBusy) or Path(pool, FILE).exists()
            if not is_made or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)


def open_part(pool: str | os.PathLike[str], tokenizer: Any) -> Pool:
    """Return a new live part of the pool, open for writing.

    Raises:
        PoolError: it cannot be made.
    """
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(6)}"
    return Pool(live_parts(pool) / name, tokenizer=tokenizer)


def gather(pool: str | os.PathLike[str], *, patience: float = PATIENCE) -> int:
    """Add what is in the live parts of a pool to it, and remove them; return how many documents were new.

    To be called when the run has ended, by its driver. The pool is made if it is not there. Stopped at any time, or
    refused, it loses nothing, and can be called again.

    Args:
        pool: the pool's directory, not the parts'.
        patience: seconds to wait for parts that are still being written, by processes that are ending.

    Raises:
        PoolBusy: parts are still being written, which are left alone, and the others were gathered; or the pool is.
        PoolDamaged, PoolMismatch, …: a part cannot be used, and is left where it is; the others were gathered.
        PoolNotFound: there is neither a pool nor a part.
    """
    parts, deadline = live_parts(pool), time.monotonic() + patience
    if not parts.is_dir() and not Path(pool).is_dir():
        raise PoolNotFound(f"{pool} is no pool, and there are no parts of one in {parts}; give the pool of the run")
    with Pool(pool) as shared:
        added, left = _absorb_all(shared, parts)
        while any(isinstance(problem, PoolBusy) for problem in left.values()) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            more, left = _absorb_all(shared, parts)
            added += more
    with contextlib.suppress(OSError):  # what is left keeps it
        parts.rmdir()
    if left:
        raise _of_parts(left)
    return added


def _absorb_all(shared: Pool, parts: Path) -> tuple[int, Mapping[Path, PoolError]]:
    """Return how many documents were new, and why parts were left."""
    added, left = 0, {}
    for part in sorted(parts.iterdir()) if parts.is_dir() else ():
        if not part.is_dir() or not any(part.iterdir()):
            continue  # nothing of ours, or its maker has not begun
        try:
            added += _absorb(shared, part)
        except PoolError as problem:
            left[part] = problem
    return added, left


def _absorb(shared: Pool, part: Path) -> int:
    with Pool(part) as live:
        if (learnt := live.calibration) is not None:
            shared.keep_calibration(lambda: learnt)
        added = shared.absorb(live)
        shared.flush()  # before the part goes
    shutil.rmtree(part)
    return added


def _of_parts(left: Mapping[Path, PoolError]) -> PoolError:
    """Return one error for the parts that were left, the first that waiting does not help if there is one."""
    problem = min(left.values(), key=lambda one: isinstance(one, PoolBusy))
    names = ", ".join(map(str, left))
    if isinstance(problem, PoolBusy):
        said = f"still being written: {names}; the other parts were gathered; call gather() again later"
    else:
        said = f"{problem}; the other parts were gathered, and these are left: {names}"
    whole = type(problem)(said)
    whole.__cause__ = problem
    return whole
