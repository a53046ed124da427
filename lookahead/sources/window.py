"""The window of Jacobi lookahead: guesses of coming tokens that the model refines pass after pass.

A window has N - 1 levels. Level 0 is a chain of guesses behind the last token; under each token of that chain, the last
one included, hangs a chain of one guess from each higher level. All of them are probe nodes of the draft. What the
model picks at the end of a chain is the newest guess of that column: it completes an n-gram (the token of level 0, the
chain, the pick), and becomes the last level while all levels move down (Fu et al. 2024, section 3.1; what is said there
of a mask of its own is here the tree mask that every draft has).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import Draft, IntArray
from lookahead.grammar.masks import Words
from lookahead.sources.codes import JACOBI
from lookahead.sources.guide import holds
from lookahead.sources.jacobi import Jacobi, Ngrams, keep_ngram
from lookahead.sources.kernels import inner, kernel
from lookahead.sources.nodes import find_child, find_nodes
from lookahead.sources.tree import NODES, Tree, best_child
from lookahead.trace import Step

UNKNOWN = -1
"""A guess that is to be made anew."""

FILLED, COLUMNS = 0, 1  # in `state`


class Guesses(NamedTuple):
    """The guesses of one window, and where they stood in its last draft."""

    levels: IntArray  # [N - 1, C] guesses; column 0 of level 0 is the root of the draft
    nodes: IntArray  # [N - 1, C] their nodes in the draft as it was laid
    follow: IntArray  # [N - 1] room for an n-gram
    state: NDArray[np.int64]  # [2] levels filled beyond the first, and columns in use


class Window:
    """The window of one batch row.

    Args:
        options: its size and how it moves.
        ngrams: takes what it writes.
    """

    def __init__(self, options: Jacobi, ngrams: Ngrams) -> None:
        columns = options.window + options.ngram - 2
        levels = np.full((options.ngram - 1, columns), UNKNOWN, np.int32)
        self.options, self.ngrams = options, ngrams
        self.guesses = Guesses(
            levels=levels,
            nodes=np.zeros_like(levels),
            follow=np.zeros(len(levels), np.int32),
            state=np.array([0, columns], np.int64),
        )
        self._laid: Draft | None = None
        self._seen = np.zeros(0, np.uint32)  # mask of the tokens that the grammar has allowed so far

    @property
    def reach(self) -> int:
        """Positions behind the root that it guesses at."""
        return self.options.window + self.options.ngram - 3

    @property
    def wants_guesses(self) -> bool:
        """Whether some guesses are to be made anew."""
        return bool(wants_guesses(self.guesses))

    def restart(self) -> None:
        """Forget all guesses; the n-grams stay."""
        self.guesses.levels[:] = UNKNOWN
        self.guesses.state[:] = 0, self.guesses.levels.shape[1]
        self._laid = None

    def lay(self, draft: Draft, ahead: IntArray, tree: Tree, masks: Words, vocab_size: int) -> Draft:
        """Return `draft` with the window below it. A guess that stands there already needs no node of its own.

        A guess that the grammar forbids where it would stand, as far as that is known, gives way to the likeliest node
        there.

        Args:
            ahead: [reach] a likely token of each position behind the root, for guesses that are to be made anew; read
                where `wants_guesses`.
            tree: what `draft` was made from, node by node.
            masks: of its states in the grammar.
            vocab_size: a guess at or above it gives way to the root's token.
        """
        size = len(draft) + self.options.probes
        tokens, parents, probe = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.bool_)
        used = lay(self.guesses, ahead, tree, masks, vocab_size, tokens, parents, probe)
        weight, source = np.zeros(used, np.float32), np.full(used, JACOBI, np.uint8)
        weight[: len(draft)], source[: len(draft)] = draft.weight, draft.source
        self._laid = Draft(tokens[:used], parents[:used], weight, source, probe[:used])
        return self._laid

    def observe(self, step: Step, tree: Tree, masks: Words) -> None:
        """Take in what the model picked at the end of every column, and move on.

        Nodes that were cut, as it happens near the end of a text, leave guesses to be made anew.

        Tokens that the grammar has allowed nowhere so far give way to the likeliest that it has.

        Args:
            tree: what the draft was made from; `masks`: of its states in the grammar.
        """
        if masks.shape[0] > 0:
            if len(self._seen) != masks.shape[1]:
                self._seen = np.zeros(masks.shape[1], np.uint32)
            see(tree, masks, self._seen)
        laid, draft, guesses = self._laid, step.draft, self.guesses
        if laid is None:
            return
        self._laid = None
        place = np.arange(len(laid), dtype=np.int32)
        if len(draft) != len(laid):
            find_nodes(laid.tokens, laid.parents, draft.tokens, draft.parents, place)
        ends = place[guesses.nodes[guesses.state[FILLED], : guesses.state[COLUMNS]]]
        ran, picks = ends[ends >= 0], np.full(len(ends), UNKNOWN, np.int32)
        if len(ran):
            picks[ends >= 0] = step.top_tokens[ran, 0] if step.foreseen is None else step.foreseen(ran)
        obey(picks, ends, step.top_tokens, self._seen)
        moved = len(step.tokens) if self.options.shift == "accepted" else 1
        collect(guesses, self.ngrams, picks, int(draft.tokens[0]), moved)


@kernel
def wants_guesses(guesses):  # type: ignore[no-untyped-def]
    for level in range(guesses.state[FILLED] + 1):
        for column in range(1 if level == 0 else 0, guesses.state[COLUMNS]):
            if guesses.levels[level, column] < 0:
                return True
    return False


@kernel
def lay(guesses, ahead, tree, masks, vocab_size, tokens, parents, probe):  # type: ignore[no-untyped-def]
    """Copy the tree, add the guesses that are not in it, and return how many nodes there are."""
    used = tree.used[NODES]
    for i in range(used):
        tokens[i], parents[i] = tree.nodes[i].token, tree.nodes[i].parent
    levels, nodes = guesses.levels, guesses.nodes
    nodes[0, 0] = 0
    for level in range(guesses.state[FILLED] + 1):
        for column in range(guesses.state[COLUMNS]):
            if level == 0 and column == 0:
                continue
            if levels[level, column] < 0:
                levels[level, column] = ahead[level + column - 1]
            if not 0 <= levels[level, column] < vocab_size:
                levels[level, column] = tokens[0]
            above = nodes[0, column - 1] if level == 0 else nodes[level - 1, column]
            levels[level, column] = _allowed(tree, masks, above, levels[level, column])
            node = find_child(tokens, parents, used, above, levels[level, column])
            if node < 0:
                node = used
                tokens[node], parents[node], probe[node] = levels[level, column], above, True
                used += 1
            nodes[level, column] = node
    return used


@inner
def _allowed(tree, masks, above, guess):  # type: ignore[no-untyped-def]
    """Return `guess`, or the likeliest child of `above` where the grammar is known to forbid it."""
    if masks.shape[0] == 0 or above >= tree.used[NODES]:
        return guess
    state = tree.nodes[above].state
    if state <= 0 or holds(masks[state], guess):
        return guess
    child = best_child(tree, above)
    return tree.nodes[child].token if child >= 0 else guess


@kernel
def see(tree, masks, seen):  # type: ignore[no-untyped-def]
    """Add to the mask `seen` what is allowed anywhere in the tree."""
    for node in range(tree.used[NODES]):
        state = tree.nodes[node].state
        if state > 0:
            for w in range(seen.shape[0]):
                seen[w] |= masks[state, w]


@kernel
def obey(picks, nodes, top_tokens, seen):  # type: ignore[no-untyped-def]
    """Replace picks that `seen` does not hold by the likeliest successor of their nodes that it does."""
    for i in range(picks.shape[0] if seen.shape[0] > 0 else 0):
        if picks[i] >= 0 and not holds(seen, picks[i]):
            for r in range(top_tokens.shape[1]):
                if holds(seen, top_tokens[nodes[i], r]):
                    picks[i] = top_tokens[nodes[i], r]
                    break


@kernel
def collect(guesses, ngrams, picks, root, moved):  # type: ignore[no-untyped-def]
    """Take the picks at the end of all columns, keep the n-grams that they complete, and move the window.

    Args:
        picks: [columns] int32, -1 where a column did not run.
        root: the token of node 0.
        moved: columns to move by, once all levels are filled.
    """
    levels, state = guesses.levels, guesses.state
    filled, columns = state[FILLED], state[COLUMNS]
    if filled < levels.shape[0] - 1:
        _fill(guesses, picks)
        return
    for column in range(columns):
        known, follow = picks[column] >= 0, guesses.follow
        for level in range(1, levels.shape[0]):
            known = known and levels[level, column] >= 0
            follow[level - 1] = levels[level, column]
        if known and (column == 0 or levels[0, column] >= 0):
            follow[levels.shape[0] - 1] = picks[column]
            keep_ngram(ngrams, np.int64(root if column == 0 else levels[0, column]), follow, ngrams.root[0] + column)
    _move(guesses, picks, moved)


@inner
def _fill(guesses, picks):  # type: ignore[no-untyped-def]
    """Make the picks a level of their own; all levels move by one column, and the last one is lost."""
    levels, state = guesses.levels, guesses.state
    filled, columns = state[FILLED], state[COLUMNS] - 1
    for level in range(filled + 1):
        for column in range(1 if level == 0 else 0, columns):
            levels[level, column] = levels[level, column + 1]
    for column in range(columns):
        levels[filled + 1, column] = picks[column + 1]
    state[FILLED], state[COLUMNS] = filled + 1, columns


@inner
def _move(guesses, picks, moved):  # type: ignore[no-untyped-def]
    """Move all levels down, and by `moved` columns: every guess keeps its position in the text, if that moves too."""
    levels, columns = guesses.levels, guesses.state[COLUMNS]
    last = levels.shape[0] - 1
    for level in range(last + 1):
        for column in range(1 if level == 0 else 0, columns):
            at = column + moved - 1
            if at >= columns:
                levels[level, column] = UNKNOWN
            elif level < last:
                levels[level, column] = levels[level + 1, at]
            else:
                levels[level, column] = picks[at]
