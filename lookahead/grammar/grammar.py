"""What a text may be: JSON of a schema, a regular expression, a context-free grammar."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lookahead.errors import GrammarError, InvalidArgument
from lookahead.grammar.dialect import adapted, counts_keys
from lookahead.grammar.matcher import Matcher, engine_words
from lookahead.grammar.properties import properties
from lookahead.grammar.values import Key
from lookahead.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lookahead.grammar.processor import GrammarProcessor

T = TypeVar("T")
Whitespace = Literal["fixed", "compact", "indented"]

# Flexible white space forces little, and models run away in it.
_WHITESPACE: dict[str, dict[str, Any]] = {
    "fixed": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "compact": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
    "indented": {"whitespace_flexible": True, "whitespace_pattern": r"(\n {0,40}| )?"},
}
# Without \u, by which the engine lets one of the schema's own keys be spelled as if it were another key.
_ESCAPES = '"\\bfnrt'
# Several times the engine's defaults: what takes longer than a second or so is an error, not a hang.
_ENGINE = 1, 9  # the version whose masks are those that we tested
_LIMITS: dict[str, Any] = {"initial_lexer_fuel": 4_000_000, "step_lexer_fuel": 1_000_000, "step_max_items": 200_000}
_LARGEST, _SHALLOW, _STACK = 4_000_000, 20_000, 1 << 30  # characters of a grammar; bytes, used as needed
_KEPT = 64  # grammars compiled for one tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A set of texts that the output must be in.

    Make one with `json_schema`, `regex`, `lark`, `gbnf`, `choice` or `named`. It knows no tokenizer: it is compiled
    when it is first used with one, and the result kept there.

    Attributes:
        kind: which of those made it.
        text: what it was made of.
        source: the same for the grammar engine, llguidance.
        dropped: what was left out of a JSON Schema.
    """

    kind: str
    text: str = field(repr=False)
    source: str = field(repr=False)
    dropped: tuple[str, ...] = ()

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any] | str | bool, *, whitespace: Whitespace = "fixed", lenient: bool = False
    ) -> Grammar:
        """Return the grammar of the JSON values that are valid against a schema.

        Args:
            schema: a JSON Schema, as a mapping or as JSON.
            whitespace: "fixed" (one line, ", " and ": "), "compact" (none at all), or "indented" (line breaks and
                indentation where JSON allows white space, as the model likes, but never more than 40 spaces).
            lenient: leave out the keywords that the engine does not know, and list them in `dropped`; else they are
                refused by name. A format that JSON Schema does not name is always left out, and listed.

        Raises:
            GrammarError: not JSON, not a schema, or one with keywords that are not supported.

        >>> Grammar.json_schema({"type": "array", "items": {"enum": ["yes", "no"]}}).kind
        'json_schema'
        """
        if not isinstance(whitespace, str) or whitespace not in _WHITESPACE:
            raise InvalidArgument(f"whitespace={whitespace!r}; choose from {', '.join(_WHITESPACE)}")
        text, value = _schema(schema)
        if counts_keys(value) and not lenient:
            raise GrammarError(
                "json_schema: minProperties cannot be enforced, since a key may be written twice; leave it out where "
                "it asks for more than the required keys, or give lenient=True"
            )
        value, formats = adapted(value)
        try:
            options = _WHITESPACE[whitespace] | {"lenient": lenient, "json_allowed_escapes": _ESCAPES}
            source = _engine().grammar_from_json_schema(value, overrides=options)
        except ValueError as error:  # half of a surrogate pair, for one
            raise GrammarError(f"json_schema: {error}") from error
        grammar = cls._checked("json_schema", text, source)
        more = ["minProperties"] if counts_keys(value) else []
        return replace(grammar, dropped=(*grammar.dropped, *more, *formats))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Return the grammar of the texts that match all of `pattern` (Rust's syntax, without look-around)."""
        return cls._checked("regex", pattern, _engine().grammar_from_regex(_str("regex", pattern)))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Return the grammar that `text` describes, in llguidance's dialect of Lark; its start rule is `start`."""
        return cls._checked("lark", text, _engine().grammar_from_lark(_str("lark", text)))

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """Return the grammar that `text` describes, in llama.cpp's GBNF; its start rule is `root`."""
        from llguidance import grammar_from

        _str("gbnf", text)
        try:
            source = grammar_from("gbnf", text)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"gbnf: {error}") from error
        return cls._checked("gbnf", text, source)

    @classmethod
    def choice(cls, options: Iterable[str]) -> Grammar:
        """Return the grammar of exactly these texts."""
        texts = [options] if isinstance(options, str) else list(options) if isinstance(options, Iterable) else []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise InvalidArgument(f"choice needs one or more non-empty strings, got {options!r}")
        words = " | ".join(_quoted(_str("choice", text)) for text in dict.fromkeys(texts))
        return cls._checked("choice", json.dumps(texts), _engine().grammar_from_lark(f"start: WORD\nWORD: {words}\n"))

    @classmethod
    def named(cls, name: str) -> Grammar:
        """Return one of the grammars that come with this library; `lookahead grammars` lists them."""
        from lookahead.grammar.library import read

        entry = read(name)
        make = cls.regex if entry.kind == "regex" else cls.lark
        return make(entry.text)

    @classmethod
    def _checked(cls, kind: str, text: str, source: str) -> Grammar:
        if len(source) > _LARGEST:
            raise GrammarError(f"{kind}: {len(source)} characters are too many, {_LARGEST} at most")
        check = _engine().validate_grammar_with_warnings
        failed, messages = with_room(len(source), lambda: check(source, limits=_limits()))
        if failed:
            raise GrammarError(f"{kind}: {_explained(messages[0])}")
        return cls(kind, text, source, tuple(dict.fromkeys(_dropped(messages))))

    def matcher(self, tokenizer: Any, *, ends: Sequence[int] | None = None, size: int | None = None) -> Matcher:
        """Return what follows one text through this grammar.

        Args:
            tokenizer: the model's fast tokenizer, or a `Vocabulary`.
            ends: tokens that end a text; None: the tokenizer's end token.
            size: tokens the model knows; None: as many as the tokenizer.

        Raises:
            GrammarError: it does not compile for this tokenizer.
        """
        vocabulary = Vocabulary.of(tokenizer)
        default = () if vocabulary.end is None else (vocabulary.end,)
        size = vocabulary.size if size is None else size
        return Matcher(compiled(self, vocabulary), default if ends is None else ends, size)

    def processor(self, tokenizer: Any, *, eos_token_id: int | Sequence[int] | None = None) -> GrammarProcessor:
        """Return a logits processor that keeps `model.generate()` to this grammar: one for each call.

        Args:
            tokenizer: the model's fast tokenizer.
            eos_token_id: tokens that end a text; None: the tokenizer's end token.
        """
        from lookahead.grammar.processor import GrammarProcessor

        return GrammarProcessor(self, tokenizer, eos_token_id=eos_token_id)

    def accepts(self, text: str) -> bool:
        """Return whether `text` is in the grammar.

        >>> Grammar.regex("[0-9]+").accepts("12")
        True
        """
        from llguidance import LLTokenizer

        source = self.source
        engine = with_room(len(source), lambda: _engine()(LLTokenizer("byte"), source, log_level=0, limits=_limits()))
        data = text.encode(errors="surrogatepass")
        whole = all(not engine.is_stopped() and engine.consume_token(byte) for byte in data)
        return bool(whole and not engine.is_error() and engine.is_accepting())


class Compiled:
    """A grammar compiled for one tokenizer: engines that start at its beginning, one for each request.

    Copies of one engine share what the lexer has found out, which makes masks faster from request to request, and the
    lexer's failures: after one, all later engines are copies of a new one.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self._source, self._kind, self.vocabulary = grammar.source, grammar.kind, vocabulary
        self.size, self.ends = vocabulary.engine.vocab_size, tuple(vocabulary.engine.eos_tokens)
        self._first: Any = self.make()
        trial = self._first.deep_copy()
        trial.compute_bitmask()  # what fails at its first mask is refused here
        self._check(trial)
        self.keys = _keys(grammar, vocabulary)

    def make(self) -> Any:
        """Return a new engine, which shares nothing."""
        source, tokens = self._source, self.vocabulary.engine
        engine = with_room(len(source), lambda: _engine()(tokens, source, log_level=0, limits=_limits()))
        self._check(engine)
        return engine

    def _check(self, engine: Any) -> None:
        if engine.is_error():
            raise GrammarError(f"{self._kind}: {_explained(engine.get_error())}")

    def take(self) -> Any:
        """Return an engine at the beginning."""
        return self._first.deep_copy()

    def renew(self) -> Any:
        """Return one that shares nothing with those given so far, of which one has failed; nor will later ones."""
        self._first = self.make()
        return self._first.deep_copy()


def _keys(grammar: Grammar, vocabulary: Vocabulary) -> list[Key]:
    keys: list[Key] = []
    for name, examples in properties(json.loads(grammar.text)) if grammar.kind == "json_schema" else ():
        tokens = vocabulary.encode(f" {json.dumps(name, ensure_ascii=False)}:")
        sizes = [len(vocabulary.bytes[token]) for token in tokens]
        begin = next((i for i in range(len(tokens)) if sum(sizes[: i + 1]) > 2), 0)
        keys.append(Key(name, tokens[begin:], examples))
    return keys


def with_room(size: int, action: Callable[[], T]) -> T:
    """Return what `action` gives, in a thread with a stack for a grammar of `size` characters.

    The engine goes down a chain of rules by recursion, and ends the process where the stack does.
    """
    if size < _SHALLOW:
        return action()
    with _LOCK:
        before = threading.stack_size(_STACK)
        try:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(action).result()
        finally:
            threading.stack_size(before)


_LOCK = threading.Lock()


def compiled(grammar: Grammar, vocabulary: Vocabulary) -> Compiled:
    """Return `grammar` compiled for a tokenizer; of the same text only once, as long as it is in use."""
    known: OrderedDict[str, Compiled] = vocabulary.compiled
    with _LOCK:
        if grammar.source in known:
            known.move_to_end(grammar.source)
            return known[grammar.source]
    made = Compiled(grammar, vocabulary)
    with _LOCK:
        known[grammar.source] = made
        if len(known) > _KEPT:
            known.popitem(last=False)
    return made


@cache
def _engine() -> Any:
    """Return the class of the grammar engine.

    Raises:
        GrammarError: it is too old; the environments of vLLM have one that writes other white space.
    """
    from llguidance import LLMatcher

    found = version("llguidance")
    if tuple(map(int, found.split(".")[:2])) < _ENGINE:
        least = ".".join(map(str, _ENGINE))
        raise GrammarError(
            f"grammars need llguidance {least}, and {found} is installed; pip install 'llguidance>={least}'"
        )
    return LLMatcher


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False, **_LIMITS)


def _str(kind: str, text: Any) -> str:
    if not isinstance(text, str):
        raise InvalidArgument(f"{kind} takes a string, not a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{kind}: not a text that can be written down: {error}") from error
    return text


def _quoted(text: str) -> str:
    """Return `text` as a string of Lark; its dialect refuses a bare DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _schema(schema: Any) -> tuple[str, dict[str, Any]]:
    """Return a schema as JSON and as the object that the engine wants."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"json_schema: not JSON: {error}") from error
    except RecursionError as error:
        raise GrammarError("json_schema: nested too deeply") from error
    if value is False:
        raise GrammarError("json_schema: the schema false allows no value at all")
    value = {} if value is True else json.loads(text)
    if not isinstance(value, dict):
        raise GrammarError(f"json_schema: a schema is an object, not {type(value).__name__}")
    return text, value


def _explained(message: str) -> str:
    """Return the engine's words; where they name keywords, how to go on."""
    text = engine_words(message)
    if "coerce_one_of" in text:
        return "oneOf is supported only where its schemas cannot overlap; use anyOf"
    if "not present in a registry" in text:
        return "$ref to another document, which is not fetched; put what it means under $defs"
    left_out = text.startswith(("Unimplemented keys", "Unknown format"))
    fix = "; leave them out of the schema, or give lenient=True" if left_out else ""
    return text + fix


def _dropped(messages: Iterable[str]) -> Iterable[str]:
    """Read the engine's warnings: which keywords, which formats it left out."""
    for message in messages:
        message = re.sub(r" \(\d+ times\)$", "", message)
        head, _, names = message.partition(": ")
        if head == "Unimplemented keys" and names.startswith("["):
            yield from json.loads(names)
        else:
            yield message
