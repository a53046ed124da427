"""Exact lookahead and n-gram decoding for Hugging Face models: code and JSON faster, not one token changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lookahead.budget import Budget
    from lookahead.draft import Draft
    from lookahead.drafter import Drafter
    from lookahead.engine import Lookahead, generate
    from lookahead.errors import (
        GrammarError,
        IncompleteJson,
        IncompleteText,
        InvalidArgument,
        InvalidDraft,
        InvalidInput,
        InvalidValue,
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
        UnusableText,
    )
    from lookahead.grammar.grammar import Grammar
    from lookahead.grammar.processor import GrammarProcessor
    from lookahead.grow import Grower
    from lookahead.loading import demo_path
    from lookahead.pool.pool import Pool
    from lookahead.sources.jacobi import Jacobi
    from lookahead.structured.generate import (
        generate_choice,
        generate_grammar,
        generate_json,
        generate_regex,
        stream_json,
    )
    from lookahead.structured.memory import SchemaMemory
    from lookahead.structured.results import Result
    from lookahead.structured.schemas import schema_of
    from lookahead.structured.stream import JsonStream
    from lookahead.support import Support, supports
    from lookahead.trace import Pass, Run, Step

__version__ = "0.1.0"

_HOME = {
    "Budget": "budget",
    "Draft": "draft",
    "Drafter": "drafter",
    "Grammar": "grammar.grammar",
    "GrammarError": "errors",
    "GrammarProcessor": "grammar.processor",
    "Grower": "grow",
    "IncompleteJson": "errors",
    "IncompleteText": "errors",
    "InvalidArgument": "errors",
    "InvalidDraft": "errors",
    "InvalidInput": "errors",
    "InvalidValue": "errors",
    "Jacobi": "sources.jacobi",
    "JsonStream": "structured.stream",
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
    "Result": "structured.results",
    "Run": "trace",
    "SchemaMemory": "structured.memory",
    "Step": "trace",
    "Support": "support",
    "UnsupportedArgument": "errors",
    "UnsupportedCache": "errors",
    "UnsupportedModel": "errors",
    "UnusableText": "errors",
    "demo_path": "loading",
    "generate": "engine",
    "generate_choice": "structured.generate",
    "generate_grammar": "structured.generate",
    "generate_json": "structured.generate",
    "generate_regex": "structured.generate",
    "schema_of": "structured.schemas",
    "stream_json": "structured.generate",
    "supports": "support",
}
__all__ = [
    "Budget",
    "Draft",
    "Drafter",
    "Grammar",
    "GrammarError",
    "GrammarProcessor",
    "Grower",
    "IncompleteJson",
    "IncompleteText",
    "InvalidArgument",
    "InvalidDraft",
    "InvalidInput",
    "InvalidValue",
    "Jacobi",
    "JsonStream",
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
    "Result",
    "Run",
    "SchemaMemory",
    "Step",
    "Support",
    "UnsupportedArgument",
    "UnsupportedCache",
    "UnsupportedModel",
    "UnusableText",
    "demo_path",
    "generate",
    "generate_choice",
    "generate_grammar",
    "generate_json",
    "generate_regex",
    "schema_of",
    "stream_json",
    "supports",
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
