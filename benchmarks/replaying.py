"""A model that writes recorded texts: it computes in full, then the recorded next token wins.

Done in tensor operations of fixed shapes on tensors that stay where they are, so that it can be part of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SURE = 1e4  # a logit that wins whatever the others are
ROOM = 1 << 15  # tokens of prompt and output


class Replay:
    """Makes a model write recorded texts, one row at a time, while it is `on`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._text = torch.full((ROOM + 1,), -1, dtype=torch.int64, device=model.device)
        self._tokens = self._places = self._text[:0]

    def write(self, text: Sequence[int]) -> None:
        """Let these tokens of prompt and output be written from now on."""
        if len(text) > ROOM:
            raise ValueError(f"a text of {len(text)} tokens; there is room for {ROOM}")
        self._text.fill_(-1)
        self._text[: len(text)] = torch.tensor(text, device=self._text.device)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Replace the logits of the model meanwhile."""
        hooks = [
            self._model.register_forward_pre_hook(self._see, with_kwargs=True),
            self._model.get_output_embeddings().register_forward_hook(self._answer),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, model: Any, positional: Any, given: dict[str, Any]) -> None:
        """Remember tokens and positions of the pass that begins, of its only row."""
        self._tokens = given["input_ids"][0]
        places = given.get("position_ids")
        if places is None:
            cache = given.get("past_key_values")
            start = 0 if cache is None else cache.get_seq_length()
            places = torch.arange(start, start + len(self._tokens), device=self._tokens.device)[None]
        self._places = places[0]

    def _answer(self, head: Any, hidden: Any, logits: Tensor) -> Tensor:
        """Let the recorded next token win at the positions whose token is the recorded one."""
        count = logits.shape[1]
        places = self._places[-count:].clamp(max=ROOM - 1)
        following = self._text[places + 1]
        right = (self._text[places] == self._tokens[-count:]) & (following >= 0)
        winner = following.clamp(min=0)[:, None]
        heights = logits[0].gather(1, winner)
        logits[0].scatter_(1, winner, torch.where(right[:, None], SURE, heights))
        return logits
