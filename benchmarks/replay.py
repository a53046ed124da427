"""Replay recorded text against drafters, ours and peers': how many tokens would each model pass have yielded?

    python benchmarks/replay.py FILE [--tokenizer DIR] [--nodes 32] [--drafter NAME ...] [--json OUT] [--details OUT]
    python benchmarks/replay.py FILE --grammar [...]

FILE has one JSON object a line, plain or gzipped, with the strings `prompt` and `output` and, if there are several, the
name of the `workload`; other keys are ignored. The target "answers" with the recorded output, so only drafting is
judged: the longest drafted path that agrees with it is accepted, plus one token. Every drafter gets the same requests
in file order, each once, the same tokens and the same budget of nodes a pass. It sees the prompt and the output so far,
never what is to come; what it keeps of a request (a pool, a suffix cache, what it learnt) it may use in later ones.

With --grammar only requests with a JSON Schema as `schema` are replayed, their output written again as its grammar
wants it (see constrained.py): what does not compile or is not allowed is left out and counted. Our grower follows the
grammar: with all sources, without a pool, with nothing but the pool, with nothing at all (forced); blind is told of no
grammar. The peers are shown as they are, and pruned by the grammar.

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

import constrained
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
    grammar: float = 0.0  # of these seconds, following the grammar

    def add(self, other: Score) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def means(self) -> dict[str, float]:
        passes = max(self.passes, 1)
        return {
            "tokens_per_pass": self.tokens / passes,
            "nodes_per_pass": self.nodes / passes,
            "us_per_pass": 1e6 * self.seconds / passes,
            "grammar_us_per_pass": 1e6 * self.grammar / passes,
        }


Scores = dict[str, Score]  # of one drafter, by workload


class Nothing(Contender):
    """Plain decoding."""

    settings: dict[str, Any] = {}  # noqa: RUF012 - there is nothing to change

    def propose(self, context: IntArray, budget: int) -> Draft:
        return Draft.root(int(context[-1]))


class Ours(Contender):
    """Our grower; with a pool, every request joins it when it has ended."""

    def __init__(self, *, min_chance: float, pool: bool, sources: tuple[str, ...] = ("prompt",)) -> None:
        self.settings = {"min_chance": min_chance, "pool": pool}
        self._pool = None
        if not pool:
            self._grower = Grower(sources=sources, min_chance=min_chance)
            return
        from lookahead import Pool

        self._pool = Pool()
        self._grower = Grower(sources=(*sources, "pool"), pools=(self._pool,), min_chance=min_chance)

    def start(self, context: IntArray) -> Drafter:
        return self._grower.start(context)

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self._grower.propose(context, budget)

    def finish(self, text: IntArray) -> None:
        if self._pool is not None:
            self._pool.add(text)


def makers(min_chance: float, *, grammar: bool = False) -> dict[str, Callable[[], Contender]]:
    """Return how to make each drafter, by default all but the last; raises ImportError where it is not there."""
    ours = partial(Ours, min_chance=min_chance)
    both = {"lookahead": partial(ours, pool=True), "lookahead_no_pool": partial(ours, pool=False)}
    if not grammar:
        return {**both, **PEERS, "none": Nothing}
    return {
        **both,
        "pool": partial(ours, pool=True, sources=()),
        "forced": partial(ours, pool=False, sources=()),
        "blind": partial(constrained.Behind, both["lookahead"], constrained.Blind),
        **constrained.peers(Nothing),
        "none": Nothing,
    }


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
    rest, matcher = request.output, request.matcher()
    begin = time.thread_time()
    row = drafter.start(text.so_far())
    if matcher and not row.obey(matcher):
        matcher = None  # one that is told of no grammar
    score.seconds += time.thread_time() - begin
    while len(rest):
        begin = time.thread_time()
        if matcher:
            matcher.settle(request.output[: len(request.output) - len(rest)])
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
    if matcher:
        score.grammar = matcher.seconds
        matcher.close()
    return score


SHORT = Request("", np.arange(4, dtype=np.int32), np.arange(8, dtype=np.int32))


def warm_up(drafter: Contender, request: Request = SHORT) -> None:
    """Compile before the clock runs; the second time meets what is kept of the first."""
    for _ in range(2):
        replay(request, drafter, 4)


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
    """Return Markdown: of each drafter the tokens per pass by workload, and what it spends."""
    first = next(iter(results.values()))
    names = [f"{workload} ({score.requests})" for workload, score in first.items()]
    heads = ["drafter", *names, "nodes a pass", "µs a pass", "of it grammar"]
    lines = [heads, ["---"] * len(heads)]
    for name, scores in results.items():
        each = [f"{score.means()['tokens_per_pass']:.2f}" for score in scores.values()]
        means = total(scores).means()
        times = [f"{means[key]:.0f}" for key in ("us_per_pass", "grammar_us_per_pass")]
        lines.append([name, *each, f"{means['nodes_per_pass']:.1f}", *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def choose(
    names: list[str], known: dict[str, Callable[[], Contender]], warm: Callable[[Contender], None]
) -> tuple[dict[str, Callable[[], Contender]], dict[str, str]]:
    """Return how to make each drafter that there is, with its code compiled, and why others are left out.

    Raises:
        BadInput: one that was asked for by name is not known or does not import.
    """
    if unknown := set(names) - set(known):
        raise BadInput(f"--drafter {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    chosen: dict[str, Callable[[], Contender]] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(names or list(known)[:-1]):
        try:
            warm(known[name]())
            chosen[name] = known[name]
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
        help=f"these only, of {', '.join(makers(0.0))}; more with --grammar (default: all that import but none)",
    )
    parser.add_argument("--grammar", action="store_true", help="requests with a schema, under its grammar")
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
    tokens = load_tokenizer(tokenizer)
    where = options.requests, tokens, options.workload, options.limit
    if options.grammar:
        (requests, reasons), warm = constrained.load(*where), partial(warm_up, request=constrained.short(tokens))
        skipped = dict(reasons.most_common())
    else:
        (requests, empty), warm = load(*where), warm_up
        skipped = {"empty prompt or output": empty} if empty else {}
    for reason, count in skipped.items():
        tell(f"skipped: {count} requests: {reason}")
    chosen, left_out = choose(options.drafter, makers(options.min_chance, grammar=options.grammar), warm)
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
        common |= {name: getattr(options, name) for name in ("nodes", "fresh", "limit", "grammar")}
        found = {"workloads": details(results), "drafters": settings, "left_out": left_out, "skipped": skipped}
        write(options.details, common | found)


def write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(arguments())
    except (BadInput, LookaheadError, OSError) as error:
        raise SystemExit(f"replay.py: {error}") from None
