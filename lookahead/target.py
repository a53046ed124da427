"""The model behind one call: a batch of token trees in, the logits of all nodes out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookahead.attention import shared_heads
from lookahead.cache import Held, TreeCache, joined
from lookahead.draft import Draft
from lookahead.families import Family, text_config
from lookahead.mask import TreeMasks
from lookahead.states import StateCache

if TYPE_CHECKING:
    from lookahead.cost import Costs
    from lookahead.script import Scripts


class Watch:
    """Times what runs inside; on a GPU by two marks in its stream, which never wait for each other."""

    def __init__(self, device: torch.device) -> None:
        self._begin = self._seconds = 0.0
        marks = device.type == "cuda"
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if marks else []  # type: ignore[no-untyped-call]
        self._device = device

    def __enter__(self) -> None:
        if self._marks:
            self._marks[0].record(torch.cuda.current_stream(self._device))
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._begin
        if self._marks:
            self._marks[1].record(torch.cuda.current_stream(self._device))

    @property
    def seconds(self) -> float:
        """What ran inside last took; on a GPU, as far as the host sees it until the second mark is reached."""
        if self._marks and self._marks[1].query():  # type: ignore[no-untyped-call]
            return float(self._marks[0].elapsed_time(self._marks[1])) / 1e3
        return self._seconds


class Target:
    """Runs trees through a model and keeps what was accepted.

    Args:
        model: a language model.
        family: how drafts run through it.
        cache: its ordinary cache after the prefill; taken over until `give_back`.
        prompt_mask: [B, P] bool over all cached positions; None when nothing is padding.
        last_position: [B] int64, the position id of the last prompt token of each row.
        room: slots to allocate for generated tokens.
        encoder: what a decoder is given of its encoder, and `cross`, the cache of that.
        scripts: recordings of the model, where there can be some.
        filled, slots: of a `cache` that holds nothing yet, see `TreeCache`.

    Attributes:
        best: None: the best successors of nodes are looked for by whoever needs them.
        prepared_s: what the latest inputs of the model took: tokens, positions, mask.
        recording_s: what it took then to record the model, which is done but once.
    """

    best: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        model: Any,
        family: Family,
        cache: DynamicCache,
        prompt_mask: Tensor | None,
        last_position: Tensor,
        room: int,
        *,
        encoder: Mapping[str, Any] = MappingProxyType({}),
        cross: DynamicCache | None = None,
        scripts: Scripts | None = None,
        filled: Mapping[int, Held] = MappingProxyType({}),
        slots: int = 0,
    ) -> None:
        self._scripts = scripts
        self._model, self._family, self._inputs = model, family, dict(family.inputs) | dict(encoder)
        self._table, self._config = family.table, text_config(model)
        rows = last_position.shape[0]
        self._states = StateCache(cache, rows=rows, prompt=int(last_position.max()) + 1) if family.state else None
        tree = None if family.state else TreeCache(cache, rows=rows, room=room, filled=filled, slots=slots)
        self.cache = cast(Any, tree if self._states is None else self._states)
        # A model that is spread or offloaded has no one device; inputs go where its first keys are.
        self._device = self.cache.device
        self._padded = prompt_mask is not None
        if prompt_mask is None:
            prompt_mask = torch.ones((rows, self.cache.prompt), dtype=torch.bool)
        self._prompt_mask = prompt_mask.to(self._device)
        if tree is not None:
            dtype = tree.attention[0].dtype
            self._masks = TreeMasks(self._prompt_mask, dtype, dict(family.reaches), keyed=family.keyed)
        self._cache = joined(self.cache, cross) if self._states is None else self._states.cache
        self._ran: Sequence[Draft] = ()
        self.prepared_s = self.recording_s = 0.0
        self._watch = Watch(self._device)
        self._next_position = last_position.cpu().numpy() + 1

    @property
    def used(self) -> int:
        """Slots of its cache in use."""
        return int(self.cache.used)

    @property
    def seconds(self) -> float:
        """What the latest call of the model took; on a GPU, from its first kernel to its last, once it has ended."""
        return self._watch.seconds

    @property
    def recorded(self) -> tuple[str, str]:
        """How passes over trees run by now, and those over single nodes: "" as written, or as `Scripts.ready` says."""
        return ("", "") if self._scripts is None else self._scripts.ready

    @property
    def costs(self) -> Costs | None:
        """What passes take, where that was measured."""
        return None if self._scripts is None else self._scripts.costs

    @property
    def linear(self) -> bool:
        """Whether drafts have to be chains."""
        return self._family.shape == "linear"

    def fit(self, draft: Draft) -> Draft:
        """Return the draft as it may run: where trees cannot, the chain of it that is expected to bring most."""
        if self._states is not None and self._states.full:
            return Draft.root(int(draft.tokens[0]))
        return draft.spine(self._family.last) if self.linear else draft

    @property
    def runs_apart(self) -> bool:
        """Whether the model runs on a device of its own, while the host has time to spare."""
        return bool(self._device.type != "cpu")

    def depth(self, row: int, column: int) -> int | None:
        """Return how deep a draft of `row` may go under its node 0 at `column`; None: as deep as it likes."""
        if self._table is None:
            return None
        # A model that counts places itself may count padding, too.
        first = max(int(self._next_position[row]), self.cache.prompt if self.linear else 0)
        return max(self._table - 1 - first - column, 0)

    def forward(self, drafts: Sequence[Draft], columns: Sequence[int]) -> Tensor:
        """Return the logits [B, N, V] of all nodes of all drafts; rows with fewer nodes are padded at the end.

        Args:
            drafts: one tree a row.
            columns: for each row, how many tokens were generated before its node 0.
        """
        begin = time.perf_counter()
        size = max(len(draft) for draft in drafts)
        inputs = np.zeros((2, len(drafts), size), np.int64)
        for row, draft in enumerate(drafts):
            n = len(draft)
            inputs[0, row, :n] = draft.tokens
            inputs[0, row, n:] = draft.tokens[0]
            inputs[1, row] = self._next_position[row] + columns[row]
            inputs[1, row, :n] += draft.depth
        behind = 0
        if self._states is not None:
            behind = self._states.pending.shape[1]
            inputs = self._with_pending(inputs, self._states.pending)
            self._states.begin(behind + size)
        self._ran = drafts
        ids, positions = torch.from_numpy(inputs).to(self._device)
        mask = self._attention_mask(drafts, columns, size)
        name = "decoder_" if self._family.encoder else ""
        given = {f"{name}input_ids": ids, f"{name}attention_mask": mask}
        if self._family.positions:
            given["position_ids"] = positions
        self.prepared_s = time.perf_counter() - begin
        script = None
        if self._scripts is not None:
            script = self._scripts.find(self._model, mask, size, self.cache, self._watch.seconds)
        self.recording_s = time.perf_counter() - begin - self.prepared_s
        if script is not None:
            with self._watch:
                logits = script.run(ids, positions, mask, self.cache)
            if logits is not None:
                return logits
        with self._watch, shared_heads(self._config):
            outputs = self._model(
                **{self._family.cache: self._cache}, use_cache=True, return_dict=True, **given, **self._inputs
            )
        if script is not None:
            script.give_up()
        return outputs.logits[:, behind:]  # type: ignore[no-any-return]

    @staticmethod
    def _with_pending(inputs: NDArray[np.int64], pending: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return tokens and positions ([2, B, P + N]) with those of the pending tokens before them."""
        count = pending.shape[1]
        places = inputs[1, :, :1] + np.arange(-count, 0)
        return np.concatenate([np.stack([pending, places]), inputs], axis=2)

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes `paths[b]` of each row's last draft; forget all others."""
        counts = [len(path) for path in paths]
        if self._states is not None:  # rows go on together, so that all paths are as long
            self._states.keep(np.array([draft.tokens[: min(counts)] for draft in self._ran], np.int64))
        elif max(counts) > 0 and self.linear:
            self.cache.keep(paths)
        elif max(counts) > 0:
            self._masks.keep(counts, self.cache.used)
            self.cache.keep(paths)
            if self.cache.wants_realign():
                self.cache.realign()
                self._masks.realign([len(self.cache.generated(row)) for row in range(len(paths))])

    def accept(self, picks: Tensor) -> None:
        """Do nothing: here rows are kept when the host knows which."""

    def forget_behind(self) -> None:
        """Do nothing: here a pass sees nothing behind its own rows."""

    def close(self) -> None:
        """Do nothing: what it holds is freed with it."""

    def drop(self, row: int, count: int) -> None:
        """Forget the last `count` kept tokens of `row`."""
        assert self._states is None, "rows of a state go on together, by what all of them keep"
        slots = self.cache.drop(row, count)
        if not self.linear:
            self._masks.hide(row, slots)

    def give_back(self, cache: DynamicCache, tokens: int) -> None:
        """Fill `cache` with prompt and first `tokens` generated tokens, as an ordinary cache."""
        if self._states is None:
            self.cache.give_back(cache, tokens)
            return
        if self._states.pending.shape[1]:
            last = self._states.take()
            self.forward([Draft.root(token) for token in last], [self._states.complete] * len(last))
            self.keep([[0]] * len(last))
        self._states.give_back(cache)

    def _attention_mask(self, drafts: Sequence[Draft], columns: Sequence[int], size: int) -> Any:
        if self.linear:
            return self._padding_mask(size)
        if size == 1 and not self._padded and not self.cache.has_holes:
            return None
        if len(drafts) == 1:
            ancestors = drafts[0].ancestors()[None]
        else:
            ancestors = np.zeros((len(drafts), size, size), np.bool_)
            ancestors[:, range(size), range(size)] = True
            for row, draft in enumerate(drafts):
                n = len(draft)
                ancestors[row, :n, :n] = draft.ancestors()
        places = self._places(drafts, columns, size) if self._masks.windows else None
        return self._masks.tree(torch.from_numpy(ancestors), places, self.cache.used)

    def _places(self, drafts: Sequence[Draft], columns: Sequence[int], size: int) -> NDArray[np.int64]:
        """Return [B, N], where in the text nodes are, padding included."""
        places = np.zeros((len(drafts), size), np.int64)
        for row, draft in enumerate(drafts):
            places[row] = self.cache.prompt + columns[row]
            places[row, : len(draft)] += draft.depth
        return places

    def _padding_mask(self, size: int) -> Tensor | None:
        """Return [B, S + N] int64, 1 where a slot holds a token, for models that make their masks themselves."""
        if not self._padded:
            return None
        generated = self.cache.used - self.cache.prompt + size
        return torch.nn.functional.pad(self._prompt_mask.to(torch.int64), (0, generated), value=1)
