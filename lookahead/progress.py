"""The state of a batch while it is generated: tokens, which rows go on, scores, the streamer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from lookahead.draft import IntArray
from lookahead.errors import InvalidArgument

MAX_AHEAD = 32  # columns that a row may run ahead of the slowest
KEPT = 1 << 26  # numbers; noise and scores of the columns between are kept, and this many are enough
CHUNK = 256  # columns by which the token buffer grows


class Records:
    """Scores and raw logits of every column, as `generate()` returns them: tuples of [B, V] float32.

    Args:
        scores: whether processed scores are returned.
        logits: whether raw logits are returned.
    """

    def __init__(self, rows: int, *, scores: bool, logits: bool) -> None:
        self._rows = rows
        self._open: dict[int, tuple[Tensor, Tensor]] = {}
        self.scores: tuple[Tensor, ...] | None = () if scores else None
        self.logits: tuple[Tensor, ...] | None = () if logits else None

    @property
    def wanted(self) -> bool:
        """Whether anything is recorded at all."""
        return self.scores is not None or self.logits is not None

    def record(self, column: int, row: int, scores: Tensor, logits: Tensor) -> None:
        """Take one row of one column; a later call for the same place replaces it."""
        if column not in self._open:
            self._open[column] = (
                scores.new_zeros(self._rows, scores.shape[0]),
                logits.new_zeros(self._rows, logits.shape[0]),
            )
        for table, values in zip(self._open[column], (scores, logits), strict=True):
            table[row] = values

    def settle(self, column: int) -> None:
        """Append `column` to what is returned."""
        scores, logits = self._open.pop(column)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)


class Stops:
    """Asks every stopping criterion after each column, in order, with what plain `generate()` would show it.

    Length and EOS criteria are evaluated on the host without building tensors; all others are called.

    Attributes:
        max_length: the strictest length limit, prompt included; None: no limit.
        eos: tokens that end a row.
        pads: whether ended rows emit padding, as they do where an EOS criterion exists.
        plain: whether nothing but a length and end tokens stops a row, and without a warning.
        ordered: whether a criterion is the user's own, which may draw random numbers or keep state.
    """

    def __init__(self, criteria: Sequence[Any]) -> None:
        self.lengths = [c for c in criteria if type(c) is MaxLengthCriteria]
        self.eos = {int(t) for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.flatten().tolist()}
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.ordered = any(type(c) not in (MaxTimeCriteria, StopStringCriteria) for c in self.others)
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self.max_length = min((int(c.max_length) for c in self.lengths), default=None)
        known = [c.max_position_embeddings for c in self.lengths if c.max_position_embeddings is not None]
        self.plain = not self.others and not (known and self.max_length is not None and self.max_length > min(known))

    def __call__(
        self, tokens: Sequence[int], length: int, ids: Callable[[], Tensor], scores: tuple[Tensor, ...] | None
    ) -> list[bool]:
        """Return for each row whether it is done.

        Args:
            tokens: the newest token of each row.
            length: tokens a row has, prompt included.
            ids: gives all of them, [B, length].
        """
        full = self.max_length is not None and length >= self.max_length
        done = [full or token in self.eos for token in tokens]
        # Beyond the model's positions the length criterion has a warning to give.
        beyond = [
            c for c in self.lengths if c.max_position_embeddings is not None and length > c.max_position_embeddings
        ]
        asked = [*beyond, *self.others]
        seen = ids() if asked else None
        for criterion in asked:
            answer = torch.as_tensor(criterion(seen, scores)).expand(len(done)).tolist()
            done = [a or bool(b) for a, b in zip(done, answer, strict=True)]
        return done


class Progress:
    """Tokens of a batch whose rows may run ahead of each other; *settled* are the columns that every row has reached.

    A settled column is final: criteria were asked, the streamer has it. What a row picked beyond it may still be
    taken back, when a criterion ends the row.

    Args:
        prompt: [B, P] int64, the ids that criteria and processors see first.
        stops: the stopping criteria.
        pad: what rows emit after their end, where an EOS criterion exists.
        complete: finished rows are run and recorded to the end, as plain does, because somebody sees it: the caller
            (scores, logits, cache) or a processor that looks at other rows.
        column_size: numbers kept for every column that a row runs ahead.

    Attributes:
        held: rows that are to wait for others.
    """

    def __init__(
        self,
        prompt: Tensor,
        stops: Stops,
        *,
        pad: int | None,
        complete: bool,
        records: Records,
        streamer: Any = None,
        column_size: int = 0,
    ) -> None:
        self.rows, self._prompt = prompt.shape
        self._device = prompt.device
        self._ids = np.zeros((self.rows, self._prompt + CHUNK), np.int64)
        self._ids[:, : self._prompt] = prompt.cpu().numpy()
        self._stops, self._pad, self._complete = stops, pad, complete
        self._records, self._streamer = records, streamer
        self.length = [0] * self.rows
        self.settled = 0
        self.unfinished = [True] * self.rows
        self.held: frozenset[int] = frozenset()
        self._going = self.rows
        self._ahead = max(1, min(MAX_AHEAD, KEPT // max(column_size, 1)))
        self._waits_at_eos = [False] * self.rows
        self._ends: list[int | None] = [None] * self.rows

    @property
    def padding(self) -> int:
        """The token that ended rows emit."""
        if self._pad is None:
            raise InvalidArgument("pad_token_id: rows end at different times, and no padding token is set; pass one")
        return self._pad

    @property
    def done(self) -> bool:
        """Whether no row goes on."""
        return self._going == 0

    def is_padding(self, row: int) -> bool:
        """Whether `row` only emits padding from here on."""
        return self._stops.pads and not self.unfinished[row]

    def runs(self, row: int) -> bool:
        """Whether `row` still has tokens to pick."""
        return self._going > 0 and (self._complete or not self.is_padding(row))

    def is_open(self, row: int) -> bool:
        """Whether `row` may pick its next token now."""
        ahead = self.length[row] - self.settled
        if row in self.held or self._waits_at_eos[row]:
            return False
        return self.runs(row) and ahead < self._ahead and self.remaining(row) > 0

    def remaining(self, row: int) -> int:
        """Return how many tokens the length limit leaves to `row`."""
        limit = self._stops.max_length
        if limit is None:
            return CHUNK
        return max(limit - self._prompt, 1) - self.length[row]

    def last(self, row: int) -> int:
        """Return the newest token of `row`."""
        return int(self._ids[row, self._prompt + self.length[row] - 1])

    def new_tokens(self, row: int, start: int) -> NDArray[np.int64]:
        """Return what `row` generated from column `start` on."""
        return self._ids[row, self._prompt + start : self._prompt + self.length[row]].copy()

    def generated(self, row: int) -> IntArray:
        """Return what `row` generated, padding left out."""
        end = self._ends[row]
        columns = self.settled if end is None else end
        return self._ids[row, self._prompt : self._prompt + columns].astype(np.int32)

    def ids(self, columns: int) -> Tensor:
        """Return a copy, [B, P + columns], on the device of the prompt; a row that is not that far shows any token."""
        return torch.from_numpy(self._ids[:, : self._prompt + columns].copy()).to(self._device)

    def commit(self, row: int, token: int) -> int:
        """Append `token`, or padding where the row has ended, and return what was appended."""
        token = self.padding if self.is_padding(row) else token
        column = self._prompt + self.length[row]
        if column == self._ids.shape[1]:
            self._ids = np.pad(self._ids, ((0, 0), (0, max(CHUNK, column // 4))))
        self._ids[row, column] = token
        self.length[row] += 1
        self._waits_at_eos[row] = self.unfinished[row] and self._stops.pads and token in self._stops.eos
        return token

    @property
    def takes_runs(self) -> bool:
        """Whether `commit_run` does what picking token by token would: one row, and nobody asks or looks in between."""
        return self.rows == 1 and self._stops.plain and self._streamer is None and not self._records.wanted

    def goes_on(self, tokens: Sequence[int]) -> bool:
        """Whether another token follows `tokens`, where they are committed to the only row."""
        return len(tokens) < self.remaining(0) and tokens[-1] not in self._stops.eos

    def commit_run(self, tokens: NDArray[np.int64]) -> int:
        """Append and settle tokens of the only row, as far as it goes on; return how many."""
        tokens = tokens[: self.remaining(0)]
        ends = [i for i, token in enumerate(tokens.tolist()) if token in self._stops.eos]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        start, count = self._prompt + self.length[0], len(tokens)
        if start + count > self._ids.shape[1]:
            self._ids = np.pad(self._ids, ((0, 0), (0, max(CHUNK, start // 4, count))))
        self._ids[0, start : start + count] = tokens
        self.length[0] += count
        self.settled += count
        if ends or self.remaining(0) <= 0:
            self._finish(0)
        return count

    def settle(self) -> set[int]:
        """Settle every column that all rows have reached; return the rows that ended with one of them."""
        ended: set[int] = set()
        while not self.done and self.settled < min(self.length[row] for row in range(self.rows) if self.runs(row)):
            ended |= self._settle_column()
        return ended

    def _settle_column(self) -> set[int]:
        column, place = self.settled, self._prompt + self.settled
        for row in range(self.rows):
            if not self.runs(row):
                self.length[row] = column
                self.commit(row, 0)
        tokens = self._ids[:, place].copy()
        if self._records.wanted:
            self._records.settle(column)
        self.settled += 1
        stops = self._stops(tokens.tolist(), place + 1, lambda: self.ids(column + 1), self._records.scores)
        ended = {row for row, stop in enumerate(stops) if stop and self.unfinished[row]}
        for row in ended:
            self._finish(row)
        if self._streamer is not None:
            self._streamer.put(torch.from_numpy(tokens))
        if self.done:
            self.length = [self.settled] * self.rows
        return ended

    def _finish(self, row: int) -> None:
        """End `row` with the column just settled; what it picked beyond becomes padding."""
        self.unfinished[row] = False
        self._ends[row] = self.settled
        self._going -= 1
        self._waits_at_eos[row] = False
        if self._stops.pads:
            self.length[row] = self.settled


class Contexts:
    """What the drafter of each row sees: prompt without padding and generated tokens, [L] int32.

    Args:
        prompt: [B, P]; ids that are no tokens, as they may stand beside `inputs_embeds`, are left out.
        mask: [B, P] bool, what of it is not padding.
        vocab: tokens are smaller.
    """

    def __init__(self, prompt: NDArray[np.int64], mask: NDArray[np.bool_] | None, vocab: int) -> None:
        self._buffers: list[IntArray] = []
        self._prompts: list[int] = []
        known = (prompt >= 0) & (prompt < vocab)
        known = known if mask is None else known & mask
        for row in range(prompt.shape[0]):
            tokens = prompt[row][known[row]]
            self._prompts.append(len(tokens))
            self._buffers.append(np.concatenate([tokens.astype(np.int32), np.zeros(CHUNK, np.int32)]))

    def extend(self, row: int, column: int, tokens: NDArray[np.int64]) -> None:
        """Write `tokens` at `column` of `row`."""
        start = self._prompts[row] + column
        end = start + len(tokens)
        if end > len(self._buffers[row]):
            self._buffers[row] = np.pad(self._buffers[row], (0, end - len(self._buffers[row]) + max(CHUNK, end // 4)))
        self._buffers[row][start:end] = tokens

    def view(self, row: int, columns: int) -> IntArray:
        """Return a read-only view of the prompt and the first `columns` generated tokens of `row`."""
        view = self._buffers[row][: self._prompts[row] + columns]
        view.flags.writeable = False
        return view
