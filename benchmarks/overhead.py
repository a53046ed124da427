"""Time outside the model call: per step at a full budget, and of `nodes=0` against plain `generate()`; and within it,
as the model is written and as it is recorded (`lookahead.script`).

    python benchmarks/overhead.py [--model DIR | --big] [--nodes 32] [--tokens 200] [--rounds 7]

Without --model it builds a random Llama of the demo model's size, with --big one of 468 M parameters; random text
fills the budget because the grower is told that every node is worth running. All figures are medians over interleaved
runs in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lookahead


def random_llama(*, big: bool = False) -> LlamaForCausalLM:
    """Return an untrained Llama of 5 M parameters and 8k tokens, or of 468 M and 32k."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000 if big else 8192,
        hidden_size=1024 if big else 256,
        intermediate_size=4096 if big else 704,
        num_hidden_layers=24 if big else 4,
        num_attention_heads=16 if big else 4,
        num_key_value_heads=16 if big else 4,
        max_position_embeddings=4096,
        initializer_range=0.02 if big else 0.1,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def seconds(call: object) -> float:
    """Return the wall time of `call()`."""
    begin = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; default: a random Llama")
    parser.add_argument("--big", action="store_true", help="a random Llama of 468 M parameters")
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the random prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        if args.model
        else random_llama(big=args.big).to(dtype)
    )
    torch.manual_seed(1)
    prompt = torch.randint(3, model.config.vocab_size, (1, args.prompt))
    arguments = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.tokens,
        "min_new_tokens": None,
        "eos_token_id": None,
    }

    def full(script: bool) -> lookahead.Run:
        drafter = lookahead.Grower(vocab_size=model.config.vocab_size, min_chance=0.0)
        engine = lookahead.Lookahead(model, drafter=drafter, nodes=args.nodes, script=script)
        engine.generate(prompt, do_sample=False, **arguments)
        assert engine.last is not None
        return engine.last

    ways = {"as written": False, "as recorded": True}
    none = {name: lookahead.Lookahead(model, nodes=0, script=script) for name, script in ways.items()}
    for name, script in ways.items():
        full(script)
        none[name].generate(prompt, do_sample=False, **arguments)
    model.generate(prompt, do_sample=False, **arguments)
    for one in none["as recorded"].recorded:
        print(f"recorded: {one.kind}, {one.seconds:.2f} s{', refused: ' if one.refused else ''}{one.refused}")
    passes: dict[str, list[lookahead.Pass]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name, script in [*ways.items()][:: 1 if number % 2 else -1]:
            passes[name] += full(script).passes
    for name in ways:
        _show(name, passes[name])
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        plain = seconds(lambda: model.generate(prompt, do_sample=False, **arguments))
        for name, la in none.items():
            ratios[name].append(seconds(partial(la.generate, prompt, do_sample=False, **arguments)) / plain)
    for name, found in ratios.items():
        middle = statistics.median(found)
        print(f"nodes=0, {name}: {middle:.3f} of plain generate() ({min(found):.3f} to {max(found):.3f})")


def _show(name: str, passes: list[lookahead.Pass]) -> None:
    """Print where the time of the passes of one way went."""

    def ms(part: str) -> float:
        return 1e3 * statistics.median(getattr(one, part) for one in passes)

    nodes, outside = statistics.mean(one.nodes for one in passes) - 1, ms("outside_s")
    parts = {"draft": "draft_s", "mask": "mask_s", "verify": "verify_s", "cache": "cache_s", "learning": "learn_s"}
    shares = ", ".join(f"{n} {ms(part):.2f}" for n, part in parts.items())
    print(
        f"{name}: {len(passes)} steps of {nodes:.1f} nodes, {ms('step_s'):.2f} ms: the model {ms('model_s'):.2f} ms,",
        end=" ",
    )
    print(f"outside of it {outside:.2f} ms, {100 * outside / ms('step_s'):.1f}% ({shares})")


if __name__ == "__main__":
    main()
