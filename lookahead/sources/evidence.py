"""What the sources say of the successors of one node, in columns that the mixer weighs.

Every column holds log-odds or a small number near zero; 0 means that the source has nothing to say.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lookahead.draft import FloatArray, IntArray
from lookahead.pool.search import LENGTHS
from lookahead.sources.guide import Guide, limited, no_guide, permits
from lookahead.sources.kernels import Records, inner, kernel, records

WIDTH = 32
"""Successors considered at one node."""

EXACT = np.array([0, 1, 2, 3, 4, 6, 9, 14, 22], np.int64)
"""Lengths of the suffixes whose successors are counted, rising."""

SPARSE = np.array([[1, 1], [1, 2], [2, 2]], np.int64)
"""Contexts that skip the last tokens, so that they outlive an edit: (skipped, length)."""

WRITTEN = np.array([1, 2, 3], np.int64)
"""Lengths of the suffixes that are counted a second time in the generated text alone."""

FIRST_SPARSE = EXACT.shape[0]
FIRST_WRITTEN = FIRST_SPARSE + SPARSE.shape[0]
FIRST_EDIT = FIRST_WRITTEN + WRITTEN.shape[0]
CONTEXTS = FIRST_EDIT + 3  # what replaced a copied text: by the last token, by the expected one, by both

# The columns after those of the contexts.
BIAS = CONTEXTS
BLEND = CONTEXTS + 1  # all exact contexts blended
NEWEST, ONLY, AGE, COUNT, RIVALS = (CONTEXTS + 2 + i for i in range(5))  # in the longest context that knows it
COPIED, DIVERTED, REGAINED = (CONTEXTS + 7 + i for i in range(3))  # by the alignment
AT_ROOT, DOUBT = CONTEXTS + 10, CONTEXTS + 11  # of the parent: is it the root, and how unlikely was it?
BY_PAIR, BY_TOKEN, FAVOURITE = (CONTEXTS + 12 + i for i in range(3))  # by the recycled logits
POOL_BLEND = CONTEXTS + 15  # all suffixes in the pools blended
POOL_ONLY, POOL_COUNT, POOL_RIVALS = (CONTEXTS + 16 + i for i in range(3))  # in the longest that knows it
FIRST_POOL = CONTEXTS + 19  # by the suffix of each length in the pools
FIRST_GUEST = FIRST_POOL + LENGTHS.shape[0]  # one column for each source that is a Python object
GUESTS = 4
NAMED, COVERED = (FIRST_GUEST + GUESTS + i for i in range(2))  # by the grammar
ORDER, ECHO, COUNTED = (FIRST_GUEST + GUESTS + 2 + i for i in range(3))  # by the keys of JSON objects
FROM_PROMPT, FROM_SCHEMA, FROM_OUTPUT = (FIRST_GUEST + GUESTS + 5 + i for i in range(3))  # values of such a key
BY_WINDOW, WINDOW_LENGTH, WINDOW_RANK, WINDOW_HERE = (FIRST_GUEST + GUESTS + 8 + i for i in range(4))  # by the n-grams
COLUMNS = -(-(FIRST_GUEST + GUESTS + 12) // 16) * 16  # whole vectors of the processor; the last ones stay 0

RACE = 5
"""Columns of what the noise of a draw says, see `lookahead.sources.race`."""

_CLIP = np.float32(4.0)
_LOG = np.log(np.arange(1024, dtype=np.float32) + np.float32(0.4))
_SUREST = np.float32(np.log(999.0))


class Evidence(NamedTuple):
    """The successors of one node: `rows[j]` and `x[j]` are about `rows[j].token`."""

    rows: Records  # [WIDTH] see `empty_evidence`
    tokens: IntArray  # [WIDTH] the rows' tokens once more, to compare all at once; -1 where a row is not in use
    x: FloatArray  # [WIDTH, COLUMNS] of a row not in use it equals `absent`
    absent: FloatArray  # [COLUMNS] the x of a token that nobody has named yet
    size: NDArray[np.int64]  # [1] rows in use
    own: IntArray  # [WIDTH] counts of the closers in one context
    worth: FloatArray  # [WIDTH] what the n-grams of the window say of each
    race: FloatArray  # [WIDTH, RACE] what the noise says of each
    guide: Guide  # what the grammar allows; what it does not gets no row


def empty_evidence(guide: Guide | None = None) -> Evidence:
    """Return room for the successors of one node.

    Fields of a row: the token; its chance by the exact contexts blended, by the recycled logits, by the pools blended;
    1 + the index of the longest exact context and of the longest suffix in the pools that knows it, the alignment's
    cell that named it, and 1 + the index of the Python source that did, 0 where none does; 1 where the grammar or a key
    named it, 2 where it closes what was begun; how many tokens of an n-gram of the window matched before it.
    `given` is the chance by all of that, `weight` that where the noise is known; the rest belongs to the race.
    """
    rows = records(
        WIDTH,
        token="i4",
        blend="f4",
        recycled="f4",
        pool_blend="f4",
        longest="i4",
        pooled="i4",
        cell="i4",
        guest="i4",
        named="i4",
        window="i4",
        weight="f4",
        given="f4",
        usual="f4",
        score="f4",
        place="i4",
        level="i4",
    )
    return Evidence(
        rows=rows,
        tokens=np.full(WIDTH, -1, np.int32),
        x=np.zeros((WIDTH, COLUMNS), np.float32),
        absent=np.zeros(COLUMNS, np.float32),
        size=np.zeros(1, np.int64),
        own=np.zeros(WIDTH, np.int32),
        worth=np.zeros(WIDTH, np.float32),
        race=np.zeros((WIDTH, RACE), np.float32),
        guide=no_guide() if guide is None else guide,
    )


@inner
def clear(evidence):  # type: ignore[no-untyped-def]
    """Forget all rows."""
    evidence.size[0] = 0
    evidence.tokens[:] = -1
    evidence.x[:] = 0.0
    evidence.absent[:] = 0.0


@inner
def find(evidence, token):  # type: ignore[no-untyped-def]
    """Return the row of `token` (not negative), -1 when it has none."""
    found = np.int32(-1)
    # No early exit and no constant bound: so it is compiled to a few vector instructions.
    for j in range(evidence.tokens.shape[0]):
        found = np.int32(j) if evidence.tokens[j] == token else found
    return np.int64(found)


@inner
def row_of(evidence, token):  # type: ignore[no-untyped-def]
    """Return the row of `token` (not negative), a new one if need be; -1 when it may not follow or all are taken."""
    if limited(evidence.guide) and not permits(evidence.guide, token):
        return np.int64(-1)
    found, n = find(evidence, token), evidence.size[0]
    if found >= 0 or n == WIDTH:
        return found
    row = evidence.rows[n]
    evidence.tokens[n] = token
    row.token, row.blend, row.recycled = token, 0.0, 0.0
    row.longest, row.pooled, row.pool_blend, row.cell, row.guest = 0, 0, 0.0, 0, 0
    row.named, row.window, row.usual = 0, 0, 0.0
    evidence.size[0] = n + 1
    return n


@inner
def deny(evidence, column, value):  # type: ignore[no-untyped-def]
    """Write `value` for every token, named or not, until a source says otherwise."""
    # Rows not in use get it too: a new row then has nothing to copy.
    evidence.absent[column] = value
    for j in range(WIDTH):
        evidence.x[j, column] = value


@inner
def log_odds(chance):  # type: ignore[no-untyped-def]
    """Return the logit of a chance, within what one in a thousand gives."""
    if not chance > 1e-3:
        return -_SUREST
    if chance > 1.0 - 1e-3:
        return _SUREST
    return np.float32(np.log(chance / (1.0 - chance)))


@inner
def clip(odds):  # type: ignore[no-untyped-def]
    """Return log-odds from counts, kept where they still tell something."""
    return -_CLIP if odds < -_CLIP else _CLIP if odds > _CLIP else odds


@inner
def log_count(count):  # type: ignore[no-untyped-def]
    """Return the logarithm of a count, defined at 0 and not rising above 1023."""
    return _LOG[count if count < 1023 else 1023]


@kernel
def add_guest(evidence, column, tokens, chances):  # type: ignore[no-untyped-def]
    """Add what a Python source said; `column` counts from the first guest."""
    if tokens.shape[0] > 0:
        deny(evidence, FIRST_GUEST + column, np.float32(-2.0))
    for i in range(tokens.shape[0]):
        j = row_of(evidence, tokens[i]) if tokens[i] >= 0 else -1
        if j >= 0:
            evidence.x[j, FIRST_GUEST + column] = log_odds(chances[i])
            if evidence.rows[j].guest == 0:
                evidence.rows[j].guest = column + 1
