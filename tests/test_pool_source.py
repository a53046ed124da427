"""Laws of the pools as a source of the grower."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead import Draft, Grower, Pool
from lookahead.grow import SOURCES
from lookahead.sources import pool as source

DOCUMENTS = st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=6)


def array(tokens: list[int]) -> Any:
    return np.array(tokens, np.int32)


def filled(*documents: list[int]) -> Pool:
    pool = Pool()
    for number, document in enumerate(documents):
        pool.add(document, digest=number + 1)
    return pool


def grower(*pools: Pool) -> Grower:
    return Grower(sources=("pool",), pools=pools, min_chance=0.0)


def weights(draft: Draft) -> dict[tuple[int, ...], float]:
    """The weight of every node by its path."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(draft)):
        paths.append((*paths[draft.parents[node]], int(draft.tokens[node])))
    return dict(zip(paths, draft.weight.tolist(), strict=True))


def test_a_document_is_gone_on_with_from_its_middle() -> None:
    draft = grower(filled(list(range(100, 160)))).propose(array([1, 2, *range(110, 120)]), 16)
    assert (*range(120, 130),) in weights(draft)
    assert {SOURCES[code] for code in draft.source[1:]} == {"pool"}


def test_what_followed_more_often_weighs_more() -> None:
    documents = [[1, 2, 3, n] for n in range(20, 26)] + [[1, 2, 4, n] for n in range(30, 32)]
    found = weights(grower(filled(*documents)).propose(array([9, 1, 2]), 8))
    assert found[3,] > found[4,] > 0


def test_the_longer_suffix_weighs_more() -> None:
    documents = [[n, 2, 3] for n in range(20, 24)] + [[7, 8, 1, 2, 4]]
    found = weights(grower(filled(*documents)).propose(array([7, 8, 1, 2]), 8))
    assert found[4,] > found[3,]


def test_no_pool_drafts_nothing() -> None:
    assert len(grower().propose(array([1, 2, 3]), 8)) == 1
    assert len(grower(Pool()).propose(array([1, 2, 3]), 8)) == 1
    left_out = Grower(sources=("recycle",), pools=(filled([1, 2, 3, 4]),), min_chance=0.0)
    assert len(left_out.propose(array([1, 2, 3]), 8)) == 1


@settings(max_examples=60)
@given(DOCUMENTS, st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 6))
def test_how_documents_are_divided_makes_no_difference(
    documents: list[list[int]], context: list[int], first: int
) -> None:
    """One run, two runs, two pools: the same evidence, hence the same chances."""
    together = filled(*documents)
    apart = [filled(*documents[:first]), filled(*documents[first:])]
    in_turn = Pool()
    for number, document in enumerate(documents):
        in_turn.add(document, digest=number + 1)
        in_turn.snapshot()
    expected = weights(grower(together).propose(array(context), 200))
    for pools in (apart, [in_turn], [together, together]):
        found = weights(grower(*pools).propose(array(context), 200))
        shared = found.keys() & expected.keys()
        assert len(expected) == len(found) == len(shared) or len(found) == 201
        assert [found[path] for path in shared] == pytest.approx([expected[path] for path in shared], rel=1e-4)


@settings(max_examples=60)
@given(DOCUMENTS, st.lists(st.integers(0, 5), min_size=40, max_size=80), st.data())
def test_reading_on_equals_reading_from_the_start(
    documents: list[list[int]], text: list[int], data: st.DataObject
) -> None:
    row, at = grower(filled(*documents)).start(array(text[:3])), 3
    while at <= len(text):
        fresh = grower(filled(*documents)).propose(array(text[:at]), 12)
        assert weights(row.propose(array(text[:at]), 12)) == pytest.approx(weights(fresh))
        at += data.draw(st.integers(1, 40))


def test_a_context_that_jumps_is_read_anew() -> None:
    pool = filled(list(range(50, 80)), list(range(100, 130)))
    row = grower(pool).start(array([1]))
    row.propose(array([1, *range(50, 60)]), 8)
    for context in ([1, *range(100, 112)], [2, *range(100, 104)], [50, 51]):
        assert (context[-1] + 1,) in weights(row.propose(array(context), 8))
    assert (61,) in weights(row.propose(array([1, *range(50, 61)]), 20)), "and with another budget"


def test_a_row_keeps_what_it_started_with() -> None:
    pool = filled([1, 2, 3])
    row, later = grower(pool).start(array([1, 2])), [1, 2, 4]
    pool.add(later)
    pool.flush()
    pool.compact()
    pool.prune(0)
    assert weights(row.propose(array([1, 2]), 8)).keys() == {(), (3,)}


def test_a_token_beyond_the_vocabulary_is_never_drafted() -> None:
    limited = Grower(sources=("pool",), pools=(filled([1, 2, 70_000], [1, 2, 5]),), vocab_size=100, min_chance=0.0)
    assert weights(limited.propose(array([1, 2]), 8)).keys() == {(), (5,)}


def test_the_reader_copies_what_it_must_remember() -> None:
    """The context that a drafter sees is a view of a buffer that goes on changing."""
    room = source.pooled(filled([1, 2, 3, 4]).snapshot().views, 1)
    reader, context = source.Reader(), array([1, 2])
    assert reader.fresh(context, room).tolist() == [1, 2]
    context[:] = 9
    assert reader.fresh(array([1, 2, 3]), room).tolist() == [3]
