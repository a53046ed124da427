"""What tokens of a run say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lookahead.stream import HALF_CHARACTER

WORD_START = "\u2581"  # how SentencePiece writes a blank before a word
WINDOW = 8  # tokens before a piece that decide its blanks


@dataclass(frozen=True, slots=True)
class Wording:
    """The text of a run.

    Attributes:
        prompts: of each row, its prompt.
        outputs: of each row, the text that each generated token added; joined they are the text. A character of several
            tokens comes with the last of them.
        words: what a token says on its own, by its id.
    """

    prompts: tuple[str, ...]
    outputs: tuple[tuple[str, ...], ...]
    words: Mapping[int, str]


def worded(
    tokenizer: Any, prompts: Iterable[Sequence[int]], outputs: Iterable[Sequence[int]], used: Iterable[int]
) -> Wording:
    """Return what tokens say.

    Args:
        tokenizer: of `transformers`.
        prompts, outputs: tokens of each row.
        used: tokens to say on their own.
    """
    return Wording(
        tuple(_decoded(tokenizer, row) for row in prompts),
        tuple(tuple(pieces(tokenizer, row)) for row in outputs),
        {token: word(tokenizer, token) for token in sorted(set(used))},
    )


def word(tokenizer: Any, token: int) -> str:
    """Return what `token` says on its own, special tokens by name and bytes of half a character as hex digits."""
    text = _decoded(tokenizer, [token])
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:
        return f"<{token}>"
    if HALF_CHARACTER in text:
        return f"<{name}>"
    return f" {text}" if str(name).startswith(WORD_START) and not text.startswith(" ") else text


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return the text that each of `tokens` adds to those before it."""
    found: list[str] = []
    shown = 0
    for end in range(1, len(tokens) + 1):
        start = max(shown - WINDOW, 0)
        before, text = (_decoded(tokenizer, tokens[start:stop]) for stop in (shown, end))
        waits = text.endswith(HALF_CHARACTER) and end < len(tokens) and end - shown < WINDOW
        found.append("" if waits else text[len(before) :])
        shown = shown if waits else end
    return found


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of `tokens`, special ones by name."""
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)) if len(tokens) else ""
