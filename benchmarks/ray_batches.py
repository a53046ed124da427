"""JSON for many rows: two actors on Ray against one process, and again when an actor is killed on the way.

    python benchmarks/ray_batches.py [--rows 1000] [--actors 2] [--batch 16]

Made orders and one schema, answered by the bundled model in float32. One process has one thread of torch, and then as
many as there are actors, which have one each. Seconds are from the first batch to the end of the last one; what it
takes to start, before that, stands beside it. All runs keep a pool of their own, empty at first; the last one is
another run with the pool that the killed one left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lookahead.integrations.ray import JsonBatches, gather

KEYS = ("order_id", "customer", "quantity", "status", "express")
SCHEMA = {
    "type": "object",
    "properties": {
        "order_id": {"type": "string", "maxLength": 12},
        "customer": {"type": "string", "maxLength": 24},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 500},
        "status": {"type": "string", "enum": ["open", "paid", "shipped"]},
        "express": {"type": "boolean"},
    },
    "required": list(KEYS),
    "additionalProperties": False,
}
JOB: dict[str, Any] = {"model": "demo", "schema": SCHEMA, "max_new_tokens": 96}
HEADER = ("start s", "seconds", "rows/s", "ratio", "passes a row", "errors", "each row once", "same JSON")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rows of a run in order, and when it was told to begin."""

    rows: list[Row]
    asked: float

    @property
    def began(self) -> float:
        return min(row["began"] for row in self.rows)

    @property
    def seconds(self) -> float:
        return max(row["ended"] for row in self.rows) - self.began


def made_rows(count: int) -> list[Row]:
    """Return made facts, each with the question for JSON."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from train_demo.facts import DOMAINS

    rng = random.Random(5)
    fields = [field for field in DOMAINS["order"] if field.key in KEYS]
    rows = []
    for number in range(count):
        values = {field.key: field.make(rng) for field in fields}
        said = [
            field.phrases[1 - values[field.key]]
            if field.key == "express"
            else rng.choice(field.phrases).format(values[field.key])
            for field in rng.sample(fields, len(fields))
        ]
        facts = "Order: " + "; ".join(said) + "."
        prompt = f"<facts>\n{facts}\n</facts>\n<schema>\n{json.dumps(SCHEMA)}\n</schema>\n<json>\n"
        rows.append({"id": number, "prompt": prompt})
    return rows


class Timed(JsonBatches):
    """Notes when each batch began and ended, and dies once where a file named in the environment is not there yet."""

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        begin, marker = time.time(), os.environ.get("LOOKAHEAD_DIES_ONCE")
        done = super().__call__(batch)
        if marker and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for name, moment in (("began", begin), ("ended", time.time())):
            done = done.append_column(name, pyarrow.array([moment] * len(done)))
        return done


def alone(rows: list[Row], size: int, threads: int, pool: str) -> Outcome:
    """Return the rows as one process leaves them."""
    import pyarrow

    torch.set_num_threads(threads)
    asked, batches = time.time(), Timed(**JOB, pool=pool)
    tables = [pyarrow.Table.from_pylist(rows[at : at + size]) for at in range(0, len(rows), size)]
    done = [row for table in tables for row in batches(table).to_pylist()]
    batches.close()
    return Outcome(done, asked)


def on_ray(rows: list[Row], size: int, actors: int, pool: str, marker: str = "") -> Outcome:
    """Return the rows as actors leave them."""
    import ray

    asked = time.time()
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
        Timed,
        fn_constructor_kwargs=JOB | {"pool": pool},
        batch_size=size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        runtime_env={"env_vars": {"LOOKAHEAD_DIES_ONCE": marker}} if marker else None,
    )
    return Outcome(sorted(dataset.take_all(), key=lambda row: int(row["id"])), asked)


def line(name: str, run: Outcome, base: Outcome) -> str:
    """Return a row of the table; `base` is the run that the others are compared with."""
    rows, seconds = run.rows, run.seconds
    once = [row["id"] for row in rows] == list(range(len(base.rows)))
    same = sum(a["json"] == b["json"] for a, b in zip(rows, base.rows, strict=False))
    figures = (
        f"{run.began - run.asked:.1f}",
        f"{seconds:.1f}",
        f"{len(rows) / seconds:.1f}",
        f"**{base.seconds / seconds:.2f}x**",
        f"{sum(row['passes'] for row in rows) / len(rows):.2f}",
        f"{sum(row['error'] is not None for row in rows)}",
        "yes" if once else "NO",
        f"{same} of {len(base.rows)}",
    )
    return f"| {name} | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="rows that are generated together")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import ray

    rows, folder = made_rows(args.rows), Path(tempfile.mkdtemp())
    alone(rows[: args.batch], args.batch, 1, str(folder / "warm"))  # compiled before the clock runs
    print(f"| | {' | '.join(HEADER)} |\n|---{'|---' * len(HEADER)}|")
    base = alone(rows, args.batch, 1, str(folder / "one"))
    print(line("one process, 1 thread", base, base), flush=True)
    more = alone(rows, args.batch, args.actors, str(folder / "two"))
    print(line(f"one process, {args.actors} threads", more, base), flush=True)
    ray.init(address="local", num_cpus=args.actors, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    killed = str(folder / "killed")
    for name, pool, marker in (("", "ray", ""), (", one killed", "kill", killed), (", its pool gathered", "kill", "")):
        run = on_ray(rows, args.batch, args.actors, str(folder / pool), marker)
        print(line(f"{args.actors} actors{name}", run, base), flush=True)
        print(f"gathered: {gather(folder / pool)} documents", file=sys.stderr)
    ray.shutdown()


if __name__ == "__main__":
    main()
