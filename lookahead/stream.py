"""Text to the terminal as tokens come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HALF_CHARACTER = "\ufffd"  # how a decoder shows bytes that are not a whole character yet


class TextStream:
    """A streamer for `generate()` that writes exactly the text of one `tokenizer.decode()`, piece by piece.

    `transformers.TextStreamer` decodes line by line, which loses a leading space with SentencePiece tokenizers, and
    holds back a word until the next space. This one decodes the newest tokens together with those before them.

    >>> model.generate(**inputs, streamer=TextStream(tokenizer, sys.stdout.write))
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._from = self._shown = 0  # tokens[_from:_shown] are on the screen and give the rest its context
        self._in_prompt = True

    def put(self, tokens: Any) -> None:
        """Take the prompt at the first call, then the next tokens."""
        if self._in_prompt:
            self._in_prompt = False
            return
        self._tokens.extend(tokens.flatten().tolist())
        self._show(complete=False)

    def end(self) -> None:
        """Write what was held back."""
        self._show(complete=True)

    def _show(self, *, complete: bool) -> None:
        before = decode(self._tokenizer, self._tokens[self._from : self._shown])
        text = decode(self._tokenizer, self._tokens[self._from :])
        if len(text) <= len(before) or (text.endswith(HALF_CHARACTER) and not complete):
            return
        self._from, self._shown = self._shown, len(self._tokens)
        self._write(text[len(before) :])


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """Return the text of `tokens` without special tokens, white space as it is."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
