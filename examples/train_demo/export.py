"""Write the trained model as a folder that `transformers` loads, with its card."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import BOS, EOS, PAD, Corpus
from .tasks import EDIT_PROMPT, JSON_PROMPT
from .train import MIXTURE

CARD = Path(__file__).with_name("card.md")


def export_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Save tokenizer and weights: float16 on disk (for weights of this size closer than bfloat16), float32 in use."""
    config = model.config
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.to(device="cpu", dtype=torch.float16).save_pretrained(folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_position_embeddings,
    ).save_pretrained(folder)


def write_card(folder: Path, corpus: Corpus, values: dict[str, object], figures: dict[str, float]) -> None:
    """Fill the template `card.md` with this run's values and figures."""
    text = CARD.read_text(encoding="utf-8")
    names = values | {
        "sources": _sources(corpus.sources),
        "mixture": ", ".join(f"{share:.0%} {kind}" for kind, share in MIXTURE.items()),
        "edit_prompt": EDIT_PROMPT,
        "json_prompt": JSON_PROMPT,
    }
    names |= {name: _plain(name, value) for name, value in figures.items()}
    card = re.sub(r"\[\[(\w+)\]\]", lambda match: str(names[match[1]]), text)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _plain(name: str, value: float) -> str:
    if name.endswith(("_loss", "_prompts")):
        return f"{value:g}"
    return f"{value:.1%}"


def _sources(sources: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {licence} |" for name, licence in sources)
