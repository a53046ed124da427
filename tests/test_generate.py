"""The door: what is refused, by which name, before anything runs; what a failure in the middle leaves behind."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as hf
from law import Case, assert_exact, difference, run
from models import FAMILIES, PAD, VOCAB, WORDS, tiny, tokenizer
from users import Recording
from zoo import zoo

import lookahead
from lookahead import (
    Draft,
    Drafter,
    InvalidArgument,
    InvalidDraft,
    Lookahead,
    LookaheadError,
    UnsupportedArgument,
    UnsupportedCache,
    UnsupportedModel,
)
from lookahead.cache import NAME
from lookahead.sampling import Sampler
from lookahead.testing import Oracle

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
IDS = torch.tensor([[5, 6, 7, 8, 5, 6]])


@pytest.fixture
def model() -> Any:
    return tiny("llama")


@pytest.fixture
def untouched(model: Any) -> Any:
    """A model whose forward must not be called."""
    with mock.patch.object(model, "forward", side_effect=AssertionError("the model ran before the refusal")):
        yield model


# What is served by others


def _static(model: Any) -> Any:
    return hf.StaticCache(config=model.config, max_cache_len=64)


REFUSED: dict[str, tuple[type[LookaheadError], Callable[[Any], dict[str, Any]]]] = {
    "num_beams": (UnsupportedArgument, lambda m: {"num_beams": 3}),
    "num_beams ": (UnsupportedArgument, lambda m: {"num_beams": 2, "do_sample": True}),
    "penalty_alpha": (UnsupportedArgument, lambda m: {"penalty_alpha": 0.6, "top_k": 4}),
    "prompt_lookup_num_tokens": (UnsupportedArgument, lambda m: {"prompt_lookup_num_tokens": 3}),
    "dola_layers": (UnsupportedArgument, lambda m: {"dola_layers": "low"}),
    "assistant_model": (UnsupportedArgument, lambda m: {"assistant_model": m}),
    "assistant_early_exit": (UnsupportedArgument, lambda m: {"assistant_early_exit": 1}),
    "use_cache=False": (UnsupportedArgument, lambda m: {"use_cache": False}),
    "output_hidden_states": (
        UnsupportedArgument,
        lambda m: {"output_hidden_states": True, "return_dict_in_generate": True},
    ),
    "cache_implementation='static'": (UnsupportedArgument, lambda m: {"cache_implementation": "static"}),
    "cache_implementation='offloaded'": (UnsupportedArgument, lambda m: {"cache_implementation": "offloaded"}),
    "token_type_ids": (UnsupportedArgument, lambda m: {"token_type_ids": torch.zeros_like(IDS)}),
    "custom_generate": (UnsupportedArgument, lambda m: {"custom_generate": lambda *a, **k: None}),
    "synced_gpus": (UnsupportedArgument, lambda m: {"synced_gpus": True}),
    "StaticCache": (UnsupportedCache, lambda m: {NAME: _static(m)}),
    "offloaded": (UnsupportedCache, lambda m: {NAME: hf.DynamicCache(offloading=True)}),
    "stop_strings": (InvalidArgument, lambda m: {"stop_strings": ["a"]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_of_other_decoders_are_refused_by_name(untouched: Any, name: str) -> None:
    if name == "token_type_ids":
        untouched = tiny("gpt2")  # the one family that takes them
    kind, arguments = REFUSED[name]
    with pytest.raises(kind) as caught:
        lookahead.generate(untouched, IDS, attention_mask=torch.ones_like(IDS), **arguments(untouched))
    assert name.strip() in str(caught.value)
    _says_what_to_do(caught.value)


IN_CONFIG = [
    name
    for name, (kind, _) in REFUSED.items()
    if kind is not InvalidArgument and name not in ("assistant_model", "custom_generate", "synced_gpus")
]


@pytest.mark.parametrize("name", IN_CONFIG)
def test_they_are_refused_through_custom_generate_too(untouched: Any, name: str) -> None:
    if name == "token_type_ids":
        untouched = tiny("gpt2")
    kind, arguments = REFUSED[name]
    la = Lookahead(untouched)
    with pytest.raises(kind, match=name.split("=")[0].strip()):
        untouched.generate(IDS, attention_mask=torch.ones_like(IDS), custom_generate=la, **arguments(untouched))


def test_output_attentions_is_refused() -> None:
    model = tiny("llama", "eager")
    with pytest.raises(UnsupportedArgument, match="output_attentions"):
        lookahead.generate(model, IDS, output_attentions=True, return_dict_in_generate=True)


def test_quantized_cache_is_refused(untouched: Any) -> None:
    with pytest.raises((UnsupportedArgument, ImportError), match=r"quantized|quanto|hqq"):
        lookahead.generate(untouched, IDS, cache_implementation="quantized")


def test_refusals_read_the_generation_config_too(untouched: Any) -> None:
    config = hf.GenerationConfig(num_beams=4, pad_token_id=PAD)
    with pytest.raises(UnsupportedArgument, match="num_beams"):
        lookahead.generate(untouched, IDS, generation_config=config)
    config = hf.GenerationConfig(stop_strings=["a"], pad_token_id=PAD)
    with pytest.raises(InvalidArgument, match="stop_strings"):
        lookahead.generate(untouched, IDS, generation_config=config)


def _says_what_to_do(error: Exception) -> None:
    advice = ("leave", "call ", "pass ", "load ", "give", "make", "choose", "ask for", "return ", "derive", "use ")
    assert any(word in str(error) for word in advice), f"no way out is named: {error}"


# Models

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "intermediate_size": 48}
UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "a state of its own kind": lambda: zoo("rwkv"),
    "some keys only": lambda: zoo("doge"),
    "_attention, which cannot take rejected tokens back": lambda: zoo("deepseek_v32"),
    "encoder": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_SMALL, add_cross_attention=True)).eval(),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_models_are_refused_before_they_run(name: str) -> None:
    model = UNSUPPORTED[name]()
    with (
        mock.patch.object(model, "forward", side_effect=AssertionError("ran")),
        pytest.raises(UnsupportedModel) as caught,
    ):
        lookahead.generate(model, IDS, max_new_tokens=4)
    assert name in str(caught.value)
    assert type(model).__name__ in str(caught.value)
    _says_what_to_do(caught.value)


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_tree_mask_is_refused(untouched: Any, kind: str) -> None:
    with mock.patch.object(untouched.config, "_attn_implementation_internal", kind):
        assert untouched.config._attn_implementation == kind
        with pytest.raises(UnsupportedModel, match=kind) as caught:
            lookahead.generate(untouched, IDS)
    _says_what_to_do(caught.value)


def test_training_mode_with_dropout_is_refused_and_without_is_not() -> None:
    dropping = copy.deepcopy(tiny("gpt2")).train()
    with pytest.raises(UnsupportedModel, match=r"training mode.*model\.eval\(\)"):
        lookahead.generate(dropping, IDS)
    without = copy.deepcopy(tiny("llama")).train()
    arguments = {"max_new_tokens": 8, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(lookahead.generate(without, IDS, **arguments), without.generate(IDS, **arguments))


def test_a_model_put_into_training_mode_later_is_refused() -> None:
    model = copy.deepcopy(tiny("gpt2"))
    la = Lookahead(model)
    model.train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        la.generate(IDS, max_new_tokens=4)


def test_dynamic_rope_is_served_up_to_its_limit() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, max_position_embeddings=16, rope_parameters=rope)).eval()
    within = {"max_new_tokens": 11, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(lookahead.generate(model, IDS, **within), model.generate(IDS, **within))
    with (
        mock.patch.object(model, "forward", side_effect=AssertionError("ran")),
        pytest.raises(UnsupportedModel) as caught,
    ):
        lookahead.generate(model, IDS, max_new_tokens=12)
    assert "dynamic" in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # llama4 is of many warnings
def test_scales_that_change_with_the_length_are_served_where_they_do_not() -> None:
    """Llama 4 scales queries by the tokens in its cache; nodes of a tree would count."""
    model = copy.deepcopy(zoo("llama4_text"))
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 600
    ids = torch.arange(3, 13)[None]
    assert torch.equal(lookahead.generate(model, ids, max_new_tokens=20), model.generate(ids, max_new_tokens=20))
    with pytest.raises(UnsupportedModel, match="scales its queries anew at 600 tokens"):
        lookahead.generate(model, ids, max_new_tokens=90)


# Arguments of our own


@pytest.mark.parametrize("nodes", [-1, 1.5, True, "x", None, 4097, np.float32(3)])
def test_nodes_is_a_whole_number(untouched: Any, nodes: Any) -> None:
    with pytest.raises(InvalidArgument, match="nodes=") as caught:
        Lookahead(untouched, nodes=nodes)
    assert repr(nodes) in str(caught.value)


def test_drafter_and_sources_are_checked(untouched: Any) -> None:
    with pytest.raises(InvalidArgument, match="drafter"):
        Lookahead(untouched, drafter=object())  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="sources"):
        Lookahead(untouched, drafter=Fixed(Draft.root(5)), sources=("prompt",))
    with pytest.raises(InvalidArgument, match=r"'promt'.*prompt"):
        lookahead.generate(untouched, IDS, sources=("promt",))
    with pytest.raises(InvalidArgument, match="str"):
        Lookahead("gpt2")


def test_lookahead_belongs_to_one_model(untouched: Any) -> None:
    la = Lookahead(tiny("gpt2"))
    with pytest.raises(InvalidArgument, match="another model"):
        untouched.generate(IDS, custom_generate=la)
    with pytest.raises(InvalidArgument, match="custom_generate=la"):
        la(untouched, IDS)


class Fixed(Drafter):
    """Proposes always the same."""

    def __init__(self, draft: Any) -> None:
        self.draft = draft

    def propose(self, context: Any, budget: int) -> Any:
        return self.draft(context) if callable(self.draft) else self.draft


GARBAGE = {
    "return a lookahead.Draft": lambda context: [int(context[-1]), 3],
    "NoneType": lambda context: None,
    "context[-1]": lambda context: Draft.chain([int(context[-1]) + 1, 3]),
    "48 tokens": lambda context: Draft.chain([int(context[-1]), VOCAB]),
    "parents": lambda context: Draft(np.array([int(context[-1]), 3]), np.array([-1, 1])),
    "token ids": lambda context: Draft.chain([int(context[-1]), -3]),
}


@pytest.mark.parametrize("words", GARBAGE)
def test_garbage_of_a_drafter_is_named(model: Any, words: str) -> None:
    drafter = Fixed(GARBAGE[words])
    with pytest.raises(InvalidDraft) as caught:
        lookahead.generate(model, IDS, drafter=drafter, max_new_tokens=9)
    assert words in str(caught.value)


class StartsAnother(Fixed):
    """Its rows are no drafters."""

    def start(self, context: Any) -> Any:
        return "row"


def test_a_row_that_is_no_drafter_is_named(model: Any) -> None:
    with pytest.raises(InvalidDraft, match=r"StartsAnother.start\(\) returned a str; return a lookahead.Drafter"):
        lookahead.generate(model, IDS, drafter=StartsAnother(None), max_new_tokens=9)


# Equal to plain generate() in what is refused by it, and in odd input


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"max_length": 3},
        {"typo": 3},
        {"temperature": 0.0, "do_sample": True},
        {"top_k": -1, "do_sample": True},
        {"num_return_sequences": 2},
        {"eos_token_id": -5, "max_new_tokens": 3},
        {"min_length": 9, "max_length": 7, "eos_token_id": 4},
        {"bad_words_ids": [[]]},
        {"max_time": 0.0},
        {"attention_mask": torch.ones(1, 4, dtype=torch.long)},
        {"attention_mask": torch.ones(1, 1, 6, 6)},
        {"sequence_bias": [[[7], 1000.0]], "max_new_tokens": 5},
        {"suppress_tokens": list(range(VOCAB)), "do_sample": True},
        {"forced_eos_token_id": [4, 9], "max_length": 12},
        {"prefix_allowed_tokens_fn": lambda row, ids: []},
    ],
    ids=lambda arguments: "-".join(arguments),
)
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")
def test_bad_and_odd_arguments_do_what_they_do_plainly(model: Any, arguments: dict[str, Any]) -> None:
    plain = _outcome(model.generate, arguments)
    ours = _outcome(lambda *a, **k: lookahead.generate(model, *a, **k), arguments)
    assert plain == ours


def _outcome(generate: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Return the ids that come out, or which error."""
    torch.manual_seed(0)
    try:
        return generate(IDS, **copy.deepcopy(arguments)).tolist()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_without_a_prompt_starts_at_bos(family: str) -> None:
    model = tiny(family)
    arguments = {"max_new_tokens": 12, "do_sample": True}
    torch.manual_seed(3)
    plain = model.generate(**arguments)
    torch.manual_seed(3)
    assert torch.equal(plain, lookahead.generate(model, **arguments))


def same(model: Any, sample: bool = False, **arguments: Any) -> bool:
    """Whether drafts, mostly right ones, change nothing; what plain fails at has to fail in the same way."""
    kept: list[Any] = []
    arguments = {"max_new_tokens": 20, "do_sample": sample} | arguments
    plain = _outcome(lambda _, **a: model.generate(**a), arguments)
    if isinstance(plain, list):
        given = arguments["input_ids"].shape[1] if "input_ids" in arguments else 0
        kept = [row[given:] for row in plain]
    la = Lookahead(model, drafter=Oracle(kept or [[]], VOCAB), nodes=16)
    return bool(plain == _outcome(lambda _, **a: la.generate(**a), arguments))


PADDED = torch.tensor([[PAD, PAD, 7, 8, 5, 6], [9, 6, 7, 8, 5, 6]])
ODD: dict[str, dict[str, Any]] = {
    "positions from 3": {"input_ids": IDS, "position_ids": torch.arange(6)[None] + 3},
    "positions with a gap": {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])},
    "positions of a batch": {
        "input_ids": PADDED,
        "position_ids": torch.tensor([[0, 1, 2, 7, 8, 9], [0, 0, 1, 2, 3, 4]]),
    },
    "mask of bool": {"input_ids": PADDED, "attention_mask": PADDED != PAD},
    "mask of int32": {"input_ids": PADDED, "attention_mask": (PADDED != PAD).int()},
    "mask of float": {"input_ids": PADDED, "attention_mask": (PADDED != PAD).float()},
    "mask inferred from padding": {"input_ids": PADDED},
    "padding on the right": {"input_ids": PADDED.flip(1), "attention_mask": (PADDED != PAD).long().flip(1)},
    "a row of padding": {"input_ids": PADDED, "attention_mask": torch.tensor([[0] * 6, [1] * 6])},
    "int32 ids": {"input_ids": IDS.int()},
    "one-dimensional ids": {"input_ids": IDS[0]},
    "more logits to keep": {"input_ids": PADDED, "logits_to_keep": 3},
    "all logits to keep": {"input_ids": PADDED, "logits_to_keep": 0},
    "embeddings of no tokens": {
        "inputs_embeds": torch.linspace(-1, 1, 5 * 32, dtype=torch.float64).sin().view(1, 5, 32)
    },
    "one token": {"input_ids": IDS, "max_new_tokens": 1},
    "length of the prompt": {"input_ids": IDS, "max_new_tokens": None, "max_length": 6},
    "nothing said about length": {"input_ids": IDS, "max_new_tokens": None},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_input_does_what_it_does_plainly(model: Any, name: str) -> None:
    assert same(model, **ODD[name])
    assert same(model, sample=True, **ODD[name])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_text_beyond_the_position_table_fails_as_it_does_plainly(family: str) -> None:
    assert same(tiny(family, max_position_embeddings=16), input_ids=IDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ids", [IDS, PADDED], ids=["alone", "batch"])
def test_logits_that_are_no_numbers(value: float, ids: Any) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight.data[17] = value
    for sample in (False, True):
        for valid in (False, True):
            assert same(model, sample, input_ids=ids, remove_invalid_values=valid)


def test_equal_logits_over_many_lanes() -> None:
    model = copy.deepcopy(tiny("llama", vocab_size=300))
    model.lm_head.weight.data[1::2] = model.lm_head.weight.data[::2]
    assert same(model, input_ids=IDS)


@pytest.mark.parametrize("ids", [IDS, PADDED], ids=["alone", "batch"])
def test_scores_of_another_dtype_and_other_watermarks(model: Any, ids: Any) -> None:
    assert same(model, True, input_ids=ids, logits_processor=[lambda ids, scores: scores.double() * 1.3])
    assert same(model, False, input_ids=ids, logits_processor=[lambda ids, scores: scores.half()])
    synth = hf.SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)
    assert same(model, True, input_ids=ids, watermarking_config=synth)


def test_cache_of_a_prefix(model: Any) -> None:
    """A cache that the model itself filled with the start of the prompt, as prompt caching does."""
    for start in (IDS, IDS[:, 3:]):
        cache = hf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS[:, :3], **{NAME: cache}, use_cache=True)
        assert same(model, True, input_ids=start, attention_mask=torch.ones_like(IDS), **{NAME: cache})


def test_caches_are_interchangeable_between_turns(model: Any) -> None:
    """What we return plain can continue, and the other way round."""
    la, texts = Lookahead(model), []
    for first, second in ((la.generate, model.generate), (model.generate, la.generate)):
        arguments = {"max_new_tokens": 15, "return_dict_in_generate": True}
        turn = first(PADDED, attention_mask=(PADDED != PAD).long(), **arguments)
        longer = torch.cat([turn.sequences, PADDED[:, 2:]], 1)
        mask = torch.cat([(PADDED != PAD).long(), torch.ones(2, 19, dtype=torch.long)], 1)
        end = second(longer, attention_mask=mask, **{NAME: turn[NAME]}, **arguments)
        assert end[NAME] is turn[NAME]
        texts.append(end.sequences.tolist())
    assert texts[0] == texts[1]


def test_inside_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        assert same(model, True, input_ids=PADDED)
    assert torch.is_grad_enabled()


def test_generation_config_of_the_user_is_read_and_left_alone(model: Any) -> None:
    config = hf.GenerationConfig(
        max_new_tokens=20, do_sample=True, top_k=8, stop_strings=["a", "9"], pad_token_id=PAD, repetition_penalty=1.2
    )
    before, own = config.to_dict(), model.generation_config.to_dict()
    arguments = {"generation_config": config, "tokenizer": tokenizer(), "attention_mask": torch.ones_like(IDS)}
    torch.manual_seed(1)
    plain = model.generate(IDS, **arguments)
    torch.manual_seed(1)
    assert torch.equal(plain, lookahead.generate(model, IDS, **arguments))
    assert config.to_dict() == before
    assert model.generation_config.to_dict() == own
    assert arguments["tokenizer"] is tokenizer()


def test_stop_strings_with_the_lookaheads_own_tokenizer(model: Any) -> None:
    la = Lookahead(model, tokenizer())
    arguments = {
        "stop_strings": ["a", "b", "c", "d", "e"],
        "max_new_tokens": 30,
        "attention_mask": torch.ones_like(IDS),
    }
    plain = model.generate(IDS, tokenizer=tokenizer(), **arguments)
    assert plain.shape[1] < 36
    assert torch.equal(plain, la.generate(IDS, **arguments))


def test_text_streamers_write_the_same(model: Any, capsys: Any) -> None:
    arguments = {"max_new_tokens": 24, "attention_mask": torch.ones_like(IDS)}
    la = Lookahead(model, drafter=Oracle(model.generate(IDS, **arguments)[:, 6:].tolist(), VOCAB))
    texts = []
    for generate in (model.generate, la.generate):
        generate(IDS, streamer=hf.TextStreamer(tokenizer(), skip_prompt=True), **arguments)
        texts.append(capsys.readouterr().out)
        lazy = hf.TextIteratorStreamer(tokenizer())
        generate(IDS, streamer=lazy, **arguments)
        texts.append(list(lazy))
    assert texts[:2] == texts[2:]
    assert len(texts[0]) > 20


# Failures in the middle


class Broken(RuntimeError):
    pass


class BreaksAt(Drafter):
    """Raises at one of its calls."""

    def __init__(self, inner: Drafter, where: str, at: int) -> None:
        self.inner, self.where, self.left = inner, where, at

    def start(self, context: Any) -> Drafter:
        self._break("start")
        return BreaksAt(self.inner.start(context), self.where, self.left)

    def propose(self, context: Any, budget: int) -> Draft:
        self._break("propose")
        return self.inner.propose(context, budget)

    def observe(self, step: Any) -> None:
        self._break("observe")

    def _break(self, where: str) -> None:
        if where == self.where:
            self.left -= 1
            if self.left == 0:
                raise Broken(where)


class BreakingStreamer(Recording):
    def put(self, value: Any) -> None:
        super().put(value)
        if len(self.log) == 7:
            raise Broken("streamer")


def breaking(at: int) -> Any:
    def criterion(ids: Any, scores: Any, **_: Any) -> Any:
        if ids.shape[1] == at:
            raise Broken("criterion")
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    return criterion


class BreakingProcessor(hf.LogitsProcessor):
    def __call__(self, ids: Any, scores: Any) -> Any:
        if ids.shape[1] == 12:
            raise Broken("processor")
        return scores


FAILURES: dict[str, Callable[[], dict[str, Any]]] = {
    "streamer": lambda: {"streamer": BreakingStreamer([])},
    "criterion": lambda: {"stopping_criteria": [breaking(12)]},
    "processor": lambda: {"logits_processor": [BreakingProcessor()]},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_in_the_middle_leaves_everything_usable(model: Any, name: str, rows: int) -> None:
    """The error comes through, the generator is where plain leaves it, and a fresh start on the user's cache works."""
    ids = IDS.expand(rows, -1).contiguous()
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": True}
    torch.manual_seed(2)
    answer = model.generate(**arguments)
    la, states = Lookahead(model, drafter=Oracle(answer[:, 6:].tolist(), VOCAB, error=0.05)), []
    for generate in (model.generate, la.generate):
        torch.manual_seed(2)
        with pytest.raises(Broken, match=name):
            generate(**arguments, **FAILURES[name]())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(2)
    assert torch.equal(la.generate(**arguments), answer)
    assert la.last is not None
    assert la.last.tokens == 20


@pytest.mark.parametrize("where", ["start", "propose", "observe"])
def test_drafter_that_fails_is_heard_and_leaves_the_lookahead_usable(model: Any, where: str) -> None:
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 20}
    plain = model.generate(IDS, **arguments)
    oracle = Oracle(plain[:, 6:].tolist(), VOCAB)
    la = Lookahead(model, drafter=BreaksAt(oracle, where, 1 if where == "start" else 2))
    with pytest.raises(Broken, match=where):
        la.generate(IDS, **arguments)
    la.drafter = oracle
    assert torch.equal(la.generate(IDS, **arguments), plain)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", FAILURES)
def test_users_cache_survives_a_failure(model: Any, name: str, rows: int) -> None:
    """What the cache holds afterwards is a prefix of what plain leaves in it, in every layer, and can be continued."""
    ids = IDS.expand(rows, -1).contiguous()
    mask = torch.ones_like(ids)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=20)
    cache, whole = hf.DynamicCache(config=model.config), hf.DynamicCache(config=model.config)
    model.generate(ids, attention_mask=mask, max_new_tokens=20, **{NAME: whole})
    la = Lookahead(model, drafter=Oracle(plain[:, 6:].tolist(), VOCAB))
    with pytest.raises(Broken, match=name):
        la.generate(ids, attention_mask=mask, max_new_tokens=20, **{NAME: cache}, **FAILURES[name]())
    held = cache.get_seq_length()
    assert 6 <= held <= 25
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys[:, :, :held], atol=1e-6)
        assert torch.allclose(ours.values, theirs.values[:, :, :held], atol=1e-6)
    longer = torch.cat([plain[:, : held + 1], torch.randint(WORDS[0], VOCAB, (rows, 2))], 1)
    arguments = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 12}
    assert torch.equal(la.generate(longer, **{NAME: cache}, **arguments), model.generate(longer, **arguments))


def test_failure_of_the_model_itself_comes_through(model: Any) -> None:
    calls = []
    forward = model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Broken("forward")
        return forward(*args, **kwargs)

    la = Lookahead(model)
    with mock.patch.object(model, "forward", failing), pytest.raises(Broken):
        la.generate(IDS, max_new_tokens=20)
    assert_exact(Case())


class Draws(Oracle):
    """An oracle that uses the generators that sampling uses, and seeds them anew."""

    def start(self, context: Any) -> Drafter:
        row = super().start(context)
        propose = row.propose

        def disturbing(context: Any, budget: int) -> Draft:
            torch.rand(3)
            torch.manual_seed(7)
            return propose(context, budget)

        row.propose = disturbing  # type: ignore[method-assign]
        row.observe = lambda step: torch.randn(2)  # type: ignore[method-assign, assignment, return-value]
        torch.rand(5)
        return row


@pytest.mark.parametrize("rows", [1, 3])
def test_drafter_that_draws_disturbs_nothing(model: Any, rows: int) -> None:
    ids = IDS.expand(rows, -1).contiguous()
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": True}
    torch.manual_seed(4)
    plain, after = model.generate(**arguments), torch.get_rng_state()
    torch.manual_seed(4)
    ours = lookahead.generate(model, drafter=Draws(plain[:, 6:].tolist(), VOCAB), **arguments)
    assert torch.equal(plain, ours)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("rows", [1, 3])
def test_guess_that_overflows_poisons_nothing(family: str, rows: int) -> None:
    """A token whose embedding is no number: plain never picks it, the drafter guesses it all the time."""
    for seed, who in enumerate(("oracle", "relay")):
        for sample in (False, True):
            options = (("suppress_tokens", (WORDS[-1],)),)
            case = Case(family=family, rows=rows, sample=sample, options=options, drafter=who, error=0.2, poison=True)
            assert_exact(replace(case, seed=seed, mask="left"))


# What the object keeps


def test_nodes_0_asks_no_drafter(model: Any) -> None:
    la = Lookahead(model, drafter=BreaksAt(Fixed(None), "start", 1), nodes=0)
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 9}
    assert torch.equal(la.generate(IDS, **arguments), model.generate(IDS, **arguments))
    assert la.last is not None
    assert [one.nodes for one in la.last.passes] == [1] * 8


def test_output_without_gradients_and_model_left_as_it_was(model: Any) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    out = lookahead.generate(model, IDS, max_new_tokens=9, return_dict_in_generate=True, output_logits=True)
    assert not out.logits[0].requires_grad
    assert out.attentions is None
    assert out.hidden_states is None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks


def test_inputs_of_the_user_are_left_alone(model: Any) -> None:
    case = Case(rows=2, mask="left", sample=True, processors=("InPlace",), output="all")
    plain = run(case, model.generate)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "stopping_criteria": []}
    lookahead.generate(model, **arguments)
    assert torch.equal(ids, IDS)
    assert torch.equal(mask, torch.ones_like(IDS))
    assert arguments["stopping_criteria"] == []
    assert difference(plain, run(case, Lookahead(model).generate)) is None


# The package


def test_import_loads_neither_torch_nor_numba() -> None:
    program = (
        "import sys, lookahead\n"
        "loaded = {'torch', 'numba', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert set(lookahead.__all__) <= set(dir(lookahead)) and lookahead.__version__\n"
        "try: lookahead.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('lookahead.nothing exists')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_there_and_no_other() -> None:
    assert sorted(lookahead.__all__) == list(lookahead.__all__)
    for name in lookahead.__all__:
        assert getattr(lookahead, name).__name__ == name
    errors = [e for e in vars(lookahead.errors).values() if isinstance(e, type) and issubclass(e, LookaheadError)]
    assert {e.__name__ for e in errors} <= set(lookahead.__all__)


def test_what_fails_ahead_of_other_rows_counts_only_when_they_get_there() -> None:
    """A row runs ahead to a column that plain generation never reaches, because a criterion ends all rows before."""
    model, prompt, most = tiny("llama"), torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1)), 30

    def last(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((2,), input_ids.shape[1] >= 6 + 12)

    pick, tried = Sampler.pick, []

    def failing(sampler: Sampler, column: int, nodes: Any, ids: Any) -> Any:
        if column >= 12:
            tried.append(column)
            raise ValueError("too far")
        return pick(sampler, column, nodes, ids)

    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": most, "do_sample": False}
    answer = model.generate(prompt, **arguments)[:, 6:]
    oracle = Oracle([answer[0].tolist(), []], VOCAB, error=0.0)  # knows the first row only
    la = Lookahead(model, drafter=oracle)
    with mock.patch.object(Sampler, "pick", failing):
        output = la.generate(prompt, stopping_criteria=[last], **arguments)
        assert tried, "no row came that far"
        assert output[:, 6:].tolist() == answer[:, :12].tolist()
        with pytest.raises(ValueError, match="too far"):
            la.generate(prompt, **arguments)


@dataclass(frozen=True)
class Again(Drafter):
    """Drafts one token again and again, and cannot be written to."""

    token: int

    def propose(self, context: Any, budget: int) -> Draft:
        return Draft.chain([int(context[-1]), *[self.token] * budget])


def test_a_drafter_that_cannot_be_written_to_serves_all_budgets(model: Any):
    plain = model.generate(IDS, max_new_tokens=12, do_sample=False)
    for nodes in ("auto", 4):
        la = Lookahead(model, drafter=Again(int(plain[0, -1])), nodes=nodes)
        assert torch.equal(la.generate(IDS, max_new_tokens=12, do_sample=False), plain)
