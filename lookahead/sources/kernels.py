"""How numba functions are declared here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

Records = NDArray[Any]
"""An array of a structured type: one argument of a kernel instead of many, and one cache line instead of many."""

# Kernels get all their room from the caller, so they need none of numba's reference counts ("nrt"), whose atomic steps
# at every view of an array would take most of the time. What allocates, or returns a view, does not compile.
_OPTIONS: dict[str, Any] = {"_nrt": False, "no_cfunc_wrapper": True, "error_model": "numpy"}

_FILES = [
    file
    for folder in ("grammar", "pool", "sources")
    for file in Path(__file__).parents[1].joinpath(folder).glob("*.py")
]
_STAMP = tuple(sorted((file.name, file.stat().st_mtime_ns) for file in _FILES))


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a function that Python calls: compiled at the first call, and kept in numba's cache."""
    return _compile(function, {})


def background_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a function as `kernel` does, that lets other Python threads run meanwhile."""
    return _compile(function, {"nogil": True})


def _compile(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = njit(cache=True, **_OPTIONS, **options)(function)
    # numba looks at the kernel's own file alone; what is compiled into it comes from all files of these folders. Told
    # of them as of its own version, it does not even read what another one has left, whose types may be gone.
    cache = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache is not None:
        cache._version = (cache._version, _STAMP)
    return compiled


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a function that kernels may call; from Python it runs as plain Python.

    Only the kernels get an entry from Python and a place in numba's cache, which saves most of the compile time.
    """
    return _declare(function, {})


def inner_sum(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a function as `inner` does, whose sums may be taken in any order."""
    return _declare(function, {"fastmath": {"reassoc", "contract", "nsz"}})


def _declare(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # Inlined by force: to pass a tuple of arrays, every field is pushed on the stack, shape and strides too.
    declared: Callable[..., Any] = register_jitable(no_cpython_wrapper=True, forceinline=True, **_OPTIONS, **options)(
        function
    )
    return declared


def loader(kind: Any, to: Any) -> Callable[..., Any]:
    """Return a function for kernels that reads item `index` of an array of `kind` at `address`, as a number of `to`.

    Args:
        kind, to: types of numba, whole numbers; `kind` has no sign, and `to` no fewer bits.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def load(_typing: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            pointer = builder.inttoptr(values[0], context.get_value_type(kind).as_pointer())
            loaded = builder.load(builder.gep(pointer, [values[1]]))
            return loaded if kind.bitwidth == to.bitwidth else builder.zext(loaded, context.get_value_type(to))

        return to(types.int64, types.int64), generate

    loaded: Callable[..., Any] = load
    return loaded


def records(length: int, /, **fields: str) -> Records:
    """Return `length` zeroed records with these fields.

    >>> records(2, token="i4", chance="f4").dtype.names
    ('token', 'chance')
    """
    return np.zeros(length, np.dtype(list(fields.items()), align=True))
