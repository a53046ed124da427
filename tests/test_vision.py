"""Models that look at pictures: what they write is drafted, the pictures are looked at once, with the prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from models import BOS, PAD, VOCAB

from lookahead import Lookahead, UnsupportedArgument, UnsupportedModel, supports

PICTURE = VOCAB - 1
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None,
}  # fmt: skip
_EYES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_SLIDING = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def _llava() -> Any:
    eyes = hf.CLIPVisionConfig(**_EYES, projection_dim=32)
    config = hf.LlavaConfig(
        vision_config=eyes, text_config=hf.LlamaConfig(**_TEXT), image_token_index=PICTURE, image_seq_length=4
    )
    return hf.LlavaForConditionalGeneration(config)


def _gemma3() -> Any:
    text = hf.Gemma3TextConfig(**_TEXT, **_SLIDING)
    tokens = {"image_token_id": PICTURE, "boi_token_index": VOCAB - 2, "eoi_token_index": VOCAB - 3}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=hf.SiglipVisionConfig(**_EYES), mm_tokens_per_image=4, **tokens)
    )


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    eyes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
    text = _TEXT | {"rope_parameters": rope}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=eyes, image_token_id=PICTURE)
    return hf.Qwen2VLForConditionalGeneration(config)


def _paligemma() -> Any:
    text = {"model_type": "gemma", "head_dim": 8} | _TEXT
    eyes = {"model_type": "siglip_vision_model"} | _EYES
    config = hf.PaliGemmaConfig(vision_config=eyes, text_config=text, image_token_index=PICTURE, projection_dim=32)
    return hf.PaliGemmaForConditionalGeneration(config)


@cache
def seeing(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():  # what joins eye and text starts as zeros
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.generation_config = hf.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    return model


def inputs_of(model: Any) -> dict[str, Any]:
    """Return two prompts with a picture in each, one of them padded."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB - 3, (2, 12))
    ids[:, 3:7] = PICTURE
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    if "token_type_ids" in type(model).forward.__code__.co_varnames:
        inputs["token_type_ids"] = (ids == PICTURE).long()
    return inputs | {"pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.mark.parametrize("make", [_llava, _gemma3])
@pytest.mark.parametrize("sample", [False, True])
def test_pictures_are_looked_at_once_and_text_is_exact(make: Callable[[], Any], sample: bool) -> None:
    model = seeing(make)
    assert supports(model).kind == "tree"
    arguments = inputs_of(model) | {"max_new_tokens": 24, "do_sample": sample}
    torch.manual_seed(2)
    plain = model.generate(**arguments)
    for la in (Lookahead(model, nodes=8), Lookahead(model)):
        for _ in range(2):
            torch.manual_seed(2)
            assert torch.equal(la.generate(**arguments), plain)
    seen, other = (
        model.generate(**arguments | {"pixel_values": pictures}, return_dict_in_generate=True, output_logits=True)
        for pictures in (arguments["pixel_values"], -arguments["pixel_values"])
    )
    assert not torch.allclose(seen.logits[0], other.logits[0], atol=1e-3)


def test_positions_in_three_dimensions_are_refused() -> None:
    model = seeing(_qwen2_vl)
    with pytest.raises(UnsupportedArgument, match=r"position_ids of shape"):
        Lookahead(model, nodes=8).generate(torch.randint(3, 40, (1, 8)), max_new_tokens=4)


def test_positions_that_are_moved_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="not counted from 0"):
        Lookahead(seeing(_paligemma))
