"""Tiny random models of every served family, built from configs alone, and tokenizers for them.

In float64 the difference between one pass over many tokens and many passes over one is too small to flip a pick.
"""

from __future__ import annotations

import copy
import string
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

RELEASE = tuple(int(part) for part in hf.__version__.split(".")[:2])
"""Of `transformers`, as (major, minor): some cases are about what only some releases do."""

VOCAB = 48
BOS, EOS, PAD, WORDS = 0, 1, 2, range(3, VOCAB)  # no padding of zeros, which a fresh buffer would hold too
POSITIONS = 1024

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": None,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}

FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **o: hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON | _GROUPED | o)),
    "qwen2": lambda **o: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_COMMON | _GROUPED | o)),
    "qwen3": lambda **o: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_COMMON | _GROUPED | {"head_dim": 8} | o)),
    "mistral": lambda **o: hf.MistralForCausalLM(hf.MistralConfig(**_COMMON | _GROUPED | {"sliding_window": None} | o)),
    "phi3": lambda **o: hf.Phi3ForCausalLM(hf.Phi3Config(**_COMMON | _GROUPED | {"sliding_window": None} | o)),
    "gpt2": lambda **o: hf.GPT2LMHeadModel(hf.GPT2Config(**_COMMON | o)),
    "gpt_neox": lambda **o: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON | {"intermediate_size": 48} | o)),
    "opt": lambda **o: hf.OPTForCausalLM(
        hf.OPTConfig(**_COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3} | o)
    ),
    "mixtral": lambda **o: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_COMMON | _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2} | o)
    ),
    "qwen3_moe": lambda **o: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_COMMON | _GROUPED | _EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1} | o)
    ),
}
EXPERTS = ("mixtral", "qwen3_moe")
ATTENTION = ("sdpa", "eager")


@cache
def tiny(family: str, attention: str = "sdpa", dtype: str = "float64", device: str = "cpu", **overrides: Any) -> Any:
    """Return the tiny model of `family`; the same one for the same arguments. It knows no EOS: cases pass theirs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(family.encode()))
        model = FAMILIES[family](attn_implementation=attention, **overrides)
        if dtype == "float64" and family in EXPERTS:
            model.set_experts_implementation("eager")  # the grouped kernel knows no float64
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.generation_config = hf.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()


@cache
def poisoned(*arguments: Any) -> Any:
    """Return the tiny model with an embedding of the last token that is no number."""
    model = copy.deepcopy(tiny(*arguments))
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # it may share the embeddings
    model.get_input_embeddings().weight.data[-1] = float("nan")
    return model


@cache
def tokenizer() -> Any:
    """Return a tokenizer whose tokens are letters, digits and a few pairs, with spaces among them."""
    letters = [*string.ascii_lowercase, *string.digits, "Ġ", "Ċ"]
    words = ["<bos>", "<eos>", "<pad>", *letters, "ab", "ba", "Ġa", "ca", "ed", "in", "th"]
    assert len(words) == VOCAB
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)


_JSON_PIECES = (
    '{"', '": ', '", "', '": "', '"}', '["', '"]', "[{", "}]", "}, ", ", ", "[]", "{}", '""', '": [', '": {', "true",
    "false", "null", "ab", "abc", "the", "id", "na", "name", "kind", "00", "10", "12", "0.", "1.", "20", "-0", "2024-",
    ": ", " the", "  ", "\n  ", "]}", '\\"', "\\u00", "@", "é",
)  # fmt: skip


@cache
def json_tokenizer() -> Any:
    """Return a byte-level tokenizer that can write JSON: printable ASCII, a line break, "é", and pieces of JSON."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spelled(text: str) -> str:
        return byte_level.pre_tokenize_str(text)[0][0]

    tokens = ["<bos>", "<eos>", "<pad>", *(spelled(chr(code)) for code in (10, *range(32, 127))), *spelled("é")]
    merges = []
    for piece in map(spelled, _JSON_PIECES):
        for end in range(2, len(piece) + 1):
            if piece[:end] not in tokens:
                tokens.append(piece[:end])
                merges.append((piece[: end - 1], piece[end - 1]))
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer, core.decoder = byte_level, decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)


JSON_VOCAB = len(json_tokenizer()) + 5  # models often know more tokens than their tokenizer
