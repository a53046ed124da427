"""JSON Schemas as the grammar engine takes them: what says nothing is left out, what it would get wrong is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from math import lcm
from typing import Any
from urllib.parse import unquote

from lookahead.errors import GrammarError

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
# A format that JSON Schema does not name says nothing about validity.
_FORMATS = {
    "date-time", "time", "date", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex",
}  # fmt: skip
_NOTHING: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("uniqueItems", (False,)),
    ("dependencies", ({},)),
    ("dependentRequired", ({},)),
    ("dependentSchemas", ({},)),
    ("not", (False,)),
    ("propertyNames", (True, {})),
)
_INDEX = re.compile("[0-9]{1,9}")
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_MULTIPLE = 100_000  # beyond it the engine builds its automaton for seconds, or for ever
_ROUNDS = 64


def adapted(schema: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Take out of `schema` what says nothing; return it, and which unknown formats that was.

    Raises:
        GrammarError: no value of it can end, or its numbers are too much for the engine.
    """
    formats: list[str] = []
    _check_strings(schema)
    schema.pop("x-guidance", None)  # options of the engine's, which are not a schema's to set
    for part in subschemas(schema):
        for keyword, values in _NOTHING:
            if keyword in part and any(part[keyword] is value or part[keyword] == value != 0 for value in values):
                del part[keyword]
        if "if" not in part or not ("then" in part or "else" in part):
            for keyword in ("if", "then", "else"):
                part.pop(keyword, None)
        kind = part.get("format")
        if isinstance(kind, str) and kind not in _FORMATS:
            formats.append(f"format: {part.pop('format')}")
        _check_multiples(part)
    if not _can_end(schema):
        raise GrammarError("json_schema: no value can be valid, since each would have to hold another one without end")
    return schema, list(dict.fromkeys(formats))


def counts_keys(schema: Any) -> bool:
    """Return whether some object must have more keys, two or more, than are required by name."""
    for part in subschemas(schema):
        least, required = part.get("minProperties"), part.get("required")
        named = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least > max(1, named):
            return True
    return False


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield `schema` and all schemas inside of it that are objects."""
    stack = [schema]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for keyword in _SINGLE:
            stack.append(part.get(keyword))
        for keyword in _LISTED:
            value = part.get(keyword)
            stack += value if isinstance(value, list) else []
        for keyword in _NAMED:
            value = part.get(keyword)
            stack += value.values() if isinstance(value, dict) else []


def resolve(reference: str, whole: Any) -> Any:
    """Return what a reference inside of `whole` means, None where it is another document's or nothing."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    for step in unquote(reference[1:]).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(whole, dict) and key in whole:
            whole = whole[key]
        elif isinstance(whole, list) and _INDEX.fullmatch(key) and int(key) < len(whole):
            whole = whole[int(key)]
        else:
            return None
    return whole


def _check_strings(schema: dict[str, Any]) -> None:
    """Raise for what the engine would leave out of a string: without \\u it has no way to write it."""
    for part in subschemas(schema):
        named = [part.get(keyword) for keyword in ("const", "enum", "required")]
        named += [list(part[k]) for k in ("properties", "dependentSchemas") if isinstance(part.get(k), dict)]
        waiting = [value for value in named if value is not None]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, str) and (found := _UNWRITABLE.search(value)):
                character = f"U+{ord(found[0]):04X}"
                raise GrammarError(f"json_schema: the string {value!r} cannot be written: {character} in it needs \\u")


def _check_multiples(part: dict[str, Any]) -> None:
    together = 1
    waiting: list[Any] = [part]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict):
            continue
        step = one.get("multipleOf")
        if isinstance(step, int | float) and step > 0:
            digits = Decimal(str(step)).normalize().as_tuple().digits
            together = lcm(together, int("".join(map(str, digits))))
        inner = one.get("allOf")
        waiting += inner if isinstance(inner, list) else []
    if together > _MULTIPLE:
        raise GrammarError(f"json_schema: multipleOf: multiples of {together} are not supported, only to {_MULTIPLE}")


def _can_end(schema: dict[str, Any]) -> bool:
    """Return whether some value is finite: whether objects and lists can be had without holding themselves."""
    references = {part["$ref"] for part in subschemas(schema) if isinstance(part.get("$ref"), str)}
    targets = {reference: resolve(reference, schema) for reference in references}
    ends = {reference: not isinstance(target, dict) for reference, target in targets.items()}
    try:
        for _ in range(_ROUNDS):
            found = [name for name, end in ends.items() if not end and _ends(targets[name], ends)]
            if not found:
                return _ends(schema, ends)
            ends |= dict.fromkeys(found, True)
    except RecursionError:
        pass
    return True  # too deep to tell


def _ends(part: Any, ends: dict[str, bool]) -> bool:
    """Return whether a value of `part` can end, given which references can."""
    if not isinstance(part, dict):
        return part is not False
    if "enum" in part or "const" in part:
        return True
    if not ends.get(part.get("$ref", ""), True):
        return False
    for keyword, needed in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        inner = part.get(keyword)
        if isinstance(inner, list) and inner and not needed(_ends(one, ends) for one in inner):
            return False
    kinds = part.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not kinds:
        return True
    return any(_kind_ends(kind, part, ends) for kind in kinds)


def _kind_ends(kind: Any, part: dict[str, Any], ends: dict[str, bool]) -> bool:
    if kind == "object":
        required, named = part.get("required"), part.get("properties")
        named = named if isinstance(named, dict) else {}
        names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
        return all(_ends(named.get(name, True), ends) for name in names)
    if kind == "array":
        least, first, rest = part.get("minItems", 0), part.get("prefixItems"), part.get("items", True)
        least = int(least) if isinstance(least, int | float) else 0
        first = first if isinstance(first, list) else []
        return all(_ends(one, ends) for one in first[:least]) and (least <= len(first) or _ends(rest, ends))
    return True
