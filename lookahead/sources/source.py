"""The interface of a source that is written in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lookahead.draft import IntArray
from lookahead.trace import Step


@runtime_checkable
class Source(Protocol):
    """Answers one question: after this path, which tokens, and how likely each?

    A cursor is whatever the source needs to know of a path; one is shared by all its extensions, so do not change it.
    Python at every node costs time: a source that must be fast joins the grower's kernel instead.
    """

    def start(self, context: IntArray) -> Any:
        """Return the cursor at the end of `context` ([L] int32, valid during the call only)."""

    def extend(self, cursor: Any, token: int) -> Any:
        """Return the cursor one token further."""

    def successors(self, cursor: Any) -> tuple[Sequence[int], Sequence[float]]:
        """Return tokens that may follow and the chance of each, in [0, 1]; the grower learns how far to trust them."""

    def observe(self, step: Step) -> None:
        """Learn from a verified step."""
