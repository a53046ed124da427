"""vLLM on a CPU with our drafts, beside its own n-gram and suffix drafts and none at all: acceptance and time.

    python benchmarks/vllm_drafts.py [--python .peers/vllm/bin/python] [--requests 200] [--batch 64] [--guided]

The bundled model answers new prompts (see prompts.py), two fifths of which come again later, in a shuffled order; with
`--guided` JSON is written under its schema. Every system boots in a process of its own each round, in turn, so none
keeps anything from an earlier round. Times are of the whole batch; a ratio is the plain time of the same round over a
system's, the median of the rounds, with the smallest and the largest. Acceptance is what vLLM's own metrics count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prompts import KINDS, prompts

import lookahead

SYSTEMS = ("plain", "ngram", "suffix", "lookahead")
SCRIPT = Path(__file__).with_name("vllm_batch.py")


def requests(count: int, *, guided: bool) -> list[dict[str, Any]]:
    """Return `count` requests, three fifths of them different ones."""
    rng = random.Random(11)
    different = prompts(-(-3 * count // 5) // len(KINDS) + 1)
    rng.shuffle(different)
    different = different[: -(-3 * count // 5)]
    again = rng.sample(different, count - len(different))
    late = different[len(different) // 3 :] + again
    rng.shuffle(late)
    return [
        {"prompt": one["prompt"], "new": one["max_new_tokens"], "schema": one.get("schema") if guided else None}
        for one in different[: len(different) // 3] + late
    ]


def run(python: str, system: str, asked: Sequence[dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM answers in a process of its own."""
    told = json.dumps({"model": lookahead.demo_path(), "requests": asked, "system": system, **job})
    done = subprocess.run([python, str(SCRIPT)], input=told, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{system}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout))


def table(answers: dict[str, list[dict[str, Any]]]) -> str:
    """Return Markdown: time, speed-up, and what became of drafts."""
    lines = [
        "| drafts | seconds | speed-up | steps | accepted a draft | and of all drafted | outputs as plain |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = answers["plain"]
    for system, rounds in answers.items():
        ratios = [base["seconds"][0] / one["seconds"][0] for base, one in zip(plain, rounds, strict=True)]
        one = rounds[0]
        lengths = f"{1 + one['accepted'] / one['drafts']:.2f}" if one["drafts"] else "–"
        rate = f"{one['accepted'] / one['drafted']:.2f}" if one["drafted"] else "–"
        same = all(
            ours == theirs
            for a, b in zip(plain, rounds, strict=True)
            for ours, theirs in zip(a["tokens"], b["tokens"], strict=True)
        )
        seconds = statistics.median(one["seconds"][0] for one in rounds)
        spread = f"**{statistics.median(ratios):.2f}x** ({min(ratios):.2f}–{max(ratios):.2f})"
        lines.append(
            f"| {system} | {seconds:.2f} | {spread} | {one['steps']} | {lengths} | {rate} | {'all' if same else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".peers/vllm/bin/python", help="of the environment with vLLM")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guided", action="store_true", help="JSON under its schema")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--system", nargs="+", default=[], choices=SYSTEMS, help="these beside plain")
    parser.add_argument("--budget", default="auto", choices=("auto", "all"), help="of our drafts")
    parser.add_argument("--draft", type=int, default=16, help="tokens that ours drafts at most")
    args = parser.parse_args()
    asked = requests(args.requests, guided=args.guided)
    systems = ("plain", *(args.system or SYSTEMS[1:]))
    answers: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for turn in range(args.rounds):
        for system in systems if turn % 2 == 0 else systems[::-1]:
            job = {"batch": args.batch, "compile": args.compile}
            if system == "lookahead":
                job |= {"draft": args.draft, "lookahead": {"budget": args.budget}}
            answers[system].append(run(args.python, system, asked, job))
            print(system, f"{answers[system][-1]['seconds'][0]:.2f} s", file=sys.stderr, flush=True)
    print(table(answers))


if __name__ == "__main__":
    main()
