"""Whether passes of fixed shapes serve a model, and whether its output can be made independent of drafts."""

from __future__ import annotations

from typing import Any

from torch import nn

from lookahead.errors import InvalidArgument, UnsupportedModel
from lookahead.families import Family, text_config
from lookahead.model_state import ModelState, state_of
from lookahead.request import runs_together
from lookahead.support import is_quantized

_EXPERTS = ("expert", "moe")  # in the names of modules


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
    if not asked and (static is False or next(model.parameters()).device.type != "cuda"):
        return False
    reason = reason_against(model, family, state_of(model))
    if invariant:
        reason = reason or _varies(model)
    if reason and asked:
        name = asked[0]
        raise UnsupportedModel(f"{name}=True does not serve {type(model).__name__}: {reason}; leave {name} out")
    return not reason


def reason_against(model: nn.Module, family: Family, state: ModelState) -> str:
    """Return why no pass can be a function of tensors that are given to it; "": it can."""
    if family.shape != "tree":
        return "its drafts are chains behind a cache that the model itself makes masks for"
    if state.offloaded:
        return "its weights are spread over devices or offloaded"
    if len(state.devices) > 1:
        return "its weights are on more than one device"
    if runs_together(model):
        return "several processes run its passes together"
    if getattr(text_config(model), "attn_temperature_tuning", None):
        return "it scales its queries by how much a cache of changing length holds"
    return ""


def _varies(model: Any) -> str:
    """Return why an output cannot be made independent of drafts; "": nothing is known of such a thing."""
    if any(part in type(module).__name__.lower() for module in model.modules() for part in _EXPERTS):
        return "its experts multiply as many rows as are routed to them, drafts included"
    if is_quantized(model):
        return "it is quantized, and kernels for that may depend on all rows of a pass"
    return ""
