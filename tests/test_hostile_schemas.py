"""Schemas, patterns and grammars that are large, deep, ambiguous or wrong: they work, or they are refused in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models import json_tokenizer

from lookahead.errors import GrammarError
from lookahead.grammar.grammar import Grammar

NULL: dict[str, Any] = {"type": "null"}
INTEGER: dict[str, Any] = {"type": "integer"}


def nest(levels: int, wrap: Callable[[Any], Any]) -> Any:
    schema: Any = NULL
    for _ in range(levels):
        schema = wrap(schema)
    return schema


def schema(value: Any) -> Callable[[], Grammar]:
    return lambda: Grammar.json_schema(value)


def keyed(count: int) -> dict[str, Any]:
    return {f"k{i}": INTEGER for i in range(count)}


def chain(length: int) -> dict[str, Any]:
    return {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)} | {f"d{length}": NULL}


def rules(length: int) -> str:
    return "".join(f"r{i}: r{i + 1}\n" for i in range(length)) + f'r{length}: "a"\nstart: r0\n'


def doubling(levels: int) -> dict[str, Any]:
    """Return a schema whose only value has 2 ** levels parts."""
    definitions: dict[str, Any] = {f"d{levels}": NULL}
    for i in range(levels):
        two = [{"$ref": f"#/$defs/d{i + 1}"}] * 2
        definitions[f"d{i}"] = {"type": "array", "prefixItems": two, "items": False, "minItems": 2}
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


WORKS: dict[str, Callable[[], Grammar]] = {
    "60 levels": schema(nest(60, lambda inner: {"type": "array", "items": inner, "minItems": 1})),
    "40 objects": schema(nest(40, lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]})),
    "alternatives in each other": schema(nest(9, lambda inner: {"anyOf": [inner, {"type": "array", "items": inner}]})),
    "references that double": schema(doubling(25)),
    "enum of 20,000": schema({"enum": [f"value {i} of {i * 7919 % 20011}" for i in range(20_000)]}),
    "ends in (a|aa)+": schema({"type": "string", "pattern": "(a|aa)+$"}),
    "is (a|aa)+": schema({"type": "string", "pattern": "^(a|aa)+$"}),
    "nested counts": schema({"type": "string", "pattern": "^((a{1,99}){1,99}){1,99}$"}),
    "nested counts as regex": lambda: Grammar.regex("((a{1,99}){1,99}){1,99}"),
    "a letter 40 letters back": lambda: Grammar.regex(".*a.{40}b.*"),
    "patterns at once": schema({"allOf": [{"type": "string", "pattern": p} for p in ("a.{9}b", "c.{9}d", "e.{9}f")]}),
    "description of 1 MB": schema({"description": "x" * 1_000_000, "type": "null"}),
    "1,500 required keys": schema({"type": "object", "properties": keyed(1500), "required": list(keyed(1500))}),
    "long strings": schema({"type": "string", "maxLength": 1_000_000}),
    "longer strings": schema({"type": "string", "minLength": 1_000_000}),
    "many items": schema({"type": "array", "maxItems": 1_000_000}),
    "as many items at least": schema({"type": "array", "minItems": 1_000_000_000_000}),
    "many keys": schema({"type": "object", "maxProperties": 1_000_000}),
    "pattern and length": schema({"type": "string", "pattern": "(ab|ba|a.*b)*c", "maxLength": 5000}),
    "large integers": schema({"type": "integer", "minimum": -(10**18), "maximum": 10**18}),
    "small multiples": schema({"type": "number", "multipleOf": 1e-9}),
    "chain of references": schema({"$defs": chain(20_000), "$ref": "#/$defs/d0"}),
    "chain of rules": lambda: Grammar.lark(rules(20_000)),
    "20,000 choices": lambda: Grammar.choice(f"value {i}" for i in range(20_000)),
    "ambiguous": lambda: Grammar.lark('start: e\ne: e e | "a" | e "+" e | "b"'),
    "ambiguous and empty": lambda: Grammar.lark('start: e\ne: e e e | "a" | '),
    "left recursion": lambda: Grammar.lark('start: start "a" | "a"'),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[], Grammar], str]] = {
    "500 levels": (schema(nest(500, lambda inner: {"type": "array", "items": inner})), "recursion limit"),
    "100,000 levels": (schema(nest(100_000, lambda inner: {"items": inner})), "nested too deeply"),
    "100,000 levels as text": (schema('{"items":' * 100_000 + "true" + "}" * 100_000), "nested too deeply"),
    "1 MB": (
        schema({"properties": {f"key {i}": {"enum": [f"{i}", "x"], "maxLength": i % 50} for i in range(20_000)}}),
        "too large|panic",
    ),
    "very long strings": (schema({"type": "string", "maxLength": 10**12}), "decimal literal"),
    "refers to nothing": (schema({"$ref": "#/nowhere"}), "'/nowhere' does not exist"),
    "refers to nothing below": (schema({"properties": {"a": {"$ref": "#/$defs/gone"}}}), r"'/\$defs/gone' does not"),
    "refers to a page": (schema({"$ref": "https://example.com/schema.json"}), "another document"),
    "refers to a file": (schema({"$ref": "file:///etc/passwd"}), "another document"),
    "refers to a number": (schema({"$ref": 7}), r"\$ref must be a string"),
    "itself and more": (schema({"allOf": [{"$ref": "#"}, NULL]}), "no value can be valid"),
    "text that cannot end": (
        schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
        "no value can be valid",
    ),
    "a large multiple": (schema({"type": "integer", "multipleOf": 999_983}), "multipleOf"),
    "multiples at once": (schema({"allOf": [{"multipleOf": n} for n in (97, 89, 83, 79)]}), "multipleOf"),
    "is itself": (schema({"$ref": "#"}), "no value can be valid"),
    "is one of itself": (schema({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}), "no value can be valid"),
    "goes round": (
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "no value can be valid",
    ),
    "large bounds": (schema({"type": "number", "minimum": -1e308, "maximum": 1e308}), "float range"),
    "counts too large": (lambda: Grammar.regex("a{1,99999999999}"), "decimal literal|too big"),
}

STUCK: dict[str, tuple[Callable[[], Grammar], str]] = {
    "nothing matches": (lambda: Grammar.regex(r"[^\s\S]"), "no token"),
}
"""Grammars with no text in them, which show only when they are asked."""


def walk(grammar: Grammar, steps: int) -> list[int]:
    """Return a random text that the masks allow."""
    matcher, draw, text = grammar.matcher(json_tokenizer()), random.Random(1), []
    for _ in range(steps):
        mask = matcher.mask(matcher.settle(text))
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        if allowed == [1]:
            break
        text.append(draw.choice([token for token in allowed if token != 1]))
    return text


@pytest.mark.parametrize("name", WORKS)
def test_works(name: str) -> None:
    assert walk(WORKS[name](), 30)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(GrammarError, match=says):
        make()


@pytest.mark.parametrize("name", STUCK)
def test_refused_before_anything_is_generated(name: str) -> None:
    make, says = STUCK[name]
    grammar = make()
    with pytest.raises(GrammarError, match=says):
        grammar.processor(json_tokenizer())


@pytest.mark.parametrize("name", ["chain of references", "chain of rules"])
def test_deep_chains_accept_too(name: str) -> None:
    assert not WORKS[name]().accepts("b")


@pytest.mark.parametrize("options", [1500, 3000])
def test_many_optional_keys_work_or_are_refused_while_they_are_followed(options: int) -> None:
    """The engine tells only then that they are too many."""
    grammar = Grammar.json_schema({"type": "object", "properties": keyed(options), "additionalProperties": False})
    with pytest.raises(GrammarError, match="items; max is"):
        walk(grammar, 30)
    few = Grammar.json_schema({"type": "object", "properties": keyed(300), "additionalProperties": False})
    assert walk(few, 30)


def test_values_of_large_enums() -> None:
    texts = [f"value {i} of {i * 7919 % 20011}" for i in range(20_000)]
    grammar = Grammar.json_schema({"enum": texts})
    assert all(grammar.accepts(json.dumps(text)) for text in texts[::4000])
    assert not grammar.accepts('"value 1 of 1"')
