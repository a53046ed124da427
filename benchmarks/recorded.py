"""Recorded requests to replay: JSON lines, plain or gzipped, as tokens."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lookahead.draft import IntArray


class BadInput(Exception):
    """A file that cannot be replayed; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Request:
    workload: str
    prompt: IntArray
    output: IntArray

    def matcher(self) -> Any:
        """Return what follows the output through its grammar; None: it is free."""
        return None


def lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yield every line that is not blank, and where it stands.

    Raises:
        BadInput: the file does not unpack.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield line, f"{path}, line {number}"
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{path} does not unpack: {error}") from None


def read(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the workload, prompt and output of every line that is not blank.

    Raises:
        BadInput: a line is no JSON object or lacks a text (names the line), or the file does not unpack.
    """
    return (parse(*line) for line in lines(path))


def parse(line: bytes, where: str) -> tuple[str, str, str]:
    """Return the workload ("all", if there is none), prompt and output of one line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error}); give one JSON object a line") from None
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: {type(entry).__name__} instead of a JSON object with `prompt` and `output`")
    for key in ("prompt", "output"):
        if key not in entry:
            raise BadInput(f"{where}: no `{key}`; every request needs the strings `prompt` and `output`")
        if not isinstance(entry[key], str):
            raise BadInput(f"{where}: `{key}` is {type(entry[key]).__name__}, not a string")
        if not entry[key].isascii():
            _check_encodable(entry[key], f"{where}: `{key}`")
    workload = entry.get("workload")
    return "all" if workload is None else str(workload), entry["prompt"], entry["output"]


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where} has half a surrogate pair at character {error.start}, which is no text") from None


def load(path: Path, tokenizer: Tokenizer, workloads: list[str], limit: int | None) -> tuple[list[Request], int]:
    """Return the requests of `workloads` (all, if empty), at most `limit` of each, and how many were empty.

    Raises:
        BadInput: a bad line, or nothing to replay.
    """
    requests: list[Request] = []
    seen: dict[str, int] = {}
    skipped = 0
    for workload, *texts in read(path):
        count = seen.setdefault(workload, 0)
        if (workloads and workload not in workloads) or count == limit:
            continue
        prompt, output = (np.array(tokenizer.encode(t, add_special_tokens=False).ids, np.int32) for t in texts)
        if not (len(prompt) and len(output)):
            skipped += 1
            continue
        seen[workload] = count + 1
        requests.append(Request(workload, prompt, output))
    if missing := [name for name in workloads if name not in seen]:
        raise BadInput(f"{path} has no workload {', '.join(missing)}; it has {', '.join(seen) or 'none'}")
    if not requests:
        raise BadInput(f"{path} has no request with both a prompt and an output ({skipped} skipped)")
    return requests, skipped


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json` or of the directory that holds one."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"--tokenizer {path}: there is no {file}; give a tokenizer.json or its directory")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the bare class
        raise BadInput(f"--tokenizer {path}: {error}") from None
