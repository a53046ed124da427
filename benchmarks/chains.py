"""Replay recorded text as a serving engine would: a batch of requests that come and go, one chain of drafts for each.

    python benchmarks/chains.py FILE [--tokenizer DIR] [--batch 64] [--draft 16] [--requests N] [--workload NAME ...]

FILE is as for replay.py. The engine "answers" with the recorded outputs, so only drafting is judged: how many tokens a
step brings a request (the mean acceptance length), what part of the drafted ones is accepted, and what drafting takes a
request and step, of this thread on the CPU. Ours runs as far as `--min-chance` says; no step has a price here. Beside
it the n-gram rule of vLLM and the suffix trees of Arctic Inference, linear and with the limits that vLLM sets.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from peers import longest_ngram, own
from recorded import BadInput, Request, load, load_tokenizer

import lookahead
from lookahead.chains import Chains
from lookahead.draft import IntArray

LONGEST = 8192
_SUFFIX_DEPTH = 24  # vLLM's default


class Drafting(Protocol):
    """What drafts for a batch, as vLLM asks it."""

    def propose(self, tokens: IntArray, lengths: Any, new: Sequence[int]) -> list[list[int]]: ...


class Ngram:
    """vLLM's n-gram rule, n from 2 to 5."""

    def __init__(self, draft: int) -> None:
        self._draft = draft

    def propose(self, tokens: IntArray, lengths: Any, new: Sequence[int]) -> list[list[int]]:
        return [
            longest_ngram(row[:length], 2, 5, LONGEST, self._draft).tolist()
            for row, length in zip(tokens, lengths.tolist(), strict=False)
        ]


class Suffix:
    """The suffix trees of Arctic Inference, with the limits that vLLM sets; it is told which row is which request."""

    def __init__(self, draft: int) -> None:
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._draft, self._cache = draft, SuffixDecodingCache(_SUFFIX_DEPTH, 10_000)
        self.names: list[int] = []

    def propose(self, tokens: IntArray, lengths: Any, new: Sequence[int]) -> list[list[int]]:
        drafts = []
        for name, row, length, count in zip(self.names, tokens, lengths.tolist(), new, strict=True):
            if name not in self._cache.active_requests:
                self._cache.start_request(name, own(row[: length - count]))
            self._cache.add_active_response(name, own(row[length - count : length]))
            context = own(row[max(0, length - _SUFFIX_DEPTH) : length])
            drafts.append(list(self._cache.speculate(name, context, max_spec_tokens=self._draft).token_ids))
        for name in set(self._cache.active_requests) - set(self.names):
            self._cache.stop_request(name)
        return drafts


@dataclass(slots=True)
class Score:
    """Sums over steps and requests."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    each: list[float] = field(default_factory=list)  # microseconds a request of every step of a full batch

    def line(self, name: str) -> str:
        rate = self.accepted / max(self.drafted, 1)
        micros = np.percentile(self.each, [50, 99]) if self.each else (float("nan"),) * 2
        return (
            f"| {name} | {1 + self.accepted / max(self.steps, 1):.2f} | {self.drafted / max(self.steps, 1):.2f} | "
            f"{rate:.2f} | {1e6 * self.seconds / max(self.steps, 1):.0f} | {micros[0]:.0f} | {micros[1]:.0f} |"
        )


class Batch:
    """Requests in the rows of an engine: a new one takes the place of one that ends, the last one a row left over."""

    def __init__(self, requests: Sequence[Request], rows: int) -> None:
        self._waiting, self._count = list(enumerate(requests))[::-1], rows
        self._rests: list[IntArray] = []
        self.names: list[int] = []
        self.new: list[int] = []
        self.tokens, self.lengths = np.zeros((rows, LONGEST), np.int32), np.zeros(rows, np.int64)

    def fill(self) -> bool:
        """Let requests end and begin; return whether there are any."""
        for row in reversed([row for row, rest in enumerate(self._rests) if len(rest) == 0]):
            last = len(self.names) - 1
            self.tokens[row], self.lengths[row] = self.tokens[last], self.lengths[last]
            for column in (self._rests, self.names, self.new):
                column[row] = column[last]
                column.pop()
        while self._waiting and len(self.names) < self._count:
            name, request = self._waiting.pop()
            said, row = np.concatenate([request.prompt, request.output[:1]]), len(self.names)
            if len(request.output) > 1:
                self.tokens[row, : len(said)], self.lengths[row] = said, len(said)
                self._rests.append(request.output[1:])
                self.names.append(name)
                self.new.append(1)
        return bool(self.names)

    def verify(self, row: int, draft: list[int]) -> int:
        """Let the target go on as far as the draft agrees, and one token more; return how many were drafted rightly."""
        rest, right = self._rests[row], 0
        while right < min(len(draft), len(rest) - 1) and draft[right] == rest[right]:
            right += 1
        length = self.lengths[row]
        self.tokens[row, length : length + right + 1] = rest[: right + 1]
        self.lengths[row] += right + 1
        self._rests[row], self.new[row] = rest[right + 1 :], right + 1
        return right


def run(drafting: Drafting, requests: Sequence[Request], rows: int) -> Score:
    """Replay the requests, `rows` at a time, each step verifying a chain of every one of them."""
    score, batch = Score(), Batch(requests, rows)
    while batch.fill():
        there = len(batch.names)
        if isinstance(drafting, Suffix):
            drafting.names = batch.names
        begin = time.thread_time()
        drafts = drafting.propose(batch.tokens[:there], batch.lengths[:there], batch.new)
        seconds = time.thread_time() - begin
        score.seconds += seconds
        if there == rows:
            score.each.append(1e6 * seconds / rows)
        score.steps += there
        for row, draft in enumerate(drafts):
            score.drafted += len(draft)
            score.accepted += batch.verify(row, draft)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draft", type=int, default=16)
    parser.add_argument("--min-chance", type=float, default=0.2)
    parser.add_argument("--requests", type=int, help="the first so many of each workload")
    parser.add_argument("--repeat", type=int, default=1, help="play each workload so often (default: %(default)s)")
    parser.add_argument("--workload", nargs="*", default=[])
    args = parser.parse_args()
    try:
        tokens = load_tokenizer(args.tokenizer or Path(lookahead.demo_path()))
        requests, _ = load(args.file, tokens, args.workload, args.requests)
    except BadInput as error:
        sys.exit(str(error))
    requests = [one for one in requests if len(one.prompt) + len(one.output) < LONGEST]
    for drafting in makers(args.draft, args.min_chance).values():  # so that nothing is compiled while the clock runs
        run(drafting(), requests[:4], 2)
    print("| drafts | tokens a step | drafted | accepted of them | µs a request and step | median | p99 |")
    print("|---|---|---|---|---|---|---|")
    kinds = {
        kind: [one for one in requests if one.workload == kind] for kind in dict.fromkeys(r.workload for r in requests)
    }
    mixed = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    for workload, those in {**kinds, "all of them, mixed": mixed}.items():
        some = those * args.repeat
        print(f"| **{workload}**, {len(some)} requests | | | | | | |")
        for name, drafting in makers(args.draft, args.min_chance).items():
            print(run(drafting(), some, args.batch).line(name), flush=True)


def makers(draft: int, min_chance: float) -> dict[str, Callable[[], Drafting]]:
    """Return how to make each system that is there."""
    found: dict[str, Callable[[], Drafting]] = {
        "lookahead": lambda: Chains(draft, min_chance=min_chance),
        "vLLM n-gram": lambda: Ngram(draft),
    }
    if find_spec("arctic_inference") is not None:
        found["Arctic Inference"] = lambda: Suffix(draft)
    return found


if __name__ == "__main__":
    main()
