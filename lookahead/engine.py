"""The door: `Lookahead` and `generate()`. The only file that reads a `GenerationConfig`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode

from lookahead.cache import BLOCK, require_ordinary
from lookahead.decode import Decoder
from lookahead.drafter import Drafter
from lookahead.errors import InvalidArgument, UnsupportedArgument
from lookahead.families import require_supported
from lookahead.grow import Grower
from lookahead.progress import Contexts, Progress, Records, Stops
from lookahead.sampling import Sampler
from lookahead.target import Target
from lookahead.trace import Run

SERVED_INPUTS = {"past_key_values", "position_ids", "attention_mask", "inputs_embeds", "use_cache", "logits_to_keep"}
MAX_NODES = 4096


class Lookahead:
    """Exact lookahead decoding for one model; holds what outlives a request.

    `Lookahead` is itself accepted by `model.generate(..., custom_generate=la)`. What `transformers` drops on that way
    (`streamer`, and `tokenizer` for `stop_strings`) `la.generate(...)` and `lookahead.generate(model, ...)` carry.

    Args:
        model: a causal language model of a served family (see `lookahead.families`).
        tokenizer: used for `stop_strings` where `generate()` gets none.
        drafter: proposes the drafts; by default a `Grower` over `sources`.
        sources: names or objects of what the default drafter asks; not together with `drafter`.
        nodes: drafted nodes a row may spend a pass; 0 is plain decoding.

    Raises:
        InvalidArgument: `nodes` is not a whole number in [0, 4096], or `drafter` is no `Drafter`.
        UnsupportedModel: the model's architecture is not served.

    Attributes:
        last: what the latest call of `generate()` did (`Run`), or None.

    >>> la = Lookahead(model, nodes=32)
    >>> model.generate(**inputs, max_new_tokens=64, custom_generate=la)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        drafter: Drafter | None = None,
        sources: Sequence[Any] | None = None,
        nodes: int = 32,
    ) -> None:
        if not isinstance(model, GenerationMixin):
            raise InvalidArgument(f"model is a {type(model).__name__}; pass a transformers model that can generate()")
        if isinstance(nodes, bool) or not isinstance(nodes, int) or not 0 <= nodes <= MAX_NODES:
            raise InvalidArgument(f"nodes={nodes!r}; give a whole number from 0 (plain decoding) to {MAX_NODES}")
        if drafter is not None and not isinstance(drafter, Drafter):
            raise InvalidArgument(f"drafter is a {type(drafter).__name__}; derive it from lookahead.Drafter")
        if drafter is not None and sources is not None:
            raise InvalidArgument("sources belong to the default drafter; give either drafter or sources")
        require_supported(model, prompt=1, longest=1)
        self.model, self.tokenizer, self.nodes = model, tokenizer, nodes
        self._vocab = int(model.config.vocab_size)
        options = {} if sources is None else {"sources": sources}
        self.drafter = drafter or Grower(vocab_size=self._vocab, **options)
        self.last: Run | None = None

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Any:
        """Return what `model.generate(inputs, **arguments)` returns; see `lookahead.generate`."""
        streamer = arguments.get("streamer")
        arguments = _served_arguments(self.model, arguments, self.tokenizer)

        def call(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return self._decode(model, input_ids, streamer=streamer, **prepared)

        return self.model.generate(inputs, custom_generate=call, **arguments)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `model.generate(..., custom_generate=self)` has prepared."""
        if generation_config is None:
            raise InvalidArgument("call model.generate(..., custom_generate=la) or la.generate(...), not la(...) itself")
        return self._decode(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if model is not self.model:
            raise InvalidArgument("this Lookahead was made for another model object; make one for this model")
        _refuse_modes(generation_config)
        _refuse_inputs(model_kwargs)
        cache = model_kwargs.get("past_key_values")
        require_ordinary(cache)
        config, stops = generation_config, Stops(stopping_criteria)
        returned = bool(config.return_dict_in_generate)
        complete = returned or bool(getattr(cache, "_is_user_defined", False))
        records = Records(
            input_ids.shape[0], scores=returned and config.output_scores, logits=returned and config.output_logits
        )
        recording = records.scores is not None or records.logits is not None
        pad = None if config._pad_token_tensor is None else int(config._pad_token_tensor)
        progress = Progress(input_ids, stops, pad=pad, complete=complete, records=records, streamer=streamer)
        prompt = _prompt_length(model_kwargs, input_ids)
        require_supported(model, prompt=prompt, longest=prompt + progress.remaining(0) - 1)
        sampler = Sampler(
            LogitsProcessorList() if logits_processor is None else logits_processor,
            do_sample=bool(config.do_sample),
            rows=input_ids.shape[0],
            device=input_ids.device,
            recorder=records if recording else None,
        )
        self._run(model, input_ids, config, model_kwargs, progress, sampler, give_back=complete)
        sequences = progress.ids(progress.settled).clone()
        if streamer is not None:
            streamer.end()
        if not returned:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=records.scores, logits=records.logits, past_key_values=cache
        )

    def _run(
        self,
        model: Any,
        input_ids: Tensor,
        config: Any,
        model_kwargs: dict[str, Any],
        progress: Progress,
        sampler: Sampler,
        *,
        give_back: bool,
    ) -> None:
        """Prefill, decode, and leave generator and cache as plain `generate()` leaves them, whatever happens."""
        outputs = model._prefill(input_ids, config, model_kwargs)
        cache, mask = outputs.past_key_values, model_kwargs.get("attention_mask")
        require_ordinary(cache)
        mask = _padding(mask, cache.get_seq_length())
        positions = model_kwargs.get("position_ids")
        if positions is None:
            last = torch.full((input_ids.shape[0],), cache.get_seq_length() - 1)
        else:
            last = positions[..., -1].expand(input_ids.shape[0])
        contexts = Contexts(input_ids.cpu().numpy(), _ids_mask(mask, input_ids))
        drafters = [self.drafter.start(contexts.view(row, 0)) for row in range(progress.rows)] if self.nodes else []
        room = min(progress.remaining(0), 2 * BLOCK) + self.nodes + 1
        target = Target(model, cache, mask, last, room)
        decoder = Decoder(
            target,
            sampler,
            progress,
            contexts,
            drafters,
            nodes=self.nodes,
            vocab=self._vocab,
            pad=None if config._pad_token_tensor is None else int(config._pad_token_tensor),
        )
        kept = 0
        try:
            with model._optimize_model_for_decode():
                decoder.run(outputs.logits[:, -1:])
            kept = progress.settled - 1
        finally:
            sampler.finish(progress.settled)
            if give_back:
                target.give_back(cache, kept)
            self.last = Run(progress.settled, tuple(decoder.passes))


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    drafter: Drafter | None = None,
    sources: Sequence[Any] | None = None,
    nodes: int = 32,
    **arguments: Any,
) -> Any:
    """Return exactly what `model.generate(inputs, **arguments)` returns, sooner.

    Takes every argument of `model.generate()`; those that belong to another way of decoding (beam search, an assistant,
    `use_cache=False`, …) raise `UnsupportedArgument`. To keep what is learnt from one call for the next, make a
    `Lookahead` and call its `generate`.

    Args:
        model: a causal language model of a served family.
        inputs: [B, L] token ids, as for `model.generate()`; or give `input_ids=`.
        drafter, sources, nodes: see `Lookahead`.

    >>> lookahead.generate(model, **tokenizer("def add(", return_tensors="pt"), max_new_tokens=64)
    """
    return Lookahead(model, drafter=drafter, sources=sources, nodes=nodes).generate(inputs, **arguments)


def _served_arguments(model: Any, arguments: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Refuse what belongs to other decoders, and build the stop-string criterion that `transformers` would drop."""
    arguments = dict(arguments)
    if arguments.get("custom_generate") is not None:
        raise UnsupportedArgument("custom_generate is what lookahead.generate() passes itself; leave it out")
    if arguments.get("assistant_model") is not None or arguments.get("assistant_tokenizer") is not None:
        raise UnsupportedArgument("assistant_model: lookahead drafts without a second model; leave it out, or call model.generate()")
    if arguments.get("synced_gpus"):
        raise UnsupportedArgument("synced_gpus: generation over sharded processes is not served; call model.generate()")
    arguments.pop("synced_gpus", None)
    tokenizer = arguments.pop("tokenizer", None) or tokenizer
    config = arguments.get("generation_config")
    strings = arguments.pop("stop_strings", None) or (config or model.generation_config).stop_strings
    if (arguments.get("token_healing") or (config or model.generation_config).token_healing) and tokenizer is not None:
        raise UnsupportedArgument("token_healing: heal the prompt first (model.heal_tokens), or call model.generate()")
    if strings is None:
        return arguments
    if tokenizer is None:
        raise InvalidArgument("stop_strings needs the model's tokenizer; pass tokenizer=, or make the Lookahead with one")
    if (config or model.generation_config).stop_strings is not None:
        arguments["generation_config"] = copy.deepcopy(config or model.generation_config)
        arguments["generation_config"].stop_strings = None
    criteria = list(arguments.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    return arguments


def _given(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def _refuse_modes(config: Any) -> None:
    """Raise `UnsupportedArgument` for every way of decoding that is not one pick after another."""
    refused = {
        "num_beams": (config.num_beams or 1) > 1,
        "prompt_lookup_num_tokens": _given(config, "prompt_lookup_num_tokens"),
        "assistant_early_exit": _given(config, "assistant_early_exit"),
        "use_mtp": bool(getattr(config, "use_mtp", False)),
        "dola_layers": _given(config, "dola_layers"),
        "penalty_alpha": config.get_generation_mode() == GenerationMode.CONTRASTIVE_SEARCH,
        "force_words_ids": _given(config, "force_words_ids") or _given(config, "constraints"),
        "use_cache=False": config.use_cache is False,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
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
            f"cache_implementation={config.cache_implementation!r}: lookahead brings its own cache; leave it out, or call "
            "model.generate()"
        )


def _refuse_inputs(model_kwargs: dict[str, Any]) -> None:
    for name, value in model_kwargs.items():
        if value is not None and name not in SERVED_INPUTS:
            raise UnsupportedArgument(f"{name}: this model input is not served; leave it out, or call model.generate()")
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise UnsupportedArgument(f"position_ids of shape {tuple(positions.shape)}: only [batch, length] is served")


def _prompt_length(model_kwargs: dict[str, Any], input_ids: Tensor) -> int:
    positions = model_kwargs.get("position_ids")
    return input_ids.shape[1] if positions is None else int(positions[:, -1].max()) + 1


def _padding(mask: Tensor | None, cached: int) -> Tensor | None:
    """Return the [B, cached] bool mask of what is not padding, or None when nothing is."""
    if mask is None or bool((mask != 0).all()):
        return None
    if mask.shape[1] != cached:
        raise InvalidArgument(f"attention_mask covers {mask.shape[1]} positions, but {cached} are cached after the prompt")
    return mask != 0


def _ids_mask(mask: Tensor | None, input_ids: Tensor) -> np.ndarray[Any, Any] | None:
    """Return which of `input_ids` are not padding; a mask that also covers an earlier cache ends with them."""
    if mask is None or input_ids.shape[1] == 0:
        return None
    return mask[:, -input_ids.shape[1] :].cpu().numpy()
