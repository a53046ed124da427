"""The cost curve against machines whose times are made up: what it finds, and what no times may do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead.cost import KNOTS, CostCurve, _columns, _outdated, _price

Price = Callable[[Any, Any], Any]

CURVES: dict[str, Price] = {
    "flat": lambda nodes, context: 1.0 + 0.0 * nodes,
    "linear": lambda nodes, context: 1.0 + 0.05 * (nodes - 1),
    "a row is a pass": lambda nodes, context: 1.0 * nodes,
    "flat, then rising": lambda nodes, context: 1.0 + 0.02 * np.maximum(nodes - 17, 0),
    "a jump at 2": lambda nodes, context: np.where(nodes == 1, 1.0, 2.0 + 0.01 * nodes),
    "rises with the context": lambda nodes, context: 1.0 + 0.01 * nodes + context / 2048 + nodes * context / 2**19,
}
SIZES: dict[str, Sequence[int]] = {
    "few": (1, 9, 33),
    "knots": (1, 2, 3, 5, 8, 12, 17, 25, 33, 49, 65),
    "mostly small": (1, 1, 1, 1, 1, 4, 4, 7, 7, 30),
}


def feed(
    curve: CostCurve,
    price: Price,
    sizes: Sequence[int],
    passes: int,
    *,
    noise: float = 0.05,
    hiccups: float = 0.03,
    context: int = 100,
    growth: int = 0,
    seed: int = 0,
) -> int:
    """Let passes go by over trees of `sizes`, of which a few take 2 to 50 times as long; return the context then."""
    random = np.random.default_rng(seed)
    for _ in range(passes):
        size = int(random.choice(sizes))
        seconds = float(price(size, context)) * np.exp(noise * random.standard_normal())
        curve.add(size, seconds * (random.uniform(2, 50) if random.random() < hiccups else 1.0), context=context)
        context += growth
    return context


def error(curve: CostCurve, price: Price, sizes: Sequence[int], context: int) -> float:
    """Return how far the curve is off at most, as a part of the truth."""
    nodes = np.array(sorted(set(sizes)))
    return float(np.abs(curve.seconds(nodes, context=context) / price(nodes, context) - 1.0).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CURVES)
def test_the_curve_is_found_from_noisy_passes(name: str, sizes: str, seed: int) -> None:
    """Within 10% at every size that was visited, be the machine a hiccuping one, and not only after a short time."""
    curve, price = CostCurve(), CURVES[name]
    context = feed(curve, price, SIZES[sizes], 400, growth=3 if "context" in name else 0, seed=seed)
    assert error(curve, price, SIZES[sizes], context) < 0.1
    context = feed(curve, price, SIZES[sizes], 4000, context=context, growth=3 if "context" in name else 0, seed=9)
    assert error(curve, price, SIZES[sizes], context) < 0.1


@pytest.mark.parametrize("name", CURVES)
def test_passes_without_noise_are_met(name: str) -> None:
    """Also where the truth bends at the knots; in between a curve of straight pieces cannot follow a jump."""
    curve = CostCurve()
    context = feed(curve, CURVES[name], SIZES["knots"], 300, noise=0.0, hiccups=0.0)
    assert error(curve, CURVES[name], SIZES["knots"], context) < 0.05


@pytest.mark.parametrize("noise", [0.05, 0.1])
def test_sizes_that_were_seen_once_stay_where_they_are(noise: float) -> None:
    """Thousands of passes over single nodes say nothing about trees."""
    curve, price = CostCurve(), CURVES["linear"]
    feed(curve, price, SIZES["knots"], 200, noise=noise)
    before = curve.seconds(np.array([1.0, 9, 33, 65]), context=100)
    feed(curve, price, (1,), 10_000, noise=noise, seed=1)
    after = curve.seconds(np.array([1.0, 9, 33, 65]), context=100)
    assert after == pytest.approx(before, rel=0.25)


@pytest.mark.parametrize("cliff", [1.2, 1.5, 2.0, 4.0, 8.0])
def test_the_size_that_always_runs_is_known(cliff: float) -> None:
    """Beyond a cliff: its many passes are no hiccups, and the few passes of smaller trees stay what they were."""

    def price(nodes: Any, context: Any) -> Any:
        return np.where(nodes <= 17, 1.0, cliff)

    curve = CostCurve()
    for size in (1, 2, 5, 12, 17):
        feed(curve, price, (size,), 3, noise=0.03, hiccups=0.0, seed=size)
    feed(curve, price, (25,), 300, noise=0.03)
    assert error(curve, price, (1, 12, 17, 25), 100) < 0.2


def test_passes_over_single_nodes_leave_the_slope_that_is_assumed() -> None:
    curve = CostCurve(slope=0.02)
    feed(curve, CURVES["flat"], (1,), 100, noise=0.0, hiccups=0.0)
    nodes = np.array([1.0, 2, 9, 33])
    assert curve.seconds(nodes, context=100) == pytest.approx(1.0 + 0.02 * (nodes - 1), rel=0.1)


def test_large_passes_alone_do_not_make_the_others_free() -> None:
    """Time that rises faster than the nodes says nothing of a pass over one, but that it takes some."""
    curve = CostCurve()
    for size, seconds in ((33, 3.0), (65, 8.0)):
        for _ in range(4):
            curve.add(size, seconds)
    assert float(curve.seconds(np.array([1.0]))[0]) > 0.05
    assert curve.seconds(np.array([33.0, 65.0])) == pytest.approx([3.0, 8.0], rel=0.2)


def test_masks_cost_what_they_cost() -> None:
    curve, random = CostCurve(), np.random.default_rng(0)
    for _ in range(400):
        size, masks = int(random.choice(SIZES["knots"])), int(random.integers(0, 40))
        curve.add(size, 1.0 + 0.01 * size + 0.05 * masks, masks=masks)
    nodes = np.array([1.0, 33.0])
    for masks in (0, 10, 40):
        assert curve.seconds(nodes, masks=masks) == pytest.approx(1.0 + 0.01 * nodes + 0.05 * masks, rel=0.1)


def test_a_long_context_is_foreseen_from_shorter_ones() -> None:
    """At twice the length that anybody has been at."""
    curve, price = CostCurve(), CURVES["rises with the context"]
    context = feed(curve, price, SIZES["knots"], 600, growth=8, noise=0.02, hiccups=0.0)
    assert error(curve, price, SIZES["knots"], 2 * context) < 0.15


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_machine_of_another_speed_is_followed(factor: float) -> None:
    curve, price = CostCurve(), CURVES["linear"]
    feed(curve, price, SIZES["knots"], 300)

    def changed(nodes: Any, context: Any) -> Any:
        return factor * price(nodes, context)

    feed(curve, changed, SIZES["knots"], 300, seed=1)
    assert error(curve, changed, SIZES["knots"], 100) < 0.15


@pytest.mark.parametrize("first", [1, 33])
def test_a_first_pass_that_is_far_too_slow_is_forgotten(first: int) -> None:
    """As where something is compiled in it: neither are trees dear from then on, nor is a pass as such."""
    curve, price = CostCurve(), CURVES["linear"]
    curve.add(first, 100.0 * float(price(first, 0)), context=100)
    feed(curve, price, SIZES["knots"], 60)
    assert error(curve, price, SIZES["knots"], 100) < 0.15


def test_a_size_whose_only_pass_was_slow_is_not_believed() -> None:
    """The curve around it is known; it may look dearer, but not fifty times, and one fair pass puts it right."""
    curve, price = CostCurve(), CURVES["linear"]
    feed(curve, price, (1, 2, 3, 5, 9), 100)
    curve.add(33, 50.0 * float(price(33, 0)), context=100)
    feed(curve, price, (1, 2, 3, 5, 9), 40)
    for _ in range(2):
        curve.add(33, float(price(33, 0)), context=100)
    feed(curve, price, (1, 2, 3, 5, 9), 40)
    assert float(curve.seconds(np.array([33.0]), context=100)[0]) == pytest.approx(float(price(33, 0)), rel=0.2)


# What holds for any times

passes = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([1, 2, 64, 4096, 9000]), st.integers(1, 300)),
        st.floats(1e-7, 1e5),
        st.one_of(st.just(0), st.integers(0, 200_000)),
        st.integers(0, 50),
    ),
    max_size=40,
)


def told(story: list[tuple[int, float, int, int]], scale: float = 1.0) -> CostCurve:
    curve = CostCurve()
    for nodes, seconds, context, masks in story:
        curve.add(nodes, scale * seconds, context=context, masks=masks)
    return curve


@settings(max_examples=150)
@given(passes, st.integers(0, 100_000), st.integers(0, 30))
def test_it_is_finite_and_rises_with_everything(
    story: list[tuple[int, float, int, int]], context: int, masks: int
) -> None:
    curve, nodes = told(story), np.arange(1, 5000)
    seconds = curve.seconds(nodes, context=context, masks=masks)
    assert np.isfinite(seconds).all()
    assert (seconds >= 0).all()
    assert seconds[-1] > 0
    slack = 1e-9 * seconds[-1]
    assert (np.diff(seconds) >= -slack).all()
    assert (curve.seconds(nodes, context=context + 999, masks=masks) >= seconds - slack).all()
    assert (curve.seconds(nodes, context=context, masks=masks + 1) >= seconds - slack).all()


@settings(max_examples=100)
@given(passes, st.sampled_from([2.0**-10, 2.0**10]))
def test_the_unit_of_time_does_not_matter(story: list[tuple[int, float, int, int]], scale: float) -> None:
    """By powers of two, which round nothing: which of two passes was the faster one must not hang on a last bit."""
    nodes = np.arange(1, 200)
    one, other = told(story), told(story, scale)
    if story:
        np.testing.assert_allclose(other.seconds(nodes), scale * one.seconds(nodes), rtol=1e-3)


coefficients = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 10)),
    min_size=len(_columns(KNOTS, 0, 0)[0]),
    max_size=len(_columns(KNOTS, 0, 0)[0]),
)


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.sampled_from(KNOTS.tolist()), st.floats(1, 10_000)), min_size=1, max_size=20),
    coefficients,
    st.integers(0, 200_000),
    st.integers(0, 50),
)
def test_a_price_is_columns_times_coefficients(nodes: list[float], fit: list[float], context: int, masks: int) -> None:
    """At the knots, between them and behind the last one; never quite nothing, unless all of it is."""
    found = np.empty(len(nodes))
    _price(np.array(nodes), float(context), float(masks), np.array(fit), KNOTS, found)
    expected = _columns(np.array(nodes), context, masks) @ np.array(fit)
    np.testing.assert_allclose(found, np.maximum(expected, 1e-9 * sum(fit)), rtol=1e-9)


classes = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 100), st.sampled_from([1.0, 1.25, 1.3, 1.4, 2.0])),
    max_size=8,
)


@settings(max_examples=300)
@given(classes, st.sampled_from([2.0**-20, 1.0, 2.0**10]))
def test_outdated_is_what_smaller_passes_have_since_been_slower_than(
    kinds: list[tuple[int, int, int, float]], scale: float
) -> None:
    """Smaller, behind no more context, long after, and clearly slower."""
    expected = [
        any(
            smaller < knot and shorter <= length and later > seen + 32 and slower > 1.3 * least
            for smaller, shorter, later, slower in kinds
        )
        for knot, length, seen, least in kinds
    ]
    knots, lengths, seen, least = (np.array(column) for column in (zip(*kinds, strict=True) if kinds else [[]] * 4))
    assert _outdated(knots, lengths, seen, least).tolist() == expected
    assert _outdated(knots, lengths, seen, scale * least).tolist() == expected


def test_what_another_machine_took_is_forgotten() -> None:
    """Large passes that ran once, before all became five times slower, do not make the small ones cheap."""
    curve, price = CostCurve(), CURVES["linear"]
    feed(curve, price, (33,), 20, noise=0.0, hiccups=0.0)

    def slower(nodes: Any, context: Any) -> Any:
        return 5.0 * price(nodes, context)

    feed(curve, slower, (1, 2, 3), 150, noise=0.0, hiccups=0.0)
    assert error(curve, slower, (1, 2, 3), 100) < 0.1


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_left_out(seconds: float) -> None:
    """A clock that stands still or goes backwards teaches nothing."""
    curve = CostCurve()
    feed(curve, CURVES["linear"], SIZES["knots"], 50)
    before, passes = curve.seconds(KNOTS), curve.passes
    for _ in range(20):
        curve.add(9, seconds)
    assert curve.passes == passes
    assert curve.seconds(KNOTS).tolist() == before.tolist()


# Before anything is known, and what is wanted to be


def test_a_fresh_curve_assumes_its_slope() -> None:
    nodes = np.array([1.0, 2, 11, 64])
    np.testing.assert_allclose(CostCurve(slope=0.1).seconds(nodes), 1.0 + 0.1 * (nodes - 1))
    with pytest.raises(ValueError, match="slope=-1"):
        CostCurve(slope=-1)


def test_what_another_curve_knows_is_the_beginning() -> None:
    price = CURVES["linear"]
    curve = CostCurve(known=lambda nodes: 0.01 * price(nodes, 0))
    nodes = np.array([1.0, 9, 33, 65])
    assert curve.seconds(nodes) == pytest.approx(0.01 * price(nodes, 0), rel=0.1)


def test_what_is_measured_wins_over_what_was_known() -> None:
    """It came from another batch size or another day: no more than a beginning."""
    price = CURVES["linear"]
    curve = CostCurve(known=lambda nodes: 2.0 * price(nodes, 0))
    feed(curve, price, (1, 8, 33), 500)
    assert error(curve, price, (1, 8, 33), 100) < 0.15


def test_unknown_are_the_sizes_that_were_not_seen_often_enough() -> None:
    curve = CostCurve()
    assert curve.unknown(10) == [1, 2, 3, 5, 8]
    for size in (8, 5, 3, 2, 1):
        for _ in range(20):
            curve.add(size, 1.0)
    assert curve.unknown(10) == []
    assert curve.unknown(20) == [12, 17]
    for _ in range(5000):
        curve.add(3, 1.0)
    assert sorted(set(curve.unknown(10))) == [1, 2, 5, 8], "what has not been seen for long is old"


def test_one_slow_pass_leaves_hope() -> None:
    """A size that was slow once may have had bad luck: what it costs at best is what its neighbours let hope for."""
    curve = CostCurve(slope=0.02)
    feed(curve, CURVES["flat"], (1, 2, 3), 50, noise=0.0, hiccups=0.0)
    curve.add(33, 40.0, context=100)
    assert curve.hoped(33) < 3.0
    assert curve.hoped(33) <= float(curve.seconds(np.array([33]))[0]) * (1 + 1e-9)


def test_a_jump_is_not_carried_on_to_where_the_curve_has_not_been() -> None:
    """From 3 to 5 nodes another way to multiply may cost as much again, which says little of 65."""
    curve = CostCurve(slope=0.02)
    for _ in range(8):
        for nodes, seconds in ((1, 0.08), (2, 0.085), (3, 0.09), (5, 0.16)):
            curve.add(nodes, seconds)
    at_5, at_65 = curve.seconds(np.array([5, 65]))
    last = (0.16 - 0.09) / 2
    assert at_5 == pytest.approx(0.16, rel=0.1)
    assert 0.16 + 60 * 0.02 * 0.08 < at_65 < 0.16 + 60 * 0.5 * last
    for _ in range(8):
        curve.add(65, 1.5)
    assert curve.seconds(np.array([65]))[0] == pytest.approx(1.5, rel=0.1)
