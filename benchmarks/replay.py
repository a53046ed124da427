"""Replay recorded text against a drafter: how many tokens would each model pass have yielded?

    python benchmarks/replay.py REQUESTS.jsonl.gz --tokenizer DIR [--nodes 32] [--min-chance 0] [--json OUT]

A request is one JSON object a line with `workload`, `prompt` and `output`. The target "answers" with the recorded
output, so only drafting is judged: the longest drafted path that agrees with it is accepted, plus one token. There is
no model, hence no logits: the recycled ones stay out of it. n-grams are of the request alone; what the grower learns
about its evidence outlives requests, which run in file order. Times are of this thread on the CPU, compiling left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.grow import Grower
from lookahead.trace import Step


@dataclass(frozen=True, slots=True)
class Request:
    workload: str
    prompt: IntArray
    output: IntArray


@dataclass(slots=True)
class Score:
    """Sums over the requests of one workload."""

    requests: int = 0
    tokens: int = 0
    passes: int = 0
    nodes: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(self.passes, 1)


class Nothing(Drafter):
    """Plain decoding, for comparison."""

    def propose(self, context: IntArray, budget: int) -> Draft:
        return Draft.root(int(context[-1]))


def load(path: Path, tokenizer: Path, workloads: list[str], limit: int | None) -> Iterator[Request]:
    """Yield the requests of `workloads` (all, if empty), at most `limit` of each."""
    tokens = Tokenizer.from_file(str(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer))
    seen: dict[str, int] = {}
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            entry = json.loads(line)
            workload = entry["workload"]
            if (workloads and workload not in workloads) or seen.get(workload, 0) == limit:
                continue
            seen[workload] = seen.get(workload, 0) + 1
            prompt, output = (
                np.array(tokens.encode(entry[key], add_special_tokens=False).ids, np.int32)
                for key in ("prompt", "output")
            )
            if len(prompt) and len(output):
                yield Request(workload, prompt, output)


def accept(draft: Draft, rest: IntArray) -> tuple[list[int], IntArray]:
    """Return the accepted nodes, root included, and the committed tokens, when `rest` is what the target will say."""
    path = [0]
    for i, token in enumerate(rest):
        child = draft.child(path[-1], int(token))
        if child is None or i + 1 == len(rest):
            return path, rest[: i + 1]
        path.append(child)
    raise AssertionError("nothing left to say")


def replay(request: Request, drafter: Drafter, budget: int, score: Score) -> None:
    """Let `drafter` draft one request and add up what came of it."""
    text, at = np.concatenate([request.prompt, request.output]), len(request.prompt)
    text.flags.writeable = False
    begin = time.thread_time()
    row = drafter.start(text[:at])
    score.seconds += time.thread_time() - begin
    score.requests += 1
    score.tokens += len(request.output)
    while at < len(text):
        begin = time.thread_time()
        draft = row.propose(text[:at], budget)
        score.seconds += time.thread_time() - begin
        path, committed = accept(draft, text[at:])
        step = Step(
            row=0,
            draft=draft,
            path=np.array(path, np.int32),
            tokens=committed.astype(np.int64),
            top_tokens=np.zeros((len(draft), 0), np.int32),
            top_logits=np.zeros((len(draft), 0), np.float32),
        )
        begin = time.thread_time()
        row.observe(step)
        score.seconds += time.thread_time() - begin
        score.passes += 1
        score.nodes += len(draft) - 1
        at += len(committed)


def warm_up(drafter: Drafter) -> None:
    """Compile before the clock runs."""
    replay(Request("", np.arange(4, dtype=np.int32), np.arange(8, dtype=np.int32)), drafter, 4, Score())


def make_drafter(name: str, min_chance: float) -> Drafter:
    return Nothing() if name == "none" else Grower(sources=("prompt",), min_chance=min_chance)


def table(scores: dict[str, Score]) -> str:
    """Return the scores as Markdown."""
    lines = ["| workload | n | tokens per pass | nodes a pass | drafter, µs a pass |", "|---|---|---|---|---|"]
    for workload, s in scores.items():
        passes = max(s.passes, 1)
        lines.append(
            f"| {workload} | {s.requests} | {s.tokens_per_pass:.2f} | {s.nodes / passes:.1f} "
            f"| {1e6 * s.seconds / passes:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, help="JSON lines, plain or .gz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or its directory")
    parser.add_argument("--drafter", choices=["grower", "none"], default="grower")
    parser.add_argument("--nodes", type=int, default=32, help="nodes that a pass may spend (default: %(default)s)")
    parser.add_argument("--min-chance", type=float, default=0.0, help="of the grower (default: %(default)s)")
    parser.add_argument("--workload", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--limit", type=int, help="at most so many requests of each workload")
    parser.add_argument("--json", type=Path, help="write the scores to this file")
    options = parser.parse_args()
    warm_up(make_drafter(options.drafter, options.min_chance))
    drafter = make_drafter(options.drafter, options.min_chance)
    scores: dict[str, Score] = {}
    for request in load(options.requests, options.tokenizer, options.workload, options.limit):
        replay(request, drafter, options.nodes, scores.setdefault(request.workload, Score()))
    print(table(scores))
    if options.json:
        result = {w: asdict(s) | {"tokens_per_pass": s.tokens_per_pass} for w, s in scores.items()}
        settings = {"drafter": options.drafter, "nodes": options.nodes, "min_chance": options.min_chance}
        options.json.write_text(json.dumps(settings | {"workloads": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
