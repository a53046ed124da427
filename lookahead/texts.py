"""The texts of the requests of a serving engine, known by what stands in its rows of tokens."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.pool.sort import DEPTH
from lookahead.sources.chain import Texts, empty_texts, match, note
from lookahead.sources.prompt import PROMPT, Prompt

KEPT = 8
"""Texts that are kept of requests which are not in the batch: they may have been put off."""

_FIRST = 8  # places for texts to begin with


class Rows:
    """The rows of a batch, and which text each of them is.

    Args:
        nodes: of a chain, root included.

    Attributes:
        arrays: what kernels see of the texts.
        owner: [B] the text of each row of the last batch, -1: it did not draft.
    """

    def __init__(self, nodes: int) -> None:
        self._nodes, self._runs = nodes, 0
        self.arrays = empty_texts(_FIRST, nodes, 0)
        self.indexes: dict[int, Prompt] = {}
        self.owner: NDArray[np.int64] = np.zeros(0, np.int64)
        self._left: OrderedDict[int, None] = OrderedDict()  # texts that no row has, the first to leave first

    def recognise(self, tokens: IntArray, lengths: NDArray[np.int64], new: NDArray[np.int64]) -> tuple[int, list[int]]:
        """Find the text of every row of a batch, and begin one where there is none.

        Args:
            tokens: [B, L] the rows; `lengths`: [B] tokens that are there of each.
            new: [B] how many of these were generated just now; a row without any does not draft.

        Returns:
            How many texts were begun, and the texts that were in the last batch and are not in this one.
        """
        places = np.full(len(lengths), -1, np.int64)
        places[: len(self.owner)] = self.owner[: len(places)]
        owner, claimed = np.empty_like(places), np.zeros(len(self.arrays.table), np.bool_)
        match(self.arrays.table, tokens, lengths, new > 0, places, owner, claimed)
        gone = [text for text in self.indexes if not claimed[text] and text not in self._left]
        for text in gone:
            self._left[text] = None
        for text in [text for text in self._left if claimed[text]]:
            del self._left[text]
        unknown = np.flatnonzero((owner < 0) & (new > 0)).tolist()
        for row in unknown:
            owner[row] = self._begin(int(lengths[row] - new[row]), int(lengths[row]))
        self.owner = owner
        table, rows = self.arrays.table, owner >= 0
        for row in np.flatnonzero(rows)[lengths[rows] > table["tokens_n"][owner[rows]]].tolist():
            self._enlarge(int(owner[row]), int(lengths[row]))
        return len(unknown), gone

    def ask(self, runs: int) -> None:
        """Make room for where the texts stand in `runs` runs; they are to be read anew."""
        if runs != self._runs:
            self._runs = runs
            self.arrays = _resized(self.arrays, len(self.arrays.table), self._nodes, runs)

    def forget(self) -> None:
        """Drop the texts that have been left for longest; to be called when all that is wanted of them is taken."""
        while len(self._left) > KEPT:
            text, _ = self._left.popitem(last=False)
            del self.indexes[text]
            self.arrays.table[text]["seen"] = 0

    def grown(self, tokens: int) -> list[int]:
        """Return the texts in the batch that have grown by so many tokens since others were shown them."""
        table, owner = self.arrays.table, self.owner[self.owner >= 0]
        found: list[int] = owner[table["seen"][owner] - table["shown"][owner] >= tokens].tolist()
        return found

    def show(self, text: int) -> IntArray:
        """Return what of a text others have not been shown, and the tokens before it that it is found by."""
        record = self.arrays.table[text]
        begin, record["shown"] = int(record["shown"]), record["seen"]
        return self._tokens(text, begin - DEPTH)

    def give(self, text: int) -> tuple[IntArray, IntArray]:
        """Return a text in two parts: what was there before, and what has been generated since this was last asked."""
        record = self.arrays.table[text]
        begin, record["given"] = int(record["given"]), record["seen"]
        whole = self._tokens(text, 0)
        return whole[:begin], whole[begin:]

    def running(self) -> list[int]:
        """Return the texts that are in the batch."""
        return [text for text in self.indexes if text not in self._left]

    def _tokens(self, text: int, begin: int) -> IntArray:
        tokens = self.indexes[text].index.tokens
        return tokens[max(begin, 0) : int(self.arrays.table[text]["seen"])].copy()

    def _begin(self, begun: int, length: int) -> int:
        """Return the place of a new text, whose first `begun` tokens are its prompt."""
        free = next((text for text in range(len(self.arrays.table)) if text not in self.indexes), None)
        if free is None:
            free = len(self.arrays.table)
            self.arrays = _resized(self.arrays, 2 * free, self._nodes, self._runs)
        prompt = Prompt(np.zeros(0, np.int32))
        prompt.reserve(length + 1)
        prompt.index.used[PROMPT] = begun
        self.indexes[free] = prompt
        record = self.arrays.table[free]
        record["seen"] = record["read"] = 0
        record["shown"] = record["given"] = begun
        self.arrays.used[free, 0] = 0  # nodes of a chain that something could be learnt from
        note(self.arrays.table, free, prompt.index)
        return free

    def _enlarge(self, text: int, length: int) -> None:
        prompt = self.indexes[text]
        prompt.reserve(length)
        note(self.arrays.table, text, prompt.index)


def _resized(old: Texts, texts: int, nodes: int, runs: int) -> Texts:
    """Return room for more texts or for other runs, with what is known of the texts there are."""
    new = empty_texts(texts, nodes, runs)
    there = len(old.table)
    for name in ("table", "nodes", "place", "used"):
        getattr(new, name)[:there] = getattr(old, name)
    for name in new.lessons._fields:
        getattr(new.lessons, name)[:there] = getattr(old.lessons, name)
    if new.before.shape[1] == old.before.shape[1]:
        new.before[:there], new.spots[:there] = old.before, old.spots
    else:
        new.table["read"] = 0
    return new
