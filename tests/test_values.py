"""Values and keys, wherever they stand: in prompts of any shape, in schemas, in earlier outputs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import json_tokenizer
from schemas import schemas

from lookahead.grammar.dialect import counts_keys
from lookahead.grammar.grammar import Grammar
from lookahead.grammar.properties import _MOST, Property, properties
from lookahead.grammar.values import _EACH, _KEYS, _LONGEST, OUTPUT, PROMPT, SCHEMA, Key, KeyValues, chains, find_values
from lookahead.grammar.vocabulary import Vocabulary

# --- in prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("Name: Ada Lovelace. More text", "name", ["Ada Lovelace"]),
        ("name=Ada", "name", ["Ada"]),
        ("Her name is Ada, and", "name", ["Ada"]),
        ("the names are Ada and Eva!", "names", ["Ada and Eva"]),
        ("The year was 1815.", "year", ["1815"]),
        ("name → Ada\n", "name", ["Ada"]),
        ("First name: Ada", "firstName", ["Ada"]),
        ("First name: Ada", "first_name", ["Ada"]),
        ("FIRST-NAME: Ada", "first name", ["Ada"]),
        ("firstName: Ada", "first_name", ["Ada"]),
        ("my own first name: Ada", "first_name", ["Ada"]),
        ('{"first_name": "Ada", "age": 36}', "first_name", ["Ada"]),
        ('{"first_name": "Ada", "age": 36}', "age", ["36"]),
        ('{"first_name":"Ada","age":36}', "age", ["36"]),
        ("{'first_name' : 'Ada'}", "first_name", ["Ada"]),
        ("| first name | Ada Lovelace |\n| age | 36 |", "first_name", ["Ada Lovelace"]),
        ("| first name | Ada Lovelace |\n| age | 36 |", "age", ["36"]),
        ("| name                       | Ada |", "name", ["Ada"]),
        ("- **Name:** Ada\n- **Age**: 36\n", "name", ["Ada"]),
        ("- **Name:** Ada\n- **Age**: 36\n", "age", ["36"]),
        ("`name`: `Ada`", "name", ["Ada"]),
        ("name:\tAda", "name", ["Ada"]),
        ("x[name] = Ada", "name", ["Ada"]),
        ("price: 1,250.50, net", "price", ["1,250.50"]),
        ("time: 12:30", "time", ["12:30"]),
        ("größe: 12 cm", "Größe", ["12 cm"]),
        ("name: Ada. name: Eva. name: Ada. name: Bo", "name", ["Bo", "Ada", "Eva"]),
        ("name: A. name: B. name: C. name: D", "name", ["D", "C", "B"]),
        ("a b c d e f: 1", "bcdef", ["1"]),
    ],
)
def test_a_value_is_found_however_its_key_is_spelled(text: str, name: str, values: list[str]) -> None:
    assert find_values(text, [name, "other"]) == {name: values}


@pytest.mark.parametrize(
    "text",
    ["", "name", "name Ada", "name:", "name: ", "name:\nAda", "name: {", "name: [1]", 'name: ""', "surname: Ada",
     ": Ada", "name; Ada", "this: Ada", "name: .", "na me x: Ada"],
)  # fmt: skip
def test_nothing_is_found_where_nothing_stands(text: str) -> None:
    assert find_values(text, ["name"]) == {}


def test_keys_that_are_spelled_alike_have_the_same_values() -> None:
    found = find_values("Birth year: 1815", ["birthYear", "birth_year", "year", "", "_", "birth"])
    assert found == {"birthYear": ["1815"], "birth_year": ["1815"], "year": ["1815"]}


LONG = 100_000
HOSTILE = {
    "colons": ":" * LONG,
    "no separators": "word " * (LONG // 5),
    "one word": "a" * LONG,
    "blanks": " " * LONG,
    "tabs": "\t" * LONG,
    "quotes": '"' * LONG,
    "stars behind a key": "name" + "*" * LONG,
    "blanks behind a colon": ":" + " " * LONG + "\n",
    "quotes behind a colon": "name:" + "'" * LONG + "\n",
    "brackets": "])" * (LONG // 2),
    "words and colons": ("a" * 30 + ":" * 30) * (LONG // 60),
    "nearly a key": ("a" * 58 + "!:") * (LONG // 60),
    "is": "is " * (LONG // 3),
    "blank values": ("name:" + " " * 500 + "\n") * (LONG // 506),
    "ends of sentences": "name: " + "a. " * (LONG // 3),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_texts(name: str) -> None:
    """Each would take minutes if a place were looked at more often than some times."""
    text = HOSTILE[name]
    expected = {"ends of sentences": ["a"]}.get(name, [])
    assert find_values(text, ["name", "a"]).get("name", []) == expected
    assert find_values(f"{text}\nname: Ada", ["name"])["name"][0] == "Ada"


@given(st.text(st.sampled_from("na:=| \n\"'*.,is1{[]}éA_-"), max_size=200), st.lists(st.text(max_size=8), max_size=4))
def test_any_text_gives_short_values_that_stand_there(text: str, names: list[str]) -> None:
    for name, values in find_values(text, ["na", "a", *names]).items():
        assert name in ["na", "a", *names]
        assert 0 < len(values) <= _EACH
        assert len(set(values)) == len(values)
        assert all(value in text and 0 < len(value) <= 120 and "\n" not in value for value in values)


# --- in earlier outputs -----------------------------------------------------------------------------------------


def known(*texts: str) -> KeyValues:
    values = KeyValues()
    for text in texts:
        values.add(text)
    return values


def test_the_newest_values_come_first() -> None:
    values = known('{"a": 1}', '{"a": 2, "b": {"a": "x", "c": null}}', '{"a": 1}')
    assert values.of("a") == [1, "x", 2]
    assert known('[{"a": 1}, {"a": 2}]').of("a") == [2, 1], "what stands last is the newest"
    assert known('{"x": {"a": 1}, "a": 2}').of("a") == [2, 1]
    assert values.of("b") == values.of("c") == values.of("nobody") == ()


def test_truth_is_not_a_number() -> None:
    values = known('{"a": true}', '{"a": 1}', '{"a": 1.0}').of("a")
    assert [(value, type(value)) for value in values] == [(1.0, float), (1, int), (True, bool)]
    assert len(known(*(f'{{"a": {i}}}' for i in range(9))).of("a")) == _EACH


def test_a_text_that_is_cut_off_tells_what_it_has() -> None:
    text = json.dumps({"a": 1, "b": {"c": "two", "d": [{"e": 3}, "f"]}})
    for end in range(len(text) + 1):
        values = known(text[:end])
        assert values.of("a") in ((), [1])
        assert values.of("c") in ((), ["two"])
    assert known(text).of("e") == [3]


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[" * 20_000, '{"a":' * 20_000, '{"a": ' + "1" * 5000 + "}", '{"a": "\\ud800"}', "{]", "null", "3",
     '"text"', '{"": 1}', '{"a": null}', '{"' + "a" * 10_000 + '": 1}'],
)  # fmt: skip
def test_what_tells_nothing_is_left_out(text: str) -> None:
    assert not known(text)._known


def test_what_is_kept_is_bounded() -> None:
    values = KeyValues()
    values.add(json.dumps({f"k{i}": i for i in range(_KEYS)}))
    values.add('{"k0": "used again"}')
    values.add('{"new": "' + "x" * LONG + '"}')
    assert len(values._known) == _KEYS
    assert values.of("k0") == ["used again", 0]
    assert values.of("k1") == (), "the key used longest ago"
    assert len(values.of("new")[0]) < 1000
    values.add(json.dumps([{"many": i} for i in range(LONG)]))
    assert len(values.of("many")) == _EACH


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)


@given(st.lists(json_values, max_size=3))
def test_kept_values_equal_naive(outputs: list[Any]) -> None:
    found: dict[str, list[Any]] = {}

    def collect(value: Any) -> None:
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, dict | list):
                collect(inner)
            elif inner is not None and isinstance(name, str):
                found.setdefault(name, []).insert(0, inner)

    for value in outputs:
        collect([value])
    values = known(*map(json.dumps, outputs))
    for name in "abc":
        once: list[Any] = []
        for value in found.get(name, []):
            once += [value] if repr(value) not in map(repr, once) or value != value else []
        assert repr(list(values.of(name))) == repr(once[:_EACH]) or "nan" in repr(once) or "0.0" in repr(once)


# --- chains -----------------------------------------------------------------------------------------------------


def vocabulary() -> Vocabulary:
    return Vocabulary.of(json_tokenizer())


def chained(keys: list[Key], prompt: str = "", *outputs: str) -> list[tuple[int, int, str]]:
    vocab = vocabulary()
    tokens = np.array(vocab.encode(prompt), np.int32)
    made = chains(keys, vocab, tokens, known(*outputs))
    return [(chain.key, chain.place, vocab.decode(chain.tokens).decode("utf-8", "replace")) for chain in made]


def test_chains_are_ordered_by_key_then_by_place() -> None:
    keys = [Key("name", [5], ("Bo", 3)), Key("none", [6], ()), Key("age", [7], (True, "Ada"))]
    made = chained(keys, "Name: Ada\nAge: 36 years\nName: Eva", '{"name": "Lin", "age": 40}')
    assert made == [
        (0, PROMPT, "Eva"), (0, PROMPT, "Ada"), (0, OUTPUT, "Lin"), (0, SCHEMA, "Bo"), (0, SCHEMA, "3"),
        (2, PROMPT, "36 years"), (2, PROMPT, "36"), (2, OUTPUT, "40"), (2, SCHEMA, "true"), (2, SCHEMA, "Ada"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("1,250.50", "1250.5"), ("$1,250", "1250"), ("€3 or so", "3"), ("-7", None), ("1,,2", "12"),
        ("007", "7"), ("x7", None), ("7up", None), ("2024-05-01", "2024"), ("9" * 119, None),
    ],
)  # fmt: skip
def test_numbers_in_a_prompt_are_written_as_numbers_too(said: str, written: str | None) -> None:
    made = [text for _, _, text in chained([Key("n", [5], ())], f"n: {said}")]
    assert made[0] in said
    assert [text for text in made[1:] if not (written or "").startswith(text)] == []
    assert len(made) == (1 if written is None else 2)


def test_chains_are_short_and_told_once() -> None:
    keys = [Key("a", [5], ("x" * LONG, "x" * LONG, "", "x" * LONG + "y"))]
    vocab = vocabulary()
    made = chains(keys, vocab, np.zeros(0, np.int32), known('{"a": "xx"}', json.dumps({"a": "x" * LONG})))
    assert [chain.place for chain in made] == [OUTPUT, OUTPUT, SCHEMA]
    assert all(len(chain.tokens) <= _LONGEST for chain in made)
    assert vocab.decode(made[-1].tokens) == b'"'


def test_only_the_end_of_a_long_prompt_is_searched() -> None:
    keys = [Key("name", [5], ())]
    assert chained(keys, "name: Ada\n" + "filler " * 6000) == []
    assert chained(keys, "filler " * 6000 + "\nname: Ada") == [(0, PROMPT, "Ada")]
    assert chained([], "name: Ada") == []


def test_a_prompt_that_is_no_text_is_harmless() -> None:
    vocab = vocabulary()
    prompt = np.array([*vocab.encode("é")[:1], -1, vocab.size + 5, 0, *vocab.encode("\nname: é")], np.int32)
    assert len(chains([Key("name", [5], ())], vocab, prompt, KeyValues())) == 1


# --- in schemas -------------------------------------------------------------------------------------------------


def names(schema: Any) -> list[str]:
    return [found.name for found in properties(schema)]


def test_properties_come_in_the_order_of_the_schema() -> None:
    schema = {
        "properties": {
            "a": {"type": "object", "properties": {"a1": {}, "a2": {"items": {"properties": {"deep": {}}}}}},
            "b": {"anyOf": [{"properties": {"b1": True}}, {"properties": {"b2": False}}]},
        },
        "additionalProperties": {"properties": {"z": {}}},
        "allOf": [{"properties": {"first": {}}}],
    }
    assert names(schema) == ["first", "a", "a1", "a2", "deep", "b", "b1", "b2", "z"]


def test_shown_values_are_those_of_plain_types() -> None:
    shown = {"const": 1, "default": "d", "example": None, "examples": ["e", [1], "f"]}
    assert properties({"properties": {"a": shown, "b": True, "c": {"examples": {"x": 1}, "default": 0.5}}}) == [
        Property("a", (1, "d", "e")), Property("b", ()), Property("c", (0.5,))
    ]  # fmt: skip


def test_references_are_followed_once() -> None:
    node = {"properties": {"v": {}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}}
    assert names({"$defs": {"node": node}, "$ref": "#/$defs/node"}) == ["v", "next"]
    assert names({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}) == []
    assert names({"properties": {"v": {}, "kid": {"$ref": "#"}}}) == ["v", "kid"] * 2
    assert names({"$ref": "#"}) == []


@pytest.mark.parametrize(
    "reference",
    ["#/$defs/plain", "#/$defs/a~1b", "#/$defs/a~0b", "#/$defs/~01", "#/$defs/list/1"],
)
def test_references_are_json_pointers(reference: str) -> None:
    there = {"properties": {"found": {}}}
    places = {"plain": there, "a/b": there, "a~b": there, "~1": there, "a b": there, "list": [{}, there], "%": there}
    assert names({"$defs": places, "$ref": reference}) == ["found"]


@pytest.mark.parametrize(
    "reference",
    ["", "other.json#/properties", "http://example.org/a", "#/nowhere", "#/list/2",
     "#/list/-1", "#/list/0/x", "#/list/x", 7, None, ["#"]],
)  # fmt: skip
def test_other_references_mean_nothing(reference: Any) -> None:
    schema = {"list": [{}, {}], "$defs": {}, "$ref": reference}
    assert names(schema | {"properties": {"a": {}}}) == ["a"]


@pytest.mark.parametrize("keyword", ["items", "not", "additionalProperties", "then"])
def test_hostile_nesting(keyword: str) -> None:
    schema: dict[str, Any] = {"properties": {"deep": {}}, "minProperties": 3}
    for _ in range(10_000):
        schema = {keyword: schema}
    assert names(schema) == ["deep"]
    assert counts_keys(schema)


def test_nested_properties_and_lists() -> None:
    schema: Any = {}
    for i in range(10_000):
        schema = {"properties": {f"p{i}": schema}}
    assert names(schema) == [f"p{i}" for i in range(9999, 9999 - _MOST, -1)]
    deep: Any = {"minProperties": 2}
    for _ in range(10_000):
        deep = [deep]
    assert not counts_keys({"allOf": deep}), "a list of lists is no schema"


@pytest.mark.parametrize(
    "schema",
    [True, None, 3, [], "x", {"properties": []}, {"properties": {"a": 3}, "allOf": 3}, {"items": [[], 3, None]},
     {"$ref": {}}, {"properties": {3: {}}}],
)  # fmt: skip
def test_what_is_no_schema_is_harmless(schema: Any) -> None:
    assert set(names(schema)) <= {"a", "3"}
    assert not counts_keys(schema)


@pytest.mark.parametrize(
    ("schema", "counts"),
    [
        ({"minProperties": 1}, False),
        ({"minProperties": 2}, True),
        ({"minProperties": 2, "required": ["a", "b"]}, False),
        ({"minProperties": 2, "required": ["a", "a"]}, True),
        ({"minProperties": 3, "required": ["a", "b"]}, True),
        ({"minProperties": 1.5}, True),
        ({"minProperties": True}, False),
        ({"minProperties": "3"}, False),
        ({"properties": {"minProperties": {"type": "integer"}}}, False),
        ({"properties": {"a": {"items": {"minProperties": 2}}}}, True),
        ({"anyOf": [{}, {"minProperties": 2}]}, True),
        ({"default": {"minProperties": 2}, "enum": [{"minProperties": 2}]}, False),
        ({"properties": {"default": {"minProperties": 2}}}, True),
        ({"$defs": {"enum": {"minProperties": 2}}}, True),
        ({"patternProperties": {"const": {"minProperties": 2}}}, True),
        ({"properties": {"properties": {"minProperties": 2}}}, True),
        ({"properties": {"properties": {"properties": {"examples": {"minProperties": 2}}}}}, True),
        ({"enum": [{"properties": {"a": {"minProperties": 2}}}]}, False),
    ],
)
def test_counted_keys(schema: Any, counts: bool) -> None:
    assert counts_keys(schema) is counts


@settings(max_examples=60)
@given(schemas())
def test_all_properties_of_a_schema_are_told(schema: dict[str, Any]) -> None:
    def below(part: Any) -> set[str]:
        if not isinstance(part, dict):
            return set().union(*map(below, part)) if isinstance(part, list) else set()
        inner = [value for word, value in part.items() if word not in ("properties", "enum", "const")]
        named = part.get("properties", {})
        return set(named).union(*map(below, inner), *map(below, named.values()))

    told = names(schema)
    reached = below({key: value for key, value in schema.items() if key != "$defs"})
    assert reached <= set(told) <= below(schema)
    assert told == names(json.loads(json.dumps(schema)))


def test_a_matchers_keys_are_those_of_its_schema() -> None:
    schema = {"properties": {"name": {"default": "Ada"}, 'q"t': {}, "": {}}}
    keys = Grammar.json_schema(schema).matcher(json_tokenizer()).keys
    assert [(key.name, key.examples) for key in keys] == [("name", ("Ada",)), ('q"t', ()), ("", ())]
    written = [vocabulary().decode(key.tokens).decode() for key in keys]
    assert [f' "{text}'.replace(' " "', ' "') for text in written] == [' "name":', ' "q\\"t":', ' "":']
