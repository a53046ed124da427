"""JSON for many rows: two actors on Ray against one process, and again when an actor is killed on the way.

    python benchmarks/ray_batches.py [--rows 1000] [--actors 2] [--batch 16]

Made facts and one schema, answered by the bundled model in float32. One process has one thread of torch, and then as
many as there are actors, which have one each. Seconds are from the first batch to the end of the last one; what it
takes to start, before that, stands beside it. All runs keep a pool of their own, empty at first.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from lookahead.integrations.ray import JsonBatches, gather

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 24},
        "number": {"type": "integer", "minimum": 0, "maximum": 9999},
        "available": {"type": "boolean"},
    },
    "required": ["title", "number", "available"],
    "additionalProperties": False,
}
JOB: dict[str, Any] = {"model": "demo", "schema": SCHEMA, "dtype": "float32", "max_new_tokens": 64}


def prompts(count: int) -> list[str]:
    """Return made facts, each with the question for JSON."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from train_demo.facts import extraction, random_words

    rng, names = random.Random(5), random_words()
    return [f"<facts>\n{extraction(rng, names)[0]}\n</facts>\n<json>\n" for _ in range(count)]


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


def alone(rows: list[dict[str, Any]], size: int, threads: int, pool: str) -> tuple[list[dict[str, Any]], float]:
    """Return the rows as one process leaves them, and when it was told to begin."""
    import pyarrow

    torch.set_num_threads(threads)
    asked, batches = time.time(), Timed(**JOB, pool=pool)
    tables = [pyarrow.Table.from_pylist(rows[at : at + size]) for at in range(0, len(rows), size)]
    return [row for table in tables for row in batches(table).to_pylist()], asked


def on_ray(
    rows: list[dict[str, Any]], size: int, actors: int, pool: str, marker: str = ""
) -> tuple[list[dict[str, Any]], float]:
    """Return the rows as actors leave them, and when Ray was told to begin."""
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
    return sorted(dataset.take_all(), key=lambda row: int(row["id"])), asked


def line(name: str, rows: list[dict[str, Any]], asked: float, base: list[dict[str, Any]]) -> str:
    began, ended, first = min(r["began"] for r in rows), max(r["ended"] for r in rows), base or rows
    seconds, usual = ended - began, max(r["ended"] for r in first) - min(r["began"] for r in first)
    once = [row["id"] for row in rows] == list(range(len(rows)))
    same = sum(a["json"] == b["json"] for a, b in zip(rows, first, strict=True))
    errors = sum(row["error"] is not None for row in rows)
    return (
        f"| {name} | {began - asked:.1f} | {seconds:.1f} | {len(rows) / seconds:.1f} | **{usual / seconds:.2f}x** | "
        f"{'yes' if once else 'NO'} | {same} | {errors} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import ray

    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts(args.rows))]
    folder = Path(tempfile.mkdtemp())
    print("| | start s | seconds | rows/s | speed-up | each row once | JSON as in the first | errors |")
    print("|---|---|---|---|---|---|---|---|")
    base, asked = alone(rows, args.batch, 1, str(folder / "one"))
    print(line("one process, 1 thread", base, asked, []), flush=True)
    print(line(f"one process, {args.actors} threads", *alone(rows, args.batch, args.actors, str(folder / "two")), base))
    ray.init(num_cpus=args.actors, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name, marker in (("", ""), (", one killed", str(folder / "killed"))):
        pool = str(folder / f"ray{bool(marker)}")
        print(
            line(f"{args.actors} actors{name}", *on_ray(rows, args.batch, args.actors, pool, marker), base), flush=True
        )
        print(f"gathered: {gather(pool)}", file=sys.stderr)
    ray.shutdown()


if __name__ == "__main__":
    main()
