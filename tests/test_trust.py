"""How far drafts can be believed: drafters that claim too much, too little, or the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_draft import drafts

from lookahead.draft import Draft
from lookahead.trust import Trust

NEVER = 10**6  # a token that nobody drafts


class Drafter:
    """Drafts chains whose nodes all claim the same, and are right with another chance."""

    def __init__(self, claim: float, truth: float, nodes: int, seed: int = 0) -> None:
        self.draft = Draft.chain(range(1, nodes + 2), weight=claim)
        self.truth, self.nodes, self.random = truth, nodes, np.random.default_rng(seed)

    def text(self) -> Any:
        """What followed the root: accepted nodes, then another token."""
        right = self.random.random(self.nodes) < self.truth
        accepted = self.nodes if right.all() else int(right.argmin())
        return np.array([*range(2, 2 + accepted), NEVER], np.int64)

    def run(self, trust: Trust, times: int) -> None:
        for _ in range(times):
            trust.observe(self.draft, self.text())

    def expected(self, trust: Trust, times: int = 1) -> float:
        """Return how many nodes are expected to be accepted, on average over `times` more drafts."""
        found = []
        for _ in range(times):
            found.append(float(trust.gains(self.draft).sum()))
            self.run(trust, 1)
        return float(np.mean(found))

    @property
    def accepted(self) -> float:
        """How many nodes are accepted on average."""
        return float(np.sum(self.truth ** np.arange(1, self.nodes + 1)))


@pytest.mark.parametrize("claim", [0.02, 0.2, 0.5, 0.8, 0.98])
def test_before_anything_is_known_claims_are_chances(claim: float) -> None:
    draft = Draft(np.arange(4), np.array([-1, 0, 0, 1]), np.array([1.0, claim, 0.3, 0.5]))
    assert Trust().chances(draft).tolist() == pytest.approx([1.0, claim, 0.3, 0.5 * claim], abs=0.01)


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("claim", [0.3, 0.9, 1.0])
def test_a_drafter_that_is_never_right_is_found_out(claim: float, nodes: int) -> None:
    """Within some hundred drafts nearly nothing is expected of it, however many nodes it drafts."""
    drafter, trust = Drafter(claim, 0.0, nodes), Trust()
    drafter.run(trust, 200)
    assert drafter.expected(trust) < 0.5
    assert float(trust.gains(drafter.draft)[0]) < 0.2


@pytest.mark.parametrize("nodes", [4, 16, 64])
@pytest.mark.parametrize(("claim", "truth"), [(1.0, 0.5), (0.9, 0.5), (1.0, 0.9), (0.5, 0.9), (0.3, 0.1)])
def test_claims_become_what_was_accepted(claim: float, truth: float, nodes: int) -> None:
    """Too high a claim is corrected, and too low a one."""
    drafter, trust = Drafter(claim, truth, nodes), Trust()
    drafter.run(trust, 100)
    assert drafter.expected(trust, 300) == pytest.approx(drafter.accepted, rel=0.4, abs=0.15)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9, 0.99])
def test_who_claims_the_truth_is_believed(chance: float) -> None:
    drafter, trust = Drafter(chance, chance, 32), Trust()
    assert drafter.expected(trust, 300) == pytest.approx(drafter.accepted, rel=0.25, abs=0.05)


def test_a_drafter_that_has_become_good_is_believed_again() -> None:
    bad, good, trust = Drafter(1.0, 0.0, 16), Drafter(1.0, 0.95, 16), Trust()
    bad.run(trust, 2000)
    good.run(trust, 100)
    assert good.expected(trust, 50) > 0.5 * good.accepted


def test_what_did_not_run_is_learnt_from_too() -> None:
    """What followed is known beyond what was accepted: `observe` gets tokens, not a path."""
    draft, trust = Draft.chain([1, 2, 3], weight=0.2), Trust()
    before = trust.chances(draft)
    for _ in range(50):
        trust.observe(draft, np.array([2, 3]))
    assert (trust.chances(draft)[1:] > 2 * before[1:]).all()


def test_nobody_knows_what_would_have_come_behind_the_last_token() -> None:
    """A text that ends early does not count against nodes beyond it."""
    chain, trust = Draft.chain([1, 2, 3, 4, 5], weight=0.8), Trust()
    before = trust.chances(chain)
    for _ in range(100):
        trust.observe(chain, np.array([2]))
    assert (trust.chances(chain) >= 0.9 * before).all()


stories = st.lists(
    st.tuples(drafts(), st.lists(st.integers(0, 3), max_size=6)),
    max_size=12,
)


@settings(max_examples=150)
@given(stories, drafts())
def test_chances_are_chances(story: list[tuple[Draft, list[int]]], draft: Draft) -> None:
    """Whatever came before: in [0, 1], of no node more than of its parent, and none for what is never accepted."""
    trust = Trust()
    for each, tokens in story:
        trust.observe(each, np.array(tokens, np.int64))
    chances = trust.chances(draft)
    assert chances.shape == (len(draft),)
    assert np.isfinite(chances).all()
    assert chances[0] == 1.0
    for node in range(1, len(draft)):
        assert 0.0 <= chances[node] <= chances[draft.parents[node]]
        assert not draft.probe[node] or chances[node] == 0.0
        assert draft.weight[node] > 0.0 or chances[node] == 0.0


@settings(max_examples=50)
@given(stories, st.lists(st.floats(0.01, 0.99), min_size=2, max_size=10))
def test_siblings_keep_their_order(story: list[tuple[Draft, list[int]]], claims: list[float]) -> None:
    trust, n = Trust(), len(claims)
    for each, tokens in story:
        trust.observe(each, np.array(tokens, np.int64))
    draft = Draft(np.arange(n + 1), np.array([-1] + [0] * n), np.array([1.0, *sorted(claims)]))
    assert (np.diff(trust.chances(draft)[1:]) >= 0.0).all()


@pytest.mark.parametrize("seed", range(3))
def test_no_story_makes_it_lose_its_way(seed: int) -> None:
    """Long runs of one kind after another: chances stay numbers, and it comes back to what is true."""
    random, trust = np.random.default_rng(seed), Trust()
    for _ in range(30):
        nodes = int(random.integers(1, 65))
        Drafter(random.choice([0.01, 0.5, 1.0]), random.choice([0.0, 0.5, 1.0]), nodes, seed).run(trust, 50)
    last = Drafter(0.8, 0.8, 16, seed)
    last.run(trust, 200)
    assert last.expected(trust, 100) == pytest.approx(last.accepted, rel=0.35)
