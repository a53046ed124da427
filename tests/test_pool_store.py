"""The store: what is committed stays, whatever happens; what is damaged is named."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lookahead.errors import InvalidArgument, PoolBusy, PoolDamaged, PoolError, PoolNotFound, PoolTooNew
from lookahead.pool import files, manifest, snapshot
from lookahead.pool.arrayfile import ALIGNMENT, BLOCK, ArrayFile, write_arrays
from lookahead.pool.store import NewSegment, Store

KILLS = 100
OPERATIONS = ("create", "write", "overwrite", "sync", "replace", "remove", "sync_directory")
SETTINGS = {"fingerprint": "ab12", "vocabulary": 32000, "limits": [1, None, 0.5]}


def arrays_of(tokens: int) -> dict[str, np.ndarray]:
    """Arrays that are told by a number."""
    return {
        "text": np.arange(tokens, dtype=np.int32) ^ tokens,
        "order": np.full((3, tokens % 7), tokens % 251, np.uint16),
        "rate": np.array(tokens / 3),
    }


def new(tokens: int) -> NewSegment:
    return NewSegment(arrays_of(tokens), tokens, documents=tokens + 1)


def whole(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def contents(store: Store) -> tuple[Any, ...]:
    """All that a store returns, once every array was read and found to be what its number of tokens tells."""
    for entry in store.entries:
        assert entry.documents == entry.tokens + 1
        assert whole(store.load(entry)) == whole(arrays_of(entry.tokens))
    return store.settings, store.state(), [entry.tokens for entry in store.entries]


def seen(path: Path) -> tuple[Any, ...]:
    with Store.open(path, writable=False) as store:
        store.verify()
        return contents(store)


def listing(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()} - {"lock", "lock.pid"}


def named(store: Store) -> set[str]:
    """The files of a tidy directory."""
    content = json.loads((store.path / manifest.FILE).read_bytes())
    return {entry.name for entry in store.entries} | {manifest.FILE} | ({content["state"]} - {None})


def make(path: Path, tokens: list[int], state: bytes | None = b"learnt") -> Path:
    with Store.create(path, SETTINGS) as store:
        store.commit([new(n) for n in tokens], state=state)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return make(tmp_path / "pool", [20, 31])


@contextlib.contextmanager
def altered(file: Path, data: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


@contextlib.contextmanager
def forked(child: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """Run `child` with the writing end of a pipe in a process of its own; yield its id and the reading end."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which the child never uses
        process = os.fork()
    if process == 0:
        try:
            child(writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        yield process, reading
    finally:
        os.close(reading)
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(process, os.WNOHANG) == (0, 0):
                kill(process)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def lines_in(pipe: int) -> Iterator[bytes]:
    with os.fdopen(pipe, "rb", closefd=False) as lines:
        yield from lines


# Round trips


dtypes = st.one_of(hnp.integer_dtypes(endianness="?"), hnp.floating_dtypes(endianness="?"), st.just(np.dtype(np.bool_)))
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), fill=st.nothing())


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), arrays, max_size=4), st.booleans())
def test_arrays_come_back_aligned_and_read_only(values: dict[str, np.ndarray], turned: bool) -> None:
    values = {name: value.T if turned else value for name, value in values.items()}  # not C-contiguous
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        size, checksum = write_arrays(path, values, {"kept": [1, "x"]})
        file = ArrayFile.open(path)
        file.check()
        assert (file.nbytes, file.checksum, file.meta) == (path.stat().st_size, checksum, {"kept": [1, "x"]})
        assert size == file.nbytes
        got = file.arrays()
        assert whole(got) == whole(values)
        for array in got.values():
            assert array.ctypes.data % ALIGNMENT == 0
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True


@pytest.mark.parametrize("size", [BLOCK // 4 - 1, BLOCK // 4, BLOCK // 4 + 1, 3 * BLOCK // 4 + 5])
def test_arrays_longer_than_a_block(tmp_path: Path, size: int) -> None:
    values = {"a": np.arange(size, dtype=np.int32), "b": np.arange(2 * size).reshape(2, size)[:, ::-2]}
    write_arrays(tmp_path / "file", values, {})
    file = ArrayFile.open(tmp_path / "file")
    file.check()
    assert whole(file.arrays()) == whole(values)
    assert file.blocks == -(-(size * 4 + -size * 4 % 64 + values["b"].nbytes) // BLOCK)


def test_writing_takes_no_copy_and_opening_touches_no_data(tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    path, array = make(tmp_path / "pool", []), np.ones(48 << 20, np.uint8)
    blocks: list[int] = []
    with Store.open(path, writable=True) as store, pytest.MonkeyPatch.context() as patch:
        before = resident()
        patch.setattr(files, "write", lambda d, data: blocks.append(resident()) or os.write(d, data))
        store.commit([NewSegment({"a": array}, 1, 1)])
        assert max(blocks) - before < 12 << 20
    before = resident()
    with Store.open(path, writable=False) as store:
        got = store.load(store.entries[0])["a"]
        assert got[-1] == 1
        assert resident() - before < 12 << 20


def test_a_commit_keeps_order_settings_and_state(pool: Path) -> None:
    with Store.open(pool, writable=True) as store:
        first, second = store.entries
        store.commit([new(5), second, new(6), first])
        expected = (SETTINGS, b"learnt", [5, 31, 6, 20])
        assert contents(store) == expected == seen(pool)
        store.commit([first], settings={"other": 1}, state=b"")
        assert contents(store) == ({"other": 1}, b"", [20]) == seen(pool)
        assert listing(pool) == named(store)
        assert store.entries == (first,)
        assert first.nbytes == (pool / first.name).stat().st_size
        assert abs(first.created - time.time()) < 600
        store.commit([NewSegment({}, 0, 0, created=77)])
        assert store.entries[0].created == 77
        assert store.generation == 4


def test_loaded_arrays_outlive_removal_and_closing(pool: Path) -> None:
    reader = Store.open(pool, writable=False)
    with Store.open(pool, writable=True) as store:
        mine = store.load(store.entries[0])
        store.commit([])
    assert contents(reader)[2] == [20, 31]  # files that are gone, some of them never looked at before
    reader.close()
    assert whole(mine) == whole(arrays_of(20))
    with pytest.raises(PoolError, match="was closed"):
        reader.load(reader.entries[0])


def test_names_are_never_used_again(pool: Path) -> None:
    names: list[str] = []
    for _ in range(3):
        with Store.open(pool, writable=True) as store:
            for _ in range(3):
                store.commit([new(1), new(1)])
                names += [entry.name for entry in store.entries]
    assert len(set(names)) == len(names) == 18
    assert names == sorted(names)


places = st.lists(st.integers(0, 3), max_size=4)
steps = st.lists(st.tuples(places, st.lists(st.integers(0, 99), max_size=2), st.booleans()), max_size=8)


@settings(max_examples=20)
@given(steps)
def test_any_commits_equal_a_list_and_a_reader_follows(steps: list[tuple[list[int], list[int], bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, model = make(Path(folder) / "pool", []), []
        store, reader = Store.open(path, writable=True), Store.open(path, writable=False)
        for kept, added, again in steps:
            chosen = [store.entries[i] for i in dict.fromkeys(kept) if i < len(store.entries)]
            model = [entry.tokens for entry in chosen] + added
            store.commit([*chosen, *map(new, added)])
            assert contents(store)[2] == model
            assert listing(path) == named(store)
            assert reader.refresh()
            assert not reader.refresh()
            assert contents(reader) == contents(store)
            if again:
                store.close()
                store = Store.open(path, writable=True)
        assert contents(store)[2] == model
        store.close()


# What is refused


def test_what_cannot_be_stored_is_refused_and_nothing_changes(pool: Path) -> None:
    with Store.open(pool, writable=True) as store:
        entry, before = store.entries[0], listing(pool)
        with pytest.raises(InvalidArgument, match="holds object"):
            store.commit([new(1), NewSegment({"a": np.array([None])}, 0, 0)])
        with pytest.raises(InvalidArgument, match="JSON"):
            store.commit([new(1)], settings={"x": {1}})
        with pytest.raises(InvalidArgument, match="twice"):
            store.commit([entry, entry])
        assert listing(pool) == before
        store.commit([entry])
        with pytest.raises(InvalidArgument, match="no longer"):
            store.commit([new(1), Store.open(make(pool.parent / "other", [1]), writable=False).entries[0]])
    with pytest.raises(PoolError, match="open it for writing"):
        store.commit([])
    with pytest.raises(PoolError, match="open it for writing"):
        Store.open(pool, writable=False).commit([])
    with pytest.raises(InvalidArgument, match="damaged='no'"):
        Store.open(pool, writable=False, damaged="no")  # type: ignore[arg-type]
    assert seen(pool) == (SETTINGS, b"learnt", [20])


@pytest.mark.parametrize("writable", [False, True])
def test_what_is_no_pool_is_refused_and_left_alone(tmp_path: Path, writable: bool) -> None:
    (tmp_path / "a file").touch()
    for path, what in ((tmp_path, "is no pool"), (tmp_path / "a file", "is no pool"), (tmp_path / "x", "not exist")):
        with pytest.raises(PoolNotFound, match=f"{path} .*{what}.*lookahead pool build"):
            Store.open(path, writable=writable)
    assert listing(tmp_path) == {"a file"} == {file.name for file in tmp_path.iterdir()}


def test_creating_over_a_pool_is_refused(pool: Path) -> None:
    before = seen(pool)
    with pytest.raises(PoolError, match=r"already; Pool.open"):
        Store.create(pool, {})
    assert seen(pool) == before
    (pool / manifest.FILE).unlink()
    with pytest.raises(PoolError, match=r"already; Pool.open"):
        Store.create(pool, {})
    (pool.parent / "file").touch()
    with pytest.raises(PoolError, match="cannot be written"):
        Store.create(pool.parent / "file", {})


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("damaged", ["raise", "skip"])
def test_a_newer_format_is_named(pool: Path, sealed: bool, damaged: Any) -> None:
    content = json.loads((pool / manifest.FILE).read_bytes())
    content["format"] = 7
    if sealed:
        content["checksum"] = manifest._checksum({k: v for k, v in content.items() if k != "checksum"})
    with (
        altered(pool / manifest.FILE, json.dumps(content).encode()),
        pytest.raises(PoolTooNew, match=rf"{pool / manifest.FILE} is in the format 7, .* up to 1; upgrade"),
    ):
        Store.open(pool, writable=True, damaged=damaged)
    assert seen(pool)[2] == [20, 31]


def test_a_manifest_does_not_lead_out_of_the_directory(pool: Path) -> None:
    says = manifest.decode((pool / manifest.FILE).read_bytes(), pool)
    for stray in (
        manifest.Manifest(1, {}, (manifest.Entry("../x.segment", 1, 1, 1, 1, 1),)),
        manifest.Manifest(1, {}, says.entries, "../../secret"),
        manifest.Manifest(1, {}, says.entries, says.entries[0].name),
    ):
        with altered(pool / manifest.FILE, manifest.encode(stray)), pytest.raises(PoolDamaged):
            Store.open(pool, writable=False)


def test_a_disk_that_refuses_loses_nothing(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: Any) -> None:
        raise OSError(28, "No space left on device")

    with Store.open(pool, writable=True) as store:
        before = listing(pool)
        with monkeypatch.context() as patch:
            patch.setattr(files, "write", full)
            with pytest.raises(PoolError, match=f"{pool} cannot be written .*No space left.*intact"):
                store.commit([new(1)])
        assert listing(pool) == before
        store.commit([*store.entries, new(1)])
    assert seen(pool)[2] == [20, 31, 1]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("last", ["replace", "sync_directory"])
def test_a_failure_once_the_manifest_is_replaced_does_not_undo_it(pool: Path, last: str, error: BaseException) -> None:
    operation = getattr(files, last)

    def fail(*arguments: Path) -> None:
        operation(*arguments)
        if json.loads((pool / manifest.FILE).read_bytes())["generation"] == 2:
            raise error

    with Store.open(pool, writable=True) as store:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, last, fail)
            with pytest.raises((PoolError, KeyboardInterrupt)):
                store.commit([store.entries[0], new(1)])
        assert contents(store) == seen(pool) == (SETTINGS, b"learnt", [20, 1])
        store.commit([*store.entries, new(2)])
        assert listing(pool) == named(store)
    assert seen(pool)[2] == [20, 1, 2]


def test_importing_the_store_is_light() -> None:
    heavy = ("torch", "numba", "transformers")
    code = f"import sys, lookahead.pool.store; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Writers and readers


def test_a_second_writer_is_told_who_writes(pool: Path) -> None:
    with Store.open(pool, writable=True) as store:
        for _ in range(2):
            with pytest.raises(PoolBusy, match=f"{pool} is being written by process {os.getpid()} on "):
                Store.open(pool, writable=True)
        with pytest.raises(PoolBusy):
            Store.create(pool, {})
        assert store.writable
        assert contents(Store.open(pool, writable=False)) == contents(store)
    assert not store.writable
    Store.open(pool, writable=True).close()


def test_a_killed_writer_leaves_the_lock_free(pool: Path) -> None:
    def hold(pipe: int) -> None:
        store = Store.open(pool, writable=True)
        os.write(pipe, b"held")
        while store:
            signal.pause()

    with forked(hold) as (process, pipe):
        assert os.read(pipe, 4) == b"held"
        with pytest.raises(PoolBusy, match=f"process {process} on"):
            Store.open(pool, writable=True)
        kill(process)
    with Store.open(pool, writable=True) as store:
        store.commit([new(1)])


def test_a_forked_child_does_not_write_for_its_parent(pool: Path) -> None:
    with Store.open(pool, writable=True) as store:

        def try_it(pipe: int) -> None:
            with contextlib.suppress(PoolError):
                store.commit([])
                os.write(pipe, b"committed")
            store.close()

        with forked(try_it) as (process, pipe):
            os.waitpid(process, 0)
            assert os.read(pipe, 9) == b""
        with pytest.raises(PoolBusy):
            Store.open(pool, writable=True)
        store.commit([*store.entries, new(1)])
    assert seen(pool)[2] == [20, 31, 1]


def test_readers_write_nothing(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pool / "00000009-000-00000000.segment").write_bytes(b"left by a killed writer")
    state = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in pool.iterdir()} | {pool: pool.stat()}
    for name in OPERATIONS:
        monkeypatch.delattr(files, name)
    monkeypatch.delattr("lookahead.pool.store.WriterLock")
    with Store.open(pool, writable=False) as store:
        assert contents(store)[2] == [20, 31]
        store.verify()
        assert not store.refresh()
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in pool.iterdir()}
    assert after.items() <= state.items()
    assert pool.stat().st_mtime_ns == state[pool].st_mtime_ns  # type: ignore[union-attr]


@pytest.mark.parametrize("damaged", ["raise", "skip"])
@pytest.mark.parametrize("call", [0, 1, 2, 5])
def test_a_reader_that_opens_during_replacements_sees_one_commit(pool: Path, call: int, damaged: Any) -> None:
    calls = 0
    opening = ArrayFile.open.__func__  # type: ignore[attr-defined]

    def replaced_meanwhile(cls: type[ArrayFile], path: Path) -> ArrayFile:
        nonlocal calls
        calls += 1
        if calls <= call:
            patch.setattr(ArrayFile, "open", classmethod(opening))
            store.commit([new(calls), new(calls)], state=bytes([calls]))
            patch.setattr(ArrayFile, "open", classmethod(replaced_meanwhile))
        return opening(cls, path)

    with Store.open(pool, writable=True) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArrayFile, "open", classmethod(replaced_meanwhile))
        reader = Store.open(pool, writable=False, damaged=damaged)
        assert contents(reader) == contents(store)
        assert reader.problems == ()
        assert calls > call


def test_verify_of_a_reader_follows_the_writer(pool: Path) -> None:
    reader = Store.open(pool, writable=False)
    with Store.open(pool, writable=True) as store:
        store.commit([store.entries[0], new(3)])
    reader.verify(reader.entries[1])
    assert contents(reader)[2] == [20, 3]


def test_what_a_killed_writer_left_is_swept_and_nothing_else(pool: Path) -> None:
    ours = ["00000009-000-0123abcd.segment", "00000009-000-0123abcd.state", "00000009-012-0123abcd.segment.tmp"]
    theirs = ["notes.txt", "x.tmp", "00000009-000-0123abcd.segment.damaged", "manifest.json.damaged"]
    for name in [*ours, manifest.FILE + ".tmp", *theirs]:
        (pool / name).write_bytes(b"x")
    Store.open(pool, writable=False).close()
    assert set(ours) <= listing(pool)
    with Store.open(pool, writable=True) as store:
        assert listing(pool) == named(store) | set(theirs)


# Damage


def damages(data: bytes) -> Iterator[bytes]:
    """Every truncation and, at every byte, one flipped bit."""
    for place in range(len(data)):
        yield data[:place]
        yield data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def opened(pool: Path, damaged: Any) -> tuple[tuple[Any, ...] | None, list[str]]:
    """What a pool returns (None: nothing) and what it says about damage."""
    try:
        with Store.open(pool, writable=False, damaged=damaged) as store:
            return contents(store), [str(problem) for problem in store.problems]
    except (PoolDamaged, PoolTooNew) as error:
        return None, [str(error)]


def look(pool: Path, file: Path, data: bytes) -> None:
    """A damaged file is named by an error, or changes nothing; the rest can be opened without it."""
    kept, state, tokens = contents(Store.open(pool, writable=False))
    with altered(file, data):
        got, said = opened(pool, "raise")
        rest, left_out = opened(pool, "skip")
    assert all(str(file) in text for text in said)
    assert left_out == said
    if not said:
        assert got == rest == (kept, state, tokens)
    elif file.suffix == ".state":
        assert got == rest == (kept, None, tokens)
    elif "upgrade" in said[0]:
        assert got is rest is None
    else:
        assert f'Pool.open("{pool}", damaged="skip")' in said[0]
        assert got is None
        assert rest == (kept, state, tokens[1:] if file.suffix == ".segment" else tokens)


@pytest.mark.parametrize("kind", ["json", "segment", "state"])
def test_every_damaged_byte_is_named_or_harmless(tmp_path: Path, kind: str) -> None:
    pool = make(tmp_path / "pool", [3, 8])
    file = min(pool.glob(f"*.{kind}"))
    for data in damages(file.read_bytes()):
        look(pool, file, data)


files_of_all_kinds = st.sampled_from(["lock", "manifest.json", "*.segment", "*.state"])
bytes_to_set = st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), max_size=4)


@given(files_of_all_kinds, bytes_to_set, st.binary(max_size=3))
def test_any_damage_is_named_or_harmless(kind: str, values: list[tuple[int, int]], more: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool = make(Path(folder) / "pool", [3, 8])
        file = min(pool.glob(kind))
        content = bytearray(file.read_bytes())
        for place, value in values:
            place %= max(1, len(content))
            content[place : place + 1] = bytes([value])
        look(pool, file, bytes(content + more))


@pytest.mark.parametrize("gone", [["a.segment"], ["manifest.json"], ["a.segment", "manifest.json"], ["x.state"]])
def test_a_missing_file_is_named_and_the_rest_stays(tmp_path: Path, gone: list[str]) -> None:
    pool = make(tmp_path / "pool", [3, 8])
    lost = [min(pool.glob(f"*{Path(name).suffix}")) for name in gone]
    for file in lost:
        file.unlink()
    if gone == ["x.state"]:
        assert "learnt anew" in str(Store.open(pool, writable=False).problems[0])
    else:
        with pytest.raises(PoolDamaged, match=r"is missing; Pool.open\(.*skip"):
            Store.open(pool, writable=False)
    with Store.open(pool, writable=True, damaged="skip") as store:
        tokens = [8] if gone[0] == "a.segment" else [3, 8]
        assert contents(store) == (SETTINGS, None if gone == ["x.state"] else b"learnt", tokens)
        store.commit([*store.entries, new(4)], state=b"again")
        assert store.problems == ()
    assert seen(pool) == (SETTINGS, b"again", [*tokens, 4])


def test_a_pool_of_which_nothing_is_left_says_so(tmp_path: Path) -> None:
    pool = make(tmp_path / "pool", [])
    with altered(pool / manifest.FILE, b"{"):
        for damaged in ("raise", "skip"):
            with pytest.raises(PoolDamaged, match=str(pool / manifest.FILE)):
                Store.open(pool, writable=True, damaged=damaged)  # type: ignore[arg-type]
    assert seen(pool) == (SETTINGS, b"learnt", [])


@pytest.mark.parametrize("kind", ["json", "segment", "state"])
def test_the_next_commit_moves_the_damaged_aside(tmp_path: Path, kind: str) -> None:
    pool = make(tmp_path / "pool", [3, 8])
    file = min(pool.glob(f"*.{kind}"))
    file.write_bytes(file.read_bytes()[:-20])
    rubbish = file.read_bytes()
    with Store.open(pool, writable=True, damaged="skip") as store:
        assert file.exists()
        store.commit(store.entries)
        assert store.problems == ()
        assert listing(pool) == named(store) | {file.name + ".damaged"}
    assert (pool / f"{file.name}.damaged").read_bytes() == rubbish
    assert seen(pool) == (SETTINGS, None if kind == "state" else b"learnt", [8] if kind == "segment" else [3, 8])


def test_opening_checks_a_sample_and_verify_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(tmp_path / "pool", [])
    with Store.open(pool, writable=True) as store:
        store.commit([NewSegment({"a": np.zeros(6 * BLOCK + n, np.uint8)}, n, 1) for n in range(2)])
    checked: list[int] = []
    check = ArrayFile.check
    monkeypatch.setattr(ArrayFile, "check", lambda self, n: checked.extend(n or ()) or check(self, n))
    random.seed(5)
    expected = random.Random(5).random()
    Store.open(pool, writable=False).close()
    assert len(checked) == snapshot.SAMPLED
    assert random.random() == expected  # the caller's draws are the caller's

    file = max(pool.glob("*.segment"))
    data = bytearray(file.read_bytes())
    monkeypatch.setattr(snapshot, "_sample", lambda segments: [])
    for wrong in (
        data[:-1],
        data + b"x",
        data[:-1] + bytes([data[-1] ^ 1]),
        data[:9] + bytes([data[9] ^ 1]) + data[10:],
    ):
        with altered(file, bytes(wrong)), pytest.raises(PoolDamaged, match=f"{file} has "):
            Store.open(pool, writable=False)
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with Store.open(pool, writable=False) as store:
        store.verify(store.entries[0])
        for entry in (store.entries[1], None):
            with pytest.raises(PoolDamaged, match=rf"{file} is corrupted within MiB 2 "):
                store.verify(entry)
    with Store.open(pool, writable=True, damaged="skip") as store:
        store.verify()
        assert [entry.tokens for entry in store.entries] == [0]
        assert len(store.problems) == 1
        store.commit(store.entries)
    assert (pool / f"{file.name}.damaged").read_bytes() == data
    monkeypatch.undo()
    file = next(pool.glob("*.segment"))
    data = bytearray(file.read_bytes())
    for place in range(5000, len(data) - 5000, BLOCK // 2):
        data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(PoolDamaged, match="is corrupted"):
        Store.open(pool, writable=False)


def test_a_segment_in_the_place_of_another_is_found(pool: Path) -> None:
    first, second = sorted(pool.glob("*.segment"))
    with altered(first, second.read_bytes()), pytest.raises(PoolDamaged, match=f"{first} is not the file"):
        Store.open(pool, writable=False)


def test_a_bad_disk_is_damage_and_other_failures_are_not(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Callable[..., Any]:
        def pread(*_: Any) -> bytes:
            raise OSError(number, os.strerror(number))

        return pread

    monkeypatch.setattr(os, "pread", fail(5))
    with pytest.raises(PoolDamaged, match="cannot be read"):
        Store.open(pool, writable=False)
    monkeypatch.setattr(os, "pread", fail(24))
    with pytest.raises(OSError, match="Too many open files"):
        Store.open(pool, writable=False, damaged="skip")


# Crashes


class Crash(BaseException):
    """The process ends here."""


class Fuse:
    """Ends the process before, within or after its n-th change of the directory; nothing changes after that."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None, moment: str) -> None:
        self.trace: list[tuple[str, tuple[Any, ...], Any]] = []
        self.at, self.moment = at, moment
        for name in OPERATIONS:
            patch.setattr(files, name, self._wrap(name, getattr(files, name)))

    def _wrap(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            number = len(self.trace)
            if self.at is not None and number > self.at:
                raise Crash
            self.trace.append((name, arguments, None))
            struck = number == self.at
            if struck and self.moment == "within" and name in ("write", "overwrite"):
                operation(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            if struck and self.moment != "after":
                raise Crash
            result = operation(*arguments)
            self.trace[number] = (name, arguments, result)
            if struck:
                raise Crash
            return result

        return wrapped


def change(pool: Path) -> None:
    """Open a directory with leftovers, and make a commit of every kind of change."""
    with Store.open(pool, writable=True) as store:
        store.commit([store.entries[1], new(40), new(50)], settings={"new": 1}, state=b"new")


def repair(pool: Path) -> None:
    """Open what is left of a pool, and make a commit without the damaged segment."""
    with Store.open(pool, writable=True, damaged="skip") as store:
        store.commit([*store.entries, new(40)])


def start(path: Path) -> Path:
    """A pool, and what a killed writer left in it."""
    make(path, [20, 31])
    (path / "00000009-000-0123abcd.segment").write_bytes(b"x")
    (path / "manifest.json.tmp").write_bytes(b"x")
    return path


def trace_of(pool: Path, act: Callable[[Path], None]) -> list[tuple[str, tuple[Any, ...], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        fuse = Fuse(patch, None, "never")
        act(pool)
    return fuse.trace


@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, moment: str) -> None:
    template = start(tmp_path / "template")
    before, after = (SETTINGS, b"learnt", [20, 31]), ({"new": 1}, b"new", [31, 40, 50])
    operations = len(trace_of(shutil.copytree(template, tmp_path / "full"), change))
    assert operations > 25
    outcomes = []
    for at in range(operations):
        pool = shutil.copytree(template, tmp_path / f"{moment}-{at}")
        with pytest.MonkeyPatch.context() as patch:
            Fuse(patch, at, moment)
            with pytest.raises(Crash):
                change(pool)
        outcomes.append(seen(pool))
        with Store.open(pool, writable=True) as store:
            assert contents(store) == outcomes[-1]
            assert listing(pool) == named(store)
            store.commit([*store.entries, new(60)])
            assert listing(pool) == named(store)
        assert seen(pool)[2] == [*outcomes[-1][2], 60]
    assert {str(outcome) for outcome in outcomes} == {str(before), str(after)}
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome == after)  # never back again


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("kind", ["json", "segment", "state"])
def test_a_crash_during_repair_loses_neither_the_rest_nor_the_damaged(tmp_path: Path, kind: str, moment: str) -> None:
    template = make(tmp_path / "template", [20, 31])
    damaged = min(template.glob(f"*.{kind}"))
    damaged.write_bytes(damaged.read_bytes()[:-3])
    left = [31] if kind == "segment" else [20, 31]
    for at in range(len(trace_of(shutil.copytree(template, tmp_path / "full"), repair))):
        pool = shutil.copytree(template, tmp_path / f"{moment}-{at}")
        with pytest.MonkeyPatch.context() as patch:
            Fuse(patch, at, moment)
            with pytest.raises(Crash):
                repair(pool)
        repair(pool)
        with Store.open(pool, writable=False) as store:
            # Without a manifest, a segment that was written and not yet committed counts.
            assert contents(store)[2] in ([*left, 40], [*left, 40, 40])
            assert listing(pool) == named(store) | {damaged.name + ".damaged"}
        assert (pool / f"{damaged.name}.damaged").read_bytes() == damaged.read_bytes()


@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_crash_while_creating_leaves_nothing_in_the_way(tmp_path: Path, moment: str) -> None:
    for at in range(len(trace_of(tmp_path / "full", lambda path: Store.create(path, {}).close()))):
        pool = tmp_path / f"{moment}-{at}"
        with pytest.MonkeyPatch.context() as patch:
            Fuse(patch, at, moment)
            with pytest.raises(Crash):
                Store.create(pool, SETTINGS)
        with contextlib.suppress(PoolNotFound):
            assert seen(pool) == (SETTINGS, None, [])
            continue
        make(pool, [1])
        assert seen(pool)[2] == [1]


@pytest.mark.parametrize("act", [change, lambda path: make(path / "inner", [5]) and None])
def test_nothing_is_named_before_it_is_on_the_disk(tmp_path: Path, act: Callable[[Path], None]) -> None:
    """A kill does not show it, a power cut would: each rename waits for what it relies on."""
    path_of: dict[int, Path] = {}
    dirty: set[Path] = set()  # contents, or names, that a power cut could still lose
    for name, arguments, result in trace_of(start(tmp_path / "pool"), act):
        if name == "create":
            path_of[result] = arguments[0]
        elif name in ("write", "overwrite"):
            dirty.add(path_of[arguments[0]])
        elif name == "sync":
            dirty.discard(path_of[arguments[0]])
        elif name == "sync_directory":
            dirty = {file for file in dirty if file.parent != arguments[0] or file.suffix == ".tmp"}
        elif name == "replace":
            assert arguments[0] not in dirty
            assert arguments[1].name != manifest.FILE or not dirty
            dirty.add(arguments[1])
        elif name == "remove":
            assert not dirty
    assert not dirty


# Kills


def churn(pool: Path, seed: int, pipe: int) -> None:
    """Commit without end; say what is to be committed, and that it was."""
    draw = random.Random(seed)
    with Store.open(pool, writable=True) as store:
        while True:
            kept = [entry for entry in store.entries if draw.random() < 0.7][-5:]
            added = [draw.randrange(600_000) for _ in range(draw.randrange(3))]
            state = str(draw.random()).encode() if draw.random() < 0.5 else None
            tokens = [entry.tokens for entry in kept] + added
            say(pipe, {"plan": tokens, "state": (state or store.state() or b"").decode()})
            store.commit([*kept, *map(new, added)], state=state)
            say(pipe, {"done": store.generation})


def say(pipe: int, what: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(what).encode() + b"\n")


@pytest.mark.parametrize("first", range(0, KILLS, 50))
def test_nothing_acknowledged_is_lost_by_kills(tmp_path: Path, first: int) -> None:
    pool = make(tmp_path / "pool", [1, 2])
    draw, struck = random.Random(first), 0
    last = {"plan": [1, 2], "state": "learnt"}
    for seed in range(first, min(first + 50, KILLS)):
        with forked(functools.partial(churn, pool, seed)) as (process, pipe):
            lines = lines_in(pipe)
            said = list(itertools.islice(lines, draw.randrange(8)))
            until = time.perf_counter() + draw.random() * 0.008
            while time.perf_counter() < until:
                pass
            kill(process)
            said += lines
        plan = None
        for line in map(json.loads, said):
            if "plan" in line:
                plan = line
            else:
                last, plan = plan, None
        struck += plan is not None
        with Store.open(pool, writable=seed % 2 == 0) as store:
            store.verify()
            _, state, tokens = contents(store)
            got = {"plan": tokens, "state": state.decode()}
            assert got in (last, plan)
            assert seed % 2 or listing(pool) == named(store)
        last = got
    assert struck >= 10  # in the middle of a commit
