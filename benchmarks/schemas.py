"""JSON Schemas of the real world as grammars: does any of them hang, crash, or give JSON that is not valid?

    python benchmarks/schemas.py DIR_OR_FILE ... [--tokens 200] [--seconds 60] [--json OUT]

A FILE holds one JSON Schema; of a DIR all files below it that are JSON objects are taken, and the name of its first
folder below DIR is their origin. What people wrote is worth more here than what a generator would: the packages of
linters, validators and connectors are full of schemas.

Every schema is compiled for the demo model's tokenizer. What is refused must be refused by name; it is tried once more
with `lenient=True`. Then a random model writes under the grammar, at will at first, then drawn to what closes brackets
and quotes, so that most texts end; for every `--every`-th schema the demo model writes, too, and for every
`--compare`-th the text is compared with what `model.generate()` says with the same processors. A text that has ended
must parse and be valid by `jsonschema` (formats are not asserted, references are not fetched); one that met the limit
of tokens must be the beginning of JSON.

All is done in a second process, which is ended where one schema takes longer than `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic_core import from_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor, set_seed

import lookahead
from lookahead.errors import GrammarError
from lookahead.grammar.grammar import Grammar
from lookahead.grammar.vocabulary import Vocabulary

Record = dict[str, Any]  # of one schema, ready for JSON

MEMORY = 12 << 30  # bytes of address space that the second process may have
FREE = 60  # tokens before the random model is drawn to an end


class Closing(LogitsProcessor):
    """Has a random model write many short strings first, then draws its text to an end.

    Args:
        start: tokens of the prompt.
    """

    def __init__(self, vocabulary: Vocabulary, end: int, start: int) -> None:
        self._first = torch.tensor([-4.0 * _brackets(token) + 8.0 * _quotes(token) for token in vocabulary.bytes])
        self._later = torch.tensor([_closes(token) for token in vocabulary.bytes])
        self._first[end], self._later[end] = -4.0, 200.0
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + (self._first if input_ids.shape[1] < self._start + FREE else self._later)


def _brackets(token: bytes) -> int:
    return token.count(b"}") + token.count(b"]")


def _quotes(token: bytes) -> bool:
    return re.fullmatch(rb'"(, ?"?|: ?"?)?', token) is not None


def _closes(token: bytes) -> float:
    if not re.fullmatch(rb'"?[\]}]*(, ?)?"?', token):  # only what ends a string, then objects and arrays
        return 10.0 * token.startswith((b"null", b"true", b"false"))
    return 40.0 + 60.0 * token.startswith(b'"') + 10.0 * _brackets(token) - 15.0 * token.count(b",")


class Checker:
    """Compiles schemas, has models write under them, and judges what they wrote. Lives in the second process."""

    def __init__(self, tell: Any, tokens: int, every: int, compare: int) -> None:
        torch.set_num_threads(1)
        path = lookahead.demo_path()
        self._tell, self._tokens, self._every, self._compare = tell, tokens, every, compare
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._vocabulary = Vocabulary.of(self._tokenizer)
        self._demo = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._random = random_model(self._demo.config)
        self._write(self._random, "random", "", Grammar.json_schema({"type": "array"}), 0)  # compiles kernels

    def check(self, number: int, path: str) -> Record:
        """Return what became of one schema."""
        self._tell("read")
        text = Path(path).read_text()
        schema = json.loads(text)
        record: Record = {"path": path, "bytes": len(text), "external": sorted(_external(schema))}
        grammar = self._compile(schema, record)
        if grammar is None:
            return record
        record["texts"] = [self._judged(self._random, "random", number, schema, grammar)]
        if number % self._every == 0:
            record["texts"].append(self._judged(self._demo, "demo", number, schema, grammar))
        return record

    def _compile(self, schema: Any, record: Record) -> Grammar | None:
        """Compile a schema, without what the engine does not know if need be; None where it is refused."""
        for lenient in (False, True):
            self._tell("compile leniently" if lenient else "compile")
            begin = time.perf_counter()
            try:
                grammar = Grammar.json_schema(schema, lenient=lenient)
                grammar.matcher(self._vocabulary).close()
            except GrammarError as error:
                record["refused leniently" if lenient else "refused"] = str(error)
                continue
            record |= {"compile_ms": _ms(begin), "lenient": lenient, "dropped": list(grammar.dropped)}
            return grammar
        return None

    def _judged(self, model: Any, name: str, number: int, schema: Any, grammar: Grammar) -> Record:
        """Have `model` write one text; return what it is worth."""
        self._tell(f"write ({name})")
        begin = time.perf_counter()
        prompt = f"Schema: {json.dumps(schema)[:600]}\nJSON:\n"
        try:
            tokens, equal = self._write(model, name, prompt, grammar, number)
        except GrammarError as error:
            return {"model": name, "verdict": "engine gives up", "why": str(error)}
        found: Record = {"model": name, "tokens": len(tokens), "write_ms": _ms(begin), "equal": equal}
        self._tell(f"masks ({name})")
        found["mask_ms"] = self._mask_times(grammar, tokens)
        self._tell(f"judge ({name})")
        ended = tokens[-1:] == [self._tokenizer.eos_token_id]
        text = self._vocabulary.decode(tokens)
        verdict, why = complete(text, schema) if ended else beginning(text)
        return found | {"verdict": verdict, "why": why, "text": text.decode(errors="replace")}

    def _write(
        self, model: Any, name: str, prompt: str, grammar: Grammar, number: int
    ) -> tuple[list[int], bool | None]:
        """Return what `model` writes, and whether plain generation writes the same (None: not asked)."""
        inputs = self._tokenizer(prompt or "JSON:", return_tensors="pt")
        start, end = inputs["input_ids"].shape[1], self._tokenizer.eos_token_id
        own = [Closing(self._vocabulary, end, start)] if name == "random" else []
        options = {**inputs, "do_sample": name == "random", "max_new_tokens": self._tokens}
        seed = zlib.crc32(prompt.encode())
        set_seed(seed)
        ours = lookahead.generate(model, grammar=grammar, tokenizer=self._tokenizer, logits_processor=own, **options)
        equal = None
        if number % self._compare == 0:
            set_seed(seed)
            plain = model.generate(logits_processor=[*own, grammar.processor(self._tokenizer)], **options)
            equal = torch.equal(ours, plain)
        return ours[0, start:].tolist(), equal

    def _mask_times(self, grammar: Grammar, tokens: list[int]) -> list[float]:
        """Return how long the mask of every position took, the first one with all that beginning a text takes."""
        times = []
        begin = time.perf_counter()
        matcher = grammar.matcher(self._vocabulary)
        for i in range(len(tokens)):
            matcher.mask(matcher.settle(tokens[:i]))
            times.append(_ms(begin))
            begin = time.perf_counter()
        matcher.close()
        return times


def random_model(like: Any) -> LlamaForCausalLM:
    """Return an untrained Llama of one small layer with the vocabulary of another model."""
    torch.manual_seed(0)
    same = {name: getattr(like, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**same, **sizes, max_position_embeddings=4096, initializer_range=0.3)).eval()


def complete(text: bytes, schema: Any) -> tuple[str, str]:
    """Return "no JSON", "invalid", "valid", or "unjudged" for a text that has ended, and why."""
    import jsonschema
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY

    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        return "no JSON", str(error)
    try:
        # An explicit registry: without one, references to elsewhere would be fetched.
        validator_for(schema, jsonschema.Draft202012Validator)(schema, registry=REGISTRY).validate(value)
    except jsonschema.ValidationError as error:
        return "invalid", f"{error.json_path}: {error.message[:300]}"
    except Exception as error:  # the schema itself is wrong, or its expressions are not Python's
        return "unjudged", f"{type(error).__name__}: {str(error)[:300]}"
    return "valid", ""


def beginning(text: bytes) -> tuple[str, str]:
    """Return "cut" for the beginning of JSON, else "no JSON" and why."""
    if text in (b"", b"-"):
        return "cut", ""
    try:
        from_json(text, allow_partial="trailing-strings", allow_inf_nan=False)
    except ValueError as error:
        whole = text.decode(errors="ignore")  # a character may be cut in two
        try:
            from_json(whole, allow_partial="trailing-strings", allow_inf_nan=False)
        except ValueError:
            return "no JSON", str(error)
    return "cut", ""


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _external(schema: Any) -> Iterator[str]:
    """Yield the references that lead out of the document."""
    if isinstance(schema, list):
        for item in schema:
            yield from _external(item)
    elif isinstance(schema, dict):
        for key, item in schema.items():
            if key == "$ref" and isinstance(item, str) and not item.startswith("#"):
                yield item
            yield from _external(item)


def _ms(begin: float) -> float:
    return 1e3 * (time.perf_counter() - begin)


# The two processes


def work(pipe: Connection, tokens: int, every: int, compare: int) -> None:
    """Check what comes through `pipe` until it closes; say what is being done, then what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    checker = Checker(lambda stage: pipe.send(("stage", stage)), tokens, every, compare)
    pipe.send(("ready", None))
    while True:
        try:
            number, path = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("record", checker.check(number, path)))
        except Exception as error:
            pipe.send(("record", {"path": path, "crash": f"{type(error).__name__}: {str(error)[:500]}"}))


class Worker:
    """The second process; a new one after each that was lost."""

    def __init__(self, *options: int) -> None:
        self._options = options
        self._process: Any = None

    def check(self, number: int, path: Path, seconds: float) -> Record:
        """Return the record of one schema, or how the process was lost on it."""
        if self._process is None:
            self._start()
        self._pipe.send((number, str(path)))
        stage, until = "", time.monotonic() + seconds
        try:
            while self._pipe.poll(max(0.0, until - time.monotonic())):
                kind, value = self._pipe.recv()
                if kind == "record":
                    return value  # type: ignore[no-any-return]
                stage = value
            lost = {"hang": stage}
        except (EOFError, ConnectionResetError):
            self._process.join()
            lost = {"crash": f"exit status {self._process.exitcode} at: {stage}"}
        self.close()
        return {"path": str(path), **lost}

    def close(self, *, patience: float = 0.0) -> None:
        """End the process; it has so many seconds to end by itself."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(patience)
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *self._options), daemon=True)
        self._process.start()
        theirs.close()
        while self._pipe.recv()[0] != "ready":
            pass


# The corpus and the report


def corpus(paths: list[Path], limit: int | None) -> list[tuple[str, Path]]:
    """Return the origin and path of every schema, at most `limit` of each origin."""
    found: list[tuple[str, Path]] = []
    counts = Counter[str]()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            parts = file.relative_to(path).parts
            origin = parts[0] if len(parts) > 1 else path.name if path.is_dir() else path.parent.name
            if counts[origin] != limit and file.is_file() and _is_object(file):
                counts[origin] += 1
                found.append((origin, file))
    return found


def _is_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def problems(record: Record) -> Iterator[str]:
    """Yield what must not be, in words."""
    for key in ("hang", "crash"):
        if key in record:
            yield f"{key}: {record[key]}"
    for text in record.get("texts", ()):
        bad = {"no JSON", "engine gives up"} if record["lenient"] else {"no JSON", "engine gives up", "invalid"}
        if text["verdict"] in bad:
            yield f"{text['model']}: {text['verdict']}: {text['why']}"
        if text.get("equal") is False:
            yield f"{text['model']}: not what plain generation writes"


def summary(records: list[Record]) -> str:
    """Return Markdown: how many compile, how long that takes, what was written."""
    texts = [text for record in records for text in record.get("texts", ())]
    masks = [text["mask_ms"] for text in texts if text.get("mask_ms")]
    rows: list[tuple[str, Any]] = [
        ("schemas", len(records)),
        ("compiled", sum(record.get("lenient") is False for record in records)),
        ("compiled leniently", sum(record.get("lenient") is True for record in records)),
        ("refused", sum("refused leniently" in record for record in records)),
        ("hang", sum("hang" in record for record in records)),
        ("crash", sum("crash" in record for record in records)),
        ("compile, ms", _spread(record["compile_ms"] for record in records if "compile_ms" in record)),
        ("first mask, ms", _spread(times[0] for times in masks)),
        ("mask, ms", _spread(time for times in masks for time in times[1:])),
    ]
    for model in ("random", "demo"):
        for lenient in (False, True):
            strict = [r for r in records if r.get("lenient") is lenient]
            verdicts = Counter(t["verdict"] for r in strict for t in r.get("texts", ()) if t["model"] == model)
            rows += [(f"{model}{', lenient' * lenient}: {verdict}", n) for verdict, n in verdicts.most_common()]
    asked = [text["equal"] for text in texts if text.get("equal") is not None]
    rows.append(("equal to plain generation", f"{sum(asked)} of {len(asked)}"))
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    reasons = Counter(_reason(record["refused"]) for record in records if "refused" in record)
    lines += ["", "| refused | schemas |", "|---|---|", *(f"| {why} | {n} |" for why, n in reasons.most_common())]
    return "\n".join(lines)


def _reason(message: str) -> str:
    """Return what a refusal names, without what differs from schema to schema."""
    head = message.removeprefix("json_schema: ").partition("; leave")[0].partition("\n")[0]
    head = re.sub(r"'[^']*'|/.*/", "…", head)
    return re.sub(r"(Unknown format|Unable to determine [a-z ]+):.*", r"\1", head)[:100].rstrip(": ")


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "none"
    return ", ".join(f"p{p} {np.percentile(found, p):.2f}" for p in (50, 99)) + f", max {max(found):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="DIR_OR_FILE")
    parser.add_argument("--tokens", type=int, default=200, help="longest text (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest time for a schema (default: %(default)s)")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="the demo model writes for every N-th")
    parser.add_argument("--compare", type=int, default=20, metavar="N", help="compare every N-th with plain generation")
    parser.add_argument("--limit", type=int, help="at most so many schemas of each origin")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all that was found")
    options = parser.parse_args()
    chosen = corpus(options.paths, options.limit)
    origins = Counter(origin for origin, _ in chosen)
    print(", ".join(f"{origin} {count}" for origin, count in origins.most_common()), file=sys.stderr)
    worker = Worker(options.tokens, options.every, options.compare)
    records: list[Record] = []
    for number, (origin, path) in enumerate(chosen):
        records.append(worker.check(number, path, options.seconds) | {"origin": origin})
        for problem in problems(records[-1]):
            print(f"{path}: {problem}", file=sys.stderr, flush=True)
    worker.close(patience=10.0)
    print(summary(records))
    if options.json:
        options.json.write_text(json.dumps({"origins": origins, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
