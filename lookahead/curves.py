"""Cost curves that were measured beforehand, in a file: one for each model, device, dtype and batch size."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lookahead.cost import Seconds
from lookahead.errors import InvalidInput

FORMAT, VERSION = "lookahead curves", 1


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a pass by its nodes.

    Attributes:
        key: the model, device and dtype, as `key_of` names them.
        rows: the batch size.
        context: tokens of the context that it was measured at.
        nodes: nodes of every row, root included, rising.
        seconds: of a pass over so many.
        setting: the same for people.
    """

    key: str
    rows: int
    context: int
    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    setting: str = ""

    def at(self, nodes: Seconds) -> Seconds:
        """Return the seconds of passes over `nodes` ([N]), in straight lines between what was measured and beyond it."""
        known, seconds = np.array(self.nodes, np.float64), np.array(self.seconds)
        found: Seconds = np.interp(nodes, known, seconds)
        if len(known) > 1:
            slope = max((seconds[-1] - seconds[-2]) / (known[-1] - known[-2]), 0.0)
            found = found + np.maximum(nodes - known[-1], 0.0) * slope
        return found


class Curves:
    """All curves of a file."""

    def __init__(self, curves: tuple[Curve, ...] = ()) -> None:
        self.curves = curves

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Curves:
        """Read a file.

        Raises:
            InvalidInput: it cannot be read, or is not what `save` writes.
        """
        fix = "write it anew with `lookahead calibrate`"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(f"curves {path}: {(error.strerror or str(error)).lower()}; {fix}") from error
        except ValueError as error:
            raise InvalidInput(f"curves {path}: not a JSON file; {fix}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidInput(f"curves {path}: not a file of cost curves; {fix}")
        if data.get("version") != VERSION:
            raise InvalidInput(f"curves {path}: of version {data.get('version')!r}, this is {VERSION}; {fix}")
        try:
            return cls(tuple(_checked(one) for one in data["curves"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"curves {path}: a curve is damaged; {fix}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all curves to a file, which is replaced at once."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "version": VERSION, "curves": [asdict(one) for one in self.curves]}
        scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            scratch.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    def replaced(self, curve: Curve) -> Curves:
        """Return these curves with `curve` in place of one of the same key and batch size."""
        others = [one for one in self.curves if (one.key, one.rows) != (curve.key, curve.rows)]
        return Curves((*others, curve))

    def find(self, key: str, rows: int) -> Callable[[Seconds], Seconds] | None:
        """Return seconds by nodes for a batch of `rows` rows, from the curve of the nearest batch size; None: no curve."""
        fit = [one for one in self.curves if one.key == key]
        if not fit:
            return None
        near = min(fit, key=lambda one: abs(math.log(one.rows / rows)))
        return lambda nodes: near.at(np.maximum(nodes * rows / near.rows, 1.0))


def key_of(model: Any) -> str:
    """Return a short name for all of a model and its machine that decides what a pass costs."""
    return hashlib.sha256(setting_of(model).encode()).hexdigest()[:16]


def setting_of(model: Any) -> str:
    """Return the model's shape, device, dtype and threads in one line."""
    import torch

    config, weight = model.config, next(model.parameters())
    size = sum(parameter.numel() for parameter in model.parameters())
    device = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else weight.device.type
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads", "_attn_implementation")
    shape = ", ".join(f"{name.strip('_')} {getattr(config, name, '-')}" for name in names)
    threads = f", {torch.get_num_threads()} threads" if weight.device.type == "cpu" else ""
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{config.model_type}, {size} parameters, {shape}, {dtype}, {device}{threads}"


def _checked(one: dict[str, Any]) -> Curve:
    nodes, seconds = tuple(map(int, one["nodes"])), tuple(map(float, one["seconds"]))
    rising = all(a < b for a, b in zip(nodes, nodes[1:], strict=False))
    good = nodes and nodes[0] >= 1 and rising and len(nodes) == len(seconds) and int(one["rows"]) >= 1
    if not good or not all(s > 0 and math.isfinite(s) for s in seconds):
        raise ValueError
    return Curve(str(one["key"]), int(one["rows"]), int(one["context"]), nodes, seconds, str(one.get("setting", "")))
