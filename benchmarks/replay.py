"""Replay recorded text against drafters, ours and peers': how many tokens would each model pass have yielded?

    python benchmarks/replay.py FILE [--tokenizer DIR] [--nodes 32] [--drafter NAME ...] [--json OUT] [--details OUT]

FILE has one JSON object a line, plain or gzipped, with the strings `prompt` and `output` and, if there are several, the
name of the `workload`; other keys are ignored. The target "answers" with the recorded output, so only drafting is
judged: the longest drafted path that agrees with it is accepted, plus one token. Every drafter gets the same requests
in file order, each once, the same tokens and the same budget of nodes a pass. It sees the prompt and the output so far,
never what is to come; what it keeps of a request (a pool, a suffix cache, what it learnt) it may use in later ones.

There is no model, hence no logits: the recycled ones stay out of it. Times are of this thread on the CPU, from the
start of a request to the end of what is kept of it, compiling left out. A peer that does not import is left out and
named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, Contender
from recorded import BadInput, Request, load, load_tokenizer

import lookahead
from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import LookaheadError
from lookahead.grow import Grower
from lookahead.trace import Step


@dataclass(slots=True)
class Score:
    """Sums over requests."""

    requests: int = 0
    tokens: int = 0
    passes: int = 0
    nodes: int = 0
    seconds: float = 0.0

    def add(self, other: Score) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def means(self) -> dict[str, float]:
        passes = max(self.passes, 1)
        return {
            "tokens_per_pass": self.tokens / passes,
            "nodes_per_pass": self.nodes / passes,
            "us_per_pass": 1e6 * self.seconds / passes,
        }


Scores = dict[str, Score]  # of one drafter, by workload


class Nothing(Contender):
    """Plain decoding."""

    settings: dict[str, Any] = {}  # noqa: RUF012 - there is nothing to change

    def propose(self, context: IntArray, budget: int) -> Draft:
        return Draft.root(int(context[-1]))


class Ours(Contender):
    """Our grower; with a pool, every request joins it when it has ended."""

    def __init__(self, *, min_chance: float, pool: bool) -> None:
        self.settings = {"min_chance": min_chance, "pool": pool}
        self._pool = None
        if not pool:
            self._grower = Grower(sources=("prompt",), min_chance=min_chance)
            return
        from lookahead import Pool

        self._pool = Pool()
        self._grower = Grower(sources=("prompt", "pool"), pools=(self._pool,), min_chance=min_chance)

    def start(self, context: IntArray) -> Drafter:
        return self._grower.start(context)

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self._grower.propose(context, budget)

    def finish(self, text: IntArray) -> None:
        if self._pool is not None:
            self._pool.add(text)


def makers(min_chance: float) -> dict[str, Callable[[], Contender]]:
    """Return how to make each drafter; raises ImportError where it is not there."""
    return {
        "lookahead": partial(Ours, min_chance=min_chance, pool=True),
        "lookahead_no_pool": partial(Ours, min_chance=min_chance, pool=False),
        **PEERS,
        "none": Nothing,
    }


DEFAULT = ("lookahead", "lookahead_no_pool", *PEERS)


def accept(draft: Draft, rest: IntArray) -> tuple[list[int], IntArray]:
    """Return the accepted nodes, root included, and the committed tokens, when `rest` is what the target will say."""
    path = [0]
    for i, token in enumerate(rest):
        child = draft.child(path[-1], int(token))
        if child is None or i + 1 == len(rest):
            return path, rest[: i + 1]
        path.append(child)
    raise AssertionError("nothing left to say")


def verified(draft: Draft, path: list[int], committed: IntArray) -> Step:
    """Return the step as a drafter would observe it behind a model that gives no logits."""
    return Step(
        row=0,
        draft=draft,
        path=np.array(path, np.int32),
        tokens=committed.astype(np.int64),
        top_tokens=np.zeros((len(draft), 0), np.int32),
        top_logits=np.zeros((len(draft), 0), np.float32),
    )


class Text:
    """The text of one request as far as it is known: the drafter's view has nothing of the future behind it."""

    def __init__(self, prompt: IntArray, size: int) -> None:
        self._tokens, self._used = np.zeros(size, np.int32), 0
        self.extend(prompt)

    def extend(self, tokens: IntArray) -> None:
        self._tokens[self._used : self._used + len(tokens)] = tokens
        self._used += len(tokens)

    def so_far(self) -> IntArray:
        view = self._tokens[: self._used]
        view.flags.writeable = False
        return view


def replay(request: Request, drafter: Contender, budget: int) -> Score:
    """Let `drafter` draft one request; return what came of it."""
    text, score = Text(request.prompt, len(request.prompt) + len(request.output)), Score(1, len(request.output))
    rest = request.output
    begin = time.thread_time()
    row = drafter.start(text.so_far())
    score.seconds += time.thread_time() - begin
    while len(rest):
        begin = time.thread_time()
        draft = row.propose(text.so_far(), budget).cut(budget)
        score.seconds += time.thread_time() - begin
        path, committed = accept(draft, rest)
        step = verified(draft, path, committed)
        text.extend(committed)
        rest = rest[len(committed) :]
        begin = time.thread_time()
        row.observe(step)
        score.seconds += time.thread_time() - begin
        score.passes += 1
        score.nodes += len(draft) - 1
    begin = time.thread_time()
    drafter.finish(np.concatenate([request.prompt, request.output]))
    score.seconds += time.thread_time() - begin
    return score


def warm_up(drafter: Contender) -> None:
    """Compile before the clock runs; the second request meets what is kept of the first."""
    tokens = np.arange(8, dtype=np.int32)
    for _ in range(2):
        replay(Request("", tokens[:4], tokens), drafter, 4)


def run(requests: list[Request], make: Callable[[], Contender], budget: int, fresh: bool) -> Scores:
    """Replay all requests in order with one drafter, or one for each workload if `fresh`; return scores by workload."""
    drafters: dict[str, Contender] = {}
    scores: Scores = {}
    for request in requests:
        key = request.workload if fresh else ""
        if key not in drafters:
            drafters[key] = make()
        scores.setdefault(request.workload, Score()).add(replay(request, drafters[key], budget))
    return scores


def total(scores: Scores) -> Score:
    """Return the sum over workloads."""
    result = Score()
    for score in scores.values():
        result.add(score)
    return result


def tables(results: dict[str, Scores]) -> str:
    """Return Markdown: tokens per pass by workload and drafter, then what each drafter spends."""
    first = next(iter(results.values()))
    lines = [f"| workload | n | {' | '.join(results)} |", "|---" * (len(results) + 2) + "|"]
    for workload, score in first.items():
        cells = [f"{scores[workload].means()['tokens_per_pass']:.2f}" for scores in results.values()]
        lines.append(f"| {workload} | {score.requests} | {' | '.join(cells)} |")
    lines += ["", "| drafter | nodes a pass | µs a pass |", "|---|---|---|"]
    for name, scores in results.items():
        means = total(scores).means()
        lines.append(f"| {name} | {means['nodes_per_pass']:.1f} | {means['us_per_pass']:.0f} |")
    return "\n".join(lines)


def by_workload(results: dict[str, Scores]) -> dict[str, dict[str, Score]]:
    """Return the same scores as workload -> drafter -> score."""
    return {w: {name: scores[w] for name, scores in results.items()} for w in next(iter(results.values()))}


def summary(results: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """Return workload -> drafter -> mean tokens per pass."""
    return {
        workload: {name: score.means()["tokens_per_pass"] for name, score in scores.items()}
        for workload, scores in by_workload(results).items()
    }


def details(results: dict[str, Scores]) -> dict[str, Any]:
    """Return workload -> requests, tokens, and what each drafter made of them."""
    found: dict[str, Any] = {}
    for workload, scores in by_workload(results).items():
        first = next(iter(scores.values()))
        each = {name: {"passes": s.passes, "nodes": s.nodes, **s.means()} for name, s in scores.items()}
        found[workload] = {"requests": first.requests, "tokens": first.tokens, "drafters": each}
    return found


def choose(names: list[str], min_chance: float) -> tuple[dict[str, Callable[[], Contender]], dict[str, str]]:
    """Return how to make each drafter that there is, with its code compiled, and why others are left out.

    Raises:
        BadInput: one that was asked for by name does not import.
    """
    chosen: dict[str, Callable[[], Contender]] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(names or DEFAULT):
        make = makers(min_chance)[name]
        try:
            warm_up(make())
            chosen[name] = make
        except ImportError as error:
            if names:
                raise BadInput(f"--drafter {name}: {error}") from None
            left_out[name] = str(error)
    return chosen, left_out


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, metavar="FILE", help="JSON lines, plain or gzipped")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its directory (default: the demo model's)")
    parser.add_argument("--nodes", type=int, default=32, help="nodes that a pass may spend (default: %(default)s)")
    parser.add_argument(
        "--drafter",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        choices=list(makers(0.0)),
        help="these only, of %(choices)s (default: all that import; none is plain decoding)",
    )
    parser.add_argument("--fresh", action="store_true", help="every workload starts with nothing learnt and kept")
    parser.add_argument("--min-chance", type=float, default=0.0, help="of our grower (default: %(default)s)")
    parser.add_argument("--workload", nargs="+", action="extend", default=[], help="these only", metavar="NAME")
    parser.add_argument("--limit", type=int, help="at most so many requests of each workload")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write {workload: {drafter: tokens per pass}}")
    parser.add_argument("--details", type=Path, metavar="OUT", help="write passes, nodes, times and settings as JSON")
    options = parser.parse_args()
    if options.nodes < 0 or (options.limit is not None and options.limit < 1):
        parser.error("--nodes must be 0 or more, --limit 1 or more")
    return options


def main(options: argparse.Namespace) -> None:
    tokenizer = options.tokenizer or Path(lookahead.demo_path())
    requests, skipped = load(options.requests, load_tokenizer(tokenizer), options.workload, options.limit)
    if skipped:
        tell(f"skipped: {skipped} requests with an empty prompt or output")
    chosen, left_out = choose(options.drafter, options.min_chance)
    for name, reason in left_out.items():
        tell(f"left out: {name} ({reason})")
    results: dict[str, Scores] = {}
    settings = {name: make().settings for name, make in chosen.items()}
    for name, make in chosen.items():
        tell(f"{name}: {settings[name]}")
        results[name] = run(requests, make, options.nodes, options.fresh)
    print(tables(results))
    if options.json:
        write(options.json, summary(results))
    if options.details:
        common = {"file": str(options.requests), "tokenizer": str(tokenizer)}
        common |= {name: getattr(options, name) for name in ("nodes", "fresh", "limit")}
        found = {"workloads": details(results), "drafters": settings, "left_out": left_out, "skipped": skipped}
        write(options.details, common | found)


def write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(arguments())
    except (BadInput, LookaheadError, OSError) as error:
        raise SystemExit(f"replay.py: {error}") from None
