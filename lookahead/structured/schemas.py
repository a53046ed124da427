"""Python types and JSON Schemas: what the grammar is made of, and what turns the text into a value."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import PydanticUserError, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from lookahead.errors import InvalidArgument
from lookahead.grammar.grammar import Grammar, Whitespace

# The formats of JSON Schema that the grammar engine knows. Those that pydantic invents ("path", "binary", …) say what
# becomes of a string, not how it is written.
FORMATS = frozenset(("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"))
_MANY = ("properties", "patternProperties", "$defs")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE = ("items", "additionalProperties", "not", "contains")


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """What a JSON value must be: the JSON Schema of a Python type with its validator, or a JSON Schema alone.

    Attributes:
        schema: the JSON Schema, as JSON.
        adapter: pydantic's validator of the type; None of a bare schema.
    """

    schema: str
    adapter: TypeAdapter[Any] | None

    @classmethod
    def of(cls, given: Any) -> Shape:
        """Return the shape of a type that pydantic knows, of a JSON Schema, or of one as JSON.

        Raises:
            InvalidArgument: something that is neither, or a type whose values JSON cannot hold.
        """
        if isinstance(given, (str, bool)):
            return cls(given if isinstance(given, str) else json.dumps(given), None)
        adapter = None if isinstance(given, Mapping) else _adapter(given)
        schema = dict(given) if adapter is None else _schema(adapter, given)
        try:
            return cls(json.dumps(schema, allow_nan=False), adapter)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgument(f"schema={given!r} cannot be written as JSON: {error}") from error

    def grammar(self, *, whitespace: Whitespace = "fixed", lenient: bool = False) -> Grammar:
        """Return the grammar of the values of this shape; see `Grammar.json_schema`."""
        return _grammar(self.schema, whitespace, lenient)

    def read(self, text: str) -> Any:
        """Return the value of a complete text.

        Raises:
            ValueError: it cannot be read, or a validator of the type refuses it.
        """
        if self.adapter is not None:
            return self.adapter.validate_json(text)
        try:
            return json.loads(text)
        except RecursionError as error:
            raise ValueError("the value is nested too deeply for Python") from error


def schema_of(type: Any) -> dict[str, Any]:
    """Return the JSON Schema that `generate_json` follows for a Python type; for the prompt, say.

    It is pydantic's, but says nothing that the text cannot be held to: objects with named properties have no others
    (pydantic drops those), `set` may repeat an item (pydantic drops it), formats that JSON Schema does not have go, and
    so do titles of fields that only repeat the name.

    Raises:
        InvalidArgument: no type that pydantic knows, or one whose values JSON cannot hold.

    >>> schema_of(list[int])
    {'items': {'type': 'integer'}, 'type': 'array'}
    """
    schema: dict[str, Any] = json.loads(Shape.of(type).schema)
    return schema


class _Terse(GenerateJsonSchema):
    """Pydantic's generator without titles that only repeat names, and without warnings."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@lru_cache(64)
def _grammar(schema: str, whitespace: Whitespace, lenient: bool) -> Grammar:
    return Grammar.json_schema(schema, whitespace=whitespace, lenient=lenient)


def _adapter(given: Any) -> TypeAdapter[Any]:
    if inspect.isroutine(given):
        raise InvalidArgument(f"schema={given!r} is a function; give a type, such as a model of its arguments")
    try:
        adapter: TypeAdapter[Any] = given if isinstance(given, TypeAdapter) else TypeAdapter(given)
    except (PydanticUserError, NameError, TypeError) as error:
        raise InvalidArgument(f"schema={given!r} is no type that pydantic can check: {_first_line(error)}") from error
    return adapter


def _schema(adapter: TypeAdapter[Any], given: Any) -> Any:
    try:
        return _closed(adapter.json_schema(schema_generator=_Terse))
    except (PydanticUserError, NameError) as error:
        raise InvalidArgument(f"schema={given!r} has no JSON Schema: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _closed(schema: Any, top: Any = None) -> Any:
    """Return pydantic's `schema` as the grammar engine takes it: what validation does later anyway is left out."""
    if not isinstance(schema, dict):
        return schema
    top = schema if top is None else top
    closed = {key: _closed_part(key, value, top) for key, value in schema.items()}
    if "oneOf" in closed:  # of a union told apart by a field: no value fits two
        closed["anyOf"] = closed.pop("oneOf")
    closed.pop("uniqueItems", None)
    closed.pop("discriminator", None)
    if closed.get("format") not in FORMATS:
        closed.pop("format", None)
    if "propertyNames" in closed:
        _name_properties(closed, top)
    if "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def _closed_part(key: str, value: Any, top: Any) -> Any:
    if key in _MANY:
        return {name: _closed(part, top) for name, part in value.items()}
    if key in _LISTS:
        return [_closed(part, top) for part in value]
    return _closed(value, top) if key in _ONE else value


def _name_properties(schema: dict[str, Any], top: Any) -> None:
    """Say with other keywords what `propertyNames` says, where they can; a dict's keys are validated later anyway."""
    names = schema.pop("propertyNames")
    while "$ref" in names:
        names = top["$defs"][names["$ref"].rsplit("/", 1)[1]]
    values = schema.get("additionalProperties", True)
    known = names.get("enum", [names["const"]] if "const" in names else None)
    if known is not None:
        schema["properties"] = {name: values for name in known if isinstance(name, str)}
        schema["additionalProperties"] = False
    elif "pattern" in names:
        schema["patternProperties"] = {names["pattern"]: values}
        schema["additionalProperties"] = False
