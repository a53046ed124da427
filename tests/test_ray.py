"""Laws of rows on Ray: each comes out once, as one process writes it, whatever happens to actors and other rows."""

from __future__ import annotations

import json
import os
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, field_validator
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.errors import GrammarError, InvalidArgument, InvalidInput, PoolMismatch, PoolNotFound
from lookahead.integrations.ray import NEW_TOKENS, JsonBatches, gather
from lookahead.pool.pool import Pool

ray = pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 16}, "count": {"type": "integer", "maximum": 999}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
JOB: dict[str, Any] = {"model": "demo", "schema": SCHEMA, "dtype": "float32", "max_new_tokens": 40}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def prompts(count: int) -> list[str]:
    """Return prompts for JSON, some of them alike."""
    made = [
        task for task in json.loads(Path(lookahead.demo_path(), "prompts.json").read_text()) if task["kind"] == "json"
    ]
    facts = [re.search(r"<facts>\n(.*?)\n</facts>", task["prompt"], re.DOTALL) for task in made]
    some = [fact[1] for fact in facts if fact]
    return [f"<facts>\n{some[i % len(some)]} No. {i // 2}\n</facts>\n<json>\n" for i in range(count)]


def alone(some: list[str]) -> list[str]:
    """Return what one process writes, each row on its own, without a pool."""
    path = lookahead.demo_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    return [lookahead.generate_json(model, tokenizer, one, SCHEMA, max_new_tokens=40, nodes=None).text for one in some]


def mapped(rows: list[dict[str, Any]], actors: Any = JsonBatches, *, size: int = 2, **job: Any) -> list[dict[str, Any]]:
    """Return the rows as two actors leave them, in the order of their numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows) // 4 or 1).map_batches(
            actors,
            fn_constructor_kwargs=JOB | job,
            batch_size=4,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1,
        )
        return sorted(dataset.take_all(), key=lambda row: int(row["id"]))


def numbered(some: list[Any]) -> list[dict[str, Any]]:
    return [{"id": i, "prompt": prompt} for i, prompt in enumerate(some)]


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    some = prompts(24)
    return some, alone(some)


def test_rows_come_out_once_and_as_one_process_writes_them(cluster: None, texts: Any, tmp_path: Path) -> None:
    """Two actors with pools; what they wrote is gathered, and drafted from in a second run, which writes the same."""
    some, written = texts
    for turn in range(2):
        rows = mapped(numbered(some), pool=str(tmp_path / "pool"))
        assert [row["id"] for row in rows] == list(range(24))
        assert [row["prompt"] for row in rows] == some
        assert [row["json"] for row in rows] == written
        assert [row["error"] for row in rows] == [None] * 24
        done = gather(tmp_path / "pool")
        assert (done.parts, done.busy) == (2, ())
        assert (done.documents > 0) == (turn == 0), "the same outputs are known"
        assert list((tmp_path / "pool.live").iterdir()) == []
    pool = Pool.open(tmp_path / "pool", read_only=True)
    assert pool.documents == len({(prompt[-60:], text) for prompt, text in zip(some, written, strict=True)})


def test_an_actor_that_is_killed_loses_nothing(cluster: None, texts: Any, tmp_path: Path) -> None:
    some, written = texts
    marker = tmp_path / "killed"

    class Mortal(JsonBatches):
        calls = 0

        def __call__(self, batch: Any) -> Any:
            self.calls += 1
            done = super().__call__(batch)
            if self.calls == 2 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return done

    rows = mapped(numbered(some), Mortal, pool=str(tmp_path / "pool"))
    assert marker.exists()
    assert [row["id"] for row in rows] == list(range(24))
    assert [row["json"] for row in rows] == written
    done = gather(tmp_path / "pool")
    assert done.parts >= 2
    assert done.documents > 0
    assert gather(tmp_path / "pool") == (0, 0, ())


class Large(BaseModel):
    name: str = Field(max_length=16)
    count: int = Field(le=999, ge=0)

    @field_validator("count")
    @classmethod
    def large(cls, value: int) -> int:
        if value < 100:
            raise ValueError("small")
        return value


def table(some: list[Any]) -> Any:
    return pyarrow.table({"id": range(len(some)), "prompt": pyarrow.array(some, pyarrow.string())})


def test_a_bad_row_says_why_and_changes_no_other(texts: Any) -> None:
    some, written = texts
    one, two = JsonBatches(**JOB), JsonBatches(**JOB, output="out", error="why")
    rows = one(table([some[0], some[1], None, "word " * 4000, some[2]])).to_pylist()
    assert [row["json"] for row in rows] == [written[0], written[1], None, None, written[2]]
    errors = [row["error"] for row in rows]
    assert (errors[0], errors[1], errors[4]) == (None, None, None)
    assert errors[2] == "InvalidArgument: the prompt is None; give a text, or a list of chat messages"
    assert re.match(
        r"InvalidArgument: the prompt has \d+ tokens, and with 40 new ones that is too much: .* is 1024", errors[3]
    )
    assert two(table([some[0]])).to_pylist() == [{"id": 0, "prompt": some[0], "out": written[0], "why": None}]


def test_what_is_cut_off_or_refused_is_an_error_of_its_row(texts: Any) -> None:
    some, _ = texts
    short = JsonBatches(**JOB | {"max_new_tokens": 3})(table(some[:2])).to_pylist()
    assert all(row["json"] is None and row["error"].startswith("IncompleteJson: the text ended early") for row in short)
    rows = JsonBatches(**JOB | {"schema": Large, "max_new_tokens": 60})(table(some[:8])).to_pylist()
    for row in rows:
        assert (row["json"] is None) != (row["error"] is None)
        if row["json"] is not None:
            assert Large.model_validate_json(row["json"]).count >= 100
    assert any("InvalidValue: the value is refused" in (row["error"] or "") for row in rows)


def test_rows_that_cannot_be_generated_together_are_generated_one_by_one(
    texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, written = texts
    batches = JsonBatches(**JOB)
    together = batches._together

    def narrow(given: list[Any]) -> Any:
        if len(given) > 1 or given[0] == some[1]:
            raise RuntimeError("out of memory,\nsay")
        return together(given)

    monkeypatch.setattr(batches, "_together", narrow)
    rows = batches({"prompt": some[:3], "id": [1, 2, 3]})
    assert rows["json"].tolist() == [written[0], None, written[2]]
    assert rows["error"].tolist() == [None, "RuntimeError: out of memory, say", None]
    assert rows["id"] == [1, 2, 3]


def test_chats(texts: Any) -> None:
    batches = JsonBatches(**JOB)
    batches._tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}<json>\n"
    chat = [{"role": "user", "content": "A book."}]
    rows = batches(pyarrow.table({"prompt": [chat, [], chat]})).to_pylist()
    assert rows[0]["json"] == rows[2]["json"] != None  # noqa: E711
    assert rows[1]["error"].startswith("InvalidArgument: prompt=[]")


def test_a_seed_makes_batches_repeatable(texts: Any) -> None:
    some, _ = texts
    job = JOB | {"do_sample": True, "seed": 3}
    first, second, other = JsonBatches(**job), JsonBatches(**job), JsonBatches(**job | {"seed": 4})
    rows = [batches(table(some[:4])).column("json").to_pylist() for batches in (first, second, other)]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": "prompt"}, InvalidArgument, "give three different columns"),
        ({"schema": {"type": "integer", "not": {}}}, GrammarError, "not"),
        ({"schema": print}, InvalidArgument, "is a function"),
        ({"model": "./nowhere"}, InvalidInput, "no such directory"),
        ({"nodes": 3}, InvalidArgument, "nodes: pass Lookahead"),
        ({"max_tokens": 3}, Exception, "max_tokens"),
    ],
)
def test_what_is_wrong_with_all_rows_ends_the_run(changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        JsonBatches(**JOB | changes)


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(InvalidArgument, match="the rows have no column 'prompt' but text; name it with prompt="):
        JsonBatches(**JOB)(pyarrow.table({"text": ["x"]}))
    assert NEW_TOKENS == 256


def test_parts_that_are_being_written_are_left(tmp_path: Path) -> None:
    with Pool(tmp_path / "pool.live" / "one") as part:
        part.add([1, 2, 3])
        assert gather(tmp_path / "pool", wait_s=0.0) == (0, 0, (str(tmp_path / "pool.live" / "one"),))
    (tmp_path / "pool.live" / "begun").mkdir()
    assert gather(str(tmp_path / "pool")) == (1, 2, ())
    assert Pool.open(tmp_path / "pool", read_only=True).documents == 1
    with pytest.raises(PoolNotFound):
        Pool.open(tmp_path / "pool.live" / "one")


def test_pools_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lookahead.demo_path())
    tokenizer.add_tokens(["something new"])
    Pool(tmp_path / "pool", tokenizer=tokenizer).close()
    with pytest.raises(PoolMismatch):
        JsonBatches(**JOB, pool=tmp_path / "pool")
