"""Plain `generate()` led along a text of ours: which token it would have picked at each place, and how surely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList

from lookahead.errors import LookaheadError
from lookahead.sampling import ROW_LOCAL, draws_match, generator_state, set_generator_state
from lookahead.testing.outcome import Outcome
from lookahead.testing.rounding import Rounding, measure


@dataclass(frozen=True, slots=True)
class Place:
    """A place where plain picks another token than ours, behind the same text.

    Attributes:
        column: of the generated tokens, from 0.
        margin: how much plain's token is ahead of ours, in processed scores; of a drawn token with its noise.
        lead: how much plain's best token is ahead of its second best one, in the same.
        tie: whether plain picks our token where its logits are moved by no more than rounding moves them.
    """

    row: int
    column: int
    plain: int
    ours: int
    margin: float
    lead: float
    tie: bool


@dataclass(frozen=True, slots=True)
class Judgement:
    """What plain `generate()` says of a text of ours.

    Attributes:
        places: where it would have picked another token.
        faults: what rounding does not explain, in words.
        rounding: what rounding does to this text; None: that could not be measured.
    """

    places: tuple[Place, ...]
    faults: tuple[str, ...]
    rounding: Rounding | None

    @property
    def ties(self) -> bool:
        """Whether all differences are numeric ties."""
        return not self.faults and all(place.tie for place in self.places)


def judge(model: Any, arguments: Callable[[], dict[str, Any]], ours: Outcome, *, seed: int) -> Judgement:
    """Lead plain `generate()` along the text of `ours` and compare every pick, logit and end with it.

    At each place, and not only at the first one that differs, plain sees the text that ours saw. A text is excused only
    where all of it is: each token is plain's pick or a tie, logits that ours returned are as near to plain's as
    rounding leaves them, rows end where plain ends them, and the random generator is left in the same state.

    Args:
        arguments: returns fresh arguments of plain `generate()`, without a streamer.
    """
    made = arguments()
    width = ours.sequences.shape[1] - _prompt_length(model, made)
    text = ours.sequences[:, ours.sequences.shape[1] - width :]
    rounding, faults = None, list[str]()
    try:
        rounding = measure(model, arguments, text) if width else None
    except LookaheadError:
        raise
    except Exception as error:  # a model that needs more than ids in its passes
        faults.append(f"what rounding does could not be measured ({type(error).__name__}: {error})")
    leading = _Leading(text, 0.0 if rounding is None else rounding.allowed / 2)
    plain = Outcome.of(
        lambda **given: model.generate(**given, custom_generate=leading),
        made,
        seed=seed,
        device=ours.sequences.device,
    )
    if plain.error is not None:
        return Judgement((), (f"plain raises {plain.error!r} on our text",), rounding)
    faults += _faults(plain, ours, leading, rounding)
    return Judgement(tuple(leading.places), tuple(faults), rounding)


def _prompt_length(model: Any, arguments: dict[str, Any]) -> int:
    """Return how many columns of the sequences come before the generated ones."""
    seen: list[int] = []

    def look(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        seen.append(input_ids.shape[1])
        return input_ids

    model.generate(**arguments, custom_generate=look)
    return seen[0]


def _faults(plain: Outcome, ours: Outcome, leading: _Leading, rounding: Rounding | None) -> list[str]:
    found = []
    if plain.sequences.shape != ours.sequences.shape or not torch.equal(plain.sequences, ours.sequences):
        sizes = f"{plain.sequences.shape[1]} and {ours.sequences.shape[1]} columns"
        found.append(f"rows end elsewhere than plain's on the same text, or go on otherwise ({sizes})")
    elif ours.generator is None or plain.generator is None or not torch.equal(plain.generator, ours.generator):
        found.append("the random generator is left in another state")
    for column, (x, y) in enumerate(zip(leading.logits, ours.logits or (), strict=False)):
        apart = (x - y).abs()[leading.open[column]]
        worst = float(apart[apart == apart].max()) if apart.numel() else 0.0
        allowed = 0.0 if rounding is None else rounding.allowed
        if worst > allowed:
            found.append(f"logits of column {column} are {worst:.2g} from plain's, where rounding moves {allowed:.2g}")
            break
    return found


class _Leading:
    """A decoder for `custom_generate`: plain `generate()`, which writes down its pick and then takes ours.

    Args:
        text: [B, N], what it is led along.
        moved: how far rounding moves a logit.

    Attributes:
        places: where it would have picked something else.
        logits: its raw logits, [B, V] a column.
        open: [B] a column, the rows that pick a token.
    """

    def __init__(self, text: Tensor, moved: float) -> None:
        self._text, self._moved = text, moved
        self.places: list[Place] = []
        self.logits: list[Tensor] = []
        self.open: list[Tensor] = []
        self._ended = torch.zeros(text.shape[0], dtype=torch.bool, device=text.device)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **given: Any,
    ) -> Any:
        self._processors, self._sample = logits_processor, bool(generation_config.do_sample)
        self._local = {type(one) for one in logits_processor} <= ROW_LOCAL
        self._pads = any(hasattr(one, "eos_token_id") for one in stopping_criteria)
        ending = _Ending(stopping_criteria)
        ending.ended = self._ended
        return model._sample(
            input_ids,
            logits_processor=self._led,
            stopping_criteria=ending,
            generation_config=generation_config,
            **given,
        )

    def _led(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return scores of which only our token can be picked; behind our text, plain's own."""
        column, raw = len(self.logits), logits.clone()
        scores: Tensor = self._processors(ids, logits)
        if column >= self._text.shape[1]:
            return scores
        ours = self._text[:, column]
        self.logits.append(raw)
        self.open.append(~self._ended if self._pads else torch.ones_like(self._ended))
        values = self._values(scores)
        picks = values.argmax(-1)
        for row in ((picks != ours) & self.open[-1]).nonzero().flatten().tolist():
            heights = values[row].log() if self._sample else values[row]
            margin, best = float(heights[picks[row]] - heights[ours[row]]), heights.topk(2).values
            tie = self._is_tie(ids, raw, scores, row, int(ours[row]))
            self.places.append(
                Place(row, column, int(picks[row]), int(ours[row]), margin, float(best[0] - best[1]), tie)
            )
        return torch.full_like(scores, -torch.inf).scatter_(1, ours[:, None], 0.0)

    def _values(self, scores: Tensor) -> Tensor:
        """Return what the pick takes the largest of; for a draw, as `torch.multinomial` will make it next."""
        if not self._sample:
            return scores
        state = generator_state(scores.device)
        noise = torch.empty_like(scores).exponential_(1)
        set_generator_state(scores.device, state)
        return scores.softmax(-1) / noise

    def _is_tie(self, ids: Tensor, raw: Tensor, scores: Tensor, row: int, ours: int) -> bool:
        """Whether plain picks `ours` when its logit is raised, and all others are lowered, by what rounding may do."""
        if not self._moved or (self._sample and not draws_match(scores.device)):
            return False
        moved = (raw if self._local else scores).clone()
        moved[row] -= self._moved
        moved[row, ours] += 2 * self._moved
        if self._local:  # others may count how often they are called
            moved = self._processors(ids, moved)
        return bool(self._values(moved)[row].argmax() == ours)


class _Ending(StoppingCriteriaList):  # type: ignore[misc]
    """The criteria of a call, which also write down the rows that have ended."""

    ended: Tensor

    def __call__(self, input_ids: Tensor, scores: Any, **given: Any) -> Tensor:
        found: Tensor = super().__call__(input_ids, scores, **given)
        self.ended |= found
        return found
