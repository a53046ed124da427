"""What users bring to `generate()`: a streamer, processors and criteria that write down what they were called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import VOCAB
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class Recording(BaseStreamer):
    """Writes down what it is given; keeps the tensors themselves, so that a later change to them shows."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def put(self, value: Tensor) -> None:
        self.log.append(value)

    def end(self) -> None:
        self.log.append("end")


# The user's own processors. Each is told apart from the library's by its type, and keeps the ids that it was given.


class Own(LogitsProcessor):
    """A user's processor that keeps what it was called with."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append((type(self).__name__, input_ids, tuple(scores.shape), scores.dtype))
        assert input_ids.is_contiguous(), "plain generate() hands out contiguous ids"
        return self.process(input_ids, scores)

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError


class Stateless(Own):
    """Looks at the row's last token."""

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 0:
            return scores
        return scores.scatter_add(1, input_ids[:, -1:], torch.full_like(scores[:, :1], -1.5))


class Counting(Own):
    """Keeps state: favours another token every call."""

    count = 0

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        scores = scores.clone()
        scores[:, 7 * self.count % VOCAB] += 2.0
        return scores


class InPlace(Own):
    """Writes into the scores that it is given, as plain `generate()` allows."""

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 5::9] -= 1.0
        return scores


class Crowd(Own):
    """Looks at the other rows: their ids and their scores."""

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return (
            scores
            - 0.5 * scores.clamp(-30, 30).mean(0, keepdim=True)
            + 0.1 * (input_ids.sum() % 7) * torch.arange(VOCAB, device=scores.device).cos()
        )


class Noisy(Own):
    """Draws random numbers of its own from the generator that sampling uses."""

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 0.5 * torch.rand(scores.shape, device=scores.device)


PROCESSORS = {kind.__name__: kind for kind in (Stateless, Counting, InPlace, Crowd, Noisy)}


class Criterion(StoppingCriteria):
    """A user's stopping criterion that keeps what it was called with."""

    def __init__(self, calls: list[Any], start: int) -> None:
        self.calls, self.start, self.count = calls, start, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.count += 1
        self.calls.append((type(self).__name__, input_ids, None if scores is None else len(scores), kwargs))
        assert input_ids.is_contiguous(), "plain generate() hands out contiguous ids"
        return self.stop(input_ids, scores)

    def stop(self, input_ids: Tensor, scores: Any) -> Any:
        raise NotImplementedError


class PerRow(Criterion):
    """Ends a row at one of its own tokens, and keeps no state."""

    def stop(self, input_ids: Tensor, scores: Any) -> Any:
        return (input_ids[:, -1] % 13 == 4) & (input_ids.shape[1] > self.start + 2)


class Alarm(Criterion):
    """Keeps state: ends another row every few calls."""

    def stop(self, input_ids: Tensor, scores: Any) -> Any:
        row = torch.arange(input_ids.shape[0], device=input_ids.device)
        return (self.count % 5 == 4) & (row == self.count // 5 % 4)


class Whole(Criterion):
    """Ends the whole batch at once, with a bool instead of a tensor."""

    def stop(self, input_ids: Tensor, scores: Any) -> Any:
        return bool((input_ids[:, -1] % 11 == 3).any()) and self.count > 3


class Scored(Criterion):
    """Looks at the scores so far, where there are any."""

    def stop(self, input_ids: Tensor, scores: Any) -> Any:
        if scores is None:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        assert len(scores) == self.count
        return scores[-1].softmax(-1).amax(-1) > 0.6


class Padder(Criterion):
    """Has an `eos_token_id`, which makes plain `generate()` pad ended rows, though it is no EosTokenCriteria."""

    eos_token_id = 9

    def stop(self, input_ids: Tensor, scores: Any) -> Any:
        return input_ids[:, -1] % 16 == 9


class Dice(Criterion):
    """Draws random numbers of its own, from the generator that sampling uses."""

    def stop(self, input_ids: Tensor, scores: Any) -> Any:
        return torch.rand(input_ids.shape[0], device=input_ids.device) < 0.05


CRITERIA = {kind.__name__: kind for kind in (PerRow, Alarm, Whole, Scored, Padder, Dice)}


def prefix_allowed(calls: list[Any]) -> Callable[[int, Tensor], list[int]]:
    """Return a `prefix_allowed_tokens_fn` that writes down its calls."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        calls.append(("prefix", row, ids))
        last = int(ids[-1]) if len(ids) else 0
        return [t for t in range(VOCAB) if (t + last + row) % 3 != 0]

    return allowed
