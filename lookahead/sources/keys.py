"""What keys of JSON objects tell: which key comes next, which values it had, and values made of its own words."""

from __future__ import annotations

import numpy as np

from lookahead.grammar.spelling import KEY_END, KEY_START, QUOTE, SEPARATES, STRING_START
from lookahead.grammar.values import PROMPT, SCHEMA
from lookahead.sources.evidence import COUNTED, ECHO, FROM_OUTPUT, FROM_PROMPT, FROM_SCHEMA, ORDER, row_of
from lookahead.sources.guide import ALLOWED, kind_of, limited, permits
from lookahead.sources.kernels import inner

_AHEAD = 512  # keys that are looked at for the next one
_NEXT = 4  # keys that are named
_WORDS = 6  # tokens of a key


@inner
def ask_keys(evidence, suffix, length, cursor, offset):  # type: ignore[no-untyped-def]
    """Name the keys that come next in the schema, values and words of the key under way, and the next number.

    Args:
        suffix: the last tokens, newest first, `length` of them.
        cursor, offset: the last key, and how many of its tokens stand there while it is written; see `move`.
    """
    guide = evidence.guide
    if not limited(guide) or length < 2:
        return
    if guide.keys.shape[0] > 0:
        _ask_order(evidence, suffix, cursor, offset)
    begin = 0
    while begin < length and kind_of(guide, suffix[begin]) & KEY_END == 0:
        begin += 1
    if begin < length and cursor >= 0 and guide.value_places.shape[0] > 0:
        _ask_values(evidence, suffix, begin, cursor)
    if guide.now[ALLOWED] > 4096:
        _ask_echo(evidence, suffix, length, begin)
    _count_on(evidence)


@inner
def _ask_order(evidence, suffix, cursor, offset):  # type: ignore[no-untyped-def]
    guide = evidence.guide
    if offset > 0:
        at = guide.starts[cursor] + offset
        if at < guide.starts[cursor + 1]:
            _name(evidence, np.int64(guide.keys[at]), ORDER, np.float32(2.0))
        return
    if not _at_key(guide, suffix[1], suffix[0]):
        return
    named, count = 0, guide.starts.shape[0] - 1
    for i in range(1, min(count, _AHEAD) + 1):
        token = np.int64(guide.keys[guide.starts[(cursor + i) % count]])
        if permits(guide, token):
            j = row_of(evidence, token)
            if j >= 0 and evidence.x[j, ORDER] == 0.0:
                evidence.x[j, ORDER] = np.float32(2.0 - 0.6 * named)
                evidence.rows[j].named = max(evidence.rows[j].named, 1)
                named += 1
                if named == _NEXT:
                    break


@inner
def _at_key(guide, before, last):  # type: ignore[no-untyped-def]
    """Return whether a key may begin behind the tokens `before` and `last`; a string behind a key is no key."""
    kind = kind_of(guide, last)
    if kind & KEY_START != 0:
        return True
    return kind & STRING_START != 0 and (kind | kind_of(guide, before)) & KEY_END == 0


@inner
def _name(evidence, token, column, value):  # type: ignore[no-untyped-def]
    j = row_of(evidence, token)
    if j >= 0 and evidence.x[j, column] < value:
        evidence.x[j, column] = value
        evidence.rows[j].named = max(evidence.rows[j].named, 1)


@inner
def _ask_values(evidence, suffix, begin, key):  # type: ignore[no-untyped-def]
    """Name what goes on with values of `key`; the last `begin` tokens of the text stand behind it."""
    guide = evidence.guide
    for c in range(guide.key_values[key], guide.key_values[key + 1]):
        at, size = guide.value_starts[c], guide.value_starts[c + 1] - guide.value_starts[c]
        same = begin < size
        for i in range(begin if same else 0):
            same = same and guide.values[at + i] == suffix[begin - 1 - i]
        if same:
            place = guide.value_places[c]
            column = FROM_PROMPT if place == PROMPT else FROM_SCHEMA if place == SCHEMA else FROM_OUTPUT
            _name(evidence, np.int64(guide.values[at + begin]), column, np.float32(1.0 if begin < 2 else 1.5))


@inner
def _ask_echo(evidence, suffix, length, begin):  # type: ignore[no-untyped-def]
    guide = evidence.guide
    end = begin + 1
    while end < length and kind_of(guide, suffix[end]) & STRING_START == 0:
        end += 1
    if begin == 0 or end > length or end - begin - 1 > _WORDS:
        return
    fresh = kind_of(guide, suffix[0]) & (STRING_START | SEPARATES) != 0
    for i in range(begin + 1, end):
        if i + 1 < end and suffix[i + 1] == suffix[0]:
            _name(evidence, suffix[i], ECHO, np.float32(2.0))
        elif fresh:
            _name(evidence, suffix[i], ECHO, np.float32(1.0) if i + 1 == end else np.float32(0.5))


@inner
def _count_on(evidence):  # type: ignore[no-untyped-def]
    """Where a number is known to follow, the next one may."""
    counted = evidence.guide.spelling.counted
    for i in range(evidence.size[0]):
        row = evidence.rows[i]
        if row.longest > 1 and row.token < counted.shape[0] and counted[row.token] >= 0:
            _name(evidence, np.int64(counted[row.token]), COUNTED, np.float32(1.0))


@inner
def move(guide, before, last, token, cursor, offset):  # type: ignore[no-untyped-def]
    """Return cursor and offset after `token`, behind the tokens `before` and `last`."""
    count = guide.starts.shape[0] - 1
    if count <= 0:
        return cursor, offset
    if offset > 0:
        if kind_of(guide, token) & QUOTE != 0:
            return cursor, np.int64(0)
        return _find(guide, cursor - 1, cursor, offset, token)
    if _at_key(guide, before, last):
        return _find(guide, cursor, cursor, offset, token)
    return cursor, np.int64(0)


@inner
def _find(guide, after, cursor, offset, token):  # type: ignore[no-untyped-def]
    """Look behind the key `after` for one that goes on with `token` where that at `cursor` has matched so far."""
    count = guide.starts.shape[0] - 1
    for i in range(1, min(count, _AHEAD) + 1):
        key = np.int64((after + i) % count)
        at = guide.starts[key]
        if at + offset < guide.starts[key + 1] and guide.keys[at + offset] == token:
            same = True
            for k in range(offset):
                same = same and guide.keys[at + k] == guide.keys[guide.starts[cursor] + k]
            if same:
                return key, np.int64(offset + 1)
    return cursor, np.int64(0)
