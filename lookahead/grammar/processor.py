"""Grammars as a logits processor, for plain `generate()` and for ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from lookahead.errors import InvalidArgument
from lookahead.grammar.grammar import Grammar
from lookahead.grammar.masks import best_allowed, forbid
from lookahead.grammar.matcher import Matcher
from lookahead.grammar.vocabulary import Vocabulary


class GrammarProcessor(LogitsProcessor):  # type: ignore[misc]
    """Allows what a grammar allows, and the end token exactly where the grammar accepts; one object for each call.

    What a row may continue with depends on what it generated and on nothing else. After its end only the end token is
    allowed. Behind `lookahead` the same object also tells the drafters what may follow.

    Args:
        grammars: one for all rows, or one for each row of the batch (None: that row is free).
        tokenizer: the model's fast tokenizer.
        eos_token_id: tokens that end a text; None: the tokenizer's end token.

    Raises:
        InvalidArgument: something that is no grammar; no end token.
        GrammarError: a grammar does not compile for this tokenizer.
    """

    def __init__(
        self,
        grammars: Grammar | Sequence[Grammar | None],
        tokenizer: object,
        *,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        self._vocabulary = Vocabulary.of(tokenizer)
        self._grammars = list(grammars) if isinstance(grammars, Sequence) else [grammars]
        for grammar in self._grammars:
            if not isinstance(grammar, Grammar) and (grammar is not None or grammars is None):
                raise InvalidArgument(
                    f"grammar is a {type(grammar).__name__}; give a lookahead.Grammar, such as Grammar.json_schema(…)"
                )
        if not self._grammars:
            raise InvalidArgument("grammar is an empty list; give one for each prompt")
        self._ends = _ends(eos_token_id, self._vocabulary)
        size = max(self._vocabulary.size, 1 + max(self._ends))
        for grammar in self._grammars:
            if grammar is not None:  # refused here rather than in the middle
                matcher = grammar.matcher(self._vocabulary, ends=self._ends, size=size)
                matcher.mask(matcher.root)
                matcher.close()
        self._matchers: list[Matcher | None] = []
        self._start, self._seen, self._guided = 0, torch.zeros((0, 0), dtype=torch.long), False
        self._picking: Collection[int] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [B, V] with -inf for what may not follow `input_ids` [B, L]."""
        if not self._guided:
            self._follow_plain(input_ids, scores.shape[-1])
        scores = scores.clone()
        for row, text in enumerate(self._texts(input_ids)):
            matcher = self._matchers[row]
            if matcher is not None and (self._picking is None or row in self._picking):
                forbid(scores[row : row + 1], matcher.mask(matcher.follow(text))[None])
        return scores

    # For plain generate(), which says nothing but what the text is now.

    def _follow_plain(self, input_ids: Tensor, size: int) -> None:
        # Beams change places and assisted generation goes back, but under the same prompts and by one token at most.
        (rows, length), (before, seen), start = input_ids.shape, self._seen.shape, self._start
        goes_on = bool(self._matchers) and rows == before and start < length <= seen + 1
        if not goes_on or not torch.equal(input_ids[:, :start], self._seen[:, :start]):
            self.begin(rows, length, size)
            self._guided = False
        self._seen = input_ids
        for matcher, text in zip(self._matchers, self._texts(input_ids), strict=True):
            if matcher is not None:
                matcher.settle(text)

    # For lookahead, which has drafts under the text and rows that are not all equally far.

    def begin(self, rows: int, start: int, size: int) -> None:
        """Begin to generate: `rows` texts, which start at column `start`, by a model of `size` tokens."""
        self.close()
        if all(end >= size for end in self._ends):
            raise InvalidArgument(f"eos_token_id={list(self._ends)}: the model has {size} tokens, so no text could end")
        if rows % len(self._grammars):
            given = f"grammar has {len(self._grammars)} entries, but there are {rows} rows"
            raise InvalidArgument(f"{given}; give one for each, or one for all")
        each = rows // len(self._grammars)
        self._matchers = [
            None if grammar is None else grammar.matcher(self._vocabulary, ends=self._ends, size=size)
            for grammar in self._grammars
            for _ in range(each)
        ]
        self._start, self._picking, self._guided = start, None, True

    def close(self) -> None:
        """Give back what following the texts needed."""
        for matcher in self._matchers:
            if matcher is not None:
                matcher.close()
        self._matchers = []
        self._guided = False

    def matcher(self, row: int) -> Matcher | None:
        """Return what follows the text of `row`; None where it is free."""
        return self._matchers[row]

    def picking(self, rows: Collection[int]) -> None:
        """Tell which rows pick a token now; of the others `input_ids` may hold anything."""
        self._picking = rows

    def best(self, row: int, input_ids: Tensor, logits: Tensor) -> int:
        """Return the allowed token with the largest of `logits` [V] for `row` of `input_ids` [B, L]."""
        matcher = self._matchers[row]
        if matcher is None:
            return int(logits.float().argmax())
        return best_allowed(logits, matcher.mask(matcher.follow(self._texts(input_ids[row : row + 1])[0])))

    def _texts(self, input_ids: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        return input_ids[:, self._start :].to("cpu", torch.int32).numpy()


def _ends(given: int | Sequence[int] | None, vocabulary: Vocabulary) -> tuple[int, ...]:
    if given is None:
        if vocabulary.end is None:
            raise InvalidArgument("a grammar ends with an end token, and the tokenizer names none; pass eos_token_id")
        return (vocabulary.end,)
    ends = (given,) if isinstance(given, int) else tuple(int(token) for token in given)
    if not ends or min(ends) < 0:
        raise InvalidArgument(f"eos_token_id={given!r}: a grammar needs an end; give one or more token ids")
    return ends
