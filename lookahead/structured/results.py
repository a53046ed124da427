"""Texts as values, or as the errors that say why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lookahead.errors import IncompleteJson, IncompleteText, InvalidValue, UnusableText
from lookahead.structured.call import Text
from lookahead.structured.partial import partial_json
from lookahead.structured.schemas import Shape
from lookahead.trace import Run

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What was generated for one prompt.

    Attributes:
        value: the value; of a regular expression, choice or grammar the text.
        text: exactly what was generated, without prompt and special tokens.
        trace: what `generate()` did; the prompts of one call share it.
    """

    value: T
    text: str
    trace: Run


class Reader(Protocol):
    """What makes a value of a text."""

    def read(self, text: str) -> Any:
        """Return the value of a complete text; raise `ValueError` where it is none."""

    def partial(self, text: str) -> Any:
        """Return what of the value is there; None: nothing."""

    @property
    def incomplete(self) -> type[IncompleteText]:
        """The error of a text that ended early."""


class TextReader:
    """Takes texts as they are."""

    incomplete = IncompleteText

    def read(self, text: str) -> str:
        return text

    def partial(self, text: str) -> None:
        return None


class JsonReader:
    """Makes values of JSON of a shape."""

    incomplete = IncompleteJson

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def read(self, text: str) -> Any:
        return self._shape.read(text)

    def partial(self, text: str) -> Any:
        return partial_json(text)


def results(texts: Sequence[Text], trace: Run, reader: Reader) -> list[Result[Any] | UnusableText]:
    """Return for each text its result, or why there is none."""
    return [_result(text, trace, reader) for text in texts]


def raised(found: Sequence[Result[Any] | UnusableText], *, many: bool = False) -> list[Result[Any]]:
    """Return the results; where one of them is an error, raise it, of many with all the others in it."""
    good = [result for result in found if isinstance(result, Result)]
    for row, error in enumerate(found):
        if isinstance(error, UnusableText):
            raise _of_many(error, row, found) if many else error
    return good


def _of_many(error: UnusableText, row: int, found: Sequence[Any]) -> UnusableText:
    message = f"prompt {row} of {len(found)}: {error}; .results has the others"
    whole = type(error)(message, text=error.text, partial=error.partial, results=found, trace=error.trace)
    whole.__cause__ = error.__cause__
    return whole


def _result(text: Text, trace: Run, reader: Reader) -> Result[Any] | UnusableText:
    what: dict[str, Any] = {"text": text.text, "trace": trace}
    if not text.complete:
        tail = f"{'…' * (len(text.text) > 40)}{text.text[-40:]}"
        message = (
            f"the text ended early, after {tail!r}; give a larger max_new_tokens, or bound what the grammar lets grow"
        )
        return reader.incomplete(message, partial=reader.partial(text.text), **what)
    try:
        return Result(reader.read(text.text), **what)
    except Exception as error:  # a validator of the user may raise anything
        said = " ".join(str(error).split())
        invalid = InvalidValue(f"the value is refused: {said}", partial=reader.partial(text.text), **what)
        invalid.__cause__ = error
        return invalid
