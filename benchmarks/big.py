"""A model of any size with random weights that writes recorded outputs: real costs meet real acceptance.

    python benchmarks/big.py REQUESTS --tokenizer DIR [--config benchmarks/llama-0.5b.json] [--dtype bfloat16]
                             [--each 6] [--new 96] [--workloads …] [--rounds 1] [--threads 2] [--json OUT] …

REQUESTS are JSON lines with `workload`, `prompt` and `output`, plain or gzipped; those with a `schema` run once more,
rewritten as the grammar of the schema writes them. The model computes in full what one of its size computes. Then the
logits of a position are replaced: where the token that stands there is the recorded one, the recorded next one wins.
So every system writes the recorded text, and accepts of its drafts what agrees with it.

What this shows: seconds of plain decoding, of passes over many tokens, of drafting and of grammars, at the acceptance
that real text gives. What it does not: a model answers a wrong draft with text of its own, and drafters that learn from
logits (Token Recycling, in `lookahead` too) learn from that; here such answers are noise. A drafted token that is right
where it stands, behind others that are wrong, is answered as if they were right. LookaheadDecoding and vLLM are left
out: the first drafts from what the model answers to wrong text; the other computes in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recorded import BadInput, load, load_tokenizer
from replaying import Replay
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lookahead.bench import systems
from lookahead.bench.contest import Contest
from lookahead.bench.machine import about
from lookahead.bench.scoreboard import as_json, markdown, plot
from lookahead.bench.workloads import Item
from lookahead.command import status

SEARCHED = 8  # requests with a schema that are looked at for each that is taken
LEFT_OUT = {
    "LookaheadDecoding (15, 5, 15)": "drafts from what the model answers to wrong text, which a replay does not have",
    "vLLM": "computes in a process of its own, where logits cannot be replaced",
    "vLLM n-gram": "likewise",
    "vLLM suffix": "likewise",
}


class Replayed:
    """A system whose model writes the recorded output of each item; see `lookahead.bench.systems.System`."""

    def __init__(self, system: systems.Here, replay: Replay, outputs: dict[tuple[int, ...], list[int]]) -> None:
        self.name, self.settings = system.name, system.settings
        self._system, self._replay, self._outputs = system, replay, outputs

    def run(self, item: Item) -> systems.Answer:
        recorded = self._outputs[(item.grammar is not None, *item.ids)]
        self._replay.write([*item.ids, *recorded])
        with self._replay.on():
            answer = self._system.run(item)
        if answer.tokens != recorded[: item.new]:
            raise AssertionError(f"{self.name} did not write the recorded output")
        return answer


def items(options: argparse.Namespace) -> tuple[list[Item], dict[tuple[int, ...], list[int]]]:
    """Return the texts of the requests, and the recorded outputs by whether there is a grammar and by prompt."""
    tokenizer = load_tokenizer(options.tokenizer)
    requests: list[Any] = list(load(options.requests, tokenizer, options.workloads, None)[0])
    with suppress(ImportError, BadInput):  # jsonschema is not installed, or nothing has a schema
        import constrained

        requests += constrained.load(options.requests, tokenizer, options.workloads, SEARCHED * options.each)[0]
    found: list[Item] = []
    outputs: dict[tuple[int, ...], list[int]] = {}
    for request in requests:
        grammar, prompt = getattr(request, "grammar", None), tuple(request.prompt.tolist())
        workload = request.workload if grammar is None else f"{request.workload} + schema"
        if len(prompt) > options.context or sum(item.workload == workload for item in found) == options.each:
            continue
        text = request.output.tolist()[: options.new]
        outputs[(grammar is not None, *prompt)] = text
        found.append(Item(workload, prompt, len(text), ends=False, grammar=grammar))
    return found, outputs


def random_model(options: argparse.Namespace) -> Any:
    """Return a model of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(Path(options.config).read_bytes())
        config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with _default_dtype(getattr(torch, options.dtype)):
        model = AutoModelForCausalLM.from_config(config).to(options.device).eval()
    model.generation_config.pad_token_id = 0
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    texts, outputs = items(options)
    model = random_model(options)
    replay = Replay(model)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(options.tokenizer))
    makers = [
        systems.plain,
        partial(systems.ours, script=True),
        systems.prompt_lookup,
        systems.arctic,
        partial(systems.arctic, tree=False),
    ]
    replayed = [Replayed(make(model, tokenizer), replay, outputs) for make in makers]
    contest = Contest(texts, replayed, dict(LEFT_OUT))
    with status("warming up …") as say:
        Contest([texts[0], texts[-1]], replayed).warm_up(say, new=8)
        for _ in range(options.rounds):
            contest.round(say)
    scores = contest.scores()
    text = f"{about(model, str(options.config), options.threads)}\n\n{markdown(scores)}"
    print(text, end="")
    if options.json:
        options.json.write_text(json.dumps(as_json(scores), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
    if options.plot:
        plot(scores, about(model, str(options.config), options.threads), str(options.plot))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json or its directory")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "llama-0.5b.json", help="a config.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workloads", nargs="+", default=[], help="default: all")
    parser.add_argument("--each", type=int, default=6, help="requests of a workload")
    parser.add_argument("--new", type=int, default=96, help="most tokens of an output")
    parser.add_argument("--context", type=int, default=640, help="requests with longer prompts are left out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="OUT")
    return parser.parse_args()


if __name__ == "__main__":
    main()
