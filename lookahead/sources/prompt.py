"""n-grams of one row's own context: what followed every suffix of it, how often, and what lately.

Contexts of many lengths are counted together, as text compressors do (Cleary and Witten 1984, PPM), and beside them
contexts that skip the last tokens, contexts of the generated text alone, and what an edit put in place of what.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import IntArray
from lookahead.sources.alignment import advance, align, expected, lost, settled
from lookahead.sources.evidence import (
    AGE,
    CONTEXTS,
    COUNT,
    EXACT,
    FIRST_EDIT,
    FIRST_SPARSE,
    FIRST_WRITTEN,
    NEWEST,
    ONLY,
    RIVALS,
    SPARSE,
    WRITTEN,
    clip,
    deny,
    find,
    log_count,
    row_of,
)
from lookahead.sources.guide import CLOSERS, closes, limited, permits
from lookahead.sources.kernels import Records, inner, kernel, records

REACH = int(EXACT[-1])
"""Tokens of a suffix that the contexts look at."""

_MIX = 0x2545F4914F6CDD1D
_SPREAD = 0x1F83D9ABFB41BD6B
_MOST = 24  # successors kept of a context; one more takes the place of the one seen longest ago
_COPIED = 5  # index of the shortest exact context that may start a copy


class Index(NamedTuple):
    """Successors of every context: an open-addressing table of context hashes, each with a linked list of records.

    A list is ordered by recency. Contexts with equal hashes share a list: a worse guess, never an error.
    """

    tokens: IntArray  # [C] the text itself
    slots: Records  # [S] key (0: free), head: its first record, newest: where its last successor stands in `tokens`
    successors: Records  # [R] token, count, next: the next record of the list, -1 at its end
    used: NDArray[np.int64]  # [3] see below
    place: NDArray[np.int64]  # alignment of the text's end, see alignment.py


TOKENS, SUCCESSORS, PROMPT = 0, 1, 2  # in `used`: tokens, records, and tokens before the first generated one


class Prompt:
    """The n-gram index of one row, fed with the context as it grows.

    Args:
        context: [L] the prompt; what comes later is generated text.
    """

    def __init__(self, context: IntArray) -> None:
        self._length = len(context)
        self.index = _empty(len(context) + 512)

    def fresh(self, context: IntArray) -> IntArray:
        """Return the tokens of `context` that are not indexed yet, room made for them: the caller inserts them.

        Where `context` does not extend what was indexed, the index starts again and all of it is prompt.
        """
        index, seen = self.index, int(self.index.used[TOKENS])
        overlap = slice(max(0, seen - 64), seen)
        if len(context) < seen or context[overlap].tobytes() != index.tokens[overlap].tobytes():
            self._length, self.index, seen = len(context), _empty(len(context) + 512), 0
        self.reserve(len(context))
        self.index.used[PROMPT] = self._length
        return np.array(context[seen:], np.int32)

    def reserve(self, length: int) -> None:
        """Make room for a text of `length` tokens."""
        if length > len(self.index.tokens):
            self.index = _enlarge(self.index, 2 * length)


def _empty(room: int) -> Index:
    count = room * CONTEXTS
    return Index(
        tokens=np.zeros(room, np.int32),
        slots=records(1 << (count * 3 // 2).bit_length(), key="i8", head="i4", newest="i4"),
        successors=records(count, token="i4", count="i4", next="i4"),
        used=np.zeros(3, np.int64),
        place=lost(),
    )


def no_index() -> Index:
    """Return the index of a grower that does not ask the prompt."""
    return _empty(0)


def _enlarge(index: Index, room: int) -> Index:
    """Return a copy of `index` with space for `room` tokens."""
    larger = _empty(room)
    for name in ("tokens", "successors", "used", "place"):
        old = getattr(index, name)
        getattr(larger, name)[: len(old)] = old
    _rehash(index.slots, larger.slots)
    return larger


@inner
def mix(state, token):  # type: ignore[no-untyped-def]
    """Return the hash of a context that holds one token more; never 0."""
    state = (state * _SPREAD + token + 1) * _MIX
    return (state ^ (state >> 31)) | 1


@inner
def slot_of(slots, wanted):  # type: ignore[no-untyped-def]
    """Return the slot that holds the key `wanted`, or the free one where it belongs."""
    mask = slots.shape[0] - 1
    slot = (wanted >> 7) & mask
    while slots[slot].key != 0 and slots[slot].key != wanted:
        slot = (slot + 1) & mask
    return slot


@inner
def hash_contexts(suffix, length, written, states):  # type: ignore[no-untyped-def]
    """Fill `states` with the hash of every context but those of edits, 0 where the text is too short for it.

    Args:
        suffix: the last tokens, newest first, `length` of them, `written` generated.
    """
    for k in range(CONTEXTS):
        states[k] = 0
    state, n = np.int64(1), 0
    for k in range(EXACT.shape[0]):
        if EXACT[k] > length:
            break
        while n < EXACT[k]:
            state = mix(state, suffix[n])
            n += 1
        states[k] = state
    for k in range(SPARSE.shape[0]):
        if SPARSE[k, 0] + SPARSE[k, 1] <= length:
            state = np.int64(101 + SPARSE[k, 0])
            for i in range(SPARSE[k, 1]):
                state = mix(state, suffix[SPARSE[k, 0] + i])
            states[FIRST_SPARSE + k] = state
    for k in range(WRITTEN.shape[0]):
        if WRITTEN[k] <= length and WRITTEN[k] <= written:
            state = np.int64(201)
            for i in range(WRITTEN[k]):
                state = mix(state, suffix[i])
            states[FIRST_WRITTEN + k] = state


@inner
def hash_edits(suffix, length, copy, states):  # type: ignore[no-untyped-def]
    """Add the contexts of edits; `copy` is the token that the alignment expects, -1: none."""
    if copy >= 0 and length > 0:
        states[FIRST_EDIT] = mix(np.int64(301), suffix[0])
        states[FIRST_EDIT + 1] = mix(np.int64(302), copy)
        states[FIRST_EDIT + 2] = mix(mix(np.int64(303), copy), suffix[0])


@inner
def insert(index, new, suffix, states):  # type: ignore[no-untyped-def]
    """Append the tokens `new`, each as a successor of every context before it.

    Args:
        suffix: [REACH] int64, room to work in.
        states: [CONTEXTS] int64, likewise.
    """
    for i in range(new.shape[0]):
        at, token = index.used[TOKENS], new[i]
        length = at if at < REACH else REACH
        for n in range(length):
            suffix[n] = index.tokens[at - 1 - n]
        hash_contexts(suffix, length, at - index.used[PROMPT], states)
        realign(index, states, index.place)
        copy = expected(index.place, index.tokens, at)
        hash_edits(suffix, length, copy, states)
        for k in range(CONTEXTS):
            # Copying is the rule: a context of the edits opens where it first failed.
            if states[k] != 0 and (k < FIRST_EDIT or token != copy or _stood(index, states[k])):
                _count(index, states[k], token, at)
        index.tokens[at] = token
        index.used[TOKENS] = at + 1
        advance(index.place, index.tokens, at, token)


@inner
def _count(index, state, token, at):  # type: ignore[no-untyped-def]
    """Count `token`, which stands at `at`, after the context `state`, and move it to the front of the list."""
    slot, records = index.slots[slot_of(index.slots, state)], index.successors
    if slot.key == 0:
        slot.key, slot.head = state, -1
    slot.newest = at
    before, record, seen = -1, slot.head, 1
    while record >= 0 and records[record].token != token:
        if seen == _MOST:
            records[record].token, records[record].count = token, 0
            break
        seen += 1
        before, record = record, records[record].next
    if record < 0:
        record = index.used[SUCCESSORS]
        index.used[SUCCESSORS] += 1
        records[record].token, records[record].count = token, 0
    elif before >= 0:
        records[before].next = records[record].next
    if slot.head != record:
        records[record].next = slot.head
        slot.head = record
    records[record].count += 1


@inner
def _stood(index, state):  # type: ignore[no-untyped-def]
    return index.slots[slot_of(index.slots, state)].key != 0


@inner
def realign(index, states, place):  # type: ignore[no-untyped-def]
    """Point the alignment `place` after the newest occurrence of the longest context that stood before."""
    if settled(place):
        return
    for k in range(EXACT.shape[0] - 1, _COPIED - 1, -1):
        if states[k] != 0:
            slot = index.slots[slot_of(index.slots, states[k])]
            if slot.key != 0:
                align(place, slot.newest, EXACT[k])
                return


@kernel
def _rehash(old, new):  # type: ignore[no-untyped-def]
    for i in range(old.shape[0]):
        if old[i].key != 0:
            slot = new[slot_of(new, old[i].key)]
            slot.key, slot.head, slot.newest = old[i].key, old[i].head, old[i].newest


@inner
def look_up(index, states, slots):  # type: ignore[no-untyped-def]
    """Fill `slots` with the slot of every context that stood before, -1 for the others."""
    known = True
    for k in range(CONTEXTS):
        slots[k] = -1
        # Where a suffix is new, so are all longer ones.
        if states[k] != 0 and (known or k >= FIRST_SPARSE):
            slot = slot_of(index.slots, states[k])
            if index.slots[slot].key != 0:
                slots[k] = slot
            elif k < FIRST_SPARSE:
                known = False


@inner
def ask_contexts(index, slots, at_root, evidence):  # type: ignore[no-untyped-def]
    """Add the successors of all contexts: the exact ones from long to short, then the others.

    The exact ones are also blended as PPM does: each takes its share of the weight that the longer ones left. Below
    the root the empty context speaks only of tokens that longer ones named: alone it is too weak to be worth a row.
    """
    rest = 1.0
    for i in range(CONTEXTS):
        k = FIRST_SPARSE - 1 - i if i < FIRST_SPARSE else i
        if slots[k] < 0 or (k < FIRST_SPARSE and rest < 1e-5):
            continue
        share = _ask_context(index, index.slots[slots[k]].head, k, rest, k > 0 or at_root, evidence)
        if k < FIRST_SPARSE:
            rest *= share


@inner
def _ask_context(index, first, k, rest, names, evidence):  # type: ignore[no-untyped-def]
    """Add the successors in the list that starts at `first`; return the share of `rest` that escapes.

    Args:
        names: whether tokens without a row get one.
    """
    total, closing, distinct, record, free = 0, 0, 0, first, not limited(evidence.guide)
    while record >= 0:
        successor = index.successors[record]
        if free or permits(evidence.guide, successor.token):
            total += successor.count
            distinct += 1
        elif closes(evidence.guide, successor.token):
            total += successor.count
            closing += successor.count
        record = successor.next
    if total == 0:
        return 1.0
    closers = np.int64(0) if free else evidence.guide.now[CLOSERS]
    for i in range(closers):
        evidence.own[i] = (closing + closers - 1) // closers
    distinct += distinct == 0
    escape = 0.5 * distinct / (total + 1.0 + 0.5 * distinct)
    share = np.float32(rest * (1.0 - escape) / (total + 1.0))
    deny(evidence, k, clip(log_count(0) - log_count(total)))
    record, age = first, 0
    while record >= 0:
        successor = index.successors[record]
        if not (free or permits(evidence.guide, successor.token)):
            record = successor.next
            continue
        j = row_of(evidence, successor.token) if names else find(evidence, successor.token)
        if 0 <= j < closers:
            evidence.own[j] += successor.count
        elif j >= 0:
            _tell(evidence, j, k, successor.count, total, share, age, distinct)
        record = successor.next
        age += 1
    for j in range(closers):
        if evidence.own[j] > 0:
            _tell(evidence, j, k, evidence.own[j], total, share, 0, distinct)
    return escape


@inner
def _tell(evidence, j, k, count, total, share, age, distinct):  # type: ignore[no-untyped-def]
    row = evidence.rows[j]
    evidence.x[j, k] = clip(log_count(count) - log_count(max(total - count, 0)))
    if k < FIRST_SPARSE:
        # The newest successor counts once more.
        row.blend += share * np.float32(count + (age == 0))
        if row.longest == 0:
            row.longest = k + 1
            _describe(evidence.x[j], age, count, distinct)


@inner
def _describe(x, age, count, distinct):  # type: ignore[no-untyped-def]
    x[NEWEST] = age == 0
    x[ONLY] = distinct == 1
    x[AGE], x[COUNT], x[RIVALS] = log_count(age), log_count(count), log_count(distinct)
