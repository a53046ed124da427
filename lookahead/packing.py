"""Weights in the order in which a CPU multiplies them fastest.

torch multiplies by a weight as it lies in memory. oneDNN, which torch comes with, has kernels for few rows that want it
in blocks, and then take a third to a half of the time. Here copies of the weights are laid out so, and recorded passes
(`lookahead.script`) multiply by the copies. In bfloat16 the products have the same bits; in float32 they are the same
sums in another order, as they are with another number of rows. Weights that multiply the same thing, such as those of
queries, keys and values, have one copy side by side in float32: one call instead of three.

A copy must not outlive what it is a copy of: weights are looked at once in a call, all of their bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lookahead.model_state import precisions
from lookahead.sources.kernels import background_kernel, loader

_SMALLEST = 1 << 14  # numbers of a weight that is worth a copy
_SHARE = 0.25  # of the memory that is free
_LITTLE = 1 << 22  # bytes of weights that are looked at sooner than a thread begins
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


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What something is multiplied by at once: weights, and what is added then.

    Attributes:
        weights: each [O, I]; or a single one of [I, O], where that is how the model multiplies by it (`addmm`).
        biases: each [O]; or None, all of them.
        turned: whether it is the latter.
        sizes: how many products there are by each weight; numbers, also while something is recorded.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...] = (None,)
    turned: bool = False
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(int(one.shape[0]) for one in self.weights))

    @property
    def key(self) -> Hashable:
        """Tells its weights from others, as long as there are these."""
        return self.turned, *map(id, self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(one.nbytes for one in self.weights)

    @property
    def parts(self) -> list[Factor]:
        """Its weights apart."""
        return [Factor((one,), (bias,), self.turned) for one, bias in zip(self.weights, self.biases, strict=True)]


class Pack:
    """The copy of weights.

    Args:
        factor: which.

    Attributes:
        packed: the copy, in an order that only oneDNN knows.
        nbytes: bytes of the weights.
        places: [W, 2] their addresses, and the bytes of each.
    """

    def __init__(self, factor: Factor) -> None:
        self._factor, self.nbytes = factor, factor.nbytes
        # [W, 2]: where they lie in memory, and their bytes; as long as they are there, which the factor sees to.
        self.places = np.array([(one.data_ptr(), one.nbytes) for one in factor.weights], np.int64)
        self._seen: list[int] = []
        self.packed: Tensor
        self.refresh(_fingerprints(self.places))

    def refresh(self, seen: list[int]) -> None:
        """Copy the weights again if they hold other values by now, whose fingerprints are `seen`."""
        if seen == self._seen:
            return
        with torch.no_grad():
            self.packed = _OPS.mkldnn._reorder_linear_weight(_whole(self._factor))
        self._seen = seen

    @property
    def storages(self) -> list[Any]:
        """The memory of the weights, which stays as long as somebody holds it."""
        return [one.untyped_storage() for one in self._factor.weights]

    def right(self) -> bool:
        """Whether products by the copy are those by the weights: to the bit in 16 bits, to rounding in 32."""
        weight = _whole(self._factor)
        exact = weight.dtype != torch.float32
        random = torch.Generator().manual_seed(0)
        given = torch.randn((_TRIED[0], weight.shape[1]), generator=random).to(weight.dtype)
        for rows in _TRIED:
            expected, found = _LINEAR(given[:rows], weight), multiplied(given[:rows], self.packed, None)
            near = _NEAR * float(expected.abs().max())
            if not (torch.equal(expected, found) if exact else float((expected - found).abs().max()) <= near):
                return False
        return True


def _whole(factor: Factor) -> Tensor:
    """Return [O, I], all weights one behind the other."""
    weights = [one.detach() for one in factor.weights]
    return weights[0].t().contiguous() if factor.turned else torch.cat(weights) if len(weights) > 1 else weights[0]


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
        self._of: dict[Hashable, tuple[Factor, Pack | None]] = {}
        self._lock = threading.Lock()
        self._looking: _Looking | None = None
        self.nbytes = 0

    def find(self, factor: Factor) -> Pack | None:
        """Return the copy of weights; None: they have to do without."""
        key = factor.key  # of which the entry keeps the weights alive
        with self._lock:
            if key not in self._of:
                if self.nbytes + factor.nbytes > self.most:
                    return None
                self._of[key] = factor, _made(factor)
                self.nbytes += 0 if self._of[key][1] is None else factor.nbytes
            return self._of[key][1]

    def all_of(self, factors: Iterable[Factor]) -> dict[Factor, Pack]:
        """Return the copies of what is to be multiplied by, as far as there are any; of weights apart if need be."""
        found: dict[Factor, Pack] = {}
        for factor in factors:
            whole = self.find(factor)
            parts = [] if whole is not None or len(factor.weights) == 1 else factor.parts
            made = {factor: whole} | {one: self.find(one) for one in parts}
            found |= {one: pack for one, pack in made.items() if pack is not None}
        return found

    def refresh(self) -> None:
        """Begin to copy again what holds other values by now; who multiplies by the copies calls `settle` first.

        Weights are looked at beside what the caller does next: a prompt has to be read before the model is needed.
        """
        if self.nbytes < _LITTLE:
            self._refresh()
            return
        packs = [pack for _, pack in list(self._of.values()) if pack is not None]
        self._looking = _Looking(self._refresh, [one for pack in packs for one in pack.storages])

    def settle(self) -> None:
        """Wait until all copies are of what the weights were at the last `refresh`, or later.

        Raises:
            RuntimeError: they could not be copied.
        """
        looking = self._looking
        if looking is not None:
            looking.wait()
            if self._looking is looking:
                self._looking = None

    def _refresh(self) -> None:
        with self._lock:
            packs = [pack for _, pack in self._of.values() if pack is not None]
            if not packs:
                return
            seen = _fingerprints(np.concatenate([pack.places for pack in packs]))
            for pack in packs:
                pack.refresh([seen.pop(0) for _ in pack.places])


class _Looking:
    """Something done in a thread of its own, whose failure is told to who waits for it.

    Args:
        held: memory that it reads; a call may end, and a weight be given other memory, before it is done.
    """

    def __init__(self, work: Callable[[], None], held: Sequence[Any]) -> None:
        self._work, self.held = work, held
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lookahead-weights", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure = error
        finally:
            self.held = ()

    def wait(self) -> None:
        """Wait until it is done."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure


@cache
def _product() -> Any:
    """Return the function that multiplies by a copy; torch's own cannot be called while something is recorded."""
    unit: Any = torch.jit.CompilationUnit(_PRODUCT)
    return unit.product


def _made(factor: Factor) -> Pack | None:
    if not all(_can_be_packed(one) for one in factor.weights):
        return None
    try:
        pack = Pack(factor)
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


class Noted:
    """The products by the weights of a model in a pass.

    Attributes:
        given: what was multiplied; held, so that ids stay theirs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {id(one) for one in model.parameters()}
        # By whether weights are turned, and what they have in common: weights and biases, by weight.
        self._products: dict[tuple[bool, Hashable], dict[int, tuple[Tensor, Tensor | None]]] = {}
        self.given: list[Tensor] = []

    def note(self, given: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> None:
        """Take in a product."""
        if id(weight) not in self._own or not given.dtype == weight.dtype == (weight if bias is None else bias).dtype:
            return
        self.given.append(given)
        joins = weight.dtype == torch.float32 and not turned and _can_be_packed(weight)
        joins = joins and (bias is None or id(bias) in self._own)
        same: Hashable = (id(given), given._version, bias is None) if joins else id(weight)
        self._products.setdefault((turned, same), {})[id(weight)] = weight, bias

    @property
    def factors(self) -> list[Factor]:
        """What it multiplies by; weights side by side where they never multiply but together."""
        groups = [tuple(held.values()) for held in self._products.values()]
        ways: dict[int, set[Hashable]] = {}
        for group in groups:
            for weight, _ in group:
                ways.setdefault(id(weight), set()).add(tuple((id(one), id(bias)) for one, bias in group))
        found: dict[Hashable, Factor] = {}
        for (turned, _), group in zip(self._products, groups, strict=True):
            weights, biases = zip(*group, strict=True)
            whole = Factor(weights, biases, turned)
            stands = len(group) == 1 or all(len(ways[id(one)]) == 1 for one in weights)
            found |= {one.key: one for one in ((whole,) if stands else whole.parts)}
        return list(found.values())


@contextmanager
def noting(model: nn.Module) -> Iterator[Noted]:
    """Yield what takes in the products by weights of `model` meanwhile."""
    noted = Noted(model)
    with _Products(noted.note):
        yield noted


@contextmanager
def multiplying(packed: Mapping[Factor, Tensor]) -> Iterator[None]:
    """Multiply by copies meanwhile."""
    places = {(id(one), factor.turned): (factor, i) for factor in packed for i, one in enumerate(factor.weights)}
    latest: dict[Factor, tuple[Tensor, int, Sequence[Tensor]]] = {}  # what was multiplied last, and the products

    def multiply(given: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor | None:
        place = places.get((id(weight), turned))
        if place is None or not (weight.dtype == torch.float32 or given.is_contiguous()):
            return None  # in 16 bits torch may round twice where rows do not lie together
        factor, i = place
        if len(factor.weights) == 1:
            return multiplied(given, packed[factor], bias)
        if bias is not factor.biases[i]:
            return None
        known = latest.get(factor)
        if known is None or known[0] is not given or known[1] != given._version:
            known = latest[factor] = given, given._version, _apart(given, packed[factor], factor)
        return known[2][i]

    with _Products(multiply):
        yield


def _apart(given: Tensor, packed: Tensor, factor: Factor) -> Sequence[Tensor]:
    """Return the products by each of the weights of a copy."""
    biases = [one for one in factor.biases if one is not None]
    products = multiplied(given, packed, torch.cat(biases) if biases else None)
    parts: Sequence[Tensor] = torch.split(products, list(factor.sizes), dim=-1)
    return parts


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


def _fingerprints(places: NDArray[np.int64]) -> list[int]:
    """Return a number of each piece of memory ([W, 2]: address and bytes) that is another for other bits in it."""
    found = np.zeros(len(places), np.uint64)
    _mix(places, found)
    numbers: list[int] = found.tolist()
    return numbers


_word, _byte = loader(types.uint64, types.uint64), loader(types.uint8, types.uint64)


@background_kernel
def _mix(places, found):  # type: ignore[no-untyped-def]
    """Fill `found` with the sums of all words, each mixed with its place, modulo 2**64; memory is what takes the time.

    The mixing is that of SplitMix64 (Steele, Lea and Flood 2014), in which every bit moves half of all bits.
    """
    odd = np.uint64(0x9E3779B97F4A7C15)
    for n in range(len(places)):
        address, words, total = places[n, 0], places[n, 1] // 8, np.uint64(0)
        for i in range(words):
            word = _word(address, i) + np.uint64(i) * odd
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            total += word ^ (word >> np.uint64(31))
        for i in range(8 * words, places[n, 1]):
            total ^= _byte(address, i) << np.uint64(8 * (i % 8))
        found[n] = total
