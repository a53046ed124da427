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
