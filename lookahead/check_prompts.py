"""The prompts that a model is checked on: a file of the user's, those of the model, or a few that come along."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookahead.command import read_text
from lookahead.errors import InvalidInput

MOST = 8  # of the prompts that a model brings along
LINES, LISTS, TEXTS = (".jsonl", ".ndjson"), (".json",), (".txt", ".text", ".md", "")
_WANTED = "give .jsonl (a prompt a line), .json (a list), or .txt (prompts with an empty line between them)"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to go on from, and what it is called in reports."""

    name: str
    text: str


_ADD = "def add(items):\n    {0} = 0\n    for item in items:\n        {0} += item\n"
BUILT_IN = (
    Prompt("rename", f"# total -> amount\n{_ADD.format('total')}    return total\n\n\n{_ADD.format('amount')}"),
    Prompt("class", "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"),
    Prompt("json", '[{"id": 1, "name": "Ada", "tags": ["math", "code"]}, {"id": 2, "name": "Grace", "tags": ['),
    Prompt("facts", "Omar Haddad wrote The Silver Harbor; it has 412 pages.\nAs JSON: {"),
    Prompt("text", "The three primary colours are"),
)


def read_prompts(file: str | None, directory: Path) -> list[Prompt]:
    """Return the prompts of `--prompts`, else those of a model directory, else the ones that come along.

    Raises:
        InvalidInput: the file cannot be used; the message names it, the place and the fix.
    """
    if file is not None:
        return _read(file, "--prompts ")
    own = directory / "prompts.json"
    if not own.is_file():
        return list(BUILT_IN)
    found = _read(str(own), "")
    return found[:: -(-len(found) // MOST)]


def _read(file: str, option: str) -> list[Prompt]:
    kind, where = Path(file).suffix.lower(), f"{option}{file}"
    if kind not in (*LINES, *LISTS, *TEXTS):
        raise InvalidInput(f"{where}: prompts are not read from {kind} files; {_WANTED}")
    text = read_text(option.strip() or "prompts", file)
    if "\0" in text:
        raise InvalidInput(f"{where}: binary data; {_WANTED}")
    if kind in LINES:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [_prompt(_parsed(line, f"{where}, line {number}"), f"{where}, line {number}") for number, line in lines]
    elif kind in LISTS:
        items = _parsed(text, where)
        if not isinstance(items, list):
            raise InvalidInput(f"{where}: holds no list; give a JSON list of strings, or of objects with a prompt")
        found = [_prompt(item, f"{where}, entry {number}") for number, item in enumerate(items, 1)]
    else:
        blocks = re.split(r"\n(?:[ \t]*\n)+", text.replace("\r\n", "\n"))
        found = [("", block.strip("\n")) for block in blocks if block.strip()]
    if not found:
        raise InvalidInput(f"{where}: holds no prompts; {_WANTED}")
    return [Prompt(name or f"prompt {number}", text) for number, (name, text) in enumerate(found, 1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: not JSON ({error}); {_WANTED}") from error


def _prompt(item: Any, where: str) -> tuple[str, str]:
    """Return name and text of a prompt; the name may be left out."""
    name, text = ("", item) if isinstance(item, str) else ("", None)
    if isinstance(item, dict):
        named = item.get("task", item.get("name"))
        name, text = named if isinstance(named, str) else "", item.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise InvalidInput(f'{where}: no prompt; give a string, or an object such as {{"prompt": "def add("}}')
    return name, text
