"""One tree of errors: everything that `lookahead` raises on purpose derives from `LookaheadError`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lookahead.trace import Run


class LookaheadError(Exception):
    """Base of every error that this library raises on purpose."""


class UnsupportedModel(LookaheadError):
    """The model's architecture, attention or rotary scheme cannot verify a token tree exactly."""


class UnsupportedCache(LookaheadError):
    """A key-value cache that cannot drop the rows of rejected tokens."""


class UnsupportedArgument(LookaheadError, ValueError):
    """An argument of `generate()` that this library does not serve; the message says what to call instead."""


class InvalidArgument(LookaheadError, ValueError):
    """An argument with a value that makes no sense, named as the user wrote it."""


class InvalidDraft(LookaheadError, ValueError):
    """A token tree that breaks one of the laws of `Draft`."""


class InvalidInput(LookaheadError, ValueError):
    """Input to a command or helper that cannot be used: missing model, empty prompt, binary text."""


class GrammarError(LookaheadError, ValueError):
    """A grammar that cannot be compiled or followed; the message holds the engine's own words."""


class UnusableText(LookaheadError):
    """A generated text without a value; base of what follows. Nothing that was generated is lost.

    Attributes:
        text: what was generated, without special tokens.
        partial: of JSON, what is there of the value; None: nothing, or no JSON.
        results: of a batch, for each prompt its `Result`, or its error of this kind.
        trace: what `generate()` did.
    """

    def __init__(
        self,
        message: str,
        *,
        text: str = "",
        partial: Any = None,
        results: Sequence[Any] = (),
        trace: Run | None = None,
    ) -> None:
        super().__init__(message)
        self.text, self.partial, self.results, self.trace = text, partial, tuple(results), trace


class IncompleteText(UnusableText):
    """The length limit, or a stopping criterion, ended a text before its grammar did."""


class IncompleteJson(IncompleteText):
    """The length limit, or a stopping criterion, ended a JSON value early; `partial` is what is there of it."""


class InvalidValue(UnusableText, ValueError):
    """JSON of the schema that a validator of the type refuses; `__cause__` says why."""


class PoolError(LookaheadError):
    """A pool on disk that cannot be used as asked; base of what follows."""


class PoolNotFound(PoolError):
    """There is no pool at the path that was given."""


class PoolBusy(PoolError):
    """Another writer holds the pool; the message names its process where it is known."""


class PoolDamaged(PoolError):
    """A file of a pool is missing, truncated or corrupted; the message names it and how to go on without it."""


class PoolTooNew(PoolError):
    """A pool in a format that a newer version of this library wrote."""


class PoolMismatch(PoolError):
    """A pool of another tokenizer: its token ids mean other text."""
