"""How often rounding changes a text: by drafts, and by plain `generate()` itself where a batch or a kernel is another.

    python benchmarks/rounding.py [--model demo] [--prompts FILE] [--dtypes bfloat16 float32] [--new 96] [--json OUT]

Greedy texts of plain `generate()`, one prompt at a time, are compared with those of the same model with padding before
the prompt, in a batch of two, and with another kernel of attention; and with those of `lookahead`. The last lines
compare `invariant=True` with itself: with drafts and with none, which have to be equal. Speed is the time of plain over
that of the way, over all prompts; what it learns of one text a way may use for the next.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead import Lookahead
from lookahead.bench.machine import about

Write = Callable[[torch.Tensor], list[int]]


def prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts of a JSON file or of JSON lines, or those that come with the model."""
    path = options.prompts or Path(options.model) / "prompts.json"
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [one if isinstance(one, str) else one["prompt"] for one in found]


def writers(model: Any, new: int) -> dict[str, Write]:
    """Return ways to write a text, by name; "plain" first."""
    fixed = {"max_new_tokens": new, "do_sample": False, "pad_token_id": model.config.pad_token_id or 0}

    def plain(ids: torch.Tensor) -> list[int]:
        mask = torch.ones_like(ids)
        return rest(model.generate(ids, attention_mask=mask, **fixed), ids)

    def padded(ids: torch.Tensor) -> list[int]:
        longer = torch.nn.functional.pad(ids, (3, 0), value=fixed["pad_token_id"])
        mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0), value=0)
        return rest(model.generate(longer, attention_mask=mask, **fixed), longer)

    def doubled(ids: torch.Tensor) -> list[int]:
        both = ids.repeat(2, 1)
        return rest(model.generate(both, attention_mask=torch.ones_like(both), **fixed), both)

    def eager(ids: torch.Tensor) -> list[int]:
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            return plain(ids)
        finally:
            model.set_attn_implementation(before)

    def ours(**options: Any) -> Write:
        la = Lookahead(model, **options)
        return lambda ids: rest(la.generate(ids, attention_mask=torch.ones_like(ids), **fixed), ids)

    return {
        "plain": plain,
        "plain, 3 tokens of padding": padded,
        "plain, a batch of two": doubled,
        "plain, eager attention": eager,
        "lookahead": ours(static=False),
        "lookahead, fixed shapes": ours(static=True),
        "lookahead, invariant": ours(invariant=True),
        "invariant, no drafts": ours(invariant=True, nodes=0),
        "invariant, always 31 nodes": ours(invariant=True, nodes=31),
    }


def written(ways: dict[str, Write], asked: list[torch.Tensor]) -> tuple[dict[str, list[list[int]]], dict[str, float]]:
    """Return the texts by way, and the seconds they took; all ways take turns, after the first prompt once untimed."""
    texts: dict[str, list[list[int]]] = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for number, ids in enumerate([asked[0], *asked]):
        for name, write in ways.items():
            begin = time.perf_counter()
            text = write(ids)
            if number:
                texts[name].append(text)
                seconds[name] += time.perf_counter() - begin
    return texts, seconds


def rest(output: torch.Tensor, ids: torch.Tensor) -> list[int]:
    """Return the new tokens of the first row."""
    return [int(token) for token in output[0, ids.shape[1] :]]


def apart(texts: list[list[int]], others: list[list[int]]) -> dict[str, Any]:
    """Return how many texts differ, and the tokens before the first difference of each, summed."""
    same = differing = 0
    for text, other in zip(texts, others, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
        differs = text != other
        differing += differs
        same += min(len(text), len(other)) if first is None else first
    return {"texts": len(texts), "differ": differing, "tokens_before": same}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    for dtype in options.dtypes:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype)).to(options.device)
        model.eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        asked = [tokenizer(one, return_tensors="pt").input_ids.to(model.device) for one in prompts(options)]
        texts, seconds = written(writers(model, options.new), asked)
        base = texts["plain"]
        found[dtype] = {name: apart(base, one) for name, one in texts.items() if name.partition(",")[0] != "invariant"}
        for name in ("invariant, no drafts", "invariant, always 31 nodes"):
            found[dtype][f"{name}, against invariant"] = apart(texts["lookahead, invariant"], texts[name])
        print(f"{about(model, str(options.model), options.threads)}\n")
        print(
            f"| {dtype}: against plain, one prompt at a time | texts that differ | tokens before that, of all | speed |"
        )
        print("|---|---|---|---|")
        total = sum(map(len, base))
        for name, one in found[dtype].items():
            if name != "plain":
                one["speed"] = seconds["plain"] / seconds[name.removesuffix(", against invariant")]
                counts = f"{one['differ']} of {one['texts']} | {one['tokens_before']} of {total}"
                print(f"| {name} | {counts} | {one['speed']:.2f}x |")
        print(flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(lookahead.demo_path()), help="default: the bundled one")
    add("--prompts", type=Path, help=".json or .jsonl with `prompt` (default: prompts.json of the model)")
    add("--dtypes", nargs="+", default=["bfloat16", "float32"])
    add("--new", type=int, default=96, help="most tokens of a text")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=2)
    add("--json", type=Path, metavar="OUT")
    return parser.parse_args()


if __name__ == "__main__":
    main()
