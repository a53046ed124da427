"""What of a model a recording of its passes holds besides the values of its weights, in one look at all its modules."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lookahead.attention import implementation_of
from lookahead.families import text_config

_SIMPLE = (bool, int, float, str, type(None), torch.dtype)
LARGEST = 4096  # numbers of a tensor that is no weight, and that a recording may keep
_MANY = 64  # entries of a list or table beyond which its identity has to do
_OWN = frozenset(
    {
        "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_backward_hooks", "_backward_pre_hooks",
        "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks", "_is_full_backward_hook", "config", "generation_config",
    }
)  # fmt: skip
"""Attributes of modules that are looked at otherwise."""


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model as it is at one moment.

    Attributes:
        weights: where they are.
        key: what else a recording holds for ever: what runs.
        devices: that weights are on.
        offloaded: whether something moves weights between passes.
        recordable: whether all that a pass does is in its tensor operations, as far as can be seen: nobody's code hangs
            in it, and no mode of torch is on.
        ordinary: whether all weights are tensors like any other, not quantized or sparse ones.
    """

    weights: Hashable
    key: Hashable
    devices: frozenset[torch.device]
    offloaded: bool
    recordable: bool
    ordinary: bool


def state_of(model: Any) -> ModelState:
    """Return the state of a model.

    A recording reads weights where they were, and runs the code that ran; adapters that are switched on, and settings
    of torch, are not in it.
    """
    modules = list(_modules(model))
    weights = [weight for one in modules for weight in _weights(one)]
    parameters = [one for one in weights if isinstance(one, nn.Parameter)]
    device = parameters[0].device.type
    cast = torch.is_autocast_enabled(device)
    hooked = bool(_global_forward_hooks or _global_forward_pre_hooks) or any(
        one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__ or one._compiled_call_impl
        for one in modules
    )
    function_mode: Any = _get_current_function_mode
    moded = function_mode() is not None or _get_current_dispatch_mode() is not None
    ordinary = all(type(one) in (nn.Parameter, Tensor) and one.layout is torch.strided for one in weights)
    text = text_config(model)
    return ModelState(
        weights=tuple([_place(one) if ordinary else id(one) for one in weights]),
        key=(
            tuple([_code(one) for one in modules]),
            _settings_of(text),
            () if text is model.config else _settings_of(model.config),
            implementation_of(text),
            torch.get_autocast_dtype(device) if cast else None,
            _settings(),
            hooked,
            moded,
        ),
        devices=frozenset(one.device for one in parameters),
        offloaded=any("_hf_hook" in one.__dict__ for one in modules),
        # What autocast casts weights to is gone when it ends.
        recordable=not (cast or hooked or moded)
        and all(one.data_ptr() for one in parameters if ordinary and one.numel()),
        ordinary=ordinary,
    )


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module once, as `model.modules()` does, in a tenth of its time."""
    waiting, seen = [model], {id(model)}
    while waiting:
        one = waiting.pop()
        yield one
        for below in one._modules.values():
            if below is not None and id(below) not in seen:
                seen.add(id(below))
                waiting.append(below)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers):
        yield from (one for one in held.values() if one is not None)


def _place(weight: Tensor) -> Hashable:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _code(module: nn.Module) -> Hashable:
    """Return what a module runs, and what it holds besides weights and modules."""
    kind = type(module)
    held = [(name, _value(value)) for name, value in module.__dict__.items() if name not in _OWN]
    return id(module), id(kind), id(kind.forward), tuple(held)


def _value(value: Any, deep: int = 3) -> Hashable:
    """Return what tells an attribute from another: its value where that is simple, or which one it is."""
    if type(value) in _SIMPLE:
        return value  # type: ignore[no-any-return]
    if type(value) is Tensor and value.device.type == "cpu" and value.layout is torch.strided:
        return id(value), _bits_of(value)
    if deep and isinstance(value, dict | list | tuple | set | frozenset) and len(value) <= _MANY:
        entries = [*value, *value.values()] if isinstance(value, dict) else [*value]
        return type(value).__name__, tuple([_value(one, deep - 1) for one in entries])
    return id(value)


def _bits_of(value: Tensor) -> Hashable:
    """Return the values of a tensor that is no weight, if a recording might keep them; of larger ones it keeps none."""
    if value.numel() > LARGEST or value.is_quantized:
        return value.numel()
    flat = value.detach().resolve_conj().resolve_neg().reshape(-1).clone()  # whose memory is nobody else's
    return flat.dtype, value.shape, flat.view(torch.uint8).numpy().tobytes()


def _settings_of(config: Any) -> Hashable:
    """Return what a config says, but for how passes attend, which passes of ours change meanwhile."""
    held = vars(config).items()
    return tuple([(name, _value(value)) for name, value in held if name != "_attn_implementation_internal"])


def precisions() -> list[str]:
    """Return how finely float32 is multiplied: in general, by oneDNN, and on CUDA devices.

    torch has an older setting of it, which cannot be read once the newer ones were set apart.
    """
    backends = torch.backends
    of = (backends, backends.mkldnn, getattr(backends.mkldnn, "matmul", None), backends.cuda.matmul)
    found = [getattr(one, "fp32_precision", "") for one in of]
    return found if any(found) else [torch.get_float32_matmul_precision()]


def _settings() -> Hashable:
    cuda = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        *precisions(),
        *(getattr(cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math", "cudnn")),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
