"""What may rest: a switch on made-up turns, and the window of Jacobi lookahead on a machine whose times are made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from clocks import Clock
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, tiny

from lookahead import Budget, Grower, Jacobi, Lookahead
from lookahead.draft import Draft
from lookahead.sources.codes import JACOBI
from lookahead.sources.paid import Paid
from lookahead.sources.source import Source
from lookahead.switch import LEAST, Switch
from lookahead.testing import Oracle
from lookahead.trace import Step

Turn = tuple[float, float, float]  # seconds, and the gain and the price where it is on


def drive(switch: Switch, turns: list[Turn]) -> list[bool]:
    """Return for every turn whether it was on; while it is off, its price is quoted."""
    ran = []
    for seconds, gain, price in turns:
        ran.append(switch.on)
        if switch.on:
            switch.observe(seconds, gain=gain, price=price)
        else:
            switch.quote(price)
            switch.observe(seconds)
    return ran


def share(ran: list[bool]) -> float:
    return sum(ran) / len(ran)


def test_it_stays_on_while_it_pays() -> None:
    assert all(drive(Switch(), [(1.0, 0.2, 0.1)] * 1000))
    assert all(drive(Switch(), [(1.0, 0.0, 0.0)] * 1000)), "what takes nothing does no harm"


def test_gains_that_come_now_and_then_are_averaged() -> None:
    """One turn in ten brings all that the others take, and more."""
    turns = [(1.0, 2.0 if number % 10 == 0 else 0.0, 0.1) for number in range(1000)]
    assert share(drive(Switch(), turns)) > 0.95


@pytest.mark.parametrize("spell", [1, 8, 24])
@pytest.mark.parametrize("explore", [0.001, 0.01])
def test_what_does_not_pay_rests_but_for_trials(explore: float, spell: int) -> None:
    switch, price = Switch(explore=explore, spell=spell), 0.05
    assert any(drive(switch, [(1.0, 0.0, price)] * LEAST))
    ran = drive(switch, [(1.0, 0.0, price)] * 50_000)
    assert share(ran[:LEAST]) < 1.0
    spent = price * sum(ran)
    assert 0.5 * explore * 50_000 <= spent <= explore * 50_000 + price * (spell + LEAST)


def test_trials_go_on_for_a_spell() -> None:
    switch = Switch(explore=0.01, spell=24, on=False)
    ran = drive(switch, [(1.0, 0.0, 0.1)] * 2000)
    edges = np.flatnonzero(np.diff([0, *ran, 0]))
    lengths = edges[1::2] - edges[::2]
    assert len(lengths) > 3
    assert set(lengths[:-1].tolist()) == {24}


@pytest.mark.parametrize("spell", [1, 8])
def test_what_begins_to_pay_wakes_up(spell: int) -> None:
    switch = Switch(explore=0.01, spell=spell)
    drive(switch, [(1.0, 0.0, 0.1)] * 3000)
    ran = drive(switch, [(1.0, 1.0, 0.1)] * 2000)
    assert all(ran[-1000:])


def test_what_was_off_is_tried_when_its_price_is_saved() -> None:
    ran = drive(Switch(explore=0.01, on=False), [(1.0, 5.0, 0.5)] * 200)
    assert not any(ran[:49])
    assert all(ran[60:]), "and stays on, since it pays"


def test_what_costs_nothing_is_tried_at_once() -> None:
    """It may bring something, and there is nothing to lose."""
    ran = drive(Switch(explore=0.01, on=False), [(1.0, 0.5, 0.0)] * 100)
    assert all(ran[10:])


def test_without_anything_to_explore_with_it_never_comes_back() -> None:
    switch = Switch(explore=0.0)
    drive(switch, [(1.0, 0.0, 0.1)] * 100)
    assert not any(drive(switch, [(1.0, 9.0, 0.1)] * 1000))


def test_one_turn_that_took_very_long_decides_nothing() -> None:
    """As the first one does, in which something is compiled."""
    for at in range(LEAST + 4):
        turns = [(1.0, 0.3, 0.1)] * 200
        turns[at] = (500.0, 0.3, 500.0)
        assert share(drive(Switch(), turns)[-100:]) == 1.0, at


def test_prices_that_come_in_bursts_are_prices() -> None:
    """Three turns cost nothing and the fourth a lot: on the whole it does not pay."""
    turns = [(1.0, 0.01, 0.4 if number % 4 == 0 else 0.0) for number in range(4000)]
    assert share(drive(Switch(), turns)[-2000:]) <= 0.5


def test_a_lower_price_is_taken_up_without_a_trial() -> None:
    switch = Switch(explore=0.001)
    drive(switch, [(1.0, 0.1, 0.5)] * 100)
    assert not switch.on
    switch.quote(0.05)
    assert switch.paying
    switch.observe(1.0)
    assert switch.on
    resting = Switch(on=False)
    resting.quote(0.0)
    assert not resting.paying, "nothing was gained yet"


def test_a_follower_begins_where_the_other_has_got_to() -> None:
    paying, failing = Switch(), Switch()
    drive(paying, [(1.0, 0.3, 0.1)] * 100)
    drive(failing, [(1.0, 0.0, 0.1)] * 100)
    for other in (paying, failing):
        follower = Switch()
        follower.follow(other)
        assert (follower.gain, follower.price, follower.paying) == (other.gain, other.price, other.paying)
        assert follower.on, "one turn to prove it wrong"
    follower = Switch(explore=0.01)
    follower.follow(paying)
    assert all(drive(follower, [(1.0, 0.3, 0.1)] * 100))
    follower = Switch(explore=0.01)
    follower.follow(failing)
    assert drive(follower, [(1.0, 0.0, 0.1)] * 20) == [True] + [False] * 19
    follower = Switch(explore=0.01)
    follower.follow(failing)
    assert drive(follower, [(1.0, 9.0, 0.1)] * 20) == [True] * 20
    fresh = Switch()
    fresh.follow(Switch())
    assert all(drive(fresh, [(1.0, 0.0, 0.1)] * LEAST)), "of one that knows nothing, nothing is known"


def test_a_follower_is_one_of_its_own() -> None:
    other, follower = Switch(), Switch()
    drive(other, [(1.0, 0.3, 0.1)] * 50)
    follower.follow(other)
    drive(follower, [(1.0, 0.0, 5.0)] * 50)
    assert (other.on, other.price) == (True, pytest.approx(0.1))


amounts = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(amounts, amounts, amounts), max_size=200),
    st.floats(0.0, 0.2),
    st.sampled_from([1, 3, 24]),
    st.booleans(),
    st.sampled_from([None, 0.0, 1.0]),
)
def test_trials_cost_no_more_than_was_saved_for_them(
    turns: list[Turn], explore: float, spell: int, on: bool, followed: float | None
) -> None:
    """For any sequence: what trials lose is a part of the time, and one spell, since its price is known only after."""
    switch, elapsed, lost, worst = Switch(explore=explore, spell=spell, on=on), 0.0, 0.0, 0.0
    if followed is not None:
        other = Switch()
        drive(other, [(1.0, followed, 0.5)] * 20)
        switch.follow(other)
    for seconds, gain, price in turns:
        elapsed += seconds
        if switch.on:
            if not switch.paying:
                lost += max(price - gain, 0.0)
                worst = max(worst, price)
            switch.observe(seconds, gain=gain, price=price)
        else:
            switch.quote(price)
            switch.observe(seconds)
        assert np.isfinite([switch.gain, switch.price]).all()
    assert lost <= explore * elapsed + spell * worst + 1e-9


# The window


class Silent(Source):
    """Knows nothing."""

    def start(self, context: Any) -> Any:
        return None

    def extend(self, cursor: Any, token: int) -> Any:
        return None

    def successors(self, cursor: Any) -> Any:
        return [], []


OPTIONS = Jacobi(window=6, ngram=4, verify=6)


def test_a_window_beside_other_sources_begins_at_rest() -> None:
    assert not Grower(sources=("prompt", OPTIONS)).window_runs
    assert Grower(sources=(OPTIONS,)).window_runs, "nobody else is there to draft"
    assert Grower(sources=("prompt", Jacobi(switch="on"))).window_runs
    assert not Grower(sources=("prompt",)).window_runs


@pytest.mark.parametrize("rows", [1, 4, 8, 32])
def test_trials_last_as_many_passes_in_a_batch(rows: int) -> None:
    """A window has to fill before it brings anything, and every pass tells of it once a row."""
    paid, filled, ran = Paid(["jacobi"], resting=["jacobi"]), 0, []
    for _ in range(4000):
        ran.append(paid.runs("jacobi"))
        filled = filled + 1 if ran[-1] else 0
        for row in range(rows):
            hit = filled > 6
            draft = Draft(np.array([1, 2]), np.array([-1, 0]), source=np.array([0, JACOBI]))
            step = Step(
                row, draft, np.array([0, 1] if hit else [0]), np.array([2]), np.zeros((2, 1)), np.zeros((2, 1)),
                seconds=0.01, token_s=0.01 / rows, drafting=rows, frugal=True,
            )  # fmt: skip
            paid.observe(step, {"jacobi": 0.001 / rows}, {"jacobi": ran[-1]})
    assert share(ran[-1000:]) == 1.0


def window_ran(price: Callable[[int], float], rows: int, tokens: int, budget: Budget) -> list[bool]:
    """Return for every pass whether the window was to run in it, on a machine where n nodes take `price(n)`.

    What passes take is known from a drafter that brought many nodes before.
    """
    model, ids = tiny("llama"), torch.arange(3, 9).repeat(rows, 1)
    arguments: Any = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    plain = model.generate(ids, max_new_tokens=tokens, **arguments)
    answers = [row[ids.shape[1] :].tolist() for row in plain]
    la, ran = Lookahead(model, sources=(Silent(), OPTIONS), budget=budget), []
    assert isinstance(la.drafter, Grower)
    grower = la.drafter
    with Clock(price).of(model):
        Lookahead(model, drafter=Oracle(answers, VOCAB, error=0.3), budget=budget).generate(
            ids, max_new_tokens=min(tokens, 300), **arguments
        )
        hook = model.register_forward_pre_hook(lambda *_: ran.append(grower.window_runs))
        ours = la.generate(ids, max_new_tokens=tokens, **arguments)
        hook.remove()
    assert torch.equal(ours, plain)
    return ran[1:]  # without the prefill


BUDGETS: dict[str, Callable[[], Budget]] = {
    "auto": Budget,
    "eight": lambda: Budget.of(8),
    "few": lambda: Budget(most=4),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rows", [1, 8])
def test_the_window_runs_where_its_rows_are_free(rows: int, budget: str) -> None:
    """The model repeats itself, and nobody but the window notices."""
    ran = window_ran(lambda nodes: 0.01, rows, 900, BUDGETS[budget]())
    assert not ran[0], "it begins at rest"
    assert share(ran[-100:]) > 0.9


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rows", [1, 4])
def test_the_window_rests_where_rows_are_dear(rows: int, budget: str) -> None:
    ran = window_ran(lambda nodes: 0.01 * nodes, rows, 700, BUDGETS[budget]())
    assert share(ran) < 0.1
