"""The loop: propose, choose, forward, walk, keep, observe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from lookahead.draft import Draft
from lookahead.drafter import Drafter
from lookahead.errors import GrammarError, InvalidDraft
from lookahead.opening import Opening
from lookahead.progress import Contexts, Progress
from lookahead.purse import Purse, Spent
from lookahead.sampling import Sampler
from lookahead.sources.codes import name_of
from lookahead.static.target import StaticTarget
from lookahead.target import Target
from lookahead.topk import TOP
from lookahead.trace import Pass, Share, Step
from lookahead.trees import Grown
from lookahead.turn import Turn
from lookahead.verify import walk

WARY = 2  # columns of noise that a drafter sees where drafting has not paid lately


class Decoder:
    """Decodes one batch from the logits of its prefill to the end.

    Args:
        target: runs passes behind the prompt; or the prompt together with the first draft, and then makes way.
        drafters: one a row; empty for plain decoding.
        purse: says who drafts, and how many nodes run.
        vocab: drafted tokens must be smaller.
    """

    def __init__(
        self,
        target: Target | StaticTarget | Opening,
        sampler: Sampler,
        progress: Progress,
        contexts: Contexts,
        drafters: Sequence[Drafter],
        *,
        purse: Purse,
        vocab: int,
    ) -> None:
        self._target: Target | StaticTarget | Opening = target
        self._sampler, self._progress, self._contexts = sampler, progress, contexts
        self._drafters, self._purse, self._vocab = drafters, purse, vocab
        grammar = next(iter(sampler.grammars), None)
        self._matchers = [None if grammar is None else grammar.matcher(row) for row in range(progress.rows)]
        self._obeys = [m is None or d.obey(m) for d, m in zip(drafters, self._matchers, strict=False)]
        foresight = sampler.foresight
        self._foresees = [foresight is not None and d.foresee(foresight.row(row)) for row, d in enumerate(drafters)]
        if not any(self._foresees):
            sampler.foresight = None
        self.passes: list[Pass] = []
        self._account_s = 0.0  # what it took to account for the last step, for each row that drafted
        self._open: Turn | None = None  # the step that is not accounted for yet

    def run(self, prefill: Tensor | None) -> None:
        """Generate until every row is done.

        Args:
            prefill: [B, 1, V], the logits after the prompt; None: it runs in the first step.
        """
        try:
            if prefill is not None:
                self._start(prefill)
            while not self._progress.done:
                self.step()
        finally:
            self._catch_up()

    def _start(self, prefill: Tensor) -> None:
        """Pick the first token of all rows."""
        roots = [Draft.root(0)] * self._progress.rows
        self._sampler.judge(prefill, None, self._progress.length, [root.depth for root in roots])
        self._sampler.load(prefill, 0)
        self._sampler.learn(walk(roots, self._sampler, self._progress))
        for row in range(self._progress.rows):
            self._contexts.extend(row, 0, self._progress.new_tokens(row, 0))

    def step(self) -> None:
        """Run one pass over the trees of all rows.

        Where the model runs on a device of its own, the step is accounted for while that is at work on the next one.
        """
        turn = self._begin()
        self._draft(turn)
        turn.lap()
        self._verify(turn)
        turn.lap()
        self._keep(turn)
        turn.lap()
        self._learn(turn)
        turn.lap()
        self._open = turn
        if not self._target.runs_apart:
            self._catch_up()

    def _catch_up(self) -> None:
        """Account for the step that is not accounted for yet."""
        turn, self._open = self._open, None
        if turn is not None:
            self.passes.append(self._account(turn))

    def _begin(self) -> Turn:
        begin, progress = time.perf_counter(), self._progress
        progress.held = frozenset()
        going = self._going()
        asked = [row for row in going if self._purse.asks(row)] if self._drafters else []
        if not asked and self._purse.frugal:
            # Rows that are ahead wait for the others: nobody drafts, and rows apart are picked for one by one.
            behind = min((progress.length[row] for row in going), default=0)
            progress.held = frozenset(row for row in going if progress.length[row] > behind)
            going = self._going() if progress.held else going
        return Turn(list(progress.length), going, asked, self._target.used, begin)

    def _going(self) -> list[int]:
        """Return the rows that may pick a token of their own."""
        progress = self._progress
        return [row for row in range(progress.rows) if progress.is_open(row) and not progress.is_padding(row)]

    # Drafts

    def _draft(self, turn: Turn) -> None:
        """Let the rows that draft propose, and cut what they propose to what pays."""
        self._settle_grammars()
        turn.proposed = self._propose_all(turn) if turn.asked else {}
        turn.choice, chosen = self._purse.choose(turn.proposed, len(turn.going))
        turn.drafts = [chosen[row] if row in chosen else self._rest(row, turn) for row in range(self._progress.rows)]

    def _propose_all(self, turn: Turn) -> dict[int, Draft]:
        drafts = {}
        self._purse.prepare(len(turn.asked), turn.context)
        self._look_ahead(turn)
        for row in turn.asked:
            begin = time.perf_counter()
            with self._undisturbed(row):
                turn.offered[row] = self._offered(row)
                drafts[row] = self._fitted(row, turn.offered[row])
            turn.asking_s[row] += time.perf_counter() - begin
        return drafts

    def _undisturbed(self, row: int) -> AbstractContextManager[None]:
        """Put the generator back after what the drafter of `row` does, if it may draw from it."""
        return self._sampler.undisturbed() if self._drafters[row].random else nullcontext()

    def _rest(self, row: int, turn: Turn) -> Draft:
        """Return the draft of a row that does not propose: nothing, or the padding that it goes on with."""
        progress, last = self._progress, self._progress.last(row)
        if not (self._drafters and progress.is_open(row) and progress.is_padding(row)):
            return Draft.root(last)
        chain = Draft.chain([last] + [progress.padding] * min(turn.choice.nodes, self._depth(row)))
        return self._target.fit(chain)

    def _depth(self, row: int) -> int:
        """Return how deep a draft of `row` may go."""
        depth = self._progress.remaining(row) - 1
        room = self._target.depth(row, self._progress.length[row] - 1)
        return depth if room is None else min(depth, room)

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

    def _look_ahead(self, turn: Turn) -> None:
        """Draw the noise that drafters look at; not among what they draw themselves, which is put back."""
        foresight, progress = self._sampler.foresight, self._progress
        for row in turn.asked:
            begin = time.perf_counter()
            if foresight is not None and self._foresees[row]:
                far = progress.remaining(row) if self._purse.trusts(row) else WARY
                foresight.look(row, progress.length[row], min(far, progress.remaining(row)))
            turn.asking_s[row] = time.perf_counter() - begin

    def _offered(self, row: int) -> Draft:
        """Return what the drafter of a row proposes."""
        drafter, length = self._drafters[row], self._progress.length[row]
        with suppress(AttributeError):  # one that cannot be written to, such as a frozen dataclass, does without
            drafter.floors = self._purse.floors
        draft = drafter.propose(self._contexts.view(row, length), self._purse.most)
        return self._checked(draft, row).deduplicate()

    def _fitted(self, row: int, draft: Draft) -> Draft:
        """Return what of a draft the model, its grammar and what is left to generate allow."""
        matcher, draft = self._matchers[row], self._target.fit(draft)
        if matcher is not None and not self._obeys[row]:
            draft = matcher.prune(draft)
        return draft.cut(self._purse.most + self._drafters[row].probes, depth=self._depth(row))

    def _checked(self, draft: Draft, row: int) -> Draft:
        name, last = type(self._drafters[row]).__name__, self._progress.last(row)
        if not isinstance(draft, Draft):
            raise InvalidDraft(f"{name}.propose() returned {type(draft).__name__}; return a lookahead.Draft")
        if int(draft.tokens[0]) != last:
            raise InvalidDraft(
                f"{name} drafted under token {draft.tokens[0]}, but the last token is {last} (context[-1])"
            )
        if int(draft.tokens.max()) >= self._vocab:
            raise InvalidDraft(f"{name} drafted token {draft.tokens.max()}; the model has {self._vocab} tokens")
        return draft

    # The pass

    def _verify(self, turn: Turn) -> None:
        """Run the pass, and walk down the trees."""
        before, self._sampler.learns = self._masks, bool(turn.asked)
        self._forward(turn)
        turn.begin += self._target.recording_s
        turn.paths = walk(turn.drafts, self._sampler, self._progress)
        self._sampler.learn(turn.paths)
        turn.masks = self._masks - before
        turn.prepared_s, turn.model_s = self._target.prepared_s, self._target.seconds

    def _forward(self, turn: Turn) -> None:
        """Run the pass; set what ran, and the best successors of its nodes where somebody learns from them.

        A guess whose keys or values overflow turns all nodes to NaN, because a mask multiplies them by 0. Then the pass
        is run again without guesses.
        """
        size = turn.size
        top = TOP if turn.asked or size > 1 else 0
        turn.best = self._scored(turn, top)
        if size > 1 and any(map(math.isnan, turn.best[1][::size, 0].tolist())):
            turn.drafts = [Draft.root(int(draft.tokens[0])) for draft in turn.drafts]
            self._target.forget_behind()
            turn.best = self._scored(turn, top)

    def _scored(self, turn: Turn, top: int) -> Any:
        """Run the pass, and all that is known to come behind it; then wait for what the host has to know."""
        logits = self._target.forward(turn.drafts, [start - 1 for start in turn.starts])
        depths = [draft.depth for draft in turn.drafts]
        picks = self._sampler.judge(logits, self._target.best, turn.starts, depths)
        if picks is not None:
            self._target.accept(picks)
        if self._target.runs_apart:
            self._catch_up()
            self._complete_masks(turn.drafts)
        return self._sampler.load(logits, top)

    def _complete_masks(self, drafts: list[Draft]) -> None:
        """Compute the masks that the walk may ask for while the device is at work; elsewhere it computes as it goes."""
        for row, matcher in enumerate(self._matchers):
            if matcher is not None and self._progress.is_open(row) and not self._progress.is_padding(row):
                matcher.complete(drafts[row])

    @property
    def _masks(self) -> int:
        """Masks of the grammar that were computed so far."""
        return sum(matcher.computed for matcher in self._matchers if matcher is not None)

    def _keep(self, turn: Turn) -> None:
        """Keep the rows of tokens that are still there and have a successor; a taken-back token may go further back."""
        counts = [self._progress.length[row] - start for row, start in enumerate(turn.starts)]
        paths = [path[: max(count, 0)] for path, count in zip(turn.paths, counts, strict=True)]
        if isinstance(self._target, Opening):
            self._target, turn.opens = self._target.keep(paths), True
            return
        self._target.keep(paths)
        for row, count in enumerate(counts):
            if count < 0:
                self._target.drop(row, -count)

    # What is learnt

    def _learn(self, turn: Turn) -> None:
        """Tell contexts and drafters what was committed."""
        turn.costs = {row: dict(self._drafters[row].costs) for row in turn.asked}
        for row in turn.going:
            tokens = self._progress.new_tokens(row, turn.starts[row])[: len(turn.paths[row])]  # the rest is padding
            if len(tokens) == 0:
                continue  # a criterion took back more than this pass gave
            self._contexts.extend(row, turn.starts[row], tokens)
            if row in turn.asking_s:
                begin = time.perf_counter()
                with self._undisturbed(row):
                    self._drafters[row].observe(self._observed(row, tokens, turn))
                turn.asking_s[row] += time.perf_counter() - begin

    def _observed(self, row: int, tokens: Any, turn: Turn) -> Step:
        draft, start = turn.drafts[row], row * turn.size
        nodes = slice(start, start + len(draft))
        return Step(
            row,
            draft,
            np.array(turn.paths[row][: len(tokens)], np.int32),
            tokens,
            turn.best[0][nodes],
            turn.best[1][nodes],
            partial(self._sampler.foreseen, row, turn.starts[row], draft.depth) if self._foresees[row] else None,
            rows=turn.size,
            seconds=turn.seconds,
            token_s=turn.choice.token_s,
            row_s=turn.choice.row_s,
            drafting=len(turn.asked),
            frugal=self._purse.frugal,
        )

    def _account(self, turn: Turn) -> Pass:
        """Tell the budget what the step took and brought, and everybody else."""
        begin = time.perf_counter()
        committed = tuple(
            max(length - start, 0) for length, start in zip(self._progress.length, turn.starts, strict=True)
        )
        draft_s, verified_s, cache_s, learn_s = turn.laps
        followed = [(draft, self._progress.new_tokens(row, turn.starts[row])) for row, draft in turn.proposed.items()]
        if turn.opens:  # it ran the prompt, too, and tells nothing of what other passes take
            self._purse.follow(followed)
        else:
            self._purse.observe(self._spent(turn, committed), followed)
        account_s = 0.0 if self._target.runs_apart else time.perf_counter() - begin
        self._account_s = account_s / max(len(turn.asked), 1)
        return Pass(
            turn.size,
            committed,
            expected=turn.choice.expected,
            why=turn.choice.why,
            token_s=turn.choice.token_s,
            row_s=turn.choice.row_s,
            draft_s=draft_s,
            mask_s=turn.prepared_s,
            model_s=turn.model_s,
            verify_s=max(verified_s - turn.prepared_s - turn.model_s, 0.0),
            cache_s=cache_s,
            learn_s=learn_s,
            step_s=turn.seconds + account_s,
            sources=shares([(turn.drafts[row], turn.paths[row], turn.costs[row]) for row in turn.asked]),
            opens=turn.opens,
            trees=Grown((row, turn.offered[row], turn.drafts[row], turn.paths[row]) for row in turn.asked),
        )

    def _spent(self, turn: Turn, committed: Sequence[int]) -> Spent:
        """Return what a step took and brought."""
        draft_s, verified_s, cache_s, _ = turn.laps
        return Spent(
            size=turn.size,
            context=turn.context,
            masks=turn.masks,
            pass_s=verified_s + cache_s,
            step_s=turn.seconds,
            asking_s={row: seconds + self._account_s for row, seconds in turn.asking_s.items()},
            grown=(sum(len(draft) - 1 for draft in turn.proposed.values()), draft_s),
            tokens={row: min(committed[row], len(turn.paths[row])) for row in turn.going},
            choice=turn.choice,
        )


def shares(rows: Iterable[tuple[Draft, Sequence[int], Mapping[str, float]]]) -> dict[str, Share]:
    """Return what each source had in a pass, from the drafts, paths and measured seconds of the rows that drafted."""
    found: dict[str, list[float]] = {}
    for draft, path, costs in rows:
        held = draft.source.tobytes()
        ran, kept = held[1:], bytes([held[node] for node in path[1:]])
        for code in set(ran):
            share = found.setdefault(name_of(code), [0, 0, 0.0])
            share[0] += ran.count(code)
            share[1] += kept.count(code)
        for name, seconds in costs.items():
            found.setdefault(name, [0, 0, 0.0])[2] += seconds
    return {name: Share(int(run), int(accepted), seconds) for name, (run, accepted, seconds) in found.items()}
