"""The grower: one token tree a step, grown best first from what all sources know."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import Draft, FloatArray, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import InvalidArgument
from lookahead.pool.pool import Pool, combined
from lookahead.sources.alignment import FIELDS, advance, ask_alignment, expected, state_of
from lookahead.sources.evidence import (
    AT_ROOT,
    BIAS,
    BLEND,
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
from lookahead.sources.mixer import SETS, Weights, chance_of, choose_sets, fresh_weights, learn, restore, save
from lookahead.sources.pool import Reader, ask_pool, no_pool, pooled, read_on
from lookahead.sources.prompt import (
    PROMPT,
    REACH,
    TOKENS,
    Index,
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
from lookahead.sources.tree import NODES, empty_tree, has_room_below, match_nodes, plant, suffix_of, take, wait
from lookahead.trace import Step

SOURCES = ("unknown", "prompt", "recycle", "pool")
"""Names of the codes in `Draft.source`; the code of the i-th `Source` object is `len(SOURCES) + i`."""

_NONE = np.zeros(0, np.int32)
_HOPELESS = np.float32(0.002)  # a miss of what is so unlikely teaches nothing
_LARGEST_TOKEN = int(np.iinfo(np.int32).max)


class Scratch(NamedTuple):
    """Room to ask about one node."""

    evidence: Evidence
    suffix: NDArray[np.int64]  # [REACH] the last tokens, newest first
    states: NDArray[np.int64]  # [CONTEXTS] hashes
    slots: NDArray[np.int64]  # [CONTEXTS] where they stand in the index
    sets: NDArray[np.int64]  # [SETS] weights that a successor uses


class Grower(Drafter):
    """Grows one tree a step from all sources, always at the node that is likeliest to be accepted.

    What it learns (the weights of the evidence, the recycled logits) outlives a request and is shared by all rows. It
    starts from what the first of the pools keeps, and every pool that is open for writing keeps it in turn.

    Args:
        sources: whom to ask: "prompt" (n-grams of the row's own context), "pool" (n-grams of `pools`), "recycle" (the
            model's own logits, remembered), and up to four `Source` objects.
        pools: asked together; what they hold when a request starts is what it drafts from.
        vocab_size: tokens at or above it are never proposed; None: no limit known.
        min_chance: a node that is accepted less often than this is not worth running.

    Raises:
        InvalidArgument: an unknown source, too many of them, something that is no pool, or a chance outside [0, 1].
    """

    def __init__(
        self,
        *,
        sources: Iterable[str | Source] = ("prompt", "pool", "recycle"),
        pools: Iterable[Pool] = (),
        vocab_size: int | None = None,
        min_chance: float = 0.02,
    ) -> None:
        self.sources = (sources,) if isinstance(sources, str) else tuple(sources)
        self.pools = tuple(pools)
        _check(self.sources, self.pools, vocab_size, min_chance)
        self.vocab_size = vocab_size
        self.min_chance = float(min_chance)
        self.weights: Weights = fresh_weights()
        self.recycled: Recycled = empty_tables(vocab_size) if "recycle" in self.sources else no_tables()
        calibration = next((pool.calibration for pool in self.pools if pool.calibration), None)
        if calibration is not None:
            restore(self.weights, calibration)
        for pool in self.pools:
            pool.keep_calibration(partial(save, self.weights))

    def start(self, context: IntArray) -> Drafter:
        return Row(self, context)

    def propose(self, context: IntArray, budget: int) -> Draft:
        return Row(self, context).propose(context, budget)


class Row(Drafter):
    """The grower at work on one batch row."""

    def __init__(self, grower: Grower, context: IntArray) -> None:
        self._grower = grower
        self._prompt = Prompt(context) if "prompt" in grower.sources else None
        self._no_index = no_index()
        # Held here: a pool that merges meanwhile leaves this row its runs.
        self._snapshot = combined(grower.pools if "pool" in grower.sources else ())
        self._pooled = no_pool()
        self._reader = Reader()
        self._guests = [source for source in grower.sources if isinstance(source, Source)]
        self._said: list[list[tuple[IntArray, FloatArray]]] = []  # by the guests, of every node
        self._new = self._read = self._tail = _NONE
        self._tree = empty_tree(0)
        self._scratch = Scratch(
            empty_evidence(),
            np.zeros(REACH, np.int64),
            np.zeros(CONTEXTS, np.int64),
            np.zeros(CONTEXTS, np.int64),
            np.zeros(SETS, np.int64),
        )

    def propose(self, context: IntArray, budget: int) -> Draft:
        if len(context) == 0:
            raise InvalidArgument("propose() needs a context of at least one token, the draft's node 0")
        if len(self._tree.nodes) != budget + 1:
            self._tree = empty_tree(budget)
            self._pooled = pooled(self._snapshot.views, budget + 1)
            self._reader = Reader()
        self._new = _NONE if self._prompt is None else self._prompt.fresh(context)
        self._read = self._reader.fresh(context, self._pooled)
        self._tail = np.array(context[-REACH:], np.int32)
        if self._guests:
            self._grow_with_guests(context)
        else:
            _grow(self._index, self._new, self._pooled, self._read, *self._knowledge, *self._limits)
        nodes = self._tree.nodes[: self._tree.used[NODES]]
        return Draft(nodes["token"], nodes["parent"], nodes["weight"], nodes["source"])

    def observe(self, step: Step) -> None:
        draft, recycled = step.draft, self._grower.recycled
        nodes = np.empty(len(draft), np.int32)
        match_nodes(self._tree, draft.tokens, draft.parents, nodes)
        if self._guests:
            self._learn_with_guests(step, nodes)
        else:
            _learn(self._index, self._pooled, *self._knowledge, step.path, step.tokens, nodes)
        if len(recycled.key) and len(step.top_tokens) == len(draft):
            before = int(self._tail[-2]) if len(self._tail) > 1 else -1
            remember(recycled, before, draft.tokens, draft.parents, step.top_tokens, step.top_logits)
        for guest in self._guests:
            guest.observe(step)

    @property
    def _index(self) -> Index:
        return self._no_index if self._prompt is None else self._prompt.index

    @property
    def _knowledge(self) -> tuple[Any, ...]:
        return self._grower.recycled, self._grower.weights, self._tail, self._tree, self._scratch

    @property
    def _limits(self) -> tuple[float, int]:
        vocab_size = self._grower.vocab_size
        return self._grower.min_chance, _LARGEST_TOKEN if vocab_size is None else vocab_size

    def _grow_with_guests(self, context: IntArray) -> None:
        """Do what `_grow` does, and let Python objects speak at every node."""
        _begin(self._index, self._new, self._pooled, self._read, *self._knowledge)
        self._said, nodes = [], self._tree.nodes
        cursors = [[guest.start(context) for guest in self._guests]]
        node = 0
        while node >= 0:
            said = [guest.successors(cursor) for guest, cursor in zip(self._guests, cursors[node], strict=True)]
            self._said.append([(np.asarray(t, np.int32), np.asarray(c, np.float32)) for t, c in said])
            self._tell_guests(node)
            node = _step(self._index, self._pooled, *self._knowledge, node, *self._limits)
            if node > 0:
                above, token = cursors[nodes["parent"][node]], int(nodes["token"][node])
                cursors.append([g.extend(c, token) for g, c in zip(self._guests, above, strict=True)])

    def _tell_guests(self, node: int) -> None:
        for i, (tokens, chances) in enumerate(self._said[node]):
            add_guest(self._scratch.evidence, i, tokens, chances)

    def _learn_with_guests(self, step: Step, nodes: IntArray) -> None:
        """Do what `_learn` does, with what the Python objects said."""
        for at, token in zip(step.path, step.tokens, strict=False):
            node = int(nodes[at])
            if 0 <= node < len(self._said):
                _ask_again(self._index, self._pooled, *self._knowledge, node)
                self._tell_guests(node)
                _learn_at(self._grower.weights, self._tree, self._scratch, node, token)


def _check(
    sources: tuple[str | Source, ...], pools: tuple[Pool, ...], vocab_size: int | None, min_chance: float
) -> None:
    for source in sources:
        if not isinstance(source, Source) and source not in SOURCES[1:]:
            raise InvalidArgument(
                f"sources has {source!r}, which is not known; choose from {', '.join(SOURCES[1:])}, or give an object "
                "with the methods start, extend, successors and observe"
            )
    if sum(isinstance(source, Source) for source in sources) > GUESTS:
        raise InvalidArgument(f"sources has more than {GUESTS} objects; join some of them in one")
    for pool in pools:
        if not isinstance(pool, Pool):
            raise InvalidArgument(f"pools has a {type(pool).__name__}; give lookahead.Pool objects")
    if vocab_size is not None and vocab_size < 1:
        raise InvalidArgument(f"vocab_size={vocab_size}; give the number of tokens the model knows, or None")
    if not 0.0 <= min_chance <= 1.0:
        raise InvalidArgument(f"min_chance={min_chance} is not a chance; give a number from 0 to 1")


@kernel
def _grow(index, new, pooled, read, recycled, weights, tail, tree, scratch, min_chance, vocab_size):  # type: ignore[no-untyped-def]
    """Take in the new tokens, then grow `tree` until it is full or no successor is likely enough.

    Args:
        new: what the index of the prompt has not seen yet; `read`: what the pools have not.
    """
    _take_in(index, new, pooled, read, tail, tree, scratch)
    node = 0
    while node >= 0:
        if has_room_below(tree, node):
            _ask(index, pooled, recycled, weights, tail, tree, scratch, node)
            _enqueue(weights, tree, scratch, node, min_chance, vocab_size)
        node = _next(index, tree)


# The parts of `_grow` and of `_learn` once more, for the loops that let Python objects speak in between.
@kernel
def _begin(index, new, pooled, read, recycled, weights, tail, tree, scratch):  # type: ignore[no-untyped-def]
    _take_in(index, new, pooled, read, tail, tree, scratch)
    _ask(index, pooled, recycled, weights, tail, tree, scratch, 0)


@kernel
def _step(index, pooled, recycled, weights, tail, tree, scratch, node, min_chance, vocab_size):  # type: ignore[no-untyped-def]
    """Rank the successors of `node`, make the likeliest of all a node, ask about it, and return it."""
    if has_room_below(tree, node):
        _enqueue(weights, tree, scratch, node, min_chance, vocab_size)
    node = _next(index, tree)
    if node >= 0 and has_room_below(tree, node):
        _ask(index, pooled, recycled, weights, tail, tree, scratch, node)
    return node


@kernel
def _ask_again(index, pooled, recycled, weights, tail, tree, scratch, node):  # type: ignore[no-untyped-def]
    _ask(index, pooled, recycled, weights, tail, tree, scratch, node)


@kernel
def _learn_at(weights, tree, scratch, node, token):  # type: ignore[no-untyped-def]
    _learn_all(weights, tree, scratch, node, token)


@inner
def _take_in(index, new, pooled, read, tail, tree, scratch):  # type: ignore[no-untyped-def]
    insert(index, new, scratch.suffix, scratch.states)
    read_on(pooled, read)
    plant(tree, tail[-1], index.place)


@inner
def _ask(index, pooled, recycled, weights, tail, tree, scratch, node):  # type: ignore[no-untyped-def]
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
    if pooled.runs.shape[0] > 0:
        ask_pool(pooled, tree, node, suffix, length, evidence)
    ask_recycled(recycled, suffix[1] if length > 1 else np.int64(-1), suffix[0], evidence)


@inner
def _enqueue(weights, tree, scratch, node, min_chance, vocab_size):  # type: ignore[no-untyped-def]
    """Let the successors of `node` wait that are likely enough."""
    evidence, parent, alignment = scratch.evidence, tree.nodes[node], state_of(tree.place[node])
    for j in range(evidence.size[0]):
        row = evidence.rows[j]
        if row.token >= vocab_size:
            continue
        weight = _weight(weights, evidence, j, node, parent, alignment, scratch.sets)
        chance = parent.chance * weight
        at = wait(tree, chance) if chance >= min_chance else -1
        if at >= 0:
            item = tree.items[at]
            item.token, item.parent, item.source, item.weight = row.token, node, _source(row), weight


@inner
def _weight(weights, evidence, j, node, parent, alignment, sets):  # type: ignore[no-untyped-def]
    """Return the chance that successor j of `node` is accepted if the node is."""
    row, x = evidence.rows[j], evidence.x[j]
    x[BIAS], x[BLEND] = 1.0, log_odds(row.blend)
    x[AT_ROOT], x[DOUBT] = node == 0, 1.0 - parent.weight
    choose_sets(evidence, j, alignment, parent.token, sets)
    return chance_of(weights, x, sets)


@inner
def _source(row):  # type: ignore[no-untyped-def]
    """Return the code of the source that says most of a successor."""
    if row.cell == 0:
        if row.recycled > max(row.blend, row.pool_blend):
            return 2
        if row.pool_blend > row.blend:
            return 3
        if row.guest > 0 and row.blend == 0.0:
            return 3 + row.guest
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
def _learn(index, pooled, recycled, weights, tail, tree, scratch, path, committed, nodes):  # type: ignore[no-untyped-def]
    """Learn from what followed every accepted node: ask again, and compare all that was considered.

    Args:
        nodes: the node of `tree` that each verified node was.
    """
    for a in range(min(path.shape[0], committed.shape[0])):
        node = nodes[path[a]]
        if node >= 0:
            _ask(index, pooled, recycled, weights, tail, tree, scratch, node)
            _learn_all(weights, tree, scratch, node, committed[a])


@inner
def _learn_all(weights, tree, scratch, node, token):  # type: ignore[no-untyped-def]
    """Learn that `token` followed `node`, about which `scratch` holds the evidence."""
    evidence, parent, alignment = scratch.evidence, tree.nodes[node], state_of(tree.place[node])
    for j in range(evidence.size[0]):
        row, hit = evidence.rows[j], evidence.rows[j].token == token
        weight = _weight(weights, evidence, j, node, parent, alignment, scratch.sets)
        if hit or weight > _HOPELESS:
            learn(weights, evidence.x[j], scratch.sets, row.cell, hit)
