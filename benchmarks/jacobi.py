"""Lookahead decoding with a window of guesses: the original rule, ours, and what the window adds to all our sources.

    python benchmarks/jacobi.py [--model DIR] [--prompts FILE] [--replay FILE [--limit 6]] [--group NAME ...]
                                [--rounds 1] [--threads 1] [--table] [--switch] [--lade FILE ...] [--json OUT]
                                [--write OUT]

Prompts: --prompts, a JSON list of `{"kind": str, "ids": [int], "new": int}`; --replay, recorded requests (see
recorded.py), the last 700 tokens of each prompt, 96 new tokens; and those of the model's prompts.json, as `demo_KIND`.
Systems, in groups, for each (W, N, G) of (15, 5, 15) and (7, 5, 7) and both ways to shift the window:

    original  the original rule (original_window.py)
    window    our window, drafts from its n-grams alone, G * (N - 1) nodes
    all       all our sources with 32 nodes, without the window and with it; and, without it, with as many nodes more as
              the window runs on average, rejected and accepted ones alike

All are greedy, each output is compared with plain `generate()`, and each prompt starts with nothing learnt. MAT is the
sum of tokens over the sum of passes, the prefill counted; rows are the tokens that a later pass runs, drafts those of
them that may be accepted. Times are wall times against plain `generate()` in the same process, in turn with it; the
median over the rounds is taken for each prompt. The time of the original says little: its window is plain Python.

--lade adds what lookahead/bench/lade_run.py wrote for the same prompts (--write writes them for it), timed against
plain decoding of its own environment. --table adds the MAT of our window alone over W and N, with G = W; --switch times
the switch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from original_window import SHIFTS, OriginalWindow
from recorded import BadInput, load, load_tokenizer
from transformers import AutoModelForCausalLM

import lookahead
from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import LookaheadError
from lookahead.trace import Step

SETTINGS = ((15, 5, 15), (7, 5, 7))
GROUPS = ("original", "window", "all")
NODES = 32
PROMPT, NEW = 700, 96  # tokens of a recorded request
TABLE_WINDOWS, TABLE_NGRAMS = (3, 7, 15, 31), (3, 4, 5, 7)


@dataclass(frozen=True, slots=True)
class Prompt:
    kind: str
    ids: list[int]
    new: int


@dataclass(slots=True)
class Score:
    """Sums over the prompts of one kind."""

    prompts: int = 0
    tokens: int = 0
    passes: int = 0
    later: int = 0  # passes after the prefill
    rows: float = 0.0
    drafts: float = 0.0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    differ: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Score)))

    def means(self) -> dict[str, float]:
        later = max(self.later, 1)
        return {
            "mat": self.tokens / self.passes,
            "rows": self.rows / later,
            "drafts": self.drafts / later,
            "time": self.seconds / self.plain_seconds,
        }


Scores = dict[str, Score]  # of one system, by kind
Make = Callable[[Any], lookahead.Lookahead]


class Counted(Drafter):
    """Passes everything on to another drafter and counts the drafts that run, probes left out."""

    def __init__(self, inner: Drafter, counter: Counter[str]) -> None:
        self.inner, self.counter = inner, counter

    @property
    def probes(self) -> int:
        return self.inner.probes

    def start(self, context: IntArray) -> Drafter:
        return Counted(self.inner.start(context), self.counter)

    def obey(self, matcher: Any) -> bool:
        return self.inner.obey(matcher)

    def foresee(self, noise: Any) -> bool:
        return self.inner.foresee(noise)

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self.inner.propose(context, budget)

    def observe(self, step: Step) -> None:
        self.counter["drafts"] += len(step.draft) - 1 - int(step.draft.probe.sum())
        self.inner.observe(step)


def original(model: Any, *, window: int, ngram: int, guesses: int, shift: str) -> lookahead.Lookahead:
    """Return the original rule; its nodes are what it verifies, the window runs beside them."""
    drafter = OriginalWindow(window=window, ngram=ngram, guesses=guesses, shift=shift)
    return lookahead.Lookahead(model, drafter=drafter, nodes=guesses * (ngram - 1))


def ours(
    model: Any, *, window: int, ngram: int, guesses: int, shift: str, beside: tuple[str, ...] = (), nodes: int = 0
) -> lookahead.Lookahead:
    """Return our window, with the sources `beside` it; `nodes` is G * (N - 1) if 0."""
    jacobi = lookahead.Jacobi(window=window, ngram=ngram, verify=guesses, shift=shift, switch="on")
    return lookahead.Lookahead(model, sources=(*beside, jacobi), nodes=nodes or guesses * (ngram - 1))


def systems(groups: Sequence[str]) -> dict[str, Make]:
    """Return how to make each system of these groups, but for those whose nodes depend on what others ran."""
    found: dict[str, Make] = {}
    for group in groups:
        if group == "all":
            found[f"all, {NODES} nodes"] = partial(lookahead.Lookahead, nodes=NODES)
        for settings in SETTINGS:
            for shift in SHIFTS:
                window = dict(zip(("window", "ngram", "guesses"), settings, strict=True)) | {"shift": shift}
                name = f"{settings} {shift}"
                if group == "original":
                    found[f"original {name}"] = partial(original, **window)
                elif group == "window":
                    found[f"ours {name}"] = partial(ours, **window)
                else:
                    beside = {"beside": ("prompt", "pool", "recycle"), "nodes": NODES}
                    found[f"all + window {name}"] = partial(ours, **window, **beside)
    return found


def bigger(results: dict[str, Scores]) -> dict[str, Make]:
    """Return all sources without a window, but with the nodes that each window of `results` ran on average."""
    nodes = {}
    for name, scores in results.items():
        if name.startswith("all + window"):
            means = total(scores).means()
            nodes[NODES + round(means["rows"] - 1 - means["drafts"])] = None
    return {f"all, {count} nodes": partial(lookahead.Lookahead, nodes=count) for count in sorted(nodes)}


class Bench:
    """One model and its prompts, with what plain `generate()` writes after each.

    Attributes:
        texts: the tokens that plain `generate()` gave, in the order of the prompts; filled by `run`.
    """

    def __init__(self, model: Any, prompts: list[Prompt], rounds: int) -> None:
        self.model, self.prompts, self.rounds = model, prompts, rounds
        self.texts: list[list[int]] = []

    def run(self, makers: dict[str, Make]) -> dict[str, Scores]:
        """Return the scores of every system, all timed in turns with plain decoding."""
        results: dict[str, Scores] = {name: {} for name in makers}
        if not makers:
            return results
        for make in makers.values():  # compiled before the clock runs
            self._generate(make(self.model).generate, Prompt("", self.prompts[0].ids, 8))
        self.texts = []
        for number, prompt in enumerate(self.prompts, 1):
            for name, score in self._measure(prompt, makers).items():
                results[name][prompt.kind] = results[name].get(prompt.kind, Score()) + score
            print(f"\r{number}/{len(self.prompts)}", end="", file=sys.stderr)
        print(file=sys.stderr)
        return results

    def _measure(self, prompt: Prompt, makers: dict[str, Make]) -> dict[str, Score]:
        scores: dict[str, Score] = {}
        plain_seconds: list[float] = []
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(self.rounds):
            text, elapsed = self._generate(self.model.generate, prompt)
            plain_seconds.append(elapsed)
            for name, make in makers.items():
                la, counter = make(self.model), Counter[str]()
                la.drafter = Counted(la.drafter, counter)
                found, elapsed = self._generate(la.generate, prompt)
                seconds[name].append(elapsed)
                assert la.last is not None
                later, rows = len(la.last.passes), sum(each.nodes for each in la.last.passes)
                differ = int(found != text) | (scores[name].differ if name in scores else 0)
                scores[name] = Score(1, la.last.tokens, later + 1, later, rows, counter["drafts"], differ=differ)
        self.texts.append(text)
        for name, score in scores.items():
            score.seconds, score.plain_seconds = statistics.median(seconds[name]), statistics.median(plain_seconds)
        return scores

    def _generate(self, generate: Callable[..., Any], prompt: Prompt) -> tuple[list[int], float]:
        ids = torch.tensor([prompt.ids], device=self.model.device)
        begin = time.perf_counter()
        out = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.new, do_sample=False)
        tokens = out[0, len(prompt.ids) :].tolist()
        return tokens, time.perf_counter() - begin


def read_lade(path: Path, prompts: list[Prompt], texts: list[list[int]]) -> tuple[str, Scores]:
    """Return the name and the scores of a run of lade_run.py; outputs are compared with `texts`, if there are any.

    Raises:
        BadInput: the file was not written for these prompts.
    """
    run = json.loads(path.read_text(encoding="utf-8"))
    settings, entries = run["settings"], run["prompts"]
    if [entry["kind"] for entry in entries] != [prompt.kind for prompt in prompts]:
        raise BadInput(f"--lade {path}: other prompts; write these with --write and run lade_run.py on them")
    scores: Scores = {}
    for i, entry in enumerate(entries):
        later = entry["passes"] - 1
        score = Score(1, len(entry["tokens"]), entry["passes"], later, later * entry["width"], float("nan"))
        score.seconds, score.plain_seconds = entry["seconds"], entry["plain_seconds"]
        score.differ = int(entry["tokens"] != texts[i]) if texts else int(not entry["equal"])
        scores[entry["kind"]] = scores.get(entry["kind"], Score()) + score
    shape = tuple(settings[name] for name in ("window", "ngram", "guesses"))
    return f"lade {settings['lade']} {shape} {settings['shift']}", scores


def total(scores: Scores) -> Score:
    return sum(scores.values(), Score())


def table(model: Any, bench: Bench) -> dict[str, dict[str, float]]:
    """Return {N: {W: MAT}} of our window alone with G = W."""
    found: dict[str, dict[str, float]] = {}
    for ngram in TABLE_NGRAMS:
        makers: dict[str, Make] = {
            str(window): partial(ours, window=window, ngram=ngram, guesses=window, shift="one")
            for window in TABLE_WINDOWS
        }
        found[str(ngram)] = {window: total(scores).means()["mat"] for window, scores in bench.run(makers).items()}
    return found


def switched(bench: Bench) -> str:
    """Return what the switch does: time with a window that it governs, and with one that always runs, against none.

    Unlike elsewhere, one `Lookahead` serves all prompts, so that the switch has something to learn from. All three
    answer every prompt in turn; the ratio is the median over prompts and rounds.
    """
    sources = ("prompt", "pool", "recycle")
    users = {
        "none": lookahead.Lookahead(bench.model, sources=sources, nodes=NODES),
        "auto": lookahead.Lookahead(bench.model, sources=(*sources, lookahead.Jacobi()), nodes=NODES),
        "on": lookahead.Lookahead(bench.model, sources=(*sources, lookahead.Jacobi(switch="on")), nodes=NODES),
    }
    for la in users.values():
        bench._generate(la.generate, Prompt("", bench.prompts[0].ids, 8))
    ratios: dict[str, list[float]] = {"auto": [], "on": []}
    passes = Counter[str]()
    for number, prompt in enumerate(bench.prompts * bench.rounds):
        seconds = {}
        for name in [*users][number % 3 :] + [*users][: number % 3]:
            seconds[name] = bench._generate(users[name].generate, prompt)[1]
            run = users[name].last
            assert run is not None
            passes[name] += run.forwards
        for name, found in ratios.items():
            found.append(seconds["none"] / seconds[name])
    means = ", ".join(f"{name} {statistics.median(found):.3f}" for name, found in ratios.items())
    saved = ", ".join(f"{name} {passes['none'] / passes[name]:.3f}" for name in ratios)
    return f"Speed with a window against none (15, 5, 15), time: {means}; passes saved: {saved}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(results: dict[str, Scores]) -> str:
    """Return the tables: MAT, rows and drafts a pass; time against plain."""
    kinds = list(next(iter(results.values())))
    everything = {name: {**scores, "all kinds": total(scores)} for name, scores in results.items()}
    parts = []
    for title, measure, more in (("MAT", "mat", ("rows", "drafts")), ("time / plain", "time", ())):
        rows = []
        for name, scores in everything.items():
            means = {kind: score.means() for kind, score in scores.items()}
            extra = [means["all kinds"][other] for other in more]
            cells = [f"{means[kind][measure]:.2f}" for kind in (*kinds, "all kinds")]
            rows.append([name, *cells, *("–" if value != value else f"{value:.1f}" for value in extra)])
        parts.append(markdown([title, *kinds, "all kinds", *more], rows))
    differ = sum(total(scores).differ for scores in results.values())
    outputs = sum(total(scores).prompts for scores in results.values())
    return "\n\n".join([*parts, f"{differ} of {outputs} outputs differ from plain's"])


def read_prompts(options: argparse.Namespace, directory: Path) -> list[Prompt]:
    """Return the prompts of --prompts, of --replay, and of the model itself, but for those that are there already.

    Raises:
        BadInput: a file does not hold what it should, or there is nothing to run.
    """
    found = []
    if options.prompts:
        try:
            found += [Prompt(p["kind"], p["ids"], p["new"]) for p in json.loads(options.prompts.read_text())]
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"--prompts {options.prompts}: not a JSON list of kind, ids and new ({error!r})") from None
    if options.replay:
        requests, _ = load(options.replay, load_tokenizer(directory), [], options.limit)
        found += [Prompt(r.workload, r.prompt[-PROMPT:].tolist(), NEW) for r in requests]
    given = {tuple(prompt.ids) for prompt in found}
    if (path := directory / "prompts.json").is_file():
        encode = load_tokenizer(directory).encode
        for item in json.loads(path.read_text(encoding="utf-8")):
            ids = encode(item["prompt"]).ids
            if tuple(ids) not in given:
                found.append(Prompt(f"demo_{item['kind']}", ids, min(NEW, item["max_new_tokens"])))
    if not found:
        raise BadInput("no prompts; give --prompts or --replay")
    return found


def prompt_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what `read_prompts` needs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a model directory (default: the demo model)")
    add("--prompts", type=Path, metavar="FILE", help="JSON list of kind, ids and new")
    add("--replay", type=Path, metavar="FILE", help="recorded requests, JSON lines, plain or gzipped")
    add("--limit", type=int, default=6, help="requests of each workload of --replay (default: %(default)s)")
    return parser


def arguments() -> argparse.Namespace:
    parser = prompt_parser(__doc__)
    add = parser.add_argument
    add("--group", nargs="*", choices=GROUPS, default=GROUPS, metavar="NAME", help=f"of {', '.join(GROUPS)}")
    add("--rounds", type=int, default=1)
    add("--threads", type=int, default=1)
    add("--dtype", default="float32")
    add("--device", default="cpu")
    add("--table", action="store_true", help="also the MAT of our window over W and N")
    add("--switch", action="store_true", help="also time the switch of the window")
    add("--lade", type=Path, nargs="+", default=[], metavar="FILE", help="what lade_run.py wrote for these prompts")
    add("--json", type=Path, metavar="OUT", help="write all sums and means")
    add("--write", type=Path, metavar="OUT", help="write the prompts for lade_run.py, and run nothing")
    options = parser.parse_args()
    if options.rounds < 1 or options.limit < 1 or options.threads < 1:
        parser.error("--rounds, --limit and --threads must be 1 or more")
    return options


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    directory = options.model or Path(lookahead.demo_path())
    prompts = read_prompts(options, directory)
    if options.write:
        options.write.write_text(json.dumps([{"kind": p.kind, "ids": p.ids, "new": p.new} for p in prompts]) + "\n")
        return
    lade = dict(read_lade(path, prompts, []) for path in options.lade)  # refused before anything runs
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, options.dtype))
    bench = Bench(model.to(options.device).eval(), prompts, options.rounds)
    results = bench.run(systems(options.group))
    results |= bench.run(bigger(results))
    lade = dict(read_lade(path, prompts, bench.texts) for path in options.lade)
    results = lade | results
    print(f"{len(prompts)} prompts, {options.rounds} rounds, {options.threads} threads\n")
    if results:
        print(report(results))
    grid = table(model, bench) if options.table else {}
    if grid:
        rows = [[f"N = {ngram}", *(f"{mat:.2f}" for mat in row.values())] for ngram, row in grid.items()]
        print("\n" + markdown(["MAT", *(f"W = {window}" for window in TABLE_WINDOWS)], rows))
    if options.switch:
        print("\n" + switched(bench))
    if options.json:
        options.json.write_text(json.dumps({"systems": summary(results), "table": grid}, indent=1) + "\n")


def summary(results: dict[str, Scores]) -> dict[str, Any]:
    """Return the sums and means of every system and kind, ready for JSON."""
    found: dict[str, Any] = {}
    for name, scores in results.items():
        found[name] = {}
        for kind, score in {**scores, "all kinds": total(scores)}.items():
            values = {field.name: getattr(score, field.name) for field in fields(Score)} | {"means": score.means()}
            if score.drafts != score.drafts:  # lade_run.py does not count them
                values["drafts"] = values["means"]["drafts"] = None
            found[name][kind] = values
    return found


if __name__ == "__main__":
    try:
        main(arguments())
    except (BadInput, LookaheadError, OSError) as error:
        raise SystemExit(f"jacobi.py: {error}") from None
