"""States that passes over drafts leave, against those that tokens one by one leave, on models that keep some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law import same_caches
from models import PAD, VOCAB, WORDS
from transformers import DynamicCache
from zoo import ZOO, zoo

from lookahead import Lookahead
from lookahead.cache import NAME, opened
from lookahead.draft import Draft
from lookahead.states import MOST, StateCache
from lookahead.support import family_of
from lookahead.target import Target
from lookahead.testing import Oracle

# States beside attention, convolutions, both in one layer, and a window that drops positions.
NAMES = [name for name in ("qwen3_next", "lfm2", "falcon_h1", "lfm3") if name in ZOO]


class Plain:
    """The naive twin: one row of the batch after the other token runs in a pass of its own."""

    def __init__(self, name: str, prompt: torch.Tensor, shown: torch.Tensor) -> None:
        self.model, self.shown = zoo(name), shown
        self.cache = DynamicCache(config=self.model.config)
        self.places = (shown.cumsum(1) - 1).clamp(min=0)
        self.run(prompt, self.places)
        self.last = self.places[:, -1]
        self.count = 0

    def run(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            given = {"attention_mask": self.shown, "position_ids": places, NAME: self.cache}
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=True, **given).logits
        return logits

    def add(self, tokens: list[int]) -> torch.Tensor:
        """Return the logits [B, V] behind one more token of each row."""
        self.count += 1
        self.shown = torch.nn.functional.pad(self.shown, (0, 1), value=1)
        return self.run(torch.tensor(tokens)[:, None], (self.last + self.count)[:, None])[:, -1]


class Drafted:
    """The same by passes over chains, of which only a part is kept."""

    def __init__(self, name: str, prompt: torch.Tensor, shown: torch.Tensor) -> None:
        self.model = zoo(name)
        self.own = DynamicCache(config=self.model.config)
        places = (shown.cumsum(1) - 1).clamp(min=0)
        passed = opened(self.own)
        with torch.no_grad():
            given = {"attention_mask": shown, "position_ids": places, NAME: passed}
            self.model(input_ids=prompt, use_cache=True, **given)
        mask = None if bool(shown.all()) else shown > 0
        self.target = Target(self.model, family_of(self.model), passed, mask, places[:, -1], 8)
        self.states: StateCache = self.target.cache
        self.count = 0

    def forward(self, chains: list[list[int]]) -> torch.Tensor:
        drafts = [self.target.fit(Draft.chain(chain)) for chain in chains]
        with torch.no_grad():
            return self.target.forward(drafts, [self.count] * len(drafts))

    def keep(self, count: int, rows: int) -> None:
        self.target.keep([list(range(count))] * rows)
        self.count += count

    def give_back(self) -> DynamicCache:
        with torch.no_grad():
            self.target.give_back(self.own, self.count)
        return self.own


@dataclass(frozen=True)
class Turn:
    """A pass over chains of `sizes` nodes, of which `kept` are kept; `failed` passes are begun before it."""

    sizes: tuple[int, ...]
    kept: int
    failed: tuple[int, ...]


@st.composite
def stories(draw: Any) -> dict[str, Any]:
    rows = draw(st.integers(1, 2))
    turns = []
    for _ in range(draw(st.integers(1, 7))):
        sizes = tuple(draw(st.integers(1, 6)) for _ in range(rows))
        kept = draw(st.sampled_from([min(sizes), draw(st.integers(0, min(sizes)))]))
        turns.append(Turn(sizes, kept, tuple(draw(st.lists(st.integers(1, 4), max_size=1)))))
    padding = [draw(st.integers(0, 3)) for _ in range(rows)]
    return {"turns": turns, "padding": padding, "seed": draw(st.integers(0, 1000)), "prompt": draw(st.integers(4, 12))}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(story=stories())
def test_drafts_leave_what_tokens_one_by_one_leave(name: str, story: dict[str, Any]) -> None:
    """Whatever was kept of each pass, also where passes were begun and never kept, behind padding too."""
    random, rows = np.random.default_rng(story["seed"]), len(story["padding"])
    prompt, shown = prompts(random, story["prompt"], story["padding"])
    plain, ours = Plain(name, prompt, shown), Drafted(name, prompt, shown)
    for turn in story["turns"]:
        for size in turn.failed:
            ours.forward([chain_of(random, size) for _ in range(rows)])
        chains = [chain_of(random, size) for size in turn.sizes]
        full, pending = ours.states.full, ours.states.pending.shape[1]
        assert full == (pending >= MOST)
        logits, size = ours.forward(chains), max(turn.sizes)
        assert logits.shape == (rows, 1 if full else size, VOCAB)
        kept = min(turn.kept, 1) if full else turn.kept
        for node in range(kept):
            expected = plain.add([chain[node] for chain in chains])
            assert torch.allclose(logits[:, node], expected, rtol=1e-4, atol=1e-4), node  # states are 32 bits wide
        ours.keep(kept, rows)
        assert ours.states.complete == ours.count == plain.count
        assert ours.states.used == ours.states.prompt + plain.count
        assert not ours.states.has_holes
        if kept == (1 if full else size):
            assert ours.states.pending.shape == (rows, 0), "what is right needs no second pass"
        else:
            assert ours.states.pending.shape == (rows, pending + kept)
    if random.random() < 0.5:
        ours.forward([chain_of(random, 3) for _ in range(rows)])
    same_caches(plain.cache, ours.give_back())


def prompts(random: Any, length: int, padding: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of prompts, padded on the left."""
    ids, shown = random.choice(WORDS, (len(padding), length)), np.ones((len(padding), length), np.int64)
    for row, count in enumerate(padding):
        ids[row, :count], shown[row, :count] = PAD, 0
    return torch.from_numpy(ids), torch.from_numpy(shown)


def chain_of(random: Any, size: int) -> list[int]:
    return [int(token) for token in random.choice(WORDS, size)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_pending_is_bounded(name: str) -> None:
    """A drafter that is always wrong has its tokens run again and again, until a pass runs them without a draft."""
    random = np.random.default_rng(0)
    ours = Drafted(name, *prompts(random, 8, [0]))
    pending = []
    for _ in range(3 * MOST):
        full = ours.states.full
        chain = chain_of(random, 3)
        assert ours.forward([chain]).shape[1] == (1 if full else 3)
        ours.keep(1, 1)
        pending.append(ours.states.pending.shape[1])
        assert (pending[-1] == 0) == full
    assert max(pending) == MOST
    assert pending[:MOST] == list(range(1, MOST + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_that_failed_half_way_is_undone(name: str) -> None:
    """Some layers have seen its tokens, and others not; what is given back is what was kept before."""
    random = np.random.default_rng(1)
    prompt, shown = prompts(random, 8, [0])
    for pending in (False, True):
        plain, ours = Plain(name, prompt, shown), Drafted(name, prompt, shown)
        chain = chain_of(random, 4)
        ours.forward([chain])
        ours.keep(2 if pending else 4, 1)
        for token in chain[: 2 if pending else 4]:
            plain.add([token])
        layer = zoo(name).model.layers[-1]
        hook = layer.register_forward_pre_hook(failing)
        try:
            with pytest.raises(RuntimeError, match="stopped"):
                ours.forward([chain_of(random, 3)])
        finally:
            hook.remove()
        same_caches(plain.cache, ours.give_back())


def failing(*_: Any) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("column", [1, 5, 6, 7, 8, 11])
def test_the_cache_of_a_call_that_failed_can_be_gone_on_with(name: str, column: int) -> None:
    """A processor of the user's raises behind a pass over a draft: its cache holds what was kept before."""
    model, random = zoo(name), np.random.default_rng(2)
    prompt, shown = prompts(random, 8, [0])
    answer = model.generate(prompt, attention_mask=shown, max_new_tokens=16, do_sample=False)[0, 8:].tolist()

    def stopping(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 8 + column:
            raise RuntimeError("stopped")
        return scores

    own = DynamicCache(config=model.config)
    la = Lookahead(model, drafter=Oracle([answer], VOCAB, error=0.3, seed=3), nodes=6)
    with pytest.raises(RuntimeError, match="stopped"):
        la.generate(
            prompt,
            attention_mask=shown,
            **{NAME: own},
            max_new_tokens=16,
            do_sample=False,
            logits_processor=[stopping],
        )
    plain, held = Plain(name, prompt, shown), own.get_seq_length() - 8
    assert held < column
    for token in answer[:held]:
        plain.add([token])
    same_caches(plain.cache, own)
