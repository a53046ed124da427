"""Laws of drafts for a serving engine's batch: rows are known by what stands in them, and drafts keep to limits."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lookahead.chains import MOST, Chains
from lookahead.errors import InvalidArgument, PoolError
from lookahead.grow import Grower
from lookahead.integrations.vllm import LookaheadDrafter, settings_of
from lookahead.later import Later
from lookahead.pool.pool import Pool
from lookahead.sources.chain import COPIED
from lookahead.sources.growth import HOPELESS
from lookahead.sources.mixer import fresh_weights
from lookahead.texts import KEPT, Rows
from lookahead.trace import Step
from lookahead.worth import Worth

LONGEST = 256
words = st.integers(0, 4)
PAIRS = [0, 0, 1, 1, 0]  # of two tokens; behind it nothing is named by how often it stood alone, as trees have it


class Engine:
    """Requests in the rows of an engine, with tokens that are known beforehand."""

    def __init__(self, drafting: Any) -> None:
        self.drafting = drafting
        self.texts: dict[int, list[int]] = {}

    def step(self, grown: dict[int, list[int]], rows: list[int], longest: int = LONGEST) -> list[list[int]]:
        """Add tokens to requests, and draft for `rows`, which are names of requests in the order of the batch."""
        tokens, new = np.full((len(rows) + 1, longest), -1, np.int32), []
        for row, name in enumerate(rows):
            self.texts.setdefault(name, []).extend(grown.get(name, []))
            tokens[row, : len(self.texts[name])] = self.texts[name]
            new.append(len(grown.get(name, [])))
        lengths = np.array([len(self.texts[name]) for name in rows] + [7])
        return self.drafting.propose(tokens, lengths, new)  # type: ignore[no-any-return]


stories = st.lists(
    st.tuples(
        st.permutations(range(5)),  # the order of the rows
        st.lists(st.booleans(), min_size=5, max_size=5),  # which requests are there
        st.lists(st.lists(words, min_size=1, max_size=4), min_size=5, max_size=5),  # what they write
    ),
    min_size=1,
    max_size=12,
)


@given(st.lists(st.lists(words, min_size=1, max_size=12), min_size=5, max_size=5), stories)
@settings(max_examples=60)
def test_every_row_is_known_again(prompts: list[list[int]], story: Any) -> None:
    chains = Chains(4)
    engine = Engine(chains)
    engine.texts = {name: [9, name, *prompt] for name, prompt in enumerate(prompts)}
    begun: set[int] = set()
    for order, there, grown in story:
        rows = [name for name in order if there[name]]
        engine.step({name: grown[name] for name in rows}, rows)
        known = chains._rows
        assert len(set(known.owner.tolist())) == len(rows)
        for text, name in zip(known.owner.tolist(), rows, strict=True):
            index = known.indexes[text].index
            assert known.arrays.table[text]["seen"] == index.used[0] == len(engine.texts[name])
            assert index.tokens[: index.used[0]].tolist() == engine.texts[name]
        begun |= set(rows)
        assert len(known.indexes) == len(begun), "a request that was put off is the same one when it comes back"


def test_texts_that_have_left_are_forgotten_in_the_end() -> None:
    chains = Chains(2)
    engine = Engine(chains)
    for name in range(KEPT + 20):
        engine.step({name: [name, name + 1, 5, name]}, [name])
    assert len(chains._rows.indexes) == KEPT + 1
    engine.step({0: [3]}, [0])  # begins anew, in a place that was free
    assert len(chains._rows.indexes) == KEPT + 1


def test_requests_with_one_prompt_are_told_apart() -> None:
    chains = Chains(2)
    engine = Engine(chains)
    for token in range(3):
        engine.step({name: [1, 2, 3] if not token else [token] for name in range(4)}, [0, 1, 2, 3])
    engine.step({name: [name] for name in range(4)}, [3, 1, 0, 2])
    engine.step({name: [7] for name in range(4)}, [0, 2, 1, 3])
    for text, name in zip(chains._rows.owner.tolist(), [0, 2, 1, 3], strict=True):
        assert chains._rows.indexes[text].index.tokens[: len(engine.texts[name])].tolist() == engine.texts[name]


@given(st.lists(st.integers(0, 1), max_size=40), st.integers(1, 6))
def test_a_chain_is_the_likeliest_path_of_the_tree(more: list[int], most: int) -> None:
    text = [*PAIRS, *more]
    (chain,) = Chains(most, min_chance=1e-6).propose(np.array([text + [0] * 20], np.int32), np.array([len(text)]), [1])
    tree = Grower(sources="prompt", min_chance=0.0).start(np.array(text[:-1], np.int32))
    draft = tree.propose(np.array(text, np.int32), 400)
    node = 0
    for token in chain:
        children = [i for i in range(1, len(draft)) if draft.parents[i] == node]
        assert children
        best = max(float(draft.weight[i]) for i in children)
        node = next(i for i in children if draft.tokens[i] == token)
        assert float(draft.weight[node]) == pytest.approx(best, rel=1e-4)


@given(st.lists(st.integers(0, 1), min_size=2, max_size=24))
def test_what_is_learnt_equals_what_the_grower_learns(more: list[int]) -> None:
    """Of one token a step; the grower asks again what it was asked, lessons are kept."""
    text = [*PAIRS, *more]
    chains, grower = Chains(1, min_chance=1e-6), Grower(sources="prompt", min_chance=0.0)
    rows, row = np.array([text + [0] * 8], np.int32), grower.start(np.array(text[: len(PAIRS) - 1], np.int32))
    for length in range(len(PAIRS), len(text) + 1):
        chains.propose(rows, np.array([length]), [1])
        if length == len(text):
            break
        context = rows[0, :length]
        everything = Grower(sources="prompt", min_chance=0.0)
        everything.weights = grower.weights
        seen = everything.start(context[: len(PAIRS) - 1]).propose(context, 400)
        there = (seen.parents == 0) & (seen.tokens == text[length])
        assume(not there.any() or float(seen.weight[there][0]) > 2 * HOPELESS)  # lessons leave out what is hopeless
        draft = row.propose(context, 1)
        none = np.zeros((len(draft), 0), np.int32)
        row.observe(Step(0, draft, np.zeros(1, np.int32), np.array(text[length : length + 1]), none, none.astype("f4")))
    for ours, theirs, start in zip(chains._tools.weights, grower.weights, fresh_weights(), strict=True):
        moved = float(np.linalg.norm(theirs - start))
        assert float(np.linalg.norm(ours - theirs)) <= 0.1 * moved


@given(st.lists(words, min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 8), st.integers(1, 6))
def test_drafts_keep_to_the_limits(text: list[int], most: int, room: int, vocab_size: int) -> None:
    rows = np.array([(text * 3)[:60] + [0] * room, (text * 3)[:60] + [1] * room], np.int32)
    length = rows.shape[1] - room
    first, second = Chains(most, vocab_size=vocab_size).propose(rows, np.full(2, length), [1, 0])
    assert len(first) <= min(most, max(room - 1, 0))
    assert all(0 <= token < vocab_size for token in first)
    assert second == [], "nothing was generated: the prompt is not read to its end"


def test_no_rows() -> None:
    assert Chains(2).propose(np.zeros((4, 8), np.int32), np.zeros(4, np.int64), []) == []


def test_a_long_copy_is_drafted_to_its_end() -> None:
    chains = Chains(16)
    engine = Engine(chains)
    text = [int(token) for token in np.random.default_rng(0).integers(10, 500, 100)]
    (draft,) = engine.step({0: [*text, *text[:24]]}, [0])
    at, said = 24, []
    for _ in range(4):
        right = len(draft)
        assert draft == text[at : at + right]
        new = text[at : at + right + 1]
        at += len(new)
        said.append(right)
        (draft,) = engine.step({0: new}, [0])
    assert said[-1] == 16


def test_others_draft_from_what_a_request_is_writing() -> None:
    story = [int(token) for token in np.random.default_rng(1).integers(10, 500, 120)]
    chains = Chains(8)
    engine = Engine(chains)
    for at in range(0, 100, 4):  # the first one is far ahead
        engine.step({0: story[at : at + 4]}, [0])
    right = 0
    for at in range(0, 60, 4):
        drafts = engine.step({1: [1, 2, 3, *story[:4]] if at == 0 else story[at : at + 4], 0: [9]}, [0, 1])
        right += sum(a == b for a, b in zip(drafts[1], story[at + 4 :], strict=False))
    assert right > 60


def test_outputs_are_added_to_the_pool_when_requests_leave(tmp_path: Path) -> None:
    chains = Chains(4, pool=tmp_path / "pool")
    engine = Engine(chains)
    engine.texts = {0: [*range(40)], 1: [77, 78]}
    engine.step({0: [50, 51], 1: [79]}, [0, 1])
    engine.step({0: [52, 53], 1: [80]}, [0, 1])
    engine.step({1: [81]}, [1])
    chains.close()
    pool = Pool.open(tmp_path / "pool", read_only=True)
    assert pool.documents == 2
    assert pool.longest_match([*range(10, 40), 50, 51, 52]) == 32
    assert pool.successors([79, 80]) == {81: 1}
    assert pool.tokens == 32 + 4 + 2 + 3, "the last 32 tokens of the prompt, and what was generated"


def test_outputs_are_written_while_there_are_steps_and_after_the_last_one(tmp_path: Path) -> None:
    """A server may be killed, and it asks for no drafts when nobody asks it."""
    chains = Chains(4, pool=tmp_path / "pool", write_s=1000.0)
    engine = Engine(chains)
    reader = Pool.open(tmp_path / "pool", read_only=True)
    engine.step({0: [1, 2, 3]}, [0])
    engine.step({1: [4, 5]}, [1])
    assert chains.write(), "there was a step of late: it is to be done again"
    assert reader.successors([2]) == {3: 1}
    assert reader.longest_match([4]) == 0
    chains._writing.seconds = 0.0
    assert not chains.write()
    assert reader.successors([4]) == {5: 1}
    engine.step({1: [6]}, [1])
    chains.close()
    assert reader.successors([5]) == {6: 1}
    assert reader.documents == 3, "nothing twice"


def test_writing_needs_nobody_to_ask(tmp_path: Path) -> None:
    done = Event()
    chains = Chains(4, pool=tmp_path / "pool", write_s=0.0)
    real = chains._memory.flush
    chains._memory.flush = lambda: (real(), done.set())  # type: ignore[method-assign, assignment, return-value]
    Engine(chains).step({0: [1, 2, 3]}, [0])
    assert done.wait(60.0)
    assert Pool.open(tmp_path / "pool", read_only=True).documents == 1
    chains.close()


def test_what_is_asked_for_is_done_once_and_again_where_it_says_so() -> None:
    turns, gate, done = [True, True, False], Event(), Event()

    def act() -> bool:
        gate.wait(60.0)
        again = turns.pop(0)
        if not turns:
            done.set()
        return again

    later = Later(0.0, act)
    later.ask()
    gate.set()
    assert done.wait(60.0)
    later.stop()
    later.ask()
    assert turns == []


def test_a_pool_that_cannot_be_written_costs_no_drafts(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    chains = Chains(4, pool=pool, write_s=1000.0)
    engine = Engine(chains)
    engine.step({0: [1, 2, 3]}, [0])
    pool.close()
    engine.step({1: [4, 5, 4]}, [1])
    (draft,) = engine.step({1: [5]}, [1])
    assert draft[:1] == [4]
    with pytest.raises(PoolError, match="is closed"):
        chains.close()


def test_a_request_that_comes_back_is_not_added_twice() -> None:
    pool = Pool()
    engine = Engine(Chains(4, pool=pool))
    engine.step({0: [1, 2, 3]}, [0])
    engine.step({1: [4, 4]}, [1])
    engine.step({0: [5], 1: [6]}, [0, 1])
    engine.step({2: [8, 8]}, [2])
    assert pool.successors([3]) == {5: 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"most": 0}, f"most=0; give a whole number of drafted tokens from 1 to {MOST}"),
        ({"most": True}, "most=True"),
        ({"most": 4, "min_chance": 0}, "min_chance=0; give a chance above 0"),
        ({"most": 4, "min_chance": 1.5}, "min_chance=1.5"),
        ({"most": 4, "remember": "some"}, "remember='some'"),
        ({"most": 4, "pool": 3}, "pool has a int"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Chains(**arguments)


def test_a_request_that_goes_on_with_anothers_text_has_a_text_of_its_own() -> None:
    chains = Chains(2)
    engine = Engine(chains)
    engine.step({0: [1, 2, 3]}, [0])
    engine.step({0: [4], 1: [1, 2, 3, 9, 9]}, [0, 1])
    first, second = chains._rows.owner.tolist()
    assert first != second
    engine.step({1: [8], 2: [1, 2, 3, 4, 7]}, [1, 2])
    assert chains._rows.owner.tolist() == [second, first], "and may take over that of one that has left"


def test_what_a_pool_gets_is_read_anew() -> None:
    """Where a text stood among others it does not stand now."""
    pool = Pool()
    chains = Chains(1, pool=pool, remember=None)
    engine = Engine(chains)
    pool.add([3, 4])
    pool.compact()
    engine.step({0: [5, 60]}, [0])
    for first in range(40, 80):
        pool.add([first, 1, 100 + first])
    pool.compact()  # as many runs as before, but another one
    chains._looked = -1000
    assert engine.step({0: [1]}, [0]) == [[160]]


# How many are worth running.


def taught(curve: Any, *, accepted: float, rounds: int = 200) -> Worth:
    """Return what was told of steps of `curve(rows + drafted)` seconds that accepted a part of what was drafted."""
    worth, chances = Worth(slope=0.02), np.full((8, 4), 0.9, np.float32)
    for _ in range(rounds):
        drafted = int(worth.cut(chances, np.full(8, 4, np.int32), rows=8).sum()) if worth.drafts else 0
        tokens = 8 + round(drafted * accepted)
        worth.observe(rows=8, drafted=drafted, tokens=tokens, seconds=curve(8 + drafted), drafting_s=1e-4)
    return worth


def test_all_run_where_rows_cost_nothing() -> None:
    worth = taught(lambda rows: 0.01, accepted=0.8)
    assert worth.drafts
    assert worth.cut(np.full((8, 4), 0.5, np.float32), np.full(8, 4, np.int32), rows=8).tolist() == [4] * 8


def test_none_run_where_a_row_costs_what_a_token_does() -> None:
    worth = taught(lambda rows: 0.001 * rows, accepted=0.8)
    assert worth.cut(np.full((8, 4), 0.5, np.float32), np.full(8, 4, np.int32), rows=8).sum() == 0


def test_drafting_rests_where_nothing_is_accepted() -> None:
    asked, worth = [], taught(lambda rows: 0.002, accepted=0.0)
    for _ in range(400):
        asked.append(worth.drafts)
        worth.observe(rows=8, drafted=0, tokens=8, seconds=0.002, drafting_s=1e-4 * worth.drafts)
    assert sum(asked) < 100


@given(
    st.lists(st.lists(st.floats(0.01, 1.0), max_size=5), min_size=1, max_size=6),
    st.floats(0.0, 0.2),
)
def test_the_likeliest_prefix_runs(chances: list[list[float]], slope: float) -> None:
    falling = [np.minimum.accumulate(row) if row else np.zeros(0) for row in chances]
    table, size = np.zeros((len(chances), 5), np.float32), np.array([len(row) for row in chances], np.int32)
    for row, some in zip(table, falling, strict=True):
        row[: len(some)] = some
    kept = Worth(slope=slope).cut(table, size, rows=len(chances))
    assert ((kept >= 0) & (kept <= size)).all()
    runs = [float(c) for row, n in zip(table, kept, strict=True) for c in row[:n]]
    rests = [float(c) for row, n, m in zip(table, kept, size, strict=True) for c in row[n:m]]
    assert not runs or not rests or min(runs) > max(rests)
    if slope == 0.0:
        assert not rests


# The class that vLLM loads, without vLLM.


def config(**settings: Any) -> Any:
    return SimpleNamespace(
        additional_config={"lookahead": settings} if settings else {},
        speculative_config=SimpleNamespace(num_speculative_tokens=4),
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(skip_tokenizer_init=True, get_vocab_size=lambda: 100),
    )


def test_vllm_asks_with_rows_of_a_larger_table() -> None:
    drafter = LookaheadDrafter(config(budget="all"))
    drafter.load_model()
    tokens = np.zeros((8, 64), np.int32)
    tokens[0, :7] = 1, 2, 3, 4, 1, 2, 3
    tokens[1, :3] = 5, 6, 5
    drafts = drafter.propose([[3], []], np.array([7, 3, 0, 0]), tokens, slot_mappings=None)
    assert drafts[0][:1] == [4]
    assert drafts[1] == []


def test_one_worker_writes_the_pool_and_the_others_read_it(tmp_path: Path) -> None:
    first, second = (LookaheadDrafter(config(pool=str(tmp_path / "pool"))) for _ in range(2))
    story = list(range(20, 60))
    tokens = np.zeros((2, 64), np.int32)
    tokens[0, :40] = story
    first.propose([[59]], np.array([40]), tokens)
    tokens[1, :2] = 1, 2
    first.propose([[2]], np.array([2]), tokens[1:])
    first._chains._memory.pools[0].flush()
    other = np.zeros((1, 64), np.int32)
    other[0, :34] = story[:34]
    (draft,) = second.propose([[53]], np.array([34]), other)
    assert [story[33], *draft][: len(draft) + 1] == story[33 : 34 + len(draft)]
    first.close()
    second.close()
    with pytest.raises(PoolError, match="closed"):
        first._chains._memory.pools[0].add([1, 2])


def test_others_of_the_pools_are_read(tmp_path: Path) -> None:
    with Pool(tmp_path / "code") as code:
        code.add([*range(40, 60)] * 2)
    drafter = LookaheadDrafter(config(pool=[str(tmp_path / "own"), str(tmp_path / "code")], budget="all"))
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, :3] = 41, 42, 43
    assert drafter.propose([[43]], np.array([3]), tokens) == [[44, 45, 46, 47]]
    drafter.close()
    assert Pool.open(tmp_path / "code").documents == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"lookahead": {"pol": "x"}},
            "additional_config has lookahead.pol; there are pool, remember, min_chance, budget",
        ),
        ({"lookahead": "x"}, "additional_config has lookahead='x'; give an object"),
        ({"lookahead": {"budget": 3}}, 'lookahead.budget=3; give "auto" or "all"'),
    ],
)
def test_bad_settings(given: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings_of(given)


def test_settings_of_nothing() -> None:
    assert settings_of({}) == settings_of(object()) == settings_of({"other": 1})


def test_rows_forget_only_what_has_left() -> None:
    rows = Rows(3)
    tokens = np.tile(np.arange(8, dtype=np.int32), (3, 1)) + np.array([[0], [20], [40]], np.int32)
    assert rows.recognise(tokens, np.full(3, 4), np.ones(3, np.int64)) == (3, [])
    rows.forget()
    assert len(rows.running()) == 3


def test_nobody_is_asked_where_copies_have_always_gone_on() -> None:
    chains = Chains(16)
    chains._tools.weights.trials[:] = 999.0, 1000.0
    engine = Engine(chains)
    text = [int(token) for token in np.random.default_rng(0).integers(10, 500, 100)]
    engine.step({0: [*text, *text[:24]]}, [0])
    (draft,) = engine.step({0: text[24:32]}, [0])
    kept = chains._rows.arrays.lessons.kept[chains._rows.owner[0]]
    assert draft == text[32:48]
    assert (kept[1:16] == COPIED).all()
    hits = chains._tools.weights.trials.copy()
    engine.step({0: [text[32], 9]}, [0])
    told = np.argwhere((chains._tools.weights.trials != hits).any(1))
    assert len(told), "whether the copy went on is learnt still"
