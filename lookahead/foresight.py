"""The noise that sampling will use, shown to drafters before it is used.

A seeded draw is `argmax(p / q)`, with q drawn from the generator in step order, so the noise of coming positions is
known before the model has seen them. A drafter that knows q can rank tokens by its own estimate of p over q, and guess
the token that will be *drawn*. This cannot bias the output: a draft is only compared with what the model picks. What
was drawn ahead and never used goes back to the generator (`NoiseLedger.rewind`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lookahead.draft import FloatArray, IntArray
from lookahead.sources.noise import Noise
from lookahead.topk import best_there, best_tokens
from lookahead.transfer import fetched

AHEAD = 16  # columns that drafters see
ROOM = 1 << 24  # numbers; with large vocabularies and batches it is fewer columns
USUAL = 16  # tokens that the noise of a column favours
_SETTLED = 256.0  # picks after which the average moves slowly
_HOTTEST = 1e30  # one over the temperature, as far as kernels care
_RECENT = 24.0  # picks that count for the doubt
_CALM, _WILD = 0.1, 0.35  # doubts between which a text is neither


class Ledger(Protocol):
    """Where the noise comes from, see `lookahead.sampling`."""

    def noise(self, column: int, vocab: int) -> Tensor:
        """Return the [B, V] noise of a column."""


class Usual:
    """The average distribution that was sampled from: a guess at any place where nothing better is known.

    Kept for as long as there are texts of the same model; the temperature of a request counts little.

    Attributes:
        doubt: the average chance that the likeliest token was not picked, of late.
    """

    def __init__(self) -> None:
        self._chances: Tensor | None = None
        self.seen, self.doubt = 0.0, 0.5

    def begin(self, prompt: Tensor, vocab: int) -> None:
        """Get ready for scores of `vocab` tokens; start from the tokens of `prompt` where nothing is known yet."""
        if self._chances is None or len(self._chances) != vocab:
            known = prompt[(prompt >= 0) & (prompt < vocab)]  # a prompt of embeddings may have any ids beside it
            counts = torch.bincount(known, minlength=vocab).float()
            self._chances = 0.5 * counts / counts.sum().clamp(min=1) + 0.5 / vocab
            self.seen = 4.0
        self._chances = self._chances.to(prompt.device)

    @property
    def device(self) -> torch.device:
        """Where it is kept: where scores are."""
        assert self._chances is not None
        return self._chances.device

    def learn(self, probs: Tensor, likeliest: Sequence[float] | None = None) -> None:
        """Take in [N, V] distributions that were picked from, and the largest chances of them, if those are at hand."""
        assert self._chances is not None
        for row in probs:
            self.seen = min(self.seen + 1, _SETTLED)
            # Not in place: what was made in inference mode could not be changed outside of it.
            self._chances = torch.lerp(self._chances, row, 1 / self.seen)
        for chance in probs.amax(-1).tolist() if likeliest is None else likeliest:
            self.doubt += (1 - chance - self.doubt) / _RECENT

    def favoured(self, noise: Tensor) -> tuple[IntArray, FloatArray]:
        """Return the tokens ([N, K]) of the largest chance over `noise` ([N, V]), and their chances."""
        assert self._chances is not None
        ratios = self._chances / noise
        if ratios.device.type == "cpu":
            tokens, _ = best_tokens(ratios, USUAL)
            return tokens, self._chances[torch.from_numpy(tokens.astype(np.int64))].float().numpy()
        there, _ = best_there(ratios, USUAL)
        tokens, chances = fetched(there.to(torch.int32), self._chances[there].float())
        return tokens, chances


class Foresight:
    """The noise of coming columns for all rows of a batch.

    Args:
        ledger: draws it, in step order.
        rows: the batch size.
        temperature: that scores are divided by before they are drawn from.
        usual: learns from what is drawn from.
    """

    def __init__(self, ledger: Ledger, rows: int, vocab: int, temperature: float, usual: Usual) -> None:
        self._ledger, self._vocab, self.usual = ledger, vocab, usual
        size = min(AHEAD, ROOM // (rows * vocab))
        self._rows = [_row(size, vocab, 1 / temperature) for _ in range(rows)]
        # The same blocks where the scores are; on a CPU they are those very arrays.
        self._blocks = [torch.from_numpy(row.blocks).to(usual.device) for row in self._rows]
        self._shown = [range(0)] * rows
        self._again = [0.0 if usual.seen < _SETTLED else math.inf] * rows

    def row(self, row: int) -> Noise:
        """Return the noise of one row; `look` keeps it up to date."""
        return self._rows[row]

    def look(self, row: int, column: int, remaining: int) -> None:
        """Show `row`, whose next token is that of `column`, the noise from there on, at most `remaining` columns."""
        noise, blocks, before = self._rows[row], self._blocks[row], self._shown[row]
        size = len(noise.blocks)
        self._shown[row] = columns = range(column, column + min(size, remaining))
        fresh = [at for at in columns if at not in before]
        for at in fresh:
            blocks[at % size] = self._ledger.noise(at, self._vocab)[row]
        if fresh and blocks.device.type != "cpu":
            noise.blocks[[at % size for at in fresh]] = blocks[[at % size for at in fresh]].cpu().numpy()
        asked: Sequence[int] = fresh
        if self.usual.seen >= self._again[row]:
            # More is known of what is usual than at the last look at all of them.
            asked, self._again[row] = columns, 2 * self.usual.seen
        if len(asked):
            places = [at % size for at in asked]
            noise.tokens[places], noise.chances[places] = self.usual.favoured(blocks[places])
        doubt = self.usual.doubt
        noise.state[:] = column % max(size, 1), len(columns), int(doubt > _CALM) + int(doubt > _WILD)

    def picks(self, row: int, column: int, scores: Tensor, depth: IntArray) -> IntArray:
        """Return [N] int32: what nodes of `row` would pick with the noise of their columns.

        Args:
            column: that of the token behind node 0, when `look` was called last.
            scores: [N, V] of the nodes, the temperature included.
            depth: [N] of the nodes; beyond the noise that is shown they give their best token.
        """
        blocks, shown = self._blocks[row], len(self._shown[row])
        places = torch.from_numpy((column + depth) % max(len(blocks), 1)).to(blocks.device)
        known = torch.from_numpy(depth < shown).to(blocks.device)
        if shown:
            scores = torch.where(known[:, None], scores - blocks[places].log(), scores)
        picked: IntArray = scores.argmax(-1).cpu().numpy().astype(np.int32)
        return picked


def _row(size: int, vocab: int, heat: float) -> Noise:
    return Noise(
        blocks=np.ones((size, vocab), np.float32),
        tokens=np.zeros((size, min(USUAL, vocab)), np.int32),
        chances=np.zeros((size, min(USUAL, vocab)), np.float32),
        state=np.zeros(3, np.int64),
        heat=np.array([min(heat, _HOTTEST)], np.float32),
    )
