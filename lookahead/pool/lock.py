"""The lock that one writer holds. The kernel frees it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import filelock

from lookahead.errors import PoolBusy, PoolError

LOCK = "lock"
HOLDER = "lock.pid"


class WriterLock:
    """Held from its making until `release`, or until the process ends.

    Raises:
        PoolBusy: another writer, of this process or another one, holds it.
        PoolError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._holder = directory / HOLDER
        self._process = os.getpid()
        self._lock = filelock.FileLock(str(directory / LOCK), timeout=0, thread_local=False)
        try:
            self._lock.acquire()
            self._holder.write_text(f"{self._process} on {socket.gethostname()}")
        except filelock.Timeout:
            raise PoolBusy(
                f"{directory} is being written by {self._who()}; "
                "open it with read_only=True, or wait until that is closed"
            ) from None
        except OSError as error:
            self._lock.release()
            raise PoolError(
                f"{directory} cannot be written ({error}); open it for reading, or name another directory"
            ) from error

    def _who(self) -> str:
        # Another file than the lock: some versions of the lock library empty the lock file before they try.
        with contextlib.suppress(OSError, ValueError):
            return f"process {self._holder.read_text()}"
        return "another process"

    @property
    def held(self) -> bool:
        """Whether this process holds the lock; a forked child does not."""
        return self._lock.is_locked and os.getpid() == self._process

    def release(self) -> None:
        """Let another writer in; a second call does nothing, nor does a call by a forked child."""
        if self.held:
            with contextlib.suppress(OSError):
                self._holder.unlink()
            self._lock.release()
