"""Cost curves that were measured beforehand, in a file: one for each model, device, dtype and batch size."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lookahead.cost import Costs, Seconds
from lookahead.errors import InvalidArgument, InvalidInput

FORMAT, VERSION = "lookahead curves", 1
LIMIT = 2**31  # of nodes, rows and context
ANOTHER = "give another file, or delete this one and write it anew with `lookahead calibrate`"


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a pass by its nodes.

    Attributes:
        key: the model, device, dtype and threads, as `key_of` names them.
        rows: the batch size.
        context: tokens of the context that it was measured at.
        nodes: nodes of every row, root included, rising.
        seconds: of a pass over so many; they never fall.
        setting: what `key` stands for, for people.

    Raises:
        InvalidArgument: it is no such curve.
    """

    key: str
    rows: int
    context: int
    nodes: tuple[int, ...]
    seconds: tuple[float, ...]
    setting: str = ""

    def __post_init__(self) -> None:
        texts = all(isinstance(text, str) for text in (self.key, self.setting))
        if not (texts and _are_counts((self.rows, self.context, *self.nodes)) and _are_seconds(self.seconds)):
            raise InvalidArgument("a curve has counts from 1 to 2^31, and seconds above 0 that are floats")
        if len(self.nodes) != len(self.seconds) or not self.nodes:
            raise InvalidArgument(f"a curve has seconds for {len(self.seconds)} of {len(self.nodes)} nodes; give all")
        falls = any(b < a for a, b in pairwise(self.seconds))
        if falls or any(b <= a for a, b in pairwise(self.nodes)):
            raise InvalidArgument("the nodes of a curve rise, and its seconds never fall; sort them")

    def at(self, nodes: Seconds) -> Seconds:
        """Return the seconds of passes over `nodes` ([N]), in straight lines between what was measured and beyond."""
        known, seconds = np.array(self.nodes, np.float64), np.array(self.seconds)
        found: Seconds = np.interp(nodes, known, seconds)
        if len(known) > 1:
            slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
            found = found + np.maximum(nodes - known[-1], 0.0) * slope
        return found


@dataclass(frozen=True, slots=True)
class Curves:
    """All curves of a file."""

    curves: tuple[Curve, ...] = ()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Curves:
        """Read a file.

        Raises:
            InvalidInput: it cannot be read, or is not what `save` writes.
        """
        data = _read(Path(path))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidInput(f"curves {path}: not a file of cost curves; {ANOTHER}")
        if data.get("version") != VERSION:
            version = reprlib.repr(data.get("version"))
            raise InvalidInput(f"curves {path}: of version {version}, and this lookahead reads {VERSION}; {ANOTHER}")
        try:
            return cls(tuple(_curve(one) for one in data["curves"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"curves {path}: a curve is damaged; {ANOTHER}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all curves to a file, which is replaced at once; its directory is made if it is not there."""
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

    def holds(self, key: str) -> bool:
        """Whether there is a curve of `key`, for any batch size."""
        return any(one.key == key for one in self.curves)

    def find(self, key: str, rows: int) -> Costs | None:
        """Return seconds by nodes for a batch of `rows` rows, from the curve of the nearest batch size; None: no curve.

        With another batch size, a pass costs what one over as many nodes in all rows together does.
        """
        fit = [one for one in self.curves if one.key == key]
        if not fit:
            return None
        near = min(fit, key=lambda one: (abs(math.log(one.rows / rows)), one.rows))
        return lambda nodes: near.at(np.maximum(nodes * rows / near.rows, 1.0))


def default_path() -> Path:
    """Return the file of the command line where none is named: in the user's cache directory."""
    given = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored, says the XDG specification
    return Path(given if Path(given).is_absolute() else os.path.expanduser("~/.cache"), "lookahead", "curves.json")


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
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if weight.device.type == "cpu" else ""
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{config.model_type}, {size} parameters, {shape}, {dtype}, {device}{threads}"


def _read(path: Path) -> Any:
    """Return what a JSON file holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(f"curves {path}: no such file; write it with `lookahead calibrate`") from error
    except OSError as error:
        raise InvalidInput(f"curves {path}: {(error.strerror or str(error)).lower()}; give another file") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"curves {path}: not UTF-8 text (byte {error.start}); {ANOTHER}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"curves {path}: not JSON ({error}); {ANOTHER}") from error


def _curve(one: dict[str, Any]) -> Curve:
    return Curve(**{**one, "nodes": tuple(one["nodes"]), "seconds": tuple(one["seconds"])})


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and 1 <= value <= LIMIT for value in values)


def _are_seconds(values: Sequence[Any]) -> bool:
    return all(isinstance(value, float) and 0.0 < value < math.inf for value in values)
