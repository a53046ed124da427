"""What a grammar is made of, what it refuses and in which words, and the tokenizers that it is compiled for."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from models import JSON_VOCAB, json_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lookahead.errors import GrammarError, InvalidArgument, LookaheadError
from lookahead.grammar import grammar as grammars
from lookahead.grammar.grammar import Grammar, compiled
from lookahead.grammar.matcher import ENDED, ROOT, Matcher
from lookahead.grammar.vocabulary import Vocabulary

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name"],
    "additionalProperties": False,
}


def bits(matcher: Matcher, state: int = ROOT) -> list[int]:
    return np.flatnonzero(np.unpackbits(matcher.mask(state).view(np.uint8), bitorder="little")).tolist()


# Making one


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Grammar.regex("(a"), r"^regex: .*unclosed group"),
        (lambda: Grammar.regex("a(?=b)"), r"^regex: .*look-around.*not supported"),
        (lambda: Grammar.regex(r"(a)\1"), r"^regex: .*backreferences are not supported"),
        (lambda: Grammar.lark("start: thing"), r'^lark: .*unknown name: "thing"'),
        (lambda: Grammar.lark('other: "a"'), r"^lark: no start rule"),
        (lambda: Grammar.lark("start: ("), r"^lark: "),
        (lambda: Grammar.lark(""), r"^lark: Empty grammar"),
        (lambda: Grammar.gbnf("root ::= thing"), r"^gbnf: .*Rule 'thing' not found"),
        (lambda: Grammar.gbnf('other ::= "a"'), r"^gbnf: .*No 'root' rule"),
        (lambda: Grammar.gbnf("!!"), r"^gbnf: .*line 1"),
        (lambda: Grammar.json_schema("{"), r"^json_schema: not JSON: .*line 1 column 2"),
        (lambda: Grammar.json_schema({"const": float("nan")}), r"^json_schema: not JSON"),
        (lambda: Grammar.json_schema('{"const": NaN}'), r"^json_schema: not JSON"),
        (lambda: Grammar.json_schema({"enum": {1, 2}}), r"^json_schema: not JSON.*set"),
        (lambda: Grammar.json_schema(b"{}"), r"^json_schema: not JSON.*bytes"),
        (lambda: Grammar.json_schema("[]"), r"^json_schema: a schema is an object, not list"),
        (lambda: Grammar.json_schema("3"), r"^json_schema: a schema is an object, not int"),
        (lambda: Grammar.json_schema(None), r"^json_schema: a schema is an object, not NoneType"),
        (lambda: Grammar.json_schema(False), r"^json_schema: the schema false allows no value"),
        (lambda: Grammar.json_schema("false"), r"^json_schema: the schema false allows no value"),
        (lambda: Grammar.json_schema({"type": "strnig"}), r"^json_schema: .*strnig"),
        (lambda: Grammar.json_schema({"type": 7}), r"^json_schema: type must be a string"),
        (lambda: Grammar.json_schema({"properties": []}), r"^json_schema: properties must be an object"),
        (lambda: Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), r"^json_schema: Unsatisfiable"),
        (lambda: Grammar.json_schema({"enum": ["\ud800"]}), r"^json_schema: .*ud800"),
        (lambda: Grammar.json_schema('{"enum": ["\\ud800"]}'), r"^json_schema: .*ud800"),
        (lambda: Grammar.json_schema({"type": "string", "pattern": "("}), r"^json_schema: .*unclosed"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_in_the_engines_words(make: Any, says: str) -> None:
    with pytest.raises(GrammarError, match=f"(?s){says}") as caught:
        make()
    assert isinstance(caught.value, LookaheadError)
    assert isinstance(caught.value, ValueError)
    assert "<state>" not in str(caught.value)
    assert "non-verbose" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Grammar.regex(5), "regex takes a string, not a int"),
        (lambda: Grammar.lark(None), "lark takes a string, not a NoneType"),
        (lambda: Grammar.gbnf(b"root"), "gbnf takes a string, not a bytes"),
        (lambda: Grammar.regex("\ud800"), "regex: not a text"),
        (lambda: Grammar.lark('start: "\ud800"'), "lark: not a text"),
        (lambda: Grammar.gbnf('root ::= "\ud800"'), "gbnf: not a text"),
        (lambda: Grammar.choice(["\ud800"]), "choice: not a text"),
        (lambda: Grammar.choice([]), "choice needs one or more non-empty strings"),
        (lambda: Grammar.choice(""), "choice needs one or more non-empty strings"),
        (lambda: Grammar.choice(["a", ""]), "choice needs one or more non-empty strings"),
        (lambda: Grammar.choice([1]), "choice needs one or more non-empty strings"),
        (lambda: Grammar.choice(5), "choice needs one or more non-empty strings, got 5"),
        (lambda: Grammar.json_schema({}, whitespace="flexible"), "'flexible'; choose from fixed, compact, indented"),
        (lambda: Grammar.json_schema({}, whitespace=["fixed"]), "choose from fixed, compact, indented"),
    ],
)
def test_arguments_that_make_no_sense_are_named(make: Any, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        make()


def test_keywords_that_are_not_supported_are_refused_by_name() -> None:
    schema = {"not": {"type": "null"}, "properties": {"a": {"uniqueItems": True, "type": "array"}}}
    with pytest.raises(GrammarError, match=r'Unimplemented keys: \["not"\]; leave them out .* lenient=True'):
        Grammar.json_schema({"not": {"type": "null"}})
    with pytest.raises(GrammarError, match=r'\["if", "then"\]'):
        Grammar.json_schema({"if": {}, "then": {}})
    with pytest.raises(GrammarError, match=r"Unknown format: regex; leave .* lenient=True"):
        Grammar.json_schema({"type": "string", "format": "regex"})
    with pytest.raises(GrammarError, match=r"uniqueItems|not"):
        Grammar.json_schema(schema)


def test_what_says_nothing_is_left_out() -> None:
    schema = {"type": "array", "uniqueItems": False, "not": False, "dependencies": {}, "propertyNames": {}, "if": True}
    grammar = Grammar.json_schema(schema | {"items": {"type": "integer", "format": "int32"}})
    assert grammar.dropped == ("format: int32",)
    assert grammar.accepts("[1, 1]")
    assert not grammar.accepts('["a"]')
    named = {"type": "object", "properties": {"format": {"const": "int32"}, "not": {"const": False}}}
    assert Grammar.json_schema(named).accepts('{"format": "int32", "not": false}')
    assert Grammar.json_schema({"enum": [{"uniqueItems": False}]}).accepts('{"uniqueItems": false}')


@pytest.mark.parametrize(
    "inside", [{"minItems": 1, "type": "array", "items": {}}, {"type": "object", "required": ["a"]}]
)
def test_values_that_never_end_are_refused(inside: dict[str, Any]) -> None:
    again: dict[str, Any] = {"$ref": "#/$defs/t"}
    inner = inside | ({"items": again} if "items" in inside else {"properties": {"a": again}})
    with pytest.raises(GrammarError, match="no value can be valid"):
        Grammar.json_schema({"$defs": {"t": inner}, **again})
    leaf = {"$defs": {"t": {"anyOf": [inner, {"type": "null"}]}}, **again}
    assert Grammar.json_schema(leaf).accepts("[null]" if "items" in inside else '{"a": null}')


@pytest.mark.parametrize("text", ["a\x01", "x\x7fy", "\ud800"])
def test_strings_that_cannot_be_written_are_refused(text: str) -> None:
    for schema in ({"const": text}, {"enum": [{"a": [text]}]}, {"properties": {text: {}}}):
        with pytest.raises(GrammarError, match=r"cannot be written|surrogates"):
            Grammar.json_schema(schema)
    assert Grammar.json_schema({"const": "a\tb"}).accepts('"a\\tb"')


def test_lenient_lists_what_it_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"not": {"type": "null"}, "type": "integer"},
            "b": {"type": "array", "uniqueItems": True},
            "c": {"type": "string", "format": "zip-code"},
        },
        "required": ["a"],
    }
    grammar = Grammar.json_schema(schema, lenient=True)
    assert set(grammar.dropped) == {"not", "uniqueItems", "format: zip-code"}
    assert grammar.accepts('{"a": 1}')
    assert not grammar.accepts('{"a": "x"}')
    assert Grammar.json_schema(PERSON, lenient=True).dropped == ()
    assert Grammar.json_schema(PERSON).dropped == ()


def test_kinds_and_texts_are_kept() -> None:
    for kind, grammar, text in (
        ("json_schema", Grammar.json_schema(PERSON), PERSON),
        ("json_schema", Grammar.json_schema(json.dumps(PERSON)), PERSON),
        ("json_schema", Grammar.json_schema(MappingProxyType(PERSON)), PERSON),
        ("json_schema", Grammar.json_schema(True), True),
        ("choice", Grammar.choice(["b", "a"]), ["b", "a"]),
    ):
        assert (grammar.kind, json.loads(grammar.text)) == (kind, text)
    assert Grammar.regex("a+").text == "a+"
    assert Grammar.regex("a+") != Grammar.regex("a+")
    assert "a+" not in repr(Grammar.regex("a+")), "sources may be long"
    with pytest.raises(AttributeError):
        Grammar.regex("a").text = "b"


def test_schema_given_as_mapping_text_or_true() -> None:
    for schema in (PERSON, json.dumps(PERSON), MappingProxyType(PERSON)):
        assert Grammar.json_schema(schema).accepts('{"name": "x", "age": 3}')
        assert not Grammar.json_schema(schema).accepts('{"name": "x", "agge": 3}')
    for anything in (True, "true", {}, "{}"):
        grammar = Grammar.json_schema(anything)
        assert all(grammar.accepts(text) for text in ("null", '{"a": [1, {}]}', "-1.5e3", '""'))
        assert not any(grammar.accepts(text) for text in ("", "nul", "{", "[1,2]", "01", "'a'"))


# What is in one


def written(value: Any) -> dict[str, str]:
    """Return a value in every way of writing it that a mode knows."""
    return {
        "fixed": json.dumps(value),
        "compact": json.dumps(value, separators=(",", ":")),
        "indent 2": json.dumps(value, indent=2),
        "indent 4": json.dumps(value, indent=4),
    }


@pytest.mark.parametrize("whitespace", ["fixed", "compact", "indented"])
def test_white_space(whitespace: Any) -> None:
    grammar = Grammar.json_schema(PERSON, whitespace=whitespace)
    texts = written({"name": "a b", "age": 3, "tags": [1, []]})
    accepted = {name for name, text in texts.items() if grammar.accepts(text)}
    assert accepted == (set(texts) if whitespace == "indented" else {whitespace})
    in_strings = '{"name": " a  b \\n"}' if whitespace != "compact" else '{"name":" a  b \\n"}'
    assert grammar.accepts(in_strings)


@pytest.mark.parametrize(
    ("text", "indented"),
    [
        ('{ "name": "a" }', True),
        ('{"name":"a", "age" : 1}', True),
        ('{\n"name": "a"\n}', True),
        ("{\n" + 40 * " " + '"name": "a"}', True),
        ("{\n" + 41 * " " + '"name": "a"}', False),
        ('{\n\n"name": "a"}', False),
        ('{  "name": "a"}', False),
        ('{\t"name": "a"}', False),
        ('{\r\n"name": "a"}', False),
        (' {"name": "a"}', False),
        ('{"name": "a"} ', False),
        ('{"name": "a"}\n', False),
    ],
)
def test_white_space_in_odd_places(text: str, indented: bool) -> None:
    assert Grammar.json_schema(PERSON, whitespace="indented").accepts(text) == indented
    assert not Grammar.json_schema(PERSON).accepts(text)
    assert not Grammar.json_schema(PERSON, whitespace="compact").accepts(text)


def test_keys_come_in_the_order_of_the_schema() -> None:
    grammar = Grammar.json_schema(PERSON)
    assert grammar.accepts('{"name": "x", "age": 3, "tags": []}')
    assert not grammar.accepts('{"age": 3, "name": "x"}')


@pytest.mark.parametrize(
    "options",
    [{"whitespace_pattern": "x*"}, {"whitespace_flexible": True}, {"item_separator": ";"}, {"key_separator": "="},
     {"json_allow_general_unicode_escapes": True}, {"nonsense": 1}, 7],
    ids=repr,
)  # fmt: skip
def test_schema_cannot_set_options_of_the_engine(options: Any) -> None:
    for whitespace, text in (("fixed", '{"name": "a"}'), ("compact", '{"name":"a"}'), ("indented", '{ "name":"a"}')):
        grammar = Grammar.json_schema(PERSON | {"x-guidance": options}, whitespace=whitespace)  # type: ignore[arg-type]
        assert grammar.accepts(text)
        for other in ('{x"name": "a"}', '{"name"="a"}', '{"name": "a"; "age": 1}', '{"name": "\\u00e9"}'):
            assert not grammar.accepts(other)
    for hidden in ({"lenient": True}, {"coerce_one_of": True}):
        with pytest.raises(GrammarError, match=r"Unimplemented keys|oneOf is supported only"):
            Grammar.json_schema({"x-guidance": hidden} | ({"not": {}} if "lenient" in hidden else {"oneOf": [{}, {}]}))


def test_own_keys_cannot_be_spelled_as_other_keys() -> None:
    """Read by a JSON parser, this "a" would replace the one that the schema speaks of."""
    grammar = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]})
    assert grammar.accepts('{"a": 1, "b": "x"}')
    for key in ('"a"', '"\\u0061"'):
        assert not grammar.accepts(f'{{"a": 1, {key}: "x"}}')


def test_accepts_judges_whole_texts() -> None:
    number = Grammar.regex("[0-9]+(é|日)?")
    assert [number.accepts(text) for text in ("12", "12é", "1日", "", "a", "12 ", "12éé")] == [True] * 3 + [False] * 4
    assert not number.accepts("1\ud800")
    assert Grammar.regex("").accepts("")
    assert not Grammar.regex("").accepts("a")
    assert Grammar.lark('start: "a" start | "b"').accepts("aaab")
    assert Grammar.gbnf('root ::= "a" root | [0-9]+').accepts("aa19")
    long = "a" * 100_000
    assert Grammar.regex("a*").accepts(long)
    assert not Grammar.regex("a*").accepts(long + "b")


ODD = ['"', "\\", "\n", "é", "日本", "\x00", "\x7f", "\u2028", "a|b", "/x/", "😀", "\t\r", "%", "'", " ", "\x1b",
       "\x85", "//", "#", '"a" | "b"', "\\n", "\\u0041", "<eos>", "start", "🇩🇪", "e\u0301"]  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=repr)
def test_choice_takes_texts_as_they_are(text: str) -> None:
    for grammar in (Grammar.choice([text]), Grammar.choice(ODD), Grammar.choice(text)):
        assert grammar.accepts(text)
        assert not grammar.accepts(text + "x")
        assert not grammar.accepts("")


letters = st.characters(exclude_categories=["Cs"])
texts = st.lists(st.text(letters, min_size=1, max_size=4), min_size=1, max_size=6)


@given(options=texts, other=st.text(letters, max_size=4))
def test_choice_is_exactly_its_texts(options: list[str], other: str) -> None:
    grammar = Grammar.choice(iter(options))
    assert json.loads(grammar.text) == options
    for text in {other, *options, *(option[:-1] for option in options), *(option + "a" for option in options)}:
        assert grammar.accepts(text) == (text in options)


def test_choice_of_prefixes_of_each_other() -> None:
    tokenizer = json_tokenizer()
    grammar = Grammar.choice(["a", "ab", "abc", "a"])
    assert [grammar.accepts(text) for text in ("a", "ab", "abc", "abcd", "b")] == [True, True, True, False, False]
    matcher = grammar.matcher(tokenizer)
    a, b, c, ab, abc, end = tokenizer.convert_tokens_to_ids(["a", "b", "c", "ab", "abc", "<eos>"])
    assert bits(matcher) == sorted([a, ab, abc])
    assert bits(matcher, matcher.follow([a])) == sorted([end, b])
    assert bits(matcher, matcher.follow([a, b])) == bits(matcher, matcher.follow([ab])) == sorted([end, c])
    assert bits(matcher, matcher.follow([abc])) == [end]


# Compiling


def test_compiled_once_for_each_tokenizer() -> None:
    tokenizer, other = fresh(), fresh()
    make = grammars.Compiled.__init__
    with mock.patch.object(grammars.Compiled, "__init__", autospec=True, side_effect=make) as made:
        for _ in range(3):
            for grammar in (Grammar.regex("a+b"), Grammar.regex("a+b")):
                grammar.matcher(tokenizer).close()
        assert made.call_count == 1
        Grammar.regex("a+b").matcher(other).close()
        assert made.call_count == 2
        Grammar.regex("a+c").matcher(tokenizer).close()
        assert made.call_count == 3
        Grammar.lark("start: /a+b/").matcher(tokenizer).close()
        assert made.call_count == 4


def test_every_request_has_an_engine_of_its_own() -> None:
    vocabulary = Vocabulary.of(fresh())
    grammar = Grammar.regex("a+b")
    with mock.patch.object(grammars.Compiled, "make", autospec=True, side_effect=grammars.Compiled.make) as made:
        matchers = [grammar.matcher(vocabulary) for _ in range(12)]
        assert made.call_count == 1
    assert len({id(matcher._engine) for matcher in matchers}) == 12
    compiled(grammar, vocabulary).renew()
    assert grammar.matcher(vocabulary).accepts() is False


def test_only_so_many_grammars_are_kept() -> None:
    vocabulary = Vocabulary.of(fresh())
    first = compiled(Grammar.regex("a0"), vocabulary)
    for n in range(1, 64):
        compiled(Grammar.regex(f"a{n}"), vocabulary)
    assert compiled(Grammar.regex("a0"), vocabulary) is first
    for n in range(64, 127):
        compiled(Grammar.regex(f"a{n}"), vocabulary)
    assert compiled(Grammar.regex("a0"), vocabulary) is first, "the one that was used last goes last"
    for n in range(127, 192):
        compiled(Grammar.regex(f"a{n}"), vocabulary)
    assert compiled(Grammar.regex("a0"), vocabulary) is not first
    assert len(vocabulary.compiled) == 64


def test_what_was_compiled_goes_with_the_tokenizer() -> None:
    tokenizer = fresh()
    grammar = Grammar.regex("a+b")
    grammar.matcher(tokenizer).close()
    vocabulary = weakref.ref(Vocabulary.of(tokenizer))
    engines = weakref.ref(compiled(grammar, Vocabulary.of(tokenizer)))
    assert Vocabulary.of(tokenizer) is vocabulary()
    del tokenizer
    gc.collect()
    assert vocabulary() is None
    assert engines() is None


# Tokenizers


def byte_level(vocab: Mapping[str, int]) -> Tokenizer:
    core = Tokenizer(models.BPE(vocab=dict(vocab), merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return core


def fresh() -> Any:
    """Return a tokenizer that nobody has seen: end token, three letters, a pair."""
    core = byte_level({"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4})
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_vocabulary_tells_bytes() -> None:
    vocabulary = Vocabulary.of(json_tokenizer())
    assert vocabulary.size == len(json_tokenizer()) == JSON_VOCAB - 5
    assert vocabulary.end == 1
    assert vocabulary.bytes[:5] == [b"", b"", b"", b"\n", b" "]
    assert vocabulary.decode(vocabulary.encode('{"é": " a"}')) == '{"é": " a"}'.encode()
    assert vocabulary.decode([-1, 0, 1, 2, 10_000]) == b""
    assert Vocabulary.of(vocabulary) is vocabulary


@pytest.mark.parametrize(
    "tokenizer",
    [object(), None, "gpt2", hf.PreTrainedTokenizerFast],
    ids=["object", "None", "name", "class"],
)
def test_tokenizers_that_give_no_bytes(tokenizer: Any) -> None:
    with pytest.raises(GrammarError, match="pass the model's fast tokenizer"):
        Grammar.regex("a").matcher(tokenizer)


class Slow(hf.PreTrainedTokenizer):
    """A tokenizer in Python."""

    vocab_size = 2

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


def test_slow_tokenizer() -> None:
    slow = Slow()
    with pytest.raises(GrammarError, match="a Slow does not tell; pass the model's fast tokenizer"):
        Grammar.regex("a").processor(slow)


@pytest.mark.parametrize(
    "core",
    [
        Tokenizer(models.WordLevel(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        Tokenizer(models.WordPiece(vocab={"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]")),
        Tokenizer(models.BPE()),
    ],
    ids=["words", "word pieces", "empty"],
)
def test_tokenizers_that_the_engine_cannot_read(core: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="cannot read this tokenizer"):
        Grammar.regex("a").matcher(core)


def test_a_bare_tokenizer_will_do_and_is_left_as_it_was() -> None:
    core = copy.deepcopy(json_tokenizer().backend_tokenizer)
    core.enable_padding(length=9)
    core.enable_truncation(2)
    before = core.to_str()
    matcher = Grammar.regex("ab?").matcher(core)
    assert matcher.accepts(matcher.follow(core.encode("ab").ids[:1]))
    assert core.to_str() == before


def test_tokenizer_that_names_no_end() -> None:
    """The engine would take token 0 for the end, an ordinary letter here."""
    for letters in ("abc", "abcdefghijklmnopqrstuvwxyzABCDEF"):  # the second fills a word of the mask
        core = byte_level({letter: i for i, letter in enumerate(letters)})
        vocabulary = Vocabulary.of(core)
        assert (vocabulary.end, vocabulary.size) == (None, len(letters))
        matcher = Grammar.regex("[abc]*").matcher(core)
        assert bits(matcher) == [0, 1, 2]
        assert matcher.accepts()
        assert matcher.child(ROOT, 0) != ENDED
        with pytest.raises(InvalidArgument, match="names none; pass eos_token_id"):
            Grammar.regex("[abc]*").processor(core)
        assert Grammar.regex("[abc]*").processor(core, eos_token_id=2)


def test_numbers_without_a_token() -> None:
    """The engine counts tokens, and would cut the vocabulary short."""
    core = byte_level({"a": 0, "c": 3, "b": 40})
    vocabulary = Vocabulary.of(core)
    assert vocabulary.size == 41
    assert [i for i, text in enumerate(vocabulary.bytes) if text] == [0, 3, 40]
    assert bits(Grammar.regex(".*").matcher(core)) == [0, 3, 40]


def test_tokenizer_that_grows_or_changes_its_end() -> None:
    tokenizer, grammar = fresh(), Grammar.regex("(ab?|foo)*")
    before = Vocabulary.of(tokenizer)
    assert bits(grammar.matcher(tokenizer)) == [0, 1, 4]
    tokenizer.add_tokens(["foo"])
    assert Vocabulary.of(tokenizer) is not before
    assert bits(grammar.matcher(tokenizer)) == [0, 1, 4, 5]
    tokenizer.eos_token = "c"
    assert bits(grammar.matcher(tokenizer)) == [1, 3, 4, 5]


@pytest.mark.parametrize("size", [3, 4, 5, 6, 31, 32, 33, 64, 1000])
def test_models_with_more_or_fewer_tokens(size: int) -> None:
    tokenizer, grammar = fresh(), Grammar.regex("[abc]*")
    allowed = [token for token in range(5) if token < size]
    matcher = grammar.matcher(tokenizer, size=size)
    assert bits(matcher) == allowed
    assert matcher.masks.shape[1] * 32 >= size
    assert matcher.child(ROOT, 4) == (ENDED if size < 5 else 2)
    beyond = grammar.matcher(tokenizer, size=size, ends=[7, 999])
    assert bits(beyond) == [token for token in (1, 2, 3, 4, 7, 999) if token < size]


def test_several_ends_and_ends_that_are_text() -> None:
    tokenizer, grammar = fresh(), Grammar.regex("a+b?")
    matcher = grammar.matcher(tokenizer, ends=[0, 3])
    assert bits(matcher) == [1, 4]
    assert bits(matcher, matcher.follow([1])) == [0, 1, 2, 3, 4]
    for end in (0, 3):
        assert matcher.child(ROOT, end) == matcher.follow([1, end]) == ENDED
    # "b" ends texts: then it is no letter any more, and stands exactly where a text may end.
    matcher = grammar.matcher(tokenizer, ends=[2])
    assert bits(matcher) == [1, 4]
    assert bits(matcher, matcher.follow([1])) == [1, 2, 4]
    assert bits(matcher, matcher.follow([4])) == [2]
    assert matcher.follow([1, 2]) == ENDED
    # the tokenizer's own end is not allowed where the generation knows other ends
    assert 0 not in bits(matcher, matcher.follow([1]))
    # and the whole text may consist of nothing else
    with pytest.raises(GrammarError, match="vocabulary cannot write"):
        Grammar.choice(["b"]).matcher(tokenizer, ends=[2]).mask(ROOT)


def sentence_piece() -> Any:
    """Return a tokenizer with "▁" for spaces, and bytes for what it has no letters for."""
    special = ["<unk>", "<s>", "</s>"]
    letters = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab"]
    vocab = {token: i for i, token in enumerate(special + letters)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.add_special_tokens(special)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def test_tokens_that_begin_with_a_space() -> None:
    """The space of "▁a" counts, at the start of a text as well: a grammar that begins with a letter refuses it."""
    tokenizer = sentence_piece()
    vocabulary = Vocabulary.of(tokenizer)
    number = tokenizer.convert_tokens_to_ids
    for token, text in (("▁a", b" a"), ("a", b"a"), ("▁", b" "), ("<0x41>", b"A"), ("</s>", b"")):
        assert vocabulary.bytes[number(token)] == text
    matcher = Grammar.regex("ab a").matcher(tokenizer)
    assert set(bits(matcher)) <= {number("a"), number("ab"), number("<0x61>")}
    state = matcher.follow([number("ab")])
    assert number("▁a") in bits(matcher, state)
    assert matcher.accepts(matcher.follow([number("ab"), number("▁a")]))
    assert number("▁ab") in bits(Grammar.regex(" ?(ab|c)").matcher(tokenizer))


def test_letters_without_a_token_are_written_in_bytes() -> None:
    tokenizer = sentence_piece()
    matcher, tokens = Grammar.choice(["é"]).matcher(tokenizer), [3 + byte for byte in "é".encode()]
    assert bits(matcher) == tokens[:1]
    assert matcher.accepts(matcher.follow(tokens))
    assert Vocabulary.of(tokenizer).decode(tokens) == "é".encode()


@given(text=st.text("ab é{}日", min_size=1, max_size=8))
def test_what_a_tokenizer_writes_is_accepted_token_by_token(text: str) -> None:
    for tokenizer in (sentence_piece(), fresh(), json_tokenizer()):
        vocabulary = Vocabulary.of(tokenizer)
        tokens = vocabulary.encode(text)
        if vocabulary.decode(tokens).decode(errors="replace") != text:
            continue  # this tokenizer cannot write it
        matcher = Grammar.regex("(.|\n)*").matcher(tokenizer)
        assert matcher.accepts(matcher.follow(tokens))
        assert matcher.follow(tokens) != ENDED


def test_an_engine_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment of vLLM, where grammars are vLLM's own."""
    monkeypatch.setattr(grammars, "version", lambda _: "1.7.6")
    grammars._engine.cache_clear()
    try:
        with pytest.raises(GrammarError, match=r"grammars need llguidance 1\.9, and 1\.7\.6 is installed; pip install"):
            Grammar.regex("[0-9]+")
    finally:
        monkeypatch.undo()
        grammars._engine.cache_clear()
    assert Grammar.regex("[0-9]+").accepts("12")
