"""Making a recording lighter: it does nothing twice, counts with numbers, and leaves out rows that nobody reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Half of a width, as where positions are rotated: three operations on tensors for one on numbers.
_DIVIDED = """
graph(%x, %dim, %by):
  %size : int = aten::size(%x, %dim)
  %held : Tensor = prim::NumToTensor(%size)
  %part : Tensor = aten::floor_divide(%held, %by)
  %out : int = aten::Int(%part)
  return (%out)
"""
_HALVED = """
graph(%x, %dim, %by):
  %size : int = aten::size(%x, %dim)
  %divisor : int = aten::Int(%by)
  %out : int = aten::floordiv(%size, %divisor)
  return (%out)
"""


def lighten(script: Any) -> None:
    """Let a recording do each thing but once, and count with numbers; what it computes stays."""
    # Shapes are those of the example, and would be folded into it.
    names = ("inline", "erase_shape_information", "constant_propagation", "cse", "dce", "constant_pooling")
    passes: list[Any] = [getattr(torch._C, f"_jit_pass_{name}", None) for name in names]
    passes.insert(2, getattr(torch._C, "_jit_pass_custom_pattern_based_rewrite_graph", None))
    if not all(passes):
        return  # another release of torch: it runs as it was recorded
    for i, one in enumerate(passes):
        one(*((_DIVIDED, _HALVED) if i == 2 else ()), script.graph)


def constants(script: Any) -> list[Tensor]:
    """Return the tensors that a recording keeps as they were, besides weights and buffers."""
    graph = script.inlined_graph  # which the nodes do not keep
    nodes = graph.findAllNodes("prim::Constant")
    return [one.t("value") for one in nodes if one.hasAttribute("value") and one.kindOf("value") == "t"]


_PLAIN = frozenset(
    {
        "add", "sub", "mul", "div", "pow", "rsqrt", "sqrt", "square", "reciprocal", "neg", "abs", "mean", "silu",
        "gelu", "relu", "tanh", "sigmoid", "clamp", "dropout", "to", "type_as", "contiguous", "clone", "slice",
        "layer_norm", "rms_norm", "linear",
    }
)  # fmt: skip
"""Operations that do the same with every row, as far as rows are still rows behind them."""
_PRODUCT = "mkldnn::_linear_pointwise"


def spare(script: Any, place: int) -> None:
    """Let a recording that picks rows of its last states pick them as early as each row stands for itself.

    Behind the attention of the last layer, what is computed of other rows is read by nobody.

    Args:
        place: of the tensor of rows [K] among the inputs.

    Raises:
        ValueError: it does not pick them once, along the second dimension.
    """
    graph = script.graph
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_lower_all_tuples(graph)
    wanted = list(graph.inputs())[place]
    picks = [use.user.output() for use in wanted.uses() if use.user.kind() == "prim::ListConstruct"]
    picked = [use.user for value in picks for use in value.uses() if use.user.kind() == "aten::index"]
    if len(picked) != 1 or len(list(wanted.uses())) != 1:
        raise ValueError("rows are not picked once")
    _Sparing(graph, picked[0], wanted).work()


class _Sparing:
    """Moves a pick of rows [B, N, …] -> [B, K, …] up a graph.

    Args:
        picked: the node that picks.
        wanted: the rows.
    """

    def __init__(self, graph: Any, picked: Any, wanted: Any) -> None:
        self._graph, self._picked, self._wanted = graph, picked, wanted
        self._given = next(picked.inputs())
        self._rows = self._given.type().sizes()[1]
        self._few: dict[int, Any] = {}  # what takes the place of a value, by that

    def work(self) -> None:
        """Do it."""
        for node in reversed(self._moved()):
            inputs = {value.unique(): self._few_of(value) for value in node.inputs() if self._has_rows(value)}
            copy = self._graph.createClone(node, lambda value, at=inputs: at.get(value.unique(), value))
            copy.insertBefore(self._picked)
            for old, new in zip(node.outputs(), copy.outputs(), strict=True):
                self._few[old.unique()] = new
        self._picked.output().replaceAllUsesWith(self._few_of(self._given))

    def _moved(self) -> list[Any]:
        """Return the nodes behind which only picked rows are read, the last first."""
        found, outputs = [], {self._picked.output().unique()}
        nodes = list(self._graph.nodes())
        at = next(i for i, node in enumerate(nodes) if self._is_same(node, self._picked))
        for node in reversed(nodes[:at]):
            users = [use.user for value in node.outputs() for use in value.uses()]
            read = {next((value.unique() for value in user.outputs()), None) for user in users}
            if read and read <= outputs and self._is_plain(node):
                outputs |= {value.unique() for value in node.outputs()}
                found.append(node)
        return found

    @staticmethod
    def _is_same(a: Any, b: Any) -> bool:
        return [one.unique() for one in a.outputs()] == [one.unique() for one in b.outputs()]

    def _is_plain(self, node: Any) -> bool:
        """Whether a node does the same with every row."""
        kind = node.kind()
        if kind == "prim::ListUnpack":
            above = next(node.inputs()).node()
            return above.kind() == "aten::split_with_sizes" and all(map(self._has_rows, node.outputs()))
        if kind in (_PRODUCT, "aten::split_with_sizes"):
            return self._has_rows(next(node.inputs()))
        return kind.removeprefix("aten::") in _PLAIN and self._has_rows(node.output())

    def _has_rows(self, value: Any) -> bool:
        """Whether a value is [B, N, …], or such in parts."""
        if value.unique() in self._few:
            return True
        node, kind = value.node(), value.type().kind()
        if node.kind() in (_PRODUCT, "aten::split_with_sizes"):  # of which no shapes are recorded
            return self._has_rows(next(node.inputs()))
        sizes = value.type().sizes() if kind == "TensorType" else None
        return sizes is not None and len(sizes) == 3 and sizes[1] == self._rows

    def _few_of(self, value: Any) -> Any:
        """Return the picked rows of a value."""
        if value.unique() not in self._few:
            along = self._graph.insertConstant(1)
            along.node().moveBefore(self._picked)
            pick = self._graph.create("aten::index_select", [value, along, self._wanted], 1)
            pick.insertBefore(self._picked)
            self._few[value.unique()] = pick.output()
        return self._few[value.unique()]
