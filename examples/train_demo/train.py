"""The training loop: batches of tasks, weighted loss, checkpoints and a log of held-out figures."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from .tasks import Encoded, Tasks

MIXTURE = {"continue": 0.3, "edit": 0.28, "json": 0.38, "copy": 0.04}
BATCH_TOKENS = 3072
CIRCUIT_LAYERS = 2
POOL = 96  # examples drawn at a time and sorted by length, so that batches need little padding


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded ids [rows, length] and, per target, its loss weight [rows, length - 1]."""

    ids: Tensor
    weights: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop: after so many minutes or tokens, whichever comes first."""

    minutes: float
    tokens: float

    def progress(self, seconds: float, tokens: float) -> float:
        return min(1.0, max(seconds / 60 / self.minutes, tokens / self.tokens))


def batches(tasks: Tasks, rng: random.Random, batch_tokens: int) -> Iterator[Batch]:
    """Yield batches of about `batch_tokens` tokens without end."""
    kinds, shares = list(MIXTURE), list(MIXTURE.values())
    while True:
        pool = [tasks.sample(rng, kind) for kind in rng.choices(kinds, shares, k=POOL)]
        pool.sort(key=lambda encoded: len(encoded.ids))
        groups = list(_groups(pool, batch_tokens))
        rng.shuffle(groups)
        yield from (collate(group, tasks.eos) for group in groups)


def _groups(pool: list[Encoded], batch_tokens: int) -> Iterator[list[Encoded]]:
    group: list[Encoded] = []
    for encoded in pool:
        if group and (len(group) + 1) * len(encoded.ids) > batch_tokens:
            yield group
            group = []
        group.append(encoded)
    yield group


def collate(group: list[Encoded], pad: int) -> Batch:
    """Pad on the right; causal attention then needs no mask, and padding has no loss."""
    length = max(len(encoded.ids) for encoded in group)
    ids = torch.full((len(group), length), pad)
    weights = torch.zeros(len(group), length)
    for row, encoded in enumerate(group):
        ids[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
        weights[row, : len(encoded.ids)] = torch.tensor(encoded.weights)
    return Batch(ids, weights[:, 1:], sum(len(encoded.ids) for encoded in group))


def loss_of(model: LlamaForCausalLM, batch: Batch, device: torch.device) -> Tensor:
    """Return the weighted mean loss; logits are only computed where the weight is not 0."""
    ids, weights = batch.ids.to(device), batch.weights.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(ids[:, :-1]).last_hidden_state
        chosen = weights > 0
        logits = model.lm_head(hidden[chosen])
    losses = functional.cross_entropy(logits.float(), ids[:, 1:][chosen], reduction="none")
    picked = weights[chosen]
    return (losses * picked).sum() / picked.sum()


def make_optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW; the circuit learns slowly, or the first steps, which are large, would break it."""
    decoder = model.model
    slow = [p for layer in decoder.layers[:CIRCUIT_LAYERS] for p in layer.self_attn.parameters()]
    groups = [
        {"params": [decoder.embed_tokens.weight], "lr": 0.2 * rate, "weight_decay": 0.0},
        {"params": slow, "lr": 0.1 * rate, "weight_decay": 0.0},
    ]
    taken = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups += [
        {"params": [p for p in rest if p.ndim == 2], "lr": rate, "weight_decay": 0.05},
        {"params": [p for p in rest if p.ndim == 1], "lr": rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9)
    for group in optimizer.param_groups:
        group["base"] = group["lr"]
    return optimizer


def rate_factor(step: int, progress: float, warmup: int = 60) -> float:
    """Linear warm-up, then a cosine down to 3%."""
    return min(1.0, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(slots=True)
class Run:
    """One training run; owns the model, the optimizer and the counters that a checkpoint keeps."""

    model: LlamaForCausalLM
    tasks: Tasks
    limits: Limits
    folder: Path
    device: torch.device
    optimizer: torch.optim.AdamW
    seed: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def train(self, *, log_every: int = 20, check_every: int = 250) -> None:
        """Train until the limits are reached; checkpoint and measure on the way."""
        rng = random.Random(self.seed + self.step)
        heldout = heldout_batches(self.tasks)
        recent: list[float] = []
        clock = time.perf_counter()
        for batch in batches(self.tasks, rng, BATCH_TOKENS):
            if self.step == 0:
                self._log(measure(self.model, heldout, self.device))
            progress = self.limits.progress(self.seconds, self.tokens)
            if progress >= 1:
                break
            recent.append(self._update(batch, progress))
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            if self.step % log_every == 0:
                self._log({"loss": round(sum(recent) / len(recent), 4)})
                recent.clear()
            if self.step % check_every == 0 or self.step in (20, 60, 100):
                self._log(measure(self.model, heldout, self.device))
                self.save()
        self._log(measure(self.model, heldout, self.device))
        self.save()

    def _update(self, batch: Batch, progress: float) -> float:
        factor = rate_factor(self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * factor
        loss = loss_of(self.model, batch, self.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.tokens
        return float(loss.detach())

    def _log(self, figures: dict[str, float]) -> None:
        row = {"step": self.step, "tokens": self.tokens, "minutes": round(self.seconds / 60, 2)}
        with (self.folder / "log.jsonl").open("a") as file:
            print(json.dumps(row | figures), file=file)

    def save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": (self.step, self.tokens, self.seconds),
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").rename(self.folder / "checkpoint.pt")

    def resume(self) -> None:
        """Continue from the folder's checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, map_location=self.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tokens, self.seconds = state["counters"]


def heldout_batches(tasks: Tasks, count: int = 32, salt: str = "held out") -> dict[str, Batch]:
    """Make the same held-out examples of every kind in every run that has the same `salt`."""
    made = {}
    for kind in MIXTURE:
        rng = random.Random(f"{salt} {kind}")
        group = [tasks.sample(rng, kind, heldout=True) for _ in range(count)]
        batch = collate(group, tasks.eos)
        answers = torch.zeros_like(batch.weights)
        for row, encoded in enumerate(group):
            answers[row, encoded.start - 1 : len(encoded.ids) - 1] = 1
        made[kind] = Batch(batch.ids, answers, batch.tokens)
    return made


@torch.no_grad()
def measure(model: LlamaForCausalLM, heldout: dict[str, Batch], device: torch.device) -> dict[str, float]:
    """Return teacher-forced accuracy and loss on the answers of every kind."""
    figures = {}
    for kind, batch in heldout.items():
        ids, chosen = batch.ids.to(device), batch.weights.to(device) > 0
        logits = model.lm_head(model.model(ids[:, :-1]).last_hidden_state[chosen])
        targets = ids[:, 1:][chosen]
        figures[f"{kind}_accuracy"] = round((logits.argmax(-1) == targets).float().mean().item(), 4)
        figures[f"{kind}_loss"] = round(functional.cross_entropy(logits, targets).item(), 4)
    return figures
