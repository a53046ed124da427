"""Whether drafts change anything about a model, tried out on prompts in every way that people call `generate()`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lookahead.check_prompts import Prompt
from lookahead.engine import Lookahead
from lookahead.errors import GrammarError, InvalidArgument, InvalidInput, UnsupportedArgument, UnsupportedModel
from lookahead.families import text_config, vocabulary
from lookahead.grammar.grammar import Grammar
from lookahead.loading import check_fit, encode, room
from lookahead.request import end_tokens
from lookahead.stream import decode
from lookahead.testing.call import Call
from lookahead.testing.exact import judge_fully
from lookahead.testing.oracles import Oracle
from lookahead.testing.outcome import ROUGH, Outcome, difference
from lookahead.testing.replay import Judgement, judge

Verdict = Literal["equal", "tie", "differs"]
NODES, ROWS, NEW, QUICK_NEW, QUICK_PROMPTS = 16, 4, 64, 24, 3
NEAR = 1e-3  # absolute and relative, of scores and caches in 32 bits; logits are held to what is measured
SEED = 1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "done": {"type": "boolean"}},
    "required": ["name", "count", "done"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to call `generate()`.

    Attributes:
        arguments: of `generate()`.
        drafts: "auto", as many nodes as pay; "fixed", always as many; "oracle", which knows plain's answer and errs now
            and then, so that long paths are accepted.
        quick: whether a quick check has it.
    """

    name: str
    arguments: dict[str, Any]
    drafts: Literal["auto", "fixed", "oracle"] = "auto"
    quick: bool = False


_PENALTIES = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 4}
_RETURNED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
GREEDY = Kind("greedy", {}, quick=True)
SAMPLED = Kind("sampled", {"do_sample": True}, quick=True)
BATCH = Kind("batch", {}, quick=True)
ALONE = (
    Kind("greedy, fixed nodes", {}, "fixed"),
    Kind("greedy, oracle, logits", _RETURNED, "oracle", quick=True),
    SAMPLED,
    Kind("sampled, oracle", {"do_sample": True, "temperature": 0.8}, "oracle", quick=True),
    Kind("top-k, top-p", {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9}, "fixed"),
    Kind("penalties", _PENALTIES, "oracle", quick=True),
    Kind("penalties, sampled", _PENALTIES | {"do_sample": True, "min_p": 0.02}),
)
TOGETHER = (
    BATCH,
    Kind("batch, oracle, logits", _RETURNED, "oracle", quick=True),
    Kind("batch, sampled", {"do_sample": True, "top_p": 0.95}, "oracle"),
    Kind("batch, penalties", _PENALTIES, "fixed"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one call.

    Attributes:
        row, position: where the first difference is: the row of the batch, and the generated token, from 0.
        plain, ours: the tokens there, as text.
        margin: how much plain's token is ahead there, in processed scores; of a drawn token with its noise.
        lead: how much plain's best token is ahead of its second best.
        rounding: how far rounding moves logits on this text, as measured, at most the limit of the dtype.
        reason: what else differs.
    """

    prompt: str
    kind: str
    verdict: Verdict
    row: int | None = None
    position: int | None = None
    plain: str | None = None
    ours: str | None = None
    margin: float | None = None
    lead: float | None = None
    rounding: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        said = f"{self.prompt}, {self.kind}: {self.verdict}"
        if self.position is not None:
            said += f" in row {self.row}, token {self.position}: plain {self.plain!r}, ours {self.ours!r}; "
            said += f"plain's is {self.margin:.2g} ahead, its two best are {self.lead:.2g} apart"
        if self.rounding is not None:
            said += f"; rounding here: {self.rounding:.2g}"
        return said + (f"; {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Speed:
    """What the greedy call of a prompt took."""

    prompt: str
    tokens: int
    passes: int
    plain_s: float
    lookahead_s: float

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes

    @property
    def ratio(self) -> float:
        return self.plain_s / self.lookahead_s

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_pass": self.tokens_per_pass, "ratio": self.ratio}


class Check:
    """Runs a model plainly and with drafts on prompts, in all kinds of calls.

    Args:
        limit: tokens to generate; None: 64, or 24 when `quick`, or what fits.
        quick: fewer kinds, and three prompts at most.
        invariant: compare `Lookahead(invariant=True)` with itself without drafts, bit by bit, and not with plain.

    Raises:
        InvalidInput: a prompt does not fit the model.

    Attributes:
        findings: one for each call that plain `generate()` serves.
        speeds: one for each prompt.
        skipped: what could not be tried with this model, and why.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        *,
        limit: int | None = None,
        quick: bool = False,
        invariant: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.quick, self.invariant = model, tokenizer, quick, invariant
        self.prompts = list(prompts[:: -(-len(prompts) // QUICK_PROMPTS)] if quick else prompts)
        self.findings: list[Finding] = []
        self.speeds: list[Speed] = []
        self.skipped: list[str] = []
        ends = end_tokens(model, {})
        pad = getattr(tokenizer, "pad_token_id", None)
        self._pad = int(pad) if pad is not None and pad < vocabulary(model) else (ends or [0])[0]
        self._inputs = [self._encoded(prompt) for prompt in self.prompts]
        self._limits = [
            self._room(inputs, prompt.name, limit) for prompt, inputs in zip(self.prompts, self._inputs, strict=True)
        ]
        self._grammar = self._usable_grammar(ends)

    def _encoded(self, prompt: Prompt) -> Tensor:
        """Return the ids of a prompt, [1, L]."""
        try:
            inputs = encode(self.tokenizer, prompt.text)
            check_fit(text_config(self.model), inputs)
        except InvalidInput as error:
            raise InvalidInput(f"{prompt.name}: {error}") from error
        ids: Tensor = inputs["input_ids"].to(self.model.device)
        return ids

    def _room(self, ids: Tensor, name: str, limit: int | None) -> int:
        try:
            fits = room(text_config(self.model), ids.shape[1], limit)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from error
        return min(fits, QUICK_NEW if self.quick else NEW) if limit is None else fits

    def _usable_grammar(self, ends: list[int] | None) -> Grammar | None:
        """Return a grammar to follow, where the tokenizer can."""
        grammar = Grammar.json_schema(SCHEMA)
        try:
            grammar.processor(self.tokenizer, eos_token_id=ends)
        except (GrammarError, InvalidArgument) as error:
            self.skipped.append(f"a JSON grammar was not tried: {error}")
            return None
        return grammar

    def run(self, say: Callable[[str, float], object] = lambda text, part: None) -> None:
        """Try everything; `say` is told what is going on, and which part of the work is done."""
        batches = self._batches()
        kinds = [kind for kind in ALONE if kind.quick or not self.quick]
        together = [kind for kind in TOGETHER if kind.quick or not self.quick]
        each = 4 + len(kinds) + (self._grammar is not None)
        total, done = each * len(self.prompts) + (1 + len(together)) * len(batches), 0

        def step(prompt: str, kind: str) -> None:
            nonlocal done
            say(f"{prompt}: {kind}", done / total)
            done += 1

        self._warm_up(say)
        for prompt, ids, limit in zip(self.prompts, self._inputs, self._limits, strict=True):
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": limit}
            step(prompt.name, GREEDY.name)
            plain = self._try(prompt.name, GREEDY, given, timed=True)
            extra = self._stopping(plain, ids.shape[1])
            if self._grammar is not None:
                extra.append(Kind("JSON grammar", {"grammar": self._grammar}))
            for kind in (*kinds, *extra):
                step(prompt.name, kind.name)
                plain = self._try(prompt.name, kind, given)
                if kind is SAMPLED:
                    self._end_early(step, prompt.name, kind, given, plain)
        for name, given in batches:
            for kind in together:
                step(name, kind.name)
                plain = self._try(name, kind, given)
                if kind is BATCH:
                    self._end_early(step, name, kind, given, plain)

    def _end_early(
        self, step: Callable[[str, str], object], name: str, kind: Kind, given: dict[str, Any], plain: Outcome
    ) -> None:
        """Try a call again that ends at a token which it generates half way."""
        if plain.error is None:
            width = plain.sequences.shape[1] - given["input_ids"].shape[1]
            end = int(plain.sequences[0, given["input_ids"].shape[1] + width // 2])
            drafts: Literal["fixed", "oracle"] = "oracle" if kind is BATCH else "fixed"
            early = Kind(f"{kind.name}, early end", kind.arguments | {"eos_token_id": end}, drafts)
            step(name, early.name)
            self._try(name, early, given)

    @property
    def ways(self) -> dict[str, Any]:
        """The arguments of `Lookahead` that say how passes run: as recorded at once, where they can be."""
        return {"invariant": True} if self.invariant else {"script": True}

    def _warm_up(self, say: Callable[[str, float], object]) -> None:
        """Compile, and let the budget learn what passes cost; of the first prompt, in a few tokens."""
        say("warming up (the very first run compiles)", 0.0)
        ids = self._inputs[0]
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": self._pad}
        given |= {"max_new_tokens": min(self._limits[0], QUICK_NEW), "do_sample": False}
        try:
            self.model.generate(**given)
        except Exception as error:
            raise InvalidInput(f"plain generate() fails ({type(error).__name__}: {error}); mend that first") from error
        try:
            Lookahead(self.model, self.tokenizer, **self.ways).generate(**given)
        except (UnsupportedModel, UnsupportedArgument) as error:
            raise InvalidInput(str(error)) from error

    def _batches(self) -> list[tuple[str, dict[str, Any]]]:
        """Return prompts in batches, padded on the left; a single one beside its own second half."""
        texts, names = [ids[0] for ids in self._inputs], [prompt.name for prompt in self.prompts]
        if len(texts) == 1:
            texts, names = [texts[0], texts[0][len(texts[0]) // 2 :]], [*names, "half of it"]
        found = []
        for start in range(0, 1 if self.quick else len(texts), ROWS):
            rows = texts[start : start + ROWS]
            if len(rows) == 1:  # what is left over was alone already
                continue
            width = max(map(len, rows))
            ids = torch.full((len(rows), width), self._pad, device=rows[0].device)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(rows):
                ids[row, width - len(text) :], mask[row, width - len(text) :] = text, 1
            given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": min(self._limits)}
            found.append((" + ".join(names[start : start + ROWS]), given))
        return found

    def _stopping(self, plain: Outcome, start: int) -> list[Kind]:
        """Return calls that end at something that greedy decoding writes: a string, a token."""
        if plain.error is not None:
            return []
        ids = plain.sequences[0, start:].tolist()
        pieces = [decode(self.tokenizer, [token]) for token in ids[len(ids) // 2 :]]
        stops = [piece for piece in pieces if piece.strip("\ufffd \n\t")][:1] or ["\n"]
        return [
            Kind("stop strings", {"stop_strings": stops}, "oracle"),
            Kind("early end", {"eos_token_id": ids[len(ids) // 2]}, "oracle"),
        ]

    def _try(self, prompt: str, kind: Kind, given: dict[str, Any], *, timed: bool = False) -> Outcome:
        """Add what comes of a call; return what plain did."""
        arguments = {"do_sample": False, "pad_token_id": self._pad} | given | kind.arguments
        call = Call(self.model, self.tokenizer, arguments)
        begin = time.perf_counter()
        plain = self._undrafted(call)
        plain_s = self._seconds(begin)
        run = _Drafting(self, kind, call.answers(plain))
        begin = time.perf_counter()
        ours = run(call)
        seconds = self._seconds(begin)
        if isinstance(ours.error, (UnsupportedModel, UnsupportedArgument)):
            raise InvalidInput(str(ours.error)) from ours.error
        if timed and ours.error is None and run.last is not None:
            self.speeds.append(Speed(prompt, run.last.tokens, run.last.forwards, plain_s, seconds))
        if plain.error is not None and difference(plain, ours) is None:
            self.skipped.append(f"{prompt}, {kind.name}: not compared, both raise {plain.error!r}")
        else:
            self.findings.append(self._finding(prompt, kind, call, run, plain, ours))
        return plain

    def _undrafted(self, call: Call) -> Outcome:
        """Return what a call gives plainly; where bits are compared, what it gives in passes of one shape."""
        if not self.invariant:
            return call.run(self.model.generate, SEED, plain=True)
        none = Lookahead(self.model, self.tokenizer, nodes=0, invariant=True)
        return call.run(none.generate, SEED, plain=False)

    def _seconds(self, begin: float) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - begin

    def _finding(self, prompt: str, kind: Kind, call: Call, run: _Drafting, plain: Outcome, ours: Outcome) -> Finding:
        if self.invariant:
            found = difference(plain, ours, tolerance=0.0)
            return Finding(prompt, kind.name, "equal" if found is None else "differs", reason=found or "")
        found = difference(plain, ours, tolerance=ROUGH.get(self.model.dtype, NEAR))
        if plain.error is not None or ours.error is not None:
            return Finding(prompt, kind.name, "differs", reason=str(found))
        if found is None and "output_logits" not in kind.arguments:
            return Finding(prompt, kind.name, "equal")
        if found is None:
            judged = judge(self.model, call.plainly, ours, seed=SEED)
            if judged.ties and not judged.places:
                return Finding(prompt, kind.name, "equal")
        else:
            judged = judge_fully(self.model, call, run, ours, seed=SEED)
        return self._described(prompt, kind, judged, found)

    def _described(self, prompt: str, kind: Kind, judged: Judgement, found: str | None) -> Finding:
        """Return the finding of a text that differs."""
        tie = bool(judged.places) and judged.ties
        rounding = None if judged.rounding is None else judged.rounding.allowed
        reasons = list(judged.faults)
        if not judged.places and found is not None:
            reasons.append(found.split("\n")[0])
        place = next((one for one in judged.places if not one.tie), next(iter(judged.places), None))
        if place is None:
            return Finding(prompt, kind.name, "differs", rounding=rounding, reason="; ".join(reasons))
        return Finding(
            prompt,
            kind.name,
            "tie" if tie else "differs",
            row=place.row,
            position=place.column,
            plain=self.tokenizer.decode([place.plain]),
            ours=self.tokenizer.decode([place.ours]),
            margin=place.margin,
            lead=place.lead,
            rounding=rounding,
            reason="; ".join(reasons),
        )

    @property
    def verdict(self) -> Verdict:
        """The worst of all findings."""
        verdicts = {finding.verdict for finding in self.findings}
        return "differs" if "differs" in verdicts else "tie" if "tie" in verdicts else "equal"


class _Drafting:
    """Runs a call with a fresh `Lookahead`; one that has seen the prompt would remember the answer."""

    def __init__(self, check: Check, kind: Kind, answers: list[list[int]]) -> None:
        self._check, self._kind, self._answers = check, kind, answers
        self.last: Any = None

    def __call__(self, call: Call) -> Outcome:
        check, options = self._check, dict[str, Any]()
        match self._kind.drafts:
            case "auto":
                pass
            case "fixed":
                options["nodes"] = NODES
            case _:
                oracle = functools.partial(Oracle, vocab=vocabulary(check.model), seed=SEED)
                options |= {"nodes": NODES, "drafter": oracle(self._answers)}
        lookahead = Lookahead(check.model, check.tokenizer, **check.ways, **options)
        outcome = call.run(lookahead.generate, SEED, plain=False)
        self.last = lookahead.last
        return outcome
