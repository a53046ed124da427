"""Laws of what `generate_json` remembers: it saves passes, changes no text, and is bounded."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
from models import json_tokenizer
from values import PROMPTS, Drawing, Point, Row, model, plain

from lookahead import Budget, Lookahead, Pool, PoolError
from lookahead.grammar.grammar import Grammar
from lookahead.sources.mixer import save
from lookahead.structured.generate import generate_json
from lookahead.structured.memory import SCHEMAS, SchemaMemory, memory_of
from lookahead.structured.schemas import Shape


@pytest.mark.law
def test_memory_never_changes_a_text(tmp_path: Path) -> None:
    expected = [plain(prompt, Shape.of(Drawing).grammar()) for prompt in PROMPTS]
    with SchemaMemory() as own:
        for memory in (False, True, tmp_path / "pools", str(tmp_path / "pools"), own):
            for _ in range(2):
                texts = [
                    generate_json(model(), json_tokenizer(), prompt, Drawing, memory=memory).text for prompt in PROMPTS
                ]
                assert texts == expected
        assert len(own) == 1
    assert len(list((tmp_path / "pools").iterdir())) == 1


@pytest.mark.parametrize("kind", ["model", "directory", "own", "lookahead"])
def test_memory_saves_passes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookahead.engine._budget", lambda *_: Budget.of(32))  # one that no clock has a say in
    ours = copy.copy(model())
    memory: Any = {"model": True, "directory": tmp_path, "own": SchemaMemory(), "lookahead": True}[kind]
    generator = Lookahead(ours, json_tokenizer()) if kind == "lookahead" else ours
    passes = []
    for _ in range(4):
        result = generate_json(generator, json_tokenizer(), "x", Drawing, memory=memory)
        passes.append(len(result.trace.passes))
    assert passes[-1] < passes[0]


def test_what_is_learnt_of_a_model_is_kept(tmp_path: Path) -> None:
    ours = copy.copy(model())
    generate_json(ours, json_tokenizer(), "x", Drawing)
    generate_json(ours, json_tokenizer(), "x", Row, memory=tmp_path)
    growers = memory_of(ours)._growers
    assert list(growers) == [ours]
    pool = next(tmp_path.iterdir())
    with Pool.open(pool, read_only=True) as there:
        assert there.calibration == save(growers[ours].weights)
        assert there.documents == 1
    ours_again = copy.copy(model())
    with SchemaMemory(tmp_path) as memory:
        pool = memory.pool(Shape.of(Row).grammar(), json_tokenizer())
        assert save(memory.grower(ours_again, pool).weights) == save(growers[ours].weights)


def test_memory_is_of_one_schema_and_one_model() -> None:
    ours, other = copy.copy(model()), copy.copy(model())
    for schema in (Row, Point, Row):
        generate_json(ours, json_tokenizer(), "x", schema)
    assert len(memory_of(ours)) == 2
    assert len(memory_of(other)) == 0
    generate_json(ours, json_tokenizer(), "x", Row, memory=False)
    assert len(memory_of(ours)) == 2
    generate_json(ours, json_tokenizer(), "x", Row, whitespace="compact")
    assert len(memory_of(ours)) == 3


def test_memory_is_bounded() -> None:
    with SchemaMemory(max_tokens=100) as memory:
        for number in range(SCHEMAS + 3):
            pool = memory.pool(Grammar.choice([str(number)]), json_tokenizer())
            assert pool.max_tokens == 100
        assert len(memory) == SCHEMAS
        kept = memory.pool(Grammar.choice(["3"]), json_tokenizer())
        memory.pool(Grammar.choice(["new"]), json_tokenizer())
        assert memory.pool(Grammar.choice(["3"]), json_tokenizer()) is kept


def test_memory_goes_with_its_model() -> None:
    from lookahead.structured import memory as schema_memory

    ours = copy.deepcopy(model())
    generate_json(ours, json_tokenizer(), "x", Row)
    before = len(schema_memory._OF_MODELS)
    del ours
    gc.collect()
    assert len(schema_memory._OF_MODELS) == before - 1


def test_a_directory_that_cannot_be_used_is_a_pool_error(tmp_path: Path) -> None:
    with SchemaMemory(tmp_path) as memory:
        generate_json(model(), json_tokenizer(), "x", Row, memory=memory)
        with pytest.raises(PoolError):
            generate_json(model(), json_tokenizer(), "x", Row, memory=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PoolError):
        generate_json(model(), json_tokenizer(), "x", Row, memory=tmp_path / "file")
