"""What `lookahead pool build`, `add`, `info`, `merge` and `prune` do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookahead.errors import InvalidInput, LookaheadError, PoolDamaged, PoolNotFound
from lookahead.pool import manifest
from lookahead.pool.report import Progress, holdings, plural, rate, rows, segments
from lookahead.pool.store import Store

# The pool itself loads numba, and tokenizers load torch: not for `info`.
if TYPE_CHECKING:
    from lookahead.pool.corpus import Corpus, Document
    from lookahead.pool.ingest import Tally
    from lookahead.pool.pool import Pool

LIVE = 16 << 20
"""Tokens in memory while a pool is built. Large segments make it fast; a killed build loses what was in memory."""

COMPACTED = 300_000_000
"""Larger pools stay in several segments: merging all of one takes memory for the whole text."""

DAMAGED, INTERRUPTED = 1, 130
STANDARD_INPUT = "-"


def run(args: argparse.Namespace) -> int:
    """Run an action and return its exit code."""
    with _repairable(args.directory):
        return {"build": build, "add": add, "info": info, "merge": merge, "prune": prune}[args.action](args)


@contextmanager
def _repairable(directory: str) -> Iterator[None]:
    """Name the command that goes on without what is damaged."""
    try:
        yield
    except PoolDamaged as error:
        if "`lookahead pool prune" in str(error):  # of another pool, which this one was to take in
            raise
        fix = f"`lookahead pool prune {directory} --damaged` drops it and keeps the rest"
        raise PoolDamaged(f"{_problem(error)}; {fix}" if "; " in str(error) else str(error)) from error


def _problem(error: LookaheadError) -> str:
    """Return what is wrong, without the fix, which is for programs."""
    return str(error).split("; ")[0]


def build(args: argparse.Namespace) -> int:
    """Read files and directories into a pool."""
    if own := [path for path in args.paths if os.path.realpath(path) == os.path.realpath(args.directory)]:
        raise InvalidInput(
            f"--from {own[0]}: that is DIR, where the pool is to be; give the pool a directory of its own"
        )
    corpus = _corpus(args, args.paths)
    if not corpus.sources:
        raise _nothing(corpus, "there is no file to read")
    tokenizer = _tokenizer(args)
    with _opened(args.directory, make=True, tokenizer=tokenizer, max_tokens=args.max_tokens) as pool:
        return _fill(args, pool, corpus, corpus, tokenizer)


def add(args: argparse.Namespace) -> int:
    """Read files into a pool that is there."""
    corpus = _corpus(args, [path for path in args.paths if path != STANDARD_INPUT])
    _require_pool(args.directory)
    tokenizer = _tokenizer(args)
    typed: Iterator[Document] = iter(())
    if STANDARD_INPUT in args.paths:
        if sys.stdin is None:
            raise InvalidInput("there is no standard input; give files")
        typed = corpus.stream(sys.stdin.buffer, "standard input")
    with _opened(args.directory, make=False, tokenizer=tokenizer) as pool:
        return _fill(args, pool, corpus, chain(corpus, typed), tokenizer)


def _fill(args: argparse.Namespace, pool: Pool, corpus: Corpus, documents: Any, tokenizer: Any) -> int:
    """Add the documents, write and merge, and say what came of it."""
    from lookahead.pool.ingest import Tally, ingest, undivided

    tally, before, begin = Tally(), pool.tokens, time.perf_counter()
    try:
        with Progress(corpus, quiet=args.quiet) as progress:
            ingest(pool, documents, tokenizer, tally=tally, skipped=corpus.skipped, report=progress)
            progress.say("writing")
            with undivided():
                pool.flush()
            if args.action == "build" and len(pool.segments) > 1 and pool.tokens <= COMPACTED:
                progress.say("merging")
                pool.compact()
            pool.settle()
    except KeyboardInterrupt:
        print("\nlookahead: stopping; what was added is being written", file=sys.stderr, flush=True)
        pool.close()
        said = f"{plural(tally.documents, 'document')} ({tally.tokens:,} tokens) were added and are in {args.directory}"
        print(f"lookahead: interrupted; {said}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    if not tally.documents and not tally.known:
        raise _nothing(corpus, "no document could be used")
    if not args.quiet:
        print(_summary(args, pool, corpus, tally, before, time.perf_counter() - begin))
    return 0


def _summary(args: argparse.Namespace, pool: Pool, corpus: Corpus, tally: Tally, before: int, seconds: float) -> str:
    entries = [segment.entry for segment in pool.segments if segment.entry is not None]
    gone = before + tally.tokens - pool.tokens
    took = f"{seconds:.1f} s" + (f", {rate(tally.tokens, seconds)}" if tally.tokens else "")
    oldest = f"{gone:,} tokens of the oldest documents: the pool's limit is {pool.max_tokens:,} (--max-tokens)"
    return rows(
        [
            ("added", [f"{plural(tally.documents, 'document')}, {tally.tokens:,} tokens in {took}"]),
            ("known", [f"{plural(tally.known, 'document')}, not added again"] if tally.known else []),
            ("skipped", corpus.skipped.lines()),
            ("dropped", [oldest] if gone > 0 else []),
            ("pool", [f"{args.directory}: {holdings(pool.tokens, pool.documents, entries)}"]),
        ]
    )


def _corpus(args: argparse.Namespace, paths: list[str]) -> Corpus:
    from lookahead.pool.corpus import MAX_BYTES, Corpus

    return Corpus(
        paths,
        field=args.field,
        include=args.include,
        exclude=args.exclude,
        max_bytes=args.max_file_bytes or MAX_BYTES,
        without=args.directory,
    )


def _nothing(corpus: Corpus, what: str) -> InvalidInput:
    why = "; ".join(corpus.skipped.lines())
    return InvalidInput(f"nothing to add: {what}; {f'skipped: {why}' if why else 'give other files'}")


def _tokenizer(args: argparse.Namespace) -> Any:
    from lookahead.loading import Checkpoint, quiet, read_tokenizer

    if args.tokenizer is not None and Path(args.tokenizer).is_file():
        return read_tokenizer(args.tokenizer)
    with quiet():
        return Checkpoint(args.model).tokenizer() if args.tokenizer is None else read_tokenizer(args.tokenizer)


def _opened(directory: str, *, make: bool, **options: Any) -> Pool:
    from lookahead.pool.pool import Pool

    if Path(directory).is_file():
        raise InvalidInput(f"{directory} is a file; give a directory for the pool")
    try:
        return (Pool if make else Pool.open)(directory, live_tokens=LIVE, **options)
    except PoolNotFound:
        if not make:
            raise
        raise InvalidInput(f"{directory} holds files but no pool; give a new directory, or an empty one") from None


def _require_pool(directory: str) -> None:
    Store.open(directory, writable=False, damaged="skip").close()


def info(args: argparse.Namespace) -> int:
    """Say what a pool holds."""
    with Store.open(args.directory, writable=False, damaged="skip") as store:
        if args.verify:
            store.verify()
        print(json.dumps(_figures(args, store), indent=2) if args.json else _described(args, store))
        return DAMAGED if store.problems else 0


def _limit(store: Store) -> int:
    from lookahead.pool.pool import LIMIT

    return int(store.settings.get("max_tokens", LIMIT))


def _figures(args: argparse.Namespace, store: Store) -> dict[str, Any]:
    now, entries = time.time(), store.entries
    tokens, nbytes = (sum(getattr(entry, name) for entry in entries) for name in ("tokens", "nbytes"))
    names = ("name", "tokens", "documents", "nbytes")
    return {
        "path": str(store.path),
        "tokens": tokens,
        "documents": sum(entry.documents for entry in entries),
        "nbytes": nbytes,
        "bytes_per_token": round(nbytes / tokens, 3) if tokens else None,
        "max_tokens": _limit(store),
        "tokenizer": store.settings.get("tokenizer"),
        "segments": [
            {name: getattr(entry, name) for name in names} | {"age_s": max(0, round(now - entry.created))}
            for entry in entries
        ],
        "damaged": [_problem(problem) for problem in store.problems],
        "verified": args.verify,
    }


def _described(args: argparse.Namespace, store: Store) -> str:
    figures, entries = _figures(args, store), store.entries
    damaged = [*figures["damaged"]]
    if damaged:
        damaged.append(f"`lookahead pool prune {args.directory} --damaged` drops this and keeps the rest")
    elif args.verify:
        damaged.append("nothing; every byte was read")
    return rows(
        [
            ("pool", [f"{args.directory}: {holdings(figures['tokens'], figures['documents'], entries)}"]),
            ("limit", [f"{figures['max_tokens']:,} tokens"]),
            ("tokenizer", [figures["tokenizer"] or "not known; the first one that opens it for writing is kept"]),
            ("segments", segments(entries, time.time())),
            ("damaged", damaged),
        ]
    )


def merge(args: argparse.Namespace) -> int:
    """Add the documents of other pools."""
    from lookahead.pool.pool import Pool

    if own := [other for other in args.others if os.path.realpath(other) == os.path.realpath(args.directory)]:
        raise InvalidInput(f"{own[0]} is the pool itself; name other ones")
    others = []
    for other in args.others:
        with _repairable(other):
            others.append(Pool.open(other, read_only=True))
    with _opened(args.directory, make=True) as pool:
        for path, other in zip(args.others, others, strict=True):
            before, added = pool.tokens, pool.absorb(other)
            known = f", {plural(other.documents - added, 'document')} known" if added < other.documents else ""
            print(f"{path}: {plural(added, 'document')} added, {pool.tokens - before:,} tokens{known}")
            other.close()
        pool.flush()
        pool.settle()
        entries = [segment.entry for segment in pool.segments if segment.entry is not None]
        print(f"{args.directory}: {holdings(pool.tokens, pool.documents, entries)}")
    return 0


def prune(args: argparse.Namespace) -> int:
    """Drop what is damaged, or what is oldest."""
    if args.max_tokens is None and not args.damaged:
        raise InvalidInput(
            "say what to drop: --max-tokens N keeps the youngest N tokens, --damaged drops what is damaged"
        )
    if args.damaged:
        _drop_damaged(args.directory)
    if args.max_tokens is not None:
        with _opened(args.directory, make=False) as pool:
            gone = pool.prune(args.max_tokens)
            left = f"{pool.tokens:,} tokens in {plural(pool.documents, 'document')} are left"
        print(f"dropped {gone:,} tokens of the oldest documents; {left}")
    return 0


def _drop_damaged(directory: str) -> None:
    with Store.open(directory, writable=True, damaged="skip") as store:
        store.verify()
        problems = [_problem(problem) for problem in store.problems]
        if problems:
            store.commit(store.entries)  # which moves the damaged files aside
        for path in Path(directory).glob("*.damaged"):
            if manifest.is_name(path.stem) or path.stem == manifest.FILE:
                path.unlink()
        left = plural(sum(entry.tokens for entry in store.entries), "token")
    dropped = rows([("dropped", problems)]) if problems else "nothing is damaged; every byte was read"
    print(f"{dropped}\n{left} are left" if problems else dropped)
