"""When the window runs: by synthetic times, so that every decision is that of the numbers given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from models import tiny

from lookahead import Grower, Jacobi, Lookahead
from lookahead.sources.switch import BLOCK, CHEAP, LASTING, LEAST, TRIALS, Switch

PROBES = 59
TRIAL = 2 * TRIALS * BLOCK

Price = Callable[[int], float]


def flat(rows: int) -> float:
    return 1.0


def steep(rows: int) -> float:
    return 1.0 + 0.01 * rows


class Machine:
    """Passes over trees of any size, in a time that depends on their rows.

    Args:
        price: seconds of a pass by its rows.
        gain: tokens that the window adds to a pass.
        hiccup: chance of a pass that takes a hundred times as long.
    """

    def __init__(self, price: Price, gain: float, *, hiccup: float = 0.0, seed: int = 0, probes: int = PROBES) -> None:
        self.switch, self.price, self.gain, self.hiccup, self.probes = Switch(probes), price, gain, hiccup, probes
        self.random = np.random.default_rng(seed)

    def run(self, passes: int) -> list[bool]:
        """Return for every pass whether the window ran."""
        ran = []
        for _ in range(passes):
            ran.append(self.switch.on)
            rows = int(self.random.integers(1, 33)) + self.probes * ran[-1]
            tokens = 2.0 + self.gain * ran[-1] + self.random.uniform(-0.5, 0.5)
            seconds = self.price(rows) * (100 if self.random.random() < self.hiccup else 1)
            self.switch.observe(rows, seconds, int(tokens + self.random.random()))
        return ran


def share(ran: list[bool]) -> float:
    return sum(ran) / len(ran)


def test_nothing_is_tried_before_something_is_known():
    assert not any(Machine(flat, 5.0).run(LEAST + BLOCK))
    assert any(Machine(flat, 5.0).run(LEAST + BLOCK + 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("hiccup", [0.0, 0.02])
def test_where_rows_cost_nothing_a_gain_turns_it_on(seed: int, hiccup: float):
    machine = Machine(flat, 1.0, seed=seed, hiccup=hiccup)
    machine.run(LEAST + TRIAL)
    assert machine.switch.on
    assert all(machine.run(LASTING))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("hiccup", [0.0, 0.02])
def test_where_it_gains_nothing_it_stays_off(seed: int, hiccup: float):
    """Rows that cost a little, and no tokens for them."""
    machine = Machine(lambda rows: 1.0 + 0.001 * rows, -0.5, seed=seed, hiccup=hiccup)
    ran = machine.run(LEAST + TRIAL)
    assert sum(ran) == TRIALS * BLOCK
    assert not any(machine.run(LASTING))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("hiccup", [0.0, 0.02])
def test_where_rows_are_dear_it_is_never_tried(seed: int, hiccup: float):
    assert not any(Machine(steep, 5.0, seed=seed, hiccup=hiccup).run(1000))


def test_the_bound_of_the_price():
    """What counts is what the window adds to the time of a usual pass."""
    for part, tried in ((0.5 * CHEAP, True), (2 * CHEAP, False)):
        machine = Machine(lambda rows, cost=part / PROBES: 1.0 + cost * rows, 0.0)
        assert any(machine.run(LEAST + 2 * BLOCK)) == tried
    assert any(Machine(steep, 0.0, probes=1).run(LEAST + 2 * BLOCK)), (
        "a window of one row is cheap where one of 59 is not"
    )


class OneSize(Machine):
    """A machine whose trees are all of one size."""

    def run(self, passes: int) -> list[bool]:
        ran = []
        for _ in range(passes):
            ran.append(self.switch.on)
            rows = 20 + self.probes * ran[-1]
            self.switch.observe(rows, self.price(rows), 2 + int(self.gain * ran[-1]))
        return ran


def test_passes_that_are_all_of_one_size_need_a_peek():
    """One pass with the window shows the price; where it is dear, that was all for a long time."""
    assert sum(OneSize(steep, 5.0).run(LEAST + LASTING)) == 1
    machine = OneSize(flat, 1.0)
    machine.run(LEAST + 1 + TRIAL)
    assert machine.switch.on
    machine = OneSize(flat, 0.0)
    assert sum(machine.run(LEAST + 1 + TRIAL)) == 1 + TRIALS * BLOCK
    assert not any(machine.run(LASTING))


def test_rows_of_a_batch_make_one_pass():
    """Eight rows in a batch decide no sooner than one, and their tokens add up."""
    one, eight, ended = Switch(PROBES), Switch(PROBES), Switch(PROBES)
    for number in range(LEAST + TRIAL + 9):
        rows = 5 + number % 7
        one.observe(rows, 1.0, 8)
        for row in range(8):
            eight.observe(rows, 1.0, 1, row)
        for row in (3, 5):
            ended.observe(rows, 1.0, 1, row)
        assert one.on == eight.on == ended.on


def test_both_ways_are_tried_in_turns():
    machine = Machine(flat, 0.0)
    machine.run(LEAST)
    ran = machine.run(TRIAL)
    blocks = np.array(ran).reshape(2 * TRIALS, BLOCK)
    assert (blocks == blocks[:, :1]).all()
    assert blocks[:, 0].tolist() == [False, True] * TRIALS


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_what_was_found_is_tried_again_when_it_has_lasted(first: float):
    """A text that changes its kind: the other way wins the next trial."""
    machine = Machine(flat, first)
    machine.run(LEAST + TRIAL)
    assert machine.switch.on == (first > 0)
    machine.gain = -first
    assert share(machine.run(LASTING)) == (first > 0)
    retried = machine.run(TRIAL)
    assert share(retried) == 0.5
    assert retried[0] == (first > 0), "the trial begins with the way that it has"
    assert machine.switch.on == (first < 0)
    assert share(machine.run(LASTING)) == (first < 0)


def test_rows_that_have_become_dear_end_it():
    machine = Machine(flat, 0.5)
    machine.run(LEAST + TRIAL)
    assert machine.switch.on
    machine.price = steep
    machine.run(LASTING + TRIAL)
    assert not machine.switch.on
    assert not any(machine.run(5 * LASTING))


def test_one_hiccup_decides_nothing():
    """One pass of a hundred times the time, wherever it falls in the trial."""
    for at in range(LEAST, LEAST + TRIAL, 3):
        machine = Machine(flat, 1.0)
        machine.run(at)
        machine.price = lambda rows: 100.0
        machine.run(1)
        machine.price = flat
        machine.run(LEAST + TRIAL - at - 1)
        assert machine.switch.on


def test_the_grower_asks_its_switch():
    grower = Grower(sources=("prompt", Jacobi(window=4, ngram=3, verify=4)))
    assert grower.switch is not None
    assert not grower.window_runs
    grower.switch.on = True
    assert grower.window_runs
    assert not Grower(sources=("prompt",)).window_runs
    assert Grower(sources=("prompt", Jacobi(switch="on"))).window_runs


@pytest.mark.parametrize("rows", [1, 2])
def test_the_switch_is_told_of_every_pass(rows: int):
    """Rows of the whole pass, padding included, and the tokens of one row; both as they were, with the window and
    without it."""
    told: list[tuple[int, float, int, int]] = []

    def observe(self: Switch, *what: Any) -> None:
        told.append(what)
        self.on = len(told) % 8 >= 4

    la = Lookahead(tiny("llama"), sources=("prompt", Jacobi(window=4, ngram=3, verify=4)), nodes=6)
    ids = torch.tensor([[3, 4, 5, 3, 4], [7, 8, 9, 10, 11]])[:rows]
    with mock.patch.object(Switch, "observe", observe):
        la.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert la.last is not None
    wanted = [(one.nodes, new, row) for one in la.last.passes for row, new in enumerate(one.committed) if new > 0]
    assert [(size, tokens, row) for size, _, tokens, row in told] == wanted
    assert all(seconds > 0 for _, seconds, _, _ in told)
    assert min(size for size, *_ in told) <= 7 < max(size for size, *_ in told)
