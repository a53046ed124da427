"""The model behind one call, in passes of few shapes: what is done with a pass is on its way before the host looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookahead.attention import shared_heads
from lookahead.draft import Draft
from lookahead.families import Family, text_config
from lookahead.model_state import state_of
from lookahead.static.cache import StaticCache
from lookahead.static.recorder import Graphs, Plainly, Recorder
from lookahead.static.shapes import Counts, capacity
from lookahead.static.space import Space, spaces_of
from lookahead.target import Watch
from lookahead.topk import TOP, best_there
from lookahead.transfer import sent

_SHAPES = 256  # of passes that torch compiles: row counts, capacities, batch sizes
ROOM = 1024  # generated tokens that a cache is made for at first; longer texts go on in larger ones


class StaticTarget:
    """Runs trees through a model in passes of fixed shapes and keeps what was accepted; see `lookahead.target.Target`.

    Args:
        model: a language model.
        family: how drafts run through it; of shape "tree".
        cache: its ordinary cache after the prefill; its layers are taken over until `give_back`.
        prompt_mask: [B, P] bool over all cached positions; None when nothing is padding.
        last_position: [B] int64, the position id of the last prompt token of each row.
        room: tokens that are to be generated, as far as that is known; more make a larger cache.
        nodes: of the largest pass, the root included, for which there is room behind those tokens.
        counts: how many rows a pass runs.
        chains: drafts are cut to chains, whose tokens stand where they stand in plain decoding.
        compiled: what is called in place of the model.

    Attributes:
        best: of the latest pass, where the model runs: tokens and logits [B, N, TOP] of the best successors.
        prepared_s: what the latest inputs of the model took.
    """

    linear = False
    recorded, costs = ("", ""), None
    recording_s = 0.0

    def __init__(
        self,
        model: Any,
        family: Family,
        cache: DynamicCache,
        prompt_mask: Tensor | None,
        last_position: Tensor,
        room: int,
        *,
        nodes: int,
        counts: Counts,
        chains: bool = False,
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        self._model, self._family, self._counts, self._chains = model, family, counts, chains
        self._compiled, self._largest = compiled, counts.rows(nodes)
        self._rows, self._config = last_position.shape[0], text_config(model)
        dtypes = tuple(layer.keys.dtype for layer in cache.layers if getattr(layer, "keys", None) is not None)
        state = state_of(model)
        self._state, self._recordable = (state.weights, state.key, dtypes), state.recordable
        self._space = self._made(cache, int(cache.get_seq_length()) + room)
        self._device = self._space.cache.device
        self._space.begin(cache, None if prompt_mask is None else prompt_mask.to(self._device))
        self._next_position = last_position.cpu().numpy() + 1
        self._watch = Watch(self._device)
        self._ran = 0  # rows of the latest pass
        self._accepted = False
        self.best: tuple[Tensor, Tensor] | None = None
        self.prepared_s = 0.0

    def _key(self, slots: int) -> Hashable:
        return self._state, self._rows, slots, self._family, self._compiled is not None

    def _made(self, cache: DynamicCache, tokens: int) -> Space:
        """Return a space for so many tokens and a pass behind them."""
        slots = capacity(tokens + self._largest, few=next(self._model.parameters()).device.type == "cuda")
        found = spaces_of(self._model).take(self._key(slots))
        if found is not None:
            return found
        layer = next(layer for layer in cache.layers if layer.keys is not None and layer.keys.numel())
        device = layer.keys.device
        recorder: Recorder = Plainly()
        if device.type == "cuda" and self._recordable:
            recorder = Graphs(device, warm=2 if self._compiled else 1)  # the first run compiles
        try:
            return Space(cache, slots, self._family, device, recorder)
        except torch.OutOfMemoryError:
            spaces_of(self._model).clear()
            torch.cuda.empty_cache()
            return Space(cache, slots, self._family, device, recorder)

    @property
    def cache(self) -> StaticCache:
        """Its keys and values."""
        return self._space.cache

    @property
    def used(self) -> int:
        """Slots of its cache in use."""
        return int(self.cache.used)

    @property
    def seconds(self) -> float:
        """What the latest call of the model took; on a GPU, from its first kernel to its last, once it has ended."""
        return self._watch.seconds

    @property
    def runs_apart(self) -> bool:
        """Whether the model runs on a device of its own, while the host has time to spare."""
        return bool(self._device.type != "cpu")

    def fit(self, draft: Draft) -> Draft:
        """Return the draft as it may run."""
        return draft.spine() if self._chains else draft

    def depth(self, row: int, column: int) -> int | None:
        """Return how deep a draft of `row` may go under its node 0 at `column`; None: as deep as it likes."""
        if self._family.table is None:
            return None
        return max(self._family.table - 1 - int(self._next_position[row]) - column, 0)

    def forward(self, drafts: Sequence[Draft], columns: Sequence[int]) -> Tensor:
        """Return the logits [B, N, V] of all nodes of all drafts; see `Target.forward`."""
        begin = time.perf_counter()
        size = max(len(draft) for draft in drafts)
        self._ran = self._counts.rows(size)
        self._accepted = False
        self._make_room(self._ran)
        cache = self._space.cache
        self._space.masks(self._ran)  # while nothing is recorded
        positions = self._next_position + np.asarray(columns, np.int64)
        self._space.board(self._ran).write(drafts, positions, [cache.prompt + length for length in cache.lengths])
        self.prepared_s = time.perf_counter() - begin
        with self._watch:
            logits, *best = self._space.recorder.run(("score", self._ran), partial(self._scored, self._ran))
        self.best = best[0][:, :size], best[1][:, :size]
        return logits[:, :size]  # type: ignore[no-any-return]

    def _scored(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run what is on the board; return logits [B, N, V], and tokens and logits [B, N, TOP] of the best."""
        space, board = self._space, self._space.board(rows)
        space.cache.where.index = board.used[:, None] + torch.arange(rows, device=self._device)
        given: dict[str, Any] = {"input_ids": board.tokens, "attention_mask": space.masks(rows).draw(board)}
        if self._family.positions:
            given["position_ids"] = board.positions
        cache = {self._family.cache: space.cache}
        given |= cache | {"use_cache": True, "return_dict": True} | dict(self._family.inputs)
        with shared_heads(self._config), _many_shapes(self._compiled is not None):
            logits: Tensor = (self._compiled or self._model)(**given).logits
        tokens, values = best_there(logits.flatten(0, 1), TOP)
        shape = (*logits.shape[:2], tokens.shape[-1])
        return logits, tokens.view(shape), values.view(shape)

    def accept(self, picks: Tensor) -> None:
        """Move the rows of the nodes together that `picks` ([B, N], of every node) lead to, before the host knows them.

        A node is accepted where it and all its ancestors below the root hold what their parents picked.
        """
        rows = self._ran
        if self._chains or rows == 1:  # those stand there already
            self._accepted = True
            return
        picked = self._space.board(rows).picks
        picked[:, : picks.shape[1]] = picks
        self._space.recorder.run(("accept", rows), partial(self._verified, rows))
        self._accepted = True

    def _verified(self, rows: int) -> None:
        board = self._space.board(rows)
        self._moved(rows, accepted_order(board.tokens, board.parents, board.ancestors, board.picks))

    def _moved(self, rows: int, order: Tensor) -> None:
        """Let slot i of the pass take the row of node `order[b, i]`."""
        used = self._space.board(rows).used[:, None]
        target = used + torch.arange(rows, device=self._device)
        for layer in self._space.cache.attention:
            layer.move(used + order, target)

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes `paths[b]` of each row's last draft; forget all others."""
        chain = all(list(path) == list(range(len(path))) for path in paths)
        if not (self._accepted or chain):
            board = self._space.board(self._ran)
            order = np.tile(np.arange(self._ran), (self._rows, 1))
            for row, path in enumerate(paths):
                order[row, : len(path)] = path
            board.order.copy_(sent(order, self._device))
            self._space.recorder.run(("keep", self._ran), partial(self._moved, self._ran, board.order))
        self._space.cache.keep([len(path) for path in paths])

    def drop(self, row: int, count: int) -> None:
        """Forget the last `count` kept tokens of `row`."""
        self._space.cache.drop(row, count)

    def forget_behind(self) -> None:
        """Clear what rejected nodes have left in the cache, which a mask hides but NaN shines through."""
        self._space.cache.forget_behind()

    def give_back(self, cache: DynamicCache, tokens: int) -> None:
        """Fill `cache` with prompt and first `tokens` generated tokens, as an ordinary cache."""
        self._space.cache.give_back(cache, tokens)

    def close(self) -> None:
        """Leave the tensors to the next request."""
        spaces_of(self._model).leave(self._key(self._space.cache.slots), self._space)

    def _make_room(self, rows: int) -> None:
        """Go on in a larger space where this one has no room for a pass over `rows` nodes."""
        before = self._space
        if before.cache.used + rows <= before.cache.slots:
            return
        self._space = self._made(before.cache, before.cache.used + max(rows, before.cache.slots // 4))
        self._space.follow(before)
        spaces_of(self._model).leave(self._key(before.cache.slots), before)


def _many_shapes(compiled: bool) -> AbstractContextManager[None]:
    """Let torch compile a model for as many shapes as there are: each is compiled once."""
    if not compiled:
        return nullcontext()
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=_SHAPES)
    return patched


def accepted_order(tokens: Tensor, parents: Tensor, ancestors: Tensor, picks: Tensor) -> Tensor:
    """Return [B, N] int64: the accepted nodes of each tree in order; behind them, place i is node i.

    Args:
        tokens, parents: [B, N]; -1 is the parent of what cannot be accepted.
        ancestors: [B, N, N] bool; each node is its own.
        picks: [B, N], the token that follows each node.
    """
    nodes = torch.arange(tokens.shape[1], device=tokens.device)
    right = (picks.gather(1, parents.clamp(min=0)) == tokens) & (parents >= 0) | (nodes == 0)
    accepted = ~(ancestors & ~right[:, None]).any(-1)
    places = torch.where(accepted, accepted.cumsum(1) - 1, tokens.shape[1])
    order = torch.cat([nodes, nodes[:1]]).repeat(len(tokens), 1)
    return order.scatter_(1, places, nodes.expand(tokens.shape))[:, :-1]
