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
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lookahead.cache import Held, TreeCache, TreeLayer
from lookahead.cost import Costs
from lookahead.families import Family
from lookahead.model_state import state_of
from lookahead.packing import Pack, Packs, available
from lookahead.recording import (
    KINDS,
    NODE,
    OPENING,
    PADDED,
    PROMPT,
    TREE,
    PurePass,
    Refused,
    costs_of,
    record,
    run,
    said,
)
from lookahead.static.choice import reason_against

WORTH = 256  # passes after which a recording has been worth its time, which is that of some two hundred
_SLOW_S = 0.25  # of a pass: what Python takes is no longer worth a recording
_KEPT = 8  # batch sizes, and states, whose recordings are kept of a model
_SHARES = dict.fromkeys(KINDS, 1.0) | {PROMPT: 0.25, OPENING: 0.25}  # of the passes: over a prompt, each saves more


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of one kind of pass.

    Attributes:
        kind: "tree"; "node", over a single one in each row; "padded node", with a mask; "prompt", which is not
            padded, and comes first; or "opening", a prompt together with a tree under its last token.
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


class Script:
    """The recording of one kind of pass.

    Args:
        module: what was recorded.
        seconds: that recording and trying it took.
        packs: of the weights that it multiplies by copies of.
        settle: waits until these are of what the weights are.

    Attributes:
        refused: why passes run as they are written; "": they do not.
        costs: what passes over trees take, where that was measured.
        masks: that it takes.
        width: of its logits; 0: it was not recorded.
    """

    costs: Costs | None = None
    masks = width = 0

    def __init__(
        self,
        module: Any,
        refused: str,
        seconds: float,
        packs: Sequence[Pack] = (),
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._failure, self._settle = "", settle
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
        held = _room(layers, tokens)
        logits = self._run(tokens, positions, 0, (), [one for pair in held.values() for one in pair])
        if logits is not None:
            for layer, (keys, values) in held.items():
                cache.update(keys, values, layer)
        return logits if logits is None else logits[:, -1:]

    def open(
        self, tokens: Tensor, positions: Tensor, wanted: Tensor, mask: Tensor, layers: Mapping[int, Held], more: int
    ) -> tuple[Tensor, dict[int, Held]] | None:
        """Return the logits [B, K, V] of the rows `wanted` [K] behind nothing, and what layers hold then.

        They have room for `more` slots behind it. None: it has failed.

        Args:
            tokens, positions: [B, N].
            mask: [B, 1, N, N], of all layers.
            layers: which of a cache's hold something, and what.
        """
        held = _room(layers, tokens, more)
        masks = [mask] * self.masks
        logits = self._run(tokens, positions, 0, (wanted, *masks), [one for pair in held.values() for one in pair])
        return None if logits is None else (logits, held)

    def _run(
        self, tokens: Tensor, positions: Tensor, used: int, given: Iterable[Tensor], buffers: Iterable[Tensor]
    ) -> Tensor | None:
        span = self._span.expand(used + tokens.shape[1])
        try:
            self._settle()
            return run(self._module, tokens, positions, span, *given, *(one.packed for one in self._packs), *buffers)
        except RuntimeError as error:
            self._failure = f"it failed where it had not been tried: {said(error)}"
            return None

    def give_up(self) -> None:
        """Be used no more if the last run has failed; what is really wrong fails without a recording, too."""
        self.refused = self.refused or self._failure


def _room(layers: Mapping[int, Held], tokens: Tensor, more: int = 0) -> dict[int, Held]:
    """Return room in each of the layers for the keys and values of tokens [B, N], and `more` slots behind them."""
    rows, slots = tokens.shape

    def room(one: Tensor) -> Tensor:
        return one.new_empty((rows, one.shape[1], slots + more, one.shape[3]))

    return {layer: (room(keys), room(values)) for layer, (keys, values) in layers.items()}


class Scripts:
    """The recordings of one model in one state, for one batch size.

    Args:
        packs: copies of its weights to multiply by; None: it is to do without.

    Attributes:
        worth: passes of a kind after which it is recorded.
        layers: which of the cache's hold something, and what: of no slots; known with the first prompt.
    """

    def __init__(self, family: Family, rows: int, packs: Packs | None) -> None:
        self.worth = WORTH
        self._family, self._rows, self._packs = family, rows, packs
        self._made: dict[str, Script] = {}  # by kind
        self._passes = dict.fromkeys(KINDS, 0)
        self.layers: dict[int, Held] = {}
        self._lock = threading.Lock()

    @property
    def recorded(self) -> list[Recorded]:
        """What became of the kinds of passes so far."""
        made = list(self._made.items())
        return [Recorded(kind, self._rows, one.seconds, one.refused, one.copied) for kind, one in made]

    @property
    def ready(self) -> tuple[str, str]:
        """How passes over trees, and over single nodes, run: "" as written, "recorded", or "packed", with copies."""
        found = [self._made.get(kind) for kind in (TREE, NODE)]
        trees, nodes = ("" if one is None or one.refused else "packed" if one.copied else "recorded" for one in found)
        return trees, nodes

    @property
    def costs(self) -> Costs | None:
        """What passes over trees take as recorded; None: they are not, or it was not measured."""
        script = self._made.get(TREE)
        return None if script is None or script.refused else script.costs

    def find(self, model: Any, mask: Any, nodes: int, cache: TreeCache, seconds: float) -> Script | None:
        """Return the recording of passes of this kind, which is made where it is worth it; None: there is none.

        Args:
            seconds: that the pass before took.
        """
        if mask is None and nodes > 1:
            return None
        kind = NODE if mask is None else PADDED if nodes == 1 else TREE
        return self._found(kind, model, mask, cache, seconds)

    def prefill(self, tokens: Tensor, cache: Any) -> Tensor | None:
        """Return the last logits [B, 1, V] of a prompt [B, N] without padding, and fill the empty `cache`.

        None: it is not recorded.
        """
        script = self._made.get(PROMPT)
        if script is None or script.refused:
            return None
        positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
        return script.prefill(tokens, positions, cache, self.layers)

    @property
    def opening(self) -> Script | None:
        """The recording of prompts with a tree under their last token; None: there is none."""
        script = self._made.get(OPENING)
        return None if script is None or script.refused else script

    def prefilled(self, model: Any, cache: TreeCache, seconds: float, *, opens: bool) -> None:
        """Tell of a prompt that was not recorded, and took so long; record the next one if that is worth it.

        Args:
            opens: whether it could have run with a tree under its last token.
        """
        self.layers = {
            i: (layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone())
            for i, layer in enumerate(cache.layers)
            if isinstance(layer, TreeLayer)
        }
        if PROMPT in self._made:
            self._made[PROMPT].give_up()
        opening = self._made.get(OPENING)
        if opens and not (opening and opening.refused):
            masks = [name for name, _ in self._family.reaches] if self._family.keyed else []
            self._found(OPENING, model, dict.fromkeys(masks), cache, seconds)
        else:
            self._found(PROMPT, model, None, cache, seconds)

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
            self._require_possible(kind, model)
            if self._packs is not None:
                self._packs.settle()
            written = PurePass(kind, model, self._family, cache.layers, names)
            module = record(written, cache, self._packs)
            costs = costs_of(module, written, cache) if kind == TREE else None
        except Exception as error:  # a model may do anything; as it is written it runs all the same
            reason = said(error)
        if written is None or reason:
            script = Script(None, reason, 0.0)
        else:
            settle = {} if self._packs is None else {"settle": self._packs.settle}
            script = Script(module, "", 0.0, tuple(written.packs.values()), **settle)
            script.masks, script.width = written.masks, written.width
        script.costs = costs
        script.seconds = time.perf_counter() - begin
        return script

    def _require_possible(self, kind: str, model: Any) -> None:
        if kind in (NODE, PROMPT, OPENING) and not all(reach.whole for _, reach in self._family.reaches):
            raise Refused("the model makes masks of windows itself, where a node is alone")
        if kind == OPENING and not model._supports_logits_to_keep():
            raise Refused("the model computes the logits of all tokens of a prompt")


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
