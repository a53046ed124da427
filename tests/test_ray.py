"""Laws of rows on Ray: each comes out once, as one process writes it, whatever happens to actors and to other rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pools import held
from pydantic import AfterValidator, BaseModel, Field, field_validator
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.errors import (
    GrammarError,
    InvalidArgument,
    PoolBusy,
    PoolDamaged,
    PoolMismatch,
    PoolNotFound,
    UnsupportedModel,
)
from lookahead.integrations.ray import JsonBatches, gather, map_json
from lookahead.pool.parts import live_parts, open_part, open_shared
from lookahead.pool.pool import Pool

ray = pytest.importorskip("ray")
ray_data = pytest.importorskip("ray.data")
pyarrow = pytest.importorskip("pyarrow")
pandas = pytest.importorskip("pandas")

# Ray warns of the defaults of its own settings.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")

ROWS, BATCH, NEW = 24, 4, 80
NAMES = ("Nora Fischer", "Laura Weber", "Omar Haddad", "Ada Khan", "Ivan Costa", "Mia Reed")
STATES = ("open", "paid", "shipped")


class Order(BaseModel):
    order_id: str = Field(max_length=12)
    customer: str = Field(max_length=20)
    total: int = Field(ge=0, le=9999)
    status: Literal["open", "paid", "shipped"]


class Unpaid(Order):
    @field_validator("status")
    @classmethod
    def unpaid(cls, value: str) -> str:
        if value == "paid":
            raise ValueError("it is paid")
        return value


SCHEMA = lookahead.schema_of(Order)


def prompt(number: int) -> str:
    """Return a prompt whose value differs from that of every other number."""
    facts = f"Order: The customer is {NAMES[number % 6]}; the order id is RK-{2417 + number * 7}."
    more = f"The total comes to {318 + number * 13}; the status is {STATES[number % 3]}."
    return f"<facts>\n{facts} {more}\n</facts>\n<schema>\n{json.dumps(SCHEMA)}\n</schema>\n<json>\n"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    path = lookahead.demo_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def alone(demo: tuple[Any, Any]) -> list[str]:
    """What one process writes, each row by itself and without a pool."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "memory": False}
    texts = [lookahead.generate_json(*demo, prompt(row), Order, **options).text for row in range(ROWS)]
    assert len(set(texts)) == ROWS, "rows that are told apart"
    return texts


def made(**changes: Any) -> JsonBatches:
    return JsonBatches(**{"model": "demo", "schema": Order, "max_new_tokens": NEW} | changes)


def table(prompts: list[Any], **columns: Any) -> Any:
    return pyarrow.table({"id": range(len(prompts)), "prompt": prompts, **columns})


# On Ray.


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # actors import what is defined here
        ray.init(address="local", num_cpus=2, **quiet)
    ray_data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def dataset(prompts: list[Any]) -> Any:
    rows = [{"id": i, "prompt": one, "note": f"no. {i}" if i % 5 else None} for i, one in enumerate(prompts)]
    return ray_data.from_items(rows, override_num_blocks=-(-len(rows) // BATCH))


def in_order(done: Any) -> list[dict[str, Any]]:
    return sorted(done.take_all(), key=lambda row: int(row["id"]))


def test_rows_survive_a_killed_actor_and_are_drafted_better_the_next_time(
    cluster: None, alone: list[str], tmp_path: Path
) -> None:
    pool, marker = tmp_path / "pool", str(tmp_path / "killed")

    class Mortal(JsonBatches):
        """Dies in its second batch, the first of them all that gets there."""

        calls = 0

        def __call__(self, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 2 and not os.path.exists(marker):
                open(marker, "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    job: dict[str, Any] = {"model": "demo", "schema": Order, "pool": str(pool), "max_new_tokens": NEW}
    prompts: list[Any] = [prompt(row) for row in range(ROWS)]
    mortal = dataset(prompts).map_batches(
        Mortal,
        fn_constructor_kwargs=job,
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray_data.ActorPoolStrategy(size=2),
    )
    first = in_order(mortal)
    assert os.path.exists(marker)
    assert_rows(first, prompts, alone)

    parts = sorted(live_parts(pool).iterdir())
    assert len(parts) >= 2, "of the killed actor too"
    assert Pool.open(pool, read_only=True).documents == 0
    assert gather(pool) == ROWS, "what the killed one had finished is there, and nothing twice"
    assert not live_parts(pool).exists()

    bad: list[Any] = [None, "word " * 4000]
    second = in_order(map_json(dataset([*prompts, *bad]), **job, actors=2, batch_size=BATCH))
    assert_rows(second[:ROWS], prompts, alone)
    assert [row["json"] for row in second[ROWS:]] == [None, None]
    assert "is missing" in second[ROWS]["error"]
    assert "the model's context is" in second[ROWS + 1]["error"]
    before, after = (sum(row["passes"] for row in rows[:ROWS]) for rows in (first, second))
    assert after < 0.8 * before, "thanks to the gathered pool"
    assert gather(pool) == 0, "known already"
    assert Pool.open(pool, read_only=True).documents == ROWS


def assert_rows(rows: list[dict[str, Any]], prompts: list[str], texts: list[str]) -> None:
    """Each row is there once, with its columns, and as one process writes it."""
    assert [row["id"] for row in rows] == list(range(len(prompts)))
    assert [row["prompt"] for row in rows] == prompts
    assert [row["note"] for row in rows] == [f"no. {i}" if i % 5 else None for i in range(len(prompts))]
    assert [row["json"] for row in rows] == texts
    assert [row["error"] for row in rows] == [None] * len(prompts)
    assert all(0 < row["passes"] <= row["tokens"] for row in rows)


def test_a_model_that_cannot_be_loaded_ends_the_run(cluster: None) -> None:
    with pytest.raises(Exception, match=r"model=\./nowhere: no such directory"):
        map_json(dataset(["x"]), model="./nowhere", schema=Order).take_all()


def test_the_driver_refuses_what_makes_no_sense(cluster: None) -> None:
    rows = dataset(["x"])
    for changes, message in (
        ({"actors": 0}, "actors=0"),
        ({"actors": (3, 2)}, r"actors=\(3, 2\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompt": "mail"}, "prompt='mail': the dataset has no such column; it has id, prompt, note"),
        ({"output": "note"}, "output='note': the dataset has that column already"),
        ({"schema": print}, "is a function"),
    ):
        given: dict[str, Any] = {"model": "demo", "schema": Order} | changes
        with pytest.raises(InvalidArgument, match=message):
            map_json(rows, **given)
    with pytest.raises(InvalidArgument, match="dataset is a list; give a ray"):
        map_json([{"prompt": "x"}], model="demo", schema=Order)
    lock = threading.Lock()
    locked = Annotated[int, AfterValidator(lambda value: value if lock else None)]
    with pytest.raises(InvalidArgument, match=r"cannot be sent to actors .*; define the type in a module"):
        map_json(rows, model="demo", schema=locked)


# In one process.


def test_a_bad_row_says_why_and_changes_no_other(alone: list[str]) -> None:
    batches = made()
    prompts = [prompt(0), None, prompt(1), "word " * 4000, prompt(2)]
    rows = batches(table(prompts)).to_pylist()
    assert [row["json"] for row in rows] == [alone[0], None, alone[1], None, alone[2]]
    assert [row["error"] is None for row in rows] == [True, False, True, False, True]
    assert rows[1]["error"].startswith("InvalidArgument: the prompt ('prompt') is missing; give a text")
    assert rows[3]["error"].startswith("InvalidArgument: the prompt has 8001 tokens, but the model's context is 1024")
    assert [rows[at]["tokens"] for at in (1, 3)] == [0, 0]
    missing = batches(pyarrow.table({"id": [1, 2]})).to_pylist()
    assert all("is missing" in row["error"] for row in missing)


def test_what_is_cut_off_or_refused_is_an_error_of_its_row(alone: list[str]) -> None:
    for row in made(max_new_tokens=3)(table([prompt(0), prompt(1)])).to_pylist():
        assert row["json"] is None
        assert row["error"].startswith("IncompleteJson: the text ended early")
        assert (row["tokens"], row["passes"] > 0) == (3, True)
    rows = made(schema=Unpaid)(table([prompt(row) for row in range(6)])).to_pylist()
    paid = ['"paid"' in text for text in alone[:6]]
    assert True in paid
    assert False in paid
    for row, refused, text in zip(rows, paid, alone, strict=False):
        assert row["json"] == (None if refused else text)
        assert row["error"] is None if not refused else "it is paid" in row["error"]


def test_figures_are_those_of_the_row(demo: tuple[Any, Any]) -> None:
    (row,) = made(remember=None)(table([prompt(0)])).to_pylist()
    result = lookahead.generate_json(*demo, prompt(0), Order, max_new_tokens=NEW, memory=False)
    assert row["tokens"] == result.trace.tokens
    some = made()(table([prompt(row) for row in range(8)])).to_pylist()
    assert len({one["tokens"] for one in some}) > 1, "not those of the batch"
    assert all(1 < one["passes"] <= one["tokens"] for one in some)


@pytest.mark.parametrize("of", ["table", "arrays", "frame"])
def test_batches_of_every_kind_keep_their_columns(alone: list[str], of: str) -> None:
    columns = {"id": [3, 4], "prompt": [prompt(0), None], "note": ["a", None]}
    batch = {
        "table": lambda: pyarrow.table(columns),
        "arrays": lambda: {name: np.array(each, object) for name, each in columns.items()},
        "frame": lambda: pandas.DataFrame(columns),
    }[of]()
    done = made()(batch)
    assert type(done) is type(batch)
    rows = {name: list(done[name].to_pylist() if of == "table" else done[name]) for name in (*columns, "json", "error")}
    assert rows["id"] == columns["id"]
    assert rows["prompt"][0] == prompt(0)
    assert rows["json"] == [alone[0], None] or (rows["json"][0] == alone[0] and pandas.isna(rows["json"][1]))
    assert "is missing" in rows["error"][1]
    if of == "table":
        kinds = [pyarrow.string(), pyarrow.string(), pyarrow.int64(), pyarrow.int64()]
        for one in (done, made()(batch.slice(0, 0))):  # whatever is in them
            assert [one.schema.field(name).type for name in ("json", "error", "tokens", "passes")] == kinds


def test_rows_that_cannot_be_generated_together_are_divided(alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    batches, sizes = made(), list[int]()
    found = batches._found

    def narrow(prompts: list[Any]) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2 or prompts == [prompt(1)]:
            raise torch.OutOfMemoryError("too many,\nsay")
        if prompt(1) in prompts:
            raise ValueError("one of them")
        return found(prompts)

    monkeypatch.setattr(batches, "_found", narrow)
    rows = batches(table([prompt(row) for row in range(4)])).to_pylist()
    assert [row["json"] for row in rows] == [alone[0], None, alone[2], alone[3]]
    assert rows[1]["error"] == "OutOfMemoryError: too many, say"
    assert sizes == [4, 2, 1, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), UnsupportedModel("not this one")])
def test_what_no_row_is_to_blame_for_ends_the_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = made()

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(batches, "_found", fail)
    with pytest.raises(type(error), match=str(error)):
        batches(table([prompt(0), prompt(1)]))


def test_a_long_neighbour_cuts_no_text(demo: tuple[Any, Any]) -> None:
    """What the context leaves counts for each row by itself, not after the longest prompt of its batch."""
    numbers = {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 40}
    short, long = "[1, 2, ", "word " * 500
    batches = made(schema=numbers, max_new_tokens=None)
    rows = batches(table([short, long])).to_pylist()
    (by_itself,) = made(schema=numbers, max_new_tokens=None)(table([short])).to_pylist()
    assert rows[0]["tokens"] == by_itself["tokens"] > 30
    assert (rows[0]["json"], rows[0]["error"]) == (by_itself["json"], by_itself["error"])
    assert rows[1]["error"].startswith("IncompleteJson")


def test_chats_go_through_the_template(alone: list[str]) -> None:
    batches = made(chat_template_kwargs={"tail": ""})
    batches._tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tail }}"
    half = len(prompt(0)) // 2
    chat = [{"role": "system", "content": prompt(0)[:half]}, {"role": "user", "content": prompt(0)[half:], "name": "N"}]
    rows = batches(table([chat, [], chat])).to_pylist()
    assert [row["json"] for row in rows] == [alone[0], None, alone[0]]
    assert rows[1]["error"].startswith("InvalidArgument: the prompt")
    assert batches(table([prompt(1)])).to_pylist()[0]["json"] == alone[1], "a text has no template"


def test_draws_follow_from_seed_and_prompts() -> None:
    prompts, state = table(["A name: ", "A city: ", "A thing: "]), torch.get_rng_state()
    word = {"type": "string", "maxLength": 20}

    def drawn(seed: int | None) -> list[str]:
        batches = made(schema=word, do_sample=True, temperature=1.5, seed=seed)
        batches(table([prompt(9)]))  # what came before does not matter
        texts: list[str] = batches(prompts).column("json").to_pylist()
        return texts

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(None) != drawn(None), "actors do not all draw the same"
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output": "prompt"}, InvalidArgument, "are one column"),
        ({"error": ""}, InvalidArgument, "error=''"),
        ({"model": 3}, InvalidArgument, "model is a int"),
        ({"model": "./nowhere"}, InvalidArgument, r"model=\./nowhere: no such directory"),
        ({"dtype": "float12"}, InvalidArgument, "dtype='float12'; give one of auto"),
        ({"device": "meta"}, InvalidArgument, "device=meta: not usable here"),
        ({"remember": "some"}, InvalidArgument, "remember='some'"),
        ({"pool": 7}, InvalidArgument, "pool=7; give the directory"),
        ({"pool": ""}, InvalidArgument, "pool=''; give the directory"),
        ({"seed": -1}, InvalidArgument, "seed=-1"),
        ({"schema": {"type": "integer", "not": {}}}, GrammarError, "not"),
        ({"schema": print}, InvalidArgument, "is a function"),
        ({"nodes": 3}, InvalidArgument, "nodes: pass Lookahead"),
        ({"max_new_token": 3}, InvalidArgument, "refuses the options: .*max_new_token"),
        ({"temperature": "hot", "do_sample": True}, InvalidArgument, "refuses the options"),
    ],
)
def test_what_is_wrong_with_the_set_up_is_raised(changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        made(**changes)


def test_a_column_is_not_written_over() -> None:
    with pytest.raises(InvalidArgument, match="have a column 'json' already; give another name"):
        made()(table([prompt(0)], json=["mine"]))
    row = made(output="value", error="why", tokens="n", passes="p")(table([prompt(0)], json=["mine"])).to_pylist()[0]
    assert (row["json"], row["why"], list(row)) == ("mine", None, ["id", "prompt", "json", "value", "why", "n", "p"])


# Live parts.


def test_every_batch_is_on_the_disk(tmp_path: Path) -> None:
    batches = made(pool=tmp_path / "pool")
    (part,) = live_parts(tmp_path / "pool").iterdir()
    for count in (2, 4):
        batches(table([prompt(row) for row in range(count - 2, count)]))
        assert Pool.open(part, read_only=True).documents == count
    assert Pool.open(tmp_path / "pool", read_only=True).documents == 0
    with pytest.raises(PoolBusy, match=f"still being written: {part}; the other"):
        gather(tmp_path / "pool", patience=0.0)
    batches.close()
    assert gather(tmp_path / "pool") == 4


def test_what_others_gather_is_drafted_from_at_the_next_batch(alone: list[str], tmp_path: Path) -> None:
    reader, writer = (made(pool=tmp_path / "pool", remember=how) for how in (None, "output"))
    assert len(list(live_parts(tmp_path / "pool").iterdir())) == 1, "one that remembers nothing has no part"
    (before,) = reader(table([prompt(0)])).to_pylist()
    writer(table([prompt(0)]))
    writer.close()
    assert gather(tmp_path / "pool") == 1
    (after,) = reader(table([prompt(0)])).to_pylist()
    assert before["json"] == after["json"] == alone[0]
    assert after["passes"] < before["passes"]


def test_a_live_part_that_cannot_be_written_costs_no_row(
    alone: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batches = made(pool=tmp_path / "pool")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lookahead.pool.files.create", full)
    for row in range(2):
        assert batches(table([prompt(row)])).to_pylist()[0]["json"] == alone[row]
    assert caplog.text.count("keeps nothing more of what it generates") == 1
    monkeypatch.undo()


def filled(path: Path, *documents: list[int]) -> Path:
    with Pool(path) as pool:
        for document in documents:
            pool.add(document)
    return path


def test_gathering_adds_what_is_new_and_removes_what_it_took(tmp_path: Path) -> None:
    pool = filled(tmp_path / "pool", [1, 2], [3])
    filled(live_parts(pool) / "a", [3], [4, 5])
    filled(live_parts(pool) / "b", [4, 5], [6])
    (live_parts(pool) / "begun").mkdir()  # by an actor that has not come further, or never will
    assert gather(str(pool)) == 2
    assert held(Pool.open(pool, read_only=True)) == [(1, 2), (3,), (4, 5), (6,)]
    assert [path.name for path in live_parts(pool).iterdir()] == ["begun"]
    assert gather(pool) == 0
    with pytest.raises(PoolNotFound, match="none is no pool, and there are no parts of one in"):
        gather(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_gathering_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before a part was removed, it adds nothing of it again."""
    pool = tmp_path / "pool"
    filled(live_parts(pool) / "a", [1, 2], [3])

    def stopped(*_: Any) -> None:
        assert Pool.open(pool, read_only=True).documents == 2, "on the disk before the part goes"
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        gather(pool)
    monkeypatch.undo()
    assert gather(pool) == 0
    assert held(Pool.open(pool, read_only=True)) == [(1, 2), (3,)]


def test_parts_that_cannot_be_used_are_left_and_named(tmp_path: Path, demo: tuple[Any, Any]) -> None:
    pool = tmp_path / "pool"
    damaged = filled(live_parts(pool) / "a", [1, 2])
    filled(live_parts(pool) / "b", [3])
    (segment,) = damaged.glob("*.segment")
    segment.write_bytes(segment.read_bytes()[:-8])
    with pytest.raises(PoolDamaged, match=f"these are left: {damaged}"):
        gather(pool)
    assert held(Pool.open(pool, read_only=True)) == [(3,)]
    segment.unlink()
    Pool(tmp_path / "other", tokenizer=demo[1]).close()
    words = AutoTokenizer.from_pretrained(lookahead.demo_path())
    words.add_tokens(["something new"])
    open_part(tmp_path / "other", words).close()
    with pytest.raises(PoolMismatch, match="these are left"):
        gather(tmp_path / "other")
    with pytest.raises(PoolMismatch):
        open_shared(tmp_path / "other", words)


def test_waiting_for_an_actor_that_ends(tmp_path: Path) -> None:
    pool, code = tmp_path / "pool", "import sys, time; from lookahead.pool.pool import Pool\n"
    code += "pool = Pool(sys.argv[1]); pool.add([1, 2]); pool.flush(); print(flush=True); time.sleep(1)"
    command = [sys.executable, "-c", code, str(live_parts(pool) / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as actor:
        assert actor.stdout is not None
        actor.stdout.readline()
        assert gather(pool) == 1


def test_actors_that_begin_together_make_one_pool(tmp_path: Path) -> None:
    code = "import sys; from lookahead.pool.parts import open_shared; print(open_shared(sys.argv[1], None).documents)"
    command = [sys.executable, "-c", code, str(tmp_path / "pool")]
    some = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [one.communicate()[0] for one in some] == ["0\n"] * 3
