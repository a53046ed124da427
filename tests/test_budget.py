"""How many nodes run: on a machine made of numbers, for any numbers, and that it never changes a text."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from clocks import Clock
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import Machine, Price, Row, lost, speedup, whys
from models import VOCAB, tiny
from test_draft import drafts

import lookahead
from lookahead import Budget, InvalidArgument, Jacobi, Lookahead, purse
from lookahead.budget import MAX_NODES
from lookahead.draft import Draft
from lookahead.purse import Choice, Spent
from lookahead.testing import Adversary
from lookahead.trace import WHY

PRICES: dict[str, Price] = {
    "flat": lambda nodes: 1.0,
    "mild": lambda nodes: 1.0 + 0.02 * (nodes - 1),
    "rising": lambda nodes: 1.0 + 0.1 * (nodes - 1),
    "a row is a pass": lambda nodes: 1.0 * nodes,
    "a jump at 2": lambda nodes: 1.0 if nodes == 1 else 2.0 + 0.01 * nodes,
}
LARGEST = 25  # nodes of the largest pass of a row's drafts
SCALES = [1.0, 1e-3]


def scaled(name: str, scale: float = 1.0) -> Price:
    return lambda nodes: scale * PRICES[name](nodes)


# As many as pay


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rows", [1, 4])
def test_with_a_flat_curve_all_useful_nodes_run(rows: int, scale: float) -> None:
    price = scaled("flat", scale)
    machine = Machine(Budget(), price, *[Row(0.9, 0.9)] * rows, asking=0.02 * scale)
    machine.run(100)
    ran = machine.run(400)
    assert np.mean([one.size == LARGEST for one in ran]) > 0.9
    assert speedup(ran, price) > 4.0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("chance", [0.3, 0.7, 0.9])
def test_with_a_steep_curve_no_node_runs(chance: float, scale: float) -> None:
    """Every node costs a pass of its own, and then nobody drafts at all, but for trials."""
    price = scaled("a row is a pass", scale)
    machine = Machine(Budget(), price, Row(chance, chance), asking=0.02 * scale)
    machine.run(300)
    ran = machine.run(1000)
    assert np.mean([one.size == 1 for one in ran]) > 0.98
    assert whys(ran)["rests"] > 500


@pytest.mark.parametrize(("name", "chance", "best"), [("rising", 0.5, 2), ("mild", 0.5, 4), ("mild", 0.9, 18)])
def test_in_between_nodes_run_whose_chance_is_worth_their_price(name: str, chance: float, best: int) -> None:
    """About as many as the best fixed number, which every node's own numbers give; and about as fast."""
    price, row = PRICES[name], Row(chance, chance)
    machine = Machine(Budget(), price, row)
    machine.run(150)
    ran = machine.run(600)
    tokens = 1.0 + np.concatenate([[0.0], np.cumsum(chance ** np.arange(1, row.nodes + 1))])
    rates = tokens / (np.array([price(n + 1) for n in range(row.nodes + 1)]) + machine.asking)
    assert abs(int(rates.argmax()) - best) <= 1, "the case is what its parameters say"
    assert 0.5 * best <= np.mean([one.choice.nodes for one in ran]) <= 1.6 * best
    assert speedup(ran, price) > 0.9 * rates.max()


@pytest.mark.parametrize("chance", [0.2, 0.4])
def test_a_jump_that_is_not_worth_taking_is_not_taken(chance: float) -> None:
    """One node doubles the pass, and two tokens a pass are more than these drafts give."""
    price = PRICES["a jump at 2"]
    machine = Machine(Budget(), price, Row(chance, chance))
    machine.run(300)
    assert np.mean([one.size == 1 for one in machine.run(700)]) > 0.9


def test_a_jump_that_is_worth_it_is_taken_with_all_that_comes_for_nothing() -> None:
    machine = Machine(Budget(), PRICES["a jump at 2"], Row(0.9, 0.9))
    machine.run(100)
    ran = machine.run(300)
    assert np.mean([one.size for one in ran]) > 15
    assert speedup(ran, PRICES["a jump at 2"]) > 2.5


# What finding out costs


@pytest.mark.parametrize("hiccups", [0.0, 0.02])
@pytest.mark.parametrize("name", PRICES)
@pytest.mark.parametrize("claim", [0.3, 0.9, 1.0])
def test_drafts_that_are_never_right_cost_next_to_nothing(claim: float, name: str, hiccups: float) -> None:
    """A part of the time, and a beginning: some passes over all that is drafted, until their price is known."""
    price = PRICES[name]
    machine = Machine(Budget(), price, Row(claim, 0.0), hiccups=hiccups)
    ran = machine.run(4000)
    assert lost(ran, price) < 0.015 * len(ran) * price(1) + 10 * (price(LARGEST) - price(1) + machine.asking)
    assert lost(ran[500:], price) < 0.015 * (len(ran) - 500) * price(1) + 2 * (price(LARGEST) - price(1))


@pytest.mark.parametrize("explore", [0.0, 0.005, 0.02])
def test_what_finding_out_may_cost_is_a_setting(explore: float) -> None:
    machine = Machine(Budget(explore=explore), PRICES["mild"], Row(0.9, 0.0))
    machine.run(500)
    ran = machine.run(6000)
    wasted = lost(ran, PRICES["mild"]) / len(ran)
    assert wasted < 1.5 * explore + 0.002
    assert any(one.asked for one in ran) == (explore > 0)


def test_many_short_texts_do_not_find_out_the_same_again() -> None:
    """Every call of `generate()` has a purse of its own; what they try is bounded together."""
    budget, price = Budget(), PRICES["mild"]
    Machine(budget, price, Row(0.9, 0.0)).run(500)
    ran = [one for seed in range(200) for one in Machine(budget, price, Row(0.9, 0.0), seed=seed).run(20)]
    assert lost(ran, price) < 0.02 * len(ran) * price(1)


@pytest.mark.parametrize("name", ["flat", "mild", "rising", "a jump at 2"])
def test_drafts_that_become_good_wake_it_up(name: str) -> None:
    row = Row(1.0, 0.0)
    machine = Machine(Budget(), PRICES[name], row)
    assert whys(machine.run(2000)[-500:])["rests"] > 250
    row.truth = 0.95
    machine.run(800)
    assert speedup(machine.run(300), PRICES[name]) > 1.5


@pytest.mark.parametrize("name", ["flat", "mild"])
def test_drafts_that_become_bad_send_it_to_rest(name: str) -> None:
    row = Row(0.9, 0.9)
    machine = Machine(Budget(), PRICES[name], row)
    machine.run(500)
    row.truth = 0.0
    machine.run(400)
    assert whys(machine.run(400))["rests"] > 200


@pytest.mark.parametrize("name", ["flat", "mild", "rising"])
def test_a_first_pass_that_is_far_too_slow_decides_nothing(name: str) -> None:
    usual, slow = (Machine(Budget(), PRICES[name], Row(0.8, 0.8), first=first) for first in (1.0, 200.0))
    for machine in (usual, slow):
        machine.run(100)
    speeds = [speedup(machine.run(300), PRICES[name]) for machine in (usual, slow)]
    assert speeds[1] > 0.9 * speeds[0]


def test_a_first_pass_that_brings_much_does_not_pay_for_hundreds() -> None:
    """Its seconds are not known before, and must not be taken for long ones."""
    price, row = scaled("mild", 1e-3), Row(0.9, 1.0)
    machine = Machine(Budget(), price, row, asking=1e-4)
    machine.run(1)
    row.truth = 0.0
    machine.run(100)
    assert whys(machine.run(200))["rests"] > 100


def test_a_machine_that_has_become_slower_is_followed() -> None:
    """Rows that were free are dear now."""
    machine = Machine(Budget(), PRICES["flat"], Row(0.5, 0.5))
    machine.run(300)
    machine.price = PRICES["a row is a pass"]
    machine.run(500)
    assert speedup(machine.run(300), machine.price) > 0.93


# Batches


def test_a_row_that_knows_much_runs_many_nodes_and_the_others_ride_along() -> None:
    """All rows run as many nodes as the largest: the poor ones do not keep the good one from it."""
    price = PRICES["mild"]
    sizes = {}
    for name, rows in {"both": [Row(0.9, 0.9), Row(0.1, 0.1)], "poor": [Row(0.1, 0.1), Row(0.1, 0.1)]}.items():
        machine = Machine(Budget(), price, *rows)
        machine.run(300)
        sizes[name] = np.mean([one.size for one in machine.run(300)])
    assert sizes["both"] > 2 * sizes["poor"]


def test_nodes_of_each_row_are_its_own_likeliest() -> None:
    machine = Machine(Budget(), PRICES["mild"], Row(0.9, 0.9), Row(0.1, 0.1))
    machine.run(300)
    machine.purse.prepare(2, 100)
    good, poor = Draft.chain(range(1, 20), weight=0.9), Draft.chain(range(1, 4), weight=0.1)
    choice, chosen = machine.purse.choose({0: good, 1: poor}, 2)
    assert len(chosen[0]) - 1 == choice.nodes > 3
    assert len(chosen[1]) - 1 == 2, "it has no more"
    assert 2.0 < choice.expected < 2.0 + choice.nodes + 2


def test_rows_that_have_ended_do_not_count() -> None:
    """One row alone pays for a pass; among four, its nodes would have to bring four times as much."""
    price = PRICES["rising"]
    rows = [Row(0.35, 0.35), *(Row(0.01, 0.0) for _ in range(3))]
    among = Machine(Budget(), price, *rows)
    among.run(400)
    assert np.mean([one.choice.nodes for one in among.run(200)]) < 0.3
    for row in rows[1:]:
        row.open = False
    among.run(800)
    ran = among.run(200)
    assert np.mean([one.choice.nodes for one in ran]) > 0.9
    assert all(list(one.tokens) == [0] for one in ran)
    assert speedup(ran, price) > 1.1


def test_other_batch_sizes_have_their_own_prices() -> None:
    """Rows are free for one text, and dear for eight of them."""
    budget, free, dear = Budget(), PRICES["flat"], PRICES["a row is a pass"]
    one, eight = Machine(budget, free, Row(0.8, 0.8)), Machine(budget, dear, *[Row(0.8, 0.8)] * 8)
    for _ in range(20):
        one.run(20)
        eight.run(20)
    assert np.mean([each.size for each in one.run(100)]) > 10
    assert np.mean([each.size for each in eight.run(100)]) < 2


def test_models_that_share_a_budget_have_their_own_prices() -> None:
    """A token of the one is worth a thousandth of a token of the other."""
    budget = Budget()
    small = Machine(budget, scaled("mild", 1e-3), Row(0.8, 0.8), asking=1e-5, model="small")
    large = Machine(budget, PRICES["mild"], Row(0.8, 0.8), model="large")
    for _ in range(200):
        small.run(1)
        large.run(1)
    worth = [np.mean([one.choice.token_s for one in machine.run(1)]) for machine in (small, large)]
    assert worth[1] == pytest.approx(1000 * worth[0], rel=0.5)


# Fixed numbers, and none


@pytest.mark.parametrize("nodes", [1, 7, 64])
@pytest.mark.parametrize("name", PRICES)
def test_a_fixed_number_is_always_drafted(name: str, nodes: int) -> None:
    machine = Machine(Budget.of(nodes), PRICES[name], Row(0.5, 0.0), Row(0.9, 0.9))
    ran = machine.run(100)
    assert {one.size for one in ran} == {min(nodes, 24) + 1}
    assert {one.asked for one in ran} == {2}
    assert whys(ran) == {"fixed": 100}
    assert not machine.purse.frugal
    assert machine.purse.floors is None


@pytest.mark.parametrize("budget", [Budget.of(0), Budget(most=0)], ids=["of", "most"])
def test_of_no_nodes_nothing_is_asked(budget: Budget) -> None:
    machine = Machine(budget, PRICES["mild"], Row(0.9, 0.9), Row(0.9, 0.9))
    ran = machine.run(50)
    assert {(one.size, one.asked, one.choice.nodes) for one in ran} == {(1, 0, 0)}


@pytest.mark.parametrize("most", [1, 4, 4096])
def test_no_more_than_most(most: int) -> None:
    machine = Machine(Budget(most=most), PRICES["flat"], Row(0.95, 0.95, nodes=60))
    machine.run(60)
    ran = machine.run(40)
    assert max(one.size for one in ran) == min(most, 60) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"most": -1}, "most=-1"),
        ({"most": MAX_NODES + 1}, "most=4097"),
        ({"most": True}, "most=True"),
        ({"most": 2.0}, "most=2.0"),
        ({"explore": -0.1}, "explore=-0.1"),
        ({"explore": 1.5}, "explore=1.5"),
        ({"explore": float("nan")}, "explore=nan"),
        ({"explore": "0.1"}, "explore='0.1'"),
    ],
)
def test_a_wrong_setting_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Budget(**arguments)


@pytest.mark.parametrize("nodes", [-1, MAX_NODES + 1, True, 2.0, "many"])
def test_a_wrong_number_of_nodes_is_named(nodes: Any) -> None:
    with pytest.raises(InvalidArgument, match="nodes="):
        Budget.of(nodes)


# Any numbers

times = st.one_of(st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e4]), st.floats(1e-6, 10.0))


@settings(max_examples=150)
@given(
    st.data(),
    st.sampled_from([0, 1, 3, 16, 64]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.integers(1, 25),
)
def test_for_any_times_and_drafts_it_chooses_what_there_is(
    data: st.DataObject, most: int, rows: int, explore: float, passes: int
) -> None:
    """Trees with probes, rows that end, clocks that stand still: no more nodes than given, and numbers that are."""
    purse, draw = Budget(most=most, explore=explore).begin(rows), data.draw
    for _ in range(passes):
        going = draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows).map(sorted))
        asked = [row for row in going if purse.asks(row)]
        if asked:
            purse.prepare(len(asked), draw(st.integers(0, 5000)))
        if purse.floors is not None:
            assert purse.floors.shape == (most + 1,)
            assert not np.isnan(purse.floors).any()
            assert (np.diff(purse.floors) >= -1e-6 * np.abs(purse.floors[1:])).all(), "they rise"
        given_drafts = {row: draw(drafts(twins=False)).cut(most) for row in asked}
        probed = {row: with_probes(draft, draw(st.integers(0, 5))) for row, draft in given_drafts.items()}
        choice, chosen = purse.choose(probed, len(going))
        assert 0 <= choice.nodes <= most
        assert choice.why in WHY
        assert np.isfinite([choice.expected, choice.token_s, choice.row_s]).all()
        assert choice.expected >= len(going) - 1e-6
        assert chosen.keys() == probed.keys()
        for row, draft in chosen.items():
            assert int(draft.probe.sum()) == int(probed[row].probe.sum())
            assert len(draft) <= 1 + choice.nodes + 2 * int(draft.probe.sum())
        size = max([1, *(len(draft) for draft in chosen.values())])
        asking_s = {row: draw(times) for row in asked}
        pass_s = draw(times)
        tokens = {row: draw(st.integers(0, 5)) for row in going}
        grown = sum(len(draft) - 1 for draft in probed.values()), sum(asking_s.values())
        step_s = pass_s + sum(asking_s.values())
        spent = Spent(size, draw(st.integers(0, 5000)), 0, pass_s, step_s, asking_s, grown, tokens, choice)
        purse.observe(spent, [(probed[row], np.zeros(tokens[row], np.int64)) for row in asked])


def with_probes(draft: Draft, count: int) -> Draft:
    """Add so many probes to the root."""
    return Draft(
        np.concatenate([draft.tokens, np.arange(100, 100 + count)]),
        np.concatenate([draft.parents, np.zeros(count, np.int32)]),
        np.concatenate([draft.weight, np.zeros(count)]),
        probe=np.arange(len(draft) + count) >= len(draft),
    )


def test_probes_are_paid_for_and_never_cut() -> None:
    """Seventeen rows are free and more are dear: a window that takes them leaves none for nodes."""
    row = Row(0.6, 0.6)
    machine = Machine(Budget(), lambda nodes: 1.0 + 0.9 * max(nodes - 17, 0), row)
    for row.nodes in (2, 6, 10, 16, 20, 24, 16):
        machine.run(60)
    draft, nodes = Draft.chain([1, 2, 3, 4], weight=0.6), {}
    for probes in (0, 8, 16):
        machine.purse.prepare(1, 100)
        choice, chosen = machine.purse.choose({0: with_probes(draft, probes)}, 1)
        assert int(chosen[0].probe.sum()) == probes
        nodes[probes] = choice.nodes
    assert nodes[0] == nodes[8] == 3
    assert nodes[16] <= 1


def test_the_row_with_the_most_probes_does_not_cut_the_others() -> None:
    """Windows of different rows run different numbers of probes."""
    machine = Machine(Budget(), PRICES["flat"], Row(0.9, 0.9), Row(0.9, 0.9))
    machine.run(300)
    machine.purse.prepare(2, 100)
    long, probed = Draft.chain(range(1, 22), weight=0.9), with_probes(Draft.chain([1, 2, 3], weight=0.9), 30)
    choice, chosen = machine.purse.choose({0: long, 1: probed}, 2)
    assert choice.why == "explores" or len(chosen[0]) == 21


# The first law

BUDGETS: list[dict[str, Any]] = [
    {},
    {"nodes": 0},
    {"nodes": 5},
    {"budget": Budget(most=3)},
    {"budget": Budget(most=0)},
    {"budget": Budget(explore=1.0)},
    {"budget": Budget(most=200, explore=0.3)},
]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("number", range(len(BUDGETS)))
def test_any_budget_gives_the_same_text(number: int, rows: int, sample: bool) -> None:
    """Whatever passes take, by a clock that jumps at random: only which nodes run changes."""
    model, random = tiny("llama"), np.random.default_rng(number)
    ids = torch.arange(3, 9).repeat(rows, 1) + torch.arange(rows)[:, None]
    given_arguments: Any = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": sample, "eos_token_id": 7,
        "temperature": 0.7 if sample else None,
    }  # fmt: skip

    def call(generate: Any) -> tuple[Any, Any]:
        torch.manual_seed(number)
        return generate(ids, **given_arguments), torch.get_rng_state()

    plain, state = call(model.generate)
    answers = [row[ids.shape[1] :].tolist() for row in plain]
    makers: list[dict[str, Any]] = [
        {"drafter": Adversary(answers, VOCAB, seed=number)},
        {"sources": ("prompt", "recycle", Jacobi(window=4, ngram=3, verify=4))},
    ]
    for maker in makers:
        la = Lookahead(model, **maker, **BUDGETS[number])
        with Clock(lambda nodes: float(random.choice([0.0, 1e-4, 1e-2, nodes * 1e-3, 5.0]))).of(model):
            for _ in range(3):
                ours, after = call(la.generate)
                assert torch.equal(ours, plain)
                assert torch.equal(after, state)


def test_what_ran_for_nothing_is_charged_to_those_that_drafted() -> None:
    """Drafts that cost no time to make, and nodes that do: where none is accepted, drafting does not pay."""
    purse = Budget().begin(2)
    for number in range(40):
        size, asking_s = (1, {}) if number < 8 else (33, {0: 0.0, 1: 0.0})
        purse.prepare(2, 100)
        seconds = 0.01 * (1 + 0.02 * (size - 1))
        choice = Choice(size - 1, "pays", 2.0)
        purse.observe(Spent(size, 100, 0, seconds, seconds, asking_s, (64, 0.0), {0: 1, 1: 1}, choice), [])
    assert not purse.trusts(0)
    assert not purse.trusts(1)


# -- whose it is ------------------------------------------------------------------------------------------------------


def test_a_model_has_one_budget_in_a_thread() -> None:
    model, other = tiny("llama"), tiny("qwen3")
    shared = Lookahead(model).budget
    assert Lookahead(model).budget is shared
    assert Lookahead(other).budget is not shared
    own = Budget(most=8)
    assert Lookahead(model, budget=own).budget is own
    assert Lookahead(model, nodes=4).budget is not shared
    assert Lookahead(model, drafter=Adversary([[]], VOCAB)).budget is not shared
    found: list[Budget] = []
    thread = threading.Thread(target=lambda: found.append(Lookahead(model).budget))
    thread.start()
    thread.join()
    assert found[0] is not shared


def test_a_budget_ends_with_its_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    gone = weakref.ref(Lookahead(model).budget)
    del model
    gc.collect()
    assert gone() is None


def test_what_is_learnt_is_known_to_the_next_lookahead() -> None:
    model = copy.deepcopy(tiny("llama"))
    ids = torch.arange(8, 20)[None]
    for _ in range(2):
        lookahead.generate(model, ids, max_new_tokens=12, do_sample=False)
    (curve,) = Budget.usual(model)._curves.values()
    assert curve.passes >= 2
    first = Lookahead(model)
    first.generate(ids, max_new_tokens=12, do_sample=False)
    assert first.last is not None
    assert first.last.passes[0].token_s > 0


def test_nodes_must_earn_more_than_they_cost_unless_a_grammar_is_sure() -> None:
    expected, seconds = np.array([1.0, 1.25]), np.array([1.0, 1.2])  # a quarter of a token for a fifth of a pass
    assert purse._best(expected, seconds, 0.0, 1.0, purse._GUIDED)[0] == 1
    assert purse._best(expected, seconds, 0.0, 1.0, purse._EARNS)[0] == 0


def test_what_drafting_takes_is_known_to_the_next_text() -> None:
    budget = Budget()
    assert budget.begin(1)._growing is budget.begin(1)._growing
    assert budget.begin(1)._growing is not budget.begin(2)._growing
