"""Work that is done some time after it was asked for, in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Timer


class Later:
    """Does something `seconds` after it was asked to; what is asked for in the meantime is done with it.

    Args:
        seconds: how long it waits.
        act: what it does; returns whether it is to be done again, as long after.
    """

    def __init__(self, seconds: float, act: Callable[[], bool]) -> None:
        self.seconds = seconds
        self._act, self._lock = act, Lock()
        self._timer: Timer | None = None  # that waits
        self._stopped = False

    def ask(self) -> None:
        """Ask for it; costs nothing where that was done already."""
        if self._timer is None:
            with self._lock:
                if self._timer is None and not self._stopped:
                    self._timer = Timer(self.seconds, self._run)
                    self._timer.daemon = True
                    self._timer.start()

    def _run(self) -> None:
        self._timer = None  # what is asked for from here on is for the next time
        if self._act():
            self.ask()

    def stop(self) -> None:
        """Do it no more; one that is under way may go on for a moment."""
        with self._lock:
            self._stopped, timer = True, self._timer
        if timer is not None:
            timer.cancel()
