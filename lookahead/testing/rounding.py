"""How far rounding alone moves the logits of a model: plain `transformers`, one token a pass and many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lookahead.support import EXACT, ROUGH

SIZES = (2, 8, 32)
"""Tokens of the passes that are compared with single ones, and all at once besides: kernels differ by size. A text that
is shorter is followed by what nothing is asked about."""

_HALF = 8  # times finer than bfloat16 is float16


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding does to the logits of a text.

    Attributes:
        noise: the largest difference between passes over one token and over many.
        spread: standard deviation of the logits.
        cap: what is never called rounding, however large the noise is: a fault of the model's own would be noise too.
    """

    noise: float
    spread: float
    cap: float

    @property
    def allowed(self) -> float:
        """How far two logits may be from each other, and a logit from plain's, by rounding alone."""
        return min(2 * self.noise, self.cap) if self.noise == self.noise else 0.0


def cap(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest difference of logits, over their spread, that may be called rounding.

    The limits are those of the trial that a model stands before it is served (`lookahead.support`), where weights have
    16 bits, and where 32-bit products are rounded to fewer. Otherwise they are tighter: 32 bits round to about 1e-5.
    """
    if dtype == torch.float64:
        return 1e-9
    if dtype == torch.float32:
        return EXACT[1] if _is_short(device) else EXACT[0] / 10
    return ROUGH[1] / _HALF if dtype == torch.float16 else ROUGH[1]


def _is_short(device: torch.device) -> bool:
    """Whether products in 32 bits are computed from fewer, such as TF32."""
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return tf32 or torch.get_float32_matmul_precision() != "highest"


@torch.no_grad()
def measure(model: Any, arguments: Callable[[], dict[str, Any]], text: Tensor) -> Rounding:
    """Run `text` [B, N] behind a prompt, as `transformers` itself runs it, by one token and by many.

    Args:
        arguments: returns fresh arguments of `generate()`.
    """
    single = _logits(model, arguments(), text, 1)
    noise = 0.0
    for size in dict.fromkeys((*SIZES, max(text.shape[1] - 1, 1))):
        apart = (_logits(model, arguments(), text, size) - single).abs()
        noise = max(noise, float(apart[single.isfinite()].max()))
    spread = float(single[single.isfinite()].std())
    weight = model.get_input_embeddings().weight
    return Rounding(noise, spread, cap(weight.dtype, weight.device) * spread)


def _logits(model: Any, arguments: dict[str, Any], text: Tensor, size: int) -> Tensor:
    """Return [B, N, V] float32: the logits from which each token of `text` is picked, `size` tokens a pass."""
    found: list[Tensor] = []

    def run(model: Any, input_ids: Tensor, generation_config: Any, **given: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria"):
            given.pop(name, None)
        outputs, ids = model._prefill(input_ids, generation_config, given), input_ids
        found.append(outputs.logits[:, -1:].float())
        given.pop("logits_to_keep", None)
        for start in range(0, text.shape[1] - 1, size):
            chunk = text[:, start : min(start + size, text.shape[1] - 1)]
            asked, chunk = chunk.shape[1], _filled(model, chunk, size, ids.shape[1])
            count, ids = chunk.shape[1], torch.cat([ids, chunk], dim=1)
            encoder = model.config.is_encoder_decoder
            given = model._update_model_kwargs_for_generation(outputs, given, encoder, num_new_tokens=count)
            inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=count, **given)
            outputs = model(**inputs, return_dict=True)
            found.append(outputs.logits[:, -count:][:, :asked].float())
        return ids

    model.generate(**arguments, custom_generate=run)
    return torch.cat(found, dim=1)


def _filled(model: Any, chunk: Tensor, size: int, before: int) -> Tensor:
    """Return the last tokens of a text filled up to a pass of `size`, as far as the model's context goes."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    room = size if context is None else min(size, context - before)
    missing = max(room - chunk.shape[1], 0)
    return torch.cat([chunk, chunk[:, -1:].expand(-1, missing)], dim=1)
