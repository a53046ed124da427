"""Which architectures can verify a token tree through one 4D attention mask, and what rules each one out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lookahead.errors import UnsupportedModel

INSTEAD = "call model.generate() for this model"


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table of served architectures.

    Attributes:
        name: what people call it.
        rules: checks of a config; each returns a reason to refuse, or None.
        position_table: positions are looked up in a table of `max_position_embeddings` rows; a draft must not reach
            beyond it, even where the text ends before.
        inputs: what a pass over a tree is given besides; None stands for no such input.
    """

    name: str
    rules: tuple[Callable[[Any], str | None], ...] = ()
    position_table: bool = False
    inputs: tuple[tuple[str, Any], ...] = ()


def _no_sliding(config: Any) -> str | None:
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        return f"its attention slides over {config.sliding_window} positions; load it with sliding_window=None"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    return None


def _no_cross_attention(config: Any) -> str | None:
    return "it attends to an encoder" if getattr(config, "add_cross_attention", False) else None


# The routers' training loss reads the attention mask as 2D; generate() has no use for it.
_NO_ROUTER_LOSS = (("output_router_logits", False),)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "qwen2": Family("Qwen2", (_no_sliding,)),
    "qwen3": Family("Qwen3", (_no_sliding,)),
    "mistral": Family("Mistral", (_no_sliding,)),
    "phi3": Family("Phi-3", (_no_sliding,)),
    "gpt2": Family("GPT-2", (_no_cross_attention,), position_table=True),
    "gpt_neox": Family("GPT-NeoX"),
    "opt": Family("OPT", position_table=True),
    "mixtral": Family("Mixtral", (_no_sliding,), inputs=_NO_ROUTER_LOSS),
    "qwen3_moe": Family("Qwen3-MoE", (_no_sliding,), inputs=_NO_ROUTER_LOSS),
}
ATTENTION = ("sdpa", "eager")


def require_supported(model: Any, *, prompt: int, longest: int) -> Family:
    """Return the family of `model`, or raise `UnsupportedModel` with the reason and a way out.

    Args:
        prompt: tokens before the first generated one.
        longest: tokens that the sequence may reach; scaled rotary positions are judged by it.
    """
    config = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(kind)
    if family is None:
        names = ", ".join(sorted(f.name for f in FAMILIES.values()))
        raise UnsupportedModel(
            f"{type(model).__name__} (model_type {kind!r}) is not served yet (served: {names}); {INSTEAD}"
        )
    for rule in (*family.rules, _attention, _training(model), _rotary(prompt, longest)):
        if reason := rule(config):
            raise UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}; or {INSTEAD}")
    return family


def _attention(config: Any) -> str | None:
    kind = config._attn_implementation
    if kind in ATTENTION:
        return None
    return (
        f"its attention implementation is {kind!r}, which takes no tree mask; load it with attn_implementation='sdpa'"
    )


def _training(model: nn.Module) -> Callable[[Any], str | None]:
    """A model in training mode is served only where nothing about it is random."""
    names = ("attention_dropout", "attn_pdrop", "dropout", "layerdrop", "router_jitter_noise")

    def rule(config: Any) -> str | None:
        if not model.training:
            return None
        fractions = [getattr(m, "p", 0) for m in model.modules() if isinstance(m, nn.Dropout)]
        fractions += [getattr(config, name, 0) for name in names]
        if any(fractions) or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            return "it is in training mode, which drops units at random or recomputes them; call model.eval() first"
        return None

    return rule


def _rotary(prompt: int, longest: int) -> Callable[[Any], str | None]:
    """Frequencies that change with the length make one pass over many positions differ from single ones."""

    def rule(config: Any) -> str | None:
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
        if kind not in ("dynamic", "longrope"):
            return None
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = limit or config.max_position_embeddings
        constant = longest <= limit or (kind == "longrope" and prompt > limit)
        if constant:
            return None
        change = f"between {prompt} and {longest} tokens (at {limit})"
        return f"its {kind} rotary positions change {change}; ask for fewer tokens"

    return rule
