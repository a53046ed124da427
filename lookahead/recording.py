"""Recording a pass: its tensor operations, traced once, and compared with the model as it is written."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from lookahead.attention import implementation_of, shared_heads
from lookahead.cache import TreeCache, TreeLayer
from lookahead.conversions import conversions
from lookahead.cost import Costs
from lookahead.families import Family, text_config
from lookahead.lighten import constants, lighten, spare
from lookahead.model_state import LARGEST
from lookahead.packing import Factor, Pack, Packs, multiplying, noting
from lookahead.topk import TOP, best_tokens

TREE, PADDED, NODE, PROMPT, OPENING = KINDS = "tree", "padded node", "node", "prompt", "opening"
"""Kinds of passes: the third and fourth have no mask; the last runs a prompt, and a tree under its last token."""

_MOST = 4096  # modules that are recorded in a process, once for each recording: torch keeps 0.1 MB of each for ever
_JIT: Any = torch.jit  # whose types say little
_EXAMPLES = {  # nodes and slots before them: recorded with the first, compared with the others
    TREE: ((4, 7), (2, 3), (9, 21), (5, 40), (3, 700)),
    PADDED: ((1, 7), (1, 1), (1, 40), (1, 700)),
    NODE: ((1, 7), (1, 1), (1, 40), (1, 700)),
    PROMPT: ((4, 0), (2, 0), (9, 0), (40, 0), (160, 0)),
    OPENING: ((7, 0), (2, 0), (9, 0), (40, 0), (160, 0)),
}
_FIRST = (PROMPT, OPENING)  # behind nothing
_ROWS = 4  # place of the rows that are wanted among the inputs of such a recording, itself the first
_NEAR = 1e-5  # by which logits of few rows may differ from those among many, over the largest of them

_TIMED = 1, 5, 12, 25, 49  # nodes of trees whose passes are timed
_BEHIND = 512  # slots before them at most
_ROUNDS = 4  # times that they are; the first does not count

_RECORDING = threading.Lock()  # torch records one function at a time
_made = 0  # modules that were recorded in this process


class Refused(Exception):
    """No recording can stand for the model."""


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Writes the last rows of what it is to show; `lookahead.cache.TreeLayer`, for one pass."""

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, used: Any, kind: str) -> None:
        super().__init__()
        self.keys, self.values, self._kind = keys, values, kind
        self._used, self._held = used, 0 if kind in _FIRST else used
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.narrow(2, self._used, states.size(2)).copy_(states)
        if self._kind in _FIRST:  # as in the ordinary cache that it is to fill
            self._held = key_states.size(2)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Return how much is held; for those who only find out that one node needs no mask, any number will do."""
        return 1 if self._kind == NODE and _JIT.is_tracing() and _masks_ask() else self._held


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


class PurePass(nn.Module):
    """A pass as a function of tensors alone.

    Args:
        kind: of pass, one of `KINDS`.
        layers: of the cache; those that hold nothing are passed on as they are.
        names: of the masks, where the model takes one for each kind of layers; (): it takes one; None: it takes none.

    Attributes:
        kind: of pass.
        short: whether it is to leave out what is not needed: of a single node its mask, of a prompt with a tree the
            rows whose logits nobody reads.
        packs: copies of weights, by what it multiplies by.
        width: of the logits; 0: not known before it was compared with a recording.
    """

    width = 0

    def __init__(
        self, kind: str, model: Any, family: Family, layers: Sequence[Any], names: Sequence[str] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.kind, self._family, self._names = kind, family, names
        self._last = {"logits_to_keep": 1} if kind == PROMPT and model._supports_logits_to_keep() else {}
        # Then it is known that one node needs no mask; otherwise one is made even so, of the right size.
        alone = kind == NODE and implementation_of(text_config(model)) == "sdpa"
        self.short = alone or kind == OPENING
        self._layers = [None if isinstance(layer, TreeLayer) else layer for layer in layers]
        self.packs: dict[Factor, Pack] = {}

    @property
    def table(self) -> int:
        """Positions that the model knows."""
        return self._family.table or sys.maxsize

    @property
    def masks(self) -> int:
        """How many masks it takes."""
        return 0 if self._names is None else max(len(self._names), 1)

    def forward(self, tokens: Tensor, positions: Tensor, span: Tensor, *tensors: Tensor) -> Tensor:
        """Return the logits [B, N, V]; behind a prompt, at least the last ones, or those of K rows.

        Args:
            tokens, positions: [B, N].
            span: [S + N], as long as what the pass sees.
            tensors: where a prompt has a tree, the rows [K] whose logits are wanted; then the masks, copies of weights,
                and keys and values of every layer, with room for more.
        """
        held = iter(tensors)
        last = {"logits_to_keep": next(held)} if self.kind == OPENING else self._last
        masks, copies = list(islice(held, self.masks)), list(islice(held, len(self.packs)))
        end = span.size(0)
        used, layers = end - tokens.size(1), []
        for layer in self._layers:
            if layer is None:
                kind = self.kind if self.kind != NODE or self.short else ""
                layer = _Layer(next(held).narrow(2, 0, end), next(held).narrow(2, 0, end), used, kind)
            layers.append(layer)
        mask: Any = dict(zip(self._names, masks, strict=True)) if self._names else masks[0] if masks else None
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        given |= {self._family.cache: Cache(layers=layers), "use_cache": True, "return_dict": True, **last}
        with shared_heads(text_config(self.model)), multiplying(dict(zip(self.packs, copies, strict=True))):
            logits: Tensor = self.model(**given, **dict(self._family.inputs)).logits
        return logits


def run(module: Any, *tensors: Tensor) -> Tensor:
    """Return the logits of a recorded pass; the tensors are those of `PurePass.forward`."""
    with torch.inference_mode(), _JIT.optimized_execution(False):
        logits: Tensor = module(*tensors)
    return logits


def said(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def record(written: PurePass, cache: TreeCache, packs: Packs | None) -> Any:
    """Return the recording of a pass, whose `packs` are set.

    Made in a thread of its own: torch keeps, for each operation, all that was being called when it was recorded.

    Args:
        cache: of the model, for examples.
        packs: copies of its weights to multiply by; None: it is to do without.

    Raises:
        Exception: it turns a number into one of Python's, so that it may do something else with another; or it does.
    """
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(_tried(written, cache, packs))
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


def _tried(written: PurePass, cache: TreeCache, packs: Packs | None) -> Any:
    factors, short = [] if packs is None else _factors(written, cache), written.short
    parts = [part for one in factors for part in one.parts]
    for tried in (factors, parts) if len(parts) > len(factors) else (factors,):  # by weights together, and by each
        written.packs, written.short = {} if packs is None else packs.all_of(tried), short
        if not written.packs:
            break
        with suppress(Exception):
            return _shortened(written, cache)
    written.packs, written.short = {}, short  # with the weights themselves it may be recorded
    return _shortened(written, cache)


def _factors(written: PurePass, cache: TreeCache) -> list[Factor]:
    """Return what a pass multiplies by."""
    with torch.no_grad(), noting(written.model) as noted:
        written(*_example(written, cache, *_EXAMPLES[written.kind][1]))
    return noted.factors


def _shortened(written: PurePass, cache: TreeCache) -> Any:
    if written.short:
        try:
            return _compared(written, cache)
        except RuntimeError:  # this release of transformers, or this model, makes masks of all that is recorded
            written.short = False
        except Exception:
            if written.kind != OPENING:
                raise
            written.short = False  # all rows it may be
    return _compared(written, cache)


def _compared(written: PurePass, cache: TreeCache) -> Any:
    global _made
    count = sum(1 for _ in written.modules())
    if _made + count > _MOST:
        raise Refused(f"this process has recorded {_made} modules, and torch does not free all of their memory")
    _made += count
    table = written.table  # beyond whose rows no pass goes
    example, *others = [(nodes, used) for nodes, used in _EXAMPLES[written.kind] if nodes + used <= table]
    with torch.no_grad():
        with conversions() as found:
            script = _JIT.trace(written, _example(written, cache, *example), check_trace=False, strict=False)
        if found:
            raise Refused(f"what it does may depend on numbers: {found[0]}")
        if not isinstance(script, _JIT.ScriptModule):
            raise Refused("torch records nothing here")
        if any(one.numel() > LARGEST for one in constants(script)):
            raise Refused("it holds tensors that are neither weights nor buffers")
        if written.kind == OPENING and written.short:
            spare(script, _ROWS)
        lighten(script)
        for nodes, used in others:
            _compare(written, script, _example(written, cache, nodes, used))
    return script


def _compare(written: PurePass, script: Any, tensors: Sequence[Tensor]) -> None:
    """Raise `Refused` unless a recording leaves the bits of the pass; logits of few rows may round otherwise."""
    again = [one if one.is_mkldnn else one.clone() for one in tensors]
    expected, logits = written(*tensors), run(script, *again)
    written.width = int(expected.shape[-1])
    same = all(a is b or torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
    if written.kind == OPENING:
        near = expected.shape == logits.shape and (expected - logits).abs().max() <= _NEAR * expected.abs().max()
    else:
        near = torch.equal(expected, logits)
    if not (same and near and expected.isfinite().all()):
        raise Refused("recorded, it computes something else")


def costs_of(script: Any, written: PurePass, cache: TreeCache) -> Costs | None:
    """Measure what passes over trees of growing sizes take, until their best tokens are known."""
    table = written.table
    used = min(cache.used, _BEHIND)  # each example has keys and values of its own
    sizes = [nodes for nodes in _TIMED if nodes + used <= table]
    given = [_example(written, cache, nodes, used) for nodes in sizes]
    took = np.zeros((_ROUNDS, len(sizes)))
    for row in took:
        for i, tensors in enumerate(given):
            begin = time.perf_counter()
            best_tokens(run(script, *tensors).flatten(0, 1).float(), TOP)
            row[i] = time.perf_counter() - begin
    # What disturbs a pass only ever slows it down.
    seconds = np.minimum.accumulate(took[1:].min(0)[::-1])[::-1]
    if not len(sizes) or not seconds[0] > 0.0:  # such as by a clock that is too coarse
        return None
    known = np.array(sizes, np.float64)
    slope = (seconds[-1] - seconds[0]) / max(known[-1] - known[0], 1.0)
    return lambda nodes: np.interp(nodes, known, seconds) + slope * np.maximum(nodes - known[-1], 0.0)


def _example(written: PurePass, cache: TreeCache, nodes: int, used: int) -> tuple[Tensor, ...]:
    """Return what `PurePass.forward` takes for random trees behind a random context."""
    random = torch.Generator().manual_seed(nodes)
    held, end, dtype = cache.buffers(0), used + nodes, cache.attention[0].dtype
    batch = held[0].shape[0]
    vocabulary = written.model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (batch, nodes), generator=random)
    steps = 1 if written.kind == PROMPT else 2
    positions = used + torch.arange(nodes).div(steps, rounding_mode="floor").expand(batch, -1)
    rows = [torch.arange(nodes // 2, nodes)] if written.kind == OPENING else []
    masks = []
    for _ in range(written.masks):
        shown = torch.rand((batch, 1, nodes, end), generator=random) < 0.7
        shown[..., used:] &= torch.ones((nodes, nodes), dtype=torch.bool).tril()
        shown[..., range(nodes), range(used, end)] = True
        masks.append(torch.zeros(shown.shape, dtype=dtype).masked_fill_(~shown, torch.finfo(dtype).min))
    buffers = [torch.randn((*one.shape[:2], end + 3, one.shape[3]), generator=random).to(one.dtype) for one in held]
    copies = [one.packed for one in written.packs.values()]
    return tokens, positions.contiguous(), torch.zeros(1).expand(end), *rows, *masks, *copies, *buffers
