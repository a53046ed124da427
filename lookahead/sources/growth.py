"""Growing a tree and learning from it, compiled: ask all sources about a node, weigh it all, expand the likeliest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.sources import codes
from lookahead.sources.alignment import FIELDS, advance, ask_alignment, expected, state_of
from lookahead.sources.evidence import (
    AT_ROOT,
    BIAS,
    BLEND,
    CONTEXTS,
    DOUBT,
    Evidence,
    clear,
    empty_evidence,
    log_odds,
)
from lookahead.sources.forced import is_forced, name_closers, name_few
from lookahead.sources.guide import Guide, enter, limited
from lookahead.sources.jacobi import Ngrams, ask_ngrams, no_ngrams
from lookahead.sources.kernels import inner, kernel
from lookahead.sources.keys import ask_keys, move
from lookahead.sources.mixer import SETS, chance_of, choose_sets, learn
from lookahead.sources.noise import Noise, no_noise
from lookahead.sources.pool import ask_pool, read_on
from lookahead.sources.prompt import (
    PROMPT,
    REACH,
    TOKENS,
    ask_contexts,
    hash_contexts,
    hash_edits,
    insert,
    look_up,
    realign,
)
from lookahead.sources.race import ask_usual, known_ahead, learn_race, run_race
from lookahead.sources.recycle import ask_recycled
from lookahead.sources.tree import CURSOR, NODES, OFFSET, has_room_below, plant, suffix_of, take, wait

HOPELESS = np.float32(0.002)  # a miss of what is so unlikely teaches nothing


class Scratch(NamedTuple):
    """Room to ask about one node."""

    evidence: Evidence
    suffix: NDArray[np.int64]  # [REACH] the last tokens, newest first
    states: NDArray[np.int64]  # [CONTEXTS] hashes
    slots: NDArray[np.int64]  # [CONTEXTS] where they stand in the index
    sets: NDArray[np.int64]  # [SETS] weights that a successor uses
    ngrams: Ngrams  # what the window of this text wrote
    noise: Noise  # what draws the next tokens


def empty_scratch(guide: Guide | None = None, ngrams: Ngrams | None = None, noise: Noise | None = None) -> Scratch:
    """Return room to ask about one node after the other."""
    return Scratch(
        evidence=empty_evidence(guide),
        suffix=np.zeros(REACH, np.int64),
        states=np.zeros(CONTEXTS, np.int64),
        slots=np.zeros(CONTEXTS, np.int64),
        sets=np.zeros(SETS, np.int64),
        ngrams=no_ngrams() if ngrams is None else ngrams,
        noise=no_noise() if noise is None else noise,
    )


@kernel
def grow(index, new, pooled, read, recycled, weights, tail, tree, scratch, floors, vocab_size):  # type: ignore[no-untyped-def]
    """Take in the new tokens, then grow `tree` until it is full or no successor is likely enough.

    Args:
        new: what the index of the prompt has not seen yet; `read`: what the pools have not.
        floors: [N] the chance that a node must have when so many are there already, rising.
    """
    _take_in(index, new, pooled, read, tail, tree, scratch)
    node = 0
    while node >= 0:
        if has_room_below(tree, node):
            ask(index, pooled, recycled, weights, tail, tree, scratch, node, node == 0)
            _enqueue(weights, tree, scratch, node, floors, vocab_size)
        node = _next(index, tree, floors)


# The parts of `grow` and of `learn_from` once more, for the loops that let Python objects speak in between.
@kernel
def begin(index, new, pooled, read, recycled, weights, tail, tree, scratch):  # type: ignore[no-untyped-def]
    _take_in(index, new, pooled, read, tail, tree, scratch)
    ask(index, pooled, recycled, weights, tail, tree, scratch, 0, True)


@kernel
def step(index, pooled, recycled, weights, tail, tree, scratch, node, floors, vocab_size):  # type: ignore[no-untyped-def]
    """Rank the successors of `node`, make the likeliest of all a node, ask about it, and return it."""
    if has_room_below(tree, node):
        _enqueue(weights, tree, scratch, node, floors, vocab_size)
    node = _next(index, tree, floors)
    if node >= 0 and has_room_below(tree, node):
        ask(index, pooled, recycled, weights, tail, tree, scratch, node, node == 0)
    return node


@kernel
def ask_again(index, pooled, recycled, weights, tail, tree, scratch, node):  # type: ignore[no-untyped-def]
    ask(index, pooled, recycled, weights, tail, tree, scratch, node, node == 0)


@kernel
def learn_at(weights, tree, scratch, node, token):  # type: ignore[no-untyped-def]
    _learn_all(weights, tree, scratch, node, token)


@inner
def _take_in(index, new, pooled, read, tail, tree, scratch):  # type: ignore[no-untyped-def]
    insert(index, new, scratch.suffix, scratch.states)
    read_on(pooled, read)
    plant(tree, tail[-1], index.place)


@inner
def ask(index, pooled, recycled, weights, tail, tree, scratch, node, names_all):  # type: ignore[no-untyped-def]
    """Collect what the sources say of the successors of `node`.

    Args:
        names_all: whether the empty context, too, names tokens that no longer one knows.
    """
    suffix, states, slots, evidence = scratch.suffix, scratch.states, scratch.slots, scratch.evidence
    length, place, size = suffix_of(tree, node, tail, suffix), tree.place[node], index.used[TOKENS]
    clear(evidence)
    if not enter(evidence.guide, tree, node):
        return
    name_closers(evidence)
    if size > 0:
        hash_contexts(suffix, length, size - index.used[PROMPT] + tree.nodes[node].depth, states)
        realign(index, states, place)
        hash_edits(suffix, length, expected(place, index.tokens, size), states)
        look_up(index, states, slots)
        ask_contexts(index, slots, names_all, evidence)
        ask_alignment(place, index.tokens, size, weights.trials, evidence)
    if pooled.runs.shape[0] > 0:
        ask_pool(pooled, tree, node, suffix, length, evidence)
    before, heat = suffix[1] if length > 1 else np.int64(-1), scratch.noise.heat[0]
    ask_recycled(recycled, before, suffix[0], heat, evidence)
    ask_ngrams(scratch.ngrams, suffix, length, tree.nodes[node].depth, evidence)
    ask_keys(evidence, suffix, length, np.int64(tree.nodes[node].cursor), np.int64(tree.nodes[node].offset))
    name_few(evidence)


@inner
def _enqueue(weights, tree, scratch, node, floors, vocab_size):  # type: ignore[no-untyped-def]
    """Let the successors of `node` wait that are likely enough."""
    evidence, parent = scratch.evidence, tree.nodes[node]
    _weigh_all(weights, tree, scratch, node)
    floor, forced = floors[min(tree.used[NODES], floors.shape[0] - 1)], is_forced(evidence.guide)
    for j in range(evidence.size[0]):
        row = evidence.rows[j]
        if row.token >= vocab_size:
            continue
        chance = parent.chance * row.weight
        at = wait(tree, chance) if chance >= floor else -1
        if at >= 0:
            item = tree.items[at]
            item.token, item.parent, item.source = row.token, node, codes.GRAMMAR if forced else _source(row)
            item.weight, item.given = row.weight, row.given
            item.cursor, item.offset = _moved(scratch, parent, row.token)


@inner
def _weigh_all(weights, tree, scratch, node):  # type: ignore[no-untyped-def]
    """Give all successors of `node` their weights; return how many of them the sources name, and where the noise is."""
    evidence, parent, alignment = scratch.evidence, tree.nodes[node], state_of(tree.place[node])
    named, forced = evidence.size[0], is_forced(evidence.guide)
    for j in range(named):
        row = evidence.rows[j]
        row.weight = 1.0
        if not forced:
            row.weight = weigh(weights, evidence, j, node, parent, alignment, scratch.sets)
        row.given = row.weight
    at = np.int64(-1) if forced else known_ahead(scratch.noise, parent.depth)
    if at >= 0:
        ask_usual(scratch.noise, at, evidence)
        run_race(weights, scratch.noise, at, named, evidence)
    return named, at


@inner
def _moved(scratch, parent, token):  # type: ignore[no-untyped-def]
    """Return where `token` behind the node that was asked about stands among the keys."""
    cursor, offset = np.int64(parent.cursor), np.int64(parent.offset)
    if not limited(scratch.evidence.guide):
        return cursor, offset
    return move(scratch.evidence.guide, scratch.suffix[1], np.int64(parent.token), np.int64(token), cursor, offset)


@inner
def weigh(weights, evidence, j, node, parent, alignment, sets):  # type: ignore[no-untyped-def]
    """Return the chance that successor j of `node` is accepted if the node is."""
    row, x = evidence.rows[j], evidence.x[j]
    x[BIAS], x[BLEND] = 1.0, log_odds(row.blend)
    x[AT_ROOT], x[DOUBT] = node == 0, 1.0 - parent.given
    choose_sets(evidence, j, alignment, parent.token, sets)
    return chance_of(weights, x, sets)


@inner
def _source(row):  # type: ignore[no-untyped-def]
    """Return the code of the source that says most of a successor; 0 where the noise alone names it."""
    if row.cell == 0:
        if row.recycled > max(row.blend, row.pool_blend):
            return codes.RECYCLE
        if row.pool_blend > row.blend:
            return codes.POOL
        if row.blend == 0.0 and row.guest > 0:
            return len(codes.NAMES) - 1 + row.guest
        if row.blend == 0.0 and row.named > 0:
            return codes.GRAMMAR
        if row.blend == 0.0 and row.window > 0:
            return codes.JACOBI
        if row.usual > 0.0:
            return codes.UNKNOWN
    return codes.PROMPT


@inner
def _next(index, tree, floors):  # type: ignore[no-untyped-def]
    """Make the likeliest successor a node and return it, -1 when the tree is done."""
    node = take(tree, floors)
    if node > 0:
        for i in range(FIELDS):
            tree.place[node, i] = tree.place[tree.nodes[node].parent, i]
        advance(tree.place[node], index.tokens, index.used[TOKENS], tree.nodes[node].token)
    return node


@kernel
def learn_from(index, pooled, recycled, weights, tail, tree, scratch, path, committed, nodes):  # type: ignore[no-untyped-def]
    """Learn from what followed every accepted node: ask again, and compare all that was considered.

    Args:
        nodes: the node of `tree` that each verified node was.
    """
    for a in range(min(path.shape[0], committed.shape[0])):
        node = nodes[path[a]]
        if node >= 0:
            ask(index, pooled, recycled, weights, tail, tree, scratch, node, node == 0)
            _learn_all(weights, tree, scratch, node, committed[a])


@inner
def _learn_all(weights, tree, scratch, node, token):  # type: ignore[no-untyped-def]
    """Learn that `token` followed `node`, about which `scratch` holds the evidence."""
    evidence, parent, alignment = scratch.evidence, tree.nodes[node], state_of(tree.place[node])
    tree.used[CURSOR], tree.used[OFFSET] = _moved(scratch, parent, token)
    if is_forced(evidence.guide):
        return
    named, at = _weigh_all(weights, tree, scratch, node)
    if at >= 0:
        learn_race(weights, evidence, token)
    for j in range(named):
        row, hit = evidence.rows[j], evidence.rows[j].token == token
        if hit or row.given > HOPELESS:
            weigh(weights, evidence, j, node, parent, alignment, scratch.sets)
            learn(weights, evidence.x[j], scratch.sets, row.cell, hit)
