"""Picking a token from logits exactly as plain `generate()` does, for batch rows that run ahead of each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from lookahead.draft import FloatArray, IntArray
from lookahead.foresight import Foresight, Usual
from lookahead.grammar.masks import Words, best_allowed
from lookahead.grammar.processor import GrammarProcessor
from lookahead.topk import best_tokens
from lookahead.transfer import fetched, sent

# Pure functions of one row of scores: they may see all nodes at once, in any order.
ROW_PURE = {
    hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper, hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper, hf.InfNanRemoveLogitsProcessor, hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
}  # fmt: skip
# Pure functions of one row of scores and that row's tokens: rows of a batch may be asked at different times.
ROW_LOCAL = ROW_PURE | {
    hf.EtaLogitsWarper, hf.MinLengthLogitsProcessor, hf.MinNewTokensLengthLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor, hf.NoRepeatNGramLogitsProcessor, hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor, hf.NoBadWordsLogitsProcessor, hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor, hf.ExponentialDecayLengthPenalty, hf.SuppressTokensAtBeginLogitsProcessor,
    GrammarProcessor,
}  # fmt: skip
# Sums along a row may round differently for one row and for many on an accelerator: only these are safe there.
SAME_AT_ONCE = ROW_PURE - {hf.TopPLogitsWarper, hf.TypicalLogitsWarper}
UNSOUND = "probability tensor contains either `inf`, `nan` or element < 0"  # as torch.multinomial says it
ALL_NODES_LIMIT = 1 << 16  # scores; on a CPU, processing more nodes than are visited costs more than calls save


class Recorder(Protocol):
    """Takes what `generate()` returns as scores and logits."""

    def record(self, column: int, row: int, scores: Tensor, logits: Tensor) -> None:
        """Take the processed scores [V] and raw logits [V] from which token `column` of `row` was picked."""


class NoiseLedger:
    """The exponential noise of sampling, one [B, V] block a column, drawn in column order and kept while needed.

    `torch.multinomial(p, 1)` is `argmax(p / q)` with q drawn by `exponential_`, so a row that runs ahead can use the
    block of its own column. What was drawn and never used goes back to the generator.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._blocks: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._drawn = 0

    def noise(self, column: int, vocab: int) -> Tensor:
        """Return the [B, V] noise of `column`; draws all columns up to it."""
        while self._drawn <= column:
            self._states[self._drawn] = generator_state(self._device)
            block = torch.empty((self._rows, vocab), dtype=torch.float32, device=self._device)
            self._blocks[self._drawn] = block.exponential_(1)
            self._drawn += 1
        return self._blocks[column]

    def release(self, columns: int) -> None:
        """Forget the noise of all columns before `columns`; every row has used it."""
        for column in [c for c in self._blocks if c < columns]:
            del self._blocks[column], self._states[column]

    def rewind(self, columns: int) -> None:
        """Leave the generator as if exactly `columns` columns had been drawn."""
        if self._drawn > columns:
            set_generator_state(self._device, self._states[columns])
            self._drawn = columns


@dataclass(slots=True)
class _Judged:
    """What all nodes of a pass pick, where the logits are.

    Attributes:
        picks: [B, N] int64.
        chances: [B, N, V] that they were drawn from; None: they were not drawn.
        best: tokens and logits [B, N, K] of the best successors; None: not looked for.
        likeliest: [B, N] the largest of the chances, once they were fetched.
    """

    picks: Tensor
    chances: Tensor | None
    best: tuple[Tensor, Tensor] | None
    likeliest: FloatArray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


class Sampler:
    """Picks tokens from the logits of verified nodes.

    Args:
        processors: the prepared `LogitsProcessorList`.
        do_sample: draw from the softmax, or take the largest score.
        rows: the batch size.
        device: where plain `generate()` processes scores, the device of `input_ids`.
        recorder: receives scores and logits, where the caller returns them.
        ordered: something else (a stopping criterion of the user's) may draw random numbers between two columns.
        ahead: drafters may look at the noise of coming columns, see `foresee`.
        together: the model has all rows go on by as many tokens.
        at_once: what all nodes pick is to be found where the logits are, before the host looks, where that is possible.

    Attributes:
        lockstep: whether all rows have to be picked together, column by column: a processor that may look at other
            rows or keep state is called once a column, in order, as plain `generate()` calls it.
        grammars: those of the processors that drafters may ask.
        foresight: the noise of coming columns for drafters, where it is known.
        learns: whether it is told what is drawn from.
        direct: whether what a node picks does not depend on the text, and is found for all nodes at once.
        picks: [B, N] int32, those of all nodes that were loaded last, where `direct`; -1: nothing can be drawn there.
    """

    def __init__(
        self,
        processors: Any,
        *,
        do_sample: bool,
        rows: int,
        device: torch.device,
        recorder: Recorder | None = None,
        ordered: bool = False,
        ahead: bool = False,
        together: bool = False,
        at_once: bool = False,
    ) -> None:
        self._processors, self._sample, self._rows, self._device = processors, do_sample, rows, device
        self._recorder = recorder
        kinds = {type(p) for p in processors}
        self.needs_ids = not kinds <= ROW_PURE
        pure = ROW_PURE if device.type == "cpu" else SAME_AT_ONCE
        self._at_once = bool(kinds) and kinds <= pure
        self.grammars: list[GrammarProcessor] = [p for p in processors if type(p) is GrammarProcessor]
        greedy = not do_sample and recorder is None
        self._masked = greedy and kinds == {GrammarProcessor} and len(self.grammars) == 1
        local = kinds <= ROW_LOCAL
        wanted = do_sample and (rows > 1 or ahead)
        ledger = wanted and local and not ordered and draws_match(device)
        self._ledger = NoiseLedger(rows, device) if ledger else None
        self.foresight: Foresight | None = None
        self.learns = True
        self._ahead = ahead and ledger
        self._judges = at_once and recorder is None and kinds <= pure and (ledger or not do_sample)
        self.direct = (greedy and not processors) or self._judges
        self.lockstep = rows > 1 and (together or not local or (do_sample and not ledger))
        self._logits: Tensor
        self._scores: Tensor | None = None
        self._judged: _Judged | None = None
        self.picks: IntArray = np.zeros((rows, 0), np.int32)

    @property
    def kind(self) -> tuple[bool, ...]:
        """What of the way to pick matters for what a pass costs."""
        return self._sample, bool(self.grammars), self._recorder is not None, self._at_once, self.direct

    @property
    def keeps_columns(self) -> bool:
        """Whether a [B, V] block is kept for every column that a row runs ahead."""
        return self._ledger is not None or self._recorder is not None

    def judge(
        self,
        logits: Tensor,
        best: tuple[Tensor, Tensor] | None,
        columns: Sequence[int],
        depths: Sequence[IntArray],
    ) -> Tensor | None:
        """Find what all nodes of a pass pick, where the logits are, without waiting for it: [B, N] int64, or None.

        Args:
            logits: [B, N, V]; `load` takes them next.
            best: tokens and logits [B, N, K] of the best successors, if they were looked for there already.
            columns: for each row, that of the token behind node 0.
            depths: of the nodes of each row.
        """
        self._judged = None
        if not self._judges:
            return None
        if self._sample or self._processors:
            scores = self._processors(None, self._as_plain(logits.flatten(0, 1))).view(logits.shape)
            picks, chances = self._drawn(scores, columns, depths) if self._sample else (scores.argmax(-1), None)
        else:
            picks, chances = logits.argmax(-1) if best is None else best[0][..., 0], None
        self._judged = _Judged(picks, chances, best)
        return picks

    def _drawn(self, scores: Tensor, columns: Sequence[int], depths: Sequence[IntArray]) -> tuple[Tensor, Tensor]:
        """Return what all nodes draw with the noise of their columns, [B, N], and the chances, [B, N, V]."""
        assert self._ledger is not None
        chances = torch.nn.functional.softmax(scores, dim=-1)
        rows, nodes, vocab = chances.shape
        wanted = np.zeros((rows, nodes), np.int64)
        for row, (column, depth) in enumerate(zip(columns, depths, strict=True)):
            wanted[row] = column
            wanted[row, : len(depth)] += depth
        first = int(wanted.min())
        noise = torch.stack([self._ledger.noise(c, vocab) for c in range(first, int(wanted.max()) + 1)], 1)
        index = sent(wanted - first, noise.device)
        picks = (chances / noise[torch.arange(rows, device=noise.device)[:, None], index]).argmax(-1)
        return picks.masked_fill_(~chances.sum(-1).isfinite(), -1), chances

    def load(self, logits: Tensor, top: int) -> tuple[IntArray, FloatArray] | None:
        """Take the logits [B, N, V] of a pass; return the `top` best successors of all B * N nodes when top > 0.

        Waits for what `judge` has found.
        """
        self._logits, self._scores = logits, None
        flat, judged = logits.flatten(0, 1), self._judged
        if judged is not None:
            return self._fetch(judged, top)
        best = best_tokens(flat.float(), max(top, 1)) if top or self.direct else None
        if self.direct and best is not None:
            self.picks = best[0][:, 0].reshape(logits.shape[:2])
        return best if top else None

    def _fetch(self, judged: _Judged, top: int) -> tuple[IntArray, FloatArray] | None:
        """Bring picks, and the `top` best successors, to the host in one go."""
        wanted = [judged.picks.to(torch.int32)]
        if judged.chances is not None:
            wanted.append(judged.chances.amax(-1))
        if judged.best is not None:
            wanted += [judged.best[0].to(torch.int32), judged.best[1]]
        self.picks, *rest = fetched(*wanted)
        if judged.chances is not None:
            judged.likeliest = rest.pop(0)
        if not top:
            return None
        if not rest:
            return best_tokens(self._logits.flatten(0, 1).float(), top)
        tokens, values = (part.reshape(-1, part.shape[-1])[:, :top] for part in rest)
        return np.ascontiguousarray(tokens), np.ascontiguousarray(values)

    @property
    def obeys(self) -> bool:
        """Whether the only row takes the best token that a grammar allows, and nothing else is asked."""
        return self._masked and self._rows == 1 and self.grammars[0].matcher(0) is not None

    def best_allowed(self, row: int, node: int, mask: Words) -> int:
        """Return the token with the largest logit at `node` of `row` that a grammar's mask allows."""
        return best_allowed(self._logits[row, node], mask)

    @property
    def sound(self) -> bool:
        """Whether something can be drawn at every node, where `direct`."""
        return self._judged is None or self._judged.chances is None or bool((self.picks >= 0).all())

    def learn(self, paths: Sequence[Sequence[int]]) -> None:
        """Let what is usual be learnt from what was drawn at the visited nodes of each row, where that is known now."""
        judged = self._judged
        if judged is None or judged.chances is None or self.foresight is None or not self.learns:
            return
        for row, path in enumerate(paths):
            nodes = sent(np.array(path, np.int64), judged.chances.device)
            self.foresight.usual.learn(judged.chances[row, nodes], judged.likeliest[row, list(path)].tolist())

    def foresee(self, usual: Usual, prompt: Tensor, vocab: int) -> None:
        """Let drafters look at the noise of coming columns, where it is known.

        Args:
            usual: learns from what is drawn from.
            prompt: [B, P] ids.
            vocab: the width of the logits.
        """
        if self._ledger is not None and self._ahead:
            usual.begin(prompt, vocab)
            heats = [p.temperature for p in self._processors if type(p) is hf.TemperatureLogitsWarper]
            self.foresight = Foresight(self._ledger, self._rows, vocab, math.prod(heats), usual)

    def foreseen(self, row: int, column: int, depth: IntArray, nodes: IntArray) -> IntArray:
        """Return what `nodes` of `row`, as loaded last, would pick with the noise of their columns: [len(nodes)] int32.

        A guess for drafters: processors that need the text, or to sort all scores, are left out.

        Args:
            column: that of the token behind node 0.
            depth: [N] of all nodes.
        """
        assert self.foresight is not None
        if self._judged is not None:
            foreseen: IntArray = self.picks[row, nodes]
            return foreseen
        scores = self._as_plain(self._logits[row, torch.from_numpy(nodes.astype(np.int64)).to(self._logits.device)])
        for processor in self._processors:
            if type(processor) in SAME_AT_ONCE:
                scores = processor(None, scores)
        return self.foresight.picks(row, column, scores, depth[nodes])

    def pick(self, column: int, nodes: Mapping[int, int], ids: Tensor | None) -> dict[int, int]:
        """Return the token that plain `generate()` picks at `column` for each row of `nodes` (row → node of its draft).

        Args:
            ids: [B, L] all tokens before `column`; only the rows in `nodes` need to be right. None is fine where
                `needs_ids` is false.
        """
        if self.direct:
            picked = {row: int(self.picks[row, node]) for row, node in nodes.items()}
            if min(picked.values()) < 0:
                raise RuntimeError(UNSOUND)
            return picked
        if self._masked and ids is not None:
            return {row: self.grammars[0].best(row, ids, self._logits[row, node]) for row, node in nodes.items()}
        for grammar in self.grammars:
            grammar.picking(nodes)
        # Processors that look at ids were made for the whole batch; rows that pick nothing are along for the ride.
        rows = list(range(self._rows)) if self.needs_ids else list(nodes)
        scores, raw = self._process(rows, [nodes.get(row, 0) for row in rows], ids)
        if self._recorder is not None:
            for row in nodes:
                self._recorder.record(column, row, scores[rows.index(row)], raw[rows.index(row)])
        tokens = self._draw(column, scores, rows, list(nodes)) if self._sample else scores.argmax(-1)
        picked = dict(zip(rows, tokens.tolist(), strict=True))
        return {row: picked[row] for row in nodes}

    def _process(self, rows: list[int], nodes: list[int], ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return processed scores and raw logits, [rows, V] float32; without a recorder the latter may be anything."""
        limit = ALL_NODES_LIMIT if self._device.type == "cpu" else self._logits.numel()
        if self._at_once and self._scores is None and self._logits.numel() <= limit:
            flat = self._as_plain(self._logits.flatten(0, 1))
            self._scores = self._processors(None, flat).view(self._logits.shape)
        if self._scores is None:
            raw = self._as_plain(_at(self._logits, rows, nodes))
            return self._processors(ids, raw), raw
        scores = _at(self._scores, rows, nodes)
        return scores, scores if self._recorder is None else self._as_plain(_at(self._logits, rows, nodes))

    def release(self, columns: int) -> None:
        """Tell that `columns` columns are settled and will not be asked for again."""
        if self._ledger is not None:
            self._ledger.release(columns)

    def finish(self, columns: int) -> None:
        """Leave the random generator where plain `generate()` leaves it after `columns` columns."""
        if self._ledger is not None:
            self._ledger.rewind(columns)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put the generator back after what runs inside, so that a drafter may draw at will."""
        state = generator_state(self._device)
        try:
            yield
        finally:
            set_generator_state(self._device, state)

    def _as_plain(self, logits: Tensor) -> Tensor:
        return logits.to(copy=True, dtype=torch.float32, device=self._device)

    def _draw(self, column: int, scores: Tensor, rows: list[int], picking: list[int]) -> Tensor:
        """Draw a token for each of `rows`; only what is wrong with those that are `picking` is an error."""
        probs = torch.nn.functional.softmax(scores, dim=-1)
        if self._ledger is None:
            return torch.multinomial(probs, num_samples=1).squeeze(1)
        judged = probs if len(picking) == len(rows) else probs[[rows.index(row) for row in picking]]
        if not bool(torch.isfinite(judged.sum())):
            raise RuntimeError(UNSOUND)
        if self.foresight is not None and self.learns:
            self.foresight.usual.learn(judged)
        noise = self._ledger.noise(column, probs.shape[-1])
        return (probs / (noise if len(rows) == self._rows else noise[rows])).argmax(-1)


def _at(table: Tensor, rows: list[int], nodes: list[int]) -> Tensor:
    """Return [rows, V]: for each row one node of `table` ([B, N, V])."""
    return table[:, nodes[0]] if table.shape[0] == 1 else table[rows, nodes]


_DRAWS_MATCH: dict[tuple[str, int | None], bool] = {}


def draws_match(device: torch.device) -> bool:
    """Whether `torch.multinomial` on `device` is the race that `NoiseLedger` replays; tried once a device."""
    key = (device.type, device.index)
    if key not in _DRAWS_MATCH:
        state = generator_state(device)
        probs = torch.linspace(1, 2, 3 * 257, device=device).view(3, 257).softmax(-1)
        plain = torch.multinomial(probs, 1).squeeze(1)
        after = generator_state(device)
        set_generator_state(device, state)
        raced = (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)
        same = torch.equal(plain, raced) and torch.equal(after, generator_state(device))
        set_generator_state(device, state)
        _DRAWS_MATCH[key] = same
    return _DRAWS_MATCH[key]


def generator_state(device: torch.device) -> Tensor:
    """Return a copy of the state of the generator that sampling on `device` draws from."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return getattr(torch, device.type).get_rng_state(device)  # type: ignore[no-any-return]


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Put back what `generator_state` returned."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)
