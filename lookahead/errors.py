"""One tree of errors: everything that `lookahead` raises on purpose derives from `LookaheadError`."""


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
