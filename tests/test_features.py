"""Every argument of `generate()` is served exactly or refused by name, and docs/features.md says which."""

from __future__ import annotations

import copy
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from law import Case, assert_exact, run
from models import VOCAB, tiny, tokenizer
from ranks import UNABLE
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

import lookahead
from lookahead import InvalidArgument, Lookahead, UnsupportedArgument, UnsupportedModel
from lookahead.testing import Oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:Passing `(repetition_penalty|no_repeat_ngram_size)` with `inputs_embeds`"),
    pytest.mark.filterwarnings("ignore:Passing `encoder_:UserWarning"),
]
PAGE = Path(__file__).parents[1] / "docs" / "features.md"
IDS = torch.tensor([[5, 6, 7, 8, 5, 6], [9, 6, 7, 8, 5, 6]])
CALL = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), "max_new_tokens": 24}
BASE = Case(seed=3, prompt=7, new=20, mask="left", error=0.1)


def options(**given: Any) -> dict[str, Any]:
    return {"options": tuple(given.items())}


# What is served

ENDS = {"eos": (8, 10, 34)}  # all of them in the base text
SAMPLE = {"sample": True}
SERVED: dict[str, list[dict[str, Any]]] = {
    "do_sample": [SAMPLE],
    "temperature": [SAMPLE | options(temperature=1.7)],
    "top_k": [SAMPLE | options(top_k=3)],
    "top_p": [SAMPLE | options(top_p=0.4)],
    "top_h": [SAMPLE | options(top_h=0.3)],
    "min_p": [SAMPLE | options(min_p=0.3)],
    "typical_p": [SAMPLE | options(typical_p=0.3)],
    "epsilon_cutoff": [SAMPLE | options(epsilon_cutoff=0.2)],
    "eta_cutoff": [SAMPLE | options(eta_cutoff=0.3)],
    "max_new_tokens": [{"new": 9}],
    "max_length": [options(max_length=15, max_new_tokens=None)],
    "min_length": [ENDS | options(min_length=18)],
    "min_new_tokens": [ENDS | options(min_new_tokens=12)],
    "eos_token_id": [ENDS, {"eos": (8,)}],
    "pad_token_id": [ENDS | options(pad_token_id=5)],
    "bos_token_id": [options(bos_token_id=4)],
    "forced_bos_token_id": [{"prompt": 1} | options(forced_bos_token_id=7)],
    "forced_eos_token_id": [options(forced_eos_token_id=9), options(forced_eos_token_id=(9, 4))],
    "suppress_tokens": [options(suppress_tokens=tuple(range(3, 20)))],
    "begin_suppress_tokens": [options(begin_suppress_tokens=tuple(range(3, 40)))],
    "sequence_bias": [options(sequence_bias=(((7,), 6.0), ((5, 6), -4.0)))],
    "bad_words_ids": [options(bad_words_ids=((15,), (18, 45)))],
    "prefix_allowed_tokens_fn": [options(prefix_allowed_tokens_fn="recorded")],
    "repetition_penalty": [options(repetition_penalty=1.8)],
    "no_repeat_ngram_size": [options(no_repeat_ngram_size=1)],
    "encoder_repetition_penalty": [options(encoder_repetition_penalty=3.0)],
    "encoder_no_repeat_ngram_size": [options(encoder_no_repeat_ngram_size=1)],
    "exponential_decay_length_penalty": [{"eos": (4, 9)} | options(exponential_decay_length_penalty=(1, 2.0))],
    "renormalize_logits": [SAMPLE | options(renormalize_logits=True, top_k=5)],
    "guidance_scale": [options(guidance_scale=2.5), options(guidance_scale=0.5)],
    "negative_prompt_ids": [options(guidance_scale=2.5, negative_prompt_ids=(5, 8, 11))],
    "watermarking_config": [options(watermarking_config=kind) for kind in ("lefthash", "selfhash", "synthid")],
    "num_return_sequences": [SAMPLE | options(num_return_sequences=3)],
    "stop_strings": [{"stop_strings": ("a", "th", "e", "9")}],
    "logits_processor": [{"processors": ("Stateless", "Crowd")}],
    "stopping_criteria": [{"criteria": ("Whole",)}],
    "prefill_chunk_size": [{"mask": "none"} | options(prefill_chunk_size=3)],
    "inputs_embeds": [{"embeds": "alone"}, {"embeds": "with ids"}],
    "past_key_values": [{"cache": "user"}, {"cache": "full"}, {"cache": "new"}],
    "attention_mask": [{"mask": mask} for mask in ("full", "left", "holes", "none")],
    "streamer": [{"streamer": True}],
    "return_dict_in_generate": [{"output": "dict"}],
    "output_scores": [{"output": "scores"}],
    "output_logits": [{"output": "all"}],
}
DROPPED = {"streamer", "stop_strings"}  # transformers keeps them from a callable given as custom_generate
ON_PROMPTS = {
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "repetition_penalty", "no_repeat_ngram_size",
    "forced_bos_token_id", "begin_suppress_tokens", "min_length", "min_new_tokens", "prefix_allowed_tokens_fn",
    "exponential_decay_length_penalty", "watermarking_config", "sequence_bias", "stop_strings", "max_length",
}  # fmt: skip
"""Those that count or read the prompt, of which `inputs_embeds` shows them nothing."""


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_is_exact_through_every_door(name: str) -> None:
    for given in SERVED[name]:
        case = replace(BASE, **given)
        cases = [
            replace(case, rows=3, door="object", drafter="relay"),
            replace(case, door="function"),
            replace(case, sample=True, door="object" if name in DROPPED else "custom"),
            replace(case, sample=True, rows=2, drafter="prompt+recycle", budget="clock"),
        ]
        if name in ON_PROMPTS:
            cases += [replace(case, rows=2, embeds=embeds) for embeds in ("alone", "with ids")]
        results = [assert_exact(case) for case in cases]
        assert all(result.error is None for result in results), [result.error for result in results]


ACTS = [name for name, given in SERVED.items() if any("options" in one for one in given)]
ACTS = [
    name for name in ACTS if name not in ("pad_token_id", "bos_token_id", "renormalize_logits", "prefill_chunk_size")
]


@pytest.mark.parametrize("name", ACTS)
def test_these_change_the_text_so_that_the_law_has_something_to_say(name: str) -> None:
    for given in SERVED[name]:
        case = replace(BASE, **given)
        with_it, without = (run(c, tiny("llama").generate) for c in (case, replace(case, options=())))
        assert with_it.answers[0] != without.answers[0]


@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_runs_the_model_once_a_column_and_in_order(rows: int) -> None:
    """It keeps a cache of its own, which a call too many would spoil."""
    calls: list[list[list[int]]] = []
    unconditional = Guidance.get_unconditional_logits

    def watched(self: Any, ids: torch.Tensor) -> Any:
        calls.append(ids.tolist())
        return unconditional(self, ids)

    with mock.patch.object(Guidance, "get_unconditional_logits", watched):
        for sample in (False, True):
            calls.clear()
            case = replace(BASE, rows=rows, sample=sample, eos=(8, 10), error=0.0)
            result = assert_exact(replace(case, **options(guidance_scale=2.0)))
            assert result.last.tokens_per_pass > 1.5
            assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seconds", [0.5, 6.5, 100.0])
def test_max_time_stops_after_the_same_column(rows: int, seconds: float) -> None:
    """By a clock that goes on by a second whenever it is asked."""
    for sample in (False, True):
        ticks = mock.Mock(time=count().__next__)
        with mock.patch("transformers.generation.stopping_criteria.time", ticks):
            result = assert_exact(replace(BASE, rows=rows, sample=sample, **options(max_time=seconds)))
        assert len(result.answers[0]) == min(int(seconds) + 1, BASE.new)


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_invalid_values_are_removed_where_the_text_meets_them(part: str) -> None:
    """A token whose logit is no number, and one after which no logit is a number."""
    model = copy.deepcopy(tiny("llama"))
    layer = model.get_output_embeddings() if part == "head" else model.get_input_embeddings()
    layer.weight.data[45] = float("nan")  # the base text writes it
    with mock.patch("law.tiny", return_value=model):
        for rows in (1, 3):
            for sample in (False, True):
                case = replace(BASE, rows=rows, sample=sample, **options(remove_invalid_values=True))
                assert not bool(assert_exact(case).output.scores[-1].isnan().any())


def both(model: Any, plain: Callable[..., Any], ours: Callable[..., Any], **arguments: Any) -> None:
    """Raise AssertionError unless both ways give the same text and leave the generator alike, greedy and sampled."""
    for sample in (False, True):
        outputs = []
        for generate in (plain, ours):
            torch.manual_seed(5)
            outputs.append((generate(**arguments, do_sample=sample).tolist(), torch.get_rng_state().tolist()))
        assert outputs[0] == outputs[1]


def drafting(model: Any, plain: Callable[..., Any], **arguments: Any) -> Lookahead:
    """Return a `Lookahead` whose drafts are mostly right for greedy decoding."""
    kept = plain(**arguments)[:, -arguments["max_new_tokens"] :].tolist()
    return Lookahead(model, drafter=Oracle(kept, VOCAB, error=0.1), nodes=12)


BY_HAND: dict[str, dict[str, Any]] = {
    "inputs": {"inputs": IDS},
    "position_ids": {"input_ids": IDS, "position_ids": torch.tensor([[0, 0, 1, 2, 7, 8], [0, 1, 2, 3, 4, 5]])},
    "logits_to_keep": {"input_ids": IDS, "logits_to_keep": 3},
    "generation_config": {
        "input_ids": IDS,
        "generation_config": hf.GenerationConfig(top_k=4, repetition_penalty=1.4, pad_token_id=2, max_new_tokens=24),
    },
    "negative_prompt_attention_mask": {
        "input_ids": IDS,
        "guidance_scale": 2.0,
        "negative_prompt_ids": IDS[:, :3],
        "negative_prompt_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    },
    "tokenizer": {"input_ids": IDS, "stop_strings": ["th"], "tokenizer": tokenizer()},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_rest_of_what_is_served(name: str) -> None:
    model, arguments = tiny("llama"), dict(CALL, **BY_HAND[name])
    if name == "generation_config":
        del arguments["max_new_tokens"]
    la = Lookahead(model, nodes=12)
    both(model, model.generate, la.generate, **arguments)
    if name != "tokenizer":
        both(model, model.generate, lambda **given: model.generate(**given, custom_generate=la), **arguments)


# What has no effect, plainly or here

IGNORED: dict[str, Any] = {
    "assistant_confidence_threshold": 0.2,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "max_matching_ngram_size": 3,
    "speculation_type": "dflash",
    "early_stopping": True,
    "length_penalty": 0.5,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "decoder_start_token_id": 4,
    "low_memory": True,
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 99,
    "compile_config": hf.CompileConfig(backend="eager"),
    "disable_compile": True,
    "continuous_batching_config": {},
    "trust_remote_code": True,
}


@pytest.mark.filterwarnings("ignore:.*(only used|flags? .* not valid|will be ignored|may be ignored).*")
@pytest.mark.parametrize("name", IGNORED)
def test_what_has_no_effect_has_none(name: str) -> None:
    model, la = tiny("llama"), Lookahead(tiny("llama"), nodes=12)
    arguments = CALL | {"input_ids": IDS, name: IGNORED[name]}
    both(
        model,
        lambda **given: model.generate(**CALL, input_ids=IDS, do_sample=given["do_sample"]),
        la.generate,
        **arguments,
    )
    both(model, model.generate, lambda **given: model.generate(**given, custom_generate=la), **arguments)


# What is refused

REPLACED = {
    "assistant_model": tiny("llama"),
    "assistant_tokenizer": tokenizer(),
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
}
REFUSED: dict[str, dict[str, Any]] = {name: {name: value} for name, value in REPLACED.items()} | {
    "num_beams": {"num_beams": 3},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "force_words_ids": {"force_words_ids": [[5]]},
    "constraints": {"constraints": [5]},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_attentions": {"output_attentions": True},
    "is_assistant": {"is_assistant": True},
    "token_healing": {"token_healing": True, "tokenizer": tokenizer()},
    "synced_gpus": {"synced_gpus": True},
    "custom_generate": {"custom_generate": lambda *a, **k: None},
}
HERE_ONLY = {"assistant_model", "assistant_tokenizer", "token_healing", "synced_gpus", "custom_generate"}
"""What transformers keeps from a callable given as custom_generate, or does before it."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_before_the_model_runs(name: str) -> None:
    model, la = tiny("llama", "eager"), Lookahead(tiny("llama", "eager"))
    doors: list[Callable[..., Any]] = [la.generate, lambda *ids, **given: lookahead.generate(model, *ids, **given)]
    if name not in HERE_ONLY:
        doors.append(lambda *ids, **given: model.generate(*ids, **given, custom_generate=la))
    for generate in doors:
        with mock.patch.object(model, "forward", side_effect=AssertionError("it ran")):
            with pytest.raises(UnsupportedArgument, match=name) as caught:
                generate(IDS, **CALL, **REFUSED[name])
            words = "lookahead replaces" if name in REPLACED else "leave|call |ask for|heal"
            assert re.search(words, str(caught.value)), str(caught.value)
            assert ("lookahead replaces" in str(caught.value)) == (name in REPLACED)


@pytest.mark.parametrize("given", [{"output_hidden_states": True}, {"output_hidden_states": [0]}])
def test_hidden_states_are_refused_even_where_nobody_would_see_them(given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArgument, match=r"^output_hidden_states"):
        Lookahead(tiny("llama")).generate(IDS, **CALL, **given)


# Models that are more than their own code


def compiled(**options: Any) -> Any:
    """Return a tiny model whose forward is compiled, by the backend that changes nothing."""
    torch._dynamo.reset()
    model = copy.deepcopy(tiny("llama"))
    model.forward = torch.compile(model.forward, backend="eager", **options)
    return model


@pytest.mark.parametrize("given", [{}, {"dynamic": True, "fullgraph": True}], ids=["as it is", "dynamic and whole"])
def test_compiled_forward_is_exact(given: dict[str, Any]) -> None:
    with mock.patch("law.tiny", return_value=compiled(**given)):
        for rows in (1, 2):
            assert_exact(replace(BASE, rows=rows, sample=rows == 2, error=0.0))


def test_compiled_model_is_exact_through_the_model_inside() -> None:
    torch._dynamo.reset()
    module = torch.compile(copy.deepcopy(tiny("llama")), backend="eager")
    arguments = CALL | {"input_ids": IDS}
    la = drafting(module._orig_mod, module.generate, **arguments)
    both(module, module.generate, la.generate, **arguments)
    both(module, module.generate, lambda **given: module.generate(**given, custom_generate=la), **arguments)
    with pytest.raises(InvalidArgument, match=r"OptimizedModule.*_orig_mod"):
        lookahead.generate(module, IDS, **CALL)
    module._orig_mod.compile(backend="eager")
    both(module, module.generate, la.generate, **arguments)


def test_inputs_that_another_object_prepares_are_refused() -> None:
    """As those of PEFT's prompt learning, which puts virtual tokens before the text in every step."""
    model = copy.deepcopy(tiny("llama"))
    la, plain = Lookahead(model), model.generate(IDS, **CALL)

    class Wrapper:
        def prepare(self, *given: Any, **kwargs: Any) -> Any:
            raise AssertionError("it ran")

    own, model.prepare_inputs_for_generation = model.prepare_inputs_for_generation, Wrapper().prepare
    for generate in (la.generate, lambda ids, **given: model.generate(ids, **given, custom_generate=la)):
        with pytest.raises(UnsupportedModel, match=r"Wrapper prepares the inputs.*call generate"):
            generate(IDS, **CALL)
    model.prepare_inputs_for_generation = MethodType(own.__func__, model)  # as PEFT leaves it afterwards
    assert torch.equal(la.generate(IDS, **CALL), plain)


def adapted(config: Any) -> Any:
    """Return the tiny model in PEFT, with adapters that are not zero."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(tiny("llama")), config(peft)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if re.search("lora|ia3|prompt", name):
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


PROJECTIONS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda peft: peft.LoraConfig(r=4, **PROJECTIONS),
    "DoRA": lambda peft: peft.LoraConfig(r=4, use_dora=True, **PROJECTIONS),
    "IA3": lambda peft: peft.IA3Config(feedforward_modules=[], **PROJECTIONS),
}
VIRTUAL: dict[str, Callable[[Any], Any]] = {
    "prompt tuning": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda peft: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_exact(name: str) -> None:
    model, arguments = adapted(ADAPTERS[name]), CALL | {"input_ids": IDS}
    la = drafting(model.get_base_model(), model.generate, **arguments)
    assert model.generate(**arguments).tolist() != tiny("llama").generate(**arguments).tolist()
    both(model, model.generate, la.generate, **arguments)
    both(model, model.generate, lambda **given: model.generate(**given, custom_generate=la), **arguments)
    if name == "LoRA":
        mixed = arguments | {"adapter_names": ["default", "__base__"]}
        both(model, model.generate, lambda **given: model.generate(**given, custom_generate=la), **mixed)
    with model.disable_adapter():
        both(model, tiny("llama").generate, la.generate, **arguments)
    with pytest.raises(InvalidArgument, match=r"PeftModel.*get_base_model"):
        lookahead.generate(model, IDS, **CALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_refused(name: str) -> None:
    model = adapted(VIRTUAL[name])
    for ids in (IDS, IDS[1:]):
        with pytest.raises(UnsupportedModel, match=f"{name}.*call generate"):
            model.generate(
                input_ids=ids,
                attention_mask=CALL["attention_mask"][-len(ids) :],
                custom_generate=Lookahead(model.get_base_model()),
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_exact(where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, arguments = copy.deepcopy(tiny("llama")), CALL | {"input_ids": IDS}
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    la = drafting(model, model.generate, **arguments)
    both(model, model.generate, la.generate, **arguments)
    both(model, model.generate, Lookahead(model).generate, **arguments)


@pytest.mark.filterwarnings("ignore")
def test_weights_of_eight_bits_are_exact() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(tiny("llama", "sdpa", "float32"))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with mock.patch("law.tiny", return_value=model):
        for rows in (1, 3):
            assert_exact(replace(BASE, rows=rows, sample=rows == 3, dtype="float32"))


@pytest.mark.filterwarnings("ignore")
def test_one_scale_for_all_activations_makes_a_token_depend_on_the_others() -> None:
    """Of plain passes too: the law cannot hold where drafts are among the others."""
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(tiny("llama", "sdpa", "float32")), dtype=torch.qint8)
    with torch.no_grad():
        alone, beside = model(IDS[1:]).logits[0], model(IDS).logits[1]
    assert float((alone - beside).abs().max()) > 1e-2 * float(alone.std())


def test_two_processes_that_share_a_model_decide_alike(tmp_path: Path) -> None:
    """See ranks.py, which both of them run."""
    here = Path(__file__).parent
    program = [sys.executable, str(here / "ranks.py")]
    where = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*program, str(rank), str(tmp_path / "store")], env=where, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode == UNABLE for rank in ranks):
        pytest.skip("processes cannot talk to each other here")
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


# The page


def test_page_says_of_every_argument_what_is_tested_here() -> None:
    arguments = PAGE.read_text(encoding="utf-8").split("## Arguments")[1].split("## ")[0]
    said: dict[str, str] = {}
    for names, verdict in re.findall(r"^\| (`.*?) \| ([a-z ]+) \|", arguments, re.MULTILINE):
        for name in re.findall(r"`([a-z_]+)`", names):
            assert name not in said, name
            said[name] = verdict
    tested = dict.fromkeys([*SERVED, *BY_HAND, "max_time", "remove_invalid_values"], "served")
    tested |= dict.fromkeys(IGNORED, "no effect") | dict.fromkeys(REFUSED, "refused")
    assert said == tested


def test_every_argument_of_generate_is_on_the_page() -> None:
    known = set(inspect.signature(hf.GenerationMixin.generate).parameters) - {"self", "kwargs"}
    known |= set(hf.GenerationConfig().to_dict()) - {"_from_model_config", "transformers_version"}
    known |= {"assistant_tokenizer", "tokenizer", "trust_remote_code"}  # taken from the rest
    inputs = {"attention_mask", "position_ids", "inputs_embeds", "past_key_values", "logits_to_keep"}
    here = {*SERVED, *BY_HAND, "max_time", "remove_invalid_values", *IGNORED, *REFUSED}
    assert here == known | inputs
