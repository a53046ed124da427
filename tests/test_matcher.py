"""What may follow a text: the same however it was asked, whatever was asked before, and whatever failed meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import JSON_VOCAB, json_tokenizer

from lookahead.draft import Draft
from lookahead.errors import GrammarError
from lookahead.grammar import grammar as grammars
from lookahead.grammar.grammar import Compiled, Grammar, compiled
from lookahead.grammar.masks import Words, words
from lookahead.grammar.matcher import ENDED, ROOT, Matcher
from lookahead.grammar.vocabulary import Vocabulary

EOS = 1
RECURSIVE = {
    "$defs": {"tree": {"type": "object", "properties": {"id": {"type": "integer"}, "kids": {"$ref": "#/$defs/kids"}},
                       "required": ["id"], "additionalProperties": False},
              "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
    "$ref": "#/$defs/tree",
}  # fmt: skip
MAKE = {
    "recursive": lambda: Grammar.json_schema(RECURSIVE),
    "any JSON": lambda: Grammar.json_schema(True),
    "indented": lambda: Grammar.json_schema({"type": "array", "items": {"type": "boolean"}}, whitespace="indented"),
    "strings": lambda: Grammar.json_schema({"type": "array", "items": {"type": "string", "maxLength": 4}}),
    "prefixes": lambda: Grammar.choice(["a", "ab", "abc", "abab", "name"]),
    "regex": lambda: Grammar.regex("(ab|a)*[0-9]{1,3}(\\.[0-9]+)?"),
    "greedy": lambda: Grammar.lark('start: (WORD | "the") " "? NUMBER?\nWORD: /[a-z]+/\nNUMBER: /[0-9]+/'),
    "sums": lambda: Grammar.lark('start: sum\nsum: item ("+" item)*\nitem: /[0-9]+/ | "(" sum ")"'),
    "anything": lambda: Grammar.regex("(.|\n)*"),
}
ENDS = {"usual": (EOS,), "two": (EOS, 2), "a letter": (EOS, 68), "none": (), "out of reach": (EOS, 10_000)}
SIZES = {"tokenizer": None, "larger": JSON_VOCAB, "much larger": JSON_VOCAB + 100, "smaller": 128, "odd": 111}


@cache
def named(name: str) -> Grammar:
    return MAKE[name]()


def vocabulary() -> Vocabulary:
    return Vocabulary.of(json_tokenizer())


def spell(text: str) -> list[int]:
    """Return `text`, one token a character."""
    return [vocabulary().encode(char)[0] for char in text]


def bits(mask: Words) -> frozenset[int]:
    return frozenset(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


class Naive:
    """The twin: for every question a new engine, which is fed the whole text and never goes back.

    Args:
        name: of the grammar, the end tokens and the size, as in the tables above.
    """

    def __init__(self, name: str, ends: str = "usual", size: str = "tokenizer") -> None:
        self.grammar, self.vocabulary = named(name), vocabulary()
        self.size = SIZES[size] or self.vocabulary.size
        self.ends = frozenset(end for end in ENDS[ends] if end < self.size)
        self.known: dict[tuple[int, ...], frozenset[int] | None] = {}

    def matcher(self) -> Matcher:
        return Matcher(compiled(self.grammar, self.vocabulary), tuple(self.ends), self.size)

    def ended(self, text: Sequence[int]) -> bool:
        """Whether `text` has ended, or is no beginning of a text of the grammar."""
        for i, token in enumerate(text):
            allowed = self.allowed(text[:i])
            if token in self.ends or allowed is None or token not in allowed:
                return True
        return False

    def dead(self, text: Sequence[int]) -> bool:
        """Whether `text` goes on from where nothing may follow, not even an end token."""
        return any(self.allowed(text[:i]) is None for i, token in enumerate(text) if token not in self.ends)

    def allowed(self, text: Sequence[int]) -> frozenset[int] | None:
        """Return what may follow; None where nothing may."""
        key = tuple(text)
        if key not in self.known:
            self.known[key] = self.ends if self.ended(key) else self._asked(key)
        return self.known[key]

    def accepts(self, text: Sequence[int]) -> bool:
        return self.ended(text) or self._engine(text).is_accepting()

    def _engine(self, text: Sequence[int]) -> Any:
        engine = compiled(self.grammar, self.vocabulary).make()
        assert all(engine.consume_token(token) for token in text), engine.get_error()
        return engine

    def _asked(self, text: Sequence[int]) -> frozenset[int] | None:
        engine = self._engine(text)
        # The engine is asked for bytes, not for words at an address.
        found = bits(np.frombuffer(engine.compute_bitmask(), np.uint32))
        assert not engine.is_error(), engine.get_error()
        own = set(self.vocabulary.engine.eos_tokens)
        found = frozenset(token for token in found if token < self.size and token not in own | self.ends)
        return (found | self.ends if engine.is_accepting() else found) or None


@cache
def naive(name: str, ends: str = "usual", size: str = "tokenizer") -> Naive:
    return Naive(name, ends, size)


class Walk:
    """Random texts, most of them within the grammar."""

    def __init__(self, naive: Naive, seed: int) -> None:
        self.naive, self.random = naive, random.Random(seed)

    def token(self, text: Sequence[int]) -> int:
        allowed = sorted(self.naive.allowed(text) or ())
        if not allowed or self.random.random() < 0.06:
            return self.random.randrange(self.naive.size)
        if self.random.random() < 0.5:  # few tokens are long: prefer those now and then
            allowed = [t for t in allowed if len(self.naive.vocabulary.decode([t])) > 1] or allowed
        return self.random.choice(allowed)

    def on(self, text: Sequence[int], most: int = 6) -> list[int]:
        out = list(text)
        for _ in range(self.random.randrange(most + 1)):
            out.append(self.token(out))
        return out

    def other(self, text: list[int]) -> list[int]:
        """Return a text that goes on, goes back, parts in the middle, or has nothing in common."""
        kind, cut = self.random.randrange(6), self.random.randrange(len(text) + 1)
        if kind < 3:
            return self.on(text)
        if kind == 3:
            return self.on(text[:cut])
        if kind == 4:
            return [*text[:cut], self.random.randrange(self.naive.size), *text[cut + 1 :]]
        return self.on([], 12)

    def draft(self, last: int, text: list[int], nodes: int) -> Draft:
        texts, tokens, parents = [text], [last], [-1]
        for _ in range(nodes):
            parent = self.random.randrange(len(texts)) if self.random.random() < 0.5 else len(texts) - 1
            token = self.token(texts[parent]) if self.random.random() < 0.8 else self.random.randrange(self.naive.size)
            texts.append([*texts[parent], token])
            tokens.append(token)
            parents.append(parent)
        return Draft(np.array(tokens), np.array(parents), weight=np.array([self.random.random() for _ in tokens]))


def answers(matcher: Matcher, twin: Naive, state: int, text: Sequence[int]) -> None:
    """Raise AssertionError unless `matcher` says of `state` what its twin says of `text`."""
    expected = twin.allowed(text)
    assert (state == ENDED) == twin.ended(text)
    if expected is None or not expected:
        if state != ENDED:
            with pytest.raises(GrammarError, match=r"no token|complete"):
                matcher.mask(state)
        return
    assert bits(matcher.mask(state)) == expected, f"after {text}"
    assert matcher.masks.shape[1] >= words(twin.size)
    assert matcher.accepts(state) == twin.accepts(text)
    assert [t for t in range(-2, twin.size + 40) if matcher.allows(state, t)] == sorted(expected)


def pruned(twin: Naive, text: list[int], draft: Draft) -> list[int]:
    """Return the nodes that stay, by the law: each step down to them had its bit, and ends nothing."""
    kept = [0]
    for node in range(1, len(draft)):
        path = draft.path(node)
        steps = [text + draft.tokens[path[1:i]].tolist() for i in range(1, len(path))]
        tokens = draft.tokens[path[1:]].tolist()
        if not any(twin.ended(s) or t not in (twin.allowed(s) or ()) for s, t in zip(steps, tokens, strict=True)):
            kept += [] if twin.ends & set(tokens) else [node]
    return kept


def session(matcher: Matcher, twin: Naive, seed: int, steps: int = 24) -> None:
    """Do anything that can be done with a matcher, in any order, and hold every answer against the twin."""
    walk, text = Walk(twin, seed), []
    states: dict[int, list[int]] = {matcher.root: []}
    seen: dict[int, bytes] = {}
    for _ in range(steps):
        action = walk.random.randrange(8)
        if action < 2:
            new = walk.other(text)
            if twin.dead(new):
                with pytest.raises(GrammarError, match=r"no token|complete"):
                    matcher.settle(new)
            else:
                text = new
            states, seen = {matcher.settle(text): text}, {}
            assert matcher.root == next(iter(states))
        elif action == 2:
            more = walk.on(text)
            if not twin.dead(more):
                states[matcher.follow(more)] = more
        elif action == 3:
            draft = walk.draft(text[-1] if text else 0, text, 10)
            kept = pruned(twin, text, draft)
            left = matcher.prune(draft)
            assert left.tokens.tolist() == draft.tokens[kept].tolist()
            assert left.weight.tolist() == draft.weight[kept].tolist()
            assert [left.path(i) for i in range(len(left))] == [[kept.index(n) for n in draft.path(k)] for k in kept]
            if walk.random.random() < 0.5:
                matcher.complete(left)
        elif action < 6:
            state = walk.random.choice(sorted(states))
            token = walk.token(states[state])
            if twin.allowed(states[state]) is not None:
                enter = matcher.enter if walk.random.random() < 0.3 else matcher.child
                child = enter(state, token)
                if child == -1:
                    assert not twin.allowed([*states[state], token])
                elif child != ENDED:
                    states[child] = [*states[state], token]
                else:
                    assert twin.ended([*states[state], token])
        else:
            state = walk.random.choice(sorted(states))
            if state != ENDED:
                answers(matcher, twin, state, states[state])
                if twin.allowed(states[state]):
                    seen.setdefault(state, matcher.mask(state).tobytes())
        for state, mask in seen.items():
            assert matcher.masks[state].tobytes()[: len(mask)] == mask, "a mask has changed"
        assert bits(matcher.mask(ENDED)) == twin.ends
    answers(matcher, twin, matcher.root, text)


@settings(settings.get_profile("law"))
@given(
    name=st.sampled_from(sorted(MAKE)),
    ends=st.sampled_from(sorted(ENDS)),
    size=st.sampled_from(sorted(SIZES)),
    seed=st.integers(0, 2**32),
)
def test_answers_do_not_depend_on_what_was_asked_before(name: str, ends: str, size: str, seed: int) -> None:
    twin = naive(name, ends, size)
    matcher = twin.matcher()
    session(matcher, twin, seed)
    matcher.close()


@pytest.mark.parametrize("name", sorted(MAKE))
def test_engines_are_used_again_and_start_at_the_beginning(name: str) -> None:
    twin = naive(name)
    for seed in range(6):
        matcher = twin.matcher()
        session(matcher, twin, seed, steps=8)
        matcher.close()
        matcher.close()  # harmless
        again = twin.matcher()
        answers(again, twin, again.root, [])
        again.close()


def test_states_are_the_same_for_the_same_way() -> None:
    matcher = naive("regex").matcher()
    a, b = spell("ab")
    assert matcher.root == ROOT
    assert matcher.child(ROOT, a) == matcher.child(ROOT, a) == matcher.follow([a])
    assert matcher.child(matcher.child(ROOT, a), b) == matcher.follow([a, b])
    assert matcher.child(ENDED, a) == ENDED
    assert matcher.child(ROOT, EOS) == ENDED
    assert matcher.child(ROOT, b) == ENDED
    assert matcher.settle([a]) == ROOT
    assert matcher.settle([a, EOS]) == ENDED


def test_room_for_many_states() -> None:
    matcher = naive("anything").matcher()
    matcher.reserve(300)
    masks, state = matcher.masks, ROOT
    for token in spell("ab" * 120):
        state = matcher.enter(state, token)
    assert matcher.masks is masks
    matcher.reserve(10)
    assert matcher.masks is masks
    texts = [spell("a" * n + "b") for n in range(200)]
    found = [matcher.enter(matcher.follow(text[:-1]), text[-1]) for text in texts]
    assert len(set(found)) == 200
    for state, text in zip(found, texts, strict=True):
        assert bits(matcher.mask(state)) == naive("anything").allowed(text)


# What the engine does when it fails: flags instead of exceptions, and masks that look like the end of the text.


class Failing:
    """Engines that fail at chosen calls, as real ones do: for good, in silence, and with a mask of the end token alone.

    Args:
        at: which calls fail, of all calls that any engine receives.
        method: count the calls of this one alone.
    """

    def __init__(self, name: str, at: Iterable[int], method: str = "") -> None:
        self.inner = compiled(named(name), vocabulary())
        self.size, self.ends = self.inner.size, self.inner.ends
        self.vocabulary, self.keys = self.inner.vocabulary, self.inner.keys
        self.at, self.method, self.calls, self.made = set(at), method, 0, 0

    def take(self) -> FailingEngine:
        return FailingEngine(self, self.inner.take())

    def renew(self) -> FailingEngine:
        self.made += 1
        return FailingEngine(self, self.inner.make())


class FailingEngine:
    """An engine of `Failing`."""

    def __init__(self, owner: Failing, engine: Any) -> None:
        self.owner, self.engine, self.broken = owner, engine, False

    def _fails(self, method: str) -> bool:
        if self.owner.method in ("", method):
            self.broken |= self.owner.calls in self.owner.at
            self.owner.calls += 1
        return self.broken

    def consume_token(self, token: int) -> bool:
        return not self._fails("consume_token") and self.engine.consume_token(token)

    def deep_copy(self) -> FailingEngine:
        copy = FailingEngine(self.owner, self.engine.deep_copy())
        copy.broken = self._fails("deep_copy")
        return copy

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        self.engine.unsafe_compute_mask_ptr(address, size)
        if self._fails("unsafe_compute_mask_ptr"):
            (np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint32 * (size // 4)).from_address(address)))[:] = 0
            (np.ctypeslib.ctypes.c_uint32).from_address(address).value = 1 << EOS

    def is_accepting(self) -> bool:
        return not self.broken and self.engine.is_accepting()

    def is_error(self) -> bool:
        return self.broken or self.engine.is_error()

    def get_error(self) -> str:
        return "made to fail\n<non-verbose/>" if self.broken else self.engine.get_error()


METHODS = ("", "consume_token", "deep_copy", "unsafe_compute_mask_ptr")


@given(
    name=st.sampled_from(sorted(MAKE)),
    seed=st.integers(0, 2**32),
    method=st.sampled_from(METHODS),
    at=st.integers(0, 30),
)
def test_one_failure_anywhere_is_never_seen(name: str, seed: int, method: str, at: int) -> None:
    twin = naive(name)
    engines = Failing(name, [at], method)
    matcher = Matcher(engines, (EOS,), twin.size)
    session(matcher, twin, seed)
    assert engines.made == (engines.calls > at)
    matcher.close()


@given(name=st.sampled_from(sorted(MAKE)), seed=st.integers(0, 2**32), at=st.integers(0, 60))
def test_failure_that_lasts_is_an_error_and_leaves_the_text_as_it_was(name: str, seed: int, at: int) -> None:
    """While every engine fails the answer is an error, never a mask; afterwards all is as if nothing had been."""
    twin, engines = naive(name), Failing(name, ())
    matcher, walk = Matcher(engines, (EOS,), twin.size), Walk(naive(name), seed)
    text = walk.on([], 10)
    matcher.settle(text)
    for _ in range(6):
        more = walk.other(text)
        engines.at = set(range(engines.calls + at % 5, engines.calls + 10_000))
        try:
            state = matcher.settle(more)
            if state != ENDED:
                mask = bits(matcher.mask(state))
        except GrammarError as error:
            assert "made to fail" in str(error) or not twin.allowed(more)  # noqa: PT017
        else:
            assert state == ENDED or mask == twin.allowed(more)
        engines.at = set()
        text = more
        if twin.allowed(text) is not None or twin.ended(text):
            answers(matcher, twin, matcher.settle(text), text)


# The same with real engines, kept on a short leash.


def mask_after(text: str, engines: Compiled, ends: Sequence[int] = (EOS,)) -> frozenset[int]:
    matcher = Matcher(engines, ends, vocabulary().size)
    return bits(matcher.mask(matcher.settle(spell(text))))


def leash(**limits: int) -> Any:
    return mock.patch.dict(grammars._LIMITS, limits)


EXPLODES = "x[a-z]*|y(.|\n)*a.{9}c"


@pytest.mark.parametrize(
    ("make", "limits", "says"),
    [
        (lambda: Grammar.regex(EXPLODES), {"step_lexer_fuel": 100}, "too many expressions"),
        (lambda: named("sums"), {"step_max_items": 1}, "Too many items"),
        (lambda: Grammar.regex(EXPLODES), {"initial_lexer_fuel": 1}, "too big"),
    ],
    ids=["fuel", "items", "start"],
)
def test_limits_are_errors_in_the_engines_words(make: Any, limits: dict[str, int], says: str) -> None:
    """The engine would go on with a mask of the end token alone."""
    grammar = make()
    with leash(**limits), pytest.raises(GrammarError, match=says) as caught:
        mask_after("y" if "fuel" in str(limits) else "", Compiled(grammar, vocabulary()))
    assert "<" not in str(caught.value), "the engine's state is no news to a user"


def test_draft_on_which_the_engine_gives_up_leaves_the_text_unharmed() -> None:
    """Fuel suffices for "y" and not for "ya": the draft is lost, the text is not, nor is another request's."""
    grammar, size = Grammar.regex(EXPLODES), vocabulary().size
    y, a = spell("ya")
    with leash(step_lexer_fuel=1000):
        engines = Compiled(grammar, vocabulary())
        matcher, other = Matcher(engines, (EOS,), size), Matcher(engines, (EOS,), size)
        matcher.settle([y])
        before = matcher.mask(ROOT).copy()
        child = matcher.child(ROOT, a)
        assert matcher.enter(ROOT, a) == -1
        assert matcher.enter(child, a) == -1
        assert not matcher.enter_at(child)
        with pytest.raises(GrammarError, match="too many expressions"):
            matcher.mask(child)
        left = matcher.prune(Draft(np.array([y, a, a, y]), np.array([-1, 0, 1, 0])))
        assert left.tokens.tolist() == [y, a, y]
        matcher.complete(left)
        assert matcher.mask(ROOT).tobytes() == before.tobytes()
        assert bits(matcher.mask(matcher.child(ROOT, y))) >= {y, a}
        assert bits(other.mask(other.settle(spell("xab")))) >= {a, y, EOS}
        assert bits(matcher.mask(matcher.settle(spell("xab")))) >= {a, y, EOS}
        with pytest.raises(GrammarError):
            other.mask(other.settle([y, a]))
        assert bits(other.mask(other.settle([y]))) == bits(before)


def test_end_and_back_again() -> None:
    """The engine takes the end for a token, and does not write it down."""
    twin = naive("regex")
    matcher = twin.matcher()
    for text in ("12", "ab1", "aab", "7", "ab123.5"):
        tokens = spell(text)
        assert matcher.settle(tokens) == ROOT
        assert matcher.accepts() == (text != "aab")
        for ended in ([*tokens, EOS], [*tokens, EOS, EOS], [*tokens, EOS, *tokens]):
            assert matcher.settle(ended) == ENDED
            assert bits(matcher.mask(matcher.root)) == {EOS}
        for back in (tokens, tokens[:1], [], tokens):
            answers(matcher, twin, matcher.settle(back), back)
            answers(matcher, twin, matcher.settle([*back, EOS]), [*back, EOS])


def test_text_that_ends_is_remembered_by_no_mask_before_it() -> None:
    """What was known of the text before its end must not be taken for the mask of the next text."""
    twin = naive("prefixes")
    matcher = twin.matcher()
    a, b = spell("ab")
    matcher.mask(matcher.settle([a]))
    matcher.settle([a, EOS])
    assert matcher.accepts(matcher.root)
    answers(matcher, twin, matcher.settle([a, b]), [a, b])
    matcher.settle([a, b, EOS])
    assert matcher.accepts()
    answers(matcher, twin, matcher.settle([]), [])


def test_text_outside_of_the_grammar_may_only_end() -> None:
    matcher = naive("regex").matcher()
    assert matcher.settle(spell("zz")) == ENDED
    assert bits(matcher.mask(matcher.root)) == {EOS}
    assert len(matcher.prune(Draft.chain(spell("z12")))) == 1


def test_two_threads_with_a_request_each() -> None:
    """One grammar, one tokenizer; engines are used by one request at a time."""
    failures: list[BaseException] = []
    twins = [Naive("recursive") for _ in range(2)]

    def work(twin: Naive) -> None:
        try:
            for seed in range(12):
                matcher = twin.matcher()
                session(matcher, twin, seed)
                matcher.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(twin,)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_masks_and_not_the_engines_patience_judge_a_draft() -> None:
    """Where text is forced, the mask is one canonical token; the engine would also take it letter by letter."""
    matcher = Matcher(compiled(Grammar.regex("name: the"), vocabulary()), (EOS,), vocabulary().size)
    letter, whole = spell("n")[0], vocabulary().encode("name")[0]
    assert matcher._engine.deep_copy().consume_token(letter)
    assert bits(matcher.mask(ROOT)) == {whole}
    assert matcher.child(ROOT, letter) == ENDED
    assert len(matcher.prune(Draft.chain([0, letter]))) == 1


def test_lexer_is_greedy() -> None:
    """A keyword that is also a word stays both; a word takes all the letters there are."""
    matcher = naive("greedy").matcher()
    for text in ("the", "then", "th", "the ", "the 12"):
        assert matcher.settle(spell(text)) == ROOT
        assert matcher.accepts(), text
    assert matcher.settle(spell("the  ")) == ENDED
    greedy = Grammar.lark('start: /[a-z]+/ "z"')
    assert not any(greedy.accepts(text) for text in ("az", "z", "azz"))


def test_dead_ends_are_named() -> None:
    with pytest.raises(GrammarError, match="its vocabulary cannot write"):
        mask_after("a", compiled(Grammar.regex("a日"), vocabulary()))
    with pytest.raises(GrammarError, match="set eos_token_id"):
        mask_after("a", compiled(Grammar.regex("a"), vocabulary()), ends=())
    matcher = Matcher(compiled(Grammar.regex("a"), vocabulary()), (), vocabulary().size)
    assert matcher.accepts(matcher.settle(spell("a")))
    assert not matcher.accepts(matcher.settle([]))
