"""How an architecture can verify drafts, read from its config and the inputs of its forward pass.

Nothing here goes by class names. What a config says is a proposal: `lookahead.support` tries it out where the
architecture is not one of those that the test suite runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.generation import GenerationMixin

from lookahead.errors import UnsupportedModel
from lookahead.mask import Reach

INSTEAD = "call model.generate() for this model"
ATTENTION = ("sdpa", "eager")
ONE = "attention"
"""The name of the only kind of layers, where a model takes one mask for all."""

Shape = Literal["tree", "linear"]

TRIED = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe"}
)  # fmt: skip
"""Values of `model_type` that the test suite runs in every respect: what their config says is believed."""


@dataclass(frozen=True, slots=True)
class Family:
    """How drafts run through a model.

    Attributes:
        shape: "tree", with a mask of ours in which siblings do not see each other; or "linear": drafts are chains, all
            rows of a batch go on by as many tokens, and the model makes its masks itself.
        reaches: how far back each kind of layer looks, by the name that the model knows the kind by.
        keyed: whether it takes a mask for each kind, by name.
        positions: whether it takes `position_ids`.
        table: rows of its table of positions, beyond which no draft may reach; None: it has none.
        inputs: what a pass is given besides.
    """

    shape: Shape
    reaches: tuple[tuple[str, Reach], ...] = ((ONE, Reach()),)
    keyed: bool = False
    positions: bool = True
    table: int | None = None
    inputs: tuple[tuple[str, Any], ...] = ()


def families_of(model: Any) -> list[Family]:
    """Return the ways in which drafts may run through `model`, the best one first.

    Where `generate()` gives the model no positions, neither do we: it counts them in its own way.

    Raises:
        UnsupportedModel: there is none; the message says why.
    """
    config = text_config(model)
    accepted = inspect.signature(type(model).forward).parameters
    reason = refusal(model.config)
    if reason is None and getattr(model, "_is_stateful", False):
        reason = "its layers keep a state that cannot take rejected tokens back"
    if reason is not None:
        raise UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}; {INSTEAD}")
    positions, table = "position_ids" in accepted and _passes_positions(model), _table(config)
    # The routers' training loss reads the attention mask as 2D; generate() has no use for it.
    inputs = (("output_router_logits", False),) if hasattr(config, "output_router_logits") else ()
    linear = Family("linear", positions=positions, table=table, inputs=inputs)
    if not positions:
        return [linear]

    def tree(*reaches: tuple[str, Reach], keyed: bool = False) -> Family:
        return replace(linear, shape="tree", reaches=reaches, keyed=keyed)

    kinds = getattr(config, "layer_types", None)
    if kinds:
        reaches = {kind: _REACHES[kind](config) for kind in dict.fromkeys(kinds)}
        # Those that name their layers take masks by these names; some have all layers alike, and take one mask.
        single = [tree((ONE, next(iter(reaches.values()))))] if len(reaches) == 1 else []
        return [tree(*reaches.items(), keyed=True), *single, linear]
    windows = Reach(sliding=_number(config, "sliding_window")), Reach(chunk=_number(config, "attention_chunk_size"))
    return [*(tree((ONE, reach)) for reach in (*(one for one in windows if not one.whole), Reach())), linear]


def _passes_positions(model: Any) -> bool:
    """Whether `generate()` hands positions on to the model."""
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return True
    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(2, device=model.device)[None]}
    try:
        return "position_ids" in model.prepare_inputs_for_generation(ids, **given, use_cache=True)
    except Exception:  # it asks for more than there is; the trial tells
        return True


def text_config(model: Any) -> Any:
    """Return the config of the part of `model` that writes text."""
    return model.config.get_text_config(decoder=True)


_REACHES: Mapping[str, Callable[[Any], Reach]] = {
    "full_attention": lambda config: Reach(),
    "sliding_attention": lambda config: Reach(sliding=_number(config, "sliding_window")),
    "chunked_attention": lambda config: Reach(chunk=_number(config, "attention_chunk_size")),
}


def _number(config: Any, name: str) -> int:
    """Return a size from a config, 0 where it has none."""
    if name == "sliding_window" and getattr(config, "use_sliding_window", True) is False:
        return 0
    return int(getattr(config, name, None) or 0)


def _table(config: Any) -> int | None:
    """Return how many positions the model has rows for.

    Rotary positions could go on behind the last one; few texts get there, and a draft that ends early costs little.
    """
    rows = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(rows) if isinstance(rows, int) and rows > 0 else None


def refusal(config: Any) -> str | None:
    """Return why no draft can run through a model of this config, as far as that tells; None: it tells nothing."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model, and those are not served yet"
    if getattr(text, "add_cross_attention", False):
        return "it attends to an encoder"
    states = [kind for kind in dict.fromkeys(getattr(text, "layer_types", None) or []) if kind not in _REACHES]
    if states:
        return f"it has layers of {', '.join(states)}, which cannot take rejected tokens back"
    return None


def require_usable(model: Any, *, prompt: int, longest: int) -> None:
    """Raise `UnsupportedModel`, with the reason and a way out, where the way a model is loaded or asked rules it out.

    Args:
        prompt: tokens before the first generated one.
        longest: tokens that the sequence may reach; scaled rotary positions are judged by it.
    """
    config = text_config(model)
    for reason in (_attention(config), _training(model, config), _rotary(config, prompt, longest)):
        if reason:
            raise UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}; or {INSTEAD}")


def _attention(config: Any) -> str | None:
    kind = config._attn_implementation
    if kind in ATTENTION:
        return None
    return (
        f"its attention implementation is {kind!r}, which takes no tree mask; load it with attn_implementation='sdpa'"
    )


def _training(model: nn.Module, config: Any) -> str | None:
    """A model in training mode is served only where nothing about it is random."""
    if not model.training:
        return None
    names = ("attention_dropout", "attn_pdrop", "dropout", "layerdrop", "router_jitter_noise")
    fractions = [getattr(m, "p", 0) for m in model.modules() if isinstance(m, nn.Dropout)]
    fractions += [getattr(config, name, 0) for name in names]
    if any(fractions) or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return "it is in training mode, which drops units at random or recomputes them; call model.eval() first"
    return None


def _rotary(config: Any, prompt: int, longest: int) -> str | None:
    """Frequencies that change with the length make one pass over many positions differ from single ones."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [rope, *(part for part in rope.values() if isinstance(part, dict))] if isinstance(rope, dict) else []
    kinds = {part.get("rope_type", part.get("type", "default")): part for part in each}
    for kind in ("dynamic", "longrope"):
        if kind not in kinds:
            continue
        limit = kinds[kind].get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = limit or config.max_position_embeddings
        if not (longest <= limit or (kind == "longrope" and prompt > limit)):
            change = f"between {prompt} and {longest} tokens (at {limit})"
            return f"its {kind} rotary positions change {change}; ask for fewer tokens"
    return None
