"""`best_tokens` against its naive twin: a stable sort."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead import topk
from lookahead.topk import LANE, best_tokens

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, math.copysign(math.nan, -1.0)]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(-4, 4, width=32))


def naive(row: list[float], count: int) -> list[int]:
    """Order tokens by logit, NaN first, equal ones by number."""
    keys = [(0, 0.0) if math.isnan(value) else (1, -value) for value in row]
    return sorted(range(len(row)), key=lambda token: (keys[token], token))[:count]


@given(
    st.integers(1, 3 * LANE).flatmap(
        lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    st.integers(1, 9),
)
def test_equals_naive(rows: list[list[float]], count: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    tokens, values = best_tokens(logits, count)
    for row, (found, kept) in enumerate(zip(tokens.tolist(), values, strict=True)):
        assert found == naive(logits[row].tolist(), count)
        np.testing.assert_array_equal(kept, logits[row].numpy()[found])


@st.composite
def rows_at_the_lanes(draw: st.DrawFn) -> list[float]:
    """A row about as wide as a number of lanes, flat but for a few places: at the borders of lanes and anywhere."""
    width = max(1, draw(st.integers(0, 12)) * LANE + draw(st.integers(-2, 2)))
    row = [draw(st.sampled_from(SPECIAL))] * width
    borders = [at for lane in range(width // LANE + 1) for at in (lane * LANE - 1, lane * LANE) if 0 <= at < width]
    places = st.one_of(st.integers(0, width - 1), st.sampled_from([*borders, width - 1]))
    for place in draw(st.lists(places, max_size=24)):
        row[place] = draw(VALUES)
    return row


@settings(max_examples=300)
@given(rows_at_the_lanes(), st.integers(1, 16), st.booleans())
def test_equals_naive_at_the_borders_of_lanes(row: list[float], count: int, many: bool) -> None:
    """Fewer lanes than are asked for, as many, and more; a rest behind the last one, or none."""
    logits = torch.tensor([row, row[::-1]], dtype=torch.float32)
    with mock.patch.object(topk, "_FEW", 0 if many else topk._FEW):
        tokens, values = best_tokens(logits, count)
    for one, found, kept in zip(logits, tokens.tolist(), values, strict=True):
        assert found == naive(one.tolist(), count)
        np.testing.assert_array_equal(kept, one.numpy()[found])


def test_a_narrow_row_gives_all_it_has() -> None:
    tokens, values = best_tokens(torch.tensor([[0.5, 2.0]]), 8)
    assert (tokens.tolist(), values.tolist()) == ([[1, 0]], [[2.0, 0.5]])


@given(st.integers(1, 4 * LANE), st.integers(0, 2**31))
def test_first_column_is_argmax(width: int, seed: int) -> None:
    logits = torch.randint(0, 4, (5, width), generator=torch.Generator().manual_seed(seed)).float()
    assert best_tokens(logits, 4)[0][:, 0].tolist() == logits.argmax(-1).tolist()


def test_reads_rows_that_are_not_contiguous() -> None:
    logits = torch.randn(4, 2, 200)[:, 1]
    assert best_tokens(logits, 3)[0].tolist() == logits.topk(3).indices.tolist()


@pytest.mark.gpu
def test_on_cuda() -> None:
    logits = torch.randn(7, 1000)
    assert best_tokens(logits.cuda(), 8)[0].tolist() == best_tokens(logits, 8)[0].tolist()
