"""Passes without the Python between their tensor operations: a model's forward, recorded once for all shapes.

What `transformers` does around the operations of a small model takes a fifth of a pass on a CPU. `torch.jit.trace`
records the operations themselves, with sizes that are looked up as they run; so one recording serves trees of any
number of nodes behind any context, and computes the same bits, but for what it multiplies by copies of weights
(`lookahead.packing`) in float32. A CUDA graph does as much and more on a GPU
(`lookahead.static`), for one shape each.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lookahead.attention import implementation_of, shared_heads
from lookahead.cache import TreeCache, TreeLayer
from lookahead.conversions import conversions
from lookahead.cost import Costs
from lookahead.families import Family, text_config
from lookahead.model_state import LARGEST, state_of
from lookahead.packing import Factor, Pack, Packs, available, multiplying, noting
from lookahead.static.choice import reason_against
from lookahead.topk import TOP, best_tokens

WORTH = 256  # passes after which a recording has been worth its time, which is that of some two hundred
_SLOW_S = 0.25  # of a pass: what Python takes is no longer worth a recording
_KEPT = 8  # batch sizes, and states, whose recordings are kept of a model
_MOST = 4096  # modules that are recorded in a process, once for each recording: torch keeps 0.1 MB of each for ever
_JIT: Any = torch.jit  # whose types say little
_TREE, _PADDED, _NODE, _PROMPT = "tree", "padded node", "node", "prompt"  # kinds; the last two have no mask
_EXAMPLES = {  # nodes and slots before them: recorded with the first, compared with the others
    _TREE: ((4, 7), (2, 3), (9, 21), (5, 40), (3, 700)),
    _PADDED: ((1, 7), (1, 1), (1, 40), (1, 700)),
    _NODE: ((1, 7), (1, 1), (1, 40), (1, 700)),
    _PROMPT: ((4, 0), (2, 0), (9, 0), (40, 0), (160, 0)),
}

_TIMED = 1, 5, 12, 25, 49  # nodes of trees whose passes are timed
_BEHIND = 512  # slots before them at most
_ROUNDS = 4  # times that they are; the first does not count
_SHARES = {_TREE: 1.0, _PADDED: 1.0, _NODE: 1.0, _PROMPT: 0.25}  # of the passes: over a prompt, each saves more

Held = tuple[Tensor, Tensor]
"""Keys and values of a layer."""

_RECORDING = threading.Lock()  # torch records one function at a time
_made = 0  # modules that were recorded in this process


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of one kind of pass.

    Attributes:
        kind: "tree"; "node", over a single one in each row; "padded node", with a mask; or "prompt", which is not
            padded, and comes first.
        rows: the batch size.
        seconds: that recording and trying it took.
        refused: why such passes run as they are written; "": they do not.
        copied: bytes of the weights that it multiplies by copies of, see `lookahead.packing`.
    """

    kind: str
    rows: int
    seconds: float
    refused: str = ""
    copied: int = 0


class _Refused(Exception):
    """No recording can stand for the model."""


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Writes the last rows of what it is to show; `lookahead.cache.TreeLayer`, for one pass."""

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, used: Any, kind: str) -> None:
        super().__init__()
        self.keys, self.values, self._kind = keys, values, kind
        self._used, self._held = used, 0 if kind == _PROMPT else used
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.narrow(2, self._used, states.size(2)).copy_(states)
        if self._kind == _PROMPT:  # as in the ordinary cache that it is to fill
            self._held = key_states.size(2)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Return how much is held; for those who only find out that one node needs no mask, any number will do."""
        return 1 if self._kind == _NODE and _JIT.is_tracing() and _masks_ask() else self._held


def _masks_ask() -> bool:
    """Whether the functions of `transformers` that make masks are among the latest callers."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame.f_code.co_filename.endswith("masking_utils.py"):
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


class _Pass(nn.Module):
    """A pass as a function of tensors alone.

    Args:
        kind: of pass.
        layers: of the cache; those that hold nothing are passed on as they are.
        names: of the masks, where the model takes one for each kind of layers; (): it takes one; None: it takes none.
    """

    def __init__(
        self, kind: str, model: Any, family: Family, layers: Sequence[Any], names: Sequence[str] | None
    ) -> None:
        super().__init__()
        self.model = model
        self._kind, self._family, self._names = kind, family, names
        self._last = {"logits_to_keep": 1} if kind == _PROMPT and model._supports_logits_to_keep() else {}
        # Then it is known that one node needs no mask; otherwise one is made even so, of the right size.
        self.skips = kind == _NODE and implementation_of(text_config(model)) == "sdpa"
        self._layers = [None if isinstance(layer, TreeLayer) else layer for layer in layers]
        self.packs: dict[Factor, Pack] = {}  # by what it multiplies by

    def forward(self, tokens: Tensor, positions: Tensor, span: Tensor, *tensors: Tensor) -> Tensor:
        """Return the logits [B, N, V]; behind a prompt, at least the last ones.

        Args:
            tokens, positions: [B, N].
            span: [S + N], as long as what the pass sees.
            tensors: the masks, then copies of weights, then keys and values of every layer, with room for more.
        """
        count = 0 if self._names is None else max(len(self._names), 1)
        masks, copies = tensors[:count], tensors[count : count + len(self.packs)]
        held = iter(tensors[count + len(self.packs) :])
        end = span.size(0)
        used, layers = end - tokens.size(1), []
        for layer in self._layers:
            if layer is None:
                kind = self._kind if self._kind != _NODE or self.skips else ""
                layer = _Layer(next(held).narrow(2, 0, end), next(held).narrow(2, 0, end), used, kind)
            layers.append(layer)
        mask: Any = dict(zip(self._names, masks, strict=True)) if self._names else masks[0] if masks else None
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        given |= {self._family.cache: Cache(layers=layers), "use_cache": True, "return_dict": True, **self._last}
        with shared_heads(text_config(self.model)), multiplying(dict(zip(self.packs, copies, strict=True))):
            logits: Tensor = self.model(**given, **dict(self._family.inputs)).logits
        return logits


class Script:
    """The recording of one kind of pass.

    Args:
        module: what was recorded.
        seconds: that recording and trying it took.
        packs: of the weights that it multiplies by copies of.

    Attributes:
        refused: why passes run as they are written; "": they do not.
        costs: what passes over trees take, where that was measured.
    """

    costs: Costs | None = None

    def __init__(self, module: Any, refused: str, seconds: float, packs: Sequence[Pack] = ()) -> None:
        self._failure = ""
        self._module, self.refused, self.seconds, self._packs = module, refused, seconds, packs
        self._span = torch.zeros(1)

    @property
    def copied(self) -> int:
        """Bytes of the weights that it multiplies by copies of."""
        return sum(one.nbytes for one in self._packs)

    def run(self, tokens: Tensor, positions: Tensor, mask: Any, cache: TreeCache) -> Tensor | None:
        """Return the logits [B, N, V] of a pass, whose rows go behind what `cache` holds; None: it has failed.

        Args:
            tokens, positions: [B, N].
            mask: None, a tensor, or tensors by the names of the kinds of layers.
        """
        buffers = cache.buffers(tokens.shape[1])
        masks = () if mask is None else mask.values() if isinstance(mask, Mapping) else (mask,)
        return self._run(tokens, positions, cache.used, masks, buffers)

    def prefill(self, tokens: Tensor, positions: Tensor, cache: Any, layers: Mapping[int, Held]) -> Tensor | None:
        """Return the last logits [B, 1, V] of a prompt, and fill the empty `cache`; None: it has failed.

        Args:
            tokens, positions: [B, N].
            layers: which of the cache's hold something, and what.
        """
        rows, slots = tokens.shape
        buffers = [one.new_empty((rows, one.shape[1], slots, one.shape[3])) for held in layers.values() for one in held]
        logits = self._run(tokens, positions, 0, (), buffers)
        if logits is not None:
            for layer, keys, values in zip(layers, buffers[::2], buffers[1::2], strict=True):
                cache.update(keys, values, layer)
        return logits if logits is None else logits[:, -1:]

    def _run(
        self, tokens: Tensor, positions: Tensor, used: int, masks: Iterable[Tensor], buffers: Iterable[Tensor]
    ) -> Tensor | None:
        span = self._span.expand(used + tokens.shape[1])
        try:
            return _run(self._module, tokens, positions, span, *masks, *(one.packed for one in self._packs), *buffers)
        except RuntimeError as error:
            self._failure = f"it failed where it had not been tried: {_said(error)}"
            return None

    def give_up(self) -> None:
        """Be used no more if the last run has failed; what is really wrong fails without a recording, too."""
        self.refused = self.refused or self._failure


class Scripts:
    """The recordings of one model in one state, for one batch size.

    Args:
        packs: copies of its weights to multiply by; None: it is to do without.

    Attributes:
        worth: passes of a kind after which it is recorded.
    """

    def __init__(self, family: Family, rows: int, packs: Packs | None) -> None:
        self.worth = WORTH
        self._family, self._rows, self._packs = family, rows, packs
        self._made: dict[str, Script] = {}  # by kind
        self._passes = dict.fromkeys(_EXAMPLES, 0)
        self._layers: dict[int, Held] = {}
        self._lock = threading.Lock()

    @property
    def recorded(self) -> list[Recorded]:
        """What became of the kinds of passes so far."""
        made = list(self._made.items())
        return [Recorded(kind, self._rows, one.seconds, one.refused, one.copied) for kind, one in made]

    @property
    def ready(self) -> tuple[str, str]:
        """How passes over trees, and over single nodes, run: "" as written, "recorded", or "packed", with copies."""
        found = [self._made.get(kind) for kind in (_TREE, _NODE)]
        trees, nodes = ("" if one is None or one.refused else "packed" if one.copied else "recorded" for one in found)
        return trees, nodes

    @property
    def costs(self) -> Costs | None:
        """What passes over trees take as recorded; None: they are not, or it was not measured."""
        script = self._made.get(_TREE)
        return None if script is None or script.refused else script.costs

    def find(self, model: Any, mask: Any, nodes: int, cache: TreeCache, seconds: float) -> Script | None:
        """Return the recording of passes of this kind, which is made where it is worth it; None: there is none.

        Args:
            seconds: that the pass before took.
        """
        if mask is None and nodes > 1:
            return None
        kind = _NODE if mask is None else _PADDED if nodes == 1 else _TREE
        return self._found(kind, model, mask, cache, seconds)

    def prefill(self, tokens: Tensor, cache: Any) -> Tensor | None:
        """Return the last logits [B, 1, V] of a prompt [B, N] without padding, and fill the empty `cache`.

        None: it is not recorded.
        """
        script = self._made.get(_PROMPT)
        if script is None or script.refused:
            return None
        positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
        return script.prefill(tokens, positions, cache, self._layers)

    def prefilled(self, model: Any, cache: TreeCache, seconds: float) -> None:
        """Tell of a prompt that was not recorded, and took so long; record the next one if that is worth it."""
        self._layers = {
            i: (layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone())
            for i, layer in enumerate(cache.layers)
            if isinstance(layer, TreeLayer)
        }
        if _PROMPT in self._made:
            self._made[_PROMPT].give_up()
        self._found(_PROMPT, model, None, cache, seconds)

    def _found(self, kind: str, model: Any, mask: Any, cache: TreeCache, seconds: float) -> Script | None:
        if kind not in self._made:
            self._passes[kind] += 1
            slow = seconds > _SLOW_S and self.worth and self._packs is None
            if slow or self._passes[kind] <= self.worth * _SHARES[kind]:
                return None
            with self._lock:
                if kind not in self._made:
                    self._made[kind] = self._make(kind, model, mask, cache)
        script = self._made[kind]
        return None if script.refused else script

    def _make(self, kind: str, model: Any, mask: Any, cache: TreeCache) -> Script:
        begin, reason, module, written, costs = time.perf_counter(), "", None, None, None
        names = None if mask is None else tuple(mask) if isinstance(mask, Mapping) else ()
        try:
            if kind in (_NODE, _PROMPT) and not all(reach.whole for _, reach in self._family.reaches):
                raise _Refused("the model makes masks of windows itself, where a node is alone")
            written = _Pass(kind, model, self._family, cache.layers, names)
            module = _recorded(kind, written, cache, self._packs)
            costs = _costs(module, written, cache) if kind == _TREE else None
        except Exception as error:  # a model may do anything; as it is written it runs all the same
            reason = _said(error)
        packs = () if written is None or reason else tuple(written.packs.values())
        script = Script(module, reason, 0.0, packs)
        script.costs = costs
        script.seconds = time.perf_counter() - begin
        return script


def _run(module: Any, *tensors: Tensor) -> Tensor:
    with torch.inference_mode(), _JIT.optimized_execution(False):
        logits: Tensor = module(*tensors)
    return logits


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _recorded(kind: str, module: _Pass, cache: TreeCache, packs: Packs | None) -> Any:
    """Return the recording of a pass.

    Made in a thread of its own: torch keeps, for each operation, all that was being called when it was recorded.

    Raises:
        _Refused: it turns a number into one of Python's, so that it may do something else with another; or it does.
    """
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(_tried(kind, module, cache, packs))
        except BaseException as error:
            found.append(error)

    with _RECORDING:
        thread = threading.Thread(target=work, name="lookahead-recording")
        thread.start()
        try:
            thread.join()
        except BaseException:  # such as Ctrl-C: two must not record at once
            thread.join()
            raise
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _tried(kind: str, module: _Pass, cache: TreeCache, packs: Packs | None) -> Any:
    factors, skips = [] if packs is None else _factors(kind, module, cache), module.skips
    parts = [part for one in factors for part in one.parts]
    for tried in (factors, parts) if len(parts) > len(factors) else (factors,):  # by weights together, and by each
        module.packs, module.skips = {} if packs is None else packs.all_of(tried), skips
        if not module.packs:
            break
        with suppress(Exception):
            return _skipping(kind, module, cache)
    module.packs, module.skips = {}, skips  # with the weights themselves it may be recorded
    return _skipping(kind, module, cache)


def _factors(kind: str, module: _Pass, cache: TreeCache) -> list[Factor]:
    """Return what a pass multiplies by."""
    with torch.no_grad(), noting(module.model) as noted:
        module(*_example(module, cache, *_EXAMPLES[kind][1]))
    return noted.factors


def _skipping(kind: str, module: _Pass, cache: TreeCache) -> Any:
    if module.skips:
        try:
            return _compared(kind, module, cache)
        except RuntimeError:  # this release of transformers, or this model, makes masks of all that is recorded
            module.skips = False
    return _compared(kind, module, cache)


def _compared(kind: str, module: _Pass, cache: TreeCache) -> Any:
    global _made
    count = sum(1 for _ in module.modules())
    if _made + count > _MOST:
        raise _Refused(f"this process has recorded {_made} modules, and torch does not free all of their memory")
    _made += count
    table = module._family.table or sys.maxsize  # beyond whose rows no pass goes
    example, *others = [(nodes, used) for nodes, used in _EXAMPLES[kind] if nodes + used <= table]
    with torch.no_grad():
        with conversions() as found:
            script = _JIT.trace(module, _example(module, cache, *example), check_trace=False, strict=False)
        if found:
            raise _Refused(f"what it does may depend on numbers: {found[0]}")
        if not isinstance(script, _JIT.ScriptModule):
            raise _Refused("torch records nothing here")
        if any(one.numel() > LARGEST for one in _constants(script)):
            raise _Refused("it holds tensors that are neither weights nor buffers")
        _lighten(script)
        for nodes, used in others:
            tensors = _example(module, cache, nodes, used)
            again = [one if one.is_mkldnn else one.clone() for one in tensors]
            expected, logits = module(*tensors), _run(script, *again)
            pairs = zip([expected, *tensors], [logits, *again], strict=True)
            same = all(a is b or torch.equal(a, b) for a, b in pairs)
            if not (same and expected.isfinite().all()):
                raise _Refused("recorded, it computes something else")
    return script


def _costs(script: Any, module: _Pass, cache: TreeCache) -> Costs | None:
    """Measure what passes over trees of growing sizes take, until their best tokens are known."""
    table = module._family.table or sys.maxsize
    used = min(cache.used, _BEHIND)  # each example has keys and values of its own
    sizes = [nodes for nodes in _TIMED if nodes + used <= table]
    given = [_example(module, cache, nodes, used) for nodes in sizes]
    took = np.zeros((_ROUNDS, len(sizes)))
    for row in took:
        for i, tensors in enumerate(given):
            begin = time.perf_counter()
            best_tokens(_run(script, *tensors).flatten(0, 1).float(), TOP)
            row[i] = time.perf_counter() - begin
    # What disturbs a pass only ever slows it down.
    seconds = np.minimum.accumulate(took[1:].min(0)[::-1])[::-1]
    if not len(sizes) or not seconds[0] > 0.0:  # such as by a clock that is too coarse
        return None
    known = np.array(sizes, np.float64)
    slope = (seconds[-1] - seconds[0]) / max(known[-1] - known[0], 1.0)
    return lambda nodes: np.interp(nodes, known, seconds) + slope * np.maximum(nodes - known[-1], 0.0)


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


def _lighten(script: Any) -> None:
    """Let a recording do each thing but once, and count with numbers; what it computes stays."""
    # Shapes are those of the example, and would be folded into it.
    names = ("inline", "erase_shape_information", "constant_propagation", "cse", "dce", "constant_pooling")
    passes: list[Any] = [getattr(torch._C, f"_jit_pass_{name}", None) for name in names]
    passes.insert(2, getattr(torch._C, "_jit_pass_custom_pattern_based_rewrite_graph", None))
    if not all(passes):
        return  # another release of torch: it runs as it was recorded
    for i, one in enumerate(passes):
        one(*((_DIVIDED, _HALVED) if i == 2 else ()), script.graph)


def _constants(script: Any) -> list[Tensor]:
    """Return the tensors that a recording keeps as they were, besides weights and buffers."""
    graph = script.inlined_graph  # which the nodes do not keep
    nodes = graph.findAllNodes("prim::Constant")
    return [one.t("value") for one in nodes if one.hasAttribute("value") and one.kindOf("value") == "t"]


def _example(module: _Pass, cache: TreeCache, nodes: int, used: int) -> tuple[Tensor, ...]:
    """Return what `_Pass.forward` takes for random trees behind a random context."""
    random = torch.Generator().manual_seed(nodes)
    held, end, dtype = cache.buffers(0), used + nodes, cache.attention[0].dtype
    batch = held[0].shape[0]
    vocabulary = module.model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (batch, nodes), generator=random)
    steps = 1 if module._kind == _PROMPT else 2
    positions = used + torch.arange(nodes).div(steps, rounding_mode="floor").expand(batch, -1)
    names = module._names
    masks = []
    for _ in range(0 if names is None else max(len(names), 1)):
        shown = torch.rand((batch, 1, nodes, end), generator=random) < 0.7
        shown[..., used:] &= torch.ones((nodes, nodes), dtype=torch.bool).tril()
        shown[..., range(nodes), range(used, end)] = True
        masks.append(torch.zeros(shown.shape, dtype=dtype).masked_fill_(~shown, torch.finfo(dtype).min))
    buffers = [torch.randn((*one.shape[:2], end + 3, one.shape[3]), generator=random).to(one.dtype) for one in held]
    copies = [one.packed for one in module.packs.values()]
    return tokens, positions.contiguous(), torch.zeros(1).expand(end), *masks, *copies, *buffers


class _Kept:
    """The recordings of one model, those last that were used last."""

    def __init__(self) -> None:
        self.scripts: dict[tuple[Hashable, ...], Scripts] = {}
        self.packs: tuple[Hashable, Packs] | None = None  # and the weights that they are copies of

    def packs_of(self, weights: Hashable) -> Packs:
        """Return the copies of the model's weights, which may be of other values by now."""
        if self.packs is None:
            self.packs = weights, Packs()
        return self.packs[1]

    def clear(self, weights: Hashable = None) -> None:
        """Free all that does not belong to `weights`."""
        for key in [one for one in self.scripts if one[0] != weights]:
            del self.scripts[key]
        if self.packs is not None and self.packs[0] != weights:
            self.packs = None


_OF: WeakKeyDictionary[Any, _Kept] = WeakKeyDictionary()
_MAKING = threading.Lock()


def scripts_of(
    model: Any, family: Family, rows: int, *, at_once: bool = False, packed: bool | None = None
) -> Scripts | None:
    """Return the recordings of a model as it is now, to be made when they are worth it; None: there can be none.

    Args:
        rows: the batch size.
        at_once: they are to be made with the first pass of each kind.
        packed: they are to multiply by copies of weights: True, all; None, as far as there is memory; False, none.
    """
    if family.encoder or not family.positions:
        return None
    if model.training and model not in _OF:
        return None
    state = state_of(model)
    with _MAKING:
        if model in _OF:
            _OF[model].clear(state.weights)  # of what the model no longer has
    if model.training or {one.type for one in state.devices} != {"cpu"} or not (state.recordable and state.ordinary):
        return None
    if reason_against(model, family, state):
        return None
    packed = packed if available() else False
    key = state.weights, state.key, family, rows, packed
    with _MAKING:
        kept = _OF.setdefault(model, _Kept())
        packs = None if packed is False else kept.packs_of(state.weights)
        if packs is not None:
            packs.most = sys.maxsize if packed else packs.room
        found = kept.scripts.pop(key, None) or Scripts(family, rows, packs)
        if len(kept.scripts) >= _KEPT:
            del kept.scripts[next(iter(kept.scripts))]
        kept.scripts[key] = found
        if at_once:
            found.worth = 0
    if packs is not None:
        packs.refresh()
    return found


def recorded_of(model: Any) -> list[Recorded]:
    """Return what became of the kinds of passes of a model."""
    with _MAKING:
        kept = _OF.get(model)
        return [] if kept is None else [one for scripts in kept.scripts.values() for one in scripts.recorded]


def forget(model: Any) -> None:
    """Free the recordings of a model."""
    with _MAKING:
        kept = _OF.get(model)
        if kept is not None:
            kept.clear()
