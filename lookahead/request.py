"""What a user asks of `generate()`: refused by name where not served, prepared where `transformers` drops it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode

from lookahead.budget import Budget
from lookahead.cache import length_of
from lookahead.drafter import Drafter
from lookahead.errors import InvalidArgument, UnsupportedArgument, UnsupportedModel
from lookahead.grow import Grower

SERVED_INPUTS = {
    "cache", "past_key_values", "position_ids", "attention_mask", "inputs_embeds", "use_cache", "logits_to_keep",
    "encoder_outputs", "decoder_attention_mask", "cache_params",
}  # fmt: skip


PROMPT_INPUTS = {
    "pixel_values", "pixel_values_videos", "pixel_attention_mask", "image_sizes", "image_grid_thw", "video_grid_thw",
    "mm_encoder_outputs", "token_type_ids", "mm_token_type_ids", "input_features", "input_features_mask",
}  # fmt: skip


def served_arguments(model: Any, arguments: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Refuse what belongs to other decoders and never reaches a `custom_generate` callable; prepare the rest for it."""
    arguments = dict(arguments)
    if arguments.pop("custom_generate", None) is not None:
        raise UnsupportedArgument("custom_generate is what lookahead.generate() passes itself; leave it out")
    for name in ("assistant_model", "assistant_tokenizer"):
        if arguments.pop(name, None) is not None:
            raise UnsupportedArgument(_replaced(name))
    if arguments.pop("synced_gpus", None):
        raise UnsupportedArgument("synced_gpus: generation over sharded processes is not served; call model.generate()")
    if _setting(model, arguments, "token_healing"):
        raise UnsupportedArgument("token_healing: heal the prompt first (model.heal_tokens), or call model.generate()")
    if _setting(model, arguments, "cache_implementation") == "paged":
        raise UnsupportedArgument("cache_implementation='paged': continuous batching is model.generate_batch()")
    given = arguments.pop("tokenizer", None)
    return _with_stop_strings(model, arguments, tokenizer if given is None else given)


def _setting(model: Any, arguments: dict[str, Any], name: str) -> Any:
    """Return a generation setting as `transformers` resolves it: keyword, the user's config, the model's."""
    for holder in (arguments.get("generation_config"), model.generation_config):
        if arguments.get(name) is None and holder is not None and getattr(holder, name, None) is not None:
            return getattr(holder, name)
    return arguments.get(name)


def end_tokens(model: Any, arguments: dict[str, Any]) -> list[int] | None:
    """Return the tokens that end a text in a call of `generate()`, None where none are set."""
    ends = _setting(model, arguments, "eos_token_id")
    return None if ends is None else torch.as_tensor(ends).flatten().tolist()


def _with_stop_strings(model: Any, arguments: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Turn `stop_strings`, wherever they are set, into the criterion that `transformers` lacks the tokenizer for."""
    strings = _setting(model, arguments, "stop_strings")
    arguments.pop("stop_strings", None)
    if strings is None:
        return arguments
    if tokenizer is None:
        raise InvalidArgument(
            "stop_strings needs the model's tokenizer; pass tokenizer=, or make the Lookahead with one"
        )
    config = arguments.get("generation_config")
    if config is not None and config.stop_strings is not None:
        arguments["generation_config"] = copy.deepcopy(config)
        arguments["generation_config"].stop_strings = None
    if model.generation_config.stop_strings is not None:
        arguments["stop_strings"] = None  # a given None keeps the model's own out
    criteria = list(arguments.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    return arguments


def _replaced(name: str) -> str:
    return (
        f"{name}: lookahead replaces this way of drafting, with n-grams and the model's own logits instead of a second "
        "model; leave it out, or call model.generate() without custom_generate"
    )


def refuse_modes(config: Any) -> None:
    """Raise `UnsupportedArgument` for every way of decoding that is not one pick after another."""
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if _given(config, name) and getattr(config, name) is not False:
            raise UnsupportedArgument(_replaced(name))
    refused = {
        "num_beams": (config.num_beams or 1) > 1,
        "dola_layers": _given(config, "dola_layers"),
        "penalty_alpha": config.get_generation_mode() == GenerationMode.CONTRASTIVE_SEARCH,
        "force_words_ids": _given(config, "force_words_ids"),
        "constraints": _given(config, "constraints"),
        "use_cache=False": config.use_cache is False,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": config.output_hidden_states not in (None, False),
        "is_assistant": bool(config.is_assistant),
    }
    for name, given in refused.items():
        if given:
            raise UnsupportedArgument(
                f"{name}: lookahead serves greedy decoding and sampling with a cache; leave {name} out, or call "
                "model.generate() without custom_generate for it"
            )
    if config.cache_implementation not in (None, "dynamic"):
        raise UnsupportedArgument(
            f"cache_implementation={config.cache_implementation!r}: lookahead brings its own cache; leave it out, "
            "or call model.generate()"
        )


def refuse_chunks(config: Any, cache: Any) -> None:
    """Raise `UnsupportedArgument` where `transformers`, before 5.21, would run again what `cache` holds."""
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if config.prefill_chunk_size and release < (5, 21) and length_of(cache, 0):
        raise UnsupportedArgument(
            "prefill_chunk_size: with a cache that holds something, transformers before 5.21 runs all of it again; "
            "leave prefill_chunk_size out, or upgrade transformers"
        )


def refuse_inputs(model: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedArgument` for every model input that a pass over a tree could not be given.

    What pictures and sounds are made into is looked at with the prompt, and not again.
    """
    senses = any(hasattr(model.config, name) for name in ("vision_config", "audio_config"))
    for name, value in model_kwargs.items():
        if senses and name in PROMPT_INPUTS:
            continue
        if value is not None and name not in SERVED_INPUTS:
            raise UnsupportedArgument(f"{name}: this model input is not served; leave it out, or call model.generate()")
    shown = model_kwargs.get("decoder_attention_mask")
    if shown is not None and not bool((shown != 0).all()):
        raise UnsupportedArgument(
            "decoder_attention_mask: padding of what a decoder starts with is not served, since models count it in "
            "different ways; give decoder_input_ids without padding, or call model.generate()"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise UnsupportedArgument(f"position_ids of shape {tuple(positions.shape)}: only [batch, length] is served")


def refuse_sharding(model: Any) -> None:
    """Raise where a pass is more than a call of `model`.

    Raises:
        UnsupportedModel: PEFT puts virtual tokens before the text.
        UnsupportedArgument: processes that have other texts or other layers take part in every pass.
    """
    _refuse_virtual_tokens(model)
    if not _is_distributed():
        return
    parallel = getattr(model.config, "distributed_config", None)
    if parallel is not None and (parallel.pp_size or 1) > 1:
        raise UnsupportedArgument(
            f"pp_size={parallel.pp_size}: a model whose layers are spread over processes is not served; load it with "
            "tp_size instead, or call model.generate()"
        )
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        raise UnsupportedArgument("synced_gpus: a model sharded by FSDP or ZeRO-3 is not served; call model.generate()")


def refuse_clocks(model: Any, budget: Budget, drafter: Drafter) -> None:
    """Raise `UnsupportedArgument` where processes share every pass of `model`, but would decide by their own clocks.

    They have to run the same nodes in the same passes, or wait for each other for ever.
    """
    if not runs_together(model):
        return
    why = "the processes that share this model would each decide by their own clock"
    if not budget.fixed:
        raise UnsupportedArgument(f"nodes='auto': {why}; give a number that is the same in all of them, say nodes=16")
    if isinstance(drafter, Grower) and "jacobi" in drafter.paid.switches:
        raise UnsupportedArgument(f"a window that rests where it does not pay: {why}; give Jacobi(switch='on')")


def runs_together(model: Any) -> bool:
    """Whether several processes run every pass of `model` together: tensor or expert parallelism."""
    if not _is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return (getattr(model, "_tp_size", None) or 1) > 1 or any(isinstance(p, DTensor) for p in model.parameters())


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _refuse_virtual_tokens(model: Any) -> None:
    """Prompt learning of PEFT prepares the inputs of the model that it wraps, in every step of plain `generate()`."""
    prepare = model.prepare_inputs_for_generation
    if getattr(prepare, "__func__", None) is not type(model).prepare_inputs_for_generation:
        owner = type(getattr(prepare, "__self__", prepare)).__name__
        raise UnsupportedModel(
            f"{owner} prepares the inputs of {type(model).__name__}, as PEFT does for prompt tuning, prefix tuning and "
            "p-tuning; call generate() without custom_generate (LoRA and other adapters inside the model are served)"
        )


def prompt_length(model_kwargs: dict[str, Any], input_ids: Tensor) -> int:
    """Return how many positions the prompt takes, an earlier cache included."""
    positions = model_kwargs.get("position_ids")
    return input_ids.shape[1] if positions is None else int(positions[:, -1].max()) + 1


def last_positions(model_kwargs: dict[str, Any], cached: int, input_ids: Tensor) -> Tensor:
    """Return the [B] position ids of the last prompt token of each row; `cached` tokens have run."""
    positions = model_kwargs.get("position_ids")
    if positions is None:
        return torch.full((input_ids.shape[0],), cached - 1)
    last: Tensor = positions[:, -1].expand(input_ids.shape[0])
    return last


def padding_mask(mask: Tensor | None, cached: int) -> Tensor | None:
    """Return the [B, cached] bool mask of what is not padding, or None when nothing is."""
    if mask is None or bool((mask != 0).all()):
        return None
    if mask.shape[1] != cached:
        raise InvalidArgument(
            f"attention_mask covers {mask.shape[1]} positions, but {cached} are cached after the prompt"
        )
    return mask != 0


def ids_mask(mask: Tensor | None, input_ids: Tensor) -> NDArray[np.bool_] | None:
    """Return which of `input_ids` are not padding, as far as `mask` tells; only drafters read it.

    A mask that also covers an earlier cache ends with the given ids.
    """
    length = input_ids.shape[1]
    if mask is None or length == 0 or mask.shape[1] < length:
        return None
    covered: NDArray[np.bool_] = mask[:, -length:].cpu().numpy()
    return covered


def read_before(
    input_ids: Tensor, mask: Tensor | None, source: Tensor | None, model_kwargs: dict[str, Any]
) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Return what drafters read before the first generated token, [B, P]: ids, and which of them are no padding.

    Args:
        mask: [B, S] bool, what of the cached positions is not padding.
        source: what an encoder has read, which comes first; [B, E], or fewer rows that have been repeated since.
    """
    ids, known = input_ids.cpu().numpy(), ids_mask(mask, input_ids)
    if source is None or source.shape[0] == 0 or input_ids.shape[0] % source.shape[0]:
        return ids, known
    read = source.repeat_interleave(input_ids.shape[0] // source.shape[0], dim=0)
    shown = ids_mask(model_kwargs.get("attention_mask"), read)
    parts = (read.cpu().numpy(), shown), (ids, known)
    masks = [np.ones(part.shape, np.bool_) if of is None else of.astype(np.bool_) for part, of in parts]
    return np.concatenate([part for part, _ in parts], axis=1), np.concatenate(masks, axis=1)


def _given(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None
