"""What is generated in a benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookahead.compare import Task
from lookahead.errors import GrammarError, InvalidInput
from lookahead.grammar.grammar import Grammar
from lookahead.loading import encode, room

NOTHING, NOTHING_PROMPT, NOTHING_NEW = "nothing to reuse", 128, 128
FIX = 'give JSON lines of {"workload": …, "prompt": …, "max_new_tokens": …, "schema": … or null}'


@dataclass(frozen=True, slots=True)
class Item:
    """One text to generate, greedily.

    Attributes:
        workload: the row of the table that it counts in.
        ids: the prompt.
        new: most tokens to generate.
        ends: whether the model's end of a sequence ends it.
        grammar: what it must be; None: it is free.
        before: prompts whose outputs a system may draft from, generated before; those that keep nothing from text to
            text do without. None: a text on its own.
    """

    workload: str
    ids: tuple[int, ...]
    new: int
    ends: bool = True
    grammar: Grammar | None = None
    before: tuple[tuple[int, ...], ...] | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON Schema of its grammar."""
        if self.grammar is None or self.grammar.kind != "json_schema":
            return None
        return dict(json.loads(self.grammar.text))


def items_of(tasks: Sequence[Task], tokenizer: Any, config: Any) -> list[Item]:
    """Return the items of the tasks, whose texts are tokenized here."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(encode(tokenizer, text)["input_ids"][0].tolist())

    return [
        Item(
            task.kind,
            ids(task.prompt),
            room(config, len(ids(task.prompt)), task.max_new_tokens),
            grammar=task.grammar,
            before=None if task.before is None else tuple(map(ids, task.before)),
        )
        for task in tasks
    ]


def nothing_items(vocabulary: int, count: int) -> list[Item]:
    """Return random prompts, for a model of random weights: text in which nothing can be reused."""
    import torch

    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, vocabulary, (count, NOTHING_PROMPT), generator=generator).tolist()
    return [Item(NOTHING, tuple(prompt), NOTHING_NEW, ends=False) for prompt in prompts]


def read_prompts(file: str, default_new: int = 128) -> list[Task]:
    """Return the tasks of a file of JSON lines; one with a `schema` becomes two, free and under its grammar.

    Raises:
        InvalidInput: the file cannot be read, or a line is none; the message names file and line.
    """
    tasks = [task for where, entry in _entries(file) for task in tasks_of(where, entry, default_new)]
    if not tasks:
        raise InvalidInput(f"--prompts {file}: there is nothing in it; {FIX}")
    return tasks


def _entries(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InvalidInput(f"--prompts {file}: {said.lower()}; {FIX}") from error
    for number, line in enumerate(lines, 1):
        where = f"--prompts {file}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{where}: not JSON ({error}); {FIX}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
            raise InvalidInput(f'{where}: no "prompt" with a text; {FIX}')
        yield where, entry


def tasks_of(where: str, entry: dict[str, Any], default_new: int = 128) -> list[Task]:
    """Return the task of an entry, and that under its grammar where it has a schema; `where` names it."""
    kind, new, schema = (
        str(entry.get("workload", "prompts")),
        entry.get("max_new_tokens", default_new),
        entry.get("schema"),
    )
    if type(new) is not int or new < 1:
        raise InvalidInput(f'{where}: "max_new_tokens" is {new!r}; give a whole number of 1 or more')
    tasks = [Task(where, kind, entry["prompt"], new)]
    if schema is not None:
        try:
            grammar = Grammar.json_schema(schema)
        except (GrammarError, TypeError) as error:
            raise InvalidInput(f"{where}: {error}; leave the schema out") from error
        tasks.append(Task(where, f"{kind} + schema", entry["prompt"], new, grammar=grammar))
    return tasks
