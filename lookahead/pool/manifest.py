"""The manifest of a store: which files belong to it, in which order. What it does not name does not exist.

JSON with its own checksum, over all of the rest as parsed: white space may change, values may not.
"""

from __future__ import annotations

import json
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lookahead.errors import InvalidArgument, PoolDamaged, PoolTooNew
from lookahead.pool import files

FILE = "manifest.json"
FORMAT = 1

_NAME = re.compile(r"\d{8,}-\d{3,}-[0-9a-f]{8}\.(segment|state)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One committed segment.

    Attributes:
        name: its file within the directory; unique for all time.
        tokens: what the caller counted in it.
        documents: likewise.
        nbytes: the size of the file.
        created: when it was written, in seconds since 1970.
        checksum: of the file's header, which covers all of it.
    """

    name: str
    tokens: int
    documents: int
    nbytes: int
    created: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one commit published.

    Attributes:
        generation: counts commits.
        settings: what the caller keeps with the whole.
        entries: the segments, oldest first.
        state: the file of the caller's state, or None.
    """

    generation: int
    settings: dict[str, Any]
    entries: tuple[Entry, ...] = ()
    state: str | None = None


def new_name(generation: int, number: int, kind: str) -> str:
    """Return a name that no file had before: names sort by age, and the random part sets a failed try apart."""
    return f"{generation:08d}-{number:03d}-{secrets.token_hex(4)}.{kind}"


def is_name(name: str, kind: str | None = None) -> bool:
    """Return whether `new_name` gives such names (of that kind)."""
    match = _NAME.fullmatch(name)
    return match is not None and kind in (None, match[1])


def generation_of(name: str) -> int:
    """Return the generation that a name was made for."""
    return int(name.split("-")[0])


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a manifest gives them back.

    Raises:
        InvalidArgument: they are not JSON.
    """
    try:
        return dict(json.loads(json.dumps(dict(settings), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"the settings of a pool are kept as JSON, which cannot hold these: {error}") from error


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of the file."""
    content = {"format": FORMAT, **asdict(manifest)}
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode() + b"\n"


def decode(raw: bytes, path: Path) -> Manifest:
    """Return what the file at `path` says, given its bytes.

    Raises:
        PoolTooNew: in a format that we do not know yet.
        PoolDamaged: truncated or corrupted.
    """
    try:
        content = json.loads(raw)
        form, checksum = content["format"], content.pop("checksum")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _corrupted(path) from error
    if isinstance(form, int) and form > FORMAT:
        raise PoolTooNew(
            f"{path} is in the format {form}, and this version of lookahead reads up to {FORMAT}; "
            "upgrade with `pip install -U lookahead-decoding`"
        )
    if form != FORMAT or checksum != _checksum(content):
        raise _corrupted(path)
    del content["format"]
    try:
        entries = tuple(Entry(**entry) for entry in content.pop("entries"))
        manifest = Manifest(entries=entries, **content)
        ours = all(is_name(entry.name, "segment") for entry in entries)
        ours = ours and (manifest.state is None or is_name(manifest.state, "state"))
    except (TypeError, KeyError) as error:
        raise _corrupted(path) from error
    if not ours:  # a manifest must not lead out of the directory
        raise _corrupted(path)
    return manifest


def publish(directory: Path, manifest: Manifest) -> None:
    """Make `manifest` the one that counts, once all that it names is on the disk under its name."""
    raw = encode(manifest)
    files.sync_directory(directory)
    with files.replacing(directory / FILE) as descriptor:
        files.write(descriptor, raw)
    files.sync_directory(directory)


def _corrupted(path: Path) -> PoolDamaged:
    return files.damaged(path, "is truncated or corrupted")


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
