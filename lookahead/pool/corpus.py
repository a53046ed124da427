"""Documents of files and directories: what is text is read, what is not is skipped, counted and named."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

from lookahead.errors import InvalidInput

MAX_BYTES = 16 << 20
"""The largest document that is read unless the caller says otherwise."""

CACHES = frozenset({"__pycache__", "node_modules"})
"""Directories that are passed over, as hidden ones are."""

LINES = (".jsonl", ".ndjson")
"""Files with these endings hold one document a line."""

NAMED = 3  # how many names are kept for each reason
_HEAD = 1 << 13  # as much is read to see whether a file is binary

BINARY, ENCODING, EMPTY, DAMAGED = "binary", "not UTF-8", "empty", "damaged gzip"
HIDDEN, LINK, SPECIAL = "hidden or cache", "link to a directory", "no regular file"
PATTERNS, JSON = "left out by --include or --exclude", "no JSON"


class Document(NamedTuple):
    """One text."""

    name: str  # the file, and the line in it for one of many
    text: str
    digest: int  # 64 bits of the text


class Skipped:
    """What was not read, by reason.

    Attributes:
        counts: how often.
        names: the first few of each reason.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    def lines(self) -> list[str]:
        """Return a line for each reason, the commonest first.

        >>> skipped = Skipped(); skipped.add("binary", "a.png"); skipped.lines()
        ['1 binary: a.png']
        """
        counted = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            f"{count:,} {reason}: {', '.join(map(_short, self.names[reason]))}{', …' if count > NAMED else ''}"
            for reason, count in counted
        ]


class Source(NamedTuple):
    """A file to read."""

    path: Path
    size: int


class _Unfit(Exception):
    """A document that is not to be read, for the reason given."""


def documents(paths: Iterable[str | os.PathLike[str]], **options: Any) -> Iterator[Document]:
    """Yield the documents of files and directories, in a fixed order; `options` as for `Corpus`.

    >>> for name, text, digest in documents(["src", "data.jsonl.gz"], field="output"): ...
    """
    return iter(Corpus(paths, **options))


class Corpus:
    """The documents of files and directories, in the order of `paths` and, within a directory, of names.

    Code and text, and JSON, are one document a file; JSON lines are one a line; all of these may be compressed with
    gzip. What holds NUL bytes or is no UTF-8 is no text. A directory is walked without what is hidden, without
    `CACHES`, and without links to directories; a path that was given itself is read whatever its name is.

    Args:
        paths: files and directories.
        field: of each JSON line, take this field alone; "a.b" is the field b of the object a, "a.0" the first of a
            list. What is not a string there is written as JSON again.
        include: patterns; only files that fit one are read. A pattern without "/" is for names, one with "/" for paths
            below the directory that was given.
        exclude: patterns of files and directories that are not read.
        max_bytes: the size of the largest document that is read.
        without: a directory that is not walked into, such as that of the pool.
        skipped: where to count what was not read; None: an object of its own.

    Attributes:
        sources: the files.
        skipped: what was not read, complete when the iteration has ended.
        files_read: how many files are done.
        bytes_read: how much of `total_bytes` is done: sizes on the disk, compressed where they are.

    Raises:
        InvalidInput: one of the paths is not there.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        field: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        max_bytes: int = MAX_BYTES,
        without: str | os.PathLike[str] | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        self.field, self.max_bytes = field, max_bytes
        self.skipped = Skipped() if skipped is None else skipped
        self._include, self._exclude = _patterns(include), _patterns(exclude)
        self._without = None if without is None else os.path.realpath(without)
        self.sources = list(self._find([Path(path) for path in paths]))
        self.total_bytes = sum(source.size for source in self.sources)
        self.files_read = self.bytes_read = 0

    def __iter__(self) -> Iterator[Document]:
        self.files_read = self.bytes_read = 0
        for source in self.sources:
            before = self.bytes_read
            yield from self._read(source)
            self.files_read, self.bytes_read = self.files_read + 1, before + source.size

    def stream(self, stream: IO[bytes], name: str) -> Iterator[Document]:
        """Yield what an open file holds: JSON lines where there is a field to take, else one document."""
        if self.field is None:
            yield from self._document(name, lambda: self._whole(stream))
        else:
            yield from self._lines(name, stream)

    # Which files.

    def _find(self, paths: Sequence[Path]) -> Iterator[Source]:
        for path in paths:
            if not path.exists():
                raise InvalidInput(f"{shown(path)}: no such file or directory; give files or directories to read")
        for path in paths:
            if path.is_dir():
                yield from self._walk(path)
            elif self._wanted(path, path.name):
                yield Source(path, path.stat().st_size)

    def _walk(self, top: Path) -> Iterator[Source]:
        def unreadable(error: OSError) -> None:
            self.skipped.add(_explained(error), shown(error.filename))

        if os.path.realpath(top) == self._without:
            return
        for here, directories, files in os.walk(top, onerror=unreadable):
            directory = Path(here)
            below = directory.relative_to(top)
            directories[:] = [name for name in sorted(directories) if self._enters(directory / name, below / name)]
            for name in sorted(files):
                path = directory / name
                if name.startswith("."):
                    self.skipped.add(HIDDEN, shown(path))
                elif self._wanted(path, (below / name).as_posix()):
                    yield from self._source(path)

    def _enters(self, path: Path, below: Path) -> bool:
        reason = None
        if path.name.startswith(".") or path.name in CACHES:
            reason = HIDDEN
        elif path.is_symlink():
            reason = LINK
        elif _fits(self._exclude, below.as_posix()):
            reason = PATTERNS
        if reason is not None:
            self.skipped.add(reason, shown(path))
        return reason is None and os.path.realpath(path) != self._without

    def _wanted(self, path: Path, below: str) -> bool:
        wanted = (not self._include or _fits(self._include, below)) and not _fits(self._exclude, below)
        if not wanted:
            self.skipped.add(PATTERNS, shown(path))
        return wanted

    def _source(self, path: Path) -> Iterator[Source]:
        try:
            status = path.stat()
        except OSError as error:
            self.skipped.add(_explained(error), shown(path))
            return
        if stat.S_ISREG(status.st_mode):
            yield Source(path, status.st_size)
        else:  # to open a pipe would wait for ever
            self.skipped.add(SPECIAL, shown(path))

    # What is in them.

    def _read(self, source: Source) -> Iterator[Document]:
        packed = source.path.suffix == ".gz"
        kind = (source.path.with_suffix("") if packed else source.path).suffix
        try:
            with source.path.open("rb") as raw:
                stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
                if kind in LINES:
                    before = self.bytes_read
                    for document in self._lines(shown(source.path), stream):
                        yield document
                        self.bytes_read = before + raw.tell()
                else:
                    yield from self._document(shown(source.path), lambda: self._whole(stream))
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self.skipped.add(DAMAGED, shown(source.path))
        except OSError as error:
            self.skipped.add(_explained(error), shown(source.path))

    def _whole(self, stream: IO[bytes]) -> str:
        data = stream.read(_HEAD)
        if b"\0" in data:
            raise _Unfit(BINARY)
        data += stream.read(max(0, self.max_bytes + 1 - len(data)))
        if len(data) > self.max_bytes:
            raise _Unfit(self._large)
        return decoded(data)

    def _lines(self, file: str, stream: IO[bytes]) -> Iterator[Document]:
        number = 0
        while line := stream.readline(self.max_bytes + 1):
            number += 1
            if line.isspace():
                continue
            name = f"{file}:{number}"
            if len(line) > self.max_bytes:
                self.skipped.add(self._large, name)
                while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
                    pass
                continue
            yield from self._document(name, lambda line=line: self._line(line))

    def _line(self, line: bytes) -> str:
        text = decoded(line.rstrip(b"\r\n"))
        if self.field is None:
            return text
        try:
            value = _at(json.loads(text), self.field)
        except (ValueError, RecursionError):
            raise _Unfit(JSON) from None
        except LookupError:
            value = None
        if value is None:
            raise _Unfit(f"without the field {self.field}")
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def _document(self, name: str, read: Any) -> Iterator[Document]:
        try:
            text = read()
            if not text.strip():
                raise _Unfit(EMPTY)
            yield Document(name, text, digest(text))
        except UnicodeEncodeError:  # half a character, which JSON can write
            self.skipped.add(ENCODING, name)
        except _Unfit as unfit:
            self.skipped.add(str(unfit), name)

    @property
    def _large(self) -> str:
        return f"larger than {self.max_bytes:,} bytes"


def digest(text: str) -> int:
    """Return 64 bits that name a text, never 0."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def decoded(data: bytes) -> str:
    """Return the text; without the mark that some editors put first."""
    if b"\0" in data:
        raise _Unfit(BINARY)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unfit(ENCODING) from None


def shown(path: str | os.PathLike[str]) -> str:
    """Return a file name that any terminal can show."""
    name = os.fsencode(path).decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _short(name: str) -> str:
    """Return the end of a long path."""
    parts = name.rsplit("/", 3)
    return name if len(parts) < 4 or len(parts[0]) < 12 else "/".join(["…", *parts[1:]])


def _at(value: Any, field: str) -> Any:
    """Return what is at a dotted name; a name that has dots of its own goes first.

    Raises:
        LookupError: there is nothing.
    """
    if isinstance(value, dict) and field in value:
        return value[field]
    name, dot, rest = field.partition(".")
    if isinstance(value, list) and name.isdecimal():
        value = value[int(name)]
    elif isinstance(value, dict) and dot:
        value = value[name]
    else:
        raise LookupError(field)
    return _at(value, rest) if dot else value


def _patterns(given: Sequence[str]) -> list[str]:
    return [pattern.rstrip("/") for pattern in given]


def _fits(patterns: Sequence[str], below: str) -> bool:
    """Return whether a path below a directory fits a pattern: by name, or by the path where the pattern has a "/"."""
    name = below.rsplit("/", 1)[-1]
    for pattern in patterns:
        targets = (below, f"/{below}") if "/" in pattern else (name,)
        if any(fnmatchcase(target, pattern) for target in targets):
            return True
    return False


def _explained(error: OSError) -> str:
    return f"unreadable ({(error.strerror or str(error)).lower()})"
