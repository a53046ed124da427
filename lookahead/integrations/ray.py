"""Validated JSON for every row of a Ray dataset: a batch class for `Dataset.map_batches`, and pools that actors share.

    rows = ray.data.read_json("mails.jsonl")
    done = rows.map_batches(
        JsonBatches,
        fn_constructor_kwargs={"model": "path/to/model", "schema": Invoice, "pool": "my-pool"},
        batch_size=16, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1,
    )
    done.write_json("invoices")
    gather("my-pool")

On several machines the model, if it is a directory, and the pool have to be where all of them see them under the same
path.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from lookahead.errors import InvalidArgument, PoolBusy, PoolNotFound, UnusableText
from lookahead.pool.pool import Pool

LIVE = ".live"
"""What the directory of the pools that actors write is called, after the pool that they share."""

_PAUSE_S = 0.1  # between looks whether an actor has ended

NEW_TOKENS = 256
"""Generated at most for a row, where nobody says how many."""


class JsonBatches:
    """Writes JSON of a schema for every row of a batch; one object an actor, which keeps what it learns.

    A row keeps its columns and gets two: `json`, a text that the schema and its validators accept, and `error`, which
    says why there is none. One of them is null. What is wrong with one row changes no other one. The texts are those of
    `generate_json`; greedy ones do not depend on how rows are put into batches, or on which actor has them.

    Args:
        model: a directory, a name on the Hub, or "demo" for the bundled one.
        schema: what `generate_json` takes. Types of one's own have to be importable where the actors run.
        prompt: the column with the prompt, a text or chat messages.
        output, error: the columns that are added.
        pool: a directory of a pool to draft from, see `Pool`. Actors map its files and see what is added to it; what
            they write goes to pools of their own beside it, in `<pool>.live`, on the disk after every batch. `gather`
            puts it into the pool.
        dtype, device: of the model; by default as the weights are, and a GPU if there is one.
        seed: of sampling, with the prompts of the batch; None: not set.
        whitespace, lenient: see `generate_json`.
        arguments: of `model.generate()`; `max_new_tokens` is 256 unless given.

    Raises:
        InvalidArgument, GrammarError: an argument that makes no sense, a schema that is not supported.
        InvalidInput: a model that cannot be loaded.
        PoolError: a pool that cannot be read.
    """

    def __init__(
        self,
        model: str,
        schema: Any,
        *,
        prompt: str = "prompt",
        output: str = "json",
        error: str = "error",
        pool: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
        device: str | None = None,
        seed: int | None = None,
        whitespace: Any = "fixed",
        lenient: bool = False,
        **arguments: Any,
    ) -> None:
        from lookahead.engine import Lookahead
        from lookahead.loading import Checkpoint, check_device, check_served, quiet

        if len({prompt, output, error}) < 3:
            raise InvalidArgument(
                f"prompt={prompt!r}, output={output!r}, error={error!r}; give three different columns"
            )
        self._columns, self._schema, self._seed = (prompt, output, error), schema, seed
        self._options = {"whitespace": whitespace, "lenient": lenient, "max_new_tokens": NEW_TOKENS, **arguments}
        checkpoint = Checkpoint(model)
        with quiet():
            config, self._tokenizer = checkpoint.config(), checkpoint.tokenizer()
            check_served(config, model, "use another model")
            loaded = checkpoint.model(config, dtype=dtype, device=check_device(device))
        self._context = getattr(config, "max_position_embeddings", None)
        self._lookahead = Lookahead(loaded, self._tokenizer)
        self._try_out()
        pools = [] if pool is None else _pools(Path(pool), self._tokenizer)
        self._live = pools[0] if pools else None
        self._lookahead = Lookahead(loaded, self._tokenizer, pool=pools)
        # With a pool what is written is kept there; generate_json would keep it in a memory of its own.
        self._options["memory"] = not pools

    def __call__(self, batch: Any) -> Any:
        """Return the batch, a `pyarrow.Table` or columns by name, with two more columns."""
        table = not isinstance(batch, Mapping)
        names = batch.column_names if table else list(batch)
        prompt, output, error = self._columns
        if prompt not in names:
            raise InvalidArgument(f"the rows have no column {prompt!r} but {', '.join(names)}; name it with prompt=")
        found = self._answers(batch[prompt].to_pylist() if table else list(batch[prompt]))
        added = {output: [one.text for one in found], error: [one.error for one in found]}
        if self._live is not None:
            self._live.flush()
        return _appended(batch, added) if table else {**batch, **{name: _objects(each) for name, each in added.items()}}

    def _try_out(self) -> None:
        """Generate one token, so that what is wrong with all rows ends the run; compiles what drafts, too."""
        from lookahead.structured.generate import generate_json

        with suppress(UnusableText):
            generate_json(self._lookahead, None, "{", self._schema, **{**self._options, "max_new_tokens": 1})

    def _answers(self, prompts: Sequence[Any]) -> list[Answer]:
        """Return an answer to each prompt; those that can be read are generated together."""
        readable, answers = list[Any](), list[Answer]()
        for prompt in prompts:
            try:
                readable.append(self._readable(prompt))
                answers.append(Answer())
            except InvalidArgument as problem:
                answers.append(_refused(problem))
        written = iter(self._written(readable))
        return [next(written) if answer == Answer() else answer for answer in answers]

    def _readable(self, prompt: Any) -> Any:
        """Return a prompt as `generate_json` takes it, or say what is wrong with it."""
        from lookahead.structured.prompts import encoded, listed

        if not isinstance(prompt, str):
            if prompt is None or isinstance(prompt, (bytes, int, float)):
                raise InvalidArgument(f"the prompt is {prompt!r}; give a text, or a list of chat messages")
            prompt = [dict(message) for message in prompt]
        (prompt,), _ = listed(prompt)
        length = len(encoded(self._tokenizer, prompt, self._options.get("chat_template_kwargs") or {}))
        new = int(self._options["max_new_tokens"])
        if self._context is not None and length + new > self._context:
            fits = f"the model's context is {self._context}; shorten it, or give a smaller max_new_tokens"
            raise InvalidArgument(f"the prompt has {length} tokens, and with {new} new ones that is too much: {fits}")
        return prompt

    def _written(self, prompts: list[Any]) -> list[Answer]:
        """Return the answers to prompts that can be read; where they cannot be generated together, one by one."""
        try:
            return self._together(prompts) if prompts else []
        except Exception as problem:
            if len(prompts) == 1:
                return [_refused(problem)]
            return [answer for prompt in prompts for answer in self._written([prompt])]

    def _together(self, prompts: list[Any]) -> list[Answer]:
        import torch

        from lookahead.structured.generate import generate_json

        if self._seed is not None:
            torch.manual_seed(zlib.crc32(repr(prompts).encode(), self._seed))
        try:
            found: Sequence[Any] = generate_json(self._lookahead, None, prompts, self._schema, **self._options)
        except UnusableText as some:
            found = some.results
        return [_refused(one) if isinstance(one, UnusableText) else Answer(one.text) for one in found]


class Answer(NamedTuple):
    """What came of one row."""

    text: str | None = None
    error: str | None = None


class Gathered(NamedTuple):
    """What `gather` did.

    Attributes:
        documents: that were new to the pool.
        parts: pools of actors that were taken in, and removed.
        busy: those that are still being written, and were left; the next `gather` takes them.
    """

    documents: int
    parts: int
    busy: tuple[str, ...]


def gather(pool: str | os.PathLike[str], *, wait_s: float = 10.0) -> Gathered:
    """Add to a pool what actors have written beside it; the pool is made if it is not there.

    To be called when the rows have been written, or any time. An actor that was killed leaves what it wrote up to its
    last batch. Nothing is added twice, also where this was interrupted.

    Args:
        wait_s: how long to wait for actors that still write; Ray ends them a moment after the last row.

    Raises:
        PoolBusy: another process writes the pool.
        PoolMismatch: an actor's pool is of another tokenizer.
        PoolError: a directory that cannot be used.
    """
    documents, parts, deadline = 0, 0, time.monotonic() + wait_s
    with Pool(pool) as whole:
        waiting = sorted(_beside(Path(pool)).glob("*/"))
        while waiting:
            busy = []
            for path in waiting:
                part = _part(path)
                if part is None:
                    busy.append(path)
                    continue
                with part:
                    documents += whole.absorb(part)
                whole.flush()
                shutil.rmtree(path)
                parts += 1
            waiting = busy
            if not waiting or time.monotonic() >= deadline:
                break
            time.sleep(_PAUSE_S)
    return Gathered(documents, parts, tuple(map(str, waiting)))


def _part(path: Path) -> Pool | None:
    """Return the pool of an actor that has ended; None of one that still writes. One that did not get far is empty."""
    try:
        return Pool(path)
    except PoolBusy:
        return None


def _pools(pool: Path, tokenizer: Any) -> list[Pool]:
    """Return the pool that this actor writes, and the shared one, if it is there."""
    own = _beside(pool) / f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
    try:
        shared = [Pool.open(pool, tokenizer=tokenizer, read_only=True)]
    except PoolNotFound:
        shared = []
    own.parent.mkdir(parents=True, exist_ok=True)
    return [Pool(own, tokenizer=tokenizer), *shared]


def _beside(pool: Path) -> Path:
    return pool.with_name(pool.name + LIVE)


def _refused(problem: Exception) -> Answer:
    said = " ".join(str(problem).split())
    return Answer(error=f"{type(problem).__name__}: {said}")


def _appended(table: Any, columns: Mapping[str, Sequence[str | None]]) -> Any:
    import pyarrow

    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pyarrow.array(values, pyarrow.string()))
    return table


def _objects(values: Sequence[Any]) -> Any:
    import numpy as np

    out = np.empty(len(values), object)
    out[:] = values
    return out
