"""JSON that is not complete yet."""

from __future__ import annotations

import re
from typing import Any, Literal

# A number at the end of the text, which may go on.
_NUMBER = re.compile(r"(?:^|[\[,:\s])(-?[0-9][0-9.eE+-]*)$")


def partial_json(text: str) -> Any:
    """Return what of a JSON value is there already; None where it is nothing yet.

    Strings may still grow, arrays and objects too. A number at the end may go on with other digits and is left out,
    as are names without a value.

    >>> partial_json('{"name": "Om'), partial_json('{"pages": 41')
    ({'name': 'Om'}, {})
    """
    shown = _parsed(text, "trailing-strings")
    number = _NUMBER.search(text)
    if number is not None and same(shown, _parsed(text, True)):  # no digits of a string
        return _parsed(text[: number.start(1)], "trailing-strings")
    return shown


def _parsed(text: str, allow_partial: bool | Literal["trailing-strings"]) -> Any:
    from pydantic_core import from_json

    try:
        return from_json(text, allow_partial=allow_partial)
    except ValueError:  # nothing yet, or deeper than it reads
        return None


def same(left: Any, right: Any) -> bool:
    """Return whether two JSON values are equal in their types too, as 1, 1.0 and True are not."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
