"""A file of named numpy arrays that never changes: written once in a stream, read by mapping.

    header   magic, format, its own size and checksum, checksum of the table, size of the data; then JSON:
             name, dtype, shape and offset of each array, and what the writer wanted to keep beside them
    data     the arrays, each at a multiple of 64 bytes
    table    the CRC-32 of each MiB of the data

The header's checksum covers the table's, and that covers all data. Opening checks the size of the file, the header and
the table; `check` checks as many blocks of the data as asked.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lookahead.errors import InvalidArgument
from lookahead.pool import files

FORMAT = 1
ALIGNMENT = 64
BLOCK = 1 << 20

Arrays = Mapping[str, NDArray[Any]]

_MAGIC = b"LKHARRAY"
_KINDS = "biufc"  # what a file can hold as it lies in memory
# magic, format, size of the header, its checksum (taken with a zero here), checksum of the table, size of the data
_PRELUDE = struct.Struct("<8sIIIIQ")


def write_arrays(path: Path, arrays: Arrays, meta: Mapping[str, Any]) -> tuple[int, int]:
    """Write `arrays` and the JSON-able `meta` to `path`; return the size of the file and its checksum.

    The file appears under its name when it is whole. No more than about a block is copied in memory.

    Raises:
        InvalidArgument: an array holds something other than numbers.
    """
    places, size = _places(arrays)
    description = json.dumps({"arrays": places, "meta": meta}, allow_nan=False).encode()
    description += b" " * (-(_PRELUDE.size + len(description)) % ALIGNMENT)
    with files.replacing(path) as descriptor:
        files.write(descriptor, bytes(_PRELUDE.size + len(description)))
        sums: list[int] = []
        for block in _blocks(_data(arrays)):
            files.write(descriptor, block)
            sums.append(zlib.crc32(block))
        table = np.array(sums, "<u4").tobytes()
        files.write(descriptor, table)
        header, checksum = _header(description, zlib.crc32(table), size)
        files.overwrite(descriptor, header)
    return len(header) + size + len(table), checksum


@dataclass(frozen=True, slots=True, eq=False)
class ArrayFile:
    """An open file of arrays. What it maps stays valid when the file is removed, until the last array is gone.

    Attributes:
        path: the file.
        nbytes: its size.
        checksum: the header's, which covers all the rest.
        meta: what the writer kept beside the arrays.
        blocks: how many blocks of data `check` can check.
    """

    path: Path
    nbytes: int
    checksum: int
    meta: dict[str, Any]
    blocks: int
    _start: int
    _size: int
    _table: bytes
    _places: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    _map: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> ArrayFile:
        """Map `path` without touching its data.

        Raises:
            PoolDamaged: the file is missing or has another size than its header says, or header or table are corrupted.
        """
        with files.reading(path), path.open("rb", buffering=0) as file:
            return cls._read(path, file.fileno())

    @classmethod
    def _read(cls, path: Path, descriptor: int) -> ArrayFile:
        checksum, table_sum, size, description = _read_header(path, descriptor)
        start = _PRELUDE.size + len(description)
        blocks = -(-size // BLOCK)
        nbytes, found = start + size + 4 * blocks, os.fstat(descriptor).st_size
        if found != nbytes:
            raise files.damaged(path, f"has {found} bytes where its header says {nbytes}")
        table = os.pread(descriptor, 4 * blocks, start + size)
        if zlib.crc32(table) != table_sum:
            raise files.damaged(path, "has a corrupted table of checksums")
        try:
            content = json.loads(description)
            places = {name: _place(entry, size) for name, entry in content["arrays"].items()}
            meta = dict(content["meta"])
        except (ValueError, TypeError, KeyError) as error:
            raise files.damaged(path, f"has a header that makes no sense ({error})") from error
        mapped = mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ)
        return cls(path, nbytes, checksum, meta, blocks, start, size, table, places, mapped)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays, mapped and read-only."""
        return {
            name: np.ndarray(shape, dtype, self._map, self._start + offset)
            for name, (dtype, shape, offset) in self._places.items()
        }

    def block_bytes(self, number: int) -> int:
        """Return the size of a block; all but the last are full."""
        return min(BLOCK, self._size - number * BLOCK)

    def check(self, numbers: Iterable[int] | None = None) -> None:
        """Compare blocks of the data (None: all) with their checksums.

        Reads the file instead of touching the map: memory does not grow, and a file cut short is no bus error.

        Raises:
            PoolDamaged: a block differs, the header changed since the file was opened, or the file is missing.
        """
        sums = np.frombuffer(self._table, "<u4")
        buffer = memoryview(bytearray(min(BLOCK, self._size)))
        with files.reading(self.path), self.path.open("rb", buffering=0) as file:
            if numbers is None and ArrayFile._read(self.path, file.fileno()).checksum != self.checksum:
                raise files.damaged(self.path, "has another header than when it was opened")
            for number in range(self.blocks) if numbers is None else numbers:
                block = buffer[: self.block_bytes(number)]
                file.seek(self._start + number * BLOCK)
                if file.readinto(block) != len(block) or zlib.crc32(block) != int(sums[number]):
                    raise files.damaged(self.path, f"is corrupted within MiB {number} of its data")


def _places(arrays: Arrays) -> tuple[dict[str, dict[str, Any]], int]:
    """Return where each array will lie, and the size of the data."""
    places: dict[str, dict[str, Any]] = {}
    end = 0
    for name, array in arrays.items():
        if array.dtype.kind not in _KINDS:
            raise InvalidArgument(f"the array {name!r} holds {array.dtype}; a pool stores arrays of numbers")
        places[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": end}
        end += array.nbytes + -array.nbytes % ALIGNMENT
    return places, end


def _place(entry: Mapping[str, Any], size: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return what a header says of an array, once it lies within the data."""
    dtype, shape, offset = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["offset"]
    inside = min((0, *shape)) >= 0 and 0 <= offset <= size - dtype.itemsize * int(np.prod(shape, dtype=object))
    if dtype.kind not in _KINDS or not inside:
        raise ValueError(f"an array of {dtype} and shape {shape} at byte {offset} of {size}")
    return dtype, shape, offset


def _header(description: bytes, table_sum: int, size: int) -> tuple[bytes, int]:
    length = _PRELUDE.size + len(description)
    checksum = zlib.crc32(_PRELUDE.pack(_MAGIC, FORMAT, length, 0, table_sum, size) + description)
    return _PRELUDE.pack(_MAGIC, FORMAT, length, checksum, table_sum, size) + description, checksum


def _read_header(path: Path, descriptor: int) -> tuple[int, int, int, bytes]:
    """Return checksum, checksum of the table, size of the data and description of a file whose header is whole."""
    prelude = os.pread(descriptor, _PRELUDE.size, 0)
    if len(prelude) < _PRELUDE.size:
        raise files.damaged(path, f"has {len(prelude)} bytes, less than a header")
    magic, form, length, checksum, table_sum, size = _PRELUDE.unpack(prelude)
    if magic != _MAGIC or not _PRELUDE.size <= length <= os.fstat(descriptor).st_size:
        raise files.damaged(path, "has a corrupted header")
    description = os.pread(descriptor, length - _PRELUDE.size, _PRELUDE.size)
    if zlib.crc32(_PRELUDE.pack(magic, form, length, 0, table_sum, size) + description) != checksum:
        raise files.damaged(path, "has a corrupted header")
    if form != FORMAT:
        raise files.damaged(path, f"has the format {form}, which does not go with its manifest")
    return checksum, table_sum, size, description


def _data(arrays: Arrays) -> Iterator[bytes]:
    """Yield the bytes of the arrays in C order, each array padded to the alignment, in pieces of at most a block."""
    for array in arrays.values():
        if array.size:
            size = max(1, BLOCK // array.itemsize)
            pieces: Iterable[Any] = np.nditer(array, ["external_loop", "buffered"], order="C", buffersize=size)
            yield from (piece.tobytes() for piece in pieces)
        yield bytes(-array.nbytes % ALIGNMENT)


def _blocks(pieces: Iterable[bytes]) -> Iterator[memoryview]:
    """Yield the same bytes in full blocks; only the last may be shorter. A block is valid until the next one."""
    block = memoryview(bytearray(BLOCK))
    filled = 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            taken = min(len(rest), BLOCK - filled)
            block[filled : filled + taken] = rest[:taken]
            filled, rest = filled + taken, rest[taken:]
            if filled == BLOCK:
                yield block
                filled = 0
    if filled:
        yield block[:filled]
