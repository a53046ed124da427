"""JSON for the rows of a Ray Data dataset: a model in every actor, and a pool that all of them fill.

    rows = map_json(
        ray.data.read_parquet("/shared/mails"), model="/shared/model", schema=Invoice, prompt="mail",
        pool="/shared/pool", actors=4, max_new_tokens=256,
    )
    rows.write_parquet("/shared/invoices")
    gather("/shared/pool")

On a cluster the model and the pool must be paths that every node sees, on storage that all of them mount (or the model
a name on the Hugging Face Hub). A file system whose locks do not reach from node to node cannot hold the pool. The
schema travels to the actors: a type must be importable there, or be defined in the main program; a JSON Schema always
arrives. Nothing else is taken from the driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lookahead.engine import Lookahead
from lookahead.errors import (
    InvalidArgument,
    InvalidInput,
    LookaheadError,
    PoolError,
    UnsupportedArgument,
    UnsupportedCache,
    UnsupportedModel,
    UnusableText,
)
from lookahead.grammar.grammar import Whitespace
from lookahead.integrations.columns import Kind, extended, values_of
from lookahead.loading import Checkpoint, check_device, check_served, quiet
from lookahead.memory import Remember
from lookahead.options import DTYPES
from lookahead.pool.parts import gather, open_part, open_shared
from lookahead.pool.pool import Pool
from lookahead.structured.call import NEW_TOKENS
from lookahead.structured.generate import generate_json
from lookahead.structured.prompts import encoded
from lookahead.structured.results import Result
from lookahead.structured.schemas import Shape
from lookahead.trace import Run

__all__ = ["Answer", "JsonBatches", "gather", "map_json"]

BATCH_SIZE = 16
"""Rows that are generated together unless the caller says how many."""

_DEMO = "demo"
_SETUP = (UnsupportedModel, UnsupportedCache, UnsupportedArgument, PoolError)  # no row can be blamed for these
_OF_ROWS = (LookaheadError, ValueError, IndexError, torch.OutOfMemoryError)
_TEMPLATE = "chat_template_kwargs"

log = logging.getLogger(__name__)


def map_json(
    dataset: Any,
    *,
    model: str | os.PathLike[str],
    schema: Any,
    actors: int | tuple[int, int] = 1,
    batch_size: int = BATCH_SIZE,
    pool: str | os.PathLike[str] | None = None,
    ray_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return the dataset with a JSON value of `schema` for the prompt of every row; see `JsonBatches`.

    What can be checked without the model is checked here. Whole blocks go to the actors, so that a dataset of fewer
    blocks than actors leaves some idle: `dataset.repartition(…)` it first.

    Args:
        dataset: a `ray.data.Dataset`.
        model, schema, pool, options: see `JsonBatches`; relative paths are those of this process.
        actors: how many, each with a model of its own; or the fewest and the most of them.
        batch_size: rows that are generated together.
        ray_options: further arguments of `Dataset.map_batches`, such as {"num_gpus": 1} or {"num_cpus": 4}: CPU threads
            of an actor are as many as its `num_cpus`.

    Raises:
        InvalidArgument: an argument that makes no sense, or a schema that does not survive the way to the actors.
        GrammarError: the schema has keywords that are not supported.
    """
    from ray.data import ActorPoolStrategy, Dataset

    few, many = actors if isinstance(actors, tuple) else (actors, actors)
    if not _whole(few, 1) or not _whole(many, few):
        raise InvalidArgument(f"actors={actors!r}; give a whole number from 1, or the fewest and the most of them")
    if not _whole(batch_size, 1):
        raise InvalidArgument(f"batch_size={batch_size!r}; give a whole number from 1")
    if not isinstance(dataset, Dataset):
        raise InvalidArgument(f"dataset is a {type(dataset).__name__}; give a ray.data.Dataset")
    columns = _check({"model": model, "schema": schema, "pool": pool, **options})
    _require_travels(schema)
    if (known := dataset.schema(fetch_if_missing=False)) is not None:
        _require_columns(known.names, columns)
    here = {"model": _absolute(model), "pool": None if pool is None else os.path.abspath(pool)}
    strategy = ActorPoolStrategy(size=few) if few == many else ActorPoolStrategy(min_size=few, max_size=many)
    return dataset.map_batches(
        JsonBatches,
        fn_constructor_kwargs={"schema": schema, **here, **options},
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=strategy,
        **(ray_options or {}),
    )


class JsonBatches:
    """Writes JSON of a schema for batches of rows; what `Dataset.map_batches` makes one of in every actor.

    A row keeps its columns and gets four: the JSON, exactly as generated and validated (None: there is none), the error
    ("TypeName: message"; None: there is none), the tokens that were generated for it, and the model passes that these
    took. A row that fails (no text for a prompt, a prompt that fills the context, a value that `max_new_tokens` cut
    off or a validator refuses) has its error, and the others go on. Greedy results are those of `generate_json` for the
    row alone, as far as rounding lets a batch give what its rows give alone. What is wrong with the set-up is raised,
    and ends the run.

    With a pool, actors draft from its files, mapped and shared by the processes of a node, and from what they wrote
    themselves, a pool in a directory of its own below `<pool>.live`, which is on the disk after every batch; `gather`
    brings these together. What another process adds to the pool is drafted from at the next batch.

    Args:
        model: a directory or the name of a model on the Hugging Face Hub; "demo": the bundled one.
        schema: what the values must be, see `generate_json`.
        prompt: the column with the prompts, each a text or a list of chat messages.
        output, error, tokens, passes: what the new columns are called.
        dtype: of the model; "auto": as stored.
        device: of the model; None: a GPU if there is one.
        pool: the directory of the pool that actors share, made if it is not there; None: each remembers for itself.
        remember: what is added to the live part, see `Lookahead`; None: nothing.
        seed: what the draws of a batch follow from, with its prompts, wherever it is generated; None: another one in
            every actor. A batch has the draws that it has as one batch, not those of its rows alone.
        whitespace, lenient: see `Grammar.json_schema`.
        options: further arguments of `model.generate()`, such as `max_new_tokens`, `do_sample`; `chat_template_kwargs`.

    Raises:
        InvalidArgument: an argument that makes no sense, a model that cannot be loaded.
        GrammarError: the schema has keywords that are not supported.
        UnsupportedModel: the model is of a kind that is not served.
        PoolError: the pool cannot be used; see `Pool`.

    >>> JsonBatches(model="demo", schema=list[int], max_new_tokens=9)({"prompt": np.array(["[1, 2"], object)})
    """

    def __init__(
        self,
        *,
        model: str | os.PathLike[str],
        schema: Any,
        prompt: str = "prompt",
        output: str = "json",
        error: str = "error",
        tokens: str = "tokens",
        passes: str = "passes",
        dtype: str = "auto",
        device: str | None = None,
        pool: str | os.PathLike[str] | None = None,
        remember: Remember = "output",
        seed: int | None = None,
        whitespace: Whitespace = "fixed",
        lenient: bool = False,
        **options: Any,
    ) -> None:
        columns = {"output": output, "error": error, "tokens": tokens, "passes": passes}
        what: dict[str, Any] = {"schema": schema, "whitespace": whitespace, "lenient": lenient}
        rest = {"model": model, "prompt": prompt, "dtype": dtype, "seed": seed, "pool": pool, "remember": remember}
        _check(rest | columns | what)
        self._prompt, self._columns = prompt, tuple(columns.values())
        self._template = options.pop(_TEMPLATE, None) or {}
        self._options: dict[str, Any] = {**what, **options, "memory": pool is None and remember is not None}
        self._seed = secrets.randbits(64) if seed is None else seed
        self._model, self._tokenizer = _loaded(os.fspath(model), dtype, device)
        self._try()
        self._pools = () if pool is None else _opened(pool, self._tokenizer, remember)
        self._lookahead = Lookahead(self._model, self._tokenizer, pool=self._pools, remember=remember)

    def __call__(self, batch: Any) -> Any:
        """Return the batch (columns of arrays, a pyarrow table or a pandas frame) with the new columns.

        Raises:
            InvalidArgument: the rows have a column of a new one's name.
            UnsupportedModel, …: what is wrong with the set-up.
        """
        answers = self._answers([_plain(prompt) for prompt in values_of(batch, self._prompt)])
        self._flush()
        return extended(batch, dict(zip(self._columns, _across(answers), strict=True)))

    def close(self) -> None:
        """Write and close the live part, so that `gather` takes it. A process that ends does it by itself."""
        for pool in self._pools:
            pool.close()

    def _try(self) -> None:
        """Find out now, with one token, what `generate()` says to the options."""
        options = {name: value for name, value in self._options.items() if name != "max_length"}
        la = Lookahead(self._model, self._tokenizer, nodes=0)
        try:
            with contextlib.suppress(UnusableText), self._drawing(["{}"]):
                generate_json(la, None, "{}", **options | {"max_new_tokens": 1, "memory": False})
        except (ValueError, TypeError) as error:
            if isinstance(error, LookaheadError):
                raise
            raise InvalidArgument(f"generate() refuses the options: {error}") from error

    def _answers(self, prompts: Sequence[Any]) -> list[Answer]:
        answers = [self._refused(prompt) for prompt in prompts]
        ready = [row for row, answer in enumerate(answers) if answer is None]
        asked = [prompts[row] for row in ready]
        with self._drawing(asked):
            for row, answer in zip(ready, self._generated(asked), strict=True):
                answers[row] = answer
        return [answer for answer in answers if answer is not None]

    def _refused(self, prompt: Any) -> Answer | None:
        """Return why a prompt cannot be used; None: it can."""
        try:
            self._require_usable(prompt)
        except Exception as error:  # a chat template may raise anything
            return Answer.failed(error)
        return None

    def _require_usable(self, prompt: Any) -> None:
        chat = isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, dict) for turn in prompt)
        if not isinstance(prompt, str) and not chat:
            what = "is missing" if prompt is None else f"is a {type(prompt).__name__}"
            raise InvalidArgument(f"the prompt ({self._prompt!r}) {what}; give a text, or a list of chat messages")
        size, context = len(encoded(self._tokenizer, prompt, self._template)), self._context
        if context is not None and size >= context:
            raise InvalidArgument(f"the prompt has {size} tokens, but the model's context is {context}; shorten it")

    @property
    def _context(self) -> int | None:
        return getattr(self._model.config, "max_position_embeddings", None)

    def _generated(self, prompts: list[Any]) -> list[Answer]:
        """Return the answers to usable prompts, from one batch if that is possible."""
        if not prompts:
            return []
        try:
            found = self._found(prompts)
        except _SETUP:
            raise
        except _OF_ROWS as error:
            if len(prompts) == 1:
                return [Answer.failed(error)]
        else:
            alone = [len(prompts) > 1 and self._cut_by_others(row, one) for row, one in enumerate(found)]
            return [
                self._generated([prompts[row]])[0] if alone[row] else Answer.of(row, one)
                for row, one in enumerate(found)
            ]
        half = len(prompts) // 2  # it may be one row that is wrong, or all of them too many
        return [*self._generated(prompts[:half]), *self._generated(prompts[half:])]

    def _found(self, prompts: list[Any]) -> Sequence[Result[Any] | UnusableText]:
        chats = not all(isinstance(prompt, str) for prompt in prompts)
        template: dict[str, Any] = {_TEMPLATE: self._template} if self._template and chats else {}
        try:
            results: Sequence[Any] = generate_json(self._lookahead, None, prompts, **self._options, **template)
            return results
        except UnusableText as error:
            return error.results

    def _cut_by_others(self, row: int, found: Result[Any] | UnusableText) -> bool:
        """Return whether a text ended early where the longest prompt of its batch left no more room."""
        if isinstance(found, Result) or found.trace is None or self._options.get("max_new_tokens") is not None:
            return False
        sizes = [len(prompt) for prompt in found.trace.prompts]
        room = NEW_TOKENS if self._context is None else min(NEW_TOKENS, self._context - sizes[row])
        return sizes[row] < max(sizes) and len(found.trace.outputs[row]) < room

    @contextlib.contextmanager
    def _drawing(self, prompts: list[Any]) -> Iterator[None]:
        """Draw what follows from seed and prompts; leave the generators as they were."""
        digest = hashlib.blake2b(repr((self._seed, prompts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest, "little"))
            yield

    def _flush(self) -> None:
        """Write the live part. Where that fails the rows are worth more than their drafts: nothing is added further."""
        try:
            self._lookahead.flush()
        except PoolError as problem:
            log.warning("%s; this actor goes on, and keeps nothing more of what it generates", problem)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a row gets.

    Attributes:
        text: the JSON; None: there is none.
        error: why not.
        tokens: that were generated for it.
        passes: of the model, until its text was complete; the prefill is one.
    """

    text: str | None
    error: str | None
    tokens: int
    passes: int

    @classmethod
    def failed(cls, error: Exception, tokens: int = 0, passes: int = 0) -> Answer:
        """Return the answer of a row without a value."""
        return cls(None, f"{type(error).__name__}: {' '.join(str(error).split())}", tokens, passes)

    @classmethod
    def of(cls, row: int, found: Result[Any] | UnusableText) -> Answer:
        """Return what a row of a batch has found."""
        tokens, passes = (0, 0) if found.trace is None else _cost(found.trace, row)
        if isinstance(found, Result):
            return cls(found.text, None, tokens, passes)
        return cls.failed(found, tokens, passes)


def _plain(prompt: Any) -> Any:
    """Return a prompt without numpy, and messages without the keys that only other messages of the column have."""
    if isinstance(prompt, str):
        return str(prompt)
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, list):
        return [
            {name: part for name, part in turn.items() if part is not None} if isinstance(turn, Mapping) else turn
            for turn in prompt
        ]
    return None if isinstance(prompt, float) and math.isnan(prompt) else prompt  # pandas: a text that is missing


def _across(answers: Sequence[Answer]) -> list[tuple[Kind, list[Any]]]:
    """Return the columns of the answers, with their kinds."""
    kinds: dict[str, Kind] = {"text": "text", "error": "text", "tokens": "number", "passes": "number"}
    return [(kind, [getattr(answer, name) for answer in answers]) for name, kind in kinds.items()]


def _cost(trace: Run, row: int) -> tuple[int, int]:
    tokens, passes = len(trace.outputs[row]), trace.prefills
    held = passes  # a prefill gives one token
    for one in trace.passes:
        if held >= tokens:
            break
        passes, held = passes + 1, held + one.committed[row]
    return tokens, passes


# Arguments.


def _check(given: Mapping[str, Any]) -> dict[str, str]:
    """Refuse what no model is needed to refuse; return what the columns are called."""
    bound = inspect.signature(JsonBatches).bind(**given)
    bound.apply_defaults()
    names = bound.arguments
    if not isinstance(names["model"], str | os.PathLike):
        raise InvalidArgument(f"model is a {type(names['model']).__name__}; give its directory or its name on the Hub")
    pool = names["pool"]
    if pool is not None and not (isinstance(pool, str | os.PathLike) and os.fspath(pool)):
        raise InvalidArgument(f"pool={pool!r}; give the directory of the pool that actors share, or None")
    columns = {name: names[name] for name in ("prompt", "output", "error", "tokens", "passes")}
    for name, column in columns.items():
        if not isinstance(column, str) or not column:
            raise InvalidArgument(f"{name}={column!r}; give the name of a column")
    if len(set(columns.values())) < len(columns):
        raise InvalidArgument(f"two of {', '.join(f'{a}={b!r}' for a, b in columns.items())} are one column")
    if names["dtype"] not in DTYPES:
        raise InvalidArgument(f"dtype={names['dtype']!r}; give one of {', '.join(DTYPES)}")
    if names["remember"] not in ("output", "all", None):
        raise InvalidArgument(f'remember={names["remember"]!r}; give "output", "all" or None')
    if names["seed"] is not None and not _whole(names["seed"], 0):
        raise InvalidArgument(f"seed={names['seed']!r}; give a whole number from 0")
    Shape.of(names["schema"]).grammar(whitespace=names["whitespace"], lenient=names["lenient"])
    return columns


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require_travels(schema: Any) -> None:
    from ray import cloudpickle

    try:
        cloudpickle.loads(cloudpickle.dumps(schema))
    except Exception as error:  # of what a schema may hold, anything
        fix = "define the type in a module that the workers can import, or give lookahead.schema_of(…) of it"
        raise InvalidArgument(f"schema={schema!r} cannot be sent to actors ({error}); {fix}") from error


def _require_columns(names: Sequence[str], columns: Mapping[str, str]) -> None:
    """Check the columns of a dataset that are known before it runs."""
    for name, column in columns.items():
        if name == "prompt" and column not in names:
            raise InvalidArgument(f"prompt={column!r}: the dataset has no such column; it has {', '.join(names)}")
        if name != "prompt" and column in names:
            raise InvalidArgument(f"{name}={column!r}: the dataset has that column already; give another name")


def _absolute(model: Any) -> Any:
    """Return a local model's path for other processes; a name on the Hub as it is."""
    is_path = isinstance(model, str | os.PathLike) and os.fspath(model) != _DEMO and os.path.isdir(model)
    return os.path.abspath(model) if is_path else model


def _loaded(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Return model and tokenizer, loaded as the command line loads them."""
    try:
        with quiet():
            checkpoint, place = Checkpoint(name), check_device(device)
            tokenizer, config = checkpoint.tokenizer(), checkpoint.config()
            check_served(config, name, "use another model")
            kind = "float32" if (name, dtype) == (_DEMO, "auto") else dtype
            return checkpoint.model(config, dtype=kind, device=place), tokenizer
    except InvalidInput as error:
        raise InvalidArgument(re.sub(r"--(\w+) ", r"\1=", str(error))) from error


def _opened(pool: str | os.PathLike[str], tokenizer: Any, remember: Remember) -> tuple[Pool, ...]:
    """Return the live part that an actor writes, if it writes one, and the pool that it shares."""
    shared = open_shared(pool, tokenizer)
    return (shared,) if remember is None else (open_part(pool, tokenizer), shared)
