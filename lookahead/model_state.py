"""What of a model a recording of its passes holds besides the values of its weights, in one look at all its modules."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lookahead.attention import implementation_of
from lookahead.families import text_config

_ADAPTERS = ("_active_adapter", "merged_adapters", "scaling")  # what runs of them, in lists and tables
_SIMPLE = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model as it is at one moment.

    Attributes:
        key: what a recording holds for ever: where weights are, and what runs.
        devices: that weights are on.
        offloaded: whether something moves weights between passes.
        recordable: whether all that a pass does is in its tensor operations, as far as can be seen: nobody's code hangs
            in it.
        ordinary: whether all weights are tensors like any other, not quantized ones that come as a class of their own.
    """

    key: Hashable
    devices: frozenset[torch.device]
    offloaded: bool
    recordable: bool
    ordinary: bool


def state_of(model: nn.Module) -> ModelState:
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
        one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__ for one in modules
    )
    return ModelState(
        key=(
            tuple((one.data_ptr(), one.dtype) for one in weights),
            tuple(_code(one) for one in modules),
            tuple([(k, v) for k, v in vars(text_config(model)).items() if type(v) in _SIMPLE and k[0] != "_"]),
            implementation_of(text_config(model)),
            torch.get_autocast_dtype(device) if cast else None,
            _settings(),
            hooked,
        ),
        devices=frozenset(one.device for one in parameters),
        offloaded=any("_hf_hook" in one.__dict__ for one in modules),
        # What autocast casts weights to is gone when it ends.
        recordable=not (cast or hooked) and all(one.data_ptr() for one in parameters if one.numel()),
        ordinary=all(type(one) in (nn.Parameter, Tensor) for one in weights),
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


def _code(module: nn.Module) -> Hashable:
    """Return what a module runs, and the numbers that it keeps."""
    adapters = (str(module.__dict__[name]) for name in _ADAPTERS if name in module.__dict__)
    numbers = tuple([one for one in module.__dict__.values() if type(one) in _SIMPLE])
    return id(module), id(type(module)), numbers, *adapters


def _settings() -> Hashable:
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        *(getattr(cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math", "cudnn")),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
