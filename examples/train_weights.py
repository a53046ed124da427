"""Learn what the mixer's weights start from, and write `lookahead/sources/weights.npz`.

    python examples/train_weights.py [--from DIR] [--out FILE]

The requests are made here: functions to be written from their docstrings, a name replaced in a block of code, files to
be continued, and JSON by made-up schemas, some of which come again, half of it under the grammar of its schema. The
code is that of packages that are installed with `lookahead`: other versions of them than those of constraints.txt, or
another seed, give other requests.

Users of a few requests each, in the tokens of two tokenizers, with a pool and without, replay them as
`benchmarks/replay.py` does; others, between them, ask the demo model, so that there are logits to recycle. What is
written is what no tokenizer has a part in: the sets by token start anew with every user.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from train_demo.corpus import Corpus
from train_demo.tasks import Tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.grammar.vocabulary import Vocabulary
from lookahead.sources.mixer import LAYOUT, SHIPPED, Weights, untrained_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from constrained import Constrained
from recorded import Request
from replay import Ours, replay

# What pip installs with lookahead, torch left out: its files are among those that the benchmark continues.
PACKAGES = "click fsspec huggingface_hub jinja2 mpmath networkx numba numpy rich sympy transformers".split()  # noqa: SIM905
FILES, VOCABULARY = 100, 32_000  # of a package at most; of the second tokenizer
NODES, ANSWER = 32, 96  # of a draft; tokens that the model generates at most
SIZES, SHORT = (1, 4, 16, 64), (1, 2, 4)  # requests of a reader, of an asker
MOST_ENERGY, MOST_TRIALS = 30.0, 30.0  # so that a user's own text soon counts for more

NAMES = re.compile(r"\b[a-z_]{3,}\b")
NEW_NAMES = ("total", "item_count", "value", "data_2", "node", "cursor", "rows", "new_name", "x")
SUFFIXES = ("", "", "_id", "Name", "_type", "s")


class Text(NamedTuple):
    """A request: its prompt, what the answer will be, and the schema of the grammar that it follows."""

    prompt: str
    output: str
    schema: dict[str, Any] | None = None


def read_files(root: Path, rng: random.Random) -> list[str]:
    """Return Python files of the packages below `root`, or of `root` itself where none of them is there."""
    folders = [root / name for name in PACKAGES if (root / name).is_dir()] or [root]
    texts: list[str] = []
    for folder in folders:
        paths = sorted(path for path in folder.rglob("*.py") if 2000 < path.stat().st_size < 100_000)
        rng.shuffle(paths)
        texts += [path.read_text("utf-8", errors="ignore") for path in paths[:FILES]]
    rng.shuffle(texts)
    return texts


def functions(file: str) -> Iterator[Text]:
    """Yield the functions of a file that have a docstring: from there to the end."""
    lines = file.splitlines(keepends=True)
    for node in ast.parse(file).body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            middle = node.body[0].end_lineno
            head, body = "".join(lines[node.lineno - 1 : middle]), "".join(lines[middle : node.end_lineno])
            if len(head) < 2500 and 60 < len(body) < 1500:
                yield Text(head, body)


def edit(file: str, rng: random.Random) -> Text:
    """Return 60 lines in which a name is replaced."""
    lines = file.splitlines(keepends=True)
    first = rng.randrange(max(1, len(lines) - 60))
    block = "".join(lines[first : first + 60])
    old, new = rng.choice(NAMES.findall(block) or ["it"]), rng.choice(NEW_NAMES)
    return Text(f"Rename {old} to {new}:\n{block}\n", re.sub(rf"\b{old}\b", new, block))


def continuation(file: str, rng: random.Random) -> Text:
    """Return up to 100 lines, and the up to 40 that follow."""
    lines = file.splitlines(keepends=True)
    first = rng.randrange(max(1, len(lines) - 140))
    middle = first + min(100, len(lines) // 2)
    return Text("".join(lines[first:middle]), "".join(lines[middle : middle + 40]))


class Json:
    """Makes up schemas and values that they describe."""

    def __init__(self, words: Sequence[str], rng: random.Random) -> None:
        self.words, self.rng = words, rng

    def text(self, schema: dict[str, Any], *, grammar: bool) -> Text:
        value = self.value(schema, "")
        facts = "".join(self._facts(value)) if self.rng.random() < 0.3 else ""
        prompt = f"{facts}Schema:\n{json.dumps(schema, indent=2)}\nJSON:\n"
        return Text(prompt, json.dumps(value), schema) if grammar else Text(prompt, json.dumps(value, indent=2))

    def schema(self, depth: int = 0) -> dict[str, Any]:
        rng, draw = self.rng, self.rng.random()
        if depth == 0 or (depth < 3 and draw < 0.2):
            return self._object(depth)
        if depth < 3 and draw < 0.35:
            return {"type": "array", "items": self.schema(depth + 1)}
        if draw < 0.65:
            options = {"description": self._phrase(), "enum": rng.sample(self.words, 3)}
            if rng.random() < 0.15:
                return {"type": "string", "default": self._phrase()}
            return {"type": "string"} | {key: option for key, option in options.items() if rng.random() < 0.25}
        return {"type": rng.choice(("integer", "number", "boolean"))}

    def _object(self, depth: int) -> dict[str, Any]:
        names = [self.rng.choice(self.words) + self.rng.choice(SUFFIXES) for _ in range(self.rng.randint(1, 6))]
        required = names[: self.rng.randint(0, len(names))]
        properties = {name: self.schema(depth + 1) for name in names}
        options = {"required": required, "additionalProperties": False, "description": self._phrase()}
        chosen = {key: option for key, option in options.items() if self.rng.random() < 0.5}
        return {"type": "object", "properties": properties, **chosen}

    def _facts(self, value: Any) -> Iterator[str]:
        """Yield most of what `value` holds, a line each."""
        between = self.rng.choice((": ", " = ", " is ", '": "'))
        for key, inner in value.items() if isinstance(value, dict) else ():
            if isinstance(inner, str | int | float) and self.rng.random() < 0.8:
                name = self.rng.choice((key, key.replace("_", " "), key.title()))
                yield f"{name}{between}{inner}\n"
            yield from self._facts(inner)

    def value(self, schema: dict[str, Any], key: str) -> Any:
        rng, kind = self.rng, schema["type"]
        if kind == "object":
            required, entries = schema.get("required", ()), schema["properties"].items()
            return {k: self.value(v, k) for k, v in entries if k in required or rng.random() < 0.7}
        if kind == "array":
            if rng.random() < 0.3 and schema["items"]["type"] == "string" and "enum" not in schema["items"]:
                return [f"{key.removesuffix('s')}{i + 1}" for i in range(rng.randint(1, 4))]
            return [self.value(schema["items"], key) for _ in range(rng.randint(1, 4))]
        if kind == "string":
            if "enum" in schema:
                return rng.choice(schema["enum"])
            return schema["default"] if "default" in schema and rng.random() < 0.6 else self._string(key)
        if kind == "boolean":
            return rng.random() < 0.5
        return rng.choice((0, 1, rng.randint(1, 100), rng.randint(100, 9999)))

    def _string(self, key: str) -> str:
        rng, word = self.rng, self.rng.choice(self.words)
        date = f"20{rng.randint(10, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}T10:00:00Z"
        address = rng.choice(("https://example.com/", "user@example.com/", "id-")) + word
        own = rng.choice((f"{key} {rng.randint(1, 9)}".title(), f"{key}{rng.randint(1, 9)}", f"example-{key}", key))
        return rng.choice((date, address, own, self._phrase(), self._phrase()))

    def _phrase(self) -> str:
        return " ".join(self.rng.choices(self.words, k=self.rng.randint(1, 6)))


def make_texts(files: Sequence[str], each: int, rng: random.Random) -> list[list[Text]]:
    """Return about `each` requests of every kind, together those that one user makes one after the other."""
    found = [text for file in files for text in functions(file)]
    rng.shuffle(found)
    half, maker = len(files) // 2, Json(sorted({w for file in files[:60] for w in NAMES.findall(file)}), rng)
    single = found[:each] + [edit(file, rng) for file in files[:half][:each]]
    single += [continuation(file, rng) for file in files[half:][:each]]
    single += [maker.text(maker.schema(), grammar=i % 2 == 0) for i in range(4 * each)]
    again = [(maker.schema(), i % 2 == 0) for i in range(each // 2)]
    groups = [[maker.text(schema, grammar=grammar) for _ in range(4)] for schema, grammar in again]
    return [[text] for text in single] + groups


class Learner(Ours):
    """The grower of the benchmark, that learns in `weights`."""

    def __init__(self, weights: Weights, pool: bool) -> None:
        super().__init__(min_chance=0.0, pool=pool)
        self._grower.weights = weights


@dataclass(frozen=True, slots=True)
class Reader:
    """A user whose answers are known."""

    requests: list[Request]
    pool: bool

    def learn(self, weights: Weights) -> None:
        learner = Learner(weights, self.pool)
        for request in self.requests:
            replay(request, learner, NODES)


@dataclass(frozen=True, slots=True)
class Asker:
    """A user for whom the model answers."""

    prompts: list[list[int]]
    model: Any
    tokenizer: Any
    window: bool
    temperature: float

    def learn(self, weights: Weights) -> None:
        window = [lookahead.Jacobi(window=7, verify=7, switch="on")] if self.window else []
        sources = ("prompt", "pool", "recycle", *window)
        grower = lookahead.Grower(sources=sources, vocab_size=self.model.config.vocab_size, min_chance=0.0)
        grower.weights = weights
        la = lookahead.Lookahead(self.model, self.tokenizer, drafter=grower, nodes=NODES)
        for i, prompt in enumerate(self.prompts):
            ids, grammar = torch.tensor([prompt]), None
            schema = re.search(r"<schema>\n(.*)\n</schema>", self.tokenizer.decode(prompt))
            if schema and i % 2 == 0:
                grammar = lookahead.Grammar.json_schema(schema[1])
            options = {"max_new_tokens": ANSWER, "do_sample": self.temperature > 0, "grammar": grammar}
            if self.temperature > 0:
                options |= {"temperature": self.temperature, "top_k": 0}
            la.generate(ids, attention_mask=torch.ones_like(ids), **options)


def divided(items: Sequence[Any], sizes: Sequence[int], rng: random.Random) -> Iterator[list[Any]]:
    """Yield all items, a few at a time."""
    waiting = rng.sample(items, len(items))
    while waiting:
        size = rng.choice(sizes)
        yield waiting[:size]
        waiting = waiting[size:]


def readers(texts: Sequence[list[Text]], tokenizers: Sequence[Any], rng: random.Random) -> Iterator[Reader]:
    """Yield users whose answers are known, half of them with a pool."""
    for taken in divided(texts, SIZES, rng):
        tokenizer = rng.choice(tokenizers)
        requests = [_request(text, tokenizer) for group in taken for text in group]
        yield Reader([one for one in requests if len(one.prompt) and len(one.output)], rng.random() < 0.5)


def _request(text: Text, tokenizer: Tokenizer) -> Request:
    tokens = [tokenizer.encode(part, add_special_tokens=False).ids for part in (text.prompt, text.output)]
    prompt, output = (np.array(ids, np.int32) for ids in tokens)
    if text.schema is None:
        return Request("", prompt, output)
    return Constrained("", prompt, output, lookahead.Grammar.json_schema(text.schema), Vocabulary.of(tokenizer))


def askers(tasks: Tasks, model: Any, tokenizer: Any, each: int, rng: random.Random) -> Iterator[Asker]:
    """Yield users who ask the demo model what it was trained to do, `each` times every kind; half of them sample."""
    encoded = [tasks.sample(rng, kind) for kind in ("edit", "json", "continue") for _ in range(each)]
    prompts = [one.ids[: one.start] for one in encoded]
    for taken in divided(prompts, SHORT, rng):
        yield Asker(taken, model, tokenizer, rng.random() < 0.5, rng.choice((0.0, 0.0, 0.0, 0.4, 0.7, 1.0)))


def write(weights: Weights, path: Path) -> None:
    """Write what is kept of `weights`."""
    energy = np.minimum(weights.energy[:SHIPPED], MOST_ENERGY)
    trials = weights.trials * np.minimum(1.0, MOST_TRIALS / weights.trials[:, 1:])
    race = {"race": weights.race, "race_energy": np.minimum(weights.race_energy, MOST_ENERGY)}
    np.savez(path, layout=LAYOUT, w=weights.w[:SHIPPED], energy=energy, trials=trials, **race)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # sums in the same order everywhere
    torch.manual_seed(options.seed)
    rng, weights, demo = random.Random(options.seed), untrained_weights(), Path(lookahead.demo_path())
    files = read_files(options.source, rng)
    texts = make_texts(files, options.each, rng)
    tokenizer, trained = Tokenizer.from_file(str(demo / "tokenizer.json")), ByteLevelBPETokenizer()
    trained.train_from_iterator(files, VOCABULARY, show_progress=False)
    other = Tokenizer.from_str(trained.to_str())
    tasks, model = Tasks(Corpus(tuple(files), (), ()), tokenizer, 512), AutoModelForCausalLM.from_pretrained(demo)
    whole = AutoTokenizer.from_pretrained(demo)
    users = [*readers(texts, (tokenizer, other), rng), *askers(tasks, model, whole, options.each, rng)]
    for user in rng.sample(users, len(users)):
        weights.w[SHIPPED:], weights.energy[SHIPPED:] = 0.0, 1.0
        user.learn(weights)
    write(weights, options.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=sysconfig.get_path("purelib"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path(lookahead.__file__).with_name("sources") / "weights.npz")
    parser.add_argument("--each", type=int, default=200, help="requests of every kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
