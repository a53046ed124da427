"""Figures on unseen prompts: teacher-forced on answers, and greedy free-running answers."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .tasks import Example, Tasks
from .train import heldout_batches, measure


@dataclass(frozen=True, slots=True)
class Answers:
    """What greedy decoding made of unseen prompts, as shares of all prompts."""

    prompts: int
    exact: float
    ended: float  # stopped with the end token
    parsed: float  # JSON: parses
    valid: float  # JSON: parses, and has the right keys in the right order


def evaluate(model: LlamaForCausalLM, tasks: Tasks, *, forced: int = 128, free: int = 48) -> dict[str, float]:
    """Return all figures of the model card; runs on the model's own device."""
    device = next(model.parameters()).device
    figures = measure(model, heldout_batches(tasks, forced, salt="evaluate"), device)
    for kind in ("edit", "json"):
        rng = random.Random(f"evaluate {kind}")
        make = tasks.edit if kind == "edit" else tasks.json
        examples = [fitting(tasks, make, rng) for _ in range(free)]
        answers = free_running(model, tasks, examples)
        figures |= {f"{kind}_free_{name}": value for name, value in asdict(answers).items()}
    return figures


def fitting(tasks: Tasks, make: object, rng: random.Random) -> Example:
    """Draw held-out examples until one fits into the training length."""
    while True:
        example: Example = make(rng, heldout=True)  # type: ignore[operator]
        if len(tasks.encode(example).ids) <= tasks.longest:
            return example


def free_running(model: LlamaForCausalLM, tasks: Tasks, examples: list[Example]) -> Answers:
    """Answer every example by greedy decoding and compare with what was asked for."""
    exact = ended = parsed = valid = 0
    for example in examples:
        text, stopped = greedy(model, tasks.tokenizer, example.prompt)
        exact += text == example.answer
        ended += stopped
        if example.kind == "json":
            keys = keys_of(text)
            parsed += keys is not None
            valid += keys == keys_of(example.answer)
    count = len(examples)
    return Answers(count, *(round(n / count, 3) for n in (exact, ended, parsed, valid)))


def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, limit: int = 400) -> tuple[str, bool]:
    """Return the greedy continuation of `prompt`, and whether it ended by itself."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
    new = output[0, ids.shape[1] :].tolist()
    stopped = new[-1] == model.config.eos_token_id
    return tokenizer.decode(new[:-1] if stopped else new), stopped


def keys_of(text: str) -> list[str] | None:
    """Return the keys of the JSON object in `text`, in order, or None if there is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return list(value) if isinstance(value, dict) else None
