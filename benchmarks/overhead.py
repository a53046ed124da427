"""Time outside the model call: per step at a full budget, and of `nodes=0` against plain `generate()`.

    python benchmarks/overhead.py [--model DIR | --big] [--nodes 32] [--tokens 200] [--rounds 7]

Without --model it builds a random Llama of the demo model's size, with --big one of 468 M parameters; random text
fills the budget because the grower is told that every node is worth running. Both figures are medians over interleaved
runs in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time

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

    def full() -> lookahead.Run:
        drafter = lookahead.Grower(vocab_size=model.config.vocab_size, min_chance=0.0)
        engine = lookahead.Lookahead(model, drafter=drafter, nodes=args.nodes)
        engine.generate(prompt, do_sample=False, **arguments)
        assert engine.last is not None
        return engine.last

    none = lookahead.Lookahead(model, nodes=0)
    full()
    seconds(lambda: none.generate(prompt, do_sample=False, **arguments))
    seconds(lambda: model.generate(prompt, do_sample=False, **arguments))
    passes = [p for _ in range(args.rounds) for p in full().passes]
    outside, step = (
        statistics.median(values) for values in zip(*((p.outside_s, p.step_s) for p in passes), strict=True)
    )
    print(f"steps {len(passes)}, nodes {statistics.mean(p.nodes for p in passes) - 1:.1f}")
    part = f"{100 * outside / step:.1f}% of it"
    print(f"outside the model call: {1e3 * outside:.2f} ms a step (median), {part}:", end=" ")
    print(f"draft {1e3 * statistics.median(p.draft_s for p in passes):.2f} ms,", end=" ")
    parts = {"mask": "mask_s", "verify": "verify_s", "cache": "cache_s", "learning": "learn_s"}
    print(
        ", ".join(
            f"{n} {1e3 * statistics.median(getattr(p, part) for p in passes):.2f} ms" for n, part in parts.items()
        )
    )
    print(f"model call: {1e3 * statistics.median(p.model_s for p in passes):.2f} ms")
    ratios = []
    for _ in range(args.rounds):
        plain = seconds(lambda: model.generate(prompt, do_sample=False, **arguments))
        ratios.append(seconds(lambda: none.generate(prompt, do_sample=False, **arguments)) / plain)
    print(f"nodes=0 takes {statistics.median(ratios):.3f} of plain generate() ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
