"""Sampling with a seed: drafts that know the noise of coming positions beside drafts that do not.

    python benchmarks/sampling.py [--model DIR] [--prompts FILE] [--replay FILE [--limit 6]]
                                  [--temperature 0.7 1.0] [--top-k 0] [--seeds 1] [--threads 1] [--json OUT]

Prompts are those of jacobi.py. Every system runs with the noise hidden and with it shown; a prompt starts with nothing
learnt from others (--keep: one `Lookahead` for all prompts, in order). Each output is compared with what plain
`generate()` samples from the same seed, and so is the state of the random generator afterwards. MAT is the sum of
tokens over the sum of passes, the prefill counted; "first" is the share of later passes in which a draft was right.

    sources   the default sources, 32 nodes
    window    n-grams of the window alone, (W, N, G) = (15, 5, 15), 60 nodes
    both      the default sources and the window, 32 nodes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from jacobi import Prompt, markdown, prompt_parser, read_prompts
from recorded import BadInput
from transformers import AutoModelForCausalLM

import lookahead
from lookahead import Jacobi, Lookahead

WINDOW = Jacobi(window=15, ngram=5, verify=15, switch="on")
SYSTEMS: dict[str, dict[str, Any]] = {
    "sources": {"sources": ("prompt", "pool", "recycle"), "nodes": 32},
    "window": {"sources": (WINDOW,), "nodes": 60},
    "both": {"sources": ("prompt", "pool", "recycle", WINDOW), "nodes": 32},
}


@contextmanager
def noise(shown: bool) -> Iterator[None]:
    """Show the noise of coming columns to drafters, or hide it."""
    with mock.patch("lookahead.foresight.AHEAD", lookahead.foresight.AHEAD if shown else 0):
        yield


class Sampled:
    """One model, sampled at one temperature."""

    def __init__(self, model: Any, options: argparse.Namespace, temperature: float) -> None:
        self.model, self.seeds, self.keep = model, options.seeds, options.keep
        self._options = {"do_sample": True, "temperature": temperature, "top_k": options.top_k}

    def run(self, prompts: list[Prompt]) -> dict[str, dict[str, Counter[str]]]:
        """Return sums by system and kind of prompt."""
        sums: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        texts = [self._generate(self.model, prompt, seed) for seed in range(self.seeds) for prompt in prompts]
        for name, arguments in SYSTEMS.items():
            for shown in (False, True):
                label, la = f"{name}, noise {'known' if shown else 'hidden'}", None
                for i, (text, state) in enumerate(texts):
                    prompt = prompts[i % len(prompts)]
                    if la is None or not self.keep:
                        la = Lookahead(self.model, **arguments)
                    with noise(shown):
                        found = self._generate(la, prompt, i // len(prompts))
                    assert la.last is not None
                    same = found[0] == text and torch.equal(found[1], state)
                    first = sum(one.committed[0] > 1 for one in la.last.passes)
                    passes = len(la.last.passes)
                    sums[label][prompt.kind].update(
                        tokens=la.last.tokens, passes=passes + 1, later=passes, first=first, differ=not same
                    )
                print(label, file=sys.stderr)
        return sums

    def _generate(self, how: Any, prompt: Prompt, seed: int) -> tuple[list[int], torch.Tensor]:
        ids = torch.tensor([prompt.ids])
        torch.manual_seed(seed)
        out = how.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.new, **self._options)
        return out[0, len(prompt.ids) :].tolist(), torch.get_rng_state()


def report(sums: dict[str, dict[str, Counter[str]]]) -> str:
    """Return the table of one temperature."""
    kinds = list(next(iter(sums.values())))
    rows = []
    for name, found in sums.items():
        whole = sum(found.values(), Counter())
        mats = [each["tokens"] / each["passes"] for each in (*found.values(), whole)]
        first = whole["first"] / max(whole["later"], 1)
        rows.append([name, *(f"{mat:.2f}" for mat in mats), f"{first:.3f}", str(whole["differ"])])
    return markdown(["MAT", *kinds, "all kinds", "first", "differ"], rows)


def main() -> None:
    parser = prompt_parser(__doc__)
    add = parser.add_argument
    add("--temperature", type=float, nargs="+", default=[0.7, 1.0], metavar="T")
    add("--top-k", type=int, default=0, help="0: all tokens (default)")
    add("--seeds", type=int, default=1, help="texts sampled from each prompt")
    add("--keep", action="store_true", help="one Lookahead for all prompts of a system")
    add("--threads", type=int, default=1)
    add("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = options.model or Path(lookahead.demo_path())
    try:
        prompts = read_prompts(options, directory)
    except BadInput as error:
        parser.error(str(error))
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    found = {}
    for temperature in options.temperature:
        found[str(temperature)] = sums = Sampled(model, options, temperature).run(prompts)
        print(f"T = {temperature}, {len(prompts)} prompts\n\n{report(sums)}\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
