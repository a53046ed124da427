"""What a JSON Schema says of the keys of objects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from lookahead.grammar.dialect import resolve

_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_INSIDE = ("items", "additionalProperties", "contains", "then", "else", "if", "not", "prefixItems")
_BY_PATTERN = ("patternProperties", "dependentSchemas")
_MOST = 4096  # properties; a schema that has more is followed so far


class Property(NamedTuple):
    """A key that a schema names, and the values that it shows for it."""

    name: str
    examples: tuple[Any, ...]


def properties(schema: Any) -> list[Property]:
    """Return all properties, an object's before those inside of it, in the order of the schema.

    References inside of the schema are followed, each once.
    """
    return list(islice(_walk(schema), _MOST))


def _walk(schema: Any) -> Iterator[Property]:
    seen: set[str] = set()
    stack: list[Any] = [schema]
    while stack:
        part = stack.pop()
        if isinstance(part, Property):
            yield part
        if not isinstance(part, dict):
            continue
        below: list[Any] = []
        reference = part.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            below.append(resolve(reference, schema))
        for keyword in _ALTERNATIVES:
            below += _listed(part.get(keyword))
        named = part.get("properties")
        for name, value in named.items() if isinstance(named, dict) else ():
            below += [Property(str(name), _examples(value)), value]
        for keyword in _INSIDE:
            below += _listed(part.get(keyword))
        for keyword in _BY_PATTERN:
            found = part.get(keyword)
            below += found.values() if isinstance(found, dict) else ()
        stack += reversed(below)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _examples(schema: Any) -> tuple[Any, ...]:
    """Return the values that a schema shows, where they are no objects or lists."""
    if not isinstance(schema, dict):
        return ()
    shown = [schema[keyword] for keyword in ("const", "default", "example") if keyword in schema]
    shown += _listed(schema.get("examples", []))[:2]
    return tuple(value for value in shown if isinstance(value, str | int | float))
