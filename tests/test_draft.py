"""Laws of `Draft`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead.draft import Draft
from lookahead.errors import InvalidDraft


@st.composite
def drafts(draw: st.DrawFn, root: int = 7, largest: int = 24, twins: bool = True) -> Draft:
    """Any tree under token `root`; tokens are few, so that equal siblings are common (none where not `twins`)."""
    size = draw(st.integers(1, largest))
    parents, tokens, weight, probe = [-1], [root], [1.0], [False]
    for i in range(1, size):
        parents.append(draw(st.integers(0, i - 1)))
        tokens.append(draw(st.integers(0, 3)) if twins else 10 + i)
        weight.append(draw(st.floats(0, 1, width=32)))
        probe.append(draw(st.booleans()) if twins else False)
    source = np.arange(size) % 5
    return Draft(np.array(tokens), np.array(parents), np.array(weight), source, np.array(probe))


def words(draft: Draft) -> set[tuple[Any, ...]]:
    """The paths of a tree, each as (token, probe) from the root down."""
    return {tuple((int(draft.tokens[i]), bool(draft.probe[i])) for i in draft.path(n)) for n in range(len(draft))}


def test_chain_has_no_branches() -> None:
    draft = Draft.chain([4, 5, 6], weight=0.5, source=2)
    assert draft.tokens.tolist() == [4, 5, 6]
    assert draft.parents.tolist() == [-1, 0, 1]
    assert draft.depth.tolist() == [0, 1, 2]
    assert draft.path(2) == [0, 1, 2]
    assert draft.weight.tolist() == [0.5] * 3
    assert draft.source.tolist() == [2] * 3


def test_root_proposes_nothing() -> None:
    assert len(Draft.root(9)) == 1
    assert Draft.root(9) == Draft.chain([9])


@given(drafts())
def test_ancestors_equal_naive(draft: Draft) -> None:
    expected = np.zeros((len(draft), len(draft)), bool)
    for i in range(len(draft)):
        node = i
        while node >= 0:
            expected[i, node] = True
            node = int(draft.parents[node])
    assert np.array_equal(draft.ancestors(), expected)


@given(drafts())
def test_depth_and_path_weight_follow_the_path(draft: Draft) -> None:
    for node, weight in enumerate(draft.path_weight()):
        path = draft.path(node)
        assert draft.depth[node] == len(path) - 1
        assert weight == pytest.approx(float(np.prod(draft.weight[path[1:]], dtype=np.float64)), rel=1e-5, abs=1e-30)


@given(drafts(), st.integers(0, 3))
def test_child_is_the_first_acceptable_one(draft: Draft, token: int) -> None:
    for node in range(len(draft)):
        fits = (draft.parents == node) & (draft.tokens == token) & ~draft.probe
        assert draft.child(node, token) == (int(np.flatnonzero(fits)[0]) if fits.any() else None)


@given(st.lists(drafts(), min_size=1, max_size=4))
def test_merge_keeps_every_path_once(parts: list[Draft]) -> None:
    merged = Draft.merge(parts)
    assert words(merged) == set().union(*(words(part) for part in parts))
    assert len(words(merged)) == len(merged)


@given(drafts())
def test_merge_keeps_the_larger_weight_and_its_source(draft: Draft) -> None:
    merged = Draft.merge([draft])
    alike: dict[tuple[Any, ...], list[int]] = {}
    for node in range(len(draft)):
        alike.setdefault(tuple((int(draft.tokens[i]), bool(draft.probe[i])) for i in draft.path(node)), []).append(node)
    for node in range(len(merged)):
        twins = alike[tuple((int(merged.tokens[i]), bool(merged.probe[i])) for i in merged.path(node))]
        best = max(twins, key=lambda n: draft.weight[n])
        assert (merged.weight[node], merged.source[node]) == (draft.weight[best], draft.source[best])


@given(drafts())
def test_deduplicate_is_merge_of_one(draft: Draft) -> None:
    if len(words(draft)) == len(draft):
        assert draft.deduplicate() is draft
    else:
        assert draft.deduplicate() == Draft.merge([draft])


@given(drafts(twins=False), st.integers(0, 24), st.one_of(st.none(), st.integers(0, 6)))
def test_cut_keeps_the_best_nodes_and_their_parents(draft: Draft, nodes: int, depth: int | None) -> None:
    short = draft.cut(nodes, depth=depth)
    limit = len(draft) if depth is None else depth
    allowed = [n for n in range(1, len(draft)) if draft.depth[n] <= limit]
    # Without twins the token names the node.
    kept = {int(np.flatnonzero(draft.tokens == token)[0]) for token in short.tokens[1:]}
    assert len(kept) == min(nodes, len(allowed))
    assert kept <= set(allowed)
    assert words(short) <= words(draft)
    weight = draft.path_weight()
    left = [weight[n] for n in allowed if n not in kept]
    assert not left or not kept or min(weight[n] for n in kept) >= max(left)


def test_cut_breaks_ties_by_order_and_keeps_columns() -> None:
    draft = Draft(np.array([1, 2, 3, 4]), np.array([-1, 0, 0, 1]), np.full(4, 0.5), np.array([0, 1, 2, 3]))
    short = draft.cut(2)
    assert (short.tokens.tolist(), short.parents.tolist(), short.source.tolist()) == ([1, 2, 3], [-1, 0, 0], [0, 1, 2])
    assert draft.cut(3) is draft
    assert len(draft.cut(0)) == len(draft.cut(9, depth=0)) == 1


@st.composite
def chances_of(draw: st.DrawFn, draft: Draft) -> Any:
    """Any chances of its nodes, of no node more than of its parent; few values, so that ties are common."""
    chances = [1.0]
    for node in range(1, len(draft)):
        own = draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
        chances.append(0.0 if draft.probe[node] else min(own, chances[draft.parents[node]]))
    return np.array(chances, np.float32)


def trimmed(draft: Draft, nodes: int, chances: Any) -> list[int]:
    """The nodes that stay: the likeliest acceptable ones, the earlier of equal ones, and the ancestors of probes."""
    useful = [n for n in range(1, len(draft)) if not draft.probe[n] and chances[n] > 0.0]
    kept = {0, *sorted(useful, key=lambda n: (-chances[n], n))[:nodes]}
    for node in range(1, len(draft)):
        if draft.probe[node]:
            kept |= set(draft.path(node))
    return sorted(kept)


@settings(max_examples=300)
@given(st.data(), drafts(), st.integers(0, 24))
def test_trim_equals_naive(data: st.DataObject, draft: Draft, nodes: int) -> None:
    chances = data.draw(chances_of(draft))
    short, kept = draft.trim(nodes, chances), trimmed(draft, nodes, chances)
    assert short.tokens.tolist() == draft.tokens[kept].tolist()
    assert short.parents.tolist() == [-1, *(kept.index(draft.parents[n]) for n in kept[1:])]
    for name in ("weight", "source", "probe", "depth"):
        assert getattr(short, name).tolist() == getattr(draft, name)[kept].tolist(), name
    assert short.depth.tolist() == [len(short.path(n)) - 1 for n in range(len(short))]


@given(st.data(), drafts(), st.integers(0, 24))
def test_trim_keeps_parents_and_probes_and_no_more_than_it_may(data: st.DataObject, draft: Draft, nodes: int) -> None:
    short = draft.trim(nodes, data.draw(chances_of(draft)))
    above_probes = {n for probe in np.flatnonzero(short.probe) for n in short.path(int(probe))}
    acceptable = [n for n in range(1, len(short)) if not short.probe[n] and n not in above_probes]
    assert len(acceptable) <= nodes
    assert int(short.probe.sum()) == int(draft.probe.sum())
    assert words(short) <= words(draft)
    assert not short.tokens.flags.writeable
    assert Draft(short.tokens, short.parents, short.weight, short.source, short.probe) == short, "it is sound"


def test_trim_of_known_trees() -> None:
    draft = Draft(np.array([1, 2, 3, 4]), np.array([-1, 0, 0, 1]), probe=np.array([False, False, True, False]))
    even = np.array([1, 0.5, 0, 0.5], np.float32)
    assert draft.trim(9, even) is draft
    assert draft.trim(1, even).tokens.tolist() == [1, 2, 3], "of equal ones the earlier, beside the probe"
    assert draft.trim(0, even).tokens.tolist() == [1, 3]
    assert draft.trim(9, np.array([1, 0.5, 0, 0], np.float32)).tokens.tolist() == [1, 2, 3], "what has no chance goes"
    below = Draft(np.array([1, 2, 3]), np.array([-1, 0, 1]), probe=np.array([False, False, True]))
    assert below.trim(0, np.array([1, 0.1, 0], np.float32)) is below, "a probe keeps what is above it"
    chain = Draft.chain([1, 2, 3])
    assert chain.trim(0, np.ones(3, np.float32)) == Draft.root(1)
    assert len(Draft.root(1).trim(0, np.ones(1, np.float32))) == 1


@given(drafts(twins=False), st.integers(0, 24))
def test_trim_by_path_weight_is_cut(draft: Draft, nodes: int) -> None:
    weight = draft.path_weight()
    useful = int(np.count_nonzero(weight[1:]))
    assert draft.trim(nodes, weight) == draft.cut(min(nodes, useful))


def chains(draft: Draft) -> list[list[int]]:
    """All chains from the root on that have no probe, the root alone among them."""
    paths = [draft.path(node) for node in range(len(draft))]
    return [path for path in paths if not draft.probe[path[1:]].any()]


def brings(draft: Draft, path: list[int]) -> float:
    """How many tokens of a chain are expected to be accepted."""
    return float(np.cumprod(draft.weight[path[1:]].astype(np.float64)).sum())


def assert_part(short: Draft, draft: Draft, kept: list[int]) -> None:
    """A draft is sound, and has the nodes `kept` of another, in order."""
    for name in ("tokens", "weight", "source", "probe", "depth"):
        column = getattr(short, name)
        assert column.tolist() == getattr(draft, name)[kept].tolist(), name
        assert column.dtype == getattr(draft, name).dtype
        assert not column.flags.writeable
    assert short.parents.dtype == np.int32
    assert not short.parents.flags.writeable
    again = Draft(short.tokens, short.parents, short.weight, short.source, short.probe)
    assert again == short, "it is sound"
    assert again.depth.tolist() == short.depth.tolist()


trees = drafts(twins=False) | drafts()


@settings(max_examples=300)
@given(trees)
def test_a_spine_is_the_chain_that_is_expected_to_bring_most(draft: Draft) -> None:
    spine = draft.spine()
    assert spine.parents.tolist() == [*range(-1, len(spine) - 1)]
    assert not spine.probe.any()
    most = max(brings(draft, path) for path in chains(draft))
    assert brings(spine, list(range(len(spine)))) == pytest.approx(most, rel=1e-9, abs=0.0)
    named = [tuple(getattr(spine, name).tolist()) for name in ("tokens", "weight", "source")]
    found = [
        path
        for path in chains(draft)
        if [tuple(getattr(draft, name)[path].tolist()) for name in ("tokens", "weight", "source")] == named
    ]
    assert found, "it is a chain of the tree"
    assert_part(spine, draft, found[0])


@settings(max_examples=300)
@given(trees, st.one_of(st.integers(0, 8), st.integers(10, 34)))
def test_a_spine_ends_behind_the_first_last_token(draft: Draft, last: int) -> None:
    whole, spine = draft.spine(), draft.spine(last)
    at = next((i for i, token in enumerate(whole.tokens) if token == last), len(whole) - 1)
    assert_part(spine, whole, list(range(at + 1)))
    if int(draft.tokens[0]) == last:
        assert spine == Draft.root(last)


@given(st.lists(st.floats(0, 1, width=32), max_size=8), st.integers(0, 9))
def test_the_spine_of_a_chain_is_itself(weights: list[float], last: int) -> None:
    """Weights of 0 too: nothing is left out that might be accepted."""
    size = len(weights) + 1
    chain = Draft(np.arange(size), np.arange(-1, size - 1), np.array([1.0, *weights]))
    assert chain.spine() is chain
    assert_part(chain.spine(last), chain, list(range(min(last + 1, size))))


def test_spines_of_known_trees() -> None:
    tokens, parents = np.array([7, 1, 2, 3, 4]), np.array([-1, 0, 0, 2, 3])
    long = Draft(tokens, parents, np.array([1.0, 0.9, 0.5, 0.9, 0.9]))
    assert long.spine().tokens.tolist() == [7, 2, 3, 4], "0.5 + 0.45 + 0.405 is more than 0.9"
    assert long.spine(3).tokens.tolist() == [7, 2, 3], "and is judged as if nothing was cut"
    probed = Draft(
        tokens, parents, np.array([1.0, 0.1, 0.9, 0.9, 0.9]), probe=np.array([False, False, True, *[False] * 2])
    )
    assert probed.spine().tokens.tolist() == [7, 1], "nothing below a probe is accepted"
    even = Draft(np.array([7, 1, 2]), np.array([-1, 0, 0]), np.array([1.0, 0.5, 0.5]))
    assert even.spine().tokens.tolist() == [7, 1], "of equal ones the earlier"
    assert len(Draft.root(7).spine(7)) == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": [], "parents": []}, "needs node 0"),
        ({"tokens": [1, 2], "parents": [-1]}, "parents has 1 entries"),
        ({"tokens": [1, 2], "parents": [-1, 1]}, "node 1 has parent 1"),
        ({"tokens": [1, 2], "parents": [-1, -1]}, "node 1 has parent -1"),
        ({"tokens": [1, 2], "parents": [0, 0]}, "node 0 has parent 0"),
        ({"tokens": [1, -2], "parents": [-1, 0]}, "node 1 holds the token -2"),
        ({"tokens": [1, 2], "parents": [-1, 0], "weight": [1.0, 1.5]}, "node 1 has weight 1.5"),
        ({"tokens": [1, 2], "parents": [-1, 0], "weight": [1.0, float("nan")]}, "node 1 has weight nan"),
        ({"tokens": [1, 2**40], "parents": [-1, 0]}, "whole numbers"),
        ({"tokens": [1, 2.5], "parents": [-1, 0]}, "whole numbers"),
        ({"tokens": [[1, 2]], "parents": [-1, 0]}, "one-dimensional"),
    ],
)
def test_a_broken_draft_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidDraft, match=message):
        Draft(**{name: np.array(value) for name, value in columns.items()})


def test_misuse_is_refused() -> None:
    with pytest.raises(InvalidDraft, match="at least one draft"):
        Draft.merge([])
    with pytest.raises(InvalidDraft, match="different ones"):
        Draft.merge([Draft.root(1), Draft.root(2)])
    with pytest.raises(InvalidDraft, match="nodes=-1"):
        Draft.root(1).cut(-1)
    with pytest.raises(InvalidDraft, match="depth=-2"):
        Draft.root(1).cut(3, depth=-2)


@settings(max_examples=20)
@given(drafts())
def test_a_draft_is_a_frozen_copy(draft: Draft) -> None:
    tokens = np.array(draft.tokens)
    copy = Draft(tokens, draft.parents)
    tokens[0] = 5
    assert copy.tokens[0] == 7
    with pytest.raises(ValueError, match="read-only"):
        copy.tokens[0] = 1
    assert copy != object()
