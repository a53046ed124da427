"""The JSON helper beside plain `generate()`, free and with the same grammar as a logits processor.

    python benchmarks/structured.py [--model DIR] [--rounds 5] [--nodes N] [--threads 2] [--json OUT]

The prompts are those of the model's prompts.json that have a `<schema>`, in groups of one schema. Each is generated

- free: plain `generate()`, no grammar;
- plain: `generate()` with `Grammar.processor`, the reference;
- cold: `generate_json(memory=False)`, which knows nothing but the prompt;
- warm: `generate_json` with a memory that has seen the other prompts of the group, each once.

One round runs all of them in turn; times are medians over the rounds of the sum over prompts, ratios are of one run.
Texts are compared with those of plain.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead import Grammar, Lookahead, SchemaMemory, generate_json

SYSTEMS = ("free", "plain", "cold", "warm")


class Group:
    """Prompts with one schema."""

    def __init__(self, model: Any, tokenizer: Any, schema: str, nodes: int | None) -> None:
        self.model, self.tokenizer, self.schema, self.prompts = model, tokenizer, schema, list[str]()
        self.grammar = Grammar.json_schema(schema)
        self._nodes = {} if nodes is None else {"nodes": nodes}

    def run(self, system: str, prompt: str) -> tuple[float, str, float]:
        """Return the seconds, the text, and the tokens per pass of one prompt."""
        memory: Any = False
        if system == "warm":
            memory = SchemaMemory()
            for other in self.prompts:
                if other != prompt:
                    self._json(other, memory)
        call: Callable[[], tuple[str, float]] = {
            "free": lambda: self._plain(prompt, []),
            "plain": lambda: self._plain(prompt, [self.grammar.processor(self.tokenizer)]),
            "cold": lambda: self._json(prompt, memory),
            "warm": lambda: self._json(prompt, memory),
        }[system]
        begin = time.perf_counter()
        text, each = call()
        return time.perf_counter() - begin, text, each

    def _plain(self, prompt: str, processors: list[Any]) -> tuple[str, float]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=128, logits_processor=processors)
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), 1.0

    def _json(self, prompt: str, memory: Any) -> tuple[str, float]:
        la = Lookahead(self.model, self.tokenizer, **self._nodes) if self._nodes else self.model
        options = {"do_sample": False, "max_new_tokens": 128}
        try:
            result: Any = generate_json(la, self.tokenizer, prompt, self.schema, memory=memory, **options)
        except lookahead.IncompleteJson as incomplete:
            result = incomplete
        return result.text, result.trace.tokens_per_pass


def groups(directory: Path, model: Any, tokenizer: Any, nodes: int | None) -> list[Group]:
    """Return the prompts of `directory`/prompts.json that have a schema."""
    found: dict[str, Group] = {}
    for item in json.loads((directory / "prompts.json").read_text(encoding="utf-8")):
        for prompt in (*item.get("before", ()), item["prompt"]):
            schema = re.search(r"<schema>\n(.*)\n</schema>", prompt)
            if schema:
                group = found.setdefault(schema[1], Group(model, tokenizer, schema[1], nodes))
                group.prompts += [] if prompt in group.prompts else [prompt]
    return list(found.values())


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    directory = options.model or Path(lookahead.demo_path())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    seconds, per_pass, differ, runs = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list), 0, 0
    all_groups = groups(directory, model, tokenizer, options.nodes)
    for system in SYSTEMS:  # compiled and warm before the clock runs
        all_groups[0].run(system, all_groups[0].prompts[0])
    for _ in range(options.rounds):
        sums = dict.fromkeys(SYSTEMS, 0.0)
        for group in all_groups:
            for prompt in group.prompts:
                texts: dict[str, str] = {}
                for system in SYSTEMS:
                    took, texts[system], each = group.run(system, prompt)
                    sums[system] += took
                    per_pass[system].append(each)
                differ += (texts["cold"] != texts["plain"]) + (texts["warm"] != texts["plain"])
                runs += 2
        for system, total in sums.items():
            seconds[system].append(total)
    prompts = sum(len(group.prompts) for group in all_groups)
    print(f"{prompts} prompts, {len(all_groups)} schemas, {options.threads} threads, {options.rounds} rounds\n")
    print("| | seconds | tokens per pass | plain / this | free / this |\n|---|---|---|---|---|")
    rows: dict[str, dict[str, float]] = {}
    for system in SYSTEMS:
        ratio, free = (
            statistics.median(a / b for a, b in zip(seconds[other], seconds[system], strict=True))
            for other in ("plain", "free")
        )
        row = {"seconds": statistics.median(seconds[system]), "tokens_per_pass": statistics.mean(per_pass[system])}
        rows[system] = row | {"to_plain": ratio, "to_free": free}
        print(f"| {system} | {row['seconds']:.3f} | {row['tokens_per_pass']:.2f} | {ratio:.2f} | {free:.2f} |")
    print(f"\n{differ} of {runs} texts differ from plain's")
    if options.json:
        options.json.write_text(json.dumps(rows | {"different": differ, "texts": runs}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory with prompts.json (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, help="of the JSON helper (default: its own)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    main(parser.parse_args())
