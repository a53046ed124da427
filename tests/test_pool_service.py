"""Pools in service: readers see what a writer commits between requests, and pools take in others."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import held
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lookahead
from lookahead.cli import main
from lookahead.errors import InvalidArgument, PoolBusy, PoolDamaged, PoolError, PoolMismatch
from lookahead.pool import manifest, snapshot
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
