"""New prompts of each kind that the bundled model was trained for, from code that it has not seen.

    python benchmarks/prompts.py --each 8 > prompts.jsonl && lookahead bench --prompts prompts.jsonl

Lines of {"workload", "prompt", "max_new_tokens", "schema"}; the same ones at every run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import lookahead

KINDS = ("edit", "json", "continue")


def prompts(count: int) -> list[dict[str, Any]]:
    """Return `count` prompts of each kind."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from train_demo.corpus import load_corpus
    from train_demo.tasks import Tasks

    tokenizer, rng = Tokenizer.from_file(str(Path(lookahead.demo_path()) / "tokenizer.json")), random.Random(7)
    maker, found = Tasks(load_corpus(), tokenizer, 400), list[dict[str, Any]]()
    for kind, make in zip(KINDS, (maker.edit, maker.json, maker.code), strict=True):
        while sum(one["workload"] == kind for one in found) < count:
            example = make(rng, heldout=True)
            prompt, answer = (len(tokenizer.encode(text).ids) for text in (example.prompt, example.answer))
            if not (8 <= prompt <= 260 and answer >= 16):
                continue
            limit = 96 if kind == "continue" else min(max(answer + 20, 60), 160)
            one = {"workload": kind, "prompt": example.prompt, "max_new_tokens": limit}
            if kind == "json":
                one["schema"] = json.loads(example.prompt.split("<schema>\n")[1].split("\n</schema>")[0])
            found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=8, metavar="N", help="prompts of a kind")
    for prompt in prompts(parser.parse_args().each):
        print(json.dumps(prompt))


if __name__ == "__main__":
    main()
