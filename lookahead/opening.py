"""The first pass of a text: its prompt, and a draft under the last token of that, in one go."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lookahead.attention import shared_heads
from lookahead.cache import Held
from lookahead.draft import Draft
from lookahead.families import Family, text_config
from lookahead.prefill import is_ordinary
from lookahead.target import Target

if TYPE_CHECKING:
    from lookahead.script import Script, Scripts

_LONGEST = 512  # tokens; with a mask, attention to longer prompts takes more than a pass that is saved
_EXACT = (torch.float32, torch.float64)  # in others a prompt rounds otherwise beside a draft


class Opening:
    """Runs a prompt together with a draft under its last token; it makes way for a `lookahead.target.Target`.

    A prompt takes as long as several passes over trees, and the nodes of one more tree add little to it. So a text
    takes a pass less. What it took counts as the prefill.

    Args:
        model: a language model.
        family: how drafts run through it.
        prompt: [1, P] ids.
        cache: an ordinary cache that holds nothing.
        scripts: recordings of the model, one of which is of such passes.
        room: slots to allocate behind the prompt.
        follows: returns what runs the passes that follow, behind what `Target` is told of as `filled` and `slots`.

    Attributes:
        recording_s: what it took, which is no part of a step.
    """

    best, linear, runs_apart = None, False, False
    used = 0
    prepared_s = seconds = 0.0

    def __init__(
        self,
        model: Any,
        family: Family,
        prompt: Tensor,
        cache: DynamicCache,
        scripts: Scripts,
        script: Script,
        room: int,
        follows: Callable[..., Target],
    ) -> None:
        self._model, self._family, self._cache = model, family, cache
        self._prompt = prompt[0].numpy()
        self._script, self._room, self._follows, self._layers = script, room, follows, scripts.layers
        self.recorded, self.costs = scripts.ready, scripts.costs
        self._held: Mapping[int, Held] = {}
        self.recording_s = 0.0

    def fit(self, draft: Draft) -> Draft:
        """Return the draft as it may run."""
        return draft

    def depth(self, row: int, column: int) -> int | None:
        """Return how deep a draft may go under its node 0 at `column`, which is -1; None: as deep as it likes."""
        return None if self._family.table is None else max(self._family.table - 1 - len(self._prompt) - column, 0)

    def forward(self, drafts: Sequence[Draft], columns: Sequence[int]) -> Tensor:
        """Return the logits [1, N, V] of all nodes of the only draft, whose node 0 is the last token of the prompt."""
        begin, (draft,) = time.perf_counter(), drafts
        before = len(self._prompt) - 1
        places = np.concatenate([np.arange(before), before + draft.depth.astype(np.int64)])
        tokens = np.concatenate([self._prompt[:-1], draft.tokens.astype(np.int64)])
        ids, positions = torch.from_numpy(np.stack([tokens, places]))[:, None]
        logits = self._run(ids, positions, torch.arange(before, len(tokens)), self._mask(draft))
        self.recording_s += time.perf_counter() - begin
        return logits

    def _run(self, ids: Tensor, positions: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        found = self._script.open(ids, positions, wanted, mask, self._layers, self._room)
        if found is not None:
            logits, self._held = found
            return logits
        cache = copy.deepcopy(self._cache)
        names = [name for name, _ in self._family.reaches]
        given = {"input_ids": ids, "position_ids": positions, self._family.cache: cache, "logits_to_keep": wanted}
        given["attention_mask"] = dict.fromkeys(names, mask) if self._family.keyed else mask
        with shared_heads(text_config(self._model)):
            outputs = self._model(use_cache=True, return_dict=True, **given, **dict(self._family.inputs))
        self._script.give_up()
        self._held = {layer: (cache.layers[layer].keys, cache.layers[layer].values) for layer in self._layers}
        return outputs.logits  # type: ignore[no-any-return]

    def _mask(self, draft: Draft) -> Tensor:
        """Return [1, 1, P - 1 + N, P - 1 + N], added to the scores: 0 where a row sees another."""
        before, dtype = len(self._prompt) - 1, next(iter(self._layers.values()))[0].dtype
        hidden, size = torch.finfo(dtype).min, before + len(draft)
        mask = torch.full((size, size), hidden, dtype=dtype).triu_(1)
        mask[before:, before:].fill_(hidden).masked_fill_(torch.from_numpy(draft.ancestors()), 0)
        return mask[None, None]

    def keep(self, paths: Sequence[Sequence[int]]) -> Target:
        """Return what runs the passes that follow, behind the prompt and the nodes of the only path."""
        target, (path,) = self._follows(filled=self._held, slots=len(self._prompt)), paths
        target.keep([[node - 1 for node in path[1:]]])
        return target

    def accept(self, picks: Tensor) -> None:
        """Do nothing: rows are kept when the host knows which."""

    def forget_behind(self) -> None:
        """Do nothing: the pass sees nothing but its own rows."""

    def close(self) -> None:
        """Do nothing: what it holds is freed with it."""


def may_open(model: Any, family: Family, prompt: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a prompt [B, P] may run together with a draft, as far as it and the model are concerned."""
    return (
        family.shape == "tree"
        and prompt.shape[0] == 1
        and prompt.shape[1] <= _LONGEST
        and next(model.parameters()).dtype in _EXACT
        and is_ordinary(prompt, config, model_kwargs)
    )
