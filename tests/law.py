"""The first law, in one place: what `lookahead` returns is what plain `model.generate()` returns, in every respect.

A `Case` is one call of `generate()`, small enough to be printed and pasted into a test. `assert_exact` runs it plainly
and with drafts, and compares all that a caller can see: tokens, scores, logits, cache, generator, streamer, and the
calls that criteria and processors of the user's own received.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from budgets import Clock, Dice
from drafters import Watcher, WatcherRow
from models import FAMILIES, JSON_VOCAB, PAD, VOCAB, WORDS, json_tokenizer, poisoned, tiny, tokenizer
from transformers import DynamicCache, SynthIDTextWatermarkingConfig, WatermarkingConfig
from users import CRITERIA, PROCESSORS, Recording, prefix_allowed
from zoo import zoo

import lookahead
from lookahead import Budget, Grower, Jacobi, Lookahead, Pool, Step
from lookahead.cache import NAME
from lookahead.foresight import AHEAD, ROOM
from lookahead.grammar.grammar import Grammar
from lookahead.grammar.processor import GrammarProcessor
from lookahead.testing import Adversary, Oracle, Outcome, cache_difference, difference

LIMITS = {
    "all_nodes": ["lookahead.sampling.ALL_NODES_LIMIT"],
    "ahead": ["lookahead.progress.MAX_AHEAD"],
    "chunk": ["lookahead.progress.CHUNK"],
    "realign": ["lookahead.cache.REALIGN"],
    "block": ["lookahead.cache.BLOCK", "lookahead.engine.BLOCK"],
    "foreseen": ["lookahead.foresight.AHEAD"],
    "room": ["lookahead.foresight.ROOM"],
    "slots": ["lookahead.static.shapes.STEP"],
    "known": ["lookahead.engine.ROOM"],
}
"""Constants that a case may set, so that short texts reach what only long ones would."""

CLOCKS = (
    "lookahead.decode.time", "lookahead.turn.time", "lookahead.target.time", "lookahead.static.target.time",
    "lookahead.grow.time",
)  # fmt: skip
"""Where a budget's times come from."""

WINDOWS = {
    "jacobi": Jacobi(window=5, ngram=4, verify=5, switch="on"),
    "leaping": Jacobi(window=4, ngram=3, verify=3, shift="accepted", switch="on"),
}
"""Sources of the grower that a case names by one word, though they have settings."""


@dataclass(frozen=True)
class Case:
    """One call of `generate()`, and who drafts.

    Attributes:
        seed: of the prompt, the masks, the sampling and the drafter.
        mask: "full", "left" (padding), "holes" (anywhere but at the end), or "none" (no attention_mask given).
        new: max_new_tokens.
        options: arguments of `generate()` as (name, value) pairs; tuples become lists.
        processors, criteria: names of the user's own (`PROCESSORS`, `CRITERIA`).
        output: "ids", "dict", "scores" (dict with scores), "all" (with scores and logits).
        embeds: "no", "alone" (inputs_embeds only), "with ids".
        cache: "own", "user" (a DynamicCache of the user's), "full" or "new" (a second turn on it, given all ids or only
            the new ones).
        drafter: "oracle", "relay" (an oracle of one row at a time), "adversary", or the grower's sources joined by "+",
            those of `WINDOWS` too; with "pool" among them, to a pool that knows the answer the answers are added in
            turn.
        error: of the oracle.
        door: "function", "object", "custom" (model.generate(custom_generate=la)).
        calls: how often the same `Lookahead` runs the case, each time with another seed.
        limits: constants to set (`LIMITS`).
        poison: the oracle's errors are a token that turns whoever attends to it to NaN; plain must not pick it.
        grammar: what all rows must be: a JSON Schema as text, "regex:…" or "lark:…"; or a tuple of those, one for each
            row ("": free). Such cases have a larger vocabulary. The way in is `grammar=`; for "custom", the processor.
        way: how passes run: "dynamic" (as the model is written), "recorded", "static", "invariant" or "compiled".
        budget: "fixed", "dice" (decides at random), or "clock" (the automatic one by a clock that goes as it likes);
            with both `nodes` is the most.
    """

    family: str = "llama"
    attention: str = "sdpa"
    dtype: str = "float64"
    device: str = "cpu"
    seed: int = 0
    rows: int = 1
    prompt: int = 6
    mask: str = "full"
    new: int = 20
    sample: bool = False
    eos: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    processors: tuple[str, ...] = ()
    criteria: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    output: str = "all"
    streamer: bool = False
    embeds: str = "no"
    cache: str = "own"
    drafter: str = "oracle"
    error: float = 0.15
    nodes: int = 12
    door: str = "object"
    calls: int = 1
    limits: tuple[tuple[str, int], ...] = ()
    poison: bool = False
    grammar: str | tuple[str, ...] = ""
    budget: str = "fixed"
    way: str = "dynamic"

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(f'{name}={value!r}' for name, value in given)})"


@dataclass
class Result(Outcome):
    """All that a caller of `generate()` can see, what the run did, and what each turn generated."""

    last: Any = None
    answers: list[list[int]] = field(default_factory=list)


# Running a case


def model_of(case: Case) -> Any:
    if case.grammar:
        return tiny(case.family, case.attention, case.dtype, case.device, vocab_size=JSON_VOCAB)
    if case.family not in FAMILIES:
        return zoo_on(case.device, case.family, case.attention, case.dtype)
    return (poisoned if case.poison else tiny)(case.family, case.attention, case.dtype, case.device)


@cache
def zoo_on(device: str, *arguments: str) -> Any:
    """Return a model of the zoo on `device`; the zoo's own one stays where it is."""
    model = zoo(*arguments)
    return model if device == "cpu" else copy.deepcopy(model).to(device)


def vocab_of(case: Case) -> int:
    return JSON_VOCAB if case.grammar else VOCAB


@cache
def grammar_of(text: str) -> Grammar | None:
    """Return the grammar that a case names."""
    kind, _, source = text.partition(":")
    if kind in ("regex", "lark"):
        return getattr(Grammar, kind)(source)
    return Grammar.json_schema(text) if text else None


def obeying(case: Case, ours: bool) -> dict[str, Any]:
    """Return the arguments that put the grammar of `case` into force, plainly or through the library's own door."""
    given = case.grammar if isinstance(case.grammar, tuple) else (case.grammar,)
    grammars: Any = [grammar_of(text) for text in given]
    if ours and case.door != "custom":
        return {"grammar": grammars if len(grammars) > 1 else grammars[0], "tokenizer": json_tokenizer()}
    return {"logits_processor": [GrammarProcessor(grammars, json_tokenizer(), eos_token_id=case.eos or None)]}


def assert_exact(case: Case) -> Result:
    """Raise AssertionError unless drafts change nothing about `case`; return what the run with drafts gave."""
    with limits(case):
        model, la, result = model_of(case), None, Result()
        for call in range(case.calls):
            once = replace(case, seed=case.seed + call)
            plain = run(once, model.generate)
            la = la or lookahead_of(once, model, plain)
            la.drafter = drafter(once, plain) if case.drafter in ("oracle", "relay", "adversary") else la.drafter
            result = run(once, door(once, model, la), la)
            found = difference(plain, result)
            if found is not None:
                raise AssertionError(f"{once!r}\n{found}{_hint(once, found, plain, result)}") from result.error
        return result


def _hint(case: Case, found: str, plain: Result, ours: Result) -> str:
    """Say how near plain was to another pick: a millionth is rounding, anything larger is a bug."""
    if not found.startswith("sequences differ") or case.sample or case.cache in ("full", "new"):
        return ""
    row, column = (plain.sequences != ours.sequences).nonzero()[0].tolist()
    again = run(replace(case, output="all"), model_of(case).generate)
    best = again.output.scores[column - plain.sequences.shape[1]][row].topk(2).values
    return f"\nplain's two best scores there are {float(best[0] - best[1]):.2g} apart"


def run(case: Case, generate: Callable[..., Any], la: Lookahead | None = None) -> Result:
    """Return what `generate` did with the arguments of `case`, and with those of its second turn."""
    result = Result()
    arguments = first_turn(case, result, ours=la is not None)
    torch.manual_seed(case.seed)
    _call(result, generate, arguments)
    if case.cache in ("full", "new") and result.error is None:
        arguments = second_turn(case, result, arguments, ours=la is not None)
        _call(result, generate, arguments)
    result.generator = torch.get_rng_state() if case.device == "cpu" else torch.cuda.get_rng_state()
    result.cache = arguments.get(NAME, getattr(result.output, NAME, None))
    result.last = None if la is None else la.last
    return result


def _call(result: Result, generate: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        result.output = generate(**arguments)
        given = arguments["input_ids"].shape[1] if "input_ids" in arguments else 0
        result.answers += result.sequences[:, given:].tolist()
    except Exception as error:
        result.error = error


def door(case: Case, model: Any, la: Lookahead) -> Callable[..., Any]:
    """Return the way into the library that `case` takes."""
    if case.door == "object":
        return la.generate
    if case.door == "custom":
        return lambda **arguments: model.generate(**arguments, custom_generate=la)

    def function(**arguments: Any) -> Any:
        with mock.patch.object(lookahead.engine, "Lookahead", return_value=la):
            return lookahead.generate(model, **nodes_of(case), **arguments)

    return function


def lookahead_of(case: Case, model: Any, plain: Result) -> Lookahead:
    """Return the `Lookahead` of `case`; one that asks a pool also adds to it."""
    options = nodes_of(case) | ways_of(case)
    if "pool" not in case.drafter.split("+"):
        return Lookahead(model, drafter=drafter(case, plain), **options)
    return Lookahead(model, sources=sources_of(case), pool=pool_of(case, plain), **options)


def ways_of(case: Case) -> dict[str, Any]:
    """Return the arguments that say how the passes of `case` run."""
    return shapes_of(case) | {"script": case.way == "recorded"}


def shapes_of(case: Case) -> dict[str, Any]:
    """Return the arguments that say which shapes the passes of `case` have."""
    fixed = case.way not in ("dynamic", "recorded")
    return {"static": fixed, "invariant": case.way == "invariant", "compile": case.way == "compiled"}


def nodes_of(case: Case) -> dict[str, Any]:
    """Return the argument that says how many nodes a pass of `case` may run."""
    match case.budget:
        case "fixed":
            return {"nodes": case.nodes}
        case "dice":
            return {"budget": Dice(case.nodes, case.seed)}
        case _:
            return {"budget": Budget(most=case.nodes, explore=0.2)}


def sources_of(case: Case) -> tuple[Any, ...]:
    """Return the sources of the grower that `case` names."""
    return tuple(WINDOWS.get(name, name) for name in case.drafter.split("+"))


def probes_of(case: Case) -> int:
    """Return how many probe nodes a draft of `case` may have beyond its budget."""
    return max((WINDOWS[name].probes for name in case.drafter.split("+") if name in WINDOWS), default=0)


def pool_of(case: Case, plain: Result) -> Pool:
    """Return a pool that knows the answer, with a wrong token here and there."""
    pool, draw = Pool(live_tokens=64, max_tokens=4096), random.Random(case.seed)
    for row in [] if plain.error is not None else plain.sequences.tolist():
        for _ in range(3):
            pool.add([draw.randrange(vocab_of(case)) if draw.random() < case.error / 2 else token for token in row])
    return pool


def drafter(case: Case, plain: Result) -> Any:
    """Return the drafter of `case`, who may know the plain answer."""
    if case.drafter in ("oracle", "relay"):
        relay = len(plain.sequences) if case.drafter == "relay" and plain.error is None else 1
        wrong = WORDS[-1] if case.poison else None
        return Oracle(plain.answers or [[]], vocab_of(case), error=case.error, seed=case.seed, relay=relay, wrong=wrong)
    if case.drafter == "adversary":
        return Adversary(plain.answers or [[]], vocab_of(case), seed=case.seed)
    return Grower(vocab_size=vocab_of(case), sources=sources_of(case))


def first_turn(case: Case, result: Result, ours: bool = False) -> dict[str, Any]:
    """Return fresh arguments of `generate()`; what the user's own objects see goes to `result`."""
    draw, words = random.Random(case.seed), WORDS[:-1] if case.poison else range(WORDS[0], vocab_of(case))
    ids = torch.tensor([[draw.choice(words) for _ in range(case.prompt)] for _ in range(case.rows)], device=case.device)
    mask = torch.ones_like(ids)
    for row in range(case.rows):
        holes = range(draw.randrange(case.prompt)) if draw.random() < 0.7 else ()
        if case.mask == "holes":
            holes = [i for i in range(case.prompt - 1) if draw.random() < 0.3]
        if case.mask in ("left", "holes"):
            mask[row, list(holes)] = 0
            ids[row, list(holes)] = PAD
    arguments: dict[str, Any] = {"input_ids": ids, "max_new_tokens": case.new, "do_sample": case.sample}
    if case.mask != "none":
        arguments["attention_mask"] = mask
    if case.embeds != "no":
        arguments["inputs_embeds"] = model_of(case).get_input_embeddings()(ids).detach()
    if case.embeds == "alone":
        del arguments["input_ids"]
    if case.cache != "own":
        arguments[NAME] = DynamicCache(config=model_of(case).config)
    return arguments | _extras(case, result, 0 if case.embeds == "alone" else case.prompt, ours)


def _extras(case: Case, result: Result, start: int, ours: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, value in case.options:
        if name == "prefix_allowed_tokens_fn":
            value = prefix_allowed(result.calls)
        elif name == "watermarking_config":
            synthid = SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)
            value = synthid if value == "synthid" else WatermarkingConfig(seeding_scheme=value)
        elif name == "negative_prompt_ids":
            value = torch.tensor([value] * case.rows, device=case.device)
        arguments[name] = _listed(value)
    if case.eos:
        arguments["eos_token_id"] = list(case.eos) if len(case.eos) > 1 else case.eos[0]
    if case.processors:
        arguments["logits_processor"] = [PROCESSORS[name](result.calls) for name in case.processors]
    if case.grammar:
        added = obeying(case, ours)
        if "logits_processor" in added:
            added["logits_processor"] = arguments.get("logits_processor", []) + added["logits_processor"]
        arguments |= added
    if case.criteria:
        arguments["stopping_criteria"] = [CRITERIA[name](result.calls, start) for name in case.criteria]
    if case.stop_strings:
        arguments |= {
            "stop_strings": list(case.stop_strings),
            "tokenizer": json_tokenizer() if case.grammar else tokenizer(),
        }
    if case.streamer:
        arguments["streamer"] = Recording(result.streamed)
    if case.output != "ids":
        arguments["return_dict_in_generate"] = True
    if case.output in ("scores", "all"):
        arguments["output_scores"] = True
    if case.output == "all":
        arguments["output_logits"] = True
    return arguments


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def second_turn(case: Case, result: Result, first: dict[str, Any], ours: bool = False) -> dict[str, Any]:
    """Return the arguments that continue on the user's cache after the first turn."""
    draw, before = random.Random(f"{case.seed}/2"), result.sequences
    added = torch.tensor([[draw.choice(WORDS) for _ in range(3)] for _ in range(before.shape[0])], device=case.device)
    ids = torch.cat([before, added], 1)
    new = ids.shape[1] - case.prompt
    mask = torch.cat(
        [first["attention_mask"], torch.ones((before.shape[0], new), dtype=torch.long, device=case.device)], 1
    )
    seen = first[NAME].get_seq_length()
    arguments = {
        "input_ids": ids if case.cache == "full" else ids[:, seen:].contiguous(),
        "attention_mask": mask,
        NAME: first[NAME],
        "max_new_tokens": case.new,
        "do_sample": case.sample,
    }
    return arguments | _extras(case, result, arguments["input_ids"].shape[1], ours)


@contextlib.contextmanager
def limits(case: Case) -> Iterator[None]:
    """Set the constants that `case` names."""
    with contextlib.ExitStack() as stack:
        for name, value in case.limits:
            for place in LIMITS[name]:
                stack.enter_context(mock.patch(place, value))
        clock = Clock(case.seed)
        for place in CLOCKS if case.budget == "clock" else ():
            stack.enter_context(mock.patch(place, clock))
        yield


# Comparing


def same_caches(a: Any, b: Any) -> None:
    """Raise AssertionError unless two caches hold the same."""
    assert (found := cache_difference(a, b)) is None, found


MANY_EOS = tuple(range(3, 48, 4))
_BATCH = Case(rows=3, mask="left", drafter="relay")
_NO_REPEATS = (("repetition_penalty", 1.4), ("no_repeat_ngram_size", 2))
BATTERY = (
    Case(seed=1, new=24),
    Case(family="qwen3", seed=2, new=24, sample=True, output="ids", drafter="adversary"),
    replace(_BATCH, family="gpt2", seed=3, sample=True, eos=(1, 7), error=0.3, drafter="oracle"),
    Case(family="mistral", attention="eager", seed=4, rows=4, new=32, drafter="relay", limits=(("realign", 1),)),
    replace(_BATCH, family="opt", seed=5, eos=MANY_EOS, output="ids", streamer=True, error=0.0, drafter="oracle"),
    Case(seed=6, new=32, error=0.0, criteria=("PerRow",), streamer=True),
    replace(_BATCH, family="phi3", seed=7, new=32, error=0.0, eos=(1,), criteria=("Alarm",), output="dict"),
    Case(family="qwen2", seed=8, sample=True, processors=("Counting",), options=(("temperature", 0.8), ("top_k", 10))),
    replace(_BATCH, seed=9, sample=True, processors=("Crowd",), eos=(4, 9, 17), output="ids"),
    replace(_BATCH, family="gpt_neox", seed=10, options=_NO_REPEATS, drafter="oracle"),
    Case(family="qwen3_moe", seed=11, rows=2, sample=True, cache="full", drafter="prompt+recycle"),
    replace(_BATCH, family="llama", seed=12, new=32, sample=True, eos=(1, 7), drafter="prompt+pool"),
    Case(
        family="mixtral", seed=13, rows=3, new=32, sample=True, stop_strings=("e", "9", "q"), drafter="relay", error=0.0
    ),
    Case(family="llama", seed=15, rows=2, sample=True, criteria=("Dice",), drafter="relay", error=0.0),
    Case(seed=12, rows=4, mask="left", new=40, eos=(4,), sample=True, error=0.0, limits=(("ahead", 3), ("realign", 2))),
    replace(_BATCH, family="qwen3", seed=14, sample=True, poison=True, options=(("suppress_tokens", (WORDS[-1],)),)),
    replace(_BATCH, family="gemma3_text", seed=16, new=28),
    replace(_BATCH, family="llama4_text", seed=17, new=28, error=0.0),
    Case(family="qwen3_next", seed=18, rows=2, mask="left", new=24, error=0.3),
    replace(_BATCH, family="bloom", seed=19, new=24),
    Case(way="static", seed=20, new=32, drafter="adversary", limits=(("slots", 8), ("known", 4)), poison=True),
    replace(_BATCH, way="static", seed=21, new=32, drafter="relay", eos=(1, 7), limits=(("slots", 8),), sample=True),
    replace(_BATCH, way="static", family="gemma3_text", seed=22, new=28, output="ids", drafter="adversary"),
    replace(_BATCH, way="static", family="mistral", seed=23, new=28, error=0.0, output="ids", sample=True),
    Case(way="static", seed=24, new=40, sample=True, output="ids", drafter="adversary", options=(("top_k", 10),)),
    replace(_BATCH, way="static", seed=7, new=32, error=0.0, eos=(1,), criteria=("Alarm",), output="dict"),
    Case(way="invariant", family="qwen3", seed=25, rows=3, mask="left", new=32, eos=(4,), output="ids"),
    Case(way="recorded", seed=26, new=32, drafter="adversary", limits=(("block", 1),), poison=True),
    replace(_BATCH, way="recorded", family="gemma3_text", seed=27, new=28, error=0.0),
    Case(way="recorded", seed=28, calls=2, drafter="prompt+recycle"),
)
"""A few cases that between them reach every part; each planted bug has to make one of them fail."""


# What drafters are told


def assert_steps_fit(case: Case) -> Watcher:
    """Raise AssertionError unless all that drafters see of `case` fits the output; return what they saw.

    Only for cases that are ended by length or EOS: another criterion may take back what a step has reported.
    """
    with limits(case):
        model = model_of(case)
        plain = run(case, model.generate)
        watcher = Watcher(drafter(case, plain))
        la = Lookahead(model, drafter=watcher, **nodes_of(case), **ways_of(case))
        ours = run(case, door(case, model, la), la)
        if (found := difference(plain, ours)) is not None:
            raise AssertionError(f"{case!r}\n{found}") from ours.error
    if ours.error is not None:  # plain generate() refuses it too
        return watcher
    rows = len(ours.sequences)
    for row, seen in enumerate(watcher.rows[-rows:]):
        answer = ours.answers[row - rows]
        length = next((i + 1 for i, token in enumerate(answer) if token in case.eos), len(answer))
        _row_fits(case, seen, answer[:length])
    return watcher


def _row_fits(case: Case, seen: WatcherRow, answer: list[int]) -> None:
    committed, asked = answer[:1], list(seen.contexts)
    assert PAD not in seen.prompt, "padding is part of a context"
    for step, drawn in zip(seen.steps, seen.drawn, strict=True):
        if case.budget != "fixed" and asked:  # passes without a draft went by
            committed = answer[: len(asked[0]) - len(seen.prompt)]
        context, proposed = seen.prompt + committed, False
        while asked and len(asked[0]) == len(context):
            seen_now, proposed = asked.pop(0), True
            assert seen_now == context, f"context {seen_now} is not {context}"
        assert proposed or len(step.draft) == 1, "a draft that nobody proposed"
        _step_fits(case, step, drawn, committed[-1])
        committed = committed + step.tokens.tolist()
        assert committed == answer[: len(committed)], f"steps report {committed}, the answer is {answer}"
    assert committed == answer or case.budget != "fixed", f"steps report {committed}, the answer is {answer}"
    assert not asked, f"asked with context {asked} and nothing came of it"


def _step_fits(case: Case, step: Step, drawn: Any, last: int) -> None:
    draft, path, tokens = step.draft, step.path.tolist(), step.tokens.tolist()
    assert len(draft) - 1 <= case.nodes + probes_of(case), "more nodes than the budget"
    assert (~draft.probe).sum() - 1 <= case.nodes, "probes took the place of other nodes, or were turned into them"
    assert probes_of(case) == 0 or draft.probe.sum() <= probes_of(case), "more probes than the window has"
    assert 0 <= step.accepted <= len(draft) - 1, "more accepted than drafted"
    assert path[0] == 0
    assert len(path) == len(tokens)
    assert int(draft.tokens[0]) == last
    assert not draft.probe[path].any(), "a probe was accepted"
    assert draft.parents[path[1:]].tolist() == path[:-1], "the path is no path"
    assert draft.tokens[path[1:]].tolist() == tokens[:-1], "the path holds other tokens than were committed"
    assert step.top_tokens.shape == step.top_logits.shape == (len(draft), 8)
    if not (case.sample or case.options or case.processors or case.grammar):
        assert step.top_tokens[path, 0].tolist() == tokens, "the likeliest successors are not what was picked"
    if drawn is not None:
        assert case.sample
        shown = path[: columns_shown(case)]
        if not (case.processors or case.grammar) and {name for name, _ in case.options} <= SIMPLE:
            assert drawn[shown].tolist() == tokens[: len(shown)], "the noise ahead would have picked something else"


SIMPLE = {"temperature", "top_k", "min_p", "epsilon_cutoff", "suppress_tokens", "max_time"}
"""Options that leave what the noise will pick to be told of all nodes."""


def columns_shown(case: Case) -> int:
    """Return how many columns of the noise drafters may see ahead."""
    set_to = dict(case.limits)
    return min(set_to.get("foreseen", AHEAD), set_to.get("room", ROOM) // (case.rows * vocab_of(case)))
