"""Laws of `generate_json` and its kin: texts are those of plain constrained `generate()`, and nothing is lost."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest
import torch
from models import EOS, JSON_VOCAB, PAD, json_tokenizer
from pydantic import BaseModel, Field
from transformers import GenerationConfig, StoppingCriteria
from values import (
    FORMS,
    LONG,
    PROMPTS,
    ROW_SCHEMA,
    Broken,
    Circle,
    Colour,
    Digit,
    Drawing,
    Picky,
    Point,
    Row,
    Square,
    early,
    grows,
    model,
    plain,
)

from lookahead import Draft, Drafter, InvalidArgument, Lookahead
from lookahead.errors import GrammarError, IncompleteJson, IncompleteText, InvalidValue
from lookahead.grammar.grammar import Grammar
from lookahead.structured.call import Call
from lookahead.structured.generate import (
    Result,
    generate_choice,
    generate_grammar,
    generate_json,
    generate_regex,
    stream_json,
)
from lookahead.structured.memory import memory_of
from lookahead.structured.schemas import FORMATS, Shape, schema_of

# -- the text ----------------------------------------------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_text_is_that_of_plain_constrained_generate(form: str, seed: int | None) -> None:
    schema, sampling = FORMS[form], {} if seed is None else {"do_sample": True, "temperature": 1.3}
    grammar = Shape.of(schema).grammar()
    for prompt in PROMPTS:
        expected = plain(prompt, grammar, seed=seed, **sampling)
        if seed is not None:
            torch.manual_seed(seed)
        result = generate_json(model(), json_tokenizer(), prompt, schema, max_new_tokens=LONG, **sampling)
        assert result.text == expected
        assert grammar.accepts(result.text)
        adapter = Shape.of(schema).adapter
        assert result.value == (json.loads(result.text) if adapter is None else adapter.validate_json(result.text))


@pytest.mark.law
@pytest.mark.parametrize("whitespace", ["fixed", "compact", "indented"])
def test_white_space_is_as_asked(whitespace: Any) -> None:
    result = generate_json(model(), json_tokenizer(), "x", Row, whitespace=whitespace, max_new_tokens=LONG)
    assert result.text == plain("x", Shape.of(Row).grammar(whitespace=whitespace))
    if whitespace != "indented":
        separators = (", ", ": ") if whitespace == "fixed" else (",", ":")
        assert json.dumps(json.loads(result.text), separators=separators, ensure_ascii=False) == result.text


@pytest.mark.law
def test_random_generator_is_left_as_plain_leaves_it() -> None:
    grammar, sampling = Shape.of(Drawing).grammar(), {"do_sample": True, "top_k": 20}
    text = plain("ab", grammar, seed=7, **sampling)
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    assert generate_json(model(), json_tokenizer(), "ab", Drawing, max_new_tokens=LONG, **sampling).text == text
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.law
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["model", "schema", "literal"])
def test_a_batch_is_its_prompts_one_by_one(form: str, dtype: str) -> None:
    prompts = [*PROMPTS, "the name of the kind is the id"]
    batch = generate_json(model(dtype), json_tokenizer(), prompts, FORMS[form], max_new_tokens=LONG)
    grammar = Shape.of(FORMS[form]).grammar()
    assert [result.text for result in batch] == [plain(prompt, grammar, dtype=dtype) for prompt in prompts]
    singles = [generate_json(model(dtype), json_tokenizer(), p, FORMS[form], max_new_tokens=LONG) for p in prompts]
    assert [result.value for result in batch] == [result.value for result in singles]
    assert len({id(result.trace) for result in batch}) == 1


def test_one_prompt_in_a_list_gives_a_list() -> None:
    results = generate_json(model(), json_tokenizer(), ("x",), Colour)
    assert [type(result) for result in results] == [Result]


def test_kinds_of_values() -> None:
    torch.manual_seed(0)
    drawing = generate_json(model(), json_tokenizer(), "x", Drawing, do_sample=True).value
    assert isinstance(drawing, Drawing)
    assert isinstance(drawing.colour, Colour)
    assert isinstance(generate_json(model(), json_tokenizer(), "x", Point).value, Point)
    assert isinstance(generate_json(model(), json_tokenizer(), "x", set[bool] | None).value, set | None)
    assert isinstance(generate_json(model(), json_tokenizer(), "x", ROW_SCHEMA).value, dict)


def test_special_tokens_and_prompt_are_no_part_of_text_or_value() -> None:
    tokenizer, prompt = json_tokenizer(), "<bos><eos>the <pad>"
    result = generate_json(model(), tokenizer, prompt, Annotated[str, Field(min_length=3, max_length=9)])
    assert result.text == json.dumps(result.value, ensure_ascii=False)
    assert set(tokenizer(result.text)["input_ids"]) & {0, EOS, PAD} == set()
    assert generate_json(model(), tokenizer, [prompt, "a"], Colour)[0].text in ('"red"', '"the blue"')


def test_result_is_frozen_and_traced() -> None:
    result = generate_json(model(), json_tokenizer(), "x", Row)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = ""  # type: ignore[misc]
    assert result.trace.tokens == 1 + sum(each.committed[0] for each in result.trace.passes)
    assert result.trace.tokens_per_pass >= 1


# -- prompts -----------------------------------------------------------------------------------------------------------


def chatty() -> Any:
    tokenizer = copy.deepcopy(json_tokenizer())
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{{ extra }}{% if add_generation_prompt %}<answer>{% endif %}"
    return tokenizer


def test_chat_goes_through_the_template() -> None:
    turns, other = [{"role": "user", "content": "name the id"}], [{"role": "system", "content": "ab"}]
    tokenizer, grammar = chatty(), Shape.of(Row).grammar()
    texts = [plain(text, grammar) for text in ("<user>name the id<answer>", "<system>ab<answer>", "x")]
    assert generate_json(model(), tokenizer, turns, Row).text == texts[0]
    assert [result.text for result in generate_json(model(), tokenizer, [turns, other, "x"], Row)] == texts


def test_chat_templates_take_arguments() -> None:
    turns, given = [{"role": "user", "content": "name the id"}], {"chat_template_kwargs": {"extra": "12"}}
    text = plain("<user>name the id12<answer>", Shape.of(Row).grammar())
    assert generate_json(model(), chatty(), turns, Row, **given).text == text
    with pytest.raises(InvalidArgument, match="chat_template_kwargs"):
        generate_json(model(), chatty(), "name the id", Row, **given)


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no chat template"):
        generate_json(model(), json_tokenizer(), [{"role": "user", "content": "hi"}], Row)


@pytest.mark.parametrize("prompt", [[], 3, None, "", ["a", 3], [[]], ["a", []], [{"role": "user"}, "a"], b"ab"])
def test_prompts_that_are_none_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="prompt"):
        generate_json(model(), chatty(), prompt, Row)


def test_the_tokenizer_is_left_as_it_is() -> None:
    tokenizer = copy.deepcopy(json_tokenizer())
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    nameless = copy.copy(model())
    nameless.generation_config = GenerationConfig()
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.backend_tokenizer.to_str())
    assert Call(nameless, tokenizer, "x", Shape.of(Row).grammar(), {}).arguments["pad_token_id"] == EOS
    texts = [result.text for result in generate_json(nameless, tokenizer, list(PROMPTS), Row)]
    assert texts == [plain(prompt, Shape.of(Row).grammar()) for prompt in PROMPTS]
    assert before == (tokenizer.padding_side, tokenizer.pad_token, tokenizer.backend_tokenizer.to_str())
    assert nameless.generation_config.pad_token_id is None


# -- early ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "list of models", "dataclass"])
def test_what_is_there_of_an_early_end_is_kept(form: str) -> None:
    text, last = plain(PROMPTS[0], Shape.of(FORMS[form]).grammar()), None
    for limit in range(1, len(json_tokenizer()(text)["input_ids"]), 3):
        error = early(PROMPTS[0], FORMS[form], max_new_tokens=limit)
        assert text.startswith(error.text)
        assert error.trace is not None
        assert error.trace.tokens == limit
        assert grows(last, error.partial)
        assert grows(error.partial, json.loads(text))
        last = error.partial
    assert last is not None


def test_a_complete_value_needs_no_end_token() -> None:
    """Where nothing but the end may follow, the length limit cuts nothing off; where more may, it is not known."""
    text = generate_json(model(), json_tokenizer(), "x", Row).text
    spelled = json_tokenizer()(text)["input_ids"]
    tokens = generate_json(model(), json_tokenizer(), "x", Row).trace.tokens - 1
    assert tokens <= len(spelled) + 8
    assert generate_json(model(), json_tokenizer(), "x", Row, max_new_tokens=tokens).text == text
    with pytest.raises(IncompleteJson):
        generate_json(model(), json_tokenizer(), "x", Row, max_new_tokens=tokens - 1)
    with pytest.raises(IncompleteText) as caught:
        generate_regex(model(), json_tokenizer(), "x", "[0-9]+", max_new_tokens=1)
    assert caught.value.text.isdigit()


def test_the_others_of_a_batch_are_kept() -> None:
    singles = {prompt: generate_json(model(), json_tokenizer(), prompt, Drawing) for prompt in PROMPTS}
    lengths = sorted({result.trace.tokens for result in singles.values()})
    assert len(lengths) > 1
    with pytest.raises(IncompleteJson, match=r"of 3: .*\.results") as caught:
        generate_json(model(), json_tokenizer(), list(PROMPTS), Drawing, max_new_tokens=lengths[-1] - 2)
    kept = caught.value.results
    for prompt, result in zip(PROMPTS, kept, strict=True):
        if isinstance(result, Result):
            assert result.text == singles[prompt].text
        else:
            assert isinstance(result, IncompleteJson)
            assert singles[prompt].text.startswith(result.text)
    assert {type(result) for result in kept} == {Result, IncompleteJson}


def test_a_list_of_one_keeps_its_error_like_any_list() -> None:
    error = early(["x"], Drawing, max_new_tokens=5)
    assert [each.text for each in error.results] == [error.text]
    assert early("x", Drawing, max_new_tokens=5).results == ()


class After(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        done = [row % 2 == 0 and ids.shape[1] >= self.length for row in range(ids.shape[0])]
        return torch.tensor(done)


def test_a_stopping_criterion_ends_a_row_early() -> None:
    """What pads the row is no part of its text."""
    prompts = ["x" * 6, "y" * 6]
    with pytest.raises(IncompleteJson) as caught:
        generate_json(model(), json_tokenizer(), prompts, Drawing, stopping_criteria=[After(10)])
    first, second = caught.value.results
    assert isinstance(second, Result)
    assert first.text == plain(prompts[0], Shape.of(Drawing).grammar(), max_new_tokens=4)
    for padding in (EOS, json_tokenizer().convert_tokens_to_ids("z")):
        given = {"stopping_criteria": [After(10)], "pad_token_id": padding}
        assert early(prompts, Drawing, **given).text == first.text


def test_errors_can_be_pickled() -> None:
    with pytest.raises(IncompleteJson) as caught:
        generate_json(model(), json_tokenizer(), "x", Row, max_new_tokens=2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.text, again.partial) == (str(caught.value), caught.value.text, caught.value.partial)


@pytest.mark.parametrize(("schema", "cause"), [(Picky, pydantic.ValidationError), (Broken, KeyError)])
def test_a_refused_value_keeps_its_text(schema: Any, cause: type[Exception]) -> None:
    with pytest.raises(InvalidValue, match=r"never good enough|lost") as caught:
        generate_json(model(), json_tokenizer(), "x", schema)
    assert isinstance(caught.value.__cause__, cause)
    assert caught.value.partial == json.loads(caught.value.text)
    with pytest.raises(InvalidValue) as caught:
        generate_json(model(), json_tokenizer(), ["x", "y"], schema)
    assert [type(error) for error in caught.value.results] == [InvalidValue] * 2
    assert isinstance(caught.value.__cause__, cause)


def test_length_is_what_the_context_leaves() -> None:
    endless, prompt = Annotated[str, Field(min_length=5000)], "x" * 900
    with pytest.raises(IncompleteJson) as caught:
        generate_json(model(), json_tokenizer(), prompt, endless)
    assert caught.value.trace is not None
    assert caught.value.trace.tokens == 1024 - len(json_tokenizer()(prompt)["input_ids"])
    with pytest.raises(InvalidArgument, match="context is 1024"):
        generate_json(model(), json_tokenizer(), "x" * 1024, endless)
    for options in ({"max_length": 10}, {"generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=PAD)}):
        with pytest.raises(IncompleteJson) as caught:
            generate_json(model(), json_tokenizer(), "x", endless, **options)
        assert caught.value.trace is not None
        assert caught.value.trace.tokens == 9


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"streamer": object()},
        {"stop_strings": ["}"]},
        {"grammar": Grammar.regex("a")},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
        {"input_ids": torch.zeros((1, 1))},
        {"attention_mask": torch.ones((1, 1))},
        {"past_key_values": object()},
        {"nodes": 3},
        {"pool": "somewhere"},
        {"remember": "all"},
        {"num_beams": 2},
        {"custom_generate": object()},
        {"memory": 3},
        {"memory": ""},
        {"whitespace": "none"},
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, Any]) -> None:
    name = "num_return_sequences" if "generation_config" in given else next(iter(given))
    with pytest.raises(ValueError, match=name):
        generate_json(model(), json_tokenizer(), "x", Row, **given)


def test_arguments_of_generate_arrive() -> None:
    given = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 0, "min_new_tokens": 3}
    expected = plain("ab", Shape.of(Row).grammar(), **given)
    assert generate_json(model(), json_tokenizer(), "ab", Row, num_return_sequences=1, **given).text == expected
    config = GenerationConfig(repetition_penalty=1.7, pad_token_id=PAD)
    assert generate_json(model(), json_tokenizer(), "ab", Row, generation_config=config).text == plain(
        "ab", Shape.of(Row).grammar(), repetition_penalty=1.7
    )


def test_own_logits_processors_come_first() -> None:
    def no_digits_but_nine(ids: Any, scores: Any) -> Any:
        digits = json_tokenizer().convert_tokens_to_ids(list("012345678"))
        return scores.index_fill(1, torch.tensor(digits), -1e9)

    text = generate_json(model(), json_tokenizer(), "x", Digit, logits_processor=[no_digits_but_nine]).text
    assert text in ("9", "99", "-9") or set(text) <= set("-9120")


def test_ends_are_those_of_the_call_or_the_model() -> None:
    other, end = copy.copy(model()), JSON_VOCAB - 1
    text = plain("x", Shape.of(Row).grammar())
    for of_model, options, used in (
        (end, {}, [end]),
        ([end, EOS], {}, [end, EOS]),
        (EOS, {"eos_token_id": end}, [end]),
    ):
        other.generation_config = GenerationConfig(eos_token_id=of_model, pad_token_id=PAD)
        call = Call(other, json_tokenizer(), "x", Shape.of(Row).grammar(), options)
        ids = Lookahead(other, json_tokenizer()).generate(**call.arguments, grammar=call.grammar)
        assert int(ids[0, -1]) in used
        assert call.arguments["eos_token_id"] == used
        assert generate_json(other, json_tokenizer(), "x", Row, **options).text == text


def test_a_model_and_a_tokenizer_are_needed() -> None:
    with pytest.raises(InvalidArgument, match="model is a str"):
        generate_json("demo", json_tokenizer(), "x", Row)
    with pytest.raises(InvalidArgument, match="tokenizer is None"):
        generate_json(model(), None, "x", Row)
    with pytest.raises(InvalidArgument, match="tokenizer is None"):
        generate_json(Lookahead(model()), None, "x", Row)


# -- schemas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [3, object(), lambda: 0, ["a"], {"type": {1, 2}}, {3: float("nan")}])
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidArgument, match="schema"):
        generate_json(model(), json_tokenizer(), "x", schema)


def test_a_type_without_json_is_refused() -> None:
    class Opaque:
        pass

    with pytest.raises(InvalidArgument, match="Opaque"):
        generate_json(model(), json_tokenizer(), "x", Opaque)
    with pytest.raises(InvalidArgument, match="no JSON Schema"):
        generate_json(model(), json_tokenizer(), "x", list[Callable[[], int]])


@pytest.mark.parametrize("schema", ["{", "[]", "3", '{"type": "nothing"}', {"not": {}}, False])
def test_what_the_engine_refuses_is_a_grammar_error(schema: Any) -> None:
    with pytest.raises(GrammarError):
        generate_json(model(), json_tokenizer(), "x", schema)


def test_lenient_leaves_keywords_out() -> None:
    schema = {"enum": ["ab", 12], "not": {"const": 3}}
    assert generate_json(model(), json_tokenizer(), "x", schema, lenient=True).value in ("ab", 12)


class Tree(BaseModel):
    properties: dict[str, int]
    format: str
    propertyNames: Path
    kids: list[Tree] = []


def test_schemas_of_types_are_closed_and_served() -> None:
    tree = schema_of(Tree)["$defs"]["Tree"]
    assert tree["additionalProperties"] is False
    assert list(tree["properties"]) == ["properties", "format", "propertyNames", "kids"]
    assert schema_of(dict[Colour, int])["properties"] == {"red": {"type": "integer"}, "the blue": {"type": "integer"}}
    assert schema_of(dict[Annotated[str, Field(pattern="^a+$")], int])["patternProperties"] == {
        "^a+$": {"type": "integer"}
    }
    assert schema_of(dict[Annotated[str, Field(max_length=3)], int])["additionalProperties"] == {"type": "integer"}
    for served in (bytes, set[int], Path, Tree, Annotated[Circle | Square, Field(discriminator="kind")]):
        assert Shape.of(served).grammar().dropped == ()


class Odd(BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    na: Any = object()
    alias: Digit = Field(alias="the id", default=3)


def test_schemas_of_types_say_no_more_than_they_must() -> None:
    assert schema_of(Odd)["properties"] == {
        "na": {},
        "the id": {"default": 3, "maximum": 120, "minimum": -3, "type": "integer"},
    }
    assert schema_of(list[int]) == {"items": {"type": "integer"}, "type": "array"}


def test_formats_are_those_of_the_engine() -> None:
    for name in FORMATS:
        assert Grammar.json_schema({"type": "string", "format": name}).dropped == ()


def test_a_schema_is_followed_as_it_is() -> None:
    """Objects of a JSON Schema are open unless it says otherwise; those of types are closed."""
    assert Shape.of({"type": "object", "properties": {}}).grammar().accepts('{"more": 1}')
    assert not Shape.of(Circle).grammar().accepts('{"kind": "circle", "radius": 1, "more": 1}')
    assert Shape.of(Square).grammar().accepts('{"kind": "square", "side": 1}')


# -- texts -------------------------------------------------------------------------------------------------------------


def test_regular_expressions_choices_and_grammars() -> None:
    regex = generate_regex(model(), json_tokenizer(), "x", "(ab|12){2,4}", max_new_tokens=LONG)
    assert regex.value == regex.text == plain("x", Grammar.regex("(ab|12){2,4}"))
    options = ["the name", "the id", "é", "th"]
    choice = generate_choice(model(), json_tokenizer(), PROMPTS, options)
    assert [result.value for result in choice] == [plain(prompt, Grammar.choice(options)) for prompt in PROMPTS]
    grammar = Grammar.lark('start: "a" (b | start)\nb: /[0-9]{1,3}/')
    result = generate_grammar(model(), json_tokenizer(), "x", grammar, max_new_tokens=LONG)
    assert grammar.accepts(result.value)


def test_texts_of_no_grammar_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="grammar is a str"):
        generate_grammar(model(), json_tokenizer(), "x", "a")  # type: ignore[call-overload]
    with pytest.raises(GrammarError):
        generate_regex(model(), json_tokenizer(), "x", "(")
    with pytest.raises(InvalidArgument):
        generate_choice(model(), json_tokenizer(), "x", [])


def test_half_a_character_is_not_shown() -> None:
    tokenizer = json_tokenizer()
    call = Call(model(), tokenizer, "x", Grammar.regex("é+"), {})
    first, second = tokenizer.convert_tokens_to_ids(["Ã", "©"])
    assert tokenizer.unk_token_id not in (first, second)
    assert [call.decode(tokens) for tokens in ([first], [first, second], [first, second, first])] == ["", "é", "é"]


# -- a Lookahead in place of the model ---------------------------------------------------------------------------------


@pytest.mark.law
def test_a_lookahead_stands_for_its_model() -> None:
    la = Lookahead(model(), json_tokenizer(), nodes=6)
    for form in ("model", "schema"):
        expected = plain("ab", Shape.of(FORMS[form]).grammar())
        assert generate_json(la, None, "ab", FORMS[form]).text == expected
        assert generate_json(la, json_tokenizer(), "ab", FORMS[form], memory=False).text == expected
        assert list(stream_json(la, None, "ab", FORMS[form]))[-1] == generate_json(la, None, "ab", FORMS[form]).value


def test_a_lookahead_knows_its_last_call(tmp_path: Path) -> None:
    la = Lookahead(model(), json_tokenizer())
    for memory in (False, True, tmp_path):
        assert generate_json(la, None, "ab", Row, memory=memory).trace is la.last


class Last(Drafter):
    """Drafts that the last token comes again."""

    def propose(self, context: Any, budget: int) -> Draft:
        return Draft.chain([int(context[-1])] * min(3, budget + 1))


def test_an_own_drafter_asks_no_memory(tmp_path: Path) -> None:
    ours = copy.copy(model())
    la = Lookahead(ours, json_tokenizer(), drafter=Last())
    assert generate_json(la, None, "ab", Row).text == plain("ab", Shape.of(Row).grammar())
    assert len(memory_of(ours)) == 0
    with pytest.raises(InvalidArgument, match="drafter"):
        generate_json(la, None, "ab", Row, memory=tmp_path)


def test_threads_may_share_a_model() -> None:
    expected = {prompt: plain(prompt, Shape.of(Drawing).grammar()) for prompt in PROMPTS}
    found: dict[str, Any] = {}

    def ask(prompt: str) -> None:
        for _ in range(3):
            found[prompt] = generate_json(model(), json_tokenizer(), prompt, Drawing).text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
