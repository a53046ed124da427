"""Laws of `stream_json`: values grow, the last one is that of `generate_json`, and no thread is left behind."""

from __future__ import annotations

import copy
import gc
import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any

import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import json_tokenizer
from pydantic import Field
from typing_extensions import TypedDict
from values import FORMS, Colour, Drawing, Picky, Row, grows, model

from lookahead import InvalidArgument, Lookahead
from lookahead.errors import IncompleteJson, InvalidValue
from lookahead.structured.generate import generate_json, stream_json
from lookahead.structured.partial import partial_json, same


def streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lookahead-stream"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert streams() == []


@pytest.mark.law
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [None, 4])
def test_a_stream_grows_to_the_value(form: str, seed: int | None) -> None:
    sampling = {} if seed is None else {"do_sample": True}
    torch.manual_seed(seed or 0)
    expected = generate_json(model(), json_tokenizer(), "ab", FORMS[form], **sampling)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed or 0)
    stream = stream_json(model(), json_tokenizer(), "ab", FORMS[form], **sampling)
    values = list(stream)
    assert values[-1] == expected.value
    assert type(values[-1]) is type(expected.value)
    assert stream.result is not None
    assert (stream.result.value, stream.result.text) == (expected.value, expected.text)
    whole = json.loads(expected.text)
    for earlier, later in zip([None, *values[:-1]], [*values[:-1], whole], strict=True):
        assert grows(earlier, later)
    assert not any(same(a, b) for a, b in pairwise(values))
    assert torch.random.get_rng_state().equal(state)
    assert list(stream) == []


class Exact(TypedDict):
    x: Annotated[float, pydantic.WithJsonSchema({"const": 1})]


def test_the_last_value_of_a_stream_is_validated_where_it_equals_the_one_before() -> None:
    values = list(stream_json(model(), json_tokenizer(), "x", Exact))
    assert [type(value["x"]) for value in values if value] == [int, float]


def test_values_of_a_stream_may_be_changed() -> None:
    expected = list(stream_json(model(), json_tokenizer(), "x", Drawing))
    found = []
    for value in stream_json(model(), json_tokenizer(), "x", Drawing):
        found.append(copy.deepcopy(value))
        if isinstance(value, dict):
            value.clear()
    assert found == expected


def test_a_stream_computes_as_its_thread_does() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = []
        hook = model("float32").lm_head.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
        with hook:
            list(stream_json(model("float32"), json_tokenizer(), "x", Colour))
    assert set(seen) == {torch.bfloat16}


def test_a_stream_shows_more_than_its_end() -> None:
    assert len(list(stream_json(model(), json_tokenizer(), "x", Drawing))) > 3


def test_an_early_end_of_a_stream_is_raised_after_what_is_there() -> None:
    stream, values = stream_json(model(), json_tokenizer(), "x", Drawing, max_new_tokens=12), []
    with pytest.raises(IncompleteJson) as caught:
        values.extend(stream)
    assert values[-1] == caught.value.partial


def test_a_refused_value_of_a_stream_is_raised() -> None:
    with pytest.raises(InvalidValue):
        list(stream_json(model(), json_tokenizer(), "x", Picky))


class Hook:
    """Counts the passes of a model, and may fail in one."""

    def __init__(self, fail: BaseException | None = None) -> None:
        self.passes, self.fail = 0, fail
        self.handle = model().register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.passes += 1
        if self.fail is not None and self.passes > 2:
            raise self.fail

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("way", ["close", "with", "del", "break"])
def test_closing_a_stream_stops_its_thread(way: str) -> None:
    endless = Annotated[str, Field(min_length=5000)]
    with Hook() as hook:
        stream = stream_json(Lookahead(model(), json_tokenizer(), nodes=0), None, "x", endless, max_new_tokens=900)
        if way == "with":
            with stream:
                next(stream)
        elif way == "break":
            for _ in stream:
                break
            stream.close()
        else:
            next(stream)
            assert len(streams()) == 1
            if way == "close":
                stream.close()
                stream.close()
            else:
                del stream
                gc.collect()
        assert streams() == []
        assert hook.passes < 500


def test_a_stream_that_was_not_begun_has_no_thread() -> None:
    with Hook() as hook, stream_json(model(), json_tokenizer(), "x", Row):
        assert streams() == []
    assert hook.passes == 0


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_failures_of_the_thread_are_raised(error: BaseException) -> None:
    with Hook(error), pytest.raises(type(error)) as caught:
        list(stream_json(model(), json_tokenizer(), "x", Drawing, memory=False))
    assert caught.value is error


def test_a_stream_refuses_at_once() -> None:
    with pytest.raises(InvalidArgument, match="stream_json"):
        stream_json(model(), json_tokenizer(), ["x", "y"], Row)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="streamer"):
        stream_json(model(), json_tokenizer(), "x", Row, streamer=object())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("12", None),
        ('{"a": 12', {}),
        ('{"a": 12,', {"a": 12}),
        ('{"a": -', {}),
        ("[1, 2.5e", [1]),
        ('["12', ["12"]),
        ('{"a": "b: 12', {"a": "b: 12"}),
        ('{"a 12', {}),
        ('"x\\u00', "x"),
        ("[tru", []),
        ("[true", [True]),
        ("[" * 1000, None),
    ],
)
def test_partial_values(text: str, value: Any) -> None:
    assert same(partial_json(text), value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.booleans(), st.sampled_from([None, 2]))
def test_partial_values_only_grow(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    last = None
    for end in range(len(text) + 1):
        partial = partial_json(text[:end])
        assert grows(last, partial)
        last = partial
    if isinstance(value, (dict, list, str)):
        assert same(last, json.loads(text))
