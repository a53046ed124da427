"""Masks on scores, held equal to what torch does with a mask of booleans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lookahead.grammar.masks import best_allowed, finish, forbid, words

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, 1.0, -65504.0, 3e38)


@st.composite
def scores_and_masks(draw: Any, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw scores with ties and odd values, and which of them are allowed."""
    n = draw(st.integers(1, 4)) if rows is None else rows
    size = draw(st.sampled_from((1, 2, 31, 32, 33, 63, 64, 65, 96, 100)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.randn(n, size)
    if draw(st.booleans()):
        scores = scores.round()
    for _ in range(draw(st.integers(0, 6))):
        row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, size - 1))
        scores[row, column] = draw(st.sampled_from(SPECIAL))
    share = draw(st.sampled_from((0.0, 0.03, 0.5, 0.97, 1.0)))
    return scores.to(draw(st.sampled_from(DTYPES))), torch.rand(n, size) < share


def packed(allowed: Tensor, spare: int = 0) -> Any:
    """Return booleans as bits, in `spare` words more than are needed; the bits behind the last token are all set."""
    n, size = allowed.shape
    padded = np.ones((n, 32 * (words(size) + spare)), bool)
    padded[:, :size] = allowed.numpy()
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_words() -> None:
    assert [words(size) for size in (0, 1, 31, 32, 33, 64, 65)] == [0, 1, 1, 1, 2, 2, 3]


@given(drawn=scores_and_masks(), spare=st.integers(0, 2))
def test_forbid_is_masked_fill(drawn: tuple[Tensor, Tensor], spare: int) -> None:
    scores, allowed = drawn
    expected = scores.masked_fill(~allowed, -torch.inf)
    got = scores.clone()
    forbid(got, packed(allowed, spare))
    assert same(got, expected)


@given(drawn=scores_and_masks())
def test_forbid_writes_into_views(drawn: tuple[Tensor, Tensor]) -> None:
    scores, allowed = drawn
    n, size = scores.shape
    expected = scores.masked_fill(~allowed, -torch.inf)
    for view in (
        torch.zeros(size, n, dtype=scores.dtype).t(),
        torch.zeros(n, 2 * size, dtype=scores.dtype)[:, ::2],
        torch.zeros(n, size + 7, dtype=scores.dtype)[:, 3 : size + 3],
        torch.zeros(2 * n, size, dtype=scores.dtype)[1::2],
        torch.zeros(n, size, dtype=scores.dtype, requires_grad=True).detach(),
    ):
        whole = view._base if view._base is not None else view
        view.copy_(scores)
        around = whole.clone()
        forbid(view, packed(allowed))
        assert same(view, expected)
        view.copy_(scores)
        assert same(whole, around), "something beside the view was written to"


@given(drawn=scores_and_masks(rows=1), spare=st.integers(0, 2))
def test_best_allowed_is_argmax_behind_masked_fill(drawn: tuple[Tensor, Tensor], spare: int) -> None:
    scores, allowed = drawn
    before = scores.clone()
    # plain generate() picks from float32, whatever the model computes in
    expected = int(scores[0].float().masked_fill(~allowed[0], -torch.inf).argmax())
    assert best_allowed(scores[0], packed(allowed, spare)[0]) == expected
    assert best_allowed(torch.stack([scores[0]] * 3, 1)[:, 1], packed(allowed, spare)[0]) == expected
    assert same(scores, before)


tokens = st.lists(st.integers(0, 130), max_size=3, unique=True)


@given(data=st.data(), size=st.integers(1, 130), written=st.integers(1, 5), may_end=st.booleans())
def test_finished_masks(data: Any, size: int, written: int, may_end: bool) -> None:
    """What the engine wrote, within the model's vocabulary, without its end tokens, and with ours where they may be."""
    width = max(words(size), written)
    raw = [data.draw(st.sampled_from((0, 1, 0xFFFFFFFF, 0x80000001)) | st.integers(0, 2**32 - 1)) for _ in range(width)]
    own, ends = data.draw(tokens), [token for token in data.draw(tokens) if token < size]
    masks = np.array([[7] * width, raw, [9] * width], np.uint32)
    some = finish(masks, 1, written, size, np.array(own, np.int64), np.array(ends, np.int64), may_end)
    expected = {t for t in range(min(size, 32 * written)) if raw[t >> 5] >> (t & 31) & 1} - set(own) - set(ends)
    expected |= set(ends) if may_end else set()
    assert np.flatnonzero(np.unpackbits(masks[1].view(np.uint8), bitorder="little")).tolist() == sorted(expected)
    assert bool(some) == bool(expected)
    assert masks[0].tolist() == [7] * width
    assert masks[2].tolist() == [9] * width


def test_first_of_equals_and_nan_above_all() -> None:
    every = torch.ones(1, 40, dtype=torch.bool)
    scores = torch.zeros(40)
    assert best_allowed(scores, packed(every)[0]) == 0
    scores[[35, 37]] = 2.0
    assert best_allowed(scores, packed(every)[0]) == 35
    scores[[36, 38]] = torch.nan
    assert best_allowed(scores, packed(every)[0]) == 36
    every[0, 36] = False
    assert best_allowed(scores, packed(every)[0]) == 38
    assert best_allowed(torch.full((40,), -torch.inf), packed(every)[0]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_on_cuda(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for size in (31, 32, 100, 50_257):
        scores, allowed = torch.randn(3, size).to(dtype), torch.rand(3, size) < 0.3
        expected = scores.masked_fill(~allowed, -torch.inf)
        got = scores.cuda()
        forbid(got, packed(allowed))
        assert same(got.cpu(), expected)
        best = [best_allowed(row.cuda(), mask) for row, mask in zip(scores, packed(allowed), strict=True)]
        assert best == expected.float().argmax(-1).tolist()
