"""What is measured: ways to generate that run in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lookahead.bench.peak import Peak
from lookahead.bench.workloads import Item
from lookahead.drafter import Drafter
from lookahead.engine import Lookahead
from lookahead.pool.pool import Pool
from lookahead.request import end_tokens

PLAIN, OURS = "plain", "lookahead"
ARCTIC_TREE, ARCTIC_CHAIN = "Arctic trees, our verifier", "Arctic chains, our verifier"
PROMPT_LOOKUP_TOKENS, ARCTIC_NODES = 10, 32


class CannotRun(Exception):
    """A system does not do this; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system generated.

    Attributes:
        tokens: the new ones.
        seconds: wall time of its generate call.
        passes: forward passes of the model, the prefill included; None: not known.
        peak_mb: memory that the call needed on top of what was held before it; None: not known.
    """

    tokens: list[int]
    seconds: float
    passes: int | None
    peak_mb: float | None


class System(Protocol):
    """A way to generate.

    Attributes:
        name: in the table.
        settings: what a reader of its figures has to know, ready for JSON.
    """

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def run(self, item: Item) -> Answer:
        """Generate one text.

        Raises:
            CannotRun: this one, or any.
        """


Call = Callable[[dict[str, Any]], Tensor]


@dataclass
class Here:
    """A system that runs in this process.

    Args:
        make: returns, for an item, what generates from the arguments of `generate()`; it is not timed.
        own_grammar: whether it takes `grammar=`, instead of the processor.
        passes: returns how many passes the latest call had; by default they are counted by a hook of the model, which
            keeps it from being recorded in a graph.
    """

    name: str
    model: Any
    tokenizer: Any
    make: Callable[[Item], Call]
    settings: dict[str, Any] = field(default_factory=dict)
    own_grammar: bool = False
    passes: Callable[[], int] | None = None

    def run(self, item: Item) -> Answer:
        call = self.make(item)
        counts: Any = counted(self.model) if self.passes is None else nullcontext([0])
        with counts as passes, Peak() as peak:
            synchronize(self.model)
            begin = time.perf_counter()
            try:
                ids = call(self._arguments(item))  # a processor keeps the state of one text, and belongs to the call
            except Exception as error:
                if self.name in (PLAIN, OURS):
                    raise
                raise CannotRun(f"{type(error).__name__}: {error}") from error
            synchronize(self.model)
            seconds = time.perf_counter() - begin
        count = passes[0] if self.passes is None else self.passes()
        return Answer(ids[0, len(item.ids) :].tolist(), seconds, count, peak.mb)

    def _arguments(self, item: Item) -> dict[str, Any]:
        arguments = arguments_of(item, self.model)
        if item.grammar is not None and self.own_grammar:
            arguments |= {"grammar": item.grammar}
        elif item.grammar is not None:
            ends = end_tokens(self.model, {})
            arguments |= {"logits_processor": [item.grammar.processor(self.tokenizer, eos_token_id=ends)]}
        return arguments


def arguments_of(item: Item, model: Any) -> dict[str, Any]:
    """Return the arguments of `generate()` for a text, but for its grammar."""
    ids = torch.tensor([item.ids], device=model.device)
    ends = {} if item.ends else {"eos_token_id": None}
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": item.new, "do_sample": False, **ends}
    return {"inputs": ids, **given}


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Yield a list whose only number is the count of forward passes so far."""
    count = [0]

    def one_more(*_: object) -> None:
        count[0] += 1

    hook = model.register_forward_pre_hook(one_more)
    try:
        yield count
    finally:
        hook.remove()


def synchronize(model: Any) -> None:
    """Wait until the device has nothing left to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


# The systems


def plain(model: Any, tokenizer: Any) -> Here:
    """`model.generate()`."""
    return Here(PLAIN, model, tokenizer, lambda item: lambda given: model.generate(**given))


def prompt_lookup(model: Any, tokenizer: Any, tokens: int = PROMPT_LOOKUP_TOKENS) -> Here:
    """The prompt lookup of `transformers`."""

    def call(given: dict[str, Any]) -> Tensor:
        ids: Tensor = model.generate(**given, prompt_lookup_num_tokens=tokens)
        return ids

    return Here("prompt lookup", model, tokenizer, lambda item: call, {"prompt_lookup_num_tokens": tokens})


def ours(model: Any, tokenizer: Any, **options: Any) -> Here:
    """`lookahead`, anew for every text, so that no answer is remembered."""
    pools: dict[tuple[tuple[int, ...], ...], Pool] = {}
    passes = [0]

    def make(item: Item) -> Call:
        pool = None
        if item.before is not None:
            pool = pools.setdefault(item.before, Pool())
            _fill(Lookahead(model, pool=pool, **options), item, pool)

        return _counting(passes, lambda: Lookahead(model, tokenizer, pool=pool, remember=None, **options))

    settings = {"nodes": "auto"} | {name: value for name, value in options.items() if isinstance(value, int | str)}
    return Here(OURS, model, tokenizer, make, settings, own_grammar=True, passes=lambda: passes[0])


def _counting(passes: list[int], make: Callable[[], Lookahead]) -> Call:
    """Return what generates by a new `Lookahead`, and sets `passes` to how many it took; no hook is in its way."""

    def call(given: dict[str, Any]) -> Tensor:
        one = make()
        ids: Tensor = one.generate(**given)
        assert one.last is not None
        passes[:] = [one.last.forwards]
        return ids

    return call


def _fill(lookahead: Lookahead, item: Item, pool: Pool) -> None:
    """Let `pool` have the outputs of the prompts before an item, once."""
    if not pool.tokens:
        for ids in item.before or ():
            lookahead.generate(**arguments_of(Item(item.workload, ids, item.new), lookahead.model))


def arctic(model: Any, tokenizer: Any, *, tree: bool = True) -> Here:
    """Arctic Inference's suffix trees in our verifier: trees with all nodes spent, or chains as it ships.

    Raises:
        CannotRun: it is not installed.
    """
    from lookahead.bench.arctic import AS_SHIPPED, SPEND_ALL, Arctic

    limits = SPEND_ALL if tree else AS_SHIPPED

    def drafter() -> Arctic:
        return Arctic(tree=tree, limits=limits)

    try:
        settings = {"nodes": ARCTIC_NODES, **drafter().settings}
    except ImportError as error:
        fix = "pip install --no-deps arctic-inference"
        raise CannotRun(f"not installed ({error}); {fix}") from error

    passes = [0]

    def make(item: Item) -> Call:
        one = drafter()
        for ids in item.before or ():
            _generate(model, one, Item(item.workload, ids, item.new))
        options: dict[str, Any] = {"drafter": one, "nodes": ARCTIC_NODES, "script": True}
        return _counting(passes, lambda: Lookahead(model, tokenizer, **options))

    name = ARCTIC_TREE if tree else ARCTIC_CHAIN
    return Here(name, model, tokenizer, make, settings, own_grammar=True, passes=lambda: passes[0])


def _generate(model: Any, drafter: Drafter, item: Item) -> None:
    Lookahead(model, drafter=drafter, nodes=ARCTIC_NODES).generate(**arguments_of(item, model))
    finish = getattr(drafter, "finish", None)
    if finish is not None:
        finish(None)
