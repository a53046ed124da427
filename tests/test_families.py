"""Every architecture of `transformers` that writes text: served exactly, or refused with the reason."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import page
import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from law import Case, assert_exact, same_caches
from models import PAD, RELEASE, VOCAB, tiny
from page import verdict
from test_law import cases
from transformers import DynamicCache, EncoderDecoderCache
from zoo import FLOAT32_ONLY, SEQ2SEQ, ZOO, zoo

import lookahead
from lookahead import InvalidArgument, Lookahead, UnsupportedArgument, UnsupportedModel
from lookahead.cache import NAME
from lookahead.support import supports

REFUSED = {
    "axk2", "cpmant", "deepseek_v32", "deepseek_v4", "doge", "dots3_note", "falcon_mamba", "fsmt", "glm_moe_dsa",
    "hy_v4", "inkling2_text", "inkling_text", "jamba", "mamba", "minimax", "minimax_m3_vl_text", "moshi", "nemotron_h",
    "openai-gpt", "prophetnet", "prophetnet_decoder", "qwen4_exp", "recurrent_gemma", "reformer", "rwkv", "xlm",
    "xlnet", "xlstm", "zamba", "zamba2", "zaya",
}  # fmt: skip
"""What is known not to work; everything else has to be served."""
if RELEASE < (5, 18):  # four decoders look at later tokens too; git fails in passes over several tokens
    REFUSED |= {"big_bird", "git", "megatron-bert", "rembert", "roformer"}
if RELEASE < (5, 23):  # its passes draw random numbers
    REFUSED |= {"nllb-moe"}


def dtype_of(name: str) -> str:
    return "float32" if name in FLOAT32_ONLY else "float64"


SERVED = sorted(name for name in ZOO if name not in REFUSED)


@pytest.mark.parametrize("name", [*ZOO, *SEQ2SEQ])
def test_served_or_refused(name: str) -> None:
    found = verdict(name)
    assert (found.kind == "refused") == (name in REFUSED), found
    assert (found.kind == "tree") == (found.reason == "")
    if found.kind == "refused":
        with pytest.raises(UnsupportedModel) as caught:
            Lookahead(zoo(name, dtype=dtype_of(name)))
        assert type(zoo(name, dtype=dtype_of(name))).__name__ in str(caught.value)
        assert "model.generate()" in str(caught.value)


def test_the_page_lists_what_this_run_finds(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-page"):
        page.write()
    if f"transformers {hf.__version__}:" not in page.shown():
        pytest.skip("the page is of another version of transformers")
    assert page.shown() == page.table()


def test_the_readme_counts_what_the_page_lists() -> None:
    trees, chains, refused = (int(number) for number in re.findall(r"(\d+) (?:with|refused)", page.shown())[:3])
    text = (page.PAGE.parents[1] / "README.md").read_text()
    assert f"{trees + chains + refused} architectures are tried" in text
    assert f"{trees} run with token trees" in text
    assert f"{chains} with chains" in text
    assert f"{refused} are refused" in text


@pytest.mark.parametrize("name", SERVED)
def test_every_served_decoder_is_exact(name: str) -> None:
    """Texts that exceed every window, of one row and of padded ones, greedy and drawn, with the cache given back."""
    base = Case(family=name, dtype=dtype_of(name), new=28, prompt=9, nodes=8)
    assert_exact(replace(base, seed=1, output="dict"))
    assert_exact(replace(base, seed=2, rows=3, mask="left", sample=True, drafter="prompt+recycle", output="ids"))
    assert_exact(replace(base, seed=3, rows=2, eos=(4, 9), sample=True))


@pytest.mark.parametrize("name", SERVED)
def test_every_tree_is_exact_in_passes_of_fixed_shapes(name: str) -> None:
    scaled = getattr(zoo(name).config, "attn_temperature_tuning", None)
    if verdict(name).kind != "tree" or scaled:
        with pytest.raises(UnsupportedModel, match="static=True does not serve"):
            Lookahead(zoo(name, dtype=dtype_of(name)), static=True)
        return
    base = Case(family=name, dtype=dtype_of(name), new=28, prompt=9, nodes=8, way="static", limits=(("slots", 16),))
    assert_exact(replace(base, seed=2, rows=3, mask="left", sample=True, drafter="prompt+recycle", output="ids"))
    assert_exact(replace(base, seed=3, rows=2, eos=(4, 9), output="dict", drafter="adversary"))


@pytest.mark.parametrize("name", [name for name in SEQ2SEQ if name not in REFUSED])
def test_every_served_encoder_decoder_is_exact(name: str) -> None:
    model = zoo(name)
    for rows, sample in ((1, False), (3, False), (3, True)):
        arguments = inputs_of(model, rows) | {"max_new_tokens": 24, "do_sample": sample, "num_beams": 1}
        torch.manual_seed(rows)
        plain = model.generate(**arguments, return_dict_in_generate=True, output_logits=True)
        for la in (Lookahead(model, nodes=12), Lookahead(model)):
            torch.manual_seed(rows)
            ours = la.generate(**arguments, return_dict_in_generate=True, output_logits=True)
            assert type(ours) is type(plain)
            assert torch.equal(ours.sequences, plain.sequences)
            for mine, theirs in zip(ours.logits, plain.logits, strict=True):
                assert torch.allclose(mine, theirs, atol=1e-4, equal_nan=True)
            same_caches(ours[NAME], plain[NAME])
            torch.manual_seed(rows)
            assert torch.equal(la.generate(**arguments), model_again(model, arguments, rows))


def model_again(model: Any, arguments: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return model.generate(**arguments)


def inputs_of(model: Any, rows: int) -> dict[str, Any]:
    """Return what the encoder of `model` reads: some rows end in padding; of sounds, none."""
    torch.manual_seed(rows)
    if hasattr(model.config, "num_mel_bins"):
        size = rows, model.config.num_mel_bins, 2 * model.config.max_source_positions
        return {"input_features": torch.randn(size, dtype=model.dtype)}
    ids = torch.randint(3, VOCAB, (rows, 20))
    mask = torch.ones_like(ids)
    mask[1:, 15:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_what_a_decoder_starts_with(name: str) -> None:
    """Served without padding, the user's cache too; refused with it, since models count it in different ways."""
    model, starts = zoo(name), torch.tensor([[0, 5, 7, 9], [8, 5, 7, 9]])
    arguments = inputs_of(model, 2) | {"decoder_input_ids": starts, "max_new_tokens": 12, "do_sample": False}
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    plain = model.generate(**arguments, **{NAME: caches[0]})
    assert torch.equal(Lookahead(model, nodes=8).generate(**arguments, **{NAME: caches[1]}), plain)
    same_caches(*caches)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(UnsupportedArgument, match="decoder_attention_mask"):
        Lookahead(model, nodes=8).generate(**arguments, decoder_attention_mask=mask)


def test_a_failure_before_the_first_pass_leaves_a_whole_cache() -> None:
    class Boom(lookahead.Drafter):
        def start(self, context: Any) -> Any:
            raise RuntimeError("boom")

        def propose(self, context: Any, budget: int) -> Any:
            raise AssertionError

    for name in [name for name in ("lfm3", "gemma3_text", "llama") if name in ZOO]:
        model, ids = zoo(name), torch.randint(3, VOCAB, (1, 12))
        mine, theirs = (DynamicCache(config=model.config.get_text_config(decoder=True)) for _ in range(2))
        with pytest.raises(RuntimeError, match="boom"):
            Lookahead(model, drafter=Boom()).generate(ids, **{NAME: mine}, max_new_tokens=4)
        model(ids, **{NAME: theirs}, use_cache=True)
        same_caches(mine, theirs)


def test_what_an_encoder_reads_is_drafted_from() -> None:
    """A T5 that copies has its drafts from what it is given to copy."""
    model, ids = zoo("t5"), torch.randint(3, VOCAB, (1, 40))
    seen = []

    class Watcher(lookahead.Drafter):
        def propose(self, context: Any, budget: int) -> lookahead.Draft:
            seen.append(context.tolist())
            return lookahead.Draft.root(int(context[-1]))

    Lookahead(model, drafter=Watcher()).generate(ids, max_new_tokens=3)
    assert all(context[:40] == ids[0].tolist() for context in seen)


# All sorts of calls

DRAFTERS = ("oracle", "relay", "adversary", "prompt", "prompt+recycle", "prompt+pool+recycle")
FEW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]


@st.composite
def zoo_cases(draw: Any) -> Case:
    """Draw a case of any architecture."""
    name = draw(st.sampled_from(SERVED))
    case: Case = draw(cases(family=name, dtype=dtype_of(name), attention="sdpa", embeds="no", cache="own"))
    mask = case.mask if case.mask != "holes" else "left"
    drafter = case.drafter if case.drafter in DRAFTERS else draw(st.sampled_from(DRAFTERS))
    unpadded = zoo(name, dtype=dtype_of(name)).config._attn_implementation == "eager"
    options = tuple(one for one in case.options if one[0] not in ("prefill_chunk_size", "guidance_scale"))
    return replace(case, mask="full" if unpadded else mask, drafter=drafter, options=options)


@settings(settings.get_profile("law"), suppress_health_check=FEW)
@given(case=zoo_cases())
def test_drafting_never_changes_the_output_of_any_architecture(case: Case) -> None:
    result = assert_exact(case)
    event("fails plainly" if result.error is not None else verdict(case.family).kind)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "gemma3_text", "llama4_text", "bloom", "lfm2", "qwen3_next"]
)
def test_ten_turns_on_one_cache(name: str) -> None:
    """Plain and ours answer in turn, each on a cache of its own that goes on from turn to turn."""
    model = zoo(name)
    config = model.config.get_text_config(decoder=True)
    mine, theirs = DynamicCache(config=config), DynamicCache(config=config)
    la = Lookahead(model, nodes=8)
    torch.manual_seed(0)
    text = torch.randint(3, VOCAB, (1, 5))
    for turn in range(10):
        arguments = {"max_new_tokens": 6, "do_sample": turn % 2 == 1, "attention_mask": torch.ones_like(text)}
        torch.manual_seed(turn)
        plain = model.generate(text, **{NAME: theirs}, **arguments)
        torch.manual_seed(turn)
        ours = la.generate(text, **{NAME: mine}, **arguments)
        assert torch.equal(plain, ours), turn
        same_caches(mine, theirs)
        text = torch.cat([ours, torch.randint(3, VOCAB, (1, 3))], dim=1)


# An architecture that nobody has seen


class OddConfig(hf.LlamaConfig):
    model_type = "odd"


class Odd(hf.LlamaForCausalLM):
    """A Llama under another name, with something about its logits that its config does not tell."""

    config_class = OddConfig
    oddity = "none"

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kw: Any,
    ) -> Any:
        if self.oddity == "draws":
            torch.rand([])
        ids, start = input_ids, 0 if kw.get(NAME) is None else kw[NAME].get_seq_length()
        outputs = super().forward(input_ids, attention_mask, position_ids, **kw)
        count = outputs.logits.shape[1]
        if self.oddity == "counts tokens of a pass":
            outputs.logits = outputs.logits.roll(ids.shape[1], dims=-1)
        if self.oddity == "counts slots":
            slots = torch.arange(start + ids.shape[1] - count, start + ids.shape[1], device=ids.device)
            outputs.logits = outputs.logits + torch.sin(slots[:, None] + torch.arange(outputs.logits.shape[-1]))
        return outputs


def odd(oddity: str) -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = Odd(OddConfig(vocab_size=VOCAB, initializer_range=0.3, pad_token_id=PAD, eos_token_id=None, **small)).eval()
    model.oddity = oddity
    return model


@pytest.mark.parametrize(
    ("oddity", "kind"), [("none", "tree"), ("counts slots", "linear"), ("counts tokens of a pass", "refused")]
)
def test_an_unknown_architecture_is_tried_out(oddity: str, kind: str) -> None:
    model = odd(oddity)
    found = supports(model)
    assert (found.kind, found.checked) == (kind, True), found
    assert found.difference is not None
    assert (found.difference > 0.1) == (kind == "refused")
    if kind == "refused":
        with pytest.raises(UnsupportedModel, match=r"several tokens.*spread of the logits; call model\.generate\(\)"):
            Lookahead(model)
        return
    ids = torch.randint(3, VOCAB, (3, 8))
    arguments = {"max_new_tokens": 24, "attention_mask": torch.ones_like(ids), "do_sample": False}
    la = Lookahead(model, nodes=8)
    assert torch.equal(la.generate(ids, **arguments), model.generate(ids, **arguments))
    assert all(len(set(one.committed)) == 1 for one in la.last.passes) or kind == "tree"


def test_a_model_whose_passes_draw_random_numbers_is_refused() -> None:
    model, generator = odd("draws"), torch.get_rng_state()
    assert (supports(model).kind, supports(model).checked) == ("refused", True)
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(UnsupportedModel, match=r"draw random numbers.*; call model\.generate\(\)"):
        Lookahead(model)


def test_a_verdict_is_found_once_and_leaves_no_trace() -> None:
    model = odd("none")
    config, generator = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    first = supports(model)
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), generator)
    with mock.patch.object(Odd, "forward", side_effect=AssertionError("ran again")):
        assert supports(model) is first
        Lookahead(model)
    assert supports(copy.deepcopy(model)) is not first


def test_the_window_of_a_model_is_what_it_was_before() -> None:
    model = copy.deepcopy(zoo("gemma3_text"))
    before = model.config.sliding_window
    assert supports(model).checked
    assert model.config.sliding_window == before


def test_supports_never_raises() -> None:
    dropping = copy.deepcopy(tiny("gpt2")).train()
    assert supports(dropping).kind == "refused"
    assert "training mode" in supports(dropping).reason
    assert supports(dropping.eval()).kind == "tree"
    assert not supports(tiny("llama")).checked
    assert "cannot generate()" in supports(torch.nn.Linear(2, 2)).reason
    assert supports(hf.LlamaModel(tiny("llama").config)).kind == "refused"
    broken = odd("none")
    broken.lm_head.weight.data = broken.lm_head.weight.data[:, :5].clone()
    assert supports(broken).kind == "refused"


def test_a_window_of_guesses_needs_trees() -> None:
    with pytest.raises(InvalidArgument, match=r"window of guesses.*needs token trees.*leave the window out"):
        Lookahead(zoo("bloom"), sources=("prompt", "jacobi"))
