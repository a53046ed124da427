"""What a call of `generate()` did, and how two of them differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache

from lookahead.cache import NAME
from lookahead.sampling import generator_state

TOLERANCE = 1e-4
"""Absolute and relative, of numbers in 32 and 64 bits."""

ROUGH = {torch.float16: 0.03, torch.bfloat16: 0.2}
"""Likewise in 16 bits; where many numbers are added up, the last bits of all of them add up too."""


@dataclass
class Outcome:
    """All that a caller of `generate()` can see.

    Attributes:
        output: what it returned.
        error: what it raised instead.
        generator: the state of the random generator afterwards.
        streamed: what the streamer received.
        calls: what processors and criteria of the user's own received.
        cache: the key-value cache, returned or the user's.
    """

    output: Any = None
    error: BaseException | None = None
    generator: Tensor | None = None
    streamed: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    cache: Any = None

    @property
    def sequences(self) -> Tensor:
        """The ids, [B, L]."""
        found: Tensor = self.output if isinstance(self.output, Tensor) else self.output.sequences
        return found

    @property
    def logits(self) -> tuple[Tensor, ...] | None:
        """The raw logits, [B, V] for each generated column, where they were asked for."""
        return None if isinstance(self.output, Tensor) else self.output.get("logits")

    @classmethod
    def of(cls, generate: Callable[..., Any], arguments: dict[str, Any], *, seed: int, device: torch.device) -> Outcome:
        """Call `generate` with a seed, and return what it did."""
        found = cls()
        torch.manual_seed(seed)
        try:
            found.output = generate(**arguments)
        except Exception as error:
            found.error = error
        found.generator = generator_state(device)
        found.cache = arguments.get(NAME, getattr(found.output, NAME, None))
        return found


def difference(plain: Outcome, ours: Outcome, *, tolerance: float = TOLERANCE) -> str | None:
    """Return the first thing in which `ours`, with drafts, differs from `plain`; None where there is none.

    Args:
        tolerance: absolute and relative, of scores, logits and what the cache holds.
    """
    if plain.error is not None or ours.error is not None:
        if type(plain.error) is type(ours.error) and str(plain.error) == str(ours.error):
            return None
        return f"plain {_did(plain.error)}, ours {_did(ours.error)}"
    found = (
        _sequences(plain, ours)
        or _output(plain, ours, tolerance)
        or _calls(plain, ours)
        or _streamed(plain, ours)
        or cache_difference(plain.cache, ours.cache, tolerance=tolerance)
    )
    if found is not None or plain.generator is None or ours.generator is None:
        return found
    same = torch.equal(plain.generator, ours.generator)
    return None if same else "the random generator is left in another state"


def _did(error: BaseException | None) -> str:
    return "returns" if error is None else f"raises {error!r}"


def _sequences(plain: Outcome, ours: Outcome) -> str | None:
    a, b = plain.sequences, ours.sequences
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return f"sequences: plain {_kind(a)}, ours {_kind(b)}\n{a.tolist()}\n{b.tolist()}"
    if not torch.equal(a, b):
        row, column = (a != b).nonzero()[0].tolist()
        return f"sequences differ first in row {row}, column {column}:\nplain {a.tolist()}\nours  {b.tolist()}"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _output(plain: Outcome, ours: Outcome, tolerance: float) -> str | None:
    a, b = plain.output, ours.output
    if type(a) is not type(b):
        return f"plain returns {type(a).__name__}, ours {type(b).__name__}"
    if isinstance(a, Tensor):
        return None
    if list(a.keys()) != list(b.keys()):
        return f"plain returns {list(a.keys())}, ours {list(b.keys())}"
    for name in ("scores", "logits"):
        if a.get(name) is None:
            continue
        if len(a[name]) != len(b[name]):
            return f"{name}: plain has {len(a[name])}, ours {len(b[name])}"
        for column, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
            if (found := _far(x, y, tolerance)) is not None:
                return f"{name}[{column}]: {found}"
    return None


def _far(x: Tensor, y: Tensor, tolerance: float) -> str | None:
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return f"plain {_kind(x)}, ours {_kind(y)}"
    if torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    rows = [(i, j) for i, j in enumerate((x - y).flatten(1).abs().amax(1).tolist()) if not j <= tolerance]
    return f"differs by more than {tolerance:g} in rows {rows}"


def _calls(plain: Outcome, ours: Outcome) -> str | None:
    for i, (a, b) in enumerate(zip(plain.calls, ours.calls, strict=False)):
        same = all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
        if not same:
            return f"call {i} of the user's own objects: plain {a}, ours {b}"
    if len(plain.calls) != len(ours.calls):
        return f"the user's own objects are called {len(plain.calls)} times plainly, {len(ours.calls)} times by us"
    return None


def _streamed(plain: Outcome, ours: Outcome) -> str | None:
    def shown(log: list[Any]) -> list[Any]:
        return [(str(x.dtype), tuple(x.shape), x.tolist()) if isinstance(x, Tensor) else x for x in log]

    a, b = shown(plain.streamed), shown(ours.streamed)
    return None if a == b else f"the streamer gets\nplain {a}\nours  {b}"


def cache_difference(a: Any, b: Any, *, tolerance: float = TOLERANCE) -> str | None:
    """Say how the cache `b`, of a run with drafts, differs from `a`, of a plain one; None where it does not."""
    if type(a) is not type(b):
        return f"cache: plain {type(a).__name__}, ours {type(b).__name__}"
    if a is None:
        return None
    if isinstance(a, EncoderDecoderCache):
        if a.is_updated != b.is_updated:
            return f"cross attention: plain {a.is_updated}, ours {b.is_updated}"
        names = ("self_attention_cache", "cross_attention_cache")
        parts = [cache_difference(getattr(a, name), getattr(b, name), tolerance=tolerance) for name in names]
        return next((one for one in parts if one is not None), None)
    if len(a.layers) != len(b.layers):
        return f"cache: plain has {len(a.layers)} layers, ours {len(b.layers)}"
    for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)):
        if type(x) is not type(y):
            return f"cache layer {i}: plain {type(x).__name__}, ours {type(y).__name__}"
        if (found := _layer_difference(vars(x), vars(y), tolerance)) is not None:
            return f"cache layer {i} {found}"
    return None


def _layer_difference(x: dict[str, Any], y: dict[str, Any], tolerance: float) -> str | None:
    """Compare all that two layers hold: keys, values, states, lengths."""
    if x.keys() != y.keys():
        return f"has {sorted(x)} plainly, {sorted(y)} with drafts"
    for name, value in x.items():
        if isinstance(value, Tensor):
            found = _far(value, y[name], tolerance)
        elif isinstance(value, dict):
            found = _layer_difference(value, y[name], tolerance)
        else:
            found = None if value == y[name] else f"{value}, ours {y[name]}"
        if found is not None:
            return f"{name}: {found}"
    return None
