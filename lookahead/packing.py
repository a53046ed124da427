"""Weights in the order in which a CPU multiplies them fastest.

torch multiplies by a weight as it lies in memory. oneDNN, which torch comes with, has kernels for few rows that want it
in blocks, and then take a third to a half of the time. Here copies of the weights are laid out so, and recorded passes
(`lookahead.script`) multiply by the copies. In bfloat16 the products have the same bits; in float32 they are the same
sums in another order, as they are with another number of rows.

A copy must not outlive what it is a copy of: weights are looked at once in a call, all of their bits.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lookahead.model_state import precisions
from lookahead.sources.kernels import background_kernel

_SMALLEST = 1 << 14  # numbers of a weight that is worth a copy
_SHARE = 0.25  # of the memory that is free
_SURELY = 1 << 28  # bytes that may be taken where nobody says what is free
_TRIED = (33, 5, 1)  # rows of products that are compared
_NEAR = 1e-5  # by which products in float32 may differ, over the largest of them
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PRODUCT = """
def product(given: Tensor, packed: Tensor, bias: Optional[Tensor]) -> Tensor:
    scalars = torch.jit.annotate(List[Optional[number]], [])
    return torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", scalars, "")
"""
_LINEAR: Any = nn.functional.linear
_OPS: Any = torch.ops


class Pack:
    """The copy of one weight.

    Args:
        weight: [O, I]; or [I, O], where that is how the model multiplies by it (`addmm`).
        turned: whether it is the latter.

    Attributes:
        packed: the copy, in an order that only oneDNN knows.
    """

    def __init__(self, weight: Tensor, *, turned: bool) -> None:
        self.weight, self.turned = weight, turned
        self._data, self._seen = _bytes_of(weight), -1
        self.packed: Tensor
        self.refresh()

    def refresh(self) -> None:
        """Copy the weight again if it holds other values by now."""
        seen = _fingerprint(self._data)
        if seen == self._seen:
            return
        weight = self.weight.detach()
        with torch.no_grad():
            self.packed = _OPS.mkldnn._reorder_linear_weight(weight.t().contiguous() if self.turned else weight)
        self._seen = seen

    def right(self) -> bool:
        """Whether products by the copy are those by the weight: to the bit in 16 bits, to rounding in 32."""
        weight = self.weight.detach()
        weight, exact = weight.t() if self.turned else weight, weight.dtype != torch.float32
        random = torch.Generator().manual_seed(0)
        given = torch.randn((_TRIED[0], weight.shape[1]), generator=random).to(weight.dtype)
        for rows in _TRIED:
            expected, found = _LINEAR(given[:rows], weight), multiplied(given[:rows], self.packed, None)
            near = _NEAR * float(expected.abs().max())
            if not (torch.equal(expected, found) if exact else float((expected - found).abs().max()) <= near):
                return False
        return True


class Packs:
    """The copies of the weights of one model, each made when it is first asked for.

    Args:
        most: bytes that they may take together; None: a share of what is free now.

    Attributes:
        room, most: bytes that they may take, as it was given, and now.
        nbytes: that they take.
    """

    def __init__(self, most: int | None = None) -> None:
        self.room = self.most = _room() if most is None else most
        self._of: dict[Hashable, tuple[Tensor, Pack | None]] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def find(self, weight: Tensor, *, turned: bool) -> Pack | None:
        """Return the copy of a weight; None: it has to do without.

        Args:
            weight, turned: as of a `Pack`.
        """
        key = id(weight), turned  # of which the entry keeps it alive
        with self._lock:
            if key not in self._of:
                if self.nbytes + weight.nbytes > self.most:
                    return None
                self._of[key] = weight, _made(weight, turned=turned)
                self.nbytes += 0 if self._of[key][1] is None else weight.nbytes
            return self._of[key][1]

    def refresh(self) -> None:
        """Copy again what holds other values by now."""
        with self._lock:
            for _, pack in self._of.values():
                if pack is not None:
                    pack.refresh()


@cache
def _product() -> Any:
    """Return the function that multiplies by a copy; torch's own cannot be called while something is recorded."""
    unit: Any = torch.jit.CompilationUnit(_PRODUCT)
    return unit.product


def _made(weight: Tensor, *, turned: bool) -> Pack | None:
    if not _can_be_packed(weight):
        return None
    try:
        pack = Pack(weight, turned=turned)
        return pack if pack.right() else None
    except RuntimeError:  # this CPU has no such kernel
        return None


def multiplied(given: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return [..., O], the products of [..., I] by a copy, plus `bias` [O]."""
    products: Tensor = _product()(given, packed, bias)
    return products


def available() -> bool:
    """Whether torch multiplies by copies here, and as exactly as it does without."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch._C._get_mkldnn_enabled()
        and set(precisions()) <= {"", "none", "ieee", "highest"}
        and hasattr(_OPS.mkldnn, "_linear_pointwise")
        and hasattr(_OPS.mkldnn, "_reorder_linear_weight")
    )


@contextmanager
def noting(model: nn.Module) -> Iterator[dict[Hashable, tuple[Tensor, bool]]]:
    """Yield a table that takes the weights that `model` multiplies by, and whether they are turned."""
    found: dict[Hashable, tuple[Tensor, bool]] = {}
    own = {id(one) for one in model.parameters()}

    def note(given: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> None:
        if id(weight) in own and given.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype):
            found.setdefault((id(weight), turned), (weight, turned))

    with _Products(note):
        yield found


@contextmanager
def multiplying(packed: Mapping[Hashable, Tensor]) -> Iterator[None]:
    """Multiply by copies meanwhile, which are given by the keys of `noting`."""

    def multiply(given: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor | None:
        copy = packed.get((id(weight), turned))
        if copy is None or not (weight.dtype == torch.float32 or given.is_contiguous()):
            return None  # in 16 bits torch may round twice where rows do not lie together
        return multiplied(given, copy, bias)

    with _Products(multiply):
        yield


class _Products(TorchFunctionMode):
    """Asks what takes the place of products by weights.

    Args:
        of: gets what is multiplied, the weight, what is added or None, and whether the weight is turned; returns the
            products, or None where they are left to torch.
    """

    def __init__(self, of: Any) -> None:
        super().__init__()
        self._of = of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = None
        if func is _LINEAR:
            result = self._of(*_linear(*args, **(kwargs or {})), False)
        elif func is torch.addmm and not kwargs and len(args) == 3 and args[0].dim() == 1:
            bias, given, weight = args
            result = self._of(given, weight, bias, True)
        return func(*args, **(kwargs or {})) if result is None else result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _can_be_packed(weight: Tensor) -> bool:
    return (
        weight.dim() == 2
        and weight.dtype in _DTYPES
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.numel() >= _SMALLEST
    )


def _room() -> int:
    """Return how many bytes copies may take now."""
    free = [one for one in (_said_free(), _left_in_group()) if one is not None]
    return int(_SHARE * min(free)) if free else _SURELY


def _said_free(path: str = "/proc/meminfo") -> int | None:
    """Return the bytes that Linux could give out now."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_group(folder: str = "/sys/fs/cgroup") -> int | None:
    """Return the bytes that are left of the limit of a container."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (Path(folder, name).read_text(encoding="ascii").strip() for name in (limit, used))
        except OSError:
            continue
        if most != "max":
            return max(int(most) - int(now), 0)
    return None


def _bytes_of(weight: Tensor) -> NDArray[np.uint8]:
    """Return the memory of a weight without gaps; not by its own `numpy()`, which forbids to ever resize it."""
    data: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * weight.nbytes).from_address(weight.data_ptr()))
    return data


def _fingerprint(data: NDArray[np.uint8]) -> int:
    """Return a number that is another for other values: 64 bits of all bits, and of where they are."""
    whole = len(data) // 8 * 8
    mixed = int(_mixed(data[:whole].view(np.uint64)))
    return mixed if whole == len(data) else mixed ^ int.from_bytes(data[whole:].tobytes(), "little")


@background_kernel
def _mixed(words: Any) -> Any:
    """Return the sum of all words, each mixed with its place, modulo 2**64; memory is what takes the time.

    The mixing is that of SplitMix64 (Steele, Lea and Flood 2014), in which every bit moves half of all bits.
    """
    odd, total = np.uint64(0x9E3779B97F4A7C15), np.uint64(0)
    for i in range(len(words)):
        word = words[i] + np.uint64(i) * odd
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total += word ^ (word >> np.uint64(31))
    return total
