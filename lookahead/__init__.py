"""Exact lookahead and n-gram decoding for Hugging Face models: code and JSON faster, not one token changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lookahead.constrain import GrammarProcessor
    from lookahead.draft import Draft
    from lookahead.drafter import Drafter
    from lookahead.engine import Lookahead, generate
    from lookahead.errors import (
        GrammarError,
        InvalidArgument,
        InvalidDraft,
        InvalidInput,
        LookaheadError,
        PoolBusy,
        PoolDamaged,
        PoolError,
        PoolMismatch,
        PoolNotFound,
        PoolTooNew,
        UnsupportedArgument,
        UnsupportedCache,
        UnsupportedModel,
    )
    from lookahead.grammar import Grammar
    from lookahead.grow import Grower
    from lookahead.loading import demo_path
    from lookahead.pool.pool import Pool
    from lookahead.trace import Pass, Run, Step

__version__ = "0.1.0"

_HOME = {
    "Draft": "draft",
    "Drafter": "drafter",
    "Grammar": "grammar",
    "GrammarError": "errors",
    "GrammarProcessor": "constrain",
    "Grower": "grow",
    "InvalidArgument": "errors",
    "InvalidDraft": "errors",
    "InvalidInput": "errors",
    "Lookahead": "engine",
    "LookaheadError": "errors",
    "Pass": "trace",
    "Pool": "pool.pool",
    "PoolBusy": "errors",
    "PoolDamaged": "errors",
    "PoolError": "errors",
    "PoolMismatch": "errors",
    "PoolNotFound": "errors",
    "PoolTooNew": "errors",
    "Run": "trace",
    "Step": "trace",
    "UnsupportedArgument": "errors",
    "UnsupportedCache": "errors",
    "UnsupportedModel": "errors",
    "demo_path": "loading",
    "generate": "engine",
}
__all__ = [
    "Draft",
    "Drafter",
    "Grammar",
    "GrammarError",
    "GrammarProcessor",
    "Grower",
    "InvalidArgument",
    "InvalidDraft",
    "InvalidInput",
    "Lookahead",
    "LookaheadError",
    "Pass",
    "Pool",
    "PoolBusy",
    "PoolDamaged",
    "PoolError",
    "PoolMismatch",
    "PoolNotFound",
    "PoolTooNew",
    "Run",
    "Step",
    "UnsupportedArgument",
    "UnsupportedCache",
    "UnsupportedModel",
    "demo_path",
    "generate",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import lookahead` loads neither torch nor numba."""
    if name not in _HOME:
        raise AttributeError(f"module 'lookahead' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lookahead.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
