"""Laws of the grower under a grammar: what it drafts is allowed, what is forced is drafted, and nobody is harmed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from models import JSON_VOCAB, json_tokenizer
from schemas import schemas, values, written
from transformers import AutoTokenizer

from lookahead import Pool, demo_path
from lookahead.draft import Draft
from lookahead.errors import GrammarError
from lookahead.grammar import grammar as grammars
from lookahead.grammar.grammar import Grammar, compiled
from lookahead.grammar.masks import Words
from lookahead.grammar.matcher import ENDED, ROOT, Matcher
from lookahead.grammar.vocabulary import Vocabulary
from lookahead.grow import SOURCES, Grower, Row
from lookahead.sources.evidence import COLUMNS, NAMED
from lookahead.sources.tree import CURSOR, NODES, OFFSET
from lookahead.trace import Step

EOS = 1
PERSON = {
    "type": "object",
    "properties": {"first_name": {"type": "string"}, "town": {"type": "string", "default": "Bath"},
                   "age": {"type": "integer"}, "kind": {"enum": ["name", "the name", "abc"]},
                   "kids": {"type": "array", "items": {"$ref": "#"}}},
    "additionalProperties": False,
}  # fmt: skip
MAKE = {
    "person": lambda: Grammar.json_schema(PERSON),
    "required": lambda: Grammar.json_schema(PERSON | {"required": [*PERSON["properties"]]}),
    "compact": lambda: Grammar.json_schema(PERSON, whitespace="compact"),
    "any JSON": lambda: Grammar.json_schema(True),
    "prefixes": lambda: Grammar.choice(["a", "ab", "abc", "abab", "name", "the name"]),
    "regex": lambda: Grammar.regex("(ab|a)*[0-9]{1,3}(\\.[0-9]+)?"),
    "repeats": lambda: Grammar.regex("(abc)*"),
    "sums": lambda: Grammar.lark('start: sum\nsum: item ("+" item)*\nitem: /[0-9]+/ | "(" sum ")"'),
    "anything": lambda: Grammar.regex("(.|\n)*"),
}
SIZES = {"tokenizer": None, "larger": JSON_VOCAB, "much larger": JSON_VOCAB + 100, "smaller": 128}
SETS = (("prompt", "pool", "recycle"), ("prompt",), ("recycle",), ("pool",), ())


@pytest.fixture(autouse=True, scope="module")
def patience() -> Iterator[None]:
    """No clock decides what is drafted here."""
    with mock.patch("lookahead.grammar.matcher.PATIENCE", 1e9):
        yield


@cache
def named(name: str) -> Grammar:
    return MAKE[name]()


def vocabulary() -> Vocabulary:
    return Vocabulary.of(json_tokenizer())


@cache
def demo() -> Vocabulary:
    return Vocabulary.of(AutoTokenizer.from_pretrained(demo_path()))


def array(tokens: Sequence[int]) -> Any:
    context = np.array(tokens, np.int32)
    context.flags.writeable = False
    return context


def bits(mask: Words) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


class Noisy:
    """A source that names anything: forbidden tokens, end tokens, tokens that nobody has."""

    def __init__(self, seed: int = 0, size: int = JSON_VOCAB) -> None:
        self.random, self.size = random.Random(seed), size

    def start(self, context: Any) -> None:
        return None

    extend = observe = lambda self, *_: None

    def successors(self, cursor: Any) -> tuple[list[int], list[float]]:
        tokens = [self.random.randrange(self.size) for _ in range(self.random.choice([0, 3, 40]))]
        tokens += self.random.choice([[], [EOS, -1, self.size + 50, 2**31 - 1]])
        return tokens, [self.random.random() for _ in tokens]


class Run:
    """One row under a grammar, and a target that says what is allowed, the drafted tokens now and then."""

    def __init__(self, grower: Grower, matcher: Matcher, prompt: Sequence[int], seed: int = 0) -> None:
        self.grower, self.matcher, self.random = grower, matcher, random.Random(seed)
        self.prompt, self.text = list(prompt), list[int]()
        self.row = grower.start(array(self.prompt))
        assert isinstance(self.row, Row)
        assert self.row.obey(matcher)

    @property
    def context(self) -> Any:
        return array(self.prompt + self.text)

    def propose(self, budget: int) -> Draft:
        self.matcher.settle(self.text)
        return self.row.propose(self.context, budget)

    def say(self, said: list[int], children: list[int]) -> int:
        allowed = bits(self.matcher.mask(self.matcher.follow(self.text + said)))
        drafted = [token for token in children if token in allowed]
        if drafted and self.random.random() < 0.7:
            return self.random.choice(drafted)
        long = [t for t in allowed if t < vocabulary().size and len(vocabulary().bytes[t]) > 1]
        return self.random.choice(sorted(long if long and self.random.random() < 0.4 else allowed))

    def verify(self, draft: Draft, wanted: Sequence[int] = ()) -> Step:
        path, tokens = [0], list[int]()
        while True:
            children = draft.tokens[draft.parents == path[-1]].tolist()
            tokens.append(wanted[len(tokens)] if len(tokens) < len(wanted) else self.say(tokens, children))
            child = draft.child(path[-1], tokens[-1])
            if child is None or tokens[-1] in self.matcher.ends:
                break
            path.append(child)
        return self.step_of(draft, path, tokens)

    def step_of(self, draft: Draft, path: list[int], tokens: list[int]) -> Step:
        tops = np.array([[self.random.randrange(128) for _ in range(8)] for _ in range(len(draft))], np.int32)
        logits = -np.sort(-np.random.default_rng(len(self.text)).normal(size=tops.shape).astype(np.float32))
        return Step(0, draft, np.array(path, np.int32), np.array(tokens, np.int64), tops, logits)

    def observe(self, step: Step) -> None:
        self.row.observe(step)
        self.text += step.tokens.tolist()

    @property
    def over(self) -> bool:
        return bool(self.text) and self.text[-1] in self.matcher.ends

    def steps(self, count: int, budget: int) -> Iterator[Draft]:
        for _ in range(count):
            draft = self.propose(budget)
            yield draft
            self.observe(self.verify(draft))
            if self.over:
                return


def require_allowed(draft: Draft, run: Run, budget: int) -> None:
    """Raise AssertionError unless each token of `draft` may follow its parent and ends nothing."""
    matcher = run.matcher
    assert draft.tokens[0] == run.context[-1]
    assert len(draft) <= budget + 1
    assert len({(int(p), int(t)) for p, t in zip(draft.parents, draft.tokens, strict=True)}) == len(draft)
    assert not set(draft.tokens[1:].tolist()) & set(matcher.ends)
    assert draft.tokens[1:].max(initial=0) < 32 * matcher.masks.shape[1]
    assert (draft.weight > 0).all()
    assert (draft.weight <= 1).all()
    assert matcher.prune(draft) is draft


def require_forced(draft: Draft, run: Run, budget: int) -> None:
    """Raise AssertionError unless every token that must follow is drafted with weight 1, as far as there is room."""
    for node in range(len(draft) if len(draft) <= budget else 0):
        path = draft.tokens[draft.path(node)[1:]].tolist()
        allowed = bits(run.matcher.mask(run.matcher.follow(run.text + path)))
        children = np.flatnonzero(draft.parents == node)
        if len(allowed) == 1 and allowed.isdisjoint(run.matcher.ends):
            assert draft.tokens[children].tolist() == list(allowed)
            assert draft.weight[children].tolist() == [1.0]
            assert draft.source[children].tolist() == [SOURCES.index("grammar")]


def pools(seed: int) -> list[Pool]:
    """Pools of JSON and of noise."""
    rng, made = random.Random(seed), []
    for _ in range(seed % 3):
        pool = Pool()
        pool.add(array(vocabulary().encode('{"first_name": "abc", "age": 12, "kids": [{"age": 10}]}')))
        pool.add(array([rng.randrange(JSON_VOCAB) for _ in range(60)]))
        made.append(pool)
    return made


prompts = st.lists(st.integers(0, JSON_VOCAB - 1), min_size=1, max_size=60) | st.sampled_from(
    ['first name: name\nage: 12\n{"town": "abc"}', '{"age": 1, "kind": "the name"}', "a", "ab1.20 + (12)", "tag1, tag2"]
).map(lambda text: vocabulary().encode(text))


@settings(max_examples=120)
@given(
    name=st.sampled_from(sorted(MAKE)),
    size=st.sampled_from(sorted(SIZES)),
    prompt=prompts,
    sources=st.sampled_from(SETS),
    guests=st.integers(0, 2),
    budget=st.integers(0, 24),
    seed=st.integers(0, 2**32),
)
def test_all_that_is_drafted_is_allowed(
    name: str, size: str, prompt: list[int], sources: Any, guests: int, budget: int, seed: int
) -> None:
    known = SIZES[size] or vocabulary().size
    chance, vocab_size = random.Random(seed).choice([(0.0, None), (0.0, known), (0.02, known), (0.4, 100)])
    sources = (*sources, *(Noisy(seed + i) for i in range(guests)))
    grower = Grower(sources=sources, pools=pools(seed), vocab_size=vocab_size, min_chance=chance)
    matcher = named(name).matcher(json_tokenizer(), ends=(EOS, 2, 2)[: 1 + seed % 3], size=known)
    run = Run(grower, matcher, prompt, seed)
    # Few tokens cannot write every text: there it ends.
    with suppress(GrammarError) if size == "smaller" else nullcontext():
        for draft in run.steps(5, budget):
            require_allowed(draft, run, budget)
            if vocab_size is not None:
                assert draft.tokens[1:].max(initial=0) < vocab_size
            else:
                require_forced(draft, run, budget)
    if run.over:  # nothing may follow: not a node, whoever names one
        assert len(run.propose(budget)) == 1
    assert np.isfinite(grower.weights.w).all()


@settings(max_examples=50)
@given(data=st.data(), schema=schemas(), sources=st.sampled_from([("prompt",), ()]), budget=st.integers(1, 24))
def test_values_of_any_schema_are_followed(data: Any, schema: dict[str, Any], sources: Any, budget: int) -> None:
    """What must come is drafted, to the last bracket; the text is one of the schema's."""
    value = data.draw(values(schema))
    text = written(value, schema, Draft202012Validator(schema))
    try:
        matcher = Grammar.json_schema(schema).matcher(json_tokenizer())
    except GrammarError:
        return
    prompt = vocabulary().encode(data.draw(st.sampled_from(["x", text, json.dumps(value)])) + "\n") or [5]
    run = Run(Grower(sources=sources, min_chance=0.0), matcher, prompt)
    wanted = vocabulary().encode(text)
    for _ in range(12):
        draft = run.propose(budget)
        require_allowed(draft, run, budget)
        require_forced(draft, run, budget)
        step = run.verify(draft, wanted[len(run.text) :])
        run.observe(step)
        if run.over or matcher.follow(run.text) == ENDED:
            break


def test_what_is_forced_is_chained_through() -> None:
    matcher = Grammar.choice(["the name abc the name abc the name"]).matcher(json_tokenizer())
    run = Run(Grower(sources=()), matcher, [5])
    draft = run.propose(60)
    text = vocabulary().decode(draft.tokens[1:].tolist()).decode()
    assert text == "the name abc the name abc the name"
    assert draft.parents.tolist() == list(range(-1, len(draft) - 1))
    assert (draft.weight == 1.0).all()
    assert len(run.propose(3)) == 4
    assert len(run.propose(0)) == 1


def test_where_the_text_may_end_nothing_is_forced() -> None:
    run = Run(Grower(sources=()), named("repeats").matcher(json_tokenizer()), [5])
    draft = run.propose(40)
    ends = [node for node in range(len(draft)) if run.matcher.accepts(follow(run, draft, node))]
    assert len(ends) > 1
    for node in ends:
        assert (draft.weight[draft.parents == node] < 1.0).all()


def follow(run: Run, draft: Draft, node: int) -> int:
    return run.matcher.follow(run.text + draft.tokens[draft.path(node)[1:]].tolist())


def test_the_demo_model_drafts_json() -> None:
    vocab = demo()
    matcher = Grammar.json_schema(PERSON | {"required": [*PERSON["properties"]]}).matcher(vocab)
    text = '{"first_name": "Ada", "town": "Bath", "age": 36, "kind": "abc", "kids": []}'
    prompt = vocab.encode("First name: Ada\nAge: 36\n")
    run, wanted, passes = Run(Grower(vocab_size=vocab.size), matcher, prompt), [*vocab.encode(text), EOS], 0
    while len(run.text) < len(wanted):
        draft = run.propose(16)
        require_allowed(draft, run, 16)
        run.observe(run.verify(draft, wanted[len(run.text) :]))
        passes += 1
    assert run.text == wanted
    assert passes <= len(wanted) / 3


# --- every mask once --------------------------------------------------------------------------------------------


class Engines:
    """Engines that write down for which texts they were asked for a mask."""

    def __init__(self, grammar: Grammar) -> None:
        self.inner, self.asked = compiled(grammar, vocabulary()), list[tuple[int, ...]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def take(self) -> Engine:
        return Engine(self, self.inner.take(), ())

    renew = take


class Engine:
    def __init__(self, owner: Engines, engine: Any, text: tuple[int, ...]) -> None:
        self.owner, self.engine, self.text = owner, engine, text

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def deep_copy(self) -> Engine:
        return Engine(self.owner, self.engine.deep_copy(), self.text)

    def consume_token(self, token: int) -> Any:
        self.text = (*self.text, token)
        return self.engine.consume_token(token)

    def unsafe_compute_mask_ptr(self, *arguments: Any) -> Any:
        self.owner.asked.append(self.text)
        return self.engine.unsafe_compute_mask_ptr(*arguments)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(MAKE)),
    guests=st.integers(0, 1),
    budget=st.integers(0, 16),
    seed=st.integers(0, 2**32),
    complete=st.booleans(),
)
def test_every_mask_is_computed_once_a_step(name: str, guests: int, budget: int, seed: int, complete: bool) -> None:
    engines = Engines(named(name))
    grower = Grower(sources=("prompt", "recycle", *[Noisy(seed)] * guests), min_chance=0.0)
    run = Run(grower, Matcher(engines, (EOS,), vocabulary().size), [5, 6], seed)
    for draft in run.steps(6, budget):
        run.matcher.prune(draft)
        if complete:
            run.matcher.complete(draft)
        step = run.verify(draft)
        run.row.observe(step)
        run.row.propose(run.context, budget)  # of a text that is as it was
        assert len(engines.asked) == len(set(engines.asked))
        run.observe(step)
        engines.asked.clear()


# --- failures ---------------------------------------------------------------------------------------------------


def twins(name: str = "required", sources: Any = ("prompt", "recycle"), steps: int = 0) -> tuple[Run, Run]:
    """Two rows that have seen the same."""
    made = []
    for _ in range(2):
        guests = [Noisy(3)] if sources == "guests" else []
        grower = Grower(sources=guests or sources, min_chance=0.0)
        made.append(Run(grower, named(name).matcher(json_tokenizer()), [5, 6, 7], 2))
        for _ in made[-1].steps(steps, 9):
            pass
    return made[0], made[1]


class Interrupted:
    """`Matcher.enter`, which raises at one call, and at all later ones."""

    def __init__(self, run: Run, at: int, error: type[BaseException]) -> None:
        self.enter, self.left, self.error = run.matcher.enter, at, error

    def __call__(self, state: int, token: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error("made to fail")
        return self.enter(state, token)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("sources", [("prompt", "recycle"), (), "guests"])
def test_an_error_while_drafting_is_raised_and_leaves_nothing_behind(error: Any, at: int, sources: Any) -> None:
    run, twin = twins(sources=sources)
    with mock.patch.object(run.matcher, "enter", Interrupted(run, at, error)), pytest.raises(error, match="made to"):
        run.propose(9)
    if sources == "guests":
        run.grower.sources[0].random.setstate(twin.grower.sources[0].random.getstate())
    for _ in range(3):
        draft = run.propose(9)
        assert draft == twin.propose(9)
        require_allowed(draft, run, 9)
        step = run.verify(draft)
        run.observe(step)
        twin.observe(step)
    assert run.grower.weights.w.tobytes() == twin.grower.weights.w.tobytes()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("sources", [("prompt",), "guests"])
def test_an_error_while_learning_is_raised_and_the_row_goes_on(error: Any, sources: Any) -> None:
    run, _ = twins("required", sources=sources)
    raised = 0
    for draft in run.steps(4, 9):
        step = run.verify(draft)
        if len(step.path) > 1:
            with mock.patch.object(run.matcher, "enter", Interrupted(run, 0, error)), pytest.raises(error):
                run.row.observe(step)
            raised += 1
        require_allowed(run.propose(9), run, 9)
    assert raised
    assert np.isfinite(run.grower.weights.w).all()


@settings(max_examples=50)
@given(name=st.sampled_from(sorted(MAKE)), seed=st.integers(0, 2**32), guests=st.integers(0, 1))
def test_a_matcher_that_gives_up_on_drafts_leaves_the_row_usable(name: str, seed: int, guests: int) -> None:
    """Under a node of which it is not known what may follow, nothing is drafted."""
    grower = Grower(sources=("prompt", *[Noisy(seed)] * guests), min_chance=0.0)
    run, moody = Run(grower, named(name).matcher(json_tokenizer()), [5, 6], seed), random.Random(seed)
    enter, refused = run.matcher.enter, set[tuple[int, int]]()

    def give_up(state: int, token: int) -> int:
        assert state > ENDED
        if moody.random() < 0.3:
            refused.add((state, token))
            return -1
        return enter(state, token)

    for _ in range(4):
        refused.clear()
        with mock.patch.object(run.matcher, "enter", give_up):
            draft = run.propose(12)
            step = run.verify(draft)
            states = [run.matcher.root]
            for node in range(1, len(draft)):
                parent, token = int(draft.parents[node]), int(draft.tokens[node])
                states.append(run.matcher.child(states[parent], token))
                above = int(draft.parents[parent]), int(draft.tokens[parent])
                assert parent == 0 or (states[above[0]], above[1]) not in refused
            run.observe(step)
        if run.over:
            break
        require_allowed(run.propose(12), run, 12)


def test_an_engine_that_fails_in_drafts_is_survived() -> None:
    """Its fuel suffices for "y" and not for "ya"."""
    y, a = (vocabulary().encode(char)[0] for char in "ya")
    with mock.patch.dict(grammars._LIMITS, {"step_lexer_fuel": 1000}):
        matcher = Grammar.regex("x[a-z]*|y(.|\n)*a.{9}c").matcher(json_tokenizer())
        run = Run(Grower(sources=("prompt",), min_chance=0.0), matcher, [y, a, y, a, y, a, y])
        run.text = [y]
        for _ in range(3):
            draft = run.propose(12)
            require_allowed(draft, run, 12)
            assert draft.child(0, a) is not None
            assert a not in draft.tokens[draft.parents == draft.child(0, a)]
        run.observe(run.step_of(draft, [0], [y]))
        require_allowed(run.propose(12), run, 12)


# --- rows without a grammar, texts that leave it, matchers that move ----------------------------------------------


@given(prompts, st.integers(0, 12), st.integers(0, 2**32))
def test_a_free_row_is_drafted_as_if_there_were_no_grammars(prompt: list[int], budget: int, seed: int) -> None:
    alone, beside = (Grower(vocab_size=JSON_VOCAB, min_chance=0.0, pools=pools(seed)) for _ in range(2))
    beside.values.add('{"first_name": "abc", "age": 12}')
    guided = Run(beside, named("person").matcher(json_tokenizer()), prompt, seed)
    rows, text, rng = [alone.start(array(prompt)), beside.start(array(prompt))], list(prompt), random.Random(seed)
    for _ in range(3):
        guided.propose(budget)
        draft, other = (row.propose(array(text), budget) for row in rows)
        assert draft == other
        assert SOURCES.index("grammar") not in draft.source
        evidence = rows[1]._scratch.evidence  # type: ignore[attr-defined]
        assert not evidence.x[:, NAMED:COLUMNS].any()
        assert not evidence.rows["named"].any()
        tokens = draft.tokens[draft.path(len(draft) - 1)[1:]].tolist()
        tokens.append(rng.randrange(JSON_VOCAB))
        step = guided.step_of(draft, draft.path(len(draft) - 1), tokens)
        for row in rows:
            row.observe(step)
        text += tokens


@pytest.mark.parametrize("guests", [0, 1])
def test_after_a_text_that_left_the_grammar_nothing_is_drafted(guests: int) -> None:
    wrong = vocabulary().encode("]")[0]
    grower = Grower(sources=("prompt", "recycle", *[Noisy()] * guests), min_chance=0.0)
    run = Run(grower, named("person").matcher(json_tokenizer()), [wrong] * 9)
    for text in ([wrong], [wrong, wrong], [wrong, EOS]):
        run.text = text
        draft = run.propose(9)
        assert run.matcher.root == ENDED
        assert len(draft) == 1
        run.row.observe(run.step_of(draft, [0], [wrong]))
    run.text = []
    require_allowed(run.propose(9), run, 9)


@pytest.mark.parametrize("sources", [("prompt", "recycle"), "guests"])
def test_masks_may_move_between_drafting_and_learning(sources: Any) -> None:
    run, twin = twins("required", sources)
    for _ in range(4):
        draft = run.propose(9)
        assert draft == twin.propose(9)
        step = run.verify(draft)
        old = run.matcher.masks
        run.matcher.reserve(2 * len(old))
        old[:] = 0  # whoever still looks here sees nothing
        run.observe(step)
        twin.observe(step)
        assert run.grower.weights.w.tobytes() == twin.grower.weights.w.tobytes()


def test_more_states_than_were_reserved_are_not_looked_up() -> None:
    """Drafts of many sizes from a text that is not settled anew."""
    run = Run(Grower(sources=("prompt", Noisy()), min_chance=0.0), named("anything").matcher(json_tokenizer()), [5, 6])
    run.matcher.settle([])
    for _ in range(30):
        draft = run.row.propose(run.context, 9)
        assert len(draft) <= 10
        assert draft.tokens.max() < vocabulary().size


@settings(max_examples=50)
@given(name=st.sampled_from(sorted(MAKE)), data=st.data(), seed=st.integers(0, 2**32))
def test_any_allowed_path_may_be_observed(name: str, data: st.DataObject, seed: int) -> None:
    """Cut drafts, nodes that others drafted, fewer tokens than nodes."""
    run = Run(Grower(vocab_size=JSON_VOCAB, min_chance=0.0), named(name).matcher(json_tokenizer()), [5, 6], seed)
    for _ in range(4):
        draft = run.propose(10)
        others = list(itertools.accumulate(range(3), lambda said, _: [*said, run.say(said, [])], initial=[]))[-1]
        ran = Draft.merge([draft.cut(data.draw(st.integers(0, 10))), Draft.chain([int(run.context[-1]), *others])])
        ran = run.matcher.prune(ran)
        path = ran.path(data.draw(st.integers(0, len(ran) - 1)))
        tokens = [int(ran.tokens[i]) for i in path[1:]]
        tokens.append(run.say(tokens, []))
        run.observe(run.step_of(ran, path, tokens[: data.draw(st.integers(1, len(tokens)))]))
        if run.over:
            break
        require_allowed(run.propose(10), run, 10)
    assert run.row._tree.used[NODES] <= 11


def test_observe_before_propose_is_harmless() -> None:
    run = Run(Grower(), named("person").matcher(json_tokenizer()), [5])
    run.row.observe(run.step_of(Draft.chain([5, 6]), [0, 1], [6, 7]))
    require_allowed(run.propose(9), run, 9)


# --- keys -------------------------------------------------------------------------------------------------------


def write(run: Run, text: str, budget: int) -> Iterator[str]:
    """Decode `text`; yield what stands after every step."""
    wanted = run.matcher.vocabulary.encode(text)
    while len(run.text) < len(wanted):
        draft = run.propose(budget)
        require_allowed(draft, run, budget)
        run.observe(run.verify(draft, wanted[len(run.text) :]))
        run.text = run.text[: len(wanted)]
        yield run.matcher.vocabulary.decode(run.text).decode()


@pytest.mark.parametrize("name", ["person", "compact"])
@pytest.mark.parametrize("budget", [0, 1, 5, 24])
def test_the_last_key_is_known_after_every_step(name: str, budget: int) -> None:
    separators = (",", ":") if name == "compact" else (", ", ": ")
    value = {"first_name": "town", "town": "age", "age": 12, "kind": "name", "kids": []}
    text = json.dumps(value, separators=separators)
    run = Run(Grower(sources=("prompt",)), named(name).matcher(json_tokenizer()), vocabulary().encode("x " + text))
    keys = [key.name for key in run.matcher.keys]
    checked = 0
    for written_ in write(run, text, budget):
        cursor, offset = run.row._tree.used[[CURSOR, OFFSET]].tolist()
        ended = [(written_.rfind(f'"{key}":'), key) for key in keys]
        before, last = max(ended)
        if before >= 0 and offset == 0 and written_.endswith(('":', '": ', '": "', '":"')):
            assert keys[cursor] == last, written_
            checked += 1
    assert checked or budget


def test_states_below_the_root_are_asked_for_in_order() -> None:
    """A node is entered from its parent's state."""
    run = Run(Grower(sources=(Noisy(),), min_chance=0.0), named("any JSON").matcher(json_tokenizer()), [5, 6])
    enter, texts = run.matcher.enter, {ROOT: ()}

    def remember(state: int, token: int) -> int:
        child = enter(state, token)
        texts[child] = (*texts[state], token)
        return child

    with mock.patch.object(run.matcher, "enter", remember):
        draft = run.propose(30)
    nodes = run.row._tree.nodes[: len(draft)]
    for node in range(len(draft)):
        if nodes["state"][node] in texts and (draft.parents == node).any():
            assert texts[int(nodes["state"][node])] == tuple(draft.tokens[draft.path(node)[1:]].tolist())


# What keys tell, with no other source than the grammar.


def drafted(schema: dict[str, Any], prompt: str, text: str, earlier: str = "") -> list[str]:
    """Return all that is drafted behind `text`, from the root to every node, what is likeliest first."""
    grower = Grower(sources=(), min_chance=0.0)
    grower.values.add(earlier)
    run = Run(grower, Grammar.json_schema(schema).matcher(demo()), demo().encode(prompt))
    tokens = demo().encode(text)
    for end in range(len(tokens) + 1):  # step by step: so the last key is known
        run.text = tokens[:end]
        draft = run.propose(40)
        if end < len(tokens):
            run.row.observe(verified(draft, [0], tokens[end : end + 1]))
    order = np.argsort(-draft.path_weight()[1:], kind="stable") + 1
    return [demo().decode(draft.tokens[draft.path(int(node))[1:]].tolist()).decode() for node in order]


def verified(draft: Draft, path: list[int], committed: list[int]) -> Step:
    none = np.zeros((len(draft), 0))
    return Step(0, draft, np.array(path, np.int32), np.array(committed, np.int64), none, none)


NAMES = {"type": "object", "properties": {k: {"type": "string"} for k in ("first_name", "town", "zone", "other")}}


def test_values_are_drafted_from_where_their_key_stood() -> None:
    for prompt in ("First name: Zyxa\n", 'x {"first_name": "Zyxa"}', "the first name is Zyxa."):
        assert any(text.startswith("Zyxa") for text in drafted(NAMES, prompt, '{"first_name": "'))
    assert not any(text.startswith("Zy") for text in drafted(NAMES, "Surname: Zyxa\n", '{"first_name": "'))
    assert any(t.startswith("Qoph") for t in drafted(NAMES, "go", '{"town": "', '{"town": "Qoph"}'))
    shown = {"type": "object", "properties": {"town": {"type": "string", "default": "Wubb"}}}
    assert any(text.startswith("Wubb") for text in drafted(shown, "go", '{"town": "'))


def test_keys_after_the_last_one_come_first() -> None:
    names = [f"{a}{b}" for a in ("red", "sun", "low") for b in ("_hat", "_sea", "_day", "_car")]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    for last, following in (("sun_hat", "sun_sea"), ("red_day", "red_car"), ("red_car", "sun_hat")):
        assert next(text for text in drafted(schema, "go", f'{{"{last}": "x", "') if text in names) == following


def test_a_value_may_take_up_the_words_of_its_key() -> None:
    assert "zone" in drafted(NAMES, "go", '{"zone": "a-')
    assert "zone" not in drafted(NAMES, "go", '{"other": "a-')


def test_a_number_may_go_on_counting() -> None:
    schema = {"type": "array", "items": {"type": "string"}}
    grower = Grower(sources=("prompt",), min_chance=0.0)
    run = Run(grower, Grammar.json_schema(schema).matcher(demo()), demo().encode("go"))
    run.text = demo().encode('["tag1", "tag')
    assert demo().encode("2")[0] in run.propose(40).tokens[1:].tolist()
