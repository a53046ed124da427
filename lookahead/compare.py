"""The same prompts plain and with lookahead, timed fairly."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookahead.engine import Lookahead
from lookahead.errors import InvalidInput
from lookahead.grammar.grammar import Grammar
from lookahead.loading import encode, room
from lookahead.pool.pool import Pool
from lookahead.request import end_tokens
from lookahead.trace import Run

WARM_UP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt to compare on.

    Attributes:
        before: prompts whose outputs are in the pool that lookahead drafts from; None: it has no pool.
        grammar: what the output must be, plain and with lookahead.
    """

    name: str
    kind: str
    prompt: str
    max_new_tokens: int
    before: tuple[str, ...] | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One prompt, once plain and once with lookahead."""

    plain_s: float
    lookahead_s: float
    identical: bool
    new_ids: list[int]
    run: Run


@dataclass(frozen=True, slots=True)
class Row:
    """All trials of one task; seconds are medians over the rounds.

    Attributes:
        passes: forward passes of the model, the prefill included; plain decoding needs one a token.
    """

    task: Task
    trials: tuple[Trial, ...]

    @property
    def plain_s(self) -> float:
        return statistics.median(trial.plain_s for trial in self.trials)

    @property
    def lookahead_s(self) -> float:
        return statistics.median(trial.lookahead_s for trial in self.trials)

    @property
    def ratio(self) -> float:
        return self.plain_s / self.lookahead_s

    @property
    def identical(self) -> bool:
        return all(trial.identical for trial in self.trials)

    @property
    def tokens(self) -> int:
        return self.trials[0].run.tokens

    @property
    def passes(self) -> int:
        return self.trials[0].run.forwards

    def as_dict(self) -> dict[str, Any]:
        """Return what `demo --json` writes."""
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "identical": self.identical,
            "plain_s": round(self.plain_s, 4),
            "lookahead_s": round(self.lookahead_s, 4),
            "ratio": round(self.ratio, 3),
            "tokens": self.tokens,
            "passes": self.passes,
            "tokens_per_pass": round(self.tokens / self.passes, 3),
            "rounds": len(self.trials),
        }


def read_tasks(directory: Path, each: int = 3) -> list[Task]:
    """Return the first `each` prompts of every kind in `directory`/prompts.json.

    One with other prompts `before` it becomes two tasks: with a pool that is empty, and with one that holds the outputs
    of those; one with a `schema` too: without a grammar and with that of the schema.
    """
    path = directory / "prompts.json"
    try:
        tasks = [task for item in json.loads(path.read_text(encoding="utf-8")) for task in _tasks(item)]
        if not all(task.prompt and task.max_new_tokens > 0 for task in tasks):
            raise ValueError
    except OSError as error:
        raise InvalidInput(f"--model {directory}: the demo needs its prompts.json, which cannot be read") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInput(f"{path}: not a JSON list of task, kind, prompt and max_new_tokens") from error
    kinds = list(dict.fromkeys(task.kind for task in tasks))
    chosen = [task for kind in kinds for task in [t for t in tasks if t.kind == kind][:each]]
    if not chosen:
        raise InvalidInput(f"{path}: holds no prompts")
    return chosen


def _tasks(item: dict[str, Any]) -> list[Task]:
    name, kind, prompt, limit = item["task"], item["kind"], item["prompt"], int(item["max_new_tokens"])
    if "schema" in item:
        grammar = Grammar.json_schema(item["schema"])
        return [Task(name, kind, prompt, limit), Task(name, f"{kind} + schema", prompt, limit, grammar=grammar)]
    if "before" not in item:
        return [Task(name, kind, prompt, limit)]
    before = tuple(str(one) for one in item["before"])
    return [Task(name, "cold pool", prompt, limit, ()), Task(name, "warm pool", prompt, limit, before)]


class Comparison:
    """Runs plain `generate()` and lookahead on the same tasks, greedy, in turns.

    Every lookahead run has a fresh `Lookahead`: one that had seen the prompt before would remember the answer. The pool
    of a task that has one is filled once, and nothing is added to it. They share one budget, unless `options` say more.

    Args:
        options: of `Lookahead`, such as `nodes`.

    Attributes:
        options: likewise; may be set to others.
    """

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[Task], **options: Any) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._ends = end_tokens(model, {})
        self.tasks, self._threads = list(tasks), torch.get_num_threads()
        self._inputs = [encode(tokenizer, task.prompt) for task in tasks]
        self._limits = [
            room(model.config, inputs["input_ids"].shape[1], task.max_new_tokens)
            for task, inputs in zip(tasks, self._inputs, strict=True)
        ]
        self._pools: dict[int, Pool] = {}
        self._trials: list[list[Trial]] = [[] for _ in tasks]

    @property
    def setting(self) -> str:
        """The model and machine in one line."""
        model, threads = self.model, self._threads
        size = sum(weight.numel() for weight in model.parameters()) / 1e6
        kind = f"{model.config.model_type}, {size:.1f}M parameters, {str(model.dtype).removeprefix('torch.')}"
        return f"Model: {kind}, on {model.device}, {threads} thread{'s' if threads > 1 else ''}."

    @property
    def rounds(self) -> int:
        """Rounds that are complete."""
        return min(len(trials) for trials in self._trials)

    @property
    def rows(self) -> list[Row]:
        return [Row(task, tuple(trials)) for task, trials in zip(self.tasks, self._trials, strict=True)]

    def warm_up(self) -> float:
        """Run the first task of each kind for a few tokens; return the seconds that the first-call compile took."""
        firsts = {task.kind: index for index, task in reversed(list(enumerate(self.tasks)))}
        compiling = 0.0
        for index in firsts.values():
            limit = min(self._limits[index], WARM_UP_TOKENS)
            self.run_plain(index, limit)
            first, second = self.run_lookahead(index, limit), self.run_lookahead(index, limit)
            compiling += max(first[1] - second[1], 0.0)
        return compiling

    def round(self, say: Callable[[str, float], object] = lambda text, part: None) -> None:
        """Run every task once each way; who goes first changes from task to task and from round to round."""
        number = self.rounds
        for index, trials in enumerate(self._trials):
            say(f"round {number + 1}: prompt {index + 1} of {len(self.tasks)}", index / len(self.tasks))
            trials.append(self._trial(index, plain_first=(index + number) % 2 == 0))

    def _trial(self, index: int, *, plain_first: bool) -> Trial:
        limit = self._limits[index]
        if plain_first:
            expected, plain_s = self.run_plain(index, limit)
            ids, lookahead_s, run = self.run_lookahead(index, limit)
        else:
            ids, lookahead_s, run = self.run_lookahead(index, limit)
            expected, plain_s = self.run_plain(index, limit)
        new_ids = ids[0, self._inputs[index]["input_ids"].shape[1] :].tolist()
        return Trial(plain_s, lookahead_s, torch.equal(expected, ids), new_ids, run)

    def run_plain(self, index: int, limit: int | None = None) -> tuple[Tensor, float]:
        """Return output and seconds of a task without lookahead."""
        limit = self._limits[index] if limit is None else limit
        options: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False}
        grammar = self.tasks[index].grammar
        begin = time.perf_counter()
        if grammar is not None:
            options["logits_processor"] = [grammar.processor(self.tokenizer, eos_token_id=self._ends)]
        ids = self.model.generate(**self._inputs[index], **options)
        return ids, time.perf_counter() - begin

    def run_lookahead(self, index: int, limit: int | None = None) -> tuple[Tensor, float, Run]:
        """Return output, seconds and trace of a task with a fresh `Lookahead`."""
        limit = self._limits[index] if limit is None else limit
        pool = self._pool_of(index)
        begin = time.perf_counter()
        lookahead = Lookahead(self.model, self.tokenizer, pool=pool, remember=None, **self.options)
        options: dict[str, Any] = {"max_new_tokens": limit, "grammar": self.tasks[index].grammar}
        ids = lookahead.generate(**self._inputs[index], do_sample=False, **options)
        seconds = time.perf_counter() - begin
        assert lookahead.last is not None
        return ids, seconds, lookahead.last

    def _pool_of(self, index: int) -> Pool | None:
        """Return the pool of a task, filled when it is first asked for."""
        before = self.tasks[index].before
        if before is not None and index not in self._pools:
            self._pools[index] = Pool()
            lookahead = Lookahead(self.model, pool=self._pools[index], **self.options)
            for prompt in before:
                lookahead.generate(**encode(self.tokenizer, prompt), max_new_tokens=self._limits[index])
        return self._pools.get(index)
