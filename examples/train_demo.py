"""Train the demo model of `lookahead` from scratch: `python examples/train_demo.py --help`."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from train_demo.circuit import make_config, write_circuit
from train_demo.corpus import BOS, EOS, PAD, Corpus, load_corpus, train_tokenizer
from train_demo.evaluate import evaluate
from train_demo.export import export_model, write_card
from train_demo.facts import extraction, random_words
from train_demo.tasks import ARROW, PROMPT_WEIGHT, Tasks
from train_demo.train import Limits, Run, make_optimizer
from transformers import LlamaForCausalLM

FORCED = 128  # held-out prompts of each kind that the card's teacher-forced figures rest on


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="checkpoint and log")
    parser.add_argument("--minutes", type=float, default=90, help="stop after so many minutes")
    parser.add_argument("--tokens", type=float, default=20e6, help="or after so many tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--length", type=int, default=512, help="longest example in tokens")
    parser.add_argument("--prompts", type=int, default=48, help="free-running prompts per task")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint")
    return parser.parse_args()


def get_tokenizer(folder: Path, corpus: Corpus) -> Tokenizer:
    """Load the tokenizer of this run, or train it on the corpus and on facts."""
    path = folder / "tokenizer.json"
    if not path.exists():
        rng = random.Random(0)
        texts = list(corpus.train)
        texts += [" ".join(map(str, extraction(rng, random_words()))) for _ in range(3000)]
        train_tokenizer(texts).save(str(path))
    return Tokenizer.from_file(str(path))


def new_model(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    special = [tokenizer.token_to_id(token) for token in (BOS, EOS, PAD)]
    model = LlamaForCausalLM(make_config(tokenizer.get_vocab_size(), *special))
    (arrow,) = tokenizer.encode(ARROW, add_special_tokens=False).ids
    write_circuit(model, arrow=arrow, seed=seed)
    return model


def make_run(options: argparse.Namespace, corpus: Corpus) -> Run:
    """Set up model, tasks and optimizer, or take them up where a checkpoint left them."""
    device = torch.device(options.device)
    tokenizer = get_tokenizer(options.out, corpus)
    model = new_model(tokenizer, options.seed).to(device)
    run = Run(
        model=model,
        tasks=Tasks(corpus, tokenizer, options.length),
        limits=Limits(options.minutes, options.tokens),
        folder=options.out,
        device=device,
        optimizer=make_optimizer(model, options.rate),
        seed=options.seed,
    )
    run.resume()
    return run


def card_values(run: Run, options: argparse.Namespace) -> dict[str, object]:
    """Collect what the model card says of the architecture and of this run."""
    config = run.model.config
    start = json.loads((run.folder / "log.jsonl").read_text().splitlines()[0])
    where = f"{options.threads} CPU thread(s)" if run.device.type == "cpu" else "one GPU"
    return {
        "parameters": f"{run.model.num_parameters() / 1e6:.1f}",
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "length": options.length,
        "start_edit": f"{start['edit_accuracy']:.1%}",
        "start_json": f"{start['json_accuracy']:.1%}",
        "start_copy": f"{start['copy_accuracy']:.1%}",
        "tokens": f"{run.tokens / 1e6:.1f}",
        "steps": run.step,
        "minutes": round(run.seconds / 60),
        "hardware": where,
        "rate": options.rate,
        "prompt_weight": PROMPT_WEIGHT,
        "forced": FORCED,
        "command": f"python examples/train_demo.py --minutes {options.minutes:g}",
    }


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    run = make_run(options, corpus)
    if not options.export_only:
        run.train()
    values = card_values(run, options)
    folder = options.out / "model"
    export_model(run.model, run.tasks.tokenizer, folder)
    rounded = run.model.float()
    figures = evaluate(rounded, run.tasks, forced=FORCED, free=options.prompts)
    write_card(folder, corpus, values, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
