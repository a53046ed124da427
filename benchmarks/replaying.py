"""A model that writes recorded texts: it computes in full, then the recorded next token wins.

Done in tensor operations of fixed shapes on tensors that stay where they are, so that it can be part of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lookahead.cache import NAME

SURE = 1e4  # a logit that wins whatever the others are
ROOM = 1 << 15  # tokens of prompt and output


class Replay:
    """Makes a model write recorded texts, one row at a time, while it is `on`; its class is another then."""

    def __init__(self, model: Any) -> None:
        self._model, self._class = model, type(model)
        self._text = torch.full((ROOM + 1,), -1, dtype=torch.int64, device=model.device)
        model.register_buffer("replayed", self._text, persistent=False)  # so that recorded passes look at it
        replay = self

        @wraps(self._class.forward)
        def forward(model: Any, input_ids: Any = None, **given: Any) -> Any:
            outputs = replay._class.forward(model, input_ids=input_ids, **given)
            replay._answer(input_ids[0], given, outputs.logits)
            return outputs

        self._writing = type(self._class.__name__, (self._class,), {"forward": forward})

    def write(self, text: Sequence[int]) -> None:
        """Let these tokens of prompt and output be written from now on."""
        if len(text) > ROOM:
            raise ValueError(f"a text of {len(text)} tokens; there is room for {ROOM}")
        self._text.fill_(-1)
        self._text[: len(text)] = torch.tensor(text, device=self._text.device)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Replace the logits of the model meanwhile."""
        self._model.__class__ = self._writing
        try:
            yield
        finally:
            self._model.__class__ = self._class

    def _answer(self, tokens: Tensor, given: dict[str, Any], logits: Tensor) -> None:
        """Let the recorded next token win at the positions whose token is the recorded one."""
        places, count = given.get("position_ids"), logits.shape[1]
        if places is None:
            cache = given.get(NAME)
            start = 0 if cache is None else cache.get_seq_length() - len(tokens)
            places = torch.arange(start, start + len(tokens), device=tokens.device)[None]
        places = places[0, -count:].clamp(max=ROOM - 1)
        following = self._text[places + 1]
        right = (self._text[places] == tokens[-count:]) & (following >= 0)
        winner = following.clamp(min=0)[:, None]
        heights = logits[0].gather(1, winner)
        logits[0].scatter_(1, winner, torch.where(right[:, None], SURE, heights))
