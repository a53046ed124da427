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

from lookahead.attention import implementation_of
from lookahead.cache import NAME
from lookahead.errors import UnsupportedModel
from lookahead.mask import Reach

_MARGIN = 512  # slots that drafts and rows that run ahead may take
INSTEAD = "call model.generate() for this model"
ATTENTION = ("sdpa", "eager")
ONE = "attention"
"""The name of the only kind of layers, where a model takes one mask for all."""

Shape = Literal["tree", "linear"]

STATES = frozenset({"linear_attention", "conv", "hybrid"})
"""Kinds of layers that keep a state, by their names in `layer_types`."""

EMPTY = frozenset({"moe", "mlp"})
"""Kinds of layers that attend to nothing."""

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
        last: a token behind which nothing may be drafted, because places are counted without it; None: there is none.
        state: whether layers keep a state that cannot be cut (`lookahead.states`).
        cache: the name of its cache among the inputs.
        encoder: whether the text is written by a decoder that attends to an encoder.
        inputs: what a pass is given besides.
    """

    shape: Shape
    reaches: tuple[tuple[str, Reach], ...] = ((ONE, Reach()),)
    keyed: bool = False
    positions: bool = True
    table: int | None = None
    last: int | None = None
    state: bool = False
    cache: str = NAME
    encoder: bool = False
    inputs: tuple[tuple[str, Any], ...] = ()


def families_of(model: Any) -> list[Family]:
    """Return the ways in which drafts may run through `model`, the best one first.

    Where `generate()` gives the model no positions, neither do we: it counts them in its own way.

    Raises:
        UnsupportedModel: there is none; the message says why.
    """
    config = text_config(model)
    accepted = inspect.signature(type(model).forward).parameters
    if reason := refusal(model.config):
        raise UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}; {INSTEAD}")
    if model.config.is_encoder_decoder:
        return _chains(Family("linear", positions=False, table=_table(config), encoder=True), config)
    positions, table = "position_ids" in accepted and _passes_positions(model), _table(config)
    # The routers' training loss reads the attention mask as 2D; generate() has no use for it.
    inputs = (("output_router_logits", False),) if hasattr(config, "output_router_logits") else ()
    linear = Family("linear", positions=positions, table=table, inputs=inputs)
    if getattr(model, "_is_stateful", False) or STATES & set(getattr(config, "layer_types", None) or []):
        name = linear.cache if linear.cache in accepted else "cache_params"
        if name not in accepted:
            reason = "it keeps a state of its own kind, which cannot take rejected tokens back"
            raise UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}; {INSTEAD}")
        return [replace(linear, state=True, cache=name)]
    if not positions:
        return _chains(linear, config)

    def tree(*reaches: tuple[str, Reach], keyed: bool = False) -> Family:
        return replace(linear, shape="tree", reaches=reaches, keyed=keyed)

    kinds = getattr(config, "layer_types", None)
    if kinds:
        reaches = {kind: _REACHES[kind](config) for kind in dict.fromkeys(kinds) if kind not in EMPTY}
        # Those that name their layers take masks by these names; some have all layers alike, and take one mask.
        single = [tree((ONE, next(iter(reaches.values()))))] if len(reaches) == 1 else []
        return [tree(*reaches.items(), keyed=True), *single, linear]
    windows = Reach(sliding=_number(config, "sliding_window")), Reach(chunk=_number(config, "attention_chunk_size"))
    return [*(tree((ONE, reach)) for reach in (*(one for one in windows if not one.whole), Reach())), linear]


def _chains(linear: Family, config: Any) -> list[Family]:
    """Return how chains may run where the model counts places itself: padding may not count, wherever it stands."""
    padding = getattr(config, "pad_token_id", None)
    if padding is None or not 0 <= padding < int(config.vocab_size):
        return [linear]
    return [linear, replace(linear, last=int(padding))]


def _passes_positions(model: Any) -> bool:
    """Whether `generate()` hands positions on to the model.

    Raises:
        UnsupportedModel: it hands on others than it has counted.
    """
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return True
    ids = torch.zeros((1, 2), dtype=torch.int64, device=device_of(model))
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(2, device=ids.device)[None]}
    try:
        found = model.prepare_inputs_for_generation(ids, **given, use_cache=True).get("position_ids")
    except Exception:  # it asks for more than there is; the trial tells
        return True
    if found is not None and not (
        found.shape == (1, 2) and torch.equal(found, torch.arange(2, device=found.device)[None])
    ):
        reason = "generate() gives it positions that are not counted from 0"
        raise UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}; {INSTEAD}")
    return found is not None


def device_of(model: Any) -> torch.device:
    """Return the device that inputs go to; weights that are offloaded are on none between passes."""
    device = torch.device(model.device)
    if device.type != "meta":
        return device
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")


def text_config(model: Any) -> Any:
    """Return the config of the part of `model` that writes text."""
    return model.config.get_text_config(decoder=True)


def vocabulary(model: Any) -> int:
    """Return how many tokens `model` knows."""
    return int(text_config(model).vocab_size)


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
    names = ("max_position_embeddings", "max_target_positions", "max_decoder_position_embeddings", "max_seq_len")
    rows = [getattr(config, name, None) for name in names]
    return min((row for row in rows if isinstance(row, int) and row > 0), default=None)


def refusal(config: Any) -> str | None:
    """Return why no draft can run through a model of this config, as far as that tells; None: it tells nothing."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "add_cross_attention", False) and not config.is_encoder_decoder:
        return "it attends to an encoder"
    if getattr(text, "keep_window_size", None):
        return "it attends to some keys only, picked among all that a pass has, later ones too"
    kinds = dict.fromkeys(getattr(text, "layer_types", None) or [])
    others = [kind for kind in kinds if kind not in _REACHES and kind not in STATES | EMPTY]
    if others:
        return f"it has layers of {', '.join(others)}, which cannot take rejected tokens back"
    return None


def require_usable(model: Any, *, prompt: int, longest: int) -> None:
    """Raise `UnsupportedModel`, with the reason and a way out, where the way a model is loaded or asked rules it out.

    Args:
        prompt: tokens before the first generated one.
        longest: tokens that the sequence may reach; scaled rotary positions are judged by it.
    """
    config = text_config(model)
    for reason in (
        _attention(config),
        _training(model, config),
        _rotary(config, prompt, longest),
        _scales(config, prompt, longest),
    ):
        if reason:
            raise UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}; or {INSTEAD}")


def _attention(config: Any) -> str | None:
    kind = implementation_of(config)
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


def _scales(config: Any, prompt: int, longest: int) -> str | None:
    """Queries that are scaled by how much the cache holds are scaled by the nodes of a tree, too, at some lengths."""
    step = getattr(config, "floor_scale", None)
    if not (getattr(config, "attn_temperature_tuning", None) and step):
        return None
    change = (prompt // int(step) + 1) * int(step)
    if longest + _MARGIN < change:
        return None
    return f"it scales its queries anew at {change} tokens, between {prompt} and {longest}; ask for fewer tokens"
