"""The keys that a JSON Schema names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_INSIDE = ("items", "additionalProperties", "contains", "then", "else", "if", "not")
_MOST = 4096  # names; a schema that has more is followed so far


def property_names(schema: Any) -> list[str]:
    """Return the names of all properties, an object's before those inside of it, in the order of the schema.

    References inside of the schema are followed, each once.
    """
    names: list[str] = []
    for name in _walk(schema, schema, set()):
        names.append(name)
        if len(names) == _MOST:
            break
    return names


def _walk(part: Any, whole: Any, seen: set[str]) -> Iterator[str]:
    stack = [part]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            yield part
        if not isinstance(part, dict):
            continue
        below: list[Any] = []
        reference = part.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            below.append(_resolve(reference, whole))
        for keyword in _ALTERNATIVES:
            alternatives = part.get(keyword)
            below += alternatives if isinstance(alternatives, list) else []
        properties = part.get("properties")
        for name, value in properties.items() if isinstance(properties, dict) else ():
            below += [name, value]
        for keyword in (*_INSIDE, "prefixItems"):
            value = part.get(keyword)
            below += value if isinstance(value, list) else [value]
        stack += reversed(below)


def _resolve(reference: str, whole: Any) -> Any:
    """Return what a reference inside of `whole` means, None where it is another document's or nothing."""
    if not reference.startswith("#"):
        return None
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(whole, dict) and key in whole:
            whole = whole[key]
        elif isinstance(whole, list) and key.isdigit() and int(key) < len(whole):
            whole = whole[int(key)]
        else:
            return None
    return whole
