"""Chains for many texts at once, compiled: one call drafts for all requests of a serving engine's batch.

A text is known by what stands in it, not by a name: an engine shows rows of tokens, which come, go and change places.
Learning does not ask again, as it does for one tree: what was said of the successors of each node is kept as *lessons*
until the tokens are known that followed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype
from numpy.typing import NDArray

from lookahead.draft import FloatArray, IntArray
from lookahead.pool.search import Heard, empty_heard
from lookahead.pool.sort import DEPTH
from lookahead.sources.alignment import ANCHOR, FIELDS, GAP, RUN, advance, cell_of, expected, state_of
from lookahead.sources.evidence import COLUMNS, CONTEXTS, FIRST_EDIT
from lookahead.sources.growth import HOPELESS, Scratch, ask, weigh
from lookahead.sources.kernels import Records, inner, kernel, records
from lookahead.sources.mixer import SETS, Weights, learn, learn_trial
from lookahead.sources.pool import Pooled, read_on
from lookahead.sources.prompt import REACH, TOKENS, Index, hash_edits, insert, no_index, slot_of
from lookahead.sources.recycle import Recycled
from lookahead.sources.tree import NODES, Tree, empty_tree, plant

LESSONS = 6
"""Successors of a node from which is learnt."""

COPIED = -1
_LONG, _SURE = 16, 0.99  # tokens that were copied, and how often such a copy went on, for that
_COMPARED = 64  # last tokens of a text by which it is known again
_ARRAYS = ("tokens", "slots", "successors", "used", "place")


class Texts(NamedTuple):
    """What is known of S texts, whose chains have N nodes, and where they stand in R runs of the pools."""

    table: Records  # [S] see `empty_texts`
    nodes: Records  # [S, N] of the last chain, see `lookahead.sources.tree.empty_tree`
    place: NDArray[np.int64]  # [S, N, FIELDS] alignment of the nodes
    used: NDArray[np.int64]  # [S, 5] likewise
    before: NDArray[np.int64]  # [S, R] the row of a run before which the text belongs
    spots: NDArray[np.int64]  # [S, N, R, 3] of every node, see `lookahead.pool.search.find_spot`
    lessons: Lessons


class Lessons(NamedTuple):
    """What was said of the likeliest successors of every node."""

    kept: IntArray  # [S, N] how many; `COPIED` where nobody was asked, since the text is copied
    token: IntArray  # [S, N, LESSONS]
    cell: IntArray  # [S, N, LESSONS] see `lookahead.sources.alignment`
    sets: NDArray[np.int64]  # [S, N, LESSONS, SETS]
    x: FloatArray  # [S, N, LESSONS, COLUMNS]


class Batch(NamedTuple):
    """The B rows of an engine."""

    tokens: IntArray  # [B, L]
    lengths: NDArray[np.int64]  # [B] tokens that are there
    owner: NDArray[np.int64]  # [B] the text of each row, -1: it does not draft
    most: NDArray[np.int64]  # [B] tokens to draft at most


class Drafts(NamedTuple):
    """What is drafted for them."""

    tokens: IntArray  # [B, N - 1]
    chances: FloatArray  # [B, N - 1] that the chain is accepted up to there
    size: IntArray  # [B] how many tokens


class Room(NamedTuple):
    """Room to work in, shared by all texts."""

    items: Records  # [N] of a tree: chains let no successor wait
    queue: IntArray
    heard: Heard
    distinct: IntArray
    share: FloatArray


class Tools(NamedTuple):
    """What all texts share."""

    recycled: Recycled
    weights: Weights
    scratch: Scratch
    room: Room


def empty_texts(texts: int, nodes: int, runs: int) -> Texts:
    """Return room for `texts` texts, chains of `nodes` nodes (root included) and `runs` runs.

    A record of the table holds where the arrays of the text's index lie and how long they are, how many of its tokens
    were taken in (`seen`, 0: the place is free), by which state of the pools it was read (`read`, 0: by none), and how
    many of its tokens others were shown, and the pools given.
    """
    fields = dict.fromkeys((*_ARRAYS, *(f"{name}_n" for name in _ARRAYS), "seen", "read", "shown", "given"), "i8")
    shape = texts, nodes
    tree = empty_tree(nodes - 1)
    return Texts(
        table=records(texts, **fields),
        nodes=np.zeros(shape, tree.nodes.dtype),
        place=np.zeros((*shape, FIELDS), np.int64),
        used=np.tile(tree.used, (texts, 1)),
        before=np.zeros((texts, runs), np.int64),
        spots=np.zeros((*shape, runs, 3), np.int64),
        lessons=Lessons(
            kept=np.zeros(shape, np.int32),
            token=np.zeros((*shape, LESSONS), np.int32),
            cell=np.zeros((*shape, LESSONS), np.int32),
            sets=np.zeros((*shape, LESSONS, SETS), np.int64),
            x=np.zeros((*shape, LESSONS, COLUMNS), np.float32),
        ),
    )


def empty_room(nodes: int) -> Room:
    """Return room to draft chains of `nodes` nodes in."""
    tree, lengths = empty_tree(nodes - 1), empty_heard().counts.shape[1]
    return Room(tree.items, tree.queue, empty_heard(), np.zeros(lengths, np.int32), np.zeros(lengths, np.float32))


def note(table: Records, text: int, index: Index) -> None:
    """Write to the table where the arrays of the index of a text lie; the caller keeps them as long."""
    for name in _ARRAYS:
        array = getattr(index, name)
        table[text][name], table[text][f"{name}_n"] = array.ctypes.data, len(array)


def _viewer(kind: np.dtype[Any]) -> Any:
    """Return a function for kernels that gives the array of `length` items of `kind` at `address`."""
    array_type = types.Array(from_dtype(kind), 1, "C")

    @intrinsic  # type: ignore[untyped-decorator]
    def view(_typing: Any, address: Any, length: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            array = make_array(array_type)(context, builder)
            item = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
            size = context.get_constant(types.intp, item)
            data = builder.inttoptr(values[0], array.data.type)
            populate_array(array, data=data, shape=[values[1]], strides=[size], itemsize=size, meminfo=None)
            return array._getvalue()

        return array_type(types.int64, types.int64), generate

    return view


_INDEX = no_index()
_int32s, _int64s = _viewer(np.dtype(np.int32)), _viewer(np.dtype(np.int64))
_slots, _successors = _viewer(_INDEX.slots.dtype), _viewer(_INDEX.successors.dtype)


@inner
def _index_of(text):  # type: ignore[no-untyped-def]
    return Index(
        _int32s(text.tokens, text.tokens_n),
        _slots(text.slots, text.slots_n),
        _successors(text.successors, text.successors_n),
        _int64s(text.used, text.used_n),
        _int64s(text.place, text.place_n),
    )


@kernel
def match(table, tokens, lengths, drafting, places, owner, claimed):  # type: ignore[no-untyped-def]
    """Find the text of every row that drafts: one that the row's tokens extend, the longest one there is.

    Args:
        tokens: [B, L] the rows; `lengths`: [B] how many tokens of each are there.
        drafting: [B] whether the row drafts.
        places: [B] the text that the row had last time, -1: none.
        owner: [B] is set to the text of the row, -1: none is known, or it does not draft.
        claimed: [S] is set to whether a row has the text.
    """
    claimed[:] = False
    for r in range(owner.shape[0]):
        owner[r] = -1
        s = places[r]
        if drafting[r] and s >= 0 and not claimed[s] and _extends(table[s], tokens[r], lengths[r]):
            owner[r], claimed[s] = s, True
    for r in range(owner.shape[0]):
        if not drafting[r] or owner[r] >= 0:
            continue
        best = -1
        for s in range(table.shape[0]):
            longer = best < 0 or table[s].seen > table[best].seen
            if not claimed[s] and longer and _extends(table[s], tokens[r], lengths[r]):
                best = s
        if best >= 0:
            owner[r], claimed[best] = best, True


@inner
def _extends(text, row, length):  # type: ignore[no-untyped-def]
    """Return whether a row goes on with a text, as far as their last common tokens tell."""
    seen = text.seen
    if seen == 0 or seen >= length:
        return False
    known = _int32s(text.tokens, text.tokens_n)
    for i in range(min(seen, _COMPARED)):  # noqa: SIM110 - numba compiles no generators
        if known[seen - 1 - i] != row[seen - 1 - i]:
            return False
    return True


@kernel
def draft(texts, tools, runs, version, batch, drafts, least, vocab_size):  # type: ignore[no-untyped-def]
    """Take in the new tokens of every row that has a text, learn from them, and draft a chain behind them.

    Args:
        runs: of the pools, `version` being which state of them that is, from 1.
        least: the chance that a whole chain must have to be drafted so far.
    """
    for r in range(batch.owner.shape[0]):
        drafts.size[r] = 0
        s = batch.owner[r]
        if s >= 0:
            text, row, length = texts.table[s], batch.tokens[r], batch.lengths[r]
            index, tree = _index_of(text), _tree_of(texts, s, tools.room)
            pooled = Pooled(
                runs, texts.before[s], texts.spots[s], tools.room.heard, tools.room.distinct, tools.room.share
            )
            _take_in(index, pooled, tools, tree, texts.lessons, s, text, row, length, version)
            tail = row[max(0, length - REACH) : length]
            _grow(index, pooled, tools, tail, tree, texts.lessons, s, batch.most[r], least, vocab_size)
            _hand_over(tree, drafts, r)


@inner
def _tree_of(texts, s, room):  # type: ignore[no-untyped-def]
    return Tree(texts.nodes[s], texts.place[s], room.items, room.queue, texts.used[s])


@inner
def _take_in(index, pooled, tools, tree, lessons, s, text, row, length, version):  # type: ignore[no-untyped-def]
    """Learn from the new tokens, let index and pools read them, and begin the next chain."""
    new = row[text.seen : length]
    _learn(tools.weights, lessons, s, tree, new)
    insert(index, new, tools.scratch.suffix, tools.scratch.states)
    if text.read == version:
        read_on(pooled, new)
    else:
        pooled.before[:] = 0
        read_on(pooled, row[max(0, length - DEPTH) : length])
        text.read = version
    text.seen = length
    plant(tree, row[length - 1], index.place)
    lessons.kept[s, 0] = 0


@inner
def _hand_over(tree, drafts, r):  # type: ignore[no-untyped-def]
    for i in range(1, tree.used[NODES]):
        drafts.tokens[r, i - 1], drafts.chances[r, i - 1] = tree.nodes[i].token, tree.nodes[i].chance
    drafts.size[r] = tree.used[NODES] - 1


@inner
def _grow(index, pooled, tools, tail, tree, lessons, s, most, least, vocab_size):  # type: ignore[no-untyped-def]
    """Add the likeliest successor of the last node as long as the chain is likely enough."""
    node = 0
    while node < most:
        token, weight = _copied(index, tools, tree, lessons, s, node)
        if token < 0:
            ask(index, pooled, tools.recycled, tools.weights, tail, tree, tools.scratch, node, False)
            token, weight = _weighed(tools, tree, lessons, s, node, vocab_size)
        if token < 0 or token >= vocab_size or tree.nodes[node].chance * weight < least:
            break
        _append(index, tree, node, token, weight)
        node += 1
        lessons.kept[s, node] = 0


@inner
def _copied(index, tools, tree, lessons, s, node):  # type: ignore[no-untyped-def]
    """Return the token that goes on with a long copy, and its chance, where nobody has to be asked; else -1.

    Not where something took the place of that token before.
    """
    place, nothing = tree.place[node], (np.int64(-1), np.float32(0.0))
    if place[RUN] < _LONG or place[GAP] > 0 or place[ANCHOR] >= 0:
        return nothing
    copy = expected(place, index.tokens, index.used[TOKENS])
    cell = cell_of(place, 0)
    trial = tools.weights.trials[cell]
    if copy < 0 or trial[0] < _SURE * trial[1]:
        return nothing
    tools.scratch.suffix[0] = tree.nodes[node].token
    hash_edits(tools.scratch.suffix, 1, copy, tools.scratch.states)
    for k in range(FIRST_EDIT + 1, CONTEXTS):
        if index.slots[slot_of(index.slots, tools.scratch.states[k])].key != 0:
            return nothing
    lessons.kept[s, node], lessons.cell[s, node, 0], lessons.token[s, node, 0] = COPIED, cell, copy
    return copy, np.float32(trial[0] / trial[1])


@inner
def _weighed(tools, tree, lessons, s, node, vocab_size):  # type: ignore[no-untyped-def]
    """Return the likeliest successor of the node that was asked about, and its chance; -1: there is none.

    What is to be learnt of the successors is kept.
    """
    scratch, parent, alignment, kept = tools.scratch, tree.nodes[node], state_of(tree.place[node]), 0
    evidence, token, most = scratch.evidence, np.int64(-1), np.float32(0.0)
    for j in range(evidence.size[0]):
        row = evidence.rows[j]
        weight = weigh(tools.weights, evidence, j, node, parent, alignment, scratch.sets)
        if kept < LESSONS and weight > HOPELESS:
            _keep(evidence, j, scratch.sets, lessons, s, node, kept)
            kept += 1
        if weight > most and row.token < vocab_size:
            token, most = np.int64(row.token), np.float32(weight)
    lessons.kept[s, node] = kept
    return token, most


@inner
def _keep(evidence, j, sets, lessons, s, node, at):  # type: ignore[no-untyped-def]
    lessons.token[s, node, at], lessons.cell[s, node, at] = evidence.rows[j].token, evidence.rows[j].cell
    for column in range(COLUMNS):
        lessons.x[s, node, at, column] = evidence.x[j, column]
    for k in range(SETS):
        lessons.sets[s, node, at, k] = sets[k]


@inner
def _append(index, tree, above, token, weight):  # type: ignore[no-untyped-def]
    """Make a successor of the node `above` the next node."""
    node = above + 1
    new, parent = tree.nodes[node], tree.nodes[above]
    new.token, new.parent, new.state = token, above, -1
    new.weight, new.given, new.chance = weight, weight, parent.chance * weight
    new.depth, new.cursor, new.offset = parent.depth + 1, -1, 0
    tree.used[NODES] = node + 1
    for i in range(FIELDS):
        tree.place[node, i] = tree.place[above, i]
    advance(tree.place[node], index.tokens, index.used[TOKENS], new.token)


@inner
def _learn(weights, lessons, s, tree, new):  # type: ignore[no-untyped-def]
    """Learn from the tokens that followed the root of the last chain, as far as it foresaw them."""
    for node in range(min(tree.used[NODES], new.shape[0])):
        token = new[node]
        if lessons.kept[s, node] == COPIED:
            learn_trial(weights, lessons.cell[s, node, 0], lessons.token[s, node, 0] == token)
        for k in range(lessons.kept[s, node]):
            hit = lessons.token[s, node, k] == token
            learn(weights, lessons.x[s, node, k], lessons.sets[s, node, k], lessons.cell[s, node, k], hit)
        if node + 1 < tree.used[NODES] and tree.nodes[node + 1].token != token:
            break
