"""Pools in service: readers see what a writer commits between requests, and pools take in others."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import Document, answers, collections, held
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lookahead
from lookahead.cli import main
from lookahead.errors import InvalidArgument, PoolBusy, PoolDamaged, PoolError, PoolMismatch
from lookahead.pool import manifest, snapshot
from lookahead.pool import pool as pool_module
from lookahead.pool.index import build, documents
from lookahead.pool.pool import Pool

texts = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), max_size=8)

WRITER = """
import sys
from lookahead.pool.pool import Pool

with Pool(sys.argv[1]) as pool:
    for line in sys.stdin:
        action, *numbers = line.split()
        getattr(pool, action)(*([list(map(int, numbers))] if numbers else []))
        pool.flush()
        pool.settle()
        print("done", flush=True)
"""


class Writer:
    """Another process that has the pool open for writing."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *words: Any) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*words, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n"

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def writer(tmp_path: Path) -> Any:
    one = Writer(tmp_path / "pool")
    one("add", 1, 2, 3)
    yield one
    one.close()


def test_many_read_while_one_writes_and_a_second_writer_is_refused(tmp_path: Path, writer: Writer) -> None:
    readers = [Pool.open(tmp_path / "pool", read_only=True) for _ in range(3)]
    with pytest.raises(PoolBusy, match=r"is being written by process \d+"):
        Pool(tmp_path / "pool")
    for token in range(10, 14):
        writer("add", 7, 8, token)
        assert [sorted(reader.successors([7, 8])) for reader in readers] == [list(range(10, token + 1))] * 3
    before = readers[0].snapshot()
    writer("compact")
    assert readers[0].refresh()
    assert len(readers[0].segments) == 1
    assert readers[1].successors([1, 2]) == Counter({3: 1})
    assert sum(run.tokens for run in before.runs) == 15, "what was handed out stays"
    for reader in readers:
        reader.close()
    with pytest.raises(PoolError, match="was closed"):
        readers[0].refresh()


def test_a_model_drafts_from_what_another_process_has_just_written(tmp_path: Path, writer: Writer) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=128, **sizes)).eval()
    reader = Pool.open(tmp_path / "pool", read_only=True)
    ids = lookahead.generate(model, **prompt(), nodes=0, max_new_tokens=24)
    la = lookahead.Lookahead(model, pool=reader, sources=("pool",), nodes=8)

    def passes() -> int:
        assert la.generate(**prompt(), max_new_tokens=24).equal(ids)
        assert la.last is not None
        return len(la.last.passes)

    assert passes() > 20, "the pool knows nothing of it"
    writer("add", *ids[0].tolist())
    assert passes() < 10


def prompt() -> dict[str, Any]:
    ids = torch.tensor([[5, 9, 3, 7, 5, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}


def test_nothing_new_costs_no_look_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool(tmp_path / "pool").close()
    reader = Pool.open(tmp_path / "pool", read_only=True)
    reader.refresh()
    reads: list[Path] = []
    real = snapshot.manifest_bytes
    monkeypatch.setattr(snapshot, "manifest_bytes", lambda path: reads.append(path) or real(path))
    for _ in range(5):
        reader.snapshot()
    assert reads == []
    with Pool(tmp_path / "pool") as pool:
        pool.add([1, 2])
    assert reader.documents == 0
    reader.snapshot()
    assert (reader.documents, len(reads) > 0) == (1, True)


def test_what_is_new_and_damaged_stops_no_request(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool(path) as pool:
        pool.add([1, 2, 3])
        pool.flush()
        with Pool.open(path, read_only=True) as reader:
            pool.add([1, 2, 4])
            pool.flush()
            newest = max(file for file in path.iterdir() if manifest.is_name(file.name, "segment"))
            sound = newest.read_bytes()
            newest.write_bytes(sound[:-8])
            assert reader.successors([1, 2]) == Counter({3: 1})
            assert [type(problem) for problem in reader.problems] == [PoolDamaged]
            with pytest.raises(PoolDamaged, match=newest.name):
                reader.refresh()
            newest.write_bytes(sound)
            assert reader.successors([1, 2]) == Counter({3: 1, 4: 1})
            assert reader.problems == ()


# Pools that take in others.


@given(texts)
def test_a_run_gives_its_documents_back(some: list[list[int]]) -> None:
    assert [text.tolist() for text in documents(build([np.array(text, np.int32) for text in some]))] == some


@given(texts, texts, st.lists(st.integers(0, 5), max_size=4))
@settings(max_examples=40)
def test_absorbing_is_adding_what_is_new(ours: list[list[int]], theirs: list[list[int]], context: list[int]) -> None:
    pool, other, both = Pool(), Pool(), Pool()
    for text in ours:
        pool.add(text)
        both.add(text)
    added = 0
    for text in theirs:
        other.add(text)
        added += both.add(text)
    assert pool.absorb(other) == added
    assert held(pool) == held(both)
    assert pool.successors(context) == both.successors(context)
    assert pool.absorb(other) == 0, "digests are kept"


def test_digests_of_ones_own_are_kept() -> None:
    pool, other = Pool(), Pool()
    pool.add([1, 2], digest=5)
    other.add([3, 4], digest=5)
    other.add([1, 2], digest=6)
    assert pool.absorb(other) == 1
    assert 6 in pool
    assert held(pool) == [(1, 2), (1, 2)]


def test_what_cannot_be_absorbed(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lookahead.demo_path())
    with Pool(tmp_path / "a", tokenizer=tokenizer) as pool, Pool(tmp_path / "b") as other:
        other.add([1, 2])
        assert pool.absorb(other) == 1, "of one that does not know its tokenizer nothing is known"
        with pytest.raises(InvalidArgument, match="this pool itself"):
            pool.absorb(pool)
        with pytest.raises(InvalidArgument, match="a str; give another"):
            pool.absorb(str(tmp_path))  # type: ignore[arg-type]
        assert other.absorb(pool) == 0, "takes the tokenizer over"
        tokenizer.add_tokens(["something new"])
        with Pool(tmp_path / "c", tokenizer=tokenizer) as third, pytest.raises(PoolMismatch, match="another tokenizer"):
            other.absorb(third)
    with Pool.open(tmp_path / "a", read_only=True) as reader, pytest.raises(PoolError, match="reading only"):
        reader.absorb(Pool.open(tmp_path / "b", read_only=True))


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, some in {"a": [[1, 2], [3, 4, 5]], "b": [[3, 4, 5], [6]]}.items():
        with Pool(name) as pool:
            for text in some:
                pool.add(text)
    assert main(["pool", "merge", "all", "a", "b"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a: 2 documents added, 5 tokens\nb: 1 document added, 1 token")
    assert "1 document known\nall: 6 tokens in 3 documents" in said
    assert Pool.open("all", read_only=True).successors([3, 4]) == Counter({5: 1})
    assert Pool.open("a", read_only=True).documents == 2
    for command, message in (
        (["merge", "a", "./a"], "./a is the pool itself"),
        (["merge", "all", "none"], "none is no pool"),
        (["merge", "all"], "the following arguments are required: OTHER"),
    ):
        assert main(["pool", *command]) == 2
        assert message in capsys.readouterr().err


@given(collections, collections, st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=3), st.integers(1, 20))
@settings(max_examples=30)
def test_an_absorbed_pool_answers_as_if_all_had_been_added(
    ours: list[Document], theirs: list[Document], asked: list[list[int]], live: int
) -> None:
    """Also on the disk, from several segments, and read again."""
    both = Pool()
    with tempfile.TemporaryDirectory() as path:
        with Pool(Path(path, "a"), live_tokens=live) as pool, Pool(Path(path, "b"), live_tokens=live) as other:
            for text in ours:
                assert pool.add(text) == both.add(text)
            for text in theirs:
                other.add(text)
                other.flush()
            other.settle()
            assert pool.absorb(other) == sum(both.add(text) for text in theirs)
            assert answers(pool, [*asked, *map(list, theirs)]) == answers(both, [*asked, *map(list, theirs)])
            pool.settle()
        with Pool.open(Path(path, "a"), read_only=True) as again:
            assert (held(again), again.tokens) == (held(both), both.tokens)
            assert answers(again, asked) == answers(both, asked)


def test_one_segment_is_unpacked_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(tmp_path / "b") as other:
        for first in range(3):
            other.add([first] * (4**first))  # of sizes that are not merged
            other.flush()
        other.settle()
        runs = [len(segment.run.ends) for segment in other.segments]
        assert len(runs) == 3
        unpacked = list[int]()
        monkeypatch.setattr(pool_module, "documents", lambda run: unpacked.append(len(run.ends)) or documents(run))
        assert Pool().absorb(other) == 3
    assert unpacked == runs


def test_a_limit_holds_for_what_is_absorbed() -> None:
    pool, other = Pool(max_tokens=40), Pool()
    for first in range(30):
        other.add([first, 1, 2, 3])
    assert pool.absorb(other) == 30
    pool.flush()
    assert pool.tokens <= 40
    assert held(pool) == held(other)[-len(held(pool)) :], "the youngest"


def test_a_damaged_pool_is_absorbed_as_far_as_it_can_be(tmp_path: Path) -> None:
    with Pool(tmp_path / "b") as other:
        for first in range(2):
            other.add([first] * (8**first))
            other.flush()
    oldest = min(tmp_path.glob("b/*.segment"))
    oldest.write_bytes(oldest.read_bytes()[:-8])
    with Pool.open(tmp_path / "b", damaged="skip", read_only=True) as rest:
        assert Pool().absorb(rest) == len(rest.problems) == 1


def test_a_reader_goes_on_while_its_writer_prunes_and_merges(tmp_path: Path) -> None:
    with Pool(tmp_path / "pool") as pool, Pool.open(tmp_path / "pool", read_only=True) as reader:
        assert reader.successors([1]) == Counter(), "opened before anything was written"
        for first in range(6):
            pool.add([1, 2, 10 + first])
            pool.flush()
        assert sorted(reader.successors([1, 2])) == list(range(10, 16))
        row = reader.snapshot()
        pool.prune(6)
        pool.compact()
        assert sorted(reader.successors([1, 2])) == [14, 15]
        assert sum(run.tokens for run in row.runs) == 18, "a row keeps what it began with"
        assert [text.tolist() for run in row.runs for text in documents(run)] == [[1, 2, 10 + n] for n in range(6)]
        pool.prune(0)
        assert (reader.successors([1, 2]), reader.documents) == (Counter(), 0)


def test_a_reader_goes_on_when_its_pool_is_gone(tmp_path: Path) -> None:
    with Pool(tmp_path / "pool") as pool:
        pool.add([1, 2, 3])
    with Pool.open(tmp_path / "pool", read_only=True) as reader:
        shutil.rmtree(tmp_path / "pool")
        assert reader.successors([1, 2]) == Counter({3: 1})
        assert len(reader.problems) == 1
        with pytest.raises(PoolError):
            reader.refresh()


def test_merge_refuses_damage_and_other_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lookahead.demo_path())
    Pool(tmp_path / "a", tokenizer=tokenizer).close()
    tokenizer.add_tokens(["something new"])
    with Pool(tmp_path / "b", tokenizer=tokenizer) as pool:
        pool.add([1, 2])
    assert main(["pool", "merge", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "is of another tokenizer" in capsys.readouterr().err
    (segment,) = tmp_path.glob("b/*.segment")
    segment.write_bytes(segment.read_bytes()[:-8])
    assert main(["pool", "merge", str(tmp_path / "c"), str(tmp_path / "b")]) == 2
    assert f"`lookahead pool prune {tmp_path / 'b'} --damaged`" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
