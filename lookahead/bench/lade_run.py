"""Run the LookaheadDecoding package (lade 0.0.2) on a Llama checkpoint: its passes, tokens and seconds.

lade patches the greedy search of transformers 4.34, so it lives in an environment of its own and takes token ids; this
file imports nothing of `lookahead`. `benchmarks/peers.sh lade` makes that environment: Python 3.11, a CPU build of
torch 2.13.0, transformers 4.34.0, numpy 1, accelerate 0.23.0, safetensors, and lade 0.0.2 without what it asks for.


    OMP_NUM_THREADS=1 .peers/lade/bin/python lookahead/bench/lade_run.py --model lookahead/demo --prompts prompts.json \
        --window 15 --ngram 5 --guesses 15 --out out.json
    .peers/lade/bin/python lookahead/bench/lade_run.py '{"model": "lookahead/demo", "dtype": "float32", "threads": 2,
        "system": "lade", "window": 15, "ngram": 5, "guesses": 15}'

The second way speaks the protocol of `serving.py`; its system is "lade", or "plain", transformers' own greedy search.

In the first, the prompts are a JSON list of `{"kind": str, "ids": [int], "new": int}`. Every prompt runs plain and with
lade, both greedy, up to the end of the sequence or `new` tokens, `--repeats` times each in turn; seconds are medians.
The result is `{"settings": {...}, "prompts": [...]}`, for every prompt:

    kind           as given
    tokens         what lade generated, ids, the end of the sequence included
    passes         forward calls of the model, lade's `steps`: the prefill and the N - 3 that fill its window included
    width          mean tokens that a pass runs, the prefill aside: the last token, the window, the guesses
    seconds        of lade
    plain_seconds  of transformers' own greedy search, in the same environment
    equal          whether both wrote the same tokens
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lade
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

if TYPE_CHECKING:
    from lookahead.bench.serving import Reply, serve
else:
    from serving import Reply, serve

DEFAULTS = {"window": 15, "ngram": 5, "guesses": 15}
SET_APART = {
    *("architectures", "dtype", "head_dim", "model_type", "transformers_version"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
}
"""Entries of config.json that transformers 4.34 does not know or that `load` sees to itself."""


def load(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the model of a checkpoint that transformers 5 wrote.

    Raises:
        ValueError: the checkpoint is not a Llama that transformers 4.34 can run.
    """
    entries = json.loads((path / "config.json").read_text())
    if entries["model_type"] != "llama" or entries.get("mlp_bias"):
        raise ValueError(f"{path}: lade knows only Llama, without biases in the MLP; choose another checkpoint")
    kept = {key: value for key, value in entries.items() if key not in SET_APART}
    config = LlamaConfig(**kept, rope_theta=rope_theta(entries))
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        widen(layer.self_attn, entries.get("head_dim") or config.hidden_size // config.num_attention_heads)
    model.to(dtype)
    fill(model, {name: weight for file in path.glob("*.safetensors") for name, weight in load_file(file).items()})
    model.generation_config = GenerationConfig(eos_token_id=ends(path, entries), pad_token_id=0)
    return model.eval()


def ends(path: Path, entries: dict[str, Any]) -> list[int]:
    """Return the tokens that end a sequence, those of generation_config.json where it has any."""
    own = path / "generation_config.json"
    more = json.loads(own.read_text()) if own.is_file() else {}
    found = more.get("eos_token_id", entries.get("eos_token_id"))
    return found if isinstance(found, list) else [] if found is None else [found]


def rope_theta(entries: dict[str, Any]) -> float:
    """Return the base of the rotary embedding, which transformers 5 keeps in `rope_parameters`."""
    rope = entries.get("rope_parameters") or {"rope_theta": entries.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default" or entries.get("rope_scaling"):
        raise ValueError(f"rotary embedding {rope}: only the default type can be loaded; choose another checkpoint")
    return float(rope["rope_theta"])


def widen(attention: LlamaAttention, head_dim: int) -> None:
    """Give an attention heads of `head_dim`, where transformers 4.34 takes hidden size / heads.

    Its forward reads `hidden_size` only as the width of all heads together, so that no code has to be replaced.
    """
    hidden, bias = attention.hidden_size, attention.config.attention_bias
    attention.head_dim = head_dim
    attention.hidden_size = attention.num_heads * head_dim
    attention.q_proj = nn.Linear(hidden, attention.num_heads * head_dim, bias=bias)
    attention.k_proj = nn.Linear(hidden, attention.num_key_value_heads * head_dim, bias=bias)
    attention.v_proj = nn.Linear(hidden, attention.num_key_value_heads * head_dim, bias=bias)
    attention.o_proj = nn.Linear(attention.num_heads * head_dim, hidden, bias=bias)
    attention._init_rope()


def fill(model: LlamaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Copy the weights by name; all must be there, but for a head that is tied to the embeddings."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"weights do not fit: {missing} are missing, {unexpected} have no place")
    model.tie_weights()


@contextmanager
def lade_on(on: bool) -> Iterator[None]:
    """Switch lade for the calls inside; it reads this variable at every call of greedy search."""
    os.environ["USE_LADE"] = str(int(on))
    try:
        yield
    finally:
        os.environ["USE_LADE"] = "0"


@contextmanager
def counted(model: LlamaForCausalLM) -> Iterator[list[int]]:
    """Yield a list that grows by the width, in tokens, of every forward call of the decoder."""
    widths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    try:
        yield widths
    finally:
        hook.remove()


def generate(model: LlamaForCausalLM, ids: list[int], new: int) -> list[int]:
    """Return up to `new` greedy tokens, the first end of the sequence the last of them."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    tokens: list[int] = out[0, len(ids) :].tolist()
    for place, token in enumerate(tokens):  # lade may write on behind it
        if token in (model.generation_config.eos_token_id or ()):
            return tokens[: place + 1]
    return tokens


def timed(call: Callable[[], list[int]]) -> tuple[list[int], float]:
    """Return what `call()` returns, and its wall time in seconds."""
    start = time.perf_counter()
    tokens = call()
    return tokens, time.perf_counter() - start


def measure(model: LlamaForCausalLM, prompt: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Run one prompt plain and with lade, and return its entry of the result."""
    seconds: list[float] = []
    plain_seconds: list[float] = []
    for _ in range(repeats):
        with lade_on(False):
            plain, elapsed = timed(lambda: generate(model, prompt["ids"], prompt["new"]))
        plain_seconds.append(elapsed)
        with lade_on(True), counted(model) as widths:
            tokens, elapsed = timed(lambda: generate(model, prompt["ids"], prompt["new"]))
        seconds.append(elapsed)
    return {
        "kind": prompt["kind"],
        "tokens": tokens,
        "passes": len(widths),
        "width": statistics.mean(widths[1:] or [1]),
        "seconds": statistics.median(seconds),
        "plain_seconds": statistics.median(plain_seconds),
        "equal": tokens == plain,
    }


class Served:
    """One of the two systems, prompt by prompt."""

    packages: tuple[str, ...] = ("lade", "transformers", "torch")

    def __init__(self, model: LlamaForCausalLM, on: bool, settings: dict[str, Any]) -> None:
        self.settings, self._model, self._on = settings, model, on
        self._ends = model.generation_config.eos_token_id

    @classmethod
    def start(cls, settings: dict[str, Any]) -> Served:
        """Load what the settings name.

        Raises:
            ValueError: a system that is not there, or a model that cannot be run.
        """
        if settings["system"] not in ("plain", "lade"):
            raise ValueError(f"system {settings['system']!r}; choose plain or lade")
        on, used = settings["system"] == "lade", {name: settings[name] for name in ("system", "dtype", "threads")}
        if on:
            shape = {name: int(settings.get(name, value)) for name, value in DEFAULTS.items()}
            prepare(**shape, shift="one")
            used |= shape
        torch.set_num_threads(settings["threads"])
        return cls(load(Path(settings["model"]), getattr(torch, settings["dtype"])), on, used)

    def generate(self, ids: list[int], new: int, *, ignore_eos: bool, schema: dict[str, Any] | None) -> Reply:
        if schema is not None:
            raise ValueError("a schema: neither lade nor transformers 4.34 has grammars")
        self._model.generation_config.eos_token_id = None if ignore_eos else self._ends
        with lade_on(self._on), counted(self._model) as widths:
            tokens, seconds = timed(lambda: generate(self._model, ids, new))
        return Reply(tokens, seconds, len(widths))

    def close(self) -> None:
        """Nothing is left open."""


def prepare(*, window: int, ngram: int, guesses: int, shift: str) -> None:
    """Patch lade into transformers, off until `lade_on`."""
    lade.augment_all()
    always_one = int(shift == "one")
    lade.config_lade(WINDOW_SIZE=window, LEVEL=ngram, GUESS_SET_SIZE=guesses, ALWAYS_FWD_ONE=always_one, DEBUG=0)


def report(entries: list[dict[str, Any]]) -> str:
    """Return a table of the kinds: tokens per pass (sum over sum), time against plain, outputs that differ."""
    kinds = defaultdict(list)
    for entry in entries:
        kinds[entry["kind"]].append(entry)
    lines = [f"{'kind':16} {'prompts':>7} {'tokens':>7} {'passes':>7} {'MAT':>6} {'time/plain':>10} {'differ':>6}"]
    for kind, group in [*kinds.items(), ("all", entries)]:
        tokens, passes = sum(len(entry["tokens"]) for entry in group), sum(entry["passes"] for entry in group)
        ratio = sum(entry["seconds"] for entry in group) / sum(entry["plain_seconds"] for entry in group)
        differ = sum(not entry["equal"] for entry in group)
        lines.append(f"{kind:16} {len(group):7} {tokens:7} {passes:7} {tokens / passes:6.3f} {ratio:10.2f} {differ:6}")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run lade 0.0.2 on a Llama checkpoint, against plain greedy search.")
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, help='JSON list of {"kind", "ids", "new"}')
    parser.add_argument(
        "--window", type=int, default=DEFAULTS["window"], help="W, lade's WINDOW_SIZE (default: %(default)s)"
    )
    parser.add_argument("--ngram", type=int, default=DEFAULTS["ngram"], help="N, lade's LEVEL: guesses are N - 1 long")
    parser.add_argument("--guesses", type=int, default=DEFAULTS["guesses"], help="G, lade's GUESS_SET_SIZE")
    parser.add_argument(
        "--shift", choices=("one", "accepted"), default="one", help="how far the window moves in a pass"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.window < 2 or args.ngram < 3 or args.guesses < 1 or args.threads < 1 or args.repeats < 1:
        parser.error("--window must be 2 or more, --ngram 3 or more, --guesses, --threads and --repeats 1 or more")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    prepare(window=args.window, ngram=args.ngram, guesses=args.guesses, shift=args.shift)
    model = load(args.model)
    prompts = json.loads(args.prompts.read_text())
    measure(model, prompts[0], 1)  # the first calls pay for what is set up once
    entries = []
    for prompt in prompts:
        entries.append(measure(model, prompt, args.repeats))
        print(f"{len(entries)}/{len(prompts)}", end="\r", file=sys.stderr)
    settings = {name: getattr(args, name) for name in ("window", "ngram", "guesses", "shift", "threads", "repeats")}
    settings |= {name: version(name) for name in ("lade", "transformers", "torch")}
    args.out.write_text(json.dumps({"settings": settings, "prompts": entries}) + "\n")
    print(report(entries))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        sys.exit(serve(Served.start, sys.argv[1]))
    main()
