"""A clock that only stands still or is moved on: what takes time takes what a test says, and nothing else does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

TICK = 1e-6
"""Seconds that go by whenever somebody looks at the clock."""


class Clock:
    """Seconds in which a pass over n nodes takes `price(n)`.

    Attributes:
        now: seconds so far.
    """

    def __init__(self, price: Callable[[int], float]) -> None:
        self.now, self._price = 0.0, price

    def __call__(self) -> float:
        self.now += TICK
        return self.now

    @contextmanager
    def of(self, model: Any) -> Iterator[Clock]:
        """Let it be the clock of the library, and of what `model` does."""

        def ran(_: Any, arguments: Any, given: dict[str, Any]) -> None:
            self.now += self._price(int(given["input_ids"].shape[1]))

        with ExitStack() as stack:
            ours = SimpleNamespace(**{**vars(time), "perf_counter": self})
            for name, module in list(sys.modules.items()):
                if name.startswith("lookahead.") and getattr(module, "time", None) is time:
                    stack.enter_context(mock.patch.object(module, "time", ours))
            hook = model.register_forward_pre_hook(ran, with_kwargs=True)
            stack.callback(hook.remove)
            yield self
