"""How near to the limit of its memory a model runs: passes over 1 to 64 rows against the floor, and tokens a second.

    python benchmarks/limit.py REQUESTS --tokenizer DIR [--shapes 1b 8b 32b] [--behind 1024] [--each 3] [--new 192]
                               [--workloads …] [--rounds 3] [--compile] [--json OUT] [--markdown OUT]

Models of random weights in the shapes of Llama and Qwen, in bfloat16. The floor is what it takes to read the weights
that a pass multiplies by, and keys and values of the context, at the speed at which this device copies memory. Passes
are those that decoding runs, until their best tokens are on the host, by `Lookahead(static=False)`, `static=True` (as
CUDA graphs on a GPU) and, with --compile, `compile=True`.

Tokens a second are those of recorded outputs (`benchmarks/big.py` says what that shows): REQUESTS are JSON lines with
`workload`, `prompt` and `output`. Plain `generate()` with a static cache compiles itself on a GPU, and writes what it
likes, which takes as long. On a GPU `--shapes 8b` takes some minutes; `--shapes tiny --device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from big import items
from replaying import Replay
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lookahead import Draft, Lookahead
from lookahead.bench.machine import about
from lookahead.bench.systems import arguments_of, synchronize
from lookahead.bench.workloads import Item
from lookahead.cache import opened
from lookahead.calibrate import run_pass
from lookahead.families import text_config
from lookahead.static.recorder import Graphs
from lookahead.static.shapes import COUNTS, Counts
from lookahead.static.space import spaces_of
from lookahead.static.target import StaticTarget
from lookahead.support import family_of
from lookahead.target import Target

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 32768,
    },
    "0.5b": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32768,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "32b": {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 152064,
    },
}  # fmt: skip
COPIED = 1 << 30  # bytes, where bandwidth is measured
WAYS: dict[str, dict[str, Any]] = {
    "any shape": {"static": False},
    "fixed shapes": {"static": True},
    "compiled": {"compile": True},
    "invariant": {"invariant": True},
}


def model_of(shape: str, options: argparse.Namespace) -> Any:
    """Return a model of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=16384, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = 0
    return model


def bandwidth(device: torch.device) -> float:
    """Return bytes a second that a copy reads and writes, the median of several."""
    source = torch.ones(COPIED // (1 if device.type == "cuda" else 8), dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(12):
        wait(device)
        begin = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - begin)
    return 2 * source.nbytes / statistics.median(times[2:])


def wait(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bytes(model: Any, context: int) -> int:
    """Return the bytes of weights and cache that a pass behind `context` tokens has to read."""
    config = text_config(model)
    table = model.get_input_embeddings().weight
    weights = sum(one.nbytes for one in model.parameters() if one is not table)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * table.element_size()
    return int(weights + context * per_token)


# Passes


class Passes:
    """Passes over trees of random tokens behind a random context, of which nothing is kept.

    Args:
        way: settings of a `Lookahead`.
    """

    def __init__(self, model: Any, context: int, way: dict[str, Any]) -> None:
        from transformers import DynamicCache

        family, self._model = family_of(model), model
        ids = torch.randint(3, 1000, (1, context), device=model.device)
        cache = opened(DynamicCache(config=text_config(model)))
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        last = torch.tensor([context - 1])
        self.target: Any
        if way.get("static") is not False:
            compiled = torch.compile(model.__call__, dynamic=False) if way.get("compile") else None
            self.target = StaticTarget(
                model, family, cache, None, last, 1, nodes=64, counts=Counts(), compiled=compiled
            )
        else:
            self.target = Target(model, family, cache, None, last, 256)

    def seconds(self, rows: int) -> float:
        """Return what a pass over a tree of `rows` nodes takes until its best tokens are on the host."""
        draw = np.random.default_rng(rows)
        parents = [-1, *(int(draw.integers(max(i - 4, 0), i)) for i in range(1, rows))]
        draft = Draft(draw.integers(3, 1000, rows).astype(np.int32), np.array(parents, np.int32))
        wait(self._model.device)
        begin = time.perf_counter()
        run_pass(self.target, [draft], [0])
        return time.perf_counter() - begin


def measured_passes(model: Any, context: int, ways: list[str], repeats: int) -> dict[str, dict[int, float]]:
    """Return the median seconds of passes by way and rows, measured in turns; "launched": what the host does of it."""
    found: dict[str, dict[int, float]] = {}
    with torch.no_grad():
        for way in ways:  # one after the other: memory
            passes, times = Passes(model, context, WAYS[way]), dict[int, list[float]]()
            for turn in range(repeats + 4):
                for rows in COUNTS:
                    seconds = passes.seconds(rows)
                    if turn >= 4:  # graphs are recorded, kernels chosen
                        times.setdefault(rows, []).append(seconds)
            found[way] = {rows: statistics.median(one) for rows, one in times.items()}
            recorder = passes.target._space.recorder if way != "any shape" else None
            if isinstance(recorder, Graphs):
                for one in recorder.recordings:
                    what = f"refused: {one.refused}" if one.refused else f"{one.nbytes / 2**20:.0f} MiB"
                    print(f"  {way}, graph {one.key}: {one.seconds:.2f} s, {what}", file=sys.stderr)
            del passes, recorder
            spaces_of(model).clear()
    return found


# Texts


def systems(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Callable[[Item], Any]]:
    """Return what generates a text, by name. Plain `generate()` first."""

    def plainly(**given: Any) -> Callable[[Item], Any]:
        return lambda item: model.generate(**arguments_of(item, model), **given)

    def ours(**given: Any) -> Callable[[Item], Any]:
        def run(item: Item) -> Any:
            one = Lookahead(model, tokenizer, remember=None, **given)
            ids = one.generate(**arguments_of(item, model), grammar=item.grammar)
            run.last = one.last  # type: ignore[attr-defined]
            return ids

        return run

    return {
        "plain": plainly(),
        "plain, static cache": plainly(cache_implementation="static"),
        "prompt lookup": plainly(prompt_lookup_num_tokens=10),
        **{f"lookahead, {way}": ours(**WAYS[way]) for way in options.ways},
    }


def measured_texts(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return, by workload and system: tokens a second, tokens a pass, ratios to plain, host milliseconds a step."""
    texts, outputs = items(options)
    texts = [item for item in texts if item.grammar is None]
    replay, runs = Replay(model), systems(model, tokenizer, options)
    seconds: dict[tuple[str, str], list[list[float]]] = {}
    steps: dict[tuple[str, str], list[Any]] = {}
    absent: dict[str, str] = {}
    for turn in range(options.rounds + 2):  # the first two record, compile, and learn what passes cost
        for number, item in enumerate(texts):
            recorded = outputs[(False, *item.ids)]
            replay.write([*item.ids, *recorded])
            for name, run in runs.items():
                if name in absent or (name.startswith("plain") and turn < 2 and number > 1):
                    continue
                synchronize(model)
                begin = time.perf_counter()
                try:
                    with writing(replay, name):
                        ids = run(item)
                except Exception as error:
                    if name == "plain" or name.startswith("lookahead"):
                        raise
                    absent[name] = f"{type(error).__name__}: {error}"
                    continue
                synchronize(model)
                took = time.perf_counter() - begin
                if name != "plain, static cache" and ids[0, len(item.ids) :].tolist() != recorded[: item.new]:
                    raise AssertionError(f"{name} did not write the recorded output")
                if turn >= 2:
                    seconds.setdefault((item.workload, name), []).append([turn, item.new, took])
                    last = getattr(run, "last", None)
                    steps.setdefault((item.workload, name), []).extend([] if last is None else last.passes)
    for name, reason in absent.items():
        print(f"  {name} did not run: {reason}", file=sys.stderr)
    return {
        workload: {
            name: _summed(seconds, steps, workload, name) for name in runs if (workload, name) in seconds
        }
        for workload in dict.fromkeys(item.workload for item in texts)
    }  # fmt: skip


@contextmanager
def writing(replay: Replay, name: str) -> Iterator[None]:
    """Let the model write recorded text; what torch compiles of it must not be changed, and writes what it likes."""
    if name == "plain, static cache":
        yield
        return
    with replay.on():
        yield


def _summed(seconds: Any, steps: Any, workload: str, name: str) -> dict[str, Any]:
    """Return the figures of one system on one workload; ratios are of the sums of a round."""

    def sums(name: str) -> dict[int, tuple[float, float]]:
        found: dict[int, tuple[float, float]] = {}
        for turn, tokens, took in seconds[(workload, name)]:
            have = found.get(turn, (0.0, 0.0))
            found[turn] = have[0] + tokens, have[1] + took
        return found

    own, plain = sums(name), sums("plain")
    speeds = [tokens / took for tokens, took in own.values()]
    ratios = [plain[turn][1] / took for turn, (_, took) in own.items()]
    passes = steps.get((workload, name), [])
    return {
        "tokens_per_second": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "tokens_per_pass": sum(tokens for tokens, _ in own.values()) / len(passes) if passes else None,
        "host_ms": 1e3 * statistics.median(one.outside_s for one in passes) if passes else None,
    }


# What is said of it


def report(figures: dict[str, Any]) -> str:
    """Return the figures of a shape as Markdown."""
    counts, passes = list(COUNTS), figures["passes"]
    floor = figures["floor_s"]
    lines = [
        f"**{figures['about']}**, context {figures['context']}: the floor is {1e3 * floor:.2f} ms, "
        f"{figures['read_bytes'] / 1e9:.2f} GB at {figures['bandwidth'] / 1e9:.0f} GB/s.",
        "",
        f"| ms a pass, and over the floor | {' | '.join(f'{rows} rows' if rows > 1 else '1 row' for rows in counts)} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for way, times in passes.items():
        cells = [f"{1e3 * times[rows]:.2f} ({times[rows] / floor:.2f}x)" for rows in counts]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    workloads = figures["texts"]
    lines += ["", f"| tokens/s, and times plain | {' | '.join(workloads)} |", "|---" * (len(workloads) + 1) + "|"]
    for name in dict.fromkeys(name for one in workloads.values() for name in one):
        cells = [_cell(one.get(name)) for one in workloads.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    text = f"{one['tokens_per_second']:.0f}, {one['ratio']:.2f}x ({one['least']:.2f}–{one['most']:.2f})"
    if one["tokens_per_pass"] is not None:
        text += f", {one['tokens_per_pass']:.1f} a pass, host {one['host_ms']:.2f} ms"
    return text


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    tokenizer, found = None, dict[str, Any]()
    for shape in options.shapes:
        print(f"{shape} …", file=sys.stderr)
        model = model_of(shape, options)
        if tokenizer is None:
            from recorded import load_tokenizer

            tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(options.tokenizer))
        speed, size = bandwidth(model.device), read_bytes(model, options.behind)
        ways = [way for way in options.ways if way != "invariant"]
        found[shape] = {
            "about": about(model, shape, options.threads),
            "context": options.behind,
            "bandwidth": speed,
            "read_bytes": size,
            "floor_s": size / speed,
            "passes": measured_passes(model, options.behind, ways, options.repeats),
            "texts": measured_texts(model, tokenizer, options),
        }
        print(report(found[shape]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        if options.markdown:
            options.markdown.write_text("\n".join(report(one) for one in found.values()))
        del model
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("requests", type=Path)
    add("--tokenizer", type=Path, required=True, help="a tokenizer.json or its directory")
    add("--shapes", nargs="+", choices=SHAPES, default=["1b", "8b"], help="default: 1b 8b")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--behind", type=int, default=1024, help="tokens of context behind which passes are measured")
    add("--repeats", type=int, default=15, help="passes of each number of rows")
    add("--workloads", nargs="+", default=[], help="default: all")
    add("--each", type=int, default=3, help="requests of a workload")
    add("--new", type=int, default=192, help="most tokens of an output")
    add("--context", type=int, default=1024, help="requests with longer prompts are left out")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--compile", action="store_true", help="compiled passes too")
    add("--json", type=Path, metavar="OUT")
    add("--markdown", type=Path, metavar="OUT")
    options = parser.parse_args()
    options.ways = [way for way in WAYS if way != "compiled" or options.compile]
    return options


if __name__ == "__main__":
    main()
