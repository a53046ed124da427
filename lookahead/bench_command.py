"""What `lookahead bench` does."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookahead.command import Say, check_writable, load_model, status, unwritable
from lookahead.errors import InvalidInput

# torch and transformers are imported where they are used, so that a bad file is refused at once.
if TYPE_CHECKING:
    from lookahead.bench.contest import Contest, Score
    from lookahead.bench.workloads import Item

DIFFERS = 1
QUICK_SECONDS = 240.0  # no round that would end later is begun
QUICK_EACH, QUICK_ROUNDS = 3, 2
EACH, ROUNDS = 1000, 5


@dataclass(frozen=True, slots=True)
class Plan:
    """How long it may take.

    Attributes:
        each: most texts of a workload.
        until: when no further round is begun; None: all of them are run.
    """

    rounds: int
    each: int
    until: float | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """Return the plan of the options."""
        until = time.monotonic() + QUICK_SECONDS if args.quick else None
        return cls(
            args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
            args.each or (QUICK_EACH if args.quick else EACH),
            until,
        )


def run(args: argparse.Namespace) -> int:
    """Measure lookahead beside plain `generate()` and other systems."""
    for option in ("json", "markdown", *(["plot"] if args.plot else [])):
        for file in _files(getattr(args, option)):
            check_writable(f"--{option}", file)
    from lookahead.bench.scoreboard import check_plot
    from lookahead.loading import quiet

    for file in _files(args.plot):
        check_plot(file)
    with status("loading …") as say, quiet(), ExitStack() as stack:
        import torch

        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(args.threads)
        scores, about = _measure(args, Plan.of(args), say)
    _write(args, scores, about)
    return DIFFERS if any(one["lookahead"].identical is False for one in scores.values()) else 0


def _files(given: Any) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def _measure(args: argparse.Namespace, plan: Plan, say: Say) -> tuple[dict[str, dict[str, Score]], str]:
    """Return the scores, and the machine and versions in Markdown."""
    from lookahead.bench.machine import about
    from lookahead.bench.workloads import items_of, nothing_items
    from lookahead.loading import Checkpoint, check_device, check_served

    checkpoint, device = Checkpoint(args.model), check_device(args.device)
    config = checkpoint.config()
    check_served(config, args.model, "choose another model")
    tokenizer = checkpoint.tokenizer()
    items = items_of(_tasks(args, checkpoint, plan.each), tokenizer, config)
    model = load_model(args, checkpoint, config, device)
    scores = Bench(args, plan, model, tokenizer, checkpoint.directory, say).scores(items)
    if not args.no_nothing:
        with random_model(config, model) as (untaught, directory):
            texts = nothing_items(config.vocab_size, min(plan.each, QUICK_EACH))
            bench = Bench(args, plan, untaught, tokenizer, directory, say)
            scores |= bench.scores(texts, alone="left out of --quick: it would start once more" if args.quick else "")
    return scores, about(model, args.model, args.threads)


def _tasks(args: argparse.Namespace, checkpoint: Any, each: int) -> list[Any]:
    """Return the texts of `--prompts`, or those that lie beside the model; at most `each` of a workload."""
    from lookahead.bench.workloads import read_prompts
    from lookahead.compare import read_tasks

    if args.prompts is None:
        if not (checkpoint.directory / "prompts.json").exists():
            raise InvalidInput(f"--model {args.model}: comes without a prompts.json; give --prompts FILE")
        return read_tasks(checkpoint.directory, each)
    tasks = read_prompts(args.prompts)
    kinds = dict.fromkeys(task.kind for task in tasks)
    return [task for kind in kinds for task in [one for one in tasks if one.kind == kind][:each]]


@dataclass(frozen=True, slots=True)
class Bench:
    """All systems on one model.

    Attributes:
        directory: where its checkpoint lies.
    """

    args: argparse.Namespace
    plan: Plan
    model: Any
    tokenizer: Any
    directory: Path
    say: Say

    def scores(self, items: Sequence[Item], *, alone: str = "") -> dict[str, dict[str, Score]]:
        """Return what came of `items`; without the systems of other environments where there is a reason for that."""
        with ExitStack() as stack:
            contest = self._contest(stack, items, alone)
            contest.warm_up(self.say)
            for number in range(self.plan.rounds):
                begin = time.monotonic()
                contest.round(partial(self._say, number))
                if self.plan.until is not None and 2 * time.monotonic() - begin > self.plan.until:
                    break
            return contest.scores()

    def _say(self, rounds: int, text: str, part: float) -> None:
        self.say(text, (rounds + part) / self.plan.rounds)

    def _contest(self, stack: ExitStack, items: Sequence[Item], alone: str) -> Contest:
        from lookahead.bench import others, systems
        from lookahead.bench.contest import Contest

        self.say("starting the other systems …")
        model, tokenizer, args = self.model, self.tokenizer, self.args
        # Recordings are made while it warms up, as other systems compile before they are timed.
        options: dict[str, Any] = {"script": True} | ({} if args.nodes is None else {"nodes": args.nodes})
        here = [systems.plain(model, tokenizer), systems.ours(model, tokenizer, **options)]
        here.append(systems.prompt_lookup(model, tokenizer))
        absent: dict[str, str] = {}
        for tree, name in ((True, systems.ARCTIC_TREE), (False, systems.ARCTIC_CHAIN)):
            try:
                here.append(systems.arctic(model, tokenizer, tree=tree))
            except systems.CannotRun as error:
                absent[name] = str(error)
        if alone:
            return Contest(items, here, absent | {peer.name: alone for peer in others.PEERS})
        dtype = str(model.dtype).removeprefix("torch.")
        how = {"dtype": dtype, "threads": args.threads, "compiled": not args.quick}
        outside, missing = others.started(stack, Path(args.peers), self.directory, **how)
        return Contest(items, [*here, *outside], absent | missing)


@contextmanager
def random_model(config: Any, like: Any) -> Iterator[tuple[Any, Path]]:
    """Give a model of the same shape with random weights, and where its checkpoint lies meanwhile."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = type(config).from_dict(config.to_dict() | {"initializer_range": 0.1})
        model = AutoModelForCausalLM.from_config(config).to(like.device, like.dtype).eval()
        model.generation_config.pad_token_id = 0
        model.save_pretrained(folder)
        yield model, Path(folder)


def _write(args: argparse.Namespace, scores: dict[str, dict[str, Score]], about: str) -> None:
    from lookahead.bench.scoreboard import as_json, markdown, plot

    text = f"{about}\n\n{markdown(scores)}"
    print(text, end="")
    texts = [("--json", args.json, json.dumps(as_json(scores), indent=1) + "\n"), ("--markdown", args.markdown, text)]
    for option, file, content in texts:
        if file is not None:
            with _written(option, file):
                Path(file).write_text(content, encoding="utf-8")
    for file in _files(args.plot):
        with _written("--plot", file):
            plot(scores, about, file)


@contextmanager
def _written(option: str, file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(option, file, error) from error
