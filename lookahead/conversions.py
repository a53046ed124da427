"""Where code that torch records turns a number of a tensor, or a size, into one of Python's."""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import overrides
from torch.overrides import TorchFunctionMode

from lookahead import packing

_TracerWarning: Any = torch.jit.TracerWarning  # type: ignore[attr-defined]

# What makes a number of a tensor, or of a size, one of Python's, which a recording keeps for ever.
_CONVERSIONS = frozenset(
    {
        "__bool__", "__int__", "__float__", "__index__", "__complex__", "__len__", "__contains__", "__array__",
        "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "is_same_size",
    }
)  # fmt: skip
# Lines that do so but only ask whether there is one query, or for what no pass changes.
_HARMLESS = (
    ("lookahead/attention.py", ""),  # batch and heads, and whether there is one node
    ("transformers/integrations/sdpa_attention.py", "q_length > 1"),
    ("transformers/integrations/sdpa_attention.py", "q_length == 1"),
    ("transformers/integrations/sdpa_attention.py", "query.shape[2] > 1"),
    ("transformers/integrations/sdpa_attention.py", "is_causal.item()"),
    ("transformers/integrations/sdpa_attention.py", "hidden_states is None or hidden_states.shape[1] == 1"),
    ("transformers/integrations/sdpa_attention.py", "key.shape[-1] == value.shape[-1]"),
    ("transformers/integrations/sdpa_attention.py", "if use_gqa_in_sdpa(attention_mask, key, value)"),
    ("transformers/masking_utils.py", "if (q_length == 1 or kv_length == q_length) and"),
    ("torch/nn/functional.py", "weight.size(0)"),  # of the embedding's padding_idx
)


_BETWEEN = (overrides.__file__, packing.__file__)  # what calls, between the code of a model and a mode of torch


@contextmanager
def conversions() -> Iterator[list[str]]:
    """Yield a list that afterwards says where numbers were turned into Python's.

    Two look for that: a mode of torch, which belongs to this thread alone, and the tracer itself, by warnings.
    """
    found: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with _Watch(found, said):
            yield found
        for one in _warned(said):
            if one.filename != __file__:  # else it was blamed on the caller
                _blame(one.filename, one.lineno, found)


class _Watch(TorchFunctionMode):
    """Looks for conversions of tensors to numbers of Python.

    Args:
        found: takes the lines that do so.
        said: the warnings so far.
    """

    def __init__(self, found: list[str], said: list[Any]) -> None:
        super().__init__()
        self._found, self._said = found, said

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self._said)
        result = func(*args, **(kwargs or {}))
        warned = any(one.filename == __file__ for one in _warned(self._said[before:]))
        if warned or getattr(func, "__name__", "") in _CONVERSIONS:
            frame: Any = sys._getframe(1)
            while frame.f_code.co_filename in _BETWEEN or "handle_torch_function" in _line(frame):
                frame = frame.f_back
            _blame(frame.f_code.co_filename, frame.f_lineno, self._found)
        return result


def _line(frame: Any) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def _warned(said: Sequence[Any]) -> list[Any]:
    return [one for one in said if issubclass(one.category, _TracerWarning)]


def _blame(file: str, number: int, found: list[str]) -> None:
    """Add a line of code to `found`, if it is not a harmless one."""
    line, file = linecache.getline(file, number), file.replace("\\", "/")
    if not any(file.endswith(name) and part in line for name, part in _HARMLESS):
        found.append(f"{file.rsplit('/', 1)[-1]}, line {number}: {line.strip()}")
