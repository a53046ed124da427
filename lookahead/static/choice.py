"""Whether passes of fixed shapes serve a model, and whether its output can be made independent of drafts."""

from __future__ import annotations

from typing import Any

from torch import nn

from lookahead.errors import InvalidArgument, UnsupportedModel
from lookahead.families import Family, text_config

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def static_of(model: Any, family: Family, static: bool | None, *, invariant: bool, compile: bool) -> bool:
    """Return whether passes have fixed shapes: as asked; on one CUDA device where it can be, unless asked otherwise.

    Raises:
        InvalidArgument: what is asked contradicts itself.
        UnsupportedModel: what is asked cannot be done with this model; the message says why.
    """
    for name, value in (("static", static), ("invariant", invariant), ("compile", compile)):
        if not (isinstance(value, bool) or (name == "static" and value is None)):
            raise InvalidArgument(f"{name}={value!r}; give True or False")
    asked = [name for name, value in (("invariant", invariant), ("compile", compile), ("static", static)) if value]
    if asked and static is False:
        raise InvalidArgument(f"{asked[0]}=True takes passes of fixed shapes; leave static=False out")
    reason = _reason(model, family)
    if invariant:
        reason = reason or _varies(model)
    if reason and asked:
        name = asked[0]
        raise UnsupportedModel(f"{name}=True does not serve {type(model).__name__}: {reason}; leave {name} out")
    wanted = bool(asked) or (static is None and _is_on_cuda(model))
    return bool(wanted) and not reason


def _reason(model: nn.Module, family: Family) -> str:
    """Return why no pass of a fixed shape can be run; "": it can."""
    if family.shape != "tree":
        return "its drafts are chains behind a cache that the model itself makes masks for"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "its weights are spread over devices or offloaded"
    if len({one.device for one in model.parameters()}) > 1:
        return "its weights are on more than one device"
    return ""


def _varies(model: Any) -> str:
    """Return why an output cannot be made independent of drafts; "": nothing is known of such a thing."""
    config = text_config(model)
    if any(int(getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return "its experts multiply as many rows as are routed to them, drafts included"
    if getattr(model, "hf_quantizer", None) is not None:
        return "it is quantized, and kernels for that may depend on all rows of a pass"
    return ""


def _is_on_cuda(model: nn.Module) -> bool:
    return {one.device.type for one in model.parameters()} == {"cuda"}
