"""Tiny random models of every architecture that `transformers` can generate text with, built from configs alone.

A row names model types, and what their configs need beyond `_FIELDS`; a version of `transformers` that lacks a type
only lacks its models. Windows and chunks are 8 positions wide, so that 30 tokens exceed them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import transformers as hf
from models import BOS, PAD, POSITIONS, VOCAB
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto import modeling_auto as auto

WINDOW = 8

# One value for every name that configs have for the same thing; a config takes the names that it knows.
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_kv", "kv_channels", "dim_head", "attention_head_size"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "gated_norm_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "d_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "feed_forward_size"), 48),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), POSITIONS),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), POSITIONS),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), POSITIONS),
    "initializer_range": 0.3,
    **dict.fromkeys(("init_std", "embed_init_std"), 0.6),
    "initializer_factor": 2.5,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), WINDOW),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("index_topk", "index_head_dim", "indexer_head_dim", "index_block_size", "indexer_budget"), WINDOW),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 8),
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    "is_decoder": True,
    "tie_word_embeddings": False,  # tied embeddings repeat the last token for ever
}
_SLIDING = {"sliding_window": WINDOW}
_MIXED = _SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
_WINDOWED = _SLIDING | {"use_sliding_window": True, "max_window_layers": 1}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_PICKED = "indexed_attention" if "indexed_attention" in ALLOWED_LAYER_TYPES else "qwen_sparse_attention"  # before 5.18
_CONVOLVED = {"layer_types": ["conv", "full_attention"]}
_LATENT = {"num_key_value_heads": 4}  # compressed keys: as many heads of keys as of queries
_INDEXED = _LATENT | {"mlp_layer_types": ["dense", "sparse"]}
_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"]}
_SHARP = {"initializer_range": 0.6}  # norms after the sum hide the attention of smaller weights
_UNSPARSE = {"attention_type": "original_full"}


class _Part(NamedTuple):
    """A config inside a config."""

    config: str
    extra: dict[str, Any] = {}  # noqa: RUF012


# Rows by what a config needs beyond `_FIELDS`: a name is a model type, or a model type, a colon and a layout of it.
_DECODERS: list[tuple[str, dict[str, Any]]] = [
    (
        """apertus apertus1p5_text arcee aria_text bart:decoder biogpt bitnet blenderbot-small:decoder
        blenderbot:decoder codegen cohere cpmant diffllama emu3 ernie4_5 ernie4_5_moe falcon falcon_mamba flex_olmo
        gemma glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox_japanese gptj granite granitemoe granitemoeshared helium
        hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe lara_mini llama mamba marian:decoder
        mbart:decoder minimax_m2 mixtral mllama mpt mvp:decoder nanochat nemotron nemotron_h olmo olmo2 olmoe openai-gpt
        opt pegasus:decoder persimmon phi phi3 phimoe plbart:decoder qwen2 qwen2_moe qwen3 qwen3_moe rwkv sarvam_moe
        seed_oss solar_open stablelm starcoder2 trocr:decoder whisper:decoder xglm xlm""",
        {},
    ),
    (
        """bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl xlnet""",
        _SHARP,
    ),
    ("ctrl gpt_neox", {"initializer_range": 0.5}),
    ("bloom", {"initializer_range": 0.15}),
    ("ministral3 mistral moshi mixtral:sliding phi3:sliding phimoe:sliding starcoder2:sliding", _SLIDING),
    (
        """afmoe beam cohere2 cohere2_moe cwm dots1 exaone4 exaone_moe flint gemma2 gemma3_text gpt_oss granite_swa
        granitemoe_swa kolibri1 laguna mellum mimo_v2_flash ministral olmo3 vaultgemma""",
        _MIXED,
    ),
    ("qwen2:sliding qwen2_moe:sliding qwen3:sliding qwen3_moe:sliding", _WINDOWED),
    ("axk1 deepseek_v2 deepseek_v3 longcat_flash minicpm3 sarvam_mla youtu", _LATENT),
    ("axk2 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4", _INDEXED),
    (
        "dots3_note",
        _INDEXED
        | _SLIDING
        | {
            "layer_types": ["indexed_attention", "sliding_attention"],
            **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
            **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16),
            **dict.fromkeys(("swa_qk_nope_head_dim", "swa_qk_rope_head_dim", "swa_v_head_dim"), 8),
        },
    ),
    ("granitemoehybrid minimax olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next", _LINEAR),
    ("bailing_hybrid kimi_linear", _LINEAR | _LATENT),
    ("lfm2 lfm2_moe", _CONVOLVED),
    ("zamba zamba2", _HYBRID),
    ("big_bird", _UNSPARSE | _SHARP),
    ("bigbird_pegasus:decoder", _UNSPARSE),
    (
        "inkling_text inkling2_text",
        {"sliding_window_size": WINDOW, "layer_types": ["hybrid_sliding", "hybrid"]},
    ),
    ("bamba", {"attn_layer_indices": [1]}),
    (
        "cohere_compass_text",
        _MIXED
        | {
            "rope_parameters": {
                "full_attention": None,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            }
        },
    ),
    (
        "dbrx",
        {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 16}},
    ),
    (
        "deepseek_v4",
        _SLIDING
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
        },
    ),
    ("doge", {"keep_window_size": WINDOW}),
    ("falcon:alibi", {"alibi": True}),
    ("falcon:new", {"new_decoder_architecture": True}),
    ("falcon_h1", {"mamba_d_ssm": 64}),
    (
        "gemma3n_text",
        _SLIDING
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
        },
    ),
    ("gemma4_text", _MIXED | {"hidden_size_per_layer_input": 8, "global_head_dim": 8}),
    ("gemma4_unified_text", _MIXED | {"global_head_dim": 8}),
    ("git", {"vision_config": _Part("GitVisionConfig", {"image_size": 16, "patch_size": 8})}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}),
    ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    ("lfm3", _SLIDING | {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]}),
    (
        "llama4_text",
        {
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    ("mamba2", {"num_heads": 8}),
    (
        "minimax_m3_vl_text",
        {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_topk_blocks": 2, "index_n_heads": 2},
    ),
    ("modernbert-decoder", {"local_attention": WINDOW}),
    ("prophetnet:decoder", {"pad_token_id": 0}),  # its check of positions takes the padding token for 0
    (
        "qwen4_exp",
        {
            "layer_types": ["linear_attention", _PICKED],
            "indexer_kv_heads": 1,
            "indexer_compress_ratio": 2,
        },
    ),
    ("recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": WINDOW}),
    ("reformer", {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4, "hash_seed": 0}),
    (
        "roc_bert",
        {
            "shape_vocab_size": VOCAB,
            "pronunciation_vocab_size": VOCAB,
            "shape_embed_dim": 8,
            "pronunciation_embed_dim": 8,
        },
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("xlstm", {"hidden_size": 128}),
    ("xmod", _SHARP | {"default_language": "en_XX"}),
    (
        "zaya",
        _SLIDING | {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "initializer_range": 0.5},
    ),
]
_ENCODER_DECODERS: list[tuple[str, dict[str, Any]]] = [
    (
        """blenderbot longt5 m2m_100 mbart mt5 nllb-moe pegasus seamless_m4t seamless_m4t_v2 switch_transformers t5
        umt5""",
        {},
    ),
    ("bart blenderbot-small fsmt marian mvp plbart", {"init_std": 1.0}),
    ("bigbird_pegasus", _UNSPARSE),
    (
        "encoder-decoder",
        {"encoder": _Part("BertConfig"), "decoder": _Part("BertConfig", {"add_cross_attention": True})},
    ),
    ("led", {"attention_window": WINDOW, "init_std": 1.0}),
    ("pegasus_x", {"num_global_tokens": 4}),
    ("prophetnet", {"pad_token_id": 0}),
    ("t5gemma", {part: _Part("T5GemmaModuleConfig", _MIXED) for part in ("encoder", "decoder")}),
    ("whisper", {"max_source_positions": WINDOW, "num_mel_bins": 4, "begin_suppress_tokens": None}),
]

SKIPPED: dict[str, str] = {
    **dict.fromkeys(
        ("exaone", "gpt-sw3", "internlm3", "iquestcoder"), "another name of a class that is built (GPT-2, Llama)"
    ),
    **dict.fromkeys(
        ("llama4", "dots3_note_text", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"),
        "the same class has a second model type, which is built",
    ),
    **dict.fromkeys(
        ("gemma3", "gemma3n", "gemma4", "gemma4_unified"), "images and sound around the text model, which is built"
    ),
    **dict.fromkeys(("fuyu", "got_ocr2"), "images around a decoder that is built (Persimmon, Qwen2)"),
    **dict.fromkeys(
        ("moss_transcribe_diarize", "phi4_multimodal"), "sound around a decoder that is built (Qwen3, Phi-3)"
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts from the cache of another model"),
    "blt": "patches of bytes, and generate() gives it a cache that its own forward pass fails on",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "several codebooks a step, no tokens of text"),
}
FLOAT32_ONLY: dict[str, str] = {
    "inkling2_text": "its router computes in float32 whatever the weights are",
    "xglm": "its attention compares with a float32 minimum",
    "xlnet": "its position encodings are float32 whatever the weights are",
}


def _config(kind: Any, extra: dict[str, Any], **overrides: Any) -> Any:
    """Return a config with the fields of `_FIELDS` that it knows, then those of `extra`, then the overrides."""
    known = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in _FIELDS.items() if name in known} | copy.deepcopy(extra) | overrides
    parts = {
        name: _config(getattr(hf, part.config), part.extra).to_dict()
        for name, part in values.items()
        if isinstance(part, _Part)
    }
    return kind(**values | parts)


def _build(model: Any, extra: dict[str, Any], **overrides: Any) -> Any:
    """Return a model of the class `model` with random weights."""
    return model(_config(model.config_class, extra, **overrides))


def _class(name: str) -> Any:
    """Return a class of `transformers`; the import of some, in some versions, warns about what they use of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(hf, name)


def _builders(rows: list[tuple[str, dict[str, Any]]], classes: dict[str, str]) -> dict[str, Callable[..., Any]]:
    """Return a builder for every name whose class this version of `transformers` has."""
    return {
        name.replace(":", "_"): partial(_build, _class(classes[name.partition(":")[0]]), extra)
        for names, extra in rows
        for name in names.split()
        if name.partition(":")[0] in classes
    }


ZOO = _builders(_DECODERS, dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
SEQ2SEQ = _builders(
    _ENCODER_DECODERS,
    {**auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, **auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES},
)


@cache
def zoo(name: str, attention: str = "sdpa", dtype: str = "float64", **overrides: Any) -> Any:
    """Return the tiny model `name` of `ZOO` or `SEQ2SEQ`; the same one for the same arguments. It knows no EOS.

    A class that refuses `attention` gets "eager". `FLOAT32_ONLY` names those that need `dtype="float32"`.
    """
    build = (ZOO | SEQ2SEQ)[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        try:
            model = build(attn_implementation=attention, **overrides)
        except ValueError:
            model = build(attn_implementation="eager", **overrides)
        if dtype == "float64":
            model.set_experts_implementation("eager")  # the grouped kernel knows no float64
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.generation_config = hf.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, decoder_start_token_id=BOS)
    return model.to(dtype=getattr(torch, dtype)).eval()
