"""The state of a batch: stopping criteria as plain asks them, rows that wait, contexts, records."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from lookahead.draft import Draft
from lookahead.progress import Contexts, Progress, Records, Stops
from lookahead.sampling import Sampler
from lookahead.verify import walk


def _odd(ids: Any, scores: Any, **_: Any) -> Any:
    return ids[:, -1] % 5 == 1


def _bool(ids: Any, scores: Any, **_: Any) -> Any:
    return bool(ids.shape[1] > 9)


@st.composite
def lists_of_criteria(draw: Any) -> StoppingCriteriaList:
    eos = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    every = [
        MaxLengthCriteria(draw(st.integers(1, 9))),
        EosTokenCriteria(eos if draw(st.booleans()) else eos[0]),
        MaxTimeCriteria(1e6),
        _odd,
        _bool,
    ]
    return StoppingCriteriaList(draw(st.lists(st.sampled_from(every), max_size=4)))


@settings(max_examples=150)
@given(criteria=lists_of_criteria(), rows=st.integers(1, 4), length=st.integers(1, 11), seed=st.integers(0, 999))
def test_stops_answer_as_the_list_of_criteria(criteria: Any, rows: int, length: int, seed: int) -> None:
    ids = torch.randint(0, 10, (rows, length), generator=torch.Generator().manual_seed(seed))
    stops, asked = Stops(criteria), []

    def show() -> Any:
        asked.append(1)
        return ids

    plain = criteria(ids, None).tolist() if len(criteria) else [False] * rows
    assert stops(ids[:, -1].tolist(), length, show, None) == plain
    assert bool(asked) == any(c in (_odd, _bool) or type(c) is MaxTimeCriteria for c in criteria)
    assert stops.pads == any(hasattr(c, "eos_token_id") for c in criteria)


def test_length_criterion_is_only_called_to_warn() -> None:
    stops, seen = Stops([MaxLengthCriteria(9, max_position_embeddings=4)]), []

    def call(self: Any, ids: Any, scores: Any) -> Any:
        seen.append(ids.shape[1])
        return torch.tensor([False])

    with mock.patch.object(MaxLengthCriteria, "__call__", call):
        for length in (3, 4, 5):
            assert stops([0], length, lambda n=length: torch.zeros(1, n, dtype=torch.long), None) == [False]
    assert seen == [5]


def progress(rows: int = 2, *criteria: Any, **options: Any) -> Progress:
    records = Records(rows, scores=False, logits=False)
    prompt = torch.arange(rows * 3).view(rows, 3)
    return Progress(prompt, Stops(criteria), **{"pad": 99, "complete": False, "records": records} | options)


def test_a_row_waits_at_eos_and_at_the_length_limit() -> None:
    p = progress(2, MaxLengthCriteria(3 + 4), EosTokenCriteria(7))
    assert p.remaining(0) == 4
    p.commit(0, 5)
    assert p.is_open(0)
    p.commit(0, 7)
    assert not p.is_open(0)
    assert p.settle() == set()
    p.commit(1, 4)
    p.commit(1, 4)
    assert p.settle() == {0}
    assert p.is_padding(0)
    assert not p.is_padding(1)
    p.commit(1, 4)
    p.commit(1, 4)
    assert not p.is_open(1)
    assert p.settle() == {1}
    assert p.done
    assert p.ids(p.settled).tolist() == [[0, 1, 2, 5, 7, 99, 99], [3, 4, 5, 4, 4, 4, 4]]


def test_what_is_picked_beyond_the_end_is_taken_back() -> None:
    p = progress(2, EosTokenCriteria(7), _odd)
    for token in (5, 6, 8, 9):
        p.commit(0, token)
    for token in (5, 5):
        p.commit(1, token)
    assert p.settle() == {0}
    assert p.length[0] == 2
    assert p.ids(2).tolist() == [[0, 1, 2, 5, 6], [3, 4, 5, 5, 5]]
    p.commit(1, 7)
    assert p.settle() == {1}
    assert p.ids(3).tolist()[0] == [0, 1, 2, 5, 6, 99]


def test_ids_are_the_callers_own() -> None:
    p = progress(2)
    p.commit(0, 5)
    p.commit(1, 5)
    ids = p.ids(1)
    assert ids.is_contiguous()
    ids += 1
    assert p.ids(1).tolist() == [[0, 1, 2, 5], [3, 4, 5, 5]]


@settings(max_examples=60)
@given(blocks=st.lists(st.lists(st.integers(0, 99), max_size=700), max_size=5), padding=st.integers(0, 3))
def test_contexts_are_prompt_without_padding_and_what_was_committed(blocks: list[list[int]], padding: int) -> None:
    prompt, mask = np.array([[1, 2, 3, 4]]), np.array([[i >= padding for i in range(4)]])
    contexts, naive = Contexts(prompt, mask, 100), [1, 2, 3, 4][padding:]
    start = len(naive)
    for block in blocks:
        contexts.extend(0, len(naive) - start, np.array(block, np.int64))
        naive += block
        view = contexts.view(0, len(naive) - start)
        assert view.tolist() == naive
        assert view.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 3
    if blocks and blocks[-1]:
        contexts.extend(0, len(naive) - start - 1, np.array([7]))  # a token that was taken back and picked anew
        assert contexts.view(0, len(naive) - start).tolist() == [*naive[:-1], 7]


def test_records_keep_the_last_word_about_a_row() -> None:
    records = Records(2, scores=True, logits=True)
    for row, value in ((0, 1.0), (1, 2.0), (0, 3.0)):
        records.record(0, row, torch.full((4,), value), torch.full((4,), -value))
    records.settle(0)
    assert records.scores is not None
    assert records.logits is not None
    assert records.scores[0][:, 0].tolist() == [3.0, 2.0]
    assert records.logits[0][:, 0].tolist() == [-3.0, -2.0]


# One row whose picks nobody looks at in between


@st.composite
def trees(draw: Any, root: int) -> tuple[Draft, list[int]]:
    """Any tree and what is picked at each node; tokens are few, so that picks are often there, as a probe or twice."""
    size = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(max(0, i - draw(st.integers(1, 3))), i - 1)) for i in range(1, size))]
    tokens = [root, *(draw(st.integers(0, 3)) for _ in range(1, size))]
    probe = [i > 0 and draw(st.integers(0, 5)) == 0 for i in range(size)]
    picks = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    return Draft(np.array(tokens), np.array(parents), probe=np.array(probe)), picks


def token_by_token(draft: Draft, picks: list[int], p: Progress) -> list[int]:
    """The general walk for one row, as plain decoding asks: pick, commit, settle, descend."""
    nodes = [0]
    while True:
        token = p.commit(0, picks[nodes[-1]])
        p.settle()
        child = draft.child(nodes[-1], token)
        if child is None or not p.is_open(0):
            return nodes
        nodes.append(child)


def state(p: Progress) -> dict[str, Any]:
    return {
        "ids": p.ids(p.settled).tolist(),
        "length": p.length,
        "settled": p.settled,
        "done": p.done,
        "padding": p.is_padding(0),
        "runs": p.runs(0),
        "open": p.is_open(0),
        "remaining": p.remaining(0),
        "generated": p.generated(0).tolist(),
    }


@settings(max_examples=300)
@given(data=st.data(), limit=st.one_of(st.none(), st.integers(1, 20)), eos=st.sets(st.integers(0, 4), max_size=2))
def test_a_run_is_the_walk_token_by_token(data: Any, limit: int | None, eos: set[int]) -> None:
    """Passes over any trees until the row ends; buffers that have to grow on the way."""
    criteria: list[Any] = [] if limit is None else [MaxLengthCriteria(3 + limit)]
    criteria += [EosTokenCriteria(sorted(eos))] if eos else []
    complete = data.draw(st.booleans())
    with mock.patch("lookahead.progress.CHUNK", 256 if limit is None else data.draw(st.sampled_from([1, 2, 256]))):
        run, naive = (progress(1, *criteria, complete=complete) for _ in range(2))
        assert run.takes_runs
        for _ in range(6):
            draft, picks = data.draw(trees(run.last(0)))
            with mock.patch.object(Progress, "commit", side_effect=AssertionError("not one by one")):
                sampler = Sampler([], do_sample=False, rows=1, device=torch.device("cpu"))
                sampler.load(torch.nn.functional.one_hot(torch.tensor([picks]), 5).float(), 0)
                paths = walk([draft], sampler, run)
            assert paths == [token_by_token(draft, picks, naive)]
            assert state(run) == state(naive)
            if run.done:
                break


@pytest.mark.parametrize(
    ("rows", "criteria", "options", "wanted"),
    [
        (1, [MaxLengthCriteria(9), EosTokenCriteria(7)], {}, True),
        (1, [], {"complete": True}, True),
        (2, [MaxLengthCriteria(9)], {}, False),
        (1, [_odd], {}, False),
        (1, [MaxTimeCriteria(1e6)], {}, False),
        (1, [MaxLengthCriteria(9, max_position_embeddings=4)], {}, False),
        (1, [MaxLengthCriteria(9, max_position_embeddings=9)], {}, True),
        (1, [], {"streamer": mock.Mock()}, False),
        (1, [], {"records": Records(1, scores=True, logits=False)}, False),
        (1, [], {"records": Records(1, scores=False, logits=True)}, False),
    ],
)
def test_runs_are_taken_where_nobody_asks_in_between(
    rows: int, criteria: list[Any], options: dict[str, Any], wanted: bool
) -> None:
    assert progress(rows, *criteria, **options).takes_runs == wanted


def test_the_first_end_token_of_a_run_is_its_last() -> None:
    p = progress(1, EosTokenCriteria([7, 8]))
    assert p.commit_run(np.array([5, 8, 7, 6])) == 2
    assert p.done
    assert p.ids(2).tolist() == [[0, 1, 2, 5, 8]]
    p = progress(1, MaxLengthCriteria(3 + 2))
    assert p.commit_run(np.array([5, 6, 7])) == 2
    assert p.done
    assert p.settled == 2
