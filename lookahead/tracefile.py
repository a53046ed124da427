"""The file of a trace: JSON Lines, a header and then one line a pass."""

from __future__ import annotations

import codecs
import json
import os
import reprlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from lookahead.errors import InvalidInput
from lookahead.trace import Pass, Run, Share
from lookahead.trees import Tree
from lookahead.wording import Wording

FORMAT, VERSION = "lookahead trace", 1
TEXTS = ("prompts", "outputs")
CHANCE_DIGITS = 4
DIGITS = 9  # seconds are kept to the nanosecond: a row may cost less than a microsecond
LIMIT = 10**15  # larger numbers are damage, and products of them would not stay finite
FIX = "give a trace that --trace or Run.save() wrote"

T = TypeVar("T")


def write(run: Run, path: str | os.PathLike[str]) -> None:
    """Write a trace, over what is at `path`.

    Raises:
        OSError: it cannot be written.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "tokens": run.tokens,
        "rows": run.rows,
        "passes": len(run.passes),
        "tokens_per_pass": run.tokens_per_pass,
        "prefill_s": _rounded(run.prefill_s),
        **{name: [list(row) for row in getattr(run, name)] for name in TEXTS},
        "wording": None if run.wording is None else _wording_out(run.wording),
    }
    lines = [header, *map(_fields, run.passes)]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    Path(path).write_bytes(text.encode())


def _fields(one: Pass) -> dict[str, Any]:
    return {each.name: KINDS[str(each.type)][0](getattr(one, each.name)) for each in fields(Pass)}


def load(path: str | os.PathLike[str]) -> Run:
    """Read a trace back; see `read`."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        said = (getattr(error, "strerror", None) or str(error)).lower()
        raise InvalidInput(f"{os.fspath(path)}: {said}; {FIX}") from error
    return read(data, os.fspath(path))


def read(data: bytes, name: str) -> Run:
    """Return the trace that `data` holds; fields it has beside those of `Pass` are not read.

    Raises:
        InvalidInput: it is no trace, or damaged; the message names `name` and the line.
    """
    if not data.strip():
        raise InvalidInput(f"{name}: there is nothing in it; {FIX}")
    texts = data.removeprefix(codecs.BOM_UTF8).rstrip().split(b"\n")
    lines = [_Line(text, f"{name}, line {i}") for i, text in enumerate(texts, 1)]
    header = lines[0]
    _check_format(header)
    tokens, rows, promised = (header.get(key, _count) for key in ("tokens", "rows", "passes"))
    header.get("tokens_per_pass", _number)
    more = _optional(header, rows)
    passes = tuple(_pass(line, rows) for line in lines[1:])
    if len(passes) != promised:
        raise lines[-1].refused(f"the file ends after {len(passes)} passes, but its header promises {promised}")
    return Run(tokens, passes, **more)


def _optional(header: _Line, rows: int) -> dict[str, Any]:
    """Return what a header says beside the counts, as far as it does: older ones say nothing of it."""
    readers: dict[str, Callable[[Any], Any]] = {
        "prefill_s": _number,
        **dict.fromkeys(TEXTS, _texts),
        "wording": _wording,
    }
    found: dict[str, Any] = {name: header.get(name, read) for name, read in readers.items() if name in header.values}
    prompts = found.get("prompts", ())
    if len(prompts) not in (0, rows):
        raise header.refused(f'"prompts" is of {len(prompts)} rows, but "rows" says {rows}')
    if len(prompts) != len(found.get("outputs", ())):
        raise header.refused('"prompts" and "outputs" are of different numbers of rows')
    words = found.get("wording")
    if words is not None and not _fits(words, found):
        raise header.refused('"wording" does not fit "prompts" and "outputs"')
    return found


def _fits(words: Wording, found: dict[str, Any]) -> bool:
    """Whether there is a text of every row, and in it a piece of every token."""
    outputs = found.get("outputs", ())
    return len(words.prompts) == len(found.get("prompts", ())) and [len(row) for row in words.outputs] == [
        len(row) for row in outputs
    ]


def _check_format(header: _Line) -> None:
    if header.values.get("format") != FORMAT:
        raise header.refused(f'not a trace, which begins with {{"format": "{FORMAT}"')
    version = header.get("version", _count)
    if version > VERSION:
        raise InvalidInput(
            f"{header.place}: a trace of version {version}, and this lookahead reads up to {VERSION}; "
            "upgrade lookahead-decoding"
        )


def _pass(line: _Line, rows: int) -> Pass:
    """Return the pass of a line; what it lacks is as `Pass` sets it, where that is optional."""
    given = {}
    for each in fields(Pass):
        needed = each.default is MISSING and each.default_factory is MISSING
        if needed or each.name in line.values:
            given[each.name] = line.get(each.name, KINDS[str(each.type)][1])
    one = Pass(**given)
    if len(one.committed) != rows:
        raise line.refused(f'"committed" is of {len(one.committed)} rows, but the header says {rows}')
    if any(tree.row >= rows for tree in one.trees):
        raise line.refused(f'"trees" has one of another row, but the header says {rows}')
    return one


class _Line:
    """One line of the file, which must be a JSON object.

    Args:
        place: the file and the number of the line, for messages.
    """

    def __init__(self, text: bytes, place: str) -> None:
        self.place = place
        try:
            self.values = json.loads(text.decode())
        except UnicodeDecodeError as error:
            raise self.refused(f"not UTF-8 text (byte {error.start})") from error
        except (ValueError, RecursionError) as error:
            raise self.refused(f"not JSON ({error})") from error
        if not isinstance(self.values, dict):
            raise self.refused(f"{reprlib.repr(self.values)} is no JSON object")

    def get(self, key: str, parse: Callable[[Any], T]) -> T:
        """Return a field, checked by `parse`, whose `ValueError` says what is wanted."""
        if key not in self.values:
            raise self.refused(f'"{key}" is missing')
        try:
            return parse(self.values[key])
        except ValueError as error:
            raise self.refused(f'"{key}" is {reprlib.repr(self.values[key])}, not {error}') from error

    def refused(self, problem: str) -> InvalidInput:
        return InvalidInput(f"{self.place}: {problem}; {FIX}")


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)


def _counts_out(counts: Sequence[int]) -> list[int]:
    return [int(count) for count in counts]


def _sources_out(sources: Mapping[str, Share]) -> dict[str, list[float]]:
    return {name: [int(one.run), int(one.accepted), _rounded(one.seconds)] for name, one in sources.items()}


def _trees_out(trees: Sequence[Tree]) -> list[dict[str, Any]]:
    return [_tree_out(tree) for tree in trees]


def _tree_out(tree: Tree) -> dict[str, Any]:
    columns = {each.name: getattr(tree, each.name) for each in fields(Tree)}
    return columns | {"chances": [round(float(chance), CHANCE_DIGITS) for chance in tree.chances]}


def _wording_out(wording: Wording) -> dict[str, Any]:
    return {each.name: getattr(wording, each.name) for each in fields(Wording)}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LIMIT:
        raise ValueError("a whole number from 0 to 10^15")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= LIMIT:  # nor is NaN
        raise ValueError("a number from 0 to 10^15")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of whole numbers")
    return tuple(map(_count, value))


def _sources(value: Any) -> dict[str, Share]:
    if not isinstance(value, dict):
        raise ValueError("an object of sources")
    return {name: _share(one) for name, one in value.items()}


def _share(value: Any) -> Share:
    if not isinstance(value, list) or len(value) < 3:
        raise ValueError("[run, accepted, seconds] for every source")
    return Share(_count(value[0]), _count(value[1]), _number(value[2]))


def _trees(value: Any) -> tuple[Tree, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of trees")
    return tuple(map(_tree, value))


def _tree(value: Any) -> Tree:
    if not isinstance(value, dict) or not {each.name for each in fields(Tree)} <= value.keys():
        raise ValueError(f"an object with {', '.join(each.name for each in fields(Tree))}")
    parents = value["parents"]
    if not isinstance(parents, list) or parents[:1] != [-1]:
        raise ValueError("a tree whose parents begin with -1")
    tokens, sources, probes, path = (_counts(value[name]) for name in ("tokens", "sources", "probes", "path"))
    chances, parents = _numbers(value["chances"]), (-1, *_counts(parents[1:]))
    return Tree(_count(value["row"]), _count(value["ran"]), tokens, parents, chances, sources, probes, path)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError("a list of numbers")
    return tuple(map(_number, value))


def _texts(value: Any) -> tuple[array[int], ...]:
    if not isinstance(value, list):
        raise ValueError("a list of rows of tokens")
    try:
        return tuple(array("i", _counts(row)) for row in value)
    except OverflowError as error:
        raise ValueError("rows of tokens") from error


def _wording(value: Any) -> Wording | None:
    if value is None:
        return None
    try:
        outputs = tuple(tuple(map(_text, row)) for row in value["outputs"])
        words = {int(token): _text(text) for token, text in value["words"].items()}
        return Wording(tuple(map(_text, value["prompts"])), outputs, words)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError("an object of prompts, outputs and words") from error


KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "int": (int, _count),
    "float": (_rounded, _number),
    "str": (str, _text),
    "bool": (bool, _flag),
    "tuple[int, ...]": (_counts_out, _counts),
    "Mapping[str, Share]": (_sources_out, _sources),
    "Sequence[Tree]": (_trees_out, _trees),
}
"""How a field of `Pass` is written and read, by its type."""
