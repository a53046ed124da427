"""The original rule of lookahead decoding behind `lookahead.Drafter`, to measure ours against.

Fu et al. 2024 (arXiv 2402.02057), with the choices of their package, LookaheadDecoding (`lade` 0.0.2). Written from
what the rule says, in plain Python, and sharing no code with it; its tokens per pass say something, its time does not.
"""

from __future__ import annotations

import random

import numpy as np

from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.trace import Step

SHIFTS = ("one", "accepted")
SEED = 10
"""What the package seeds its draws with, at the start of every request."""


class OriginalWindow(Drafter):
    """Guesses a window of future tokens in parallel, and drafts the n-grams that these guesses have run through.

    N - 1 levels of guesses lie behind the last token, W columns wide. Level 0 is a chain; a guess of level k hangs
    under its column's guess of level k - 1, and is what the model said there a pass ago. They are probes, run but never
    accepted. The first N - 2 passes fill the levels, from random tokens of the prompt. After that each pass finishes
    one n-gram a column, of N tokens: the first is its key, the other N - 1 its guess. All guesses of the last token are
    verified at once, then the oldest level leaves and what the model has just said joins as the newest.

    The package lays its first window in the prefill; here the prefill is a pass before that, so that a request takes
    about one pass more. Behind the same text, both run and accept the same in every pass.

    Args:
        window: W, columns.
        ngram: N, tokens of an n-gram, its key included.
        guesses: G, guesses that a key keeps, the least recently seen leaving first.
        shift: how far the window moves in a pass: by "one" whatever was accepted, as the package comes, or by the
            "accepted" tokens and one, filled up from the right with random tokens of the text so far (its
            ALWAYS_FWD_ONE=0).
        faithful: verify the last token of a guess but never accept it, as the package does: its loop over a guess ends
            one short of a full match, so that a pass yields N - 1 tokens at most. False: up to N.

    Attributes:
        probes: the most probes of the window in a pass; the engine lets a row run them beside its nodes.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self, *, window: int = 15, ngram: int = 5, guesses: int = 15, shift: str = "one", faithful: bool = True
    ) -> None:
        if window < 1 or ngram < 3 or guesses < 1:
            raise ValueError(f"window={window}, ngram={ngram}, guesses={guesses}; give 1, 3, and 1 or more")
        if shift not in SHIFTS:
            raise ValueError(f"shift={shift!r}; give one of {', '.join(SHIFTS)}")
        self.window, self.ngram, self.guesses, self.shift, self.faithful = window, ngram, guesses, shift, faithful
        # With `levels` of N - 1 filled, level 0 holds one guess less than each of the others.
        self.probes = max(levels * (window + ngram - 1 - levels) - 1 for levels in range(1, ngram))

    def start(self, context: IntArray) -> OriginalRow:
        return OriginalRow(self, context)

    def propose(self, context: IntArray, budget: int) -> Draft:
        raise NotImplementedError("a window belongs to one row; call start()")


class OriginalRow(Drafter):
    """The window and the n-grams of one row.

    Attributes:
        levels: the guesses, oldest level first; N - 1 lists when filled, of W - 1 tokens the first, of W the others.
        ngrams: for every key its guesses of N - 1 tokens, the most recently seen last.
    """

    def __init__(self, rule: OriginalWindow, context: IntArray) -> None:
        self._rule, self.probes = rule, rule.probes
        self._random = random.Random(SEED)
        self._text: list[int] = context.tolist()
        self._tree, self._tips = _Tree(0), list[int]()
        self.levels = [[self._draw() for _ in range(rule.window + rule.ngram - 3)]]
        self.ngrams: dict[int, list[tuple[int, ...]]] = {}

    @property
    def filled(self) -> bool:
        """Whether the window has all its levels, so that a pass finishes n-grams."""
        return len(self.levels) == self._rule.ngram - 1

    def propose(self, context: IntArray, budget: int) -> Draft:
        self._text = context.tolist()
        self._tree = _Tree(self._text[-1])
        for guess in self.ngrams.get(self._text[-1], ()):
            node = 0
            for token in guess[:-1]:
                node = self._tree.add(node, token, probe=False)
            self._tree.add(node, guess[-1], probe=self._rule.faithful)
        self._tips = self._add_window()
        return self._tree.draft()

    def observe(self, step: Step) -> None:
        said = self._tree.predictions(step)
        results = [said.get(tip) for tip in self._tips]
        if self.filled:
            self._learn(results)
            self._advance(self._known(results), step.accepted if self._rule.shift == "accepted" else 0)
        else:
            self._fill(self._known(results))

    def _add_window(self) -> list[int]:
        """Add the guesses to the tree; return the nodes whose successors become the newest level."""
        chain = [0]
        for token in self.levels[0]:
            chain.append(self._tree.add(chain[-1], token, probe=True))
        if len(self.levels) == 1:
            return chain[1:]
        tips = chain
        for level in self.levels[1:]:
            tips = [self._tree.add(tip, token, probe=True) for tip, token in zip(tips, level, strict=True)]
        return tips

    def _fill(self, results: list[int]) -> None:
        """Add a level; the first column moves out of the window, into the text."""
        newest = results if len(self.levels) == 1 else results[1:]
        self.levels = [*(level[1:] for level in self.levels), newest]

    def _learn(self, results: list[int | None]) -> None:
        """Keep the n-gram that each column has finished, where its last guess ran."""
        keys = [self._text[-1], *self.levels[0]]
        for key, *middle, last in zip(keys, *self.levels[1:], results, strict=True):
            if last is None:
                continue
            guess, known = (*middle, last), self.ngrams.setdefault(key, [])
            if guess in known:
                known.remove(guess)
            known.append(guess)
            del known[: -self._rule.guesses]

    def _advance(self, results: list[int], accepted: int) -> None:
        """Drop the oldest level for the newest, and move on by one column and as many as were `accepted`."""
        _, oldest, *others = [*self.levels, results]
        self.levels = [oldest[1 + accepted :], *(level[accepted:] for level in others)]
        for i, level in enumerate(self.levels):
            size = self._rule.window - (i == 0)
            level += [self._draw() for _ in range(size - len(level))]

    def _known(self, results: list[int | None]) -> list[int]:
        """Return the results, a random token for each guess that the engine cut off (near the end of a request)."""
        return [self._draw() if token is None else token for token in results]

    def _draw(self) -> int:
        return self._random.choice(self._text)


class _Tree:
    """A draft in the making, where equal siblings are one node, and the way back to it from what was run."""

    def __init__(self, root: int) -> None:
        self._tokens, self._parents, self._probe = [root], [-1], [False]
        self._index: dict[tuple[int, int, bool], int] = {}

    def add(self, parent: int, token: int, *, probe: bool) -> int:
        """Return the child of `parent` that holds `token`, made if it is not there."""
        node = self._index.setdefault((parent, token, probe), len(self._tokens))
        if node == len(self._tokens):
            self._tokens.append(token)
            self._parents.append(parent)
            self._probe.append(probe)
        return node

    def draft(self) -> Draft:
        return Draft(
            np.array(self._tokens, np.int32), np.array(self._parents, np.int32), probe=np.array(self._probe, np.bool_)
        )

    def predictions(self, step: Step) -> dict[int, int]:
        """Return the likeliest successor of every node that ran; the engine may have cut and reordered the tree."""
        nodes = [0]
        columns = (step.draft.parents, step.draft.tokens, step.draft.probe)
        for parent, token, probe in list(zip(*(column.tolist() for column in columns), strict=True))[1:]:
            nodes.append(self._index[nodes[parent], token, probe])
        return dict(zip(nodes, step.top_tokens[:, 0].tolist(), strict=True))
