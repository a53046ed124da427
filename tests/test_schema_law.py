"""The first law under a grammar, and what a schema promises of texts that end.

`pytest tests/test_schema_law.py --law-examples 3000 --law-seed 1` draws 1,500 cases that nobody has seen before.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker
from law import Case, assert_exact, assert_steps_fit, grammar_of
from models import json_tokenizer
from schemas import schemas, values, written

from lookahead.grammar.grammar import Grammar
from lookahead.grammar.matcher import ENDED
from lookahead.grammar.vocabulary import Vocabulary

pytestmark = [
    pytest.mark.law,
    pytest.mark.filterwarnings("ignore:Passing `(repetition_penalty|no_repeat_ngram_size)` with `inputs_embeds`"),
]

QUICK = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]
SOURCES = ("grammar", "prompt+recycle+grammar", "prompt+pool+recycle+grammar", "pool+grammar", "recycle")
TEXTS = (
    "regex:(ab|[0-9]{1,3})(, (ab|[0-9]{1,3}))*",
    'lark:start: "f(" [arg ("," arg)*] ")"\narg: /[a-z]{1,3}/ | "f(" arg ")"',
    "regex:[^x]*",
    'lark:start: WORD ("-" WORD)*\nWORD: /[a-z]+/',
)
# Those after which a text may leave the grammar: they can forbid all that it allows.
SAFE = {
    "repetition_penalty": st.sampled_from((0.8, 1.3, 2.0)),
    "temperature": st.sampled_from((0.5, 1.7)),
    "top_k": st.sampled_from((1, 4, 20)),
    "top_p": st.sampled_from((0.5, 0.9)),
    "num_return_sequences": st.sampled_from((2, 3)),
    "exponential_decay_length_penalty": st.just((4, 1.3)),
}
UNSAFE = {
    "no_repeat_ngram_size": st.sampled_from((2, 3)),
    "min_new_tokens": st.integers(1, 20),
    "suppress_tokens": st.lists(st.integers(3, 80), min_size=1, max_size=6).map(tuple),
    "forced_eos_token_id": st.just(1),
    "bad_words_ids": st.lists(st.lists(st.integers(3, 80), min_size=1, max_size=2).map(tuple), max_size=3).map(tuple),
    "guidance_scale": st.just(1.5),
}


def some(share: int) -> Any:
    """Return settings for one of so many shares of the cases that are asked for."""
    law = settings.get_profile("law")
    return settings(law, max_examples=max(10, law.max_examples // share), suppress_health_check=QUICK)


def grammars() -> Any:
    return schemas().map(json.dumps) | schemas().map(json.dumps) | st.sampled_from(TEXTS)


@st.composite
def cases(draw: Any, **fixed: Any) -> Case:
    """Draw a call of `generate()` under a grammar."""
    rows, sample = draw(st.sampled_from((1, 2, 3))), draw(st.booleans())
    one: Any = draw(grammars())
    each = rows > 1 and draw(st.booleans())
    grammar = tuple(draw(grammars() | st.just("")) if i else one for i in range(rows)) if each else one
    table = SAFE | UNSAFE if draw(st.integers(0, 2)) == 0 else SAFE
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=2, unique=True))
    options = {name: draw(table[name]) for name in names}
    eos = draw(st.sampled_from(((1,), (1,), (), (1, 20), (76,), (1, 69, 4))))
    if not sample:
        for name in ("temperature", "top_k", "top_p", "num_return_sequences"):
            options.pop(name, None)
    if not eos:
        options.pop("exponential_decay_length_penalty", None)
    embeds = draw(st.sampled_from(("no", "no", "no", "alone", "with ids")))
    if embeds != "no" or "num_return_sequences" in options:
        options.pop("guidance_scale", None)
    cache = draw(st.sampled_from(("own", "own", "own", "user", "full", "new"))) if embeds == "no" else "own"
    if cache != "own":
        options.pop("num_return_sequences", None)
        options.pop("guidance_scale", None)
    door = draw(st.sampled_from(("object", "function", "custom")))
    arguments: dict[str, Any] = {
        "family": draw(st.sampled_from(("llama", "gpt2", "qwen3"))),
        "seed": draw(st.integers(0, 2**20)),
        "rows": rows,
        "prompt": draw(st.integers(1, 8)),
        "mask": "left",
        "new": draw(st.sampled_from((24, 40, 12, 64, 1))),
        "sample": sample,
        "eos": eos,
        "options": tuple(options.items()),
        "processors": draw(st.sampled_from(((), (), (), ("Counting",), ("Stateless", "InPlace")))),
        "criteria": draw(st.sampled_from(((), (), (), ("PerRow",), ("Alarm",)))),
        "output": draw(st.sampled_from(("ids", "ids", "dict", "scores", "all"))),
        "streamer": door != "custom" and rows == 1 and draw(st.booleans()),
        "embeds": embeds,
        "cache": cache,
        "drafter": draw(st.sampled_from(("oracle", "adversary", "relay", *SOURCES))),
        "error": draw(st.sampled_from((0.0, 0.1, 0.3))),
        "nodes": draw(st.sampled_from((16, 48, 8, 3, 1, 0))),
        "budget": draw(st.sampled_from(("fixed", "dice", "clock"))),
        "door": door,
        "calls": draw(st.sampled_from((1, 1, 2))),
        "grammar": grammar,
    }
    return Case(**arguments | fixed)


def each_row(case: Case, rows: int) -> list[str]:
    """Return the grammar of each row of the output."""
    given = case.grammar if isinstance(case.grammar, tuple) else (case.grammar,)
    return [text for text in given for _ in range(rows // len(given))]


def text_of(case: Case, answer: list[int]) -> str | None:
    """Return what was generated before the first end token; None where there is none."""
    ends = case.eos or (1,)
    end = next((i for i, token in enumerate(answer) if token in ends), None)
    return None if end is None else Vocabulary.of(json_tokenizer()).decode(answer[:end]).decode(errors="replace")


def checked(schema: Any, text: str) -> None:
    """Raise an error unless `text` is JSON that is valid against `schema`."""
    formats = FormatChecker(["date", "ipv4", "uuid"])
    Draft202012Validator(schema, format_checker=formats).validate(json.loads(text))


def assert_promised(case: Case, answers: list[list[int]]) -> int:
    """Raise AssertionError unless what has ended is in its grammar, and valid JSON; return how many have."""
    ended = 0
    for grammar, answer in zip(each_row(case, len(answers)), answers, strict=True):
        text = text_of(case, answer)
        if not grammar or text is None:
            continue
        ended += 1
        assert grammar_of(grammar).accepts(text), f"{case!r}\n{text!r} is not in {grammar}"
        if not grammar.startswith(("regex:", "lark:")):
            checked(json.loads(grammar), text)
    return ended


@some(2)
@given(case=cases())
def test_drafting_never_changes_constrained_output(case: Case) -> None:
    result = assert_exact(case)
    if result.error is not None:
        event(f"plain generate() fails, and so do we: {type(result.error).__name__}")
        return
    event("drafts are accepted" if any(max(one.committed) > 1 for one in result.last.passes) else "none is accepted")
    if case.criteria or case.cache in ("full", "new") or any(name in UNSAFE for name, _ in case.options):
        return
    event(f"{min(assert_promised(case, result.answers), 1)} or more rows end")


@some(10)
@given(case=cases(criteria=(), cache="own", calls=1, door="object", options=()))
def test_steps_tell_drafters_what_happened(case: Case) -> None:
    if case.nodes > 0:
        assert_steps_fit(case)


BATTERY = (
    ('{"type":"object","properties":{"a":{"type":"boolean"},"id":{"enum":["x",1,null]}},"required":["a","id"],'
     '"additionalProperties":false}'),
    '{"type":"array","items":{"type":"string","maxLength":3},"maxItems":3}',
    '{"$defs":{"n":{"type":"object","properties":{"n":{"anyOf":[{"$ref":"#/$defs/n"},{"type":"null"}]}},'
    '"required":["n"],"additionalProperties":false}},"$ref":"#/$defs/n"}',
    TEXTS[0],
)  # fmt: skip


@pytest.mark.parametrize("drafter", ["oracle", "adversary", *SOURCES])
@pytest.mark.parametrize("grammar", BATTERY, ids=["object", "array", "chain", "regex"])
def test_battery(grammar: str, drafter: str) -> None:
    base = Case(rows=3, mask="left", new=60, eos=(1,), drafter=drafter, output="scores", grammar=grammar)
    ended = 0
    changes: Any = ({}, {"sample": True}, {"rows": 1, "output": "ids", "calls": 3}, {"door": "custom"})
    for seed, changed in enumerate(changes):
        case = replace(base, seed=seed, **changed)
        result = assert_exact(case)
        ended += assert_promised(case, result.answers)
    assert ended, "the law says little where nothing ends"


def test_forced_text_is_drafted_and_accepted() -> None:
    """Of a long constant nearly every token comes without a pass of its own."""
    grammar = json.dumps({"const": {"kind": "name of the abc", "id": [10, 12, 20], "the": {"na": "null and true"}}})
    result = assert_exact(Case(new=100, eos=(1,), output="ids", drafter="grammar", grammar=grammar, nodes=24))
    assert assert_promised(Case(eos=(1,), grammar=grammar), result.answers) == 1
    assert result.last.tokens_per_pass > 2


# What a schema promises, without a model.


def valid(schema: Any) -> Draft202012Validator:
    return Draft202012Validator(schema)


def printable(value: Any) -> bool:
    """Whether the engine can write it: it knows no control character without a letter, and no lone surrogate."""
    if isinstance(value, dict):
        return all(printable(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(map(printable, value))
    return not isinstance(value, str) or all(c in "\b\f\n\r\t" or " " <= c != "\x7f" for c in value)


@st.composite
def schema_and_value(draw: Any) -> tuple[dict[str, Any], Any]:
    schema = draw(schemas())
    return schema, draw(values(schema))


@some(2)
@given(drawn=schema_and_value())
def test_valid_values_are_accepted(drawn: tuple[dict[str, Any], Any]) -> None:
    schema, value = drawn
    if not printable(value) or not valid(schema).is_valid(value):
        event("no valid value")
        return
    grammar, text = Grammar.json_schema(schema), written(value, schema, valid(schema))
    assert json.loads(text) == value
    assert grammar.accepts(text), f"{text} is refused by {schema}"
    vocabulary = Vocabulary.of(json_tokenizer())
    tokens = vocabulary.encode(text)
    if vocabulary.decode(tokens) == text.encode():
        matcher = grammar.matcher(json_tokenizer())
        for i, token in enumerate(tokens):
            matcher.settle(tokens[:i])
            if not matcher.allows(matcher.root, token):
                event("spelled otherwise")  # forced text has one spelling, which need not be the tokenizer's here
                return
        assert matcher.settle(tokens) != ENDED
        assert matcher.accepts()
        event("accepted token by token")


_other = st.none() | st.booleans() | st.integers(-200, 200) | st.text("abx é", max_size=8) | st.just([]) | st.just({})


@st.composite
def mutated(draw: Any, value: Any) -> Any:
    """Draw a value that differs in one place."""
    if isinstance(value, list) and value and draw(st.booleans()):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(mutated(value[i])), *value[i + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(list(value)))
        return {k: draw(mutated(v)) if k == key else v for k, v in value.items()}
    if isinstance(value, list):
        return draw(st.sampled_from((value[:-1], [*value, *value], [*value, draw(_other)])) | _other)
    if isinstance(value, dict):
        less = dict(list(value.items())[:-1])
        return draw(st.sampled_from((less, value | {"more": draw(_other)}, value | {"a": draw(_other)})) | _other)
    if isinstance(value, str):
        return draw(st.sampled_from((value + "x", value[:-1], value * 3, value.upper())) | _other)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return draw(st.sampled_from((-value, value + 1, value * 10, value + 0.5, str(value))) | _other)
    return draw(_other)


@some(2)
@given(data=st.data())
def test_invalid_values_are_refused(data: Any) -> None:
    schema, value = data.draw(schema_and_value())
    wrong = data.draw(mutated(value))
    grammar = Grammar.json_schema(schema)
    for text in (written(wrong, schema, valid(schema)), json.dumps(wrong, ensure_ascii=False)):
        if grammar.accepts(text):
            assert valid(schema).is_valid(json.loads(text)), f"{text} is accepted by {schema}"
            event("still valid")
        else:
            event("refused")


@some(2)
@given(schema=schemas(), seed=st.integers(0, 2**32), whitespace=st.sampled_from(("fixed", "compact", "indented")))
def test_whatever_the_masks_allow_is_valid(schema: dict[str, Any], seed: int, whitespace: Any) -> None:
    """A walk at random through the masks, without a model; where it ends, there is a valid value."""
    draw, vocabulary = random.Random(seed), Vocabulary.of(json_tokenizer())
    matcher, text = Grammar.json_schema(schema, whitespace=whitespace).matcher(json_tokenizer()), []
    for _ in range(150):
        allowed = np.flatnonzero(np.unpackbits(matcher.mask(matcher.settle(text)).view(np.uint8), bitorder="little"))
        closers = [t for t in allowed if vocabulary.bytes[t][:1] in (b'"', b"]", b"}")]
        if 1 in allowed and draw.random() < 0.7:
            checked(schema, vocabulary.decode(text).decode())
            event("ended")
            return
        text.append(int(draw.choice(closers if closers and draw.random() < 0.4 else allowed.tolist())))
    event("goes on")
