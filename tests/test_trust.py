"""How far drafts can be believed: drafters that claim too much, too little, or the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_draft import drafts

from lookahead.draft import Draft
from lookahead.trust import Trust, UsualTrust

NEVER = 10**6  # a token that nobody drafts


def gains_of(trust: Trust, draft: Draft) -> NDArray[np.float64]:
    """Return [A]: what the acceptable nodes below the root are expected to bring, by falling claims."""
    expected = np.zeros(len(draft))
    count = trust.expect(draft, expected)
    return np.diff(expected)[:count]


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
            found.append(float(gains_of(trust, self.draft).sum()))
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
    assert float(gains_of(trust, drafter.draft)[0]) < 0.2


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


def test_nodes_that_come_late_are_believed_less_where_they_are_wrong() -> None:
    """A chain and siblings claim the same: the 24th node of a chain comes true far more often than that of siblings."""
    chain, trust = Draft.chain(range(1, 26), weight=0.9), Trust()
    wide = Draft(np.arange(25), np.array([-1] + [0] * 24), np.array([1.0, *0.9 ** np.arange(1, 25)]))
    for i in range(200):
        trust.observe(chain, np.array([*range(2, 26)] if i % 2 else [NEVER], np.int64))
        trust.observe(wide, np.array([1 + i % 3], np.int64))
    assert trust.chances(chain)[24] > 0.1
    assert trust.chances(wide)[24] < 0.01


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
    rises = np.diff(trust.chances(draft)[1:])
    assert (rises[np.diff(draft.weight[1:]) > 0.0] >= 0.0).all(), "of those that claim as much the first counts more"
    assert (trust.line[[3, 6]] <= 0.0).all()


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


# The claims that are needed


def taught(story: list[tuple[Draft, list[int]]], trust: Trust | None = None) -> Trust:
    """Return a trust that has seen a story."""
    trust = trust or Trust()
    for draft, tokens in story:
        trust.observe(draft, np.array(tokens, np.int64))
    return trust


TOP = 1.0 / (1.0 + np.exp(-6.0))  # claims are no more certain than that


def star(rank: int, claim: float) -> Draft:
    """Return nodes under the root of which the last one, of this claim, is so many nodes behind the first."""
    return Draft(np.arange(rank + 2), np.array([-1] + [0] * (rank + 1)), np.array([1.0] + [1.0] * rank + [claim]))


def ladder(rank: int, claim: float) -> Draft:
    """Return the same with the last node three levels below the root."""
    draft = star(rank - 1, 1.0)
    parents = [*draft.parents[: rank - 1], 0, rank - 1, rank] if rank > 1 else [-1, 0, 1]
    return Draft(np.arange(rank + 2), np.array(parents), np.array([1.0] * (rank + 1) + [claim]))


def chance(trust: Trust, claim: float, depth: int, rank: int) -> float:
    """Return the chance of a node of that claim, behind `rank` others, were those above it certain."""
    odds, late = np.clip(np.log(claim / (1.0 - claim)), -6.0, 6.0), np.log(1.0 + rank)
    slope, start, deeper, later, slope_under, start_under, later_under = trust.line
    z = slope * odds + start + deeper * np.log(depth) + later * late
    if depth == 1:
        z = slope_under * odds + start_under + later_under * late
    return float(1.0 / (1.0 + np.exp(-z)))


def brings(trust: Trust, rank: int, own: float) -> float:
    """Return what the node of that rank brings: nearer to its own chance than to what was usual there."""
    right, seen = trust.ranks[:, rank]
    return 0.75 * own + 0.25 * (right + 4.0 * own) / (seen + 4.0)


learnt = stories | st.builds(
    lambda claim, truth, count: [
        (draft, [*range(2, 2 + (4 if i % 10 < 10 * truth else 0)), 0]) for i, draft in enumerate(
            [Draft.chain([1, 2, 3, 4, 5], weight=claim)] * count)
    ],
    st.sampled_from([0.2, 0.7, 1.0]), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 40),
)  # fmt: skip


@settings(max_examples=200)
@given(learnt, st.integers(2, 6), st.floats(0.01, 0.99))
def test_what_a_node_brings_is_between_its_chance_and_the_usual(
    story: list[tuple[Draft, list[int]]], rank: int, claim: float
) -> None:
    """The naive twin, of which the claims below are judged, is what drafts are told."""
    trust, claim = taught(story), float(np.float32(claim))
    assert gains_of(trust, star(rank, claim))[rank] == pytest.approx(
        brings(trust, rank, chance(trust, claim, 1, rank)), abs=1e-4
    )
    deep, path = ladder(rank, claim), trust.chances(ladder(rank, claim))
    own = min(chance(trust, claim, 3, rank), float(path[deep.parents[-1]]))
    assert gains_of(trust, deep)[rank] == pytest.approx(brings(trust, rank, own), abs=1e-4)


@settings(max_examples=300)
@given(learnt, st.lists(st.floats(0, 1.2), min_size=1, max_size=8), st.booleans())
def test_claims_are_the_least_that_bring_the_gains(
    story: list[tuple[Draft, list[int]]], gains: list[float], rising: bool
) -> None:
    """Of nodes under the root or three levels below it: those of the claim bring the gain, and no others do."""
    trust = taught(story)
    wanted = np.array(sorted(gains) if rising else gains, np.float32)
    claims = trust.claims(wanted)
    assert claims.dtype == np.float32
    assert claims.shape == wanted.shape
    assert (np.diff(claims) >= 0.0).all(), "they rise"
    assert (claims >= 1.0 - TOP - 1e-6).all()
    assert (claims <= TOP + 1e-6).all()
    for rank, (claim, gain) in enumerate(zip(claims.astype(float), wanted.astype(float), strict=True)):
        found = max(brings(trust, rank, chance(trust, claim, depth, rank)) for depth in (1, 3))
        possible = brings(trust, rank, 1.0 - 1e-5)
        if claim < TOP - 1e-5 and gain < possible:
            assert found >= gain - 1e-3
        least, before = brings(trust, rank, 1e-5), claims[rank - 1] if rank else 0.0
        if claim > max(1.0 - TOP + 1e-5, before + 1e-5) and gain > least:
            assert found <= gain + 1e-3
            for draft in (star(rank, 0.9 * claim), ladder(rank, 0.9 * claim)) if rank > 1 else ():
                assert gains_of(trust, draft)[rank] <= gain + 1e-3


def test_before_anything_is_known_gains_are_claimed() -> None:
    gains = np.array([0.1, 0.5, 0.9], np.float32)
    assert Trust().claims(gains) == pytest.approx(gains, abs=1e-3)


@pytest.mark.parametrize("guided", [False, True])
def test_texts_under_a_grammar_hand_on_what_was_usual_of_the_ranks(guided: bool) -> None:
    """It counts for some drafts, and what a text began with is not taken in again with what it has shown."""
    usual, chain = UsualTrust(guided=guided), Draft.chain(range(1, 6), weight=0.5)
    for _ in range(40):
        text = usual.begin()
        for _ in range(3):
            text.observe(chain, np.array([2, 3, NEVER]))
    began = usual.begin()
    if not guided:
        assert not began.ranks.any()
        return
    right, seen = began.ranks[:, :5]
    assert (right[:4] / seen[:4]).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-9)
    assert seen[:4].tolist() == pytest.approx([16.0] * 4)
    assert seen[4] == 0.0
    first, second, third, _ = gains_of(began, chain)
    assert min(first, second) > 0.7
    assert third < 0.3
    for _ in range(200):
        began.observe(chain, np.array([2, 3, 4, 5]))
    assert gains_of(began, chain).min() > 0.8, "and is soon outvoted"


# Texts one after another


@settings(max_examples=60)
@given(st.lists(stories, max_size=5), st.sampled_from([0, 4, 20]))
def test_a_text_begins_with_what_was_usual_in_the_last_ones(
    texts: list[list[tuple[Draft, list[int]]]], more: int
) -> None:
    """The mean of the lines of the first eight, and then one that forgets; texts without drafts do not count."""
    usual, mean, count = UsualTrust(), Trust().line.copy(), 0
    same = [(Draft.chain([1, 2, 3], weight=0.9), [2, 3])] * 3
    for story in [*texts, *[same] * more]:
        trust = usual.begin()
        assert trust.drafts == 0
        assert trust.line == pytest.approx(mean, rel=1e-9, abs=1e-12)
        taught(story, trust)
        if trust.drafts:
            count += 1
            mean += (trust.line - mean) / min(count, 8)


def test_texts_do_not_change_each_other() -> None:
    """What a text learns is its own until the next one begins; and a text that still runs is left alone."""
    usual, alone = UsualTrust(), UsualTrust()
    story = [(Draft.chain([1, 2, 3], weight=0.9), [9])] * 30
    first, twin = taught(story, usual.begin()), taught(story, alone.begin())
    second, third = usual.begin(), usual.begin()
    assert second.line.tolist() == third.line.tolist() == pytest.approx(first.line.tolist())
    line = third.line.copy()
    taught(story, second)
    assert third.line.tolist() == line.tolist()
    taught([(Draft.chain([1, 2, 3], weight=0.1), [2, 3])] * 30, third)
    usual.begin()
    assert taught(story, first).line.tolist() == taught(story, twin).line.tolist()
    assert Trust().line.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
