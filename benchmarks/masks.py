"""Time that following a grammar takes in a step, and its share of drafting, while `replay.py --grammar` replays.

    python benchmarks/masks.py FILE [--tokenizer DIR] [--nodes 32] [--limit N] [--json OUT]

FILE is as for replay.py. Our grower drafts with all its sources and a pool, no node being too unlikely to grow. The
grammar work of a step is all that moves the grammar engine or computes a mask: to follow what was accepted, then at
every node that the tree grows by. Times are of this thread on the CPU; compiling a schema is left out, the first mask
is not.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import constrained
import numpy as np
from constrained import Clocked
from peers import Contender
from recorded import BadInput, load_tokenizer
from replay import Ours, replay, warm_up

import lookahead
from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import LookaheadError
from lookahead.grammar.matcher import Matcher
from lookahead.trace import Step

Times = list[tuple[float, float, int]]  # of each step: ms of grammar work, ms of drafting it is part of, nodes


class Watched(Drafter):
    """A row that notes the times of its steps."""

    def __init__(self, row: Drafter, times: Times) -> None:
        self._row, self._times = row, times

    def obey(self, matcher: Matcher) -> bool:
        assert isinstance(matcher, Clocked)
        self._matcher, self._before = matcher, matcher.seconds
        return self._row.obey(matcher)

    def propose(self, context: IntArray, budget: int) -> Draft:
        following, begin = self._matcher.seconds - self._before, time.thread_time()
        draft = self._row.propose(context, budget)
        drafting = following + time.thread_time() - begin
        grammar, self._before = self._matcher.seconds - self._before, self._matcher.seconds
        self._times.append((1e3 * grammar, 1e3 * drafting, len(draft) - 1))
        return draft

    def observe(self, step: Step) -> None:
        self._row.observe(step)


class Watcher(constrained.Behind):
    """A contender whose rows note the times of their steps."""

    def __init__(self, inner: Contender) -> None:
        self.times: Times = []
        super().__init__(lambda: inner, lambda row: Watched(row, self.times))


def figures(times: Times) -> dict[str, float]:
    """Return percentiles of the grammar work of a step and of drafting, in ms, and the share of it."""
    grammar, drafting, nodes = (np.array(column) for column in zip(*times, strict=True))
    found = {"steps": len(times), "nodes": float(nodes.mean()), "share": float(grammar.sum() / drafting.sum())}
    for name, values in (("grammar", grammar), ("drafting", drafting)):
        found |= {f"{name}_p{p}_ms": float(np.percentile(values, p)) for p in (50, 90, 99, 100)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, metavar="FILE", help="JSON lines, plain or gzipped")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its directory (default: the demo model's)")
    parser.add_argument("--nodes", type=int, default=32, help="nodes that a pass may spend (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many requests of each workload")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer or Path(lookahead.demo_path()))
    requests, _ = constrained.load(options.requests, tokenizer, [], options.limit)
    watcher = Watcher(Ours(min_chance=0.0, pool=True))
    warm_up(watcher, constrained.short(tokenizer))
    watcher.times.clear()
    for request in requests:
        replay(request, watcher, options.nodes)
    found = figures(watcher.times)
    print(f"{found['steps']} steps of {found['nodes']:.1f} nodes, {tokenizer.get_vocab_size()} tokens")
    for name in ("grammar", "drafting"):
        p50, p90, p99, most = (found[f"{name}_p{p}_ms"] for p in (50, 90, 99, 100))
        print(f"{name}: p50 {p50:.2f} ms, p90 {p90:.2f} ms, p99 {p99:.2f} ms, max {most:.1f} ms a step")
    print(f"share of the grammar in drafting: {100 * found['share']:.0f}%")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, LookaheadError, OSError) as error:
        raise SystemExit(f"masks.py: {error}") from None
