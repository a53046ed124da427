"""The grower: one token tree a step, grown best first from what all sources know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import InvalidArgument
from lookahead.sources.alignment import FIELDS, advance, ask_alignment, expected, state_of
from lookahead.sources.evidence import (
    AT_ROOT,
    BIAS,
    BLEND,
    COLUMNS,
    CONTEXTS,
    DOUBT,
    GUESTS,
    Evidence,
    add_guest,
    clear,
    empty_evidence,
    log_odds,
)
from lookahead.sources.kernels import inner, kernel
from lookahead.sources.mixer import Weights, chance_of, choose_sets, fresh_weights, learn
from lookahead.sources.prompt import (
    PROMPT,
    REACH,
    TOKENS,
    Prompt,
    ask_contexts,
    hash_contexts,
    hash_edits,
    insert,
    look_up,
    no_index,
    realign,
)
from lookahead.sources.recycle import Recycled, ask_recycled, empty_tables, no_tables, remember
from lookahead.sources.source import Source
from lookahead.sources.tree import NODES, empty_tree, locate, plant, suffix_of, take, wait
from lookahead.trace import Step

SOURCES = ("unknown", "prompt", "recycle")
"""Names of the codes in `Draft.source`; the code of the i-th `Source` object is `len(SOURCES) + i`."""

_NONE = np.zeros(0, np.int32)
_LARGEST_TOKEN = int(np.iinfo(np.int32).max)


class Scratch(NamedTuple):
    """Room to ask about one node."""

    evidence: Evidence
    suffix: NDArray[np.int64]  # [REACH] the last tokens, newest first
    states: NDArray[np.int64]  # [CONTEXTS] hashes
    slots: NDArray[np.int64]  # [CONTEXTS] where they stand in the index


class Grower(Drafter):
    """Grows one tree a step from all sources, always at the node that is likeliest to be accepted.

    What it learns (the weights of the evidence, the recycled logits) outlives a request and is shared by all rows.

    Args:
        sources: whom to ask: "prompt" (n-grams of the row's own context), "recycle" (the model's own logits,
            remembered), and up to four `Source` objects.
        vocab_size: tokens at or above it are never proposed; None: no limit known.
        min_chance: a node that is accepted less often than this is not worth running.

    Raises:
        InvalidArgument: an unknown source, too many of them, or a chance outside [0, 1].
    """

    def __init__(
        self,
        *,
        sources: Iterable[str | Source] = ("prompt", "recycle"),
        vocab_size: int | None = None,
        min_chance: float = 0.02,
    ) -> None:
        self.sources = (sources,) if isinstance(sources, str) else tuple(sources)
        _check(self.sources, vocab_size, min_chance)
        self.vocab_size = vocab_size
        self.min_chance = float(min_chance)
        self.weights: Weights = fresh_weights()
        self.recycled: Recycled = empty_tables(vocab_size) if "recycle" in self.sources else no_tables()

    def start(self, context: IntArray) -> Drafter:
        return Row(self, context)

    def propose(self, context: IntArray, budget: int) -> Draft:
        return Row(self, context).propose(context, budget)


class Row(Drafter):
    """The grower at work on one batch row."""

    def __init__(self, grower: Grower, context: IntArray) -> None:
        self._grower = grower
        self._prompt = Prompt(context) if "prompt" in grower.sources else None
        self._guests = [source for source in grower.sources if isinstance(source, Source)]
        self._no_index = no_index()
        self._new = self._tail = _NONE
        self._tree = empty_tree(0)
        self._scratch = Scratch(
            empty_evidence(), np.zeros(REACH, np.int64), np.zeros(CONTEXTS, np.int64), np.zeros(CONTEXTS, np.int64)
        )

    def propose(self, context: IntArray, budget: int) -> Draft:
        if len(context) == 0:
            raise InvalidArgument("propose() needs a context of at least one token, the draft's node 0")
        self._new = _NONE if self._prompt is None else self._prompt.fresh(context)
        self._tail = np.array(context[-REACH:], np.int32)
        if len(self._tree.nodes) != budget + 1:
            self._tree = empty_tree(budget)
        if self._guests:
            self._grow_with_guests(context)
        else:
            _grow(*self._state())
        nodes = self._tree.nodes[: self._tree.used[NODES]]
        return Draft(nodes["token"], nodes["parent"], nodes["weight"], nodes["source"])

    def observe(self, step: Step) -> None:
        draft, recycled = step.draft, self._grower.recycled
        _learn(
            self._grower.weights,
            self._tree,
            draft.tokens,
            draft.parents,
            step.path,
            step.tokens,
            np.empty(len(draft), np.int32),
        )
        if len(recycled.key) and len(step.top_tokens) == len(draft):
            before = int(self._tail[-2]) if len(self._tail) > 1 else -1
            remember(recycled, before, draft.tokens, draft.parents, step.top_tokens, step.top_logits)
        for guest in self._guests:
            guest.observe(step)

    def _state(self) -> tuple[Any, ...]:
        grower = self._grower
        return (
            self._no_index if self._prompt is None else self._prompt.index,
            self._new,
            grower.recycled,
            grower.weights,
            self._tail,
            self._tree,
            self._scratch,
            grower.min_chance,
            _LARGEST_TOKEN if grower.vocab_size is None else grower.vocab_size,
        )

    def _grow_with_guests(self, context: IntArray) -> None:
        """Do what `_grow` does, and let Python objects speak at every node."""
        index, new, recycled, weights, tail, tree, scratch, min_chance, vocab_size = self._state()
        _begin(index, new, recycled, weights, tail, tree, scratch)
        cursors = [[guest.start(context) for guest in self._guests]]
        node = 0
        while node >= 0:
            for i, (guest, cursor) in enumerate(zip(self._guests, cursors[node], strict=True)):
                tokens, chances = guest.successors(cursor)
                add_guest(scratch.evidence, i, np.asarray(tokens, np.int32), np.asarray(chances, np.float32))
            node = _step(index, recycled, weights, tail, tree, scratch, node, min_chance, vocab_size)
            if node > 0:
                above, token = cursors[tree.nodes["parent"][node]], int(tree.nodes["token"][node])
                cursors.append([g.extend(c, token) for g, c in zip(self._guests, above, strict=True)])


def _check(sources: tuple[str | Source, ...], vocab_size: int | None, min_chance: float) -> None:
    for source in sources:
        if not isinstance(source, Source) and source not in SOURCES[1:]:
            raise InvalidArgument(
                f"sources has {source!r}, which is not known; choose from {', '.join(SOURCES[1:])}, or give an object "
                "with the methods start, extend, successors and observe"
            )
    if sum(isinstance(source, Source) for source in sources) > GUESTS:
        raise InvalidArgument(f"sources has more than {GUESTS} objects; join some of them in one")
    if vocab_size is not None and vocab_size < 1:
        raise InvalidArgument(f"vocab_size={vocab_size}; give the number of tokens the model knows, or None")
    if not 0.0 <= min_chance <= 1.0:
        raise InvalidArgument(f"min_chance={min_chance} is not a chance; give a number from 0 to 1")


@kernel
def _grow(index, new, recycled, weights, tail, tree, scratch, min_chance, vocab_size):  # type: ignore[no-untyped-def]
    """Index the `new` tokens, then grow `tree` until it is full or no successor is likely enough."""
    insert(index, new, scratch.suffix, scratch.states)
    plant(tree, tail[-1], index.place)
    node = 0
    while node >= 0:
        if tree.used[NODES] < tree.nodes.shape[0]:
            _ask(index, recycled, weights, tail, tree, scratch, node)
            _enqueue(weights, tree, scratch.evidence, node, min_chance, vocab_size)
        node = _next(index, tree)


# The three parts of `_grow` once more, for the loop that lets Python objects speak in between.
@kernel
def _begin(index, new, recycled, weights, tail, tree, scratch):  # type: ignore[no-untyped-def]
    insert(index, new, scratch.suffix, scratch.states)
    plant(tree, tail[-1], index.place)
    _ask(index, recycled, weights, tail, tree, scratch, 0)


@kernel
def _step(index, recycled, weights, tail, tree, scratch, node, min_chance, vocab_size):  # type: ignore[no-untyped-def]
    """Rank the successors of `node`, make the likeliest of all a node, ask about it, and return it."""
    _enqueue(weights, tree, scratch.evidence, node, min_chance, vocab_size)
    node = _next(index, tree)
    if node >= 0:
        _ask(index, recycled, weights, tail, tree, scratch, node)
    return node


@inner
def _ask(index, recycled, weights, tail, tree, scratch, node):  # type: ignore[no-untyped-def]
    """Collect what the sources say of the successors of `node`."""
    suffix, states, slots, evidence = scratch.suffix, scratch.states, scratch.slots, scratch.evidence
    length, place, size = suffix_of(tree, node, tail, suffix), tree.place[node], index.used[TOKENS]
    clear(evidence)
    if size > 0:
        hash_contexts(suffix, length, size - index.used[PROMPT] + tree.nodes[node].depth, states)
        realign(index, states, place)
        hash_edits(suffix, length, expected(place, index.tokens, size), states)
        look_up(index, states, slots)
        ask_contexts(index, slots, node == 0, evidence)
        ask_alignment(place, index.tokens, size, weights.trials, evidence)
    ask_recycled(recycled, suffix[1] if length > 1 else np.int64(-1), suffix[0], evidence)


@inner
def _enqueue(weights, tree, evidence, node, min_chance, vocab_size):  # type: ignore[no-untyped-def]
    """Let the successors of `node` wait that are likely enough."""
    parent, alignment = tree.nodes[node], state_of(tree.place[node])
    for j in range(evidence.size[0]):
        row, x = evidence.rows[j], evidence.x[j]
        if row.token >= vocab_size:
            continue
        x[BIAS], x[BLEND] = 1.0, log_odds(row.blend)
        x[AT_ROOT], x[DOUBT] = node == 0, 1.0 - parent.weight
        sets = choose_sets(evidence, j, alignment)
        weight = chance_of(weights, x, sets)
        chance = parent.chance * weight
        at = wait(tree, chance) if chance >= min_chance else -1
        if at < 0:
            continue
        item = tree.items[at]
        item.token, item.parent, item.source = row.token, node, _source(row)
        item.weight = weight
        item.set1, item.set2, item.set3 = sets
        item.cell = row.cell
        for i in range(COLUMNS):
            tree.x[at, i] = x[i]


@inner
def _source(row):  # type: ignore[no-untyped-def]
    """Return the code of the source that says most of a successor."""
    if row.recycled > row.blend and row.cell == 0:
        return 2
    if row.guest > 0 and row.blend == 0.0 and row.cell == 0:
        return 2 + row.guest
    return 1


@inner
def _next(index, tree):  # type: ignore[no-untyped-def]
    """Make the likeliest successor a node and return it, -1 when the tree is done."""
    node = take(tree)
    if node > 0:
        for i in range(FIELDS):
            tree.place[node, i] = tree.place[tree.nodes[node].parent, i]
        advance(tree.place[node], index.tokens, index.used[TOKENS], tree.nodes[node].token)
    return node


@kernel
def _learn(weights, tree, tokens, parents, path, committed, nodes):  # type: ignore[no-untyped-def]
    """Learn from what followed every accepted node; `nodes` is room for one number a node."""
    locate(tree, tokens, parents, nodes)
    for a in range(min(path.shape[0], committed.shape[0])):
        for i in range(path[a] + 1, tokens.shape[0]):
            if parents[i] == path[a] and nodes[i] >= 0:
                at = tree.nodes[nodes[i]].item
                item = tree.items[at]
                sets = (item.set1, item.set2, item.set3)
                learn(weights, tree.x[at], sets, item.cell, tokens[i] == committed[a])
