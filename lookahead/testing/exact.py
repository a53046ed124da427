"""One call of `generate()`, plain and with drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lookahead.drafter import Drafter
from lookahead.engine import Lookahead
from lookahead.testing.call import Call
from lookahead.testing.outcome import ROUGH, TOLERANCE, Outcome, difference
from lookahead.testing.replay import Judgement, judge

Knowing = Callable[[Sequence[Sequence[int]]], Drafter]
"""Makes a drafter of what each row will generate."""


def assert_exact(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    tokenizer: Any = None,
    drafter: Drafter | Knowing | None = None,
    nodes: int | str = "auto",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_ties: bool = False,
    fresh: Callable[[], Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> Any:
    """Raise AssertionError unless drafts change nothing about a call of `generate()`; return what it returned.

    Runs `model.generate(inputs, generation_config, **arguments)` plainly and with `Lookahead`, with the same seed, and
    compares all that a caller can see: ids, their shape and dtype, scores, logits, the key-value cache, what a streamer
    receives, the error that is raised, and the state of the random generator. The message says where the first
    difference is, how far plain's best tokens are apart there, and whether that is a numeric tie.

    Each of the two gets its own copy of every argument (`copy.deepcopy`), except tokenizer, functions and grammars.
    What cannot be copied, or must be seen, `fresh` makes. The random generator is put back afterwards.

    Args:
        tokenizer: for `stop_strings` and `grammar`.
        drafter: who drafts; or a function that gets what plain generated, a list of ids for each row, and returns who
            drafts, such as `functools.partial(Oracle, vocab=model.config.vocab_size)`.
        nodes: as for `Lookahead`.
        settings: other arguments of `Lookahead`: `sources`, `pool`, `budget`, …
        seed: of both runs.
        allow_ties: take numeric ties for equal (`docs/exactness.md`); what comes behind one is compared with plain
            `generate()` on the same text, token by token.
        fresh: returns more arguments of `generate()`, called once for each run.

    >>> assert_exact(model, **tokenizer("def add(", return_tensors="pt"), max_new_tokens=32)
    """
    if generation_config is not None:
        arguments["generation_config"] = generation_config
    if inputs is not None:
        arguments["inputs"] = inputs
    call = Call(model, tokenizer, arguments, fresh)
    devices = [device for device in {one.device for one in model.parameters()} if device.type == "cuda"]
    with torch.random.fork_rng(devices):
        plain = call.run(model.generate, seed, plain=True)
        answers = call.answers(plain)

        def run(call: Call) -> Outcome:
            options: dict[str, Any] = dict(settings or {})
            if "budget" not in options:
                options["nodes"] = nodes
            if drafter is not None:
                options["drafter"] = drafter if isinstance(drafter, Drafter) else drafter(answers)
            with Lookahead(model, tokenizer, **options) as lookahead:
                return call.run(lookahead.generate, seed, plain=False)

        ours = run(call)
        found = difference(plain, ours, tolerance=ROUGH.get(model.dtype, TOLERANCE))
        if found is None:
            return ours.output
        if plain.error is not None or ours.error is not None:
            raise AssertionError(found) from ours.error
        judged = judge_fully(model, call, run, ours, seed=seed)
    if not (allow_ties and judged.places and judged.ties):
        raise AssertionError(f"{found}\n{said(judged)}")
    return ours.output


def judge_fully(model: Any, call: Call, run: Callable[[Call], Outcome], ours: Outcome, *, seed: int) -> Judgement:
    """Return what plain says of `ours`; where that has ties, of a second run too, which returns its logits.

    A fault may move logits by more than rounding does and yet change the pick at near ties only; this tells.

    Args:
        run: runs a call with drafts.
    """
    first = judge(model, call.plainly, ours, seed=seed)
    if not (first.places and first.ties) or ours.logits is not None:
        return first
    call = call.logged()
    second = run(call)
    if second.error is not None:
        return replace(first, faults=(f"a second run, which returns its logits, raises {second.error!r}",))
    again = judge(model, call.plainly, second, seed=seed)
    return first if again.ties else replace(first, faults=again.faults or ("a second run has a pick that is no tie",))


def said(judged: Judgement) -> str:
    """Return in words what plain says of a text that differs."""
    lines = list(judged.faults)
    if judged.places:
        place, rounding = judged.places[0], judged.rounding
        lines.append(
            f"row {place.row}, generated token {place.column}: plain picks {place.plain}, ours {place.ours}; there "
            f"plain's two best scores are {place.lead:.2g} apart, its token and ours {place.margin:.2g}"
        )
        moved = "is not known" if rounding is None else f"moves logits here by up to {rounding.allowed:.2g}"
        many = sum(not one.tie for one in judged.places)
        kind = "a numeric tie" if judged.ties else "no numeric tie" if many else "a numeric tie there, but see above"
        lines.append(f"that is {kind}: rounding {moved}")
    elif not lines:
        lines.append("plain picks the same tokens on this text")
    return "\n".join(lines)
