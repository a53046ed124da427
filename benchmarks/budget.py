"""The automatic budget against plain `generate()` where nothing can be reused, and against every fixed number of nodes.

    python benchmarks/budget.py [--part nothing|demo|made] [--rounds 5] [--nodes 0 4 8 …] [--threads 2] [--json OUT]

"nothing": a random Llama of the demo model's size on random prompts, greedy and sampled; every round has a prompt of
its own and runs plain and with lookahead in turns. Ratios are plain's time over ours, medians over the rounds.

"demo": the prompts of the demo model by kind, with the automatic budget and with fixed numbers of nodes in turns. Every
run has a fresh `Lookahead`, so that no answer is remembered; the automatic budget is one object for all of them, as in
a `Lookahead` that is kept. Times of a kind are sums over its prompts of medians over the rounds.

"made": the same on `--prompts` new prompts of each task that the demo model was trained for (`examples/train_demo`),
from code that it has not seen.

All outputs are compared with plain's. In bfloat16 they may differ where two tokens are as likely, see the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from overhead import random_llama
from prompts import prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead import Budget, Lookahead
from lookahead.bench.workloads import tasks_of
from lookahead.compare import Comparison, Task, read_tasks

FIXED = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64)
TOKENS, PROMPT = 192, 128


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call and its result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


# Nothing to reuse


def nothing(dtype: str, rows: int, temperature: float, rounds: int) -> dict[str, Any]:
    """Return ratios of plain's time to ours where a text has nothing to reuse."""
    model = random_llama().to(getattr(torch, dtype))
    torch.manual_seed(1)
    la, ratios, same, mats = Lookahead(model), [], 0, []
    arguments: dict[str, Any] = {"max_new_tokens": TOKENS, "eos_token_id": None, "do_sample": temperature > 0}
    arguments |= {"temperature": temperature, "top_k": 0} if temperature else {}
    for number in range(rounds + 2):
        prompt = torch.randint(3, model.config.vocab_size, (rows, PROMPT))
        given = {"inputs": prompt, "attention_mask": torch.ones_like(prompt), **arguments}
        found = {}
        for name in ("plain", "ours") if number % 2 else ("ours", "plain"):
            torch.manual_seed(number)
            found[name] = timed(partial(model.generate if name == "plain" else la.generate, **given))
        if number < 2:
            continue  # compiling, and the first prices
        ratios.append(found["plain"][0] / found["ours"][0])
        same += found["plain"][1].equal(found["ours"][1])
        assert la.last is not None
        mats.append(la.last.tokens_per_pass)
    return {
        "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        "identical": same, "rounds": rounds, "tokens_per_pass": statistics.mean(mats),
    }  # fmt: skip


def part_nothing(rounds: int) -> dict[str, Any]:
    """Print and return the table of texts with nothing to reuse."""
    print("| dtype | batch | picks | plain / lookahead | range | tokens per pass | identical |\n" + "|---" * 7 + "|")
    results = {}
    for dtype in ("float32", "bfloat16"):
        for rows in (1, 4):
            for temperature in (0.0, 1.0, 2.0):
                one = nothing(dtype, rows, temperature, rounds)
                picks = f"T = {temperature}" if temperature else "greedy"
                print(
                    f"| {dtype} | {rows} | {picks} | {one['median']:.3f} | {one['least']:.3f}–{one['most']:.3f} "
                    f"| {one['tokens_per_pass']:.2f} | {one['identical']}/{rounds} |",
                    flush=True,
                )
                results[f"{dtype} {rows} {picks}"] = one
    return results


# Demo workloads


def run(comparison: Comparison, index: int, options: dict[str, Any]) -> tuple[float, Any, Any]:
    """Return seconds, output and trace of one task with a fresh `Lookahead`."""
    comparison.options = options
    ids, seconds, trace = comparison.run_lookahead(index)
    return seconds, ids, trace


def made_tasks(count: int) -> list[Task]:
    """Return `count` new prompts of each kind that the demo model was trained for; those with a schema twice."""
    return [task for i, one in enumerate(prompts(count)) for task in tasks_of(f"{one['workload']}-{i}", one)]


def part_demo(rounds: int, numbers: tuple[int, ...], dtype: str, count: int = 0) -> dict[str, Any]:
    """Print and return the table of the demo's workloads, or of `count` new prompts of each kind."""
    path = lookahead.demo_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    tokenizer, tasks = AutoTokenizer.from_pretrained(path), made_tasks(count) if count else read_tasks(Path(path))
    comparison = Comparison(model, tokenizer, tasks)
    comparison.warm_up()
    budget = Budget()
    systems: dict[str, dict[str, Any]] = {"auto": {"budget": budget}}
    systems |= {str(n): {"nodes": n} for n in numbers}
    names = ["plain", *systems]
    times: dict[tuple[int, str], list[float]] = {}
    passes: dict[tuple[int, str], float] = {}
    different = set()
    for number in range(rounds):
        for index in range(len(tasks)):
            ids, seconds = comparison.run_plain(index)
            times.setdefault((index, "plain"), []).append(seconds)
            turn = (number * 3 + index) % len(systems)
            for name in [*systems][turn:] + [*systems][:turn]:
                seconds, ours, trace = run(comparison, index, systems[name])
                times.setdefault((index, name), []).append(seconds)
                passes[index, name] = trace.tokens_per_pass
                if not ours.equal(ids):
                    different.add((tasks[index].name, name))
    return _demo_table(tasks, names, times, passes, different)


def _demo_table(
    tasks: list[Task],
    names: list[str],
    times: dict[tuple[int, str], list[float]],
    passes: dict[tuple[int, str], float],
    different: set[tuple[str, str]],
) -> dict[str, Any]:
    kinds = list(dict.fromkeys(task.kind for task in tasks))
    seconds = {
        kind: {
            name: sum(statistics.median(times[i, name]) for i, task in enumerate(tasks) if task.kind == kind)
            for name in names
        }
        for kind in kinds
    }
    print("| " + " | ".join(["workload", *names, "auto / best fixed"]) + " |\n" + "|---" * (len(names) + 2) + "|")
    fixed = names[2:]
    for kind in kinds:
        each = seconds[kind]
        best = min(fixed, key=each.__getitem__)
        cells = [f"{1e3 * each[name]:.0f}" for name in names]
        print("| " + " | ".join([kind, *cells, f"{each['auto'] / each[best]:.3f} (of {best})"]) + " |")
    relative = {n: statistics.mean(seconds[k][n] / min(seconds[k][f] for f in fixed) for k in kinds) for n in names}
    print("| " + " | ".join(["mean over the best fixed", *(f"{relative[n]:.3f}" for n in names), ""]) + " |")
    print(f"{len(different)} outputs differ from plain's: {sorted(different)[:8]}")
    mats = {
        k: {n: statistics.mean(passes[i, n] for i, t in enumerate(tasks) if t.kind == k) for n in names[1:]}
        for k in kinds
    }
    return {"seconds": seconds, "tokens_per_pass": mats, "relative": relative, "different": sorted(different)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("nothing", "demo", "made"), nargs="+", default=["nothing", "demo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, nargs="+", default=list(FIXED), help="the fixed numbers")
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="of each kind, for made")
    parser.add_argument("--dtype", default="float32", help="of the demo model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    if "nothing" in args.part:
        results["nothing"] = part_nothing(args.rounds)
    if "demo" in args.part:
        results["demo"] = part_demo(args.rounds, tuple(args.nodes), args.dtype)
    if "made" in args.part:
        results["made"] = part_demo(args.rounds, tuple(args.nodes), args.dtype, args.prompts)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
