"""Laws of the grower: whatever the context, a sound draft; and it learns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookahead.draft import Draft
from lookahead.drafter import Drafter
from lookahead.errors import InvalidArgument
from lookahead.grow import SOURCES, Grower
from lookahead.sources.tree import ITEMS
from lookahead.trace import Step

VOCAB = 50
texts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=80)
few_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=120)
source_sets = st.sampled_from([("prompt",), ("recycle",), ("prompt", "recycle"), ()])


def array(tokens: Sequence[int]) -> Any:
    context = np.array(tokens, np.int32)
    context.flags.writeable = False
    return context


def require_sound(draft: Draft, root: int, budget: int, vocab: int = VOCAB) -> None:
    assert draft.tokens[0] == root
    assert len(draft) <= budget + 1
    assert len({(int(p), int(t)) for p, t in zip(draft.parents, draft.tokens, strict=True)}) == len(draft)
    assert draft.tokens.max() < vocab
    assert not draft.probe.any()


def step_of(draft: Draft, say: Callable[[list[int]], int], rng: np.random.Generator) -> Step:
    """Verify `draft` against a target that says `say(tokens so far)`, with random logits."""
    path, tokens = [0], []
    while True:
        tokens.append(say(tokens))
        child = draft.child(path[-1], tokens[-1])
        if child is None:
            break
        path.append(child)
    tops = np.array([rng.permutation(VOCAB)[:8] for _ in range(len(draft))], np.int32)
    logits = -np.sort(-rng.normal(size=(len(draft), 8)).astype(np.float32))
    return Step(0, draft, np.array(path, np.int32), np.array(tokens, np.int64), tops, logits)


def decode(row: Drafter, text: list[int], steps: int, budget: int, period: int = 7) -> tuple[list[Draft], list[int]]:
    """Run a target that repeats what stood `period` tokens before."""
    rng, drafts = np.random.default_rng(0), []
    for _ in range(steps):
        draft = row.propose(array(text), budget)
        step = step_of(draft, lambda new, old=text: (old + new)[-min(period, len(old) + len(new))], rng)
        row.observe(step)
        text = text + step.tokens.tolist()
        drafts.append(draft)
    return drafts, text


@given(st.one_of(texts, few_tokens), st.integers(0, 40), source_sets, st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_any_context_gives_a_sound_draft(text: list[int], budget: int, sources: Any, min_chance: float) -> None:
    grower = Grower(sources=sources, vocab_size=VOCAB, min_chance=min_chance)
    draft = grower.start(array(text)).propose(array(text), budget)
    require_sound(draft, text[-1], budget)
    assert (draft.path_weight()[1:] >= min_chance * 0.999).all()


@settings(max_examples=40)
@given(texts, source_sets, st.integers(1, 20))
def test_decoding_keeps_drafts_sound(text: list[int], sources: Any, budget: int) -> None:
    row = Grower(sources=sources, vocab_size=VOCAB, min_chance=0.0).start(array(text))
    for draft in decode(row, text, 6, budget)[0]:
        require_sound(draft, int(draft.tokens[0]), budget)


@settings(max_examples=60)
@given(st.lists(st.one_of(texts, few_tokens), min_size=1, max_size=6), st.integers(0, 12))
def test_a_context_may_be_replaced(contexts: list[list[int]], budget: int) -> None:
    row = Grower(vocab_size=VOCAB, min_chance=0.0).start(array(contexts[0]))
    for text in contexts:
        require_sound(row.propose(array(text), budget), text[-1], budget)


def test_a_replaced_context_is_drafted_like_a_new_one() -> None:
    text, other = [*range(40), 0, 1, 2], [*range(49, 10, -1), 49, 48]
    grower = Grower(sources=("prompt",), min_chance=0.0)
    row = grower.start(array(text))
    row.propose(array(text), 8)
    assert row.propose(array(other), 8) == grower.start(array(other)).propose(array(other), 8)


@pytest.mark.parametrize(
    "text",
    [[3], [3] * 5000, list(range(5000)), [1, 2] * 2500, [0] * 2000 + list(range(2000)), [2**31 - 1] * 50],
    ids=["one", "same", "distinct", "pair", "half", "largest"],
)
def test_adversarial_contexts(text: list[int]) -> None:
    row = Grower(min_chance=0.0).start(array(text))
    for budget in (0, 1, 64, 7):
        require_sound(row.propose(array(text), budget), text[-1], budget, vocab=2**31)


def test_a_budget_of_0_proposes_nothing() -> None:
    text = array([1, 2, 3] * 10)
    assert Grower().start(text).propose(text, 0) == Draft.root(3)


def test_an_empty_context_is_refused() -> None:
    row = Grower().start(array([]))
    with pytest.raises(InvalidArgument, match="at least one token"):
        row.propose(array([]), 4)
    require_sound(row.propose(array([5]), 4), 5, 4)


def test_the_grower_itself_proposes_too() -> None:
    text = array([1, 2, 3, 4, 1, 2, 3, 4, 1, 2])
    draft = Grower(min_chance=0.0).propose(text, 6)
    assert draft.child(0, 3) is not None


def test_tokens_outside_the_vocabulary_are_left_out() -> None:
    text = array([1, 2, 60, 3] * 10 + [1, 2])
    inside = Grower(vocab_size=VOCAB, min_chance=0.0).start(text).propose(text, 16)
    require_sound(inside, 2, 16)
    assert 60 in Grower(min_chance=0.0).start(text).propose(text, 16).tokens


@given(few_tokens, st.integers(1, 30))
def test_the_likeliest_nodes_are_taken(text: list[int], budget: int) -> None:
    grower = Grower(sources=("prompt",), vocab_size=VOCAB, min_chance=0.0)
    small = grower.start(array(text)).propose(array(text), budget)
    large = grower.start(array(text)).propose(array(text), 3 * budget)
    left_out = [weight for path, weight in chances(large).items() if path not in chances(small)]
    # What is left out is hardly likelier than the least of what is taken.
    assert max(left_out, default=0.0) <= min(chances(small).values()) / 0.7 + 1e-6
    assert (np.diff(large.path_weight()) <= 1e-6).all()


def chances(draft: Draft) -> dict[tuple[int, ...], float]:
    """The product of weights of every node, by its path."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(draft)):
        paths.append((*paths[draft.parents[node]], int(draft.tokens[node])))
    return dict(zip(paths, draft.path_weight().tolist(), strict=True))


@given(texts, st.integers(0, 3))
def test_same_calls_give_same_drafts(text: list[int], steps: int) -> None:
    runs = [decode(Grower(vocab_size=VOCAB).start(array(text)), text, steps, 12) for _ in range(2)]
    assert runs[0] == runs[1]


@settings(max_examples=40)
@given(texts, st.data())
def test_any_path_may_be_observed(text: list[int], data: st.DataObject) -> None:
    row = Grower(vocab_size=VOCAB, min_chance=0.0).start(array(text))
    for _ in range(4):
        draft = row.propose(array(text), 10)
        # As the engine may: cut, foreign nodes merged in, fewer tokens than nodes after a stop, no logits.
        ran = Draft.merge([draft.cut(data.draw(st.integers(0, 10))), Draft.chain([text[-1], 49, 48, 47])])
        path = ran.path(data.draw(st.integers(0, len(ran) - 1)))
        tokens = [int(ran.tokens[i]) for i in path[1:]] + [data.draw(st.integers(0, VOCAB - 1))]
        tokens = tokens[: data.draw(st.integers(1, len(tokens)))]
        width = data.draw(st.sampled_from([0, 1, 8, 20]))
        tops = np.zeros((len(ran), width), np.int32)
        logits = np.zeros((len(ran), width), np.float32)
        row.observe(Step(0, ran, np.array(path, np.int32), np.array(tokens, np.int64), tops, logits))
        text = text + tokens
    require_sound(row.propose(array(text), 10), text[-1], 10)


def test_observe_before_propose_is_harmless() -> None:
    text = array([1, 2, 3])
    row = Grower(vocab_size=VOCAB).start(text)
    row.observe(step_of(Draft.chain([3, 4, 5]), lambda new: 4 + len(new), np.random.default_rng(0)))
    require_sound(row.propose(text, 4), 3, 4)


def test_a_repetition_is_drafted_whole() -> None:
    row = Grower(sources=("prompt",)).start(array(range(100)))
    draft = row.propose(array([*range(100), 20, 21, 22, 23]), 16)
    assert draft.tokens[draft.path(len(draft) - 1)].tolist() == list(range(23, 40))


@pytest.mark.parametrize("sources", [("prompt",), ("prompt", "pool", "recycle")])
def test_a_copied_passage_is_drafted_from_the_first_pass(sources: tuple[str, ...]) -> None:
    """By the weights that are shipped: nothing has been learnt yet."""
    rng = np.random.default_rng(0)
    text, passage = rng.integers(0, 500, 300).tolist(), list(range(600, 640))
    context = array([*text, *passage, *text[:50], *passage[:6]])
    draft = Grower(sources=sources).start(context).propose(context, 12)
    path = max((draft.path(node) for node in range(len(draft))), key=len)
    assert draft.tokens[path].tolist() == passage[5 : 5 + len(path)]
    assert len(path) > 9
    assert draft.path_weight()[path[1]] > 0.5


def edit(grower: Grower, seed: int) -> float:
    """Return the tokens per pass of a text of 400 tokens written again with 7 renamed to 90 91."""
    rng = np.random.default_rng(seed)
    old = [int(t) if i % 9 else 7 for i, t in enumerate(rng.integers(10, 80, 400))]
    new = [t for token in old for t in ([90, 91] if token == 7 else [token])]
    row, at, passes = grower.start(array(old)), 0, 0
    while at < len(new):
        draft = row.propose(array(old + new[:at]), 32)
        step = step_of(draft, lambda said, rest=new[at:]: (rest + [0] * 40)[len(said)], rng)
        row.observe(step)
        at, passes = at + len(step.tokens), passes + 1
    return len(new) / passes


def test_an_edit_is_followed_through() -> None:
    """Drafts go on behind the new name, and soon foresee it: ten tokens stand between two of them."""
    grower = Grower(sources=("prompt",), min_chance=0.0)
    assert edit(grower, 0) > 6
    edit(grower, 1)
    assert edit(grower, 2) > 12


def test_recycled_logits_are_drafted() -> None:
    grower = Grower(sources=("recycle",), vocab_size=VOCAB)
    row = grower.start(array([1, 2]))
    draft = row.propose(array([1, 2]), 8)
    assert len(draft) == 1
    tops, logits = np.array([[30, 31]], np.int32), np.array([[5.0, 1.0]], np.float32)
    row.observe(Step(0, draft, np.array([0], np.int32), np.array([30], np.int64), tops, logits))
    other = grower.start(array([9, 2])).propose(array([9, 2]), 8)
    assert other.tokens.tolist()[:2] == [2, 30]
    assert other.source.tolist()[1] == SOURCES.index("recycle")
    pair = grower.start(array([1, 2])).propose(array([1, 2]), 8)
    assert pair.weight[1] > other.weight[1], "the pair of tokens says more than the last one"


def test_what_is_never_accepted_is_drafted_less() -> None:
    """A target that never repeats itself: in the end hardly a node is worth running."""
    grower, rng = Grower(sources=("prompt",), vocab_size=2000), np.random.default_rng(0)
    text = rng.integers(0, 50, 300).tolist()
    row, sizes = grower.start(array(text)), []
    for _ in range(150):
        draft = row.propose(array(text), 16)
        children = set(draft.tokens[draft.parents == 0].tolist())
        token = next(t for t in rng.permutation(2000).tolist() if t not in children)
        row.observe(step_of(draft, lambda new, t=token: t, rng))
        text.append(token)
        sizes.append(len(draft) - 1)
    assert np.mean(sizes[-50:]) < 0.5 * np.mean(sizes[:10])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": ("prompt", "pool?")}, "'pool\\?'.*prompt, recycle"),
        ({"sources": (3,)}, "sources has 3"),
        ({"sources": ("unknown",)}, "not known"),
        ({"min_chance": 1.5}, "min_chance=1.5"),
        ({"min_chance": float("nan")}, "min_chance=nan"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Grower(**arguments)


class Counting:
    """A source that knows that every token is followed by its successor."""

    def __init__(self) -> None:
        self.steps = 0

    def start(self, context: Any) -> int:
        return int(context[-1])

    def extend(self, cursor: int, token: int) -> int:
        assert token >= 0
        return token

    def successors(self, cursor: int) -> tuple[list[int], list[float]]:
        return [cursor + 1, cursor + 2], [0.9, 0.05]

    def observe(self, step: Step) -> None:
        self.steps += 1


@pytest.mark.parametrize("others", [(), ("prompt",), ("prompt", "recycle")])
def test_a_python_source_joins_in(others: tuple[str, ...]) -> None:
    source = Counting()
    row = Grower(sources=(*others, source), vocab_size=VOCAB).start(array([5]))
    draft = row.propose(array([5]), 12)
    require_sound(draft, 5, 12)
    node = draft.child(0, 6)
    assert node is not None
    assert draft.source[node] == len(SOURCES)
    assert draft.child(node, 7) is not None
    row.observe(step_of(draft, lambda new: 6 + len(new), np.random.default_rng(0)))
    assert source.steps == 1


@given(few_tokens, st.integers(0, 12))
def test_the_loop_with_python_sources_equals_the_kernel(text: list[int], budget: int) -> None:
    class Silent(Counting):
        def successors(self, cursor: int) -> tuple[list[int], list[float]]:
            return [], []

    plain = Grower(min_chance=0.0).start(array(text)).propose(array(text), budget)
    asked = Grower(sources=("prompt", "recycle", Silent()), min_chance=0.0).start(array(text))
    assert asked.propose(array(text), budget).tokens.tolist() == plain.tokens.tolist()


def test_a_crowd_of_successors_keeps_within_the_tree() -> None:
    class Crowd(Counting):
        def successors(self, cursor: int) -> tuple[list[int], list[float]]:
            return list(range(40)), [0.01] * 40

    text = array(range(100, 200))
    row = Grower(sources=("prompt", Crowd()), min_chance=0.0).start(text)
    for budget in (0, 1, 30):
        draft, tree = row.propose(text, budget), row._tree  # type: ignore[attr-defined]
        assert len(draft) == budget + 1
        assert tree.used[ITEMS] <= len(tree.items)


def test_too_many_python_sources_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="more than 4 objects"):
        Grower(sources=[Counting() for _ in range(5)])


def test_importing_the_grower_compiles_nothing_and_loads_no_torch() -> None:
    code = "import sys, lookahead.grow as g; assert 'torch' not in sys.modules; assert not g.grow.signatures"
    subprocess.run([sys.executable, "-c", code], check=True)
