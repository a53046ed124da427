"""What a token took of late, against naive twins, and what one odd value may do to it."""

from __future__ import annotations

from statistics import median_low
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead.recent import RECENT, Rate, Recent, Slope, UsualRate

seconds = st.one_of(st.sampled_from([0.0, 1e-6, 1.0, 1e4]), st.floats(1e-4, 10.0))
positive = st.floats(1e-4, 10.0)
passes = st.lists(st.tuples(seconds, st.integers(0, 6)), max_size=40)


def told(story: list[tuple[float, int]], rate: Rate | None = None) -> Rate:
    rate = rate or Rate()
    for spent, tokens in story:
        rate.add(spent, tokens)
    return rate


@given(st.lists(seconds, max_size=30), st.integers(1, 8))
def test_recent_equals_naive(values: list[float], length: int) -> None:
    recent = Recent(length)
    for value in values:
        recent.add(value)
    last = values[-length:]
    assert len(recent) == len(last)
    assert recent.total == pytest.approx(sum(last))
    assert recent.median == (median_low(last) if last else 0.0)
    most = 3.0 * recent.median
    assert recent.mean == pytest.approx(sum(min(value, most) for value in last) / max(len(last), 1))
    fewer = sorted(last)[:-1] if len(last) > 2 else last
    assert recent.trimmed == pytest.approx(sum(fewer) / max(len(fewer), 1))
    other = recent.copy()
    other.add(99.0)
    assert len(recent) == len(last)
    assert recent.total == pytest.approx(sum(last))


def rate_of(story: list[tuple[float, int]], usual: float) -> float:
    """Seconds a token: the last passes, none for more than three usual ones, and one pass of what was usual before."""
    found = usual
    for end in range(1, len(story) + 1):
        last = story[max(end - RECENT, 0) : end]
        most, tokens = 3.0 * median_low([spent for spent, _ in last]), sum(tokens for _, tokens in last)
        if tokens:
            own = sum(min(spent, most) for spent, _ in last) / tokens
            found = own * (usual / own) ** (1.0 / (1 + len(last))) if usual and own else own
    return found


@settings(max_examples=200)
@given(passes, st.one_of(st.just(0.0), positive), st.one_of(st.just(0.0), positive))
def test_a_rate_equals_naive(story: list[tuple[float, int]], usual: float, usual_s: float) -> None:
    """Clocks that stand still and passes that bring nothing too."""
    rate = told(story, Rate(usual, usual_s))
    assert rate.passes == len(story)
    assert rate.token_s == pytest.approx(rate_of(story, usual), rel=1e-9)
    last = [spent for spent, _ in story[-RECENT:]]
    assert rate.usual_s == (3.0 * median_low(last) if last else usual_s)


@given(st.lists(st.tuples(positive, st.integers(1, 6)), min_size=1, max_size=20), positive)
def test_a_rate_lies_between_what_was_usual_and_what_is(story: list[tuple[float, int]], usual: float) -> None:
    own, rate = told(story).token_s, told(story, Rate(usual)).token_s
    assert min(own, usual) * (1 - 1e-9) <= rate <= max(own, usual) * (1 + 1e-9)


@given(
    st.lists(st.tuples(positive, st.integers(1, 6)), min_size=3, max_size=20),
    st.integers(0, 19),
    st.floats(10.0, 1e9),
)
def test_one_pass_that_took_far_longer_is_a_long_one_and_no_more(
    story: list[tuple[float, int]], at: int, slow: float
) -> None:
    """However slow it was: something was compiled in it."""
    at %= len(story)
    slower, slowest = (told([*story[:at], (spent, story[at][1]), *story[at + 1 :]]) for spent in (1e3, 1e3 + slow))
    assert slowest.token_s == slower.token_s
    assert slowest.usual_s == slower.usual_s


@given(st.lists(st.tuples(positive, st.integers(1, 6)), min_size=1, max_size=20), st.sampled_from([0.25, 1024.0]))
def test_the_unit_of_time_does_not_matter_to_a_rate(story: list[tuple[float, int]], scale: float) -> None:
    other = told([(scale * spent, tokens) for spent, tokens in story], Rate(scale * 0.5, scale))
    one = told(story, Rate(0.5, 1.0))
    assert other.token_s == pytest.approx(scale * one.token_s)
    assert other.usual_s == pytest.approx(scale * one.usual_s)


@settings(max_examples=100)
@given(st.lists(passes, max_size=10))
def test_a_text_begins_with_the_usual_rate_of_the_last_ones(texts: list[Any]) -> None:
    """The geometric mean of the first four that were long enough, and then one that forgets."""
    usual, mean, count, usual_s = UsualRate(), 0.0, 0, 0.0
    rates = []
    for story in texts:
        rate = usual.begin()
        assert rate.passes == 0
        assert rate.token_s == pytest.approx(mean, rel=1e-9)
        assert rate.usual_s == usual_s
        assert not rates or min(rates) * (1 - 1e-9) <= rate.token_s <= max(rates) * (1 + 1e-9)
        told(story, rate)
        usual_s = rate.usual_s
        if len(story) >= 4 and rate.token_s:
            rates.append(rate.token_s)
            count += 1
            mean = mean ** (1 - 1 / min(count, 4)) * rate.token_s ** (1 / min(count, 4))


def test_texts_of_a_few_passes_do_not_count() -> None:
    usual = UsualRate()
    told([(1.0, 1)] * 5, usual.begin())
    for _ in range(5):
        rate = usual.begin()
        assert rate.token_s == pytest.approx(1.0)
        told([(100.0, 1)] * 3, rate)


@given(st.lists(st.tuples(st.integers(0, 64), positive), max_size=40))
def test_a_slope_is_never_negative(story: list[tuple[int, float]]) -> None:
    slope = Slope()
    for nodes, spent in story:
        slope.add(nodes, spent)
    assert np.isfinite(slope.value)
    assert slope.value >= 0.0
    assert len(story) >= 8 or slope.value == 0.0


def test_a_slope_is_found_though_one_draft_took_far_longer() -> None:
    slope = Slope()
    for nodes in (1, 4, 9, 16, 2, 7, 30, 12, 5):
        slope.add(nodes, 1.0 + 0.01 * nodes)
    slope.add(3, 1000.0)
    assert slope.value == pytest.approx(0.01)
