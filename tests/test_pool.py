"""The pool against a list of documents: limits, files, threads, processes, kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pools import (
    ALPHABETS,
    Document,
    Twin,
    answers,
    collections,
    die_like_a_process,
    documents_of,
    forked,
    held,
    kill,
    tokens_in,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lookahead.errors import InvalidArgument, PoolBusy, PoolDamaged, PoolError, PoolMismatch, PoolNotFound, PoolTooNew
from lookahead.pool import files, manifest
from lookahead.pool import pool as pool_module
from lookahead.pool.pool import Pool, combined
from lookahead.pool.store import Store

KILLS = 300
BATCHES = 6  # of kills
ABC = [(0, 1, 2, 0, 1), (1, 2, 3), (0, 1, 3, 3)]


def once(documents: Sequence[Sequence[int]]) -> list[Document]:
    """What a pool without limits keeps of documents."""
    return [document for document in dict.fromkeys(map(tuple, documents)) if document]


def filled(path: Path | None, documents: Sequence[Sequence[int]], **options: Any) -> Pool:
    """A pool with every document in a segment of its own, as far as they are not merged."""
    pool = Pool(path, **options)
    for document in documents:
        pool.add(document)
        pool.flush()
    pool.settle()
    return pool


def numbered(first: int, count: int, length: int = 4) -> list[Document]:
    """Documents that are told apart by their first token, with a tail that they share."""
    return [(10 + n, *(k % 3 for k in range(length - 1))) for n in range(first, first + count)]


contexts = st.lists(st.integers(0, 4), max_size=36)


# --- answers ----------------------------------------------------------------------------------------------------


@given(collections, st.lists(contexts, max_size=4), st.integers(0, 33), st.integers(1, 20))
def test_answers_equal_naive(documents: list[Document], asked: list[list[int]], length: int, live: int) -> None:
    pool = Pool(live_tokens=live)
    for i, document in enumerate(documents):
        assert pool.add(document) == (document != () and document not in documents[:i])
        if i % 3 == 1:
            pool.snapshot()
    kept = once(documents)
    twin = Twin(kept)
    assert (pool.documents, pool.tokens) == (len(kept), tokens_in(kept))
    assert held(pool) == kept
    for context in [*asked, *(document[: length + 3] for document in documents)]:
        assert pool.longest_match(context) == twin.longest(context[::-1])
        assert pool.successors(context) == twin.successors(context)
        assert pool.successors(context, length) == twin.successors(context, length)
    pool.settle()


@given(collections, st.lists(contexts, max_size=3), st.integers(1, 20))
@settings(max_examples=40)
def test_a_reloaded_pool_answers_as_before(documents: list[Document], asked: list[list[int]], live: int) -> None:
    asked = [*asked, *map(list, documents)]
    with tempfile.TemporaryDirectory() as path:
        with Pool(path, live_tokens=live) as pool:
            for document in documents:
                pool.add(document)
            before, kept = answers(pool, asked), held(pool)
        for read_only in (True, False):
            with Pool.open(path, read_only=read_only) as again:
                assert (answers(again, asked), held(again)) == (before, kept)
                assert (again.documents, again.tokens) == (pool.documents, pool.tokens)
                assert read_only or not any(again.add(document) for document in documents)
        with Pool(path) as again:
            again.compact()
            assert (answers(again, asked), held(again)) == (before, kept)
            assert len(again.segments) == min(len(kept), 1)
        assert answers(pool, asked) == before  # closed, and its files replaced


def test_a_merged_pool_holds_what_one_built_at_once_holds(tmp_path: Path) -> None:
    documents = [(n % 7, *range(n % 5), n) for n in range(60)]
    merged, whole = filled(tmp_path / "a", documents), Pool()
    for document in documents:
        whole.add(document)
    assert len(merged.segments) < 12
    merged.compact()
    whole.compact()
    for a, b in zip(merged.segments[0].run, whole.segments[0].run, strict=True):
        assert np.array_equal(a, b)
    merged.close()


def test_pools_are_asked_together() -> None:
    pools = [filled(None, [document]) for document in ABC]
    runs, views = combined(pools)
    assert len(runs) == len(views) == 3
    assert combined(pools[:1]) is pools[0].snapshot()
    assert combined([]).runs == ()


def test_an_empty_pool_answers() -> None:
    pool = Pool()
    assert (pool.longest_match([1]), pool.successors([1]), pool.successors([], 0)) == (0, Counter(), Counter())
    pool.add([1])
    assert (pool.longest_match([]), pool.successors([])) == (0, Counter({1: 1}))
    assert pool.add([]) is False


def test_documents_are_known_by_their_digest(tmp_path: Path) -> None:
    with Pool(tmp_path) as pool:
        assert pool.add([1, 2], digest=7)
        assert not pool.add([3, 4], digest=7)
        assert pool.add([1, 2], digest=(1 << 64) - 1)
        assert 7 in pool
        assert 8 not in pool
    with Pool(tmp_path) as pool:
        assert 7 in pool
        assert (1 << 64) - 1 in pool
        assert not pool.add([5], digest=7)


# --- limits -----------------------------------------------------------------------------------------------------


def assert_youngest(pool: Pool, added: Sequence[Document]) -> None:
    """The pool holds the youngest of what was added, in order, and no less than its limit makes necessary."""
    kept = held(pool)
    assert kept == list(added[len(added) - len(kept) :])
    spare = pool.max_tokens // 8 + max(map(len, added), default=0)
    assert len(kept) == len(added) or tokens_in(kept) >= pool.max_tokens - spare


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 120), st.integers(1, 60), st.booleans())
@settings(max_examples=60)
def test_the_limit_holds_whatever_is_added(sizes: list[int], limit: int, live: int, ask: bool) -> None:
    pool, added = Pool(max_tokens=limit, live_tokens=live), []
    for n, size in enumerate(sizes):
        added.append(tuple(range(n, n + size)))
        assert pool.add(added[-1])
        assert pool.tokens <= limit + pool.live_tokens + max(sizes)
        if ask:
            pool.snapshot()
    pool.settle()
    assert pool.tokens <= limit + pool.live_tokens
    pool.flush()
    assert pool.tokens <= limit
    assert_youngest(pool, added)


def test_live_tokens_are_written_without_being_asked(tmp_path: Path) -> None:
    pool = Pool(tmp_path, live_tokens=10)
    for document in numbered(0, 6):
        pool.add(document)
    pool.settle()
    assert pool.documents - sum(len(segment.run.ends) for segment in pool.segments) < 3
    pool.close()


def test_the_limit_is_kept_with_the_pool(tmp_path: Path) -> None:
    documents = numbered(0, 20)
    filled(tmp_path, documents, max_tokens=40).close()
    for read_only in (True, False):
        with Pool(tmp_path, read_only=read_only) as pool:
            assert pool.max_tokens == 40
            assert pool.live_tokens <= 40
    pool = filled(tmp_path, numbered(20, 1), max_tokens=12)
    assert pool.tokens <= 12
    pool.close()
    assert Pool(tmp_path, read_only=True).max_tokens == 12


@pytest.mark.parametrize("limit", [1, 3_000, 20_000])
def test_the_limit_in_bytes(tmp_path: Path, limit: int) -> None:
    rng = random.Random(limit)
    documents = [tuple(rng.randrange(90) for _ in range(rng.choice([2, 300]))) for _ in range(40)]
    pool = filled(tmp_path, documents, max_bytes=limit)
    assert pool.nbytes <= limit
    kept = held(pool)
    assert kept == documents[len(documents) - len(kept) :]
    assert limit == 1 or kept
    assert sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= 2 * limit + 20_000
    pool.close()


@given(
    st.lists(st.tuples(st.integers(1, 80), st.sampled_from([0, 9, 900, 9_000])), max_size=12),
    st.integers(1, 60_000),
    st.integers(1, 90),
)
@settings(max_examples=60)
def test_the_limit_in_bytes_holds_whatever_is_added(sizes: list[tuple[int, int]], limit: int, live: int) -> None:
    pool = Pool(max_bytes=limit, live_tokens=live)
    added = [tuple(range(first + n, first + n + size)) for n, (size, first) in enumerate(sizes)]
    for document in added:
        pool.add(document)
    pool.flush()
    assert pool.nbytes <= limit
    kept = held(pool)
    assert kept == added[len(added) - len(kept) :]
    assert kept or not added or filled(None, added[-1:]).nbytes > limit // 2


@pytest.mark.parametrize("left", [0, 1, 7, 8, 50, 1_000])
def test_pruning_keeps_the_youngest(tmp_path: Path, left: int) -> None:
    documents = numbered(0, 12)
    pool = filled(tmp_path, documents)
    went = pool.prune(left)
    kept = held(pool)
    assert kept == documents[len(documents) - len(kept) :]
    assert len(kept) == min(left // 4, 12)
    assert went == tokens_in(documents) - tokens_in(kept)
    pool.close()
    with Pool(tmp_path) as pool:
        assert held(pool) == kept
        assert pool.add(documents[0]) == (len(kept) < 12)


def test_compaction_leaves_one_segment(tmp_path: Path) -> None:
    pool = filled(tmp_path, numbered(0, 6))
    pool.add([1, 2])
    before = held(pool)
    assert len(pool.segments) > 1
    pool.compact()
    assert len(pool.segments) == 1
    assert held(pool) == before
    assert len(list(tmp_path.glob("*.segment"))) == 1
    pool.close()


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [[1.5], [-1], [[1, 2], [3, 4]], [(1 << 24) - 1], [1 << 70], "text", 5, [True], [None], [[1, 2], [3]], np.array(3)],
)
def test_what_is_no_sequence_of_tokens_is_refused(tokens: Any) -> None:
    pool = Pool()
    for use in (pool.add, pool.longest_match, pool.successors):
        with pytest.raises(InvalidArgument):
            use(tokens)
    assert pool.documents == 0
    assert pool.add([(1 << 24) - 2])


@pytest.mark.parametrize("digest", [-1, 1 << 64, 1.5, "a"])
def test_a_digest_that_is_none_is_refused(digest: Any) -> None:
    pool = Pool()
    with pytest.raises(InvalidArgument):
        pool.add([1, 2], digest=digest)
    assert pool.add([1, 2])
    assert pool.longest_match([1, 2]) == 2


@pytest.mark.parametrize("name", ["max_tokens", "max_bytes", "live_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "9"])
def test_limits_that_make_no_sense_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Pool(tmp_path / "pool", **{name: value})
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("value", [-1, 1.5, True, "9", None])
def test_pruning_to_what_makes_no_sense_is_refused(value: Any) -> None:
    pool = filled(None, ABC)
    with pytest.raises(InvalidArgument, match="max_tokens"):
        pool.prune(value)
    assert held(pool) == ABC


@pytest.mark.parametrize("length", [-1, 1.5])
def test_lengths_that_make_no_sense_are_refused(length: Any) -> None:
    with pytest.raises(InvalidArgument, match="length"):
        filled(None, ABC).successors([1, 2], length)


def test_a_closed_pool_takes_nothing_and_answers(tmp_path: Path) -> None:
    pool = filled(tmp_path, ABC)
    before = answers(pool, ABC)
    pool.close()
    pool.close()
    for act in (lambda: pool.add([1]), pool.flush, pool.compact, lambda: pool.prune(1)):
        with pytest.raises(PoolError, match="closed"):
            act()
    assert answers(pool, ABC) == before


def test_there_is_no_pool(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("all of it")
    for name in ("none", "empty", "foreign"):
        for act in (lambda path: Pool.open(path), lambda path: Pool(path, read_only=True)):
            with pytest.raises(PoolNotFound, match=name):
                act(tmp_path / name)
    with pytest.raises(PoolNotFound):
        Pool(tmp_path / "foreign")
    assert [file.name for file in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
    with pytest.raises(InvalidArgument):
        Pool(read_only=True)
    Pool(tmp_path / "empty").close()
    assert Pool.open(tmp_path / "empty").documents == 0


def test_a_pool_of_which_only_the_lock_was_made_is_made(tmp_path: Path) -> None:
    """What a process leaves that is killed between the lock and the manifest."""
    (tmp_path / "lock").touch()
    (tmp_path / "lock.pid").write_text("1 on somewhere")
    (tmp_path / (manifest.FILE + files.TEMPORARY)).write_text("{")
    with Pool(tmp_path) as pool:
        assert pool.add([1, 2])
    assert Pool.open(tmp_path).documents == 1


# --- tokenizers -------------------------------------------------------------------------------------------------


def word_tokenizer(*words: str) -> Tokenizer:
    return Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))


def test_a_pool_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    ours, others = word_tokenizer("a", "b", "c"), word_tokenizer("a", "c", "b")
    Pool(tmp_path, tokenizer=ours).close()
    for read_only in (False, True):
        with pytest.raises(PoolMismatch, match=str(tmp_path)):
            Pool(tmp_path, tokenizer=others, read_only=read_only)
        Pool(tmp_path, tokenizer=word_tokenizer("a", "b", "c"), read_only=read_only).close()
        Pool(tmp_path, read_only=read_only).close()
    more = word_tokenizer("a", "b", "c")
    more.add_special_tokens(["<tool>"])
    with pytest.raises(PoolMismatch):
        Pool(tmp_path, tokenizer=more)


def test_a_pool_without_a_tokenizer_takes_the_first(tmp_path: Path) -> None:
    filled(tmp_path, ABC).close()
    Pool(tmp_path, tokenizer=word_tokenizer("a", "b"), read_only=True).close()
    with Pool(tmp_path, tokenizer=word_tokenizer("a", "b")) as pool:
        assert "tokenizer" in pool.settings
        assert held(pool) == ABC
    with pytest.raises(PoolMismatch):
        Pool(tmp_path, tokenizer=word_tokenizer("b", "a"))


def test_a_pool_is_asked_for_its_tokenizer(tmp_path: Path) -> None:
    ours, others = word_tokenizer("a", "b"), word_tokenizer("b", "a")
    for path in (None, tmp_path):
        pool = Pool(path)
        pool.require(None)
        pool.require(ours)
        pool.require(ours)
        with pytest.raises(PoolMismatch, match="memory" if path is None else str(path)):
            pool.require(others)
        pool.close()
    with pytest.raises(PoolMismatch):
        Pool(tmp_path, read_only=True).require(others)
    Pool(tmp_path, read_only=True).require(ours)


# --- writers and readers ----------------------------------------------------------------------------------------


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    with filled(tmp_path, ABC) as pool:
        for open_ in (Pool, Pool.open):
            with pytest.raises(PoolBusy, match=str(os.getpid())):
                open_(tmp_path)
        program = "import sys; from lookahead.pool.pool import Pool; Pool(sys.argv[1])"
        other = run_python(program, tmp_path)
        assert other.returncode == 1
        assert "PoolBusy" in other.stderr
        assert str(os.getpid()) in other.stderr
        pool.add([4, 4])
    Pool(tmp_path).close()


def test_a_reader_follows_the_writer(tmp_path: Path) -> None:
    with filled(tmp_path, ABC[:1]) as pool, Pool(tmp_path, read_only=True) as reader:
        assert held(reader) == ABC[:1]
        assert not reader.refresh()
        assert not pool.refresh()
        pool.add(ABC[1], digest=5)
        assert not reader.refresh()
        snapshot = reader.snapshot()
        pool.flush()
        pool.settle()
        assert 5 not in reader
        assert reader.refresh()
        assert held(reader) == ABC[:2]
        assert 5 in reader
        pool.compact()
        pool.prune(3)
        assert held(reader) == ABC[1:2], "seen without being told"
        assert not reader.refresh()
        assert snapshot.runs[0].tokens == len(ABC[0])
        for act in (lambda: reader.add([1]), reader.flush, reader.compact, lambda: reader.prune(0)):
            with pytest.raises(PoolError, match="reading only"):
                act()


def test_snapshots_stay_as_they_were(tmp_path: Path) -> None:
    pool = Pool(tmp_path, max_tokens=200, live_tokens=20)
    kept = []
    for document in numbered(0, 120):
        pool.add(document)
        if document[0] % 10 == 0:
            kept.append((pool.snapshot(), held(pool)))
    pool.compact()
    pool.prune(0)
    pool.close()
    for (runs, views), documents in kept:
        other = Pool()
        other._shelf._snapshot = pool_module.Snapshot(runs, views)
        assert held(other) == documents
        assert other.successors([0, 1, 2]) == Twin(documents).successors([0, 1, 2])
    assert pool.tokens == 0


def test_calibration_is_kept_with_commits(tmp_path: Path) -> None:
    with Pool(tmp_path) as pool:
        assert pool.calibration is None
        learnt = [b"first"]
        pool.keep_calibration(lambda: learnt[0])
        pool.add([1, 2])
        pool.flush()
        assert pool.calibration == b"first"
        learnt[0] = b"second"
        pool.add([3])
    for read_only in (True, False):
        assert Pool(tmp_path, read_only=read_only).calibration == b"second"
    with Pool(tmp_path) as pool:
        pool.add([4])
        pool.compact()
        assert pool.calibration == b"second"
    assert Pool().calibration is None


# --- damage -----------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip_in_header(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[60] ^= 0x40
    file.write_bytes(raw)


def flip(file: Path) -> None:
    """Change a byte of the last array."""
    raw = bytearray(file.read_bytes())
    raw[-68] ^= 0x40
    file.write_bytes(raw)


@pytest.mark.parametrize("spoil", [truncate, flip, flip_in_header, Path.unlink])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_damage_is_named_and_the_rest_is_usable(tmp_path: Path, spoil: Callable[[Path], Any], which: int) -> None:
    filled(tmp_path, ABC).close()
    file = sorted(tmp_path.glob("*.segment"))[which]
    spoil(file)
    for read_only in (False, True):
        with pytest.raises(PoolDamaged, match=file.name):
            Pool(tmp_path, read_only=read_only)
    rest = [document for i, document in enumerate(ABC) if i != which]
    with Pool(tmp_path, damaged="skip", read_only=True) as reader:
        assert held(reader) == rest
        assert file.name in str(reader.problems[0])
    with Pool(tmp_path, damaged="skip") as pool:
        assert held(pool) == rest
        assert answers(pool, ABC) == answers(filled(None, rest), ABC)
        assert pool.add(ABC[which])
    with Pool(tmp_path) as pool:
        assert held(pool) == [*rest, ABC[which]]
        assert pool.problems == ()


def test_damage_that_is_found_later_is_left_out(tmp_path: Path) -> None:
    filled(tmp_path, ABC).close()
    file = sorted(tmp_path.glob("*.segment"))[1]
    for damaged in ("raise", "skip"):
        pool = Pool(tmp_path, damaged=damaged)  # type: ignore[arg-type]
        assert not pool.add(ABC[1])
        flip(file)
        if damaged == "raise":
            with pytest.raises(PoolDamaged, match=file.name):
                pool.verify()
            flip(file)
        else:
            pool.verify()
            assert held(pool) == [ABC[0], ABC[2]]
            assert pool.add(ABC[1])
            pool.compact()
        pool.close()
    assert held(Pool(tmp_path)) == [ABC[0], ABC[2], ABC[1]]


def test_damage_that_merging_meets_is_an_error_of_ours(tmp_path: Path) -> None:
    pool = filled(tmp_path, ABC)
    segment = pool.segments[1]
    rows = np.zeros_like(segment.run.back)
    bad = pool_module.Segment(segment.run._replace(back=rows), segment.entry)
    pool._shelf.segments = (pool.segments[0], bad, pool.segments[2])
    assert segment.entry is not None
    with pytest.raises(PoolDamaged, match=segment.entry.name):
        pool.compact()
    pool.close()
    assert held(Pool(tmp_path)) == ABC


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    filled(tmp_path, ABC).close()
    content = json.loads((tmp_path / manifest.FILE).read_text())
    (tmp_path / manifest.FILE).write_text(json.dumps({**content, "format": manifest.FORMAT + 1}))
    for options in ({}, {"read_only": True}, {"damaged": "skip"}):
        with pytest.raises(PoolTooNew, match=manifest.FILE):
            Pool(tmp_path, **options)


# --- failures ---------------------------------------------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> None:
    raise OSError("no room left")


@pytest.mark.parametrize("act", ["flush", "add", "compact", "prune", "close"])
def test_a_failure_in_the_background_is_told_once(tmp_path: Path, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = filled(tmp_path, ABC, live_tokens=10)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", refuse)
        pool.add(range(20, 40))
        pool._shelf._worker.join()
    use: dict[str, Callable[[], Any]] = {
        "add": lambda: pool.add(range(50, 70)),
        "prune": lambda: pool.prune(100),
        **{name: getattr(pool, name) for name in ("flush", "compact", "close")},
    }
    with pytest.raises(PoolError, match="no room left"):
        use[act]()
    everything = [*ABC, tuple(range(20, 40)), *([tuple(range(50, 70))] if act == "add" else [])]
    if act == "close":
        assert held(Pool(tmp_path)) == everything
        return
    assert held(pool) == everything
    pool.flush()
    pool.close()
    assert held(Pool(tmp_path)) == everything


@pytest.mark.parametrize("act", ["flush", "compact", "prune"])
@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("error", [OSError("no room left"), KeyboardInterrupt()])
def test_a_commit_that_fails_leaves_a_pool_that_works(
    tmp_path: Path, act: str, committed: bool, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it fails after the manifest was replaced."""
    pool = filled(tmp_path, ABC[1:])
    pool.add([7, 7])
    if act != "flush":
        pool.flush()
        pool.settle()
    publish = manifest.publish

    def failing(directory: Path, what: Any) -> None:
        if committed:
            publish(directory, what)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "publish", failing)
        with pytest.raises((PoolError, KeyboardInterrupt)):
            pool.prune(4) if act == "prune" else getattr(pool, act)()
    everything = [*ABC[1:], (7, 7)]
    assert held(pool) == everything or (act == "prune" and committed)
    before = held(pool)
    assert pool.add([8, 8])
    pool.flush()
    pool.settle()
    assert held(pool) == [*before, (8, 8)]
    pool.close()
    assert held(Pool(tmp_path)) == [*before, (8, 8)]


def test_what_waits_is_written_when_the_process_ends(tmp_path: Path) -> None:
    program = "import sys; from lookahead.pool.pool import Pool; pool = Pool(sys.argv[1]); pool.add([1, 2, 3])"
    assert run_python(program, tmp_path / "pool").returncode == 0
    assert held(Pool(tmp_path / "pool")) == [(1, 2, 3)]


def test_what_is_added_while_writing_stays(tmp_path: Path) -> None:
    pool, late = Pool(tmp_path), numbered(90, 9)
    early = numbered(0, 3)
    for document in early:
        pool.add(document)
        pool.snapshot()  # each of them is a run now

    def current() -> bytes:
        for document in late:
            pool.add(document)
            pool.snapshot()
        return b""

    pool.keep_calibration(current)
    pool.flush()
    assert held(pool) == early + late
    pool.keep_calibration(lambda: b"")
    pool.close()
    assert held(Pool(tmp_path)) == early + late


def test_what_is_added_while_the_oldest_leave_is_known(tmp_path: Path) -> None:
    documents = numbered(0, 4, 100)
    pool, late, taken = filled(tmp_path, documents, max_tokens=400), (7, 7), []

    def current() -> bytes:
        taken.append(pool.add(late))
        return b""

    pool.keep_calibration(current)
    pool.add(range(50))
    pool.flush()
    assert not pool.add(late)
    assert held(pool) == [*documents[1:], tuple(range(50)), late]
    assert pool.add(documents[0])
    assert taken == [True, *[False] * (len(taken) - 1)]
    pool.settle()
    pool.keep_calibration(lambda: b"")
    pool.close()


# --- threads and processes --------------------------------------------------------------------------------------


def in_threads(*acts: Callable[[], None]) -> None:
    """Run all at once; raise what the first of them raised."""
    failures: list[BaseException] = []

    def guarded(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "they wait for each other"
    if failures:
        raise failures[0]


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads take turns far more often than usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("live", [5, 40])
def test_several_threads_add_and_nothing_is_lost(tmp_path: Path, on_disk: bool, live: int) -> None:
    pool = Pool(tmp_path if on_disk else None, live_tokens=live)
    count = 60 if on_disk else 150

    def adder(k: int) -> Callable[[], None]:
        def act() -> None:
            for i, document in enumerate(numbered(k * count, count)):
                assert pool.add(document)
                if i % 7 == k:
                    pool.snapshot()
                if i % 23 == 11:
                    pool.flush()
                if i % 41 == 17:
                    pool.compact()

        return act

    def set_up() -> None:
        for number in range(30):
            pool._shelf.keep_setting("number", number)

    in_threads(set_up, *(adder(k) for k in range(3)))
    pool.settle()
    assert sorted(held(pool)) == sorted(numbered(0, 3 * count))
    pool.close()
    if on_disk:
        assert sorted(held(Pool(tmp_path))) == sorted(numbered(0, 3 * count))


@pytest.mark.usefixtures("switching")
def test_several_threads_add_the_same(tmp_path: Path) -> None:
    pool = Pool(tmp_path, live_tokens=12, max_tokens=100_000)
    documents, taken = numbered(0, 80), Counter[Document]()
    lock = threading.Lock()

    def act() -> None:
        for document in documents:
            if pool.add(document):
                with lock:
                    taken[document] += 1

    in_threads(act, act)
    pool.settle()
    assert set(taken.values()) == {1}
    assert sorted(held(pool)) == documents
    pool.close()


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("after", range(0, 60, 12))
def test_what_was_taken_before_closing_is_there(tmp_path: Path, after: int) -> None:
    pool, taken = Pool(tmp_path, live_tokens=12), []
    reached = threading.Event()

    def add_all() -> None:
        for document in numbered(0, 100_000):
            pool.add(document)
            taken.append(document)
            if len(taken) > after:
                reached.set()

    def add() -> None:
        with pytest.raises(PoolError, match="closed"):
            add_all()

    def close() -> None:
        assert reached.wait(30)
        pool.close()

    in_threads(add, close)
    found = held(Pool(tmp_path))
    # Closing may come between taking the last one and saying so.
    assert found[: len(taken)] == taken
    assert len(found) <= len(taken) + 1


@pytest.mark.usefixtures("switching")
def test_threads_ask_while_one_writes(tmp_path: Path) -> None:
    pool = Pool(tmp_path, live_tokens=12, max_tokens=300)
    documents, done, asked = numbered(0, 250), threading.Event(), [0]
    known = set(documents)

    def write() -> None:
        try:
            for i, document in enumerate(documents):
                pool.add(document)
                if i % 40 == 39:
                    pool.flush()
        finally:
            done.set()

    def ask() -> None:
        while not done.is_set() or asked[0] == 0:
            assert set(held(pool)) <= known
            counts = pool.successors([0, 1], 2)
            assert set(counts) <= {2}
            assert counts[2] <= pool.max_tokens
            asked[0] += 1

    in_threads(write, ask, ask)
    assert_youngest(pool, documents)
    pool.close()


def test_processes_read_while_one_writes(tmp_path: Path) -> None:
    first = numbered(0, 10)
    filled(tmp_path, first, max_tokens=160).close()
    order = {document: n for n, document in enumerate(numbered(0, 200))}

    def read(pipe: int) -> None:
        seen = -1
        with Pool(tmp_path, read_only=True) as reader:
            while seen < 199:
                there, found = held(reader), reader.successors([0, 1], 2)[2]
                numbers = [order[document] for document in there]
                assert numbers == list(range(numbers[0], numbers[-1] + 1))
                assert numbers[-1] >= seen
                assert found == len(numbers) or held(reader) != there, "one state at a time"
                seen = numbers[-1]
        os.write(pipe, b"all")

    answers(Pool(tmp_path, read_only=True), ABC)  # compiled before the fork
    with forked(read) as (_, one), forked(read) as (_, two):
        with Pool(tmp_path, max_tokens=160, live_tokens=16) as pool:
            for document in numbered(10, 190):
                pool.add(document)
                pool.flush()
        assert os.read(one, 10) == os.read(two, 10) == b"all"


def test_a_forked_child_leaves_its_parents_pool_alone(tmp_path: Path) -> None:
    pool = filled(tmp_path, ABC)
    pool.add([6, 6])

    def child(pipe: int) -> None:
        with pytest.raises(PoolError):
            pool.flush()
        pool.__del__()
        os.write(pipe, b"done")

    with forked(child) as (_, pipe):
        assert os.read(pipe, 10) == b"done"
    pool.flush()
    pool.close()
    assert held(Pool(tmp_path)) == [*ABC, (6, 6)]


# --- a model ----------------------------------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """A pool on disk beside a list of documents: what was added, less the oldest."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.added: list[Document] = []  # that may be in the pool, in order
        self.safe = 0  # how many of them are on the disk for sure
        self.kept: list[tuple[Any, list[Document]]] = []
        self.pruned = False
        self.reader: Pool | None = None

    @initialize(
        limit=st.sampled_from([12, 60, 400]), live=st.sampled_from([1, 8, 30]), tokens=st.sampled_from(ALPHABETS)
    )
    def start(self, limit: int, live: int, tokens: tuple[int, ...]) -> None:
        self.options = {"max_tokens": limit, "live_tokens": live}
        self.tokens = tokens
        self.pool = Pool(self.path, **self.options)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        document = data.draw(documents_of(self.tokens, 12))
        before = self.added[:]
        if self.pool.add(document):
            self.added.append(document)
            assert document
        else:
            assert document in before or not document
        assert self.pool.tokens <= self.pool.max_tokens + self.pool.live_tokens + 40

    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        self.agree()
        if self.added:
            assert not self.pool.add(data.draw(st.sampled_from(self.added)))

    @rule()
    def look(self) -> None:
        snapshot = self.pool.snapshot()
        documents = held(self.pool)
        if snapshot is self.pool.snapshot():
            self.kept.append((snapshot, documents))

    @rule()
    def flush(self) -> None:
        self.pool.flush()
        self.safe = len(self.added)

    @rule()
    def settle(self) -> None:
        self.pool.settle()

    @rule()
    def compact(self) -> None:
        self.pool.compact()
        self.safe = len(self.added)
        assert len(self.pool.segments) <= 1

    @rule(left=st.integers(0, 60))
    def prune(self, left: int) -> None:
        self.pruned = True
        before = self.pool.tokens
        went = self.pool.prune(left)
        assert self.pool.tokens <= left
        assert went <= before
        self.safe = len(self.added)
        self.agree()

    @rule(damaged=st.sampled_from(["raise", "skip"]))
    def reopen(self, damaged: Any) -> None:
        self.pool.close()
        self.safe = len(self.added)
        self.pool = Pool.open(self.path, damaged=damaged, **self.options)
        assert self.pool.problems == ()

    @rule()
    def crash(self) -> None:
        die_like_a_process(self.pool)
        self.pool = Pool.open(self.path, **self.options)
        found = held(self.pool)
        ends = range(len(self.added), self.safe - 1, -1)
        # All that was flushed, and of the rest what came first; the oldest may have left.
        end = next((end for end in ends if found and found == self.added[max(0, end - len(found)) : end]), None)
        end = self.safe if not found else end
        assert end is not None, (found, self.added, self.safe)
        self.added = self.added[:end]
        self.safe = end

    @rule()
    def read(self) -> None:
        if self.reader is None:
            self.reader = Pool.open(self.path, read_only=True)
        self.reader.refresh()
        found = held(self.reader)
        assert not found or any(
            found == self.added[i : i + len(found)] for i in range(len(self.added) - len(found) + 1)
        )

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self.agree()
        document = data.draw(st.sampled_from(self.added)) if self.added else ()
        context = [
            *document[: data.draw(st.integers(0, 12))],
            *data.draw(st.lists(st.sampled_from(self.tokens), max_size=2)),
        ]
        twin = Twin(self.added)
        assert self.pool.longest_match(context) == twin.longest(context[::-1])
        assert self.pool.successors(context) == twin.successors(context)
        assert self.pool.successors(context, 1) == twin.successors(context, 1)

    def agree(self) -> None:
        """Forget the oldest documents that the pool gave up; all else has to be there, in order, once."""
        self.pool.settle()
        found = held(self.pool)
        gone = len(self.added) - len(found)
        assert found == self.added[gone:]
        assert len(set(found)) == len(found)
        assert self.pool.documents == len(found)
        assert self.pool.tokens == tokens_in(found)
        spare = self.pool.max_tokens // 8 + max(map(len, self.added), default=0)
        assert gone == 0 or self.pruned or tokens_in(found) >= self.pool.max_tokens - spare
        self.added, self.safe = self.added[gone:], max(0, self.safe - gone)

    @invariant()
    def snapshots_stay(self) -> None:
        for (runs, views), documents in self.kept[-2:]:
            other = Pool()
            other._shelf._snapshot = pool_module.Snapshot(runs, views)
            assert held(other) == documents

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.agree()
            self.pool.close()
            assert held(Pool(self.path, read_only=True)) == self.added[len(self.added) - self.pool.documents :]
        shutil.rmtree(self.path)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=120, stateful_step_count=40)


# --- kills ------------------------------------------------------------------------------------------------------

LIMIT, LIVE = 240, 24


def texts(seed: int) -> Iterator[Document]:
    """Documents of one writer, each like no other: its first two tokens say whose it is and which."""
    draws = random.Random(seed)
    for n in range(10_000):
        yield (1_000 + seed, 2_000 + n, *(draws.randrange(3) for _ in range(draws.randrange(12))))


def write_on(path: Path, seed: int, pipe: int) -> None:
    """Add and flush until killed; say of every flush, once it is done, how many documents were added before."""
    draws = random.Random(seed)
    pool = Pool(path, max_tokens=LIMIT, live_tokens=LIVE)
    pool.keep_calibration(lambda: b"learnt" * 20)
    os.write(pipe, b"open\n")
    for count, document in enumerate(texts(seed), 1):
        pool.add(document)
        what = draws.random()
        if what < 0.05:
            pool.compact()
        elif what < 0.4:
            pool.flush()
        else:
            continue
        os.write(pipe, b"%d\n" % count)


def killed(path: Path, seed: int, draws: random.Random) -> int:
    """Let a writer be killed at some moment after some flushes; return how many documents it says are written."""
    with forked(lambda pipe: write_on(path, seed, pipe)) as (process, pipe):
        said, flushes = b"", draws.randrange(4)
        while said.count(b"\n") < 1 + flushes:
            more = os.read(pipe, 1 << 16)
            assert more, "it ended on its own"
            said += more
        time.sleep(draws.random() * 0.012)
        kill(process)
        while more := os.read(pipe, 1 << 16):
            said += more
    return max(map(int, said.split()[1:]), default=0)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_nothing_that_was_flushed_is_lost_by_kills(tmp_path: Path, batch: int) -> None:
    filled(None, ABC, max_tokens=8).compact()  # compiled before the fork
    draws = random.Random(batch)
    added: list[Document] = []
    acknowledged = 0
    for n in range(KILLS // BATCHES):
        seed = batch * KILLS + n
        written = killed(tmp_path / "pool", seed, draws)
        with Pool(tmp_path / "pool", read_only=n % 2 == 0) as pool:
            found = held(pool)
            assert pool.problems == ()
            assert pool.calibration in (None, b"learnt" * 20)
            assert all(pool.longest_match(document[:2]) == 2 for document in found)
        new = [document for document, _ in zip(texts(seed), range(written + 500), strict=False)]
        last = new.index(found[-1]) + 1 if found and found[-1] in new else 0
        assert last >= written
        added = added + new[:last]
        assert found == added[len(added) - len(found) :]
        assert len(found) == len(added) or tokens_in(found) >= LIMIT - LIMIT // 8 - 14
        added, acknowledged = found, acknowledged + written
    assert acknowledged > KILLS // BATCHES


def test_a_writer_that_is_killed_while_it_makes_a_pool_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    draws, met = random.Random(0), Counter[str]()
    for n in range(40):
        path = tmp_path / str(n)
        with forked(lambda pipe: write_on(path, 0, pipe)) as (process, _):  # noqa: B023
            time.sleep(draws.random() * 0.006)
            kill(process)
        met.update(file.name for file in path.iterdir()) if path.exists() else met.update(["nothing"])
        with Pool(path) as pool:
            pool.add((1, 2))
            assert held(pool)[-1] == (1, 2)


def test_little_is_written_too_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(tmp_path) as pool:
        pool.add([1, 2, 3])
        pool.settle()
        assert len(pool.segments) == 0
        monkeypatch.setattr("lookahead.pool.shelf.PATIENCE", -1.0)
        pool.add([4, 5, 6])
        pool.settle()
        with Pool.open(tmp_path, read_only=True) as reader:
            assert reader.documents == 2


def test_verify_sees_a_header_that_was_damaged_after_opening(tmp_path: Path) -> None:
    with Pool(tmp_path) as pool:
        pool.add([1, 2, 3])
        pool.flush()
        (file,) = tmp_path.glob("*.segment")
        content = bytearray(file.read_bytes())
        content[40] ^= 1
        file.write_bytes(content)
        with pytest.raises(PoolDamaged, match=file.name):
            pool.verify()
