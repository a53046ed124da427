"""Values of keys: as the prompt has them, as the schema shows them, as earlier outputs had them."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic_core import from_json

from lookahead.draft import IntArray
from lookahead.grammar.spelling import KEY_END
from lookahead.grammar.vocabulary import Vocabulary

PROMPT, SCHEMA, OUTPUT = 0, 1, 2
"""Where a value was found."""

_EACH = 3  # values of a key from one place
_LONGEST, _CHARACTERS = 24, 512  # tokens of a value, characters that are looked at for them
_TEXT = 1 << 15  # bytes of a prompt that are searched, its last ones
_KEYS, _VALUES = 4096, 1 << 14  # kept of earlier outputs; values of one output

# Behind a key: "key": value, key = value, the key is value, | key | value |
# Bounded before what separates and possessive behind it: a long run of blanks or quotes is read once, not once a place.
_BETWEEN = re.compile(r"""["'`*\])]{0,4}[ \t]{0,8}(?:[:=|→]|\b(?:is|are|was)\b)[ \t]*+["'`*]*+[ \t]*+(?=[^\s{\[])""")
_BEFORE = re.compile(r"[\w \-]{1,60}\Z")
_WORD = re.compile(r"[^\W_]+")
_VALUE = re.compile(r"""[^"'`*\n\t|;<>{}\[\]]{1,120}""")
_END = re.compile(r"[,.!?](?=\s|$)|\s+$")


class Key(NamedTuple):
    """A key that a schema names, in the tokens of one vocabulary.

    Attributes:
        tokens: the first may hold the quotation mark too.
        examples: values that the schema shows for it.
    """

    name: str
    tokens: list[int]
    examples: tuple[Any, ...]


class Chain(NamedTuple):
    """A value of the key `keys[key]`, as the tokens behind `"key":`."""

    key: int
    place: int
    tokens: list[int]


class KeyValues:
    """Values that keys had in earlier outputs, the newest first; of the keys used last."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, list[Any]] = OrderedDict()

    def add(self, text: str) -> None:
        """Take in a JSON text, which may be cut off."""
        try:
            value = from_json(text, allow_partial=True)
        except ValueError:
            return
        stack: list[tuple[str, Any]] = [("", value)]
        left = _VALUES
        while stack and left:
            (name, part), left = stack.pop(), left - 1
            if isinstance(part, dict):
                stack += reversed(part.items())
            elif isinstance(part, list):
                stack += [("", inner) for inner in reversed(part)]
            elif name and len(name) <= _CHARACTERS and isinstance(part, str | int | float):
                self._put(name, part[:_CHARACTERS] if isinstance(part, str) else part)

    def of(self, name: str) -> Sequence[Any]:
        """Return the values of a key."""
        return self._known.get(name, ())

    def _put(self, name: str, value: Any) -> None:
        before = [one for one in self._known.get(name, ()) if one != value or type(one) is not type(value)]
        self._known[name] = [value, *before][:_EACH]
        self._known.move_to_end(name)
        if len(self._known) > _KEYS:
            self._known.popitem(last=False)


def chains(keys: Sequence[Key], vocabulary: Vocabulary, prompt: IntArray, earlier: KeyValues) -> list[Chain]:
    """Return what to draft behind each of `keys`, ordered by key, what is likeliest first.

    Args:
        prompt: [L] its tokens.
    """
    if not keys:
        return []
    text = vocabulary.decode(prompt.tolist())[-_TEXT:].decode("utf-8", "replace")
    found, made = find_values(text, [key.name for key in keys]), list[Chain]()
    for i, key in enumerate(keys):
        seen: set[tuple[int, ...]] = set()
        known = {PROMPT: found.get(key.name, ()), OUTPUT: earlier.of(key.name), SCHEMA: key.examples}
        for place, values in known.items():
            for value in values:
                for tokens in _written(key.name, value, place == PROMPT, vocabulary):
                    if tuple(tokens) not in seen:
                        seen.add(tuple(tokens))
                        made.append(Chain(i, place, tokens))
    return made


def find_values(text: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Return what stands behind the keys `names` in `text`, however they are spelled there; the last ones first.

    >>> find_values("Name: Ada Lovelace. Her birth year is 1815.", ["name", "birthYear"])
    {'name': ['Ada Lovelace'], 'birthYear': ['1815']}
    """
    spelled: dict[str, list[str]] = {}
    for name in names:
        spelled.setdefault("".join(_WORD.findall(name)).lower(), []).append(name)
    spelled.pop("", None)
    found: dict[str, list[str]] = {}
    for between in _BETWEEN.finditer(text):
        before = _BEFORE.search(text, max(0, between.start() - 60), between.start())
        value = _VALUE.match(text, between.end())
        if before is None or value is None:
            continue
        end = _END.search(value[0])
        said = value[0][: end.start()] if end else value[0]
        words, key = _WORD.findall(before[0]), ""
        for word in reversed(words[-5:]):
            key = word.lower() + key
            for name in spelled.get(key, ()) if said else ():
                values = found.setdefault(name, [])
                values[:] = [said, *(one for one in values if one != said)][:_EACH]
    return found


def _written(name: str, value: Any, guessed: bool, vocabulary: Vocabulary) -> Iterable[list[int]]:
    """Yield the tokens of a value behind the end of its key; of text from a prompt also as a number."""
    forms = [value]
    if guessed:
        number = re.fullmatch(r"[$€£]?(-?\d[\d,]*(?:\.\d+)?)\b.*", value)
        digits = number[1].replace(",", "") if number else ""
        forms += [float(digits) if "." in digits else int(digits)] if digits else []
    for form in forms:
        text = json.dumps(form[:_CHARACTERS] if isinstance(form, str) else form, ensure_ascii=False)
        # With the key: where it ends, its last token may hold the beginning of the value.
        tokens = vocabulary.encode(f"{json.dumps(name[:_CHARACTERS], ensure_ascii=False)}: {text}")
        end = next((i for i, token in enumerate(tokens) if vocabulary.spelling.kinds[token] & KEY_END), None)
        closed = len(tokens) - (text.endswith('"') and len(text) > 2)
        if end is not None and end + 1 < closed:
            yield tokens[end + 1 : min(closed, end + 1 + _LONGEST)]
