"""Rates, memory and query times of `lookahead.Pool`, beside Arctic Inference's suffix tree on the same tokens.

    python benchmarks/pool.py [--tokens 1M 10M 100M] [--from PATH ... --tokenizer DIR [--requests FILE]] [--json OUT]

The text is synthetic (see `write_synthetic`), or real: the files under PATH in a shuffled order; its tokens are kept in
the temporary directory, so that a rerun is quick. Trees are grown on the contexts of replayed requests: those of FILE
(as replay.py reads it), or documents of the same text that are not in the pool.

Every figure comes from a process of its own, after compilation. CPU time is of all threads of the process where
something is inserted, of the asking thread where something is asked; wall time where it says so. The files are in the
page cache except where it says so. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from peers import arctic_rates
from recorded import BadInput, Request, load, load_tokenizer
from replay import Text, accept, verified

from lookahead.draft import IntArray
from lookahead.errors import LookaheadError
from lookahead.grow import Grower
from lookahead.pool.corpus import Corpus
from lookahead.pool.pool import LIVE, Pool
from lookahead.pool.search import _longest  # the kernel alone, which `Pool.longest_match` wraps
from lookahead.pool.sort import DEPTH

Figures = dict[str, Any]

VOCABULARY = 32_000  # of the synthetic text
HELD_OUT = 200_000  # tokens of the same text that no pool gets
BLOCK = 1 << 20
LARGE_LIVE = 16 << 20
NODES = 32
OPENINGS = 5
CONTEXTS = 2_000  # of the longest matches
TREES = 10_000  # after the warm-up
TOUCHED = 1_000  # trees whose memory is looked at
LARGEST_FILE = 1 << 20  # bytes
LARGEST_REQUEST = 4_096  # tokens of a held-out document that are replayed

# What is asked of the figures: a key, and how large or small it is to be.
TARGETS = {
    "insert_tokens_per_s": "≥ 1 M",
    "insert_large_live_tokens_per_s": "≥ 1 M",
    "bytes_a_token": "≤ 12",
    "open_ms": "≤ 50",
    "longest_match_p50": "≤ 20",
    "tree_p50": "≤ 150 (at 100M: 300)",
    "tree_p99": "≤ 600 (at 100M: 1,200)",
}


# The text.


@dataclass(frozen=True, slots=True)
class Tokens:
    """Documents in two files: `tokens.npy`, and `ends.npy` with the end of each. The last ones are held out."""

    folder: Path

    def documents(self) -> list[IntArray]:
        """Return all, oldest first, as views of one array in memory."""
        tokens, ends = (np.load(self.folder / f"{name}.npy") for name in ("tokens", "ends"))
        return np.split(tokens, ends[:-1])

    def kept(self) -> list[IntArray]:
        """Return what goes into the pool."""
        documents = self.documents()
        return documents[: len(documents) - self._held_out(documents)]

    def held_out(self) -> list[IntArray]:
        documents = self.documents()
        return documents[len(documents) - self._held_out(documents) :]

    @staticmethod
    def _held_out(documents: list[IntArray]) -> int:
        sizes = np.cumsum([len(document) for document in reversed(documents)])
        return int(np.searchsorted(sizes, HELD_OUT)) + 1


def write_synthetic(folder: Path, size: int, seed: int = 0) -> None:
    """Write `size` tokens: Zipf's law over 32,000 tokens, half of it copied.

    Spans of 60 tokens in the mean are in turn new and copied from anywhere before, every 30th token of a copy another
    one. Documents have 1,000 tokens in the mean.
    """
    rng = np.random.default_rng(seed)
    steps = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    names = rng.permutation(VOCABULARY).astype(np.int32)
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.int32, (size,))
    at = 0
    while at < size:
        n = min(max(at, 1 << 14), BLOCK, size - at)
        block = names[np.searchsorted(steps, rng.random(n) * steps[-1])]
        if at:
            _repeat(rng, tokens[:at], block)
        tokens[at : at + n] = block
        at += n
    ends = np.cumsum(rng.normal(1000, 250, size // 500).clip(100).astype(np.int64))
    np.save(folder / "ends.npy", np.append(ends[ends < size], size))


def _repeat(rng: np.random.Generator, earlier: IntArray, block: IntArray) -> None:
    """Copy every other span of `block` from `earlier`."""
    n = len(block)
    begins = np.concatenate([[0], np.cumsum(rng.geometric(1 / 60, n // 30 + 16))])
    span = np.searchsorted(begins, np.arange(n), "right") - 1
    source = rng.integers(0, len(earlier), len(begins))[span] + np.arange(n) - begins[span]
    copied = (span % 2 == 1) & (rng.random(n) > 1 / 30) & (source < len(earlier))
    block[copied] = earlier[source[copied]]


def write_files(folder: Path, size: int, paths: list[Path], tokenizer: Path) -> None:
    """Write the first `size` tokens of the files under `paths`, shuffled.

    Raises:
        BadInput: there are fewer.
    """
    encode, corpus = load_tokenizer(tokenizer).encode_batch, Corpus(paths, max_bytes=LARGEST_FILE)
    random.Random(0).shuffle(corpus.sources)
    documents: list[IntArray] = []
    found, texts = 0, (document.text for document in corpus)
    while found < size and (batch := list(islice(texts, 64))):
        documents += [np.array(e.ids, np.int32) for e in encode(batch, add_special_tokens=False)]
        found += sum(len(document) for document in documents[-len(batch) :])
    if found < size:
        raise BadInput(f"--from: {found:,} tokens in all, {size:,} are needed ({HELD_OUT:,} of them held out)")
    np.save(folder / "ends.npy", np.cumsum([len(document) for document in documents]))
    np.save(folder / "tokens.npy", np.concatenate(documents))  # last: a run that was cut short leaves none


# The figures. Each function runs in a fresh process.


def alone(figure: Callable[..., Any], *args: Any) -> Any:
    """Return `figure(*args)` from a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(figure, *args).result()


def warm_up(sources: tuple[str, ...] = ("prompt", "pool")) -> Grower:
    """Compile, or load, all that a pool and a grower run."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder, Pool(folder, live_tokens=64) as pool:
        for _ in range(40):
            pool.add(rng.integers(0, 9, 64))
        pool.prune(2048)
        pool.add(rng.integers(0, 9, 64))
        pool.compact()
        context = rng.integers(0, 9, 64).astype(np.int32)
        pool.longest_match(context)
        grower = Grower(sources=sources, pools=(pool,), min_chance=0.0)
        for _ in trees(grower, Request("", context[:32], context[32:])):
            pass
        return grower


def insert(text: Tokens, path: Path, live_tokens: int) -> Figures:
    """Add all documents, one after the other."""
    warm_up()
    documents = text.kept()
    tokens = sum(len(document) for document in documents)
    wall, cpu = time.perf_counter(), time.process_time()
    with Pool(path, live_tokens=live_tokens) as pool:
        for document in documents:
            pool.add(document)
        pool.flush()
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        pool.settle()
        return {
            "tokens": tokens,
            "tokens_per_s": tokens / cpu_s,
            "tokens_per_wall_s": tokens / wall_s,
            "until_merged_tokens_per_s": tokens / (time.process_time() - cpu),
            "segments": len(pool.segments),
            "bytes_a_token": pool.nbytes / pool.tokens,
            "disk_bytes_a_token": sum(file.stat().st_size for file in path.iterdir()) / pool.tokens,
        }


def compact(path: Path) -> float:
    """Merge all segments; return the CPU time."""
    warm_up()
    with Pool.open(path) as pool:
        begin = time.process_time()
        pool.compact()
        return time.process_time() - begin


def opening(path: Path, cold: bool) -> float:
    """Return the milliseconds (wall) that opening takes; `cold`: with the files out of the page cache."""
    warm_up()
    if cold:
        evict(path)
    begin = time.perf_counter()
    pool = Pool.open(path)
    pool.snapshot()
    milliseconds = 1e3 * (time.perf_counter() - begin)
    pool.close()
    return milliseconds


def evict(path: Path) -> None:
    """Drop the files in a directory from the page cache, as far as nobody has them mapped."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def growth(path: Path, contexts: list[IntArray]) -> Figures:
    """Return the MB by which the process grows when a pool is opened, and while trees are grown on `contexts`.

    Pages of the pool's files are counted apart: other processes share them, and the kernel takes them back at need. The
    files are out of the page cache before, so that none are mapped only because they are there.
    """
    warm_up(("pool",))
    evict(path)
    start = memory()
    pool = Pool.open(path, read_only=True)
    pool.snapshot()
    opened = memory()
    grower = Grower(sources=("pool",), pools=(pool,), min_chance=0.0)
    ready = memory()
    for context in contexts[:TOUCHED]:
        grower.propose(context, NODES)
    asked = memory()
    names = ("own", "file")
    return {f"open_{name}_mb": (opened[i] - start[i]) / 1e6 for i, name in enumerate(names)} | {
        f"trees_{name}_mb": (asked[i] - ready[i]) / 1e6 for i, name in enumerate(names)
    }


def asking(path: Path, requests: list[Request], contexts: list[IntArray]) -> Figures:
    """Time what a pool answers: longest matches, and whole trees with and without it."""
    warm_up()
    pool = Pool.open(path, read_only=True)
    figures = longest_matches(pool, contexts[:CONTEXTS])
    for name, sources in (("", ("prompt", "pool")), ("pool_", ("pool",)), ("prompt_", ("prompt",))):
        grower = Grower(sources=sources, pools=(pool,), min_chance=0.0)
        firsts, laters, walls, nodes, tokens = [], [], [], [], []
        for i, request in enumerate(requests):
            for first, cpu, wall, size, accepted in trees(grower, request):
                if 10 * i < len(requests):
                    continue  # the first tenth warms up
                (firsts if first else laters).append(cpu)
                if not first:
                    walls.append(wall)
                nodes.append(size)
                tokens.append(accepted)
            if len(laters) >= TREES:
                break
        figures |= percentiles(f"{name}tree", laters) | percentiles(f"{name}tree_wall", walls)
        figures |= percentiles(f"{name}first_tree", firsts)
        figures |= {f"{name}nodes": statistics.mean(nodes), f"{name}tokens_per_pass": statistics.mean(tokens)}
    return {**figures, "trees": len(laters), "matched_segments": len(pool.segments)}


def longest_matches(pool: Pool, contexts: list[IntArray]) -> Figures:
    """Time the longest match, through the pool and in the kernel alone, each asked once before."""
    runs, spot = pool.snapshot().views, np.zeros(3, np.int64)
    suffixes = [context[-DEPTH:][::-1].astype(np.int64) for context in contexts]
    found = [pool.longest_match(context) for context in contexts[:200]]
    through = [micros(partial(pool.longest_match, context))[0] for context in contexts[:200]]

    def kernel(suffix: IntArray) -> None:
        _longest(runs, suffix, spot)

    for suffix in suffixes:
        kernel(suffix)
    inside = [micros(partial(kernel, suffix))[0] for suffix in suffixes]
    mean = {"match_tokens": statistics.mean(found)}
    return percentiles("pool_longest_match", through) | percentiles("longest_match", inside) | mean


def trees(grower: Grower, request: Request) -> Iterator[tuple[bool, float, float, int, int]]:
    """Replay a request; yield of every tree whether it is the first, its µs (CPU, wall), its nodes, accepted tokens."""
    text = Text(request.prompt, len(request.prompt) + len(request.output))
    row, rest, first = grower.start(request.prompt), request.output, True
    while len(rest):
        context, drafts = text.so_far(), []
        cpu, wall = micros(lambda context=context, drafts=drafts: drafts.append(row.propose(context, NODES)))
        path, committed = accept(drafts[0], rest)
        yield first, cpu, wall, len(drafts[0]) - 1, len(committed)
        row.observe(verified(drafts[0], path, committed))
        text.extend(committed)
        rest, first = rest[len(committed) :], False


def micros(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the µs of a call: of this thread on the CPU, and on the wall."""
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    call()
    return (time.thread_time_ns() - cpu) / 1e3, (time.perf_counter_ns() - wall) / 1e3


def percentiles(name: str, values: list[float]) -> Figures:
    return {f"{name}_p{share}": float(np.percentile(values, share)) for share in (50, 99)}


def memory() -> tuple[int, int]:
    """Return the bytes of this process that are in memory: its own, and pages of mapped files."""
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    page = os.sysconf("SC_PAGE_SIZE")
    return (resident - shared) * page, shared * page


def arctic(text: Tokens, contexts: list[IntArray]) -> Figures:
    return arctic_rates(text.kept(), contexts)


# One size.


def measure(text: Tokens, requests: list[Request], folder: Path, arctic_limit: int) -> Figures:
    """Return all figures of one text."""
    contexts = sample(text.held_out())
    requests = requests or halves(text.held_out())
    path, other = folder / "pool", folder / "other"
    figures: Figures = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    tell("inserting")
    figures["insert"] = alone(insert, text, path, LIVE)
    figures["insert_large_live"] = alone(insert, text, other, LARGE_LIVE)
    shutil.rmtree(other)
    tell("asking")
    figures["as_added"] = look(path, requests, contexts)
    tell("merging")
    figures["compact_s"] = alone(compact, path)
    figures["compacted"] = look(path, requests, contexts)
    figures["compacted"]["disk_bytes"] = sum(file.stat().st_size for file in path.iterdir())
    shutil.rmtree(path)
    size = figures["insert"]["tokens"]
    if size > arctic_limit:
        figures["arctic_left_out"] = f"{size:,} tokens take about {320 * size / 1e9:.0f} GB; --arctic-limit raises this"
    else:
        tell("Arctic")
        try:
            figures["arctic"] = alone(arctic, text, contexts)
        except ImportError as error:
            figures["arctic_left_out"] = str(error)
    return figures | {"load_after": os.getloadavg()[0]}


def look(path: Path, requests: list[Request], contexts: list[IntArray]) -> Figures:
    """Return what opening, memory and questions cost."""
    figures = alone(growth, path, contexts)
    for name, cold in (("open_cold_ms", True), ("open_ms", False)):
        figures[name] = statistics.median(alone(opening, path, cold) for _ in range(OPENINGS))
    return figures | alone(asking, path, requests, contexts)


def halves(documents: list[IntArray]) -> list[Request]:
    """Return requests to write the second half of each document from its first."""
    some = [document[:LARGEST_REQUEST] for document in documents if len(document) > 1]
    return [Request("", document[: len(document) // 2], document[len(document) // 2 :]) for document in some]


def sample(documents: list[IntArray]) -> list[IntArray]:
    """Return contexts from random places of `documents`."""
    rng = np.random.default_rng(2)
    documents = [document for document in documents if len(document) > 2 * DEPTH]
    picked = (documents[rng.integers(len(documents))] for _ in range(CONTEXTS))
    ends = ((document, int(rng.integers(2 * DEPTH, len(document)))) for document in picked)
    return [document[max(0, end - 64) : end].copy() for document, end in ends]


# What is printed.

ROWS = (
    ("load of the machine, before", "", "load_before", ""),
    ("— after", "", "load_after", ""),
    ("insert: tokens/s of CPU time, {live} live tokens", "insert", "tokens_per_s", "insert_tokens_per_s"),
    ("— the same, until background merging is done", "insert", "until_merged_tokens_per_s", ""),
    ("— tokens/s of wall time", "insert", "tokens_per_wall_s", ""),
    ("insert: tokens/s of CPU time, {large} live tokens", "insert_large_live", "tokens_per_s", "insert_tokens_per_s"),
    ("bytes a token", "insert", "bytes_a_token", "bytes_a_token"),
    ("— in files", "insert", "disk_bytes_a_token", "bytes_a_token"),
    ("compact: s of CPU time", "", "compact_s", ""),
)
ASKED = (
    ("segments", "matched_segments", ""),
    ("open: ms, median of 5 processes", "open_ms", "open_ms"),
    ("— with its files out of the page cache", "open_cold_ms", ""),
    ("— the process grows by MB of its own", "open_own_mb", ""),
    ("— and by MB of mapped files", "open_file_mb", ""),
    ("1,000 trees: the process grows by MB of its own", "trees_own_mb", ""),
    ("— and by MB of mapped files", "trees_file_mb", ""),
    ("longest match: µs, p50", "longest_match_p50", "longest_match_p50"),
    ("— p99", "longest_match_p99", ""),
    ("— `Pool.longest_match`, p50", "pool_longest_match_p50", ""),
    ("— p99", "pool_longest_match_p99", ""),
    ("tree of 32 nodes, prompt and pool: µs, p50", "tree_p50", "tree_p50"),
    ("— p99", "tree_p99", "tree_p99"),
    ("— wall, p50", "tree_wall_p50", ""),
    ("— wall, p99", "tree_wall_p99", ""),
    ("— the pool alone, p50", "pool_tree_p50", ""),
    ("— the pool alone, p99", "pool_tree_p99", ""),
    ("— the prompt alone, p50", "prompt_tree_p50", ""),
    ("— the prompt alone, p99", "prompt_tree_p99", ""),
    ("first tree of a request (indexes the prompt), p50", "first_tree_p50", ""),
    ("— the prompt alone, p50", "prompt_first_tree_p50", ""),
    ("tokens per pass", "tokens_per_pass", ""),
    ("— the prompt alone", "prompt_tokens_per_pass", ""),
)
PEER = (
    ("Arctic: insert, tokens/s of CPU time", "insert_tokens_per_s"),
    ("— bytes a token", "bytes_a_token"),
    ("— tree of up to 32, best limits: µs, p50", "speculate_p50_us"),
    ("— p99", "speculate_p99_us"),
    ("— with the limits it comes with (fewer nodes): p50", "as_shipped_p50_us"),
    ("— p99", "as_shipped_p99_us"),
)


def table(results: dict[str, Figures]) -> str:
    """Return Markdown, a column for each size."""
    lines = [f"| | {' | '.join(results)} | target |", "|---" * (len(results) + 2) + "|"]

    def add(label: str, target: str, *keys: str) -> None:
        cells = []
        for figures in results.values():
            value: Any = figures
            for key in filter(None, keys):
                value = value.get(key, {})
            cells.append("" if value == {} else shown(value))
        lines.append(f"| {label} | {' | '.join(cells)} | {TARGETS.get(target, '')} |")

    for label, group, key, target in ROWS:
        add(label.format(live="1M", large="16M"), target, group, key)
    for group, name in (("as_added", "as added"), ("compacted", "compacted")):
        lines.append(f"| **{name}** | {' | '.join('' for _ in results)} | |")
        for label, key, target in ASKED:
            add(label, target, group, key)
    lines.append(f"| **peer** | {' | '.join('' for _ in results)} | |")
    for label, key in PEER:
        add(label, "", "arctic", key)
    return "\n".join(lines)


def shown(value: float) -> str:
    if value >= 1e5:
        return f"{value / 1e6:.2f} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepared(options: argparse.Namespace, size: int, folder: Path) -> Tokens:
    """Return the text: `size` tokens, and what is held out."""
    total = size + HELD_OUT
    if not options.paths:
        write_synthetic(folder, total)
        return Tokens(folder)
    what = [*map(str, map(Path.resolve, options.paths)), str(options.tokenizer.resolve()), total]
    kept = Path(tempfile.gettempdir()) / f"lookahead-tokens-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"
    kept.mkdir(exist_ok=True)
    if not (kept / "tokens.npy").exists():
        write_files(kept, total, options.paths, options.tokenizer)
    return Tokens(kept)


def number(text: str) -> int:
    """Return 10M as 10,000,000."""
    scale = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    return int(text if scale == 1 else text[:-1]) * scale


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", default=["1M", "10M"], metavar="N", help="sizes (default: 1M 10M)")
    parser.add_argument("--from", nargs="+", type=Path, dest="paths", metavar="PATH", help="files instead of Zipf text")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its directory")
    parser.add_argument("--requests", type=Path, metavar="FILE", help="replay these, JSON lines as for replay.py")
    parser.add_argument("--limit", type=int, default=30, help="requests of each workload (default: %(default)s)")
    parser.add_argument(
        "--arctic-limit",
        type=number,
        default=12_000_000,
        metavar="N",
        help="largest text it gets (default: 12M tokens)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    try:
        least = min(map(number, options.tokens))
    except ValueError:
        parser.error(f"--tokens {' '.join(options.tokens)}: give whole numbers, such as 500k or 10M")
    if least < 10_000 or options.limit < 1:
        parser.error("--tokens must be 10k or more, --limit 1 or more")
    if (options.paths or options.requests) and not options.tokenizer:
        parser.error("--from and --requests need --tokenizer")
    return options


def main(options: argparse.Namespace) -> None:
    requests: list[Request] = []
    if options.requests:
        requests, _ = load(options.requests, load_tokenizer(options.tokenizer), [], options.limit)
        random.Random(0).shuffle(requests)
    results: dict[str, Figures] = {}
    for name in options.tokens:
        tell(f"{name} tokens; load {os.getloadavg()[0]:.1f}")
        with tempfile.TemporaryDirectory(prefix="lookahead-pool-") as folder:
            text = prepared(options, number(name), Path(folder))
            results[name] = measure(text, requests, Path(folder), options.arctic_limit)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    for name, figures in results.items():
        if reason := figures.get("arctic_left_out"):
            print(f"\nleft out at {name}: Arctic ({reason})")


if __name__ == "__main__":
    try:
        main(arguments())
    except (BadInput, LookaheadError, OSError) as error:
        raise SystemExit(f"pool.py: {error}") from None
