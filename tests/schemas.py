"""Random JSON Schemas over the keywords that are supported, small enough that random models finish their values."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from jsonschema import Draft202012Validator

KEYS = ("a", "b", "id", "name", "kind", "é", "x y", 'q"t', "$ref", "12", "")
PATTERNS = ("^[a-c]{1,3}$", "^(ab|c)*$", "^[A-Z][0-9]{2}$", "b", "^a", "c$", "^[0-9]{1,2}-[0-9]$", "^[^a-z]{1,2}$")
FORMATS = ("date", "time", "date-time", "ipv4", "uuid", "email")
_TEXTS = ("", "a", "ab", "abc", "true", "the name", 'q"t', "\\", "é", "x\ny", "{", "1")

text = st.sampled_from(_TEXTS)
constant = st.recursive(
    st.none() | st.booleans() | st.integers(-20, 120) | st.sampled_from((0.5, -1.25)) | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=3,
)


@st.composite
def between(draw: Any, low: str, high: str, numbers: Any) -> dict[str, Any]:
    """Draw none, one or both of two bounds, in order."""
    a, b = sorted((draw(numbers), draw(numbers)))
    return draw(st.sampled_from(({}, {low: a}, {high: b}, {low: a, high: b})))


@st.composite
def numeric(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(("integer", "integer", "number")))
    if kind == "number":
        bounds = draw(between("minimum", "maximum", st.sampled_from((-2.5, -1, 0, 0.5, 3, 12.25))))
        return {"type": kind} | bounds
    schema = {"type": kind} | draw(between("minimum", "maximum", st.integers(-12, 120)))
    if draw(st.integers(0, 3)) == 0:
        low, high = draw(st.integers(-5, 5)), draw(st.integers(8, 30))
        schema = {"type": kind, "exclusiveMinimum": low, "exclusiveMaximum": high}
    if draw(st.integers(0, 3)) == 0:
        schema = {"type": kind, "multipleOf": draw(st.sampled_from((1, 2, 3, 5, 10)))}
    return schema


@st.composite
def string(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(("length", "length", "pattern", "format", "any")))
    if kind == "length":
        return {"type": "string"} | draw(between("minLength", "maxLength", st.integers(0, 6)))
    if kind == "any":
        return {"type": "string"}
    return {"type": "string", kind: draw(st.sampled_from(PATTERNS if kind == "pattern" else FORMATS))}


def leaf() -> Any:
    """Draw a schema without schemas in it."""
    return (
        st.sampled_from(({"type": "null"}, {"type": "boolean"}, {"type": "boolean"}, {}, True))
        | numeric()
        | string()
        | st.builds(lambda value: {"const": value}, constant)
        | st.builds(lambda values: {"enum": values}, st.lists(constant, min_size=1, max_size=4, unique_by=json.dumps))
    )


@st.composite
def array(draw: Any, inner: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    if draw(st.booleans()):
        schema["items"] = draw(inner)
    if draw(st.integers(0, 2)) == 0:
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=3))
        schema.setdefault("items", draw(st.sampled_from((False, True))))
    least = draw(st.integers(0, 2))
    if draw(st.booleans()) and schema.get("items") is not False:
        schema["minItems"] = least
    if draw(st.integers(0, 3)):
        schema["maxItems"] = least + draw(st.integers(0, 2))
    return schema


@st.composite
def object_(draw: Any, inner: Any) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw(inner) for name in names}}
    schema["required"] = [name for name in names if draw(st.booleans())]
    more = draw(st.sampled_from((False, False, False, True, None, "schema", "pattern", "count")))
    if more == "schema":
        schema["additionalProperties"] = draw(inner)
    elif more == "pattern":
        schema |= {"patternProperties": {"^[xy][0-9]?$": draw(inner)}, "additionalProperties": False}
    elif more == "count":
        return {"type": "object", "additionalProperties": draw(inner), "minProperties": draw(st.integers(0, 1)),
                "maxProperties": draw(st.integers(1, 3))}  # fmt: skip
    elif more is not None:
        schema["additionalProperties"] = more
    return schema


@st.composite
def either(draw: Any, inner: Any) -> dict[str, Any]:
    """Draw alternatives; `oneOf` where no value can be two of them."""
    schemas = draw(st.lists(inner, min_size=1, max_size=3))
    if draw(st.integers(0, 2)) == 0:
        disjoint = [{"type": "null"}, {"type": "boolean"}, draw(string()), draw(numeric()), draw(object_(inner))]
        return {"oneOf": draw(st.permutations(disjoint))[: draw(st.integers(1, 3))]}
    return {"anyOf": schemas}


@st.composite
def nullable(draw: Any) -> dict[str, Any]:
    schema = dict(draw(numeric() | string()))
    schema["type"] = draw(st.sampled_from(([schema["type"], "null"], ["null", schema["type"], "boolean"])))
    return schema


def nested(depth: int, leaves: Any) -> Any:
    """Draw a schema with at most `depth` levels of schemas in it."""
    if depth == 0:
        return leaves
    inner = nested(depth - 1, leaves)
    return leaves | nullable() | array(inner) | object_(inner) | object_(inner) | either(inner)


@st.composite
def schemas(draw: Any, recursive: bool = True) -> dict[str, Any]:
    """Draw a schema, of an object more often than not, perhaps with definitions that speak of themselves."""
    kind = draw(st.sampled_from(("plain", "plain", "defined", "chain", "self"))) if recursive else "plain"
    if kind == "plain":
        found = draw(object_(nested(2, leaf())) | nested(2, leaf()))
        return found if isinstance(found, dict) else {}
    if kind == "self":
        within = draw(object_(nested(1, leaf())))
        within = {key: value for key, value in within.items() if key not in ("minProperties", "maxProperties")}
        within.setdefault("properties", {})["kid"] = {"$ref": "#"}
        return within
    if kind == "chain":
        link = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
        node = {"type": "object", "properties": {"v": draw(leaf()), "next": link}, "required": ["v", "next"],
                "additionalProperties": False}  # fmt: skip
        return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    point = draw(nested(1, leaf()))
    rest = draw(object_(nested(1, st.just({"$ref": "#/$defs/point"}) | leaf())))
    return rest | {"$defs": {"point": point}}


# Values

_FORMATTED = {
    "date": st.dates().map(str),
    "time": st.sampled_from(("10:20:30Z", "23:59:59.5+01:00")),
    "date-time": st.sampled_from(("2024-02-29T10:20:30Z", "1999-12-31T23:59:59-08:00")),
    "ipv4": st.ip_addresses(v=4).map(str),
    "uuid": st.uuids().map(str),
    "email": st.sampled_from(("a@b.org", "name.kind+12@the.name.org")),
}
_LETTERS = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('ab\n\t"\\/é')


@st.composite
def values(draw: Any, schema: Any, root: Any = None, depth: int = 3) -> Any:
    """Draw a value of `schema`; nearly all of them are valid."""
    root = schema if root is None else root
    if schema is True or not schema:
        return draw(constant)
    if "$ref" in schema:
        return draw(values(_at(root, schema["$ref"]), root, depth - 1)) if depth > 0 else None
    for word in ("const", "enum"):
        if word in schema:
            return schema[word] if word == "const" else draw(st.sampled_from(schema[word]))
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return draw(values(draw(st.sampled_from(schema[word])), root, depth))
    kind = schema.get("type", "null")
    kind = kind if isinstance(kind, str) else draw(st.sampled_from(kind))
    if kind in ("array", "object"):
        return draw((_items if kind == "array" else _members)(schema, root, depth))
    return draw(_scalars(schema, kind))


def _scalars(schema: dict[str, Any], kind: str) -> Any:
    if kind in ("null", "boolean"):
        return st.none() if kind == "null" else st.booleans()
    if kind == "string":
        if "pattern" in schema:  # Python's "$" also matches before a line break at the end
            return st.from_regex(schema["pattern"]).map(lambda text: text.removesuffix("\n"))
        if "format" in schema:
            return _FORMATTED[schema["format"]]
        return st.text(_LETTERS, min_size=schema.get("minLength", 0), max_size=schema.get("maxLength"))
    low, high = schema.get("minimum", schema.get("exclusiveMinimum", -1000)), schema.get("maximum", 1000)
    high = max(low, schema.get("exclusiveMaximum", high))
    whole = st.integers(math.ceil(low), max(math.ceil(low), math.floor(high)))
    if kind == "number" and low < high:
        return whole | st.floats(low, high).map(lambda x: round(x, 6)).map(lambda x: int(x) if x == int(x) else x)
    return whole.map(lambda n: n - n % schema.get("multipleOf", 1))


@st.composite
def _items(draw: Any, schema: dict[str, Any], root: Any, depth: int) -> list[Any]:
    first, rest, least = schema.get("prefixItems", []), schema.get("items", True), schema.get("minItems", 0)
    most = min(schema.get("maxItems", least + 2), len(first) if rest is False else 9)
    size = draw(st.integers(min(least, most), most))
    return [draw(values(first[i] if i < len(first) else rest, root, depth - 1)) for i in range(size)]


@st.composite
def _members(draw: Any, schema: dict[str, Any], root: Any, depth: int) -> dict[str, Any]:
    out = {}
    for name, inner in schema.get("properties", {}).items():
        if name in schema.get("required", ()) or (depth > 0 and draw(st.booleans())):
            out[name] = draw(values(inner, root, depth - 1))
    more = schema.get("additionalProperties", True)
    if "patternProperties" in schema:
        more, names = next(iter(schema["patternProperties"].values())), st.sampled_from(("x", "y", "x1"))
    else:
        names = st.sampled_from(("more", "a", "\\", "é日") if "maxProperties" in schema else ("more", "z"))
    if more is not False:
        most = schema.get("maxProperties", 2)
        for name in draw(st.lists(names, min_size=schema.get("minProperties", 0), max_size=most, unique=True)):
            out.setdefault(name, draw(values(more, root, depth - 1)))
    return out


def _at(root: Any, reference: str) -> Any:
    for step in reference.removeprefix("#").split("/")[1:]:
        root = root[step]
    return root


def written(value: Any, schema: Any, root: Draft202012Validator) -> str:
    """Return `value` on one line, keys in the order of the schema, numbers without exponents."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    if not isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    schema = _chosen(value, schema, root)
    if isinstance(value, list):
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        parts = [written(item, first[i] if i < len(first) else rest, root) for i, item in enumerate(value)]
        return f"[{', '.join(parts)}]"
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    others = next(iter(patterns.values()), schema.get("additionalProperties", True))
    keys = [key for key in known if key in value] + [key for key in value if key not in known]
    parts = [f"{written(key, True, root)}: {written(value[key], known.get(key, others), root)}" for key in keys]
    return f"{{{', '.join(parts)}}}"


def _chosen(value: Any, schema: Any, root: Draft202012Validator) -> dict[str, Any]:
    """Return the schema that says how `value` is laid out: the first alternative that it is valid against."""
    while isinstance(schema, dict):
        if "$ref" in schema:
            schema = _at(root.schema, schema["$ref"])
        elif "anyOf" in schema or "oneOf" in schema:
            options = schema.get("anyOf", schema.get("oneOf"))
            schema = next((option for option in options if root.evolve(schema=option).is_valid(value)), options[0])
        else:
            constants = schema.get("enum", [schema.get("const")])
            if isinstance(value, dict):  # a constant is written as it stands in the schema
                order = next((list(c) for c in constants if isinstance(c, dict) and c == value), None)
                return schema if order is None else {"properties": dict.fromkeys(order, True)}
            return schema
    return {}
