"""The noise that sampling will use, shown to drafters before it is used.

A seeded draw is `argmax(p / q)`, with q drawn from the generator in step order, so the noise of coming positions is
known before the model has seen them. A drafter that knows q can rank tokens by its own estimate of p over q, and guess
the token that will be *drawn*. This cannot bias the output: a draft is only compared with what the model picks. What
was drawn ahead and never used goes back to the generator (`NoiseLedger.rewind`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lookahead.draft import FloatArray, IntArray
from lookahead.topk import best_tokens

AHEAD = 16  # columns that drafters see
ROOM = 1 << 24  # numbers; with large vocabularies and batches it is fewer columns
USUAL = 16  # tokens that the noise of a column favours
_SETTLED = 256.0  # picks after which the average moves slowly


class Noise(NamedTuple):
    """The noise of coming columns of one batch row, as kernels see it.

    Entry (state[0] + d) % R is about the token that follows a node of depth d, for d < state[1].
    """

    blocks: FloatArray  # [R, V] the exponential noise q of R columns
    tokens: IntArray  # [R, K] tokens that it favours: those with the largest usual chance over q
    chances: FloatArray  # [R, K] the usual chance of those
    state: NDArray[np.int64]  # [2] see above
    heat: FloatArray  # [1] one over the temperature


def no_noise() -> Noise:
    """Return the noise of a text that is not sampled, or whose noise is not known ahead."""
    return Noise(
        blocks=np.zeros((0, 0), np.float32),
        tokens=np.zeros((0, 0), np.int32),
        chances=np.zeros((0, 0), np.float32),
        state=np.zeros(2, np.int64),
        heat=np.ones(1, np.float32),
    )


class Ledger(Protocol):
    """Where the noise comes from, see `lookahead.sampling`."""

    def noise(self, column: int, vocab: int) -> Tensor:
        """Return the [B, V] noise of a column."""


class Usual:
    """The average distribution that was sampled from: a guess at any place where nothing better is known.

    Held for as long as there are texts of the same model; the temperature of a request counts little.
    """

    def __init__(self) -> None:
        self._chances: Tensor | None = None
        self.seen = 0.0

    def begin(self, prompt: Tensor, vocab: int) -> None:
        """Start from the tokens of a prompt, where nothing is known yet."""
        if self._chances is None:
            counts = torch.bincount(prompt.flatten(), minlength=vocab)[:vocab].float()
            self._chances = 0.5 * counts / counts.sum().clamp(min=1) + 0.5 / vocab
            self.seen = 4.0

    def learn(self, probs: Tensor) -> None:
        """Take in [N, V] distributions that were picked from."""
        assert self._chances is not None
        for row in probs:
            self.seen = min(self.seen + 1, _SETTLED)
            self._chances.lerp_(row, 1 / self.seen)

    def favoured(self, noise: Tensor) -> tuple[IntArray, FloatArray]:
        """Return the tokens ([N, K]) of the largest chance over `noise` ([N, V]), and their chances."""
        assert self._chances is not None
        tokens, _ = best_tokens(self._chances / noise, USUAL)
        chances = self._chances[torch.from_numpy(tokens.astype(np.int64)).to(self._chances.device)]
        return tokens, chances.float().cpu().numpy()


class Foresight:
    """The noise of coming columns for all rows of a batch.

    Args:
        ledger: draws it, in step order.
        rows: the batch size.
        temperature: that scores are divided by before they are drawn from.
        usual: learns from what is drawn from.
    """

    def __init__(self, ledger: Ledger, rows: int, vocab: int, temperature: float, usual: Usual) -> None:
        self._ledger, self._vocab, self._temperature, self.usual = ledger, vocab, temperature, usual
        size = min(AHEAD, ROOM // (rows * vocab))
        self._rows = [_row(size, vocab, 1 / temperature) for _ in range(rows)]
        self._shown = [0] * rows

    def row(self, row: int) -> Noise:
        """Return the noise of one row; `look` keeps it up to date."""
        return self._rows[row]

    def look(self, row: int, column: int, remaining: int) -> None:
        """Show `row`, whose next token is that of `column`, the noise from there on, at most `remaining` columns."""
        noise = self._rows[row]
        size = len(noise.blocks)
        end = column + min(size, remaining)
        fresh = range(max(self._shown[row], column), end)
        for at in fresh:
            block = self._ledger.noise(at, self._vocab)[row]
            noise.blocks[at % size] = block.numpy() if block.device.type == "cpu" else block.cpu().numpy()
        # While little is known of what is usual, it is worth another look at all.
        asked = fresh if self.usual.seen >= _SETTLED / 4 else range(column, end)
        if len(asked):
            blocks = torch.stack([self._ledger.noise(at, self._vocab)[row] for at in asked])
            places = [at % size for at in asked]
            noise.tokens[places], noise.chances[places] = self.usual.favoured(blocks)
        self._shown[row] = max(self._shown[row], end)
        noise.state[:] = column % max(size, 1), end - column

    def picks(self, row: int, column: int, logits: Tensor, depth: IntArray) -> IntArray:
        """Return [N] int32: what each node of `row` would pick, with the noise of its column and the temperature alone.

        Args:
            column: that of the token behind node 0.
            logits: [N, V] of all nodes.
            depth: [N] of the nodes; those beyond the noise that is shown give their best token.
        """
        picked = np.empty(len(depth), np.int32)
        shown = int(self._rows[row].state[1])
        for level in np.unique(depth):
            nodes = np.flatnonzero(depth == level)
            scores = logits[torch.from_numpy(nodes).to(logits.device)].float()
            if level < shown:
                scores = scores / self._temperature - self._ledger.noise(column + int(level), self._vocab)[row].log()
            picked[nodes] = scores.argmax(-1).cpu().numpy()
        return picked


def _row(size: int, vocab: int, heat: float) -> Noise:
    return Noise(
        blocks=np.ones((size, vocab), np.float32),
        tokens=np.zeros((size, USUAL), np.int32),
        chances=np.zeros((size, USUAL), np.float32),
        state=np.zeros(2, np.int64),
        heat=np.array([heat], np.float32),
    )
