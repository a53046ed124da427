"""The loop: propose, forward, walk, keep, observe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from lookahead.draft import Draft
from lookahead.drafter import Drafter
from lookahead.errors import GrammarError, InvalidDraft
from lookahead.progress import Contexts, Progress
from lookahead.sampling import Sampler
from lookahead.target import Target
from lookahead.trace import Pass, Step
from lookahead.verify import walk

TOP = 8  # successors of every node that drafters may learn from


class Decoder:
    """Decodes one batch from the logits of its prefill to the end.

    Args:
        drafters: one a row; empty for plain decoding.
        nodes: nodes that each row may spend a pass.
        vocab: drafted tokens must be smaller.
    """

    def __init__(
        self,
        target: Target,
        sampler: Sampler,
        progress: Progress,
        contexts: Contexts,
        drafters: Sequence[Drafter],
        *,
        nodes: int,
        vocab: int,
    ) -> None:
        self._target, self._sampler, self._progress, self._contexts = target, sampler, progress, contexts
        self._drafters, self._nodes, self._vocab = drafters, nodes, vocab
        grammar = next(iter(sampler.grammars), None)
        self._matchers = [None if grammar is None else grammar.matcher(row) for row in range(progress.rows)]
        self._obeys = [m is None or d.obey(m) for d, m in zip(drafters, self._matchers, strict=False)]
        foresight = sampler.foresight
        self._foresees = [foresight is not None and d.foresee(foresight.row(row)) for row, d in enumerate(drafters)]
        if not any(self._foresees):
            sampler.foresight = None
        self.passes: list[Pass] = []

    def run(self, prefill: Tensor) -> None:
        """Generate until every row is done. `prefill`: [B, 1, V], the logits after the prompt."""
        self._sampler.load(prefill, 0)
        walk([Draft.root(0)] * self._progress.rows, self._sampler, self._progress)
        for row in range(self._progress.rows):
            self._contexts.extend(row, 0, self._progress.new_tokens(row, 0))
        while not self._progress.done:
            self.passes.append(self.step())

    def step(self) -> Pass:
        """Run one pass over the trees of all rows."""
        progress, starts, begin = self._progress, list(self._progress.length), time.perf_counter()
        self._settle_grammars()
        asked = [row for row in range(progress.rows) if progress.is_open(row) and not progress.is_padding(row)]
        self._look_ahead(asked)
        with self._sampler.undisturbed() if self._drafters else nullcontext():
            drafts = [self._propose(row) for row in range(progress.rows)]
        proposed = time.perf_counter()
        drafts, best = self._forward(drafts, [start - 1 for start in starts])
        paths = walk(drafts, self._sampler, progress)
        self._keep(paths, starts)
        if best is not None:
            self._observe(asked, drafts, paths, starts, best, time.perf_counter() - begin)
        accepted = tuple(max(progress.length[row] - starts[row], 0) for row in range(progress.rows))
        size = max(len(draft) for draft in drafts)
        rest = time.perf_counter() - proposed - self._target.seconds
        return Pass(
            size,
            accepted,
            draft_s=proposed - begin,
            model_s=self._target.seconds,
            verify_s=rest,
            step_s=time.perf_counter() - begin,
        )

    def _settle_grammars(self) -> None:
        """Tell the grammars of all rows what is written, so that they forget what is not.

        What fails here fails again when the row picks, if it gets there: plain `generate()` may end before.
        """
        for grammar in self._sampler.grammars:
            for row in range(self._progress.rows):
                matcher = grammar.matcher(row)
                if matcher is not None and self._progress.is_open(row) and not self._progress.is_padding(row):
                    with suppress(GrammarError):
                        matcher.settle(self._progress.new_tokens(row, 0).astype(np.int32))

    def _look_ahead(self, rows: list[int]) -> None:
        """Draw the noise that drafters look at; not among what they draw themselves, which is put back."""
        foresight = self._sampler.foresight
        for row in rows:
            if foresight is not None and self._drafters and self._foresees[row]:
                foresight.look(row, self._progress.length[row], self._progress.remaining(row))

    def _propose(self, row: int) -> Draft:
        progress = self._progress
        last = progress.last(row)
        if not self._drafters or not progress.is_open(row):
            return Draft.root(last)
        depth = progress.remaining(row) - 1
        room = self._target.depth(row, progress.length[row] - 1)
        depth = depth if room is None else min(depth, room)
        if progress.is_padding(row):
            return Draft.chain([last] + [progress.padding] * min(self._nodes, depth))
        matcher, length = self._matchers[row], progress.length[row]
        draft = self._drafters[row].propose(self._contexts.view(row, length), self._nodes)
        draft = self._checked(draft, last, row).deduplicate()
        if matcher is not None and not self._obeys[row]:
            draft = matcher.prune(draft)
        return draft.cut(self._nodes + self._drafters[row].probes, depth=depth)

    def _forward(self, drafts: list[Draft], columns: list[int]) -> tuple[list[Draft], Any]:
        """Run the pass; return the drafts that ran and the best successors of their nodes.

        A guess whose keys or values overflow turns all nodes to NaN, because a mask multiplies them by 0. Then the pass
        is run again without guesses.
        """
        top = TOP if self._drafters else 0
        logits = self._target.forward(drafts, columns)
        if self._target.runs_apart:
            self._complete_masks(drafts)
        best = self._sampler.load(logits, top)
        size = max(len(draft) for draft in drafts)
        if best is not None and size > 1 and np.isnan(best[1][::size, 0]).any():
            drafts = [Draft.root(int(draft.tokens[0])) for draft in drafts]
            best = self._sampler.load(self._target.forward(drafts, columns), top)
        return drafts, best

    def _complete_masks(self, drafts: list[Draft]) -> None:
        """Compute the masks that the walk may ask for while the device is at work; elsewhere it computes as it goes."""
        for row, matcher in enumerate(self._matchers):
            if matcher is not None and self._progress.is_open(row) and not self._progress.is_padding(row):
                matcher.complete(drafts[row])

    def _checked(self, draft: Draft, last: int, row: int) -> Draft:
        name = type(self._drafters[row]).__name__
        if not isinstance(draft, Draft):
            raise InvalidDraft(f"{name}.propose() returned {type(draft).__name__}; return a lookahead.Draft")
        if int(draft.tokens[0]) != last:
            raise InvalidDraft(
                f"{name} drafted under token {draft.tokens[0]}, but the last token is {last} (context[-1])"
            )
        if int(draft.tokens.max()) >= self._vocab:
            raise InvalidDraft(f"{name} drafted token {draft.tokens.max()}; the model has {self._vocab} tokens")
        return draft

    def _keep(self, paths: list[list[int]], starts: list[int]) -> None:
        """Keep the rows of tokens that are still there and have a successor; a taken-back token may go further back."""
        counts = [self._progress.length[row] - starts[row] for row in range(len(paths))]
        kept = [path[: max(count, 0)] for path, count in zip(paths, counts, strict=True)]
        self._target.keep(kept)
        for row, count in enumerate(counts):
            if count < 0:
                self._target.drop(row, -count)

    def _observe(
        self,
        asked: list[int],
        drafts: list[Draft],
        paths: list[list[int]],
        starts: list[int],
        best: Any,
        seconds: float,
    ) -> None:
        size = max(len(draft) for draft in drafts)
        for row in asked:
            tokens = self._progress.new_tokens(row, starts[row])[: len(paths[row])]  # what follows is padding
            if len(tokens) == 0:
                continue  # a criterion took back more than this pass gave
            self._contexts.extend(row, starts[row], tokens)
            nodes = slice(row * size, row * size + len(drafts[row]))
            kept = np.array(paths[row][: len(tokens)], np.int32)
            tops = best[0][nodes], best[1][nodes]
            foreseen = partial(self._sampler.foreseen, row, starts[row], drafts[row].depth)
            known = foreseen if self._foresees[row] else None
            step = Step(row, drafts[row], kept, tokens, *tops, known, size, seconds)
            with self._sampler.undisturbed():
                self._drafters[row].observe(step)
