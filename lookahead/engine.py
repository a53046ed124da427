"""The door: `Lookahead` and `generate()`."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    GenerationMixin,
    LogitsProcessorList,
)

from lookahead.budget import Budget
from lookahead.cache import BLOCK, NAME, apart, fill_all, joined, length_of, opened, require_ordinary
from lookahead.curves import key_of
from lookahead.decode import Decoder
from lookahead.draft import IntArray
from lookahead.drafter import Drafter
from lookahead.errors import InvalidArgument, InvalidDraft
from lookahead.families import Family, require_usable, vocabulary
from lookahead.foresight import Usual
from lookahead.grammar.grammar import Grammar
from lookahead.grammar.processor import GrammarProcessor
from lookahead.grow import Grower
from lookahead.memory import Memory, PoolLike, Remember
from lookahead.opening import Opening, may_open
from lookahead.pool.pool import Pool
from lookahead.prefill import prefill
from lookahead.progress import Contexts, Progress, Records, Stops
from lookahead.purse import Purse
from lookahead.request import (
    end_tokens,
    last_positions,
    padding_mask,
    prompt_length,
    read_before,
    refuse_chunks,
    refuse_clocks,
    refuse_inputs,
    refuse_modes,
    refuse_sharding,
    served_arguments,
)
from lookahead.sampling import Sampler
from lookahead.script import Recorded, Scripts, forget, recorded_of, scripts_of
from lookahead.static.choice import static_of
from lookahead.static.shapes import FIXED, Counts
from lookahead.static.space import spaces_of
from lookahead.static.target import ROOM, StaticTarget
from lookahead.support import family_of, supports
from lookahead.target import Target
from lookahead.trace import Run


class Lookahead:
    """Exact lookahead decoding for one model; holds what outlives a request.

    `Lookahead` is itself accepted by `model.generate(..., custom_generate=la)`. What `transformers` drops on that way
    (`streamer`, and `tokenizer` for `stop_strings`) `la.generate(...)` and `lookahead.generate(model, ...)` carry.

    Args:
        model: a language model that `lookahead.supports`; one that is not well known is tried out
            now, with a few hundred tokens.
        tokenizer: used for `stop_strings` where `generate()` gets none.
        drafter: proposes the drafts; by default a `Grower` over `sources`.
        sources: names or objects of what the default drafter asks, see `Grower`; not together with `drafter`.
        nodes: drafted nodes that a row runs in a pass: "auto", as many as pay, see `Budget`; or always so many of the
            likeliest, as far as there are any. 0 is plain decoding. A window (`Jacobi`) runs rows beside them.
        budget: a `Budget` with settings, or one of its own; in place of `nodes`. Without either, what was learnt of a
            model is shared by all its `Lookahead` in a thread that have the default drafter, see `Budget.usual`.
        pool: n-grams that outlive requests: a `Pool`, its directory (made if it is not there), or several of either,
            which are asked together.
        remember: what is added to the first pool when a request has ended: "output" (what was generated), "all" (the
            prompt too), or None for nothing, nor what is learnt about the evidence.
        static: run passes of few fixed shapes, on a CUDA device as graphs that are recorded once (`lookahead.static`).
            By default where the model is on one CUDA device, and runs token trees.
        invariant: run every pass over 32 rows, and drafts as chains, so that the output is bitwise the same with any
            drafter, any budget and none, in low precision too; in which a `Lookahead` is otherwise as near to plain
            `generate()` as that is to itself with other batches (`docs/exactness.md`).
        compile: run passes of fixed shapes as `torch.compile` makes them, which takes a while for each number of rows,
            and rounds a little differently.
        script: run passes on a CPU as recordings of their tensor operations, without the Python between them; see
            `lookahead.script`. None: from when a recording is worth its time, some hundred
            passes; True: from the first pass on; False: never. What cannot be recorded runs as it is written, as do
            chains, and models with hooks or quantized weights; `recorded` says why, where it was tried.
        packed: let recordings multiply by copies of the weights in the order that the CPU multiplies fastest, see
            `lookahead.packing`, which in float32 adds up in another order. None: as far as they take a quarter of the
            memory that is free; True: all weights; False: none.

    Raises:
        InvalidArgument: `nodes` is neither "auto" nor a whole number in [0, 4096], `drafter` is no `Drafter`, …
        PoolError: the pool is of another tokenizer, has another writer, or is damaged; see `Pool`.
        UnsupportedModel: the model's architecture is not served.

    Attributes:
        budget: how many nodes a pass runs.
        pools: what it drafts from.
        last: what the latest call of `generate()` did (`Run`), or None.

    >>> la = Lookahead(model)
    >>> model.generate(**inputs, max_new_tokens=64, custom_generate=la)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        drafter: Drafter | None = None,
        sources: Sequence[Any] | None = None,
        nodes: int | Literal["auto"] = "auto",
        budget: Budget | None = None,
        pool: PoolLike | Sequence[PoolLike] | None = None,
        remember: Remember = "output",
        static: bool | None = None,
        invariant: bool = False,
        compile: bool = False,
        script: bool | None = None,
        packed: bool | None = None,
    ) -> None:
        if not isinstance(model, GenerationMixin):
            raise InvalidArgument(
                f"model is a {type(model).__name__}; pass a transformers model that can generate() "
                "(of a compiled model its _orig_mod; of a PEFT model with adapters such as LoRA, what get_base_model() "
                "gives)"
            )
        if drafter is not None and not isinstance(drafter, Drafter):
            raise InvalidArgument(f"drafter is a {type(drafter).__name__}; derive it from lookahead.Drafter")
        if drafter is not None and sources is not None:
            raise InvalidArgument("sources belong to the default drafter; give either drafter or sources")
        if drafter is not None and pool is not None:
            raise InvalidArgument("a pool belongs to the default drafter; give either drafter or pool")
        require_usable(model, prompt=1, longest=1)
        family = family_of(model)
        self.model, self.tokenizer, self.budget = model, tokenizer, _budget(model, nodes, budget, drafter)
        self._chains = bool(invariant)
        self._counts = None
        if static_of(model, family, static, invariant=invariant, compile=compile):
            self._counts = Counts(FIXED if invariant else 0)
        if not (script is None or isinstance(script, bool)):
            raise InvalidArgument(f"script={script!r}; give True, False, or None for when it is worth it")
        if script and (static or invariant or compile):
            raise InvalidArgument("script=True records passes of any shape; leave static, invariant and compile out")
        if not (packed is None or isinstance(packed, bool)):
            raise InvalidArgument(f"packed={packed!r}; give True, False, or None for as far as there is memory")
        if packed and (script is False or static or invariant or compile):
            raise InvalidArgument("packed=True is for recorded passes; leave script, static, invariant and compile out")
        self._script, self._packed = script, packed
        self._compiled = torch.compile(model.__call__, dynamic=False) if compile else None
        options: dict[str, Any] = {} if sources is None else {"sources": sources}
        self._memory = Memory(pool, tokenizer, remember)
        self.drafter = drafter or Grower(vocab_size=vocabulary(model), pools=self.pools, **options)
        if invariant and self.drafter.probes:
            raise InvalidArgument("invariant=True drafts chains, and sources has a window of guesses; leave one out")
        if invariant and self.budget.fixed and self.budget.most >= FIXED:
            raise InvalidArgument(
                f"nodes={self.budget.most}: with invariant=True a pass has {FIXED} rows; give {FIXED - 1} at most"
            )
        if family.shape == "linear" and self.drafter.probes:
            raise InvalidArgument(
                f"sources has a window of guesses, which needs token trees; {type(model).__name__} is run with chains: "
                f"{supports(model).reason}; leave the window out"
            )
        if isinstance(self.drafter, Grower) and self._memory.remember is not None:
            self.drafter.keep_learnt()
        self.last: Run | None = None
        self._usual = Usual()

    @property
    def last_trace(self) -> Run | None:
        """What the latest call of `generate()` did, which a notebook shows pass by pass: `last`."""
        return self.last

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pools that it drafts from."""
        return self._memory.pools

    def beside(self, pool: PoolLike) -> Lookahead:
        """Return another `Lookahead` that drafts from `pool` too, adds its outputs to it, and shares what is learnt.

        For texts of one kind, which resemble each other more than the rest. Close it to close a pool given as a
        directory.

        Raises:
            InvalidArgument: this one has a drafter of its own.
            PoolError: the pool cannot be used; see `Pool`.
        """
        if not isinstance(self.drafter, Grower):
            raise InvalidArgument("a pool belongs to the default drafter; this Lookahead was given another")
        other = copy(self)
        other._memory = Memory(pool, self.tokenizer, "output")
        other.drafter = self.drafter.beside(other._memory.pools)
        other.last = None
        return other

    def flush(self) -> None:
        """Write what was added to the first pool; when this returns, it is on the disk.

        Raises:
            PoolError: it cannot be written; nothing is added from then on.
        """
        self._memory.flush()
        self._memory.check()

    def release(self) -> None:
        """Free what is kept between requests of this model: recordings, and caches of fixed shapes."""
        spaces_of(self.model).clear()
        forget(self.model)

    @property
    def recorded(self) -> list[Recorded]:
        """What became of the recordings of this model, see `script`: what each took, or why there is none."""
        return recorded_of(self.model)

    def close(self) -> None:
        """Write and close the pools whose directories were given. Done by itself when the process ends in order."""
        self._memory.close()

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        grammar: Grammar | Sequence[Grammar | None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Return what `model.generate(inputs, generation_config, **arguments)` returns; see `lookahead.generate`."""
        streamer, tokenizer = arguments.get("streamer"), arguments.get("tokenizer")
        if grammar is not None:
            given = {"generation_config": generation_config, **arguments}
            arguments["logits_processor"] = [*(arguments.get("logits_processor") or []), self._obeying(grammar, given)]
        arguments = served_arguments(self.model, {"generation_config": generation_config, **arguments}, self.tokenizer)

        source = inputs if inputs is not None else arguments.get("input_ids")
        source = source if self.model.config.is_encoder_decoder and _is_text(source) else None

        def call(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
            told = self.tokenizer if tokenizer is None else tokenizer
            return self._decode(model, input_ids, streamer=streamer, source=source, tokenizer=told, **prepared)

        # Not by position: models of sounds call their inputs something else, and take both for the same.
        given = {} if inputs is None else {"inputs": inputs}
        return type(self.model).generate(self.model, **given, custom_generate=call, **arguments)

    def _obeying(self, grammar: Any, arguments: dict[str, Any]) -> GrammarProcessor:
        """Return the processor of `grammar=`; texts end as they do in the rest of the call."""
        given = arguments.get("tokenizer")
        tokenizer = self.tokenizer if given is None else given
        if tokenizer is None:
            fix = "pass tokenizer=, or make the Lookahead with one"
            raise InvalidArgument(f"grammar needs the model's tokenizer; {fix}")
        return GrammarProcessor(grammar, tokenizer, eos_token_id=end_tokens(self.model, arguments))

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode what `model.generate(..., custom_generate=self)` has prepared."""
        if generation_config is None:
            raise InvalidArgument(
                "call model.generate(..., custom_generate=la) or la.generate(...), not la(...) itself"
            )
        return self._decode(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            tokenizer=self.tokenizer,
            **model_kwargs,
        )

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        tokenizer: Any,
        streamer: Any = None,
        source: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        if model is not self.model:
            raise InvalidArgument("this Lookahead was made for another model object; make one for this model")
        config, (cache, cross) = generation_config, apart(_cache_of(model_kwargs))
        self._memory.check()
        refuse_modes(config)
        refuse_inputs(model, model_kwargs)
        refuse_sharding(model)
        refuse_clocks(model, self.budget, self.drafter)
        require_ordinary(cache)
        refuse_chunks(config, cache)
        returned = bool(config.return_dict_in_generate)
        stops = Stops(stopping_criteria)
        records = Records(
            input_ids.shape[0], scores=returned and config.output_scores, logits=returned and config.output_logits
        )
        sampler = Sampler(
            LogitsProcessorList() if logits_processor is None else logits_processor,
            do_sample=bool(config.do_sample),
            rows=input_ids.shape[0],
            device=input_ids.device,
            recorder=records if records.wanted else None,
            ordered=stops.ordered or not _is_known(streamer),
            ahead=self.budget.most > 0,
            together=family_of(model).shape == "linear",
            at_once=self._counts is not None,
        )
        if self._chains and stops.max_length is None:
            raise InvalidArgument("invariant=True needs a limit, since passes are shaped by it; give max_new_tokens")
        own = getattr(_cache_of(model_kwargs), "_is_user_defined", False)
        seen = returned or bool(own or getattr(cache, "_is_user_defined", False))
        progress = Progress(
            input_ids,
            stops,
            pad=None if config._pad_token_tensor is None else int(config._pad_token_tensor),
            complete=seen or sampler.lockstep,
            records=records,
            streamer=streamer,
            column_size=input_ids.shape[0] * vocabulary(self.model) if sampler.keeps_columns else 0,
        )
        told = {"source": source, "tokenizer": tokenizer}
        cache = self._run(input_ids, config, model_kwargs, progress, sampler, give_back=seen, **told)
        sequences = progress.ids(progress.settled)
        if streamer is not None:
            streamer.end()
        if not returned:
            return sequences
        output = GenerateDecoderOnlyOutput if cross is None else GenerateEncoderDecoderOutput
        return output(sequences=sequences, scores=records.scores, logits=records.logits, **{NAME: cache})

    def _run(
        self,
        input_ids: Tensor,
        config: Any,
        model_kwargs: dict[str, Any],
        progress: Progress,
        sampler: Sampler,
        *,
        source: Tensor | None,
        tokenizer: Any,
        give_back: bool,
    ) -> Any:
        """Prefill and decode; leave generator and, with `give_back`, cache as plain `generate()` leaves them.

        Returns the cache. After an exception it holds what every row had run.
        """
        prompt = prompt_length(model_kwargs, input_ids)
        require_usable(self.model, prompt=prompt, longest=prompt + progress.remaining(0) - 1)
        family = family_of(self.model)
        self.model._valid_auto_compile_criteria(model_kwargs, config)  # it warns where compile_config has no effect
        given = _cache_of(model_kwargs)
        own, cross = apart(given)
        passed = joined(opened(own), cross)
        decoder: Decoder | None = None
        begin = time.perf_counter()
        try:
            logits, target, contexts, drafters = self._begin(
                input_ids,
                config,
                model_kwargs | {family.cache: passed},
                family,
                progress,
                sampler,
                source,
                unseen=not give_back,
            )
            prefill_s = time.perf_counter() - begin
            try:
                purse, vocab = self._purse(progress.rows, sampler, target), vocabulary(self.model)
                decoder = Decoder(target, sampler, progress, contexts, drafters, purse=purse, vocab=vocab)
                with self.model._optimize_model_for_decode():
                    decoder.run(logits)
                self._memory.add([(contexts.view(row, 0), progress.generated(row)) for row in range(progress.rows)])
                self._learn_values(sampler, progress)
            finally:
                sampler.finish(progress.settled)
                if give_back and not isinstance(target, Opening):
                    target.give_back(own, max(min(progress.settled - 1, target.cache.complete), 0))
                target.close()
                prefill_s += target.recording_s if isinstance(target, Opening) else 0.0
                passes = () if decoder is None else tuple(decoder.passes)
                prompts, outputs = _texts(contexts, progress)
                self.last = Run(progress.settled, passes, prefill_s, prompts, outputs, tokenizer=tokenizer)
        except BaseException:
            fill_all(own, apart(passed)[0])  # what failed before the first pass has left the prompt there
            raise
        finally:
            if cross is not None:
                given.is_updated = passed.is_updated
            for processor in sampler.grammars:
                processor.close()
        return given

    def _begin(
        self,
        input_ids: Tensor,
        config: Any,
        model_kwargs: dict[str, Any],
        family: Family,
        progress: Progress,
        sampler: Sampler,
        source: Tensor | None,
        *,
        unseen: bool,
    ) -> tuple[Tensor | None, Target | StaticTarget | Opening, Contexts, list[Drafter]]:
        """Prefill; return the logits behind the prompt, the model behind its cache, and who drafts from what.

        Where nobody sees the cache (`unseen`), the prompt may be left to run with the first draft; then there are no
        logits yet.
        """
        scripts = self._scripts(family, progress.rows)
        opens = scripts is not None and unseen and self.budget.most > 0
        opens = opens and may_open(self.model, family, input_ids, config, model_kwargs)
        prompt = prefill(self.model, input_ids, config, model_kwargs, scripts, opens=opens)
        cache, cross = apart(model_kwargs[family.cache])
        require_ordinary(cache)
        shown = model_kwargs.get("attention_mask" if cross is None else "decoder_attention_mask")
        cached = length_of(cache, input_ids.shape[1] if shown is None else shown.shape[1])
        mask = padding_mask(shown, cached)
        sampler.foresee(self._usual, input_ids, prompt.width)
        contexts = Contexts(*read_before(input_ids, mask, source, model_kwargs), prompt.width)
        for processor in sampler.grammars:
            processor.begin(progress.rows, input_ids.shape[1], prompt.width)
        with sampler.undisturbed():
            rows = range(progress.rows if self.budget.most else 0)
            drafters = [self._started(contexts.view(row, 0)) for row in rows]
        positions = last_positions(model_kwargs, cached, input_ids)
        if self._counts is not None:
            room = progress.remaining(0) if self._chains else min(progress.remaining(0), ROOM)
            nodes = min(self.budget.most, self._counts.most) + self.drafter.probes + 1
            shapes: Any = {"nodes": nodes, "counts": self._counts, "chains": self._chains, "compiled": self._compiled}
            fixed = StaticTarget(self.model, family, cache, mask, positions, room, **shapes)
            return prompt.logits, fixed, contexts, drafters
        room = min(progress.remaining(0), 2 * BLOCK) + self.budget.most + self.drafter.probes + 1
        encoder = {} if cross is None else {n: model_kwargs.get(n) for n in ("encoder_outputs", "attention_mask")}
        told: Any = {"encoder": encoder, "cross": cross, "scripts": scripts}

        def follows(**filled: Any) -> Target:
            return Target(self.model, family, cache, mask, positions, room, **told, **filled)

        if scripts is not None and prompt.opening is not None:
            first = Opening(self.model, family, input_ids, cache, scripts, prompt.opening, room, follows)
            return None, first, contexts, drafters
        target = follows()
        prompt.tell(scripts, self.model, target.cache)
        return prompt.logits, target, contexts, drafters

    def _scripts(self, family: Family, rows: int) -> Scripts | None:
        """Return the recordings of the model as it is now, where passes may run as such."""
        if self._script is False or self._counts is not None:
            return None
        return scripts_of(self.model, family, rows, at_once=bool(self._script), packed=self._packed)

    def _purse(self, rows: int, sampler: Sampler, target: Target | StaticTarget | Opening) -> Purse:
        """Return what a batch may spend; what a pass costs depends on how tokens are picked, too."""
        where: dict[str, Any] = {"device": self.model.device.type, "model": self._key, "measured": target.costs}
        kind = *sampler.kind, self._compiled is not None, *target.recorded
        return self.budget.begin(rows, kind, **where, guided=bool(sampler.grammars), counts=self._counts)

    @cached_property
    def _key(self) -> str:
        return key_of(self.model)

    def _started(self, context: IntArray) -> Drafter:
        """Return the drafter of one row."""
        drafter: Any = self.drafter.start(context)
        if not isinstance(drafter, Drafter):
            name, given = type(self.drafter).__name__, type(drafter).__name__
            raise InvalidDraft(f"{name}.start() returned a {given}; return a lookahead.Drafter")
        return drafter

    def _learn_values(self, sampler: Sampler, progress: Progress) -> None:
        """Let the default drafter learn from outputs that followed a grammar."""
        for processor in sampler.grammars:
            for row in range(progress.rows):
                matcher = processor.matcher(row)
                if matcher is not None and isinstance(self.drafter, Grower):
                    self.drafter.learn_values(matcher, progress.generated(row))


def _texts(contexts: Contexts, progress: Progress) -> list[tuple[array[int], ...]]:
    """Return the tokens that drafters began with, and those that were generated, of each row."""
    rows = range(progress.rows)
    texts = [contexts.view(row, 0) for row in rows], [progress.generated(row) for row in rows]
    return [tuple(array("i", text.tobytes()) for text in part) for part in texts]


def _cache_of(model_kwargs: dict[str, Any]) -> Any:
    """Return the cache that `generate()` has prepared, under either of its names."""
    given = model_kwargs.get(NAME)
    return model_kwargs.get("cache_params") if given is None else given


def _is_text(inputs: Any) -> bool:
    """Whether inputs are ids of tokens, [B, S]."""
    return isinstance(inputs, Tensor) and inputs.dim() == 2 and not inputs.is_floating_point()


def _budget(model: Any, nodes: Any, budget: Any, drafter: Drafter | None) -> Budget:
    if budget is None and not isinstance(nodes, str):
        return Budget.of(nodes)
    if nodes != "auto":
        raise InvalidArgument(
            f"nodes={nodes!r} and a budget; give one of them"
            if budget is not None
            else f'nodes={nodes!r}; give "auto" or a whole number'
        )
    if budget is not None and not isinstance(budget, Budget):
        raise InvalidArgument(f"budget is a {type(budget).__name__}; give a lookahead.Budget")
    return budget or (Budget.usual(model) if drafter is None else Budget())  # how far another is believed is its own


def _is_known(streamer: Any) -> bool:
    """Whether `streamer` is known to draw no random numbers."""
    return streamer is None or type(streamer).__module__.split(".")[0] in ("transformers", "lookahead")


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    drafter: Drafter | None = None,
    sources: Sequence[Any] | None = None,
    nodes: int | Literal["auto"] = "auto",
    budget: Budget | None = None,
    pool: PoolLike | Sequence[PoolLike] | None = None,
    remember: Remember = "output",
    static: bool | None = None,
    invariant: bool = False,
    compile: bool = False,
    script: bool | None = None,
    packed: bool | None = None,
    **arguments: Any,
) -> Any:
    """Return exactly what `model.generate(inputs, **arguments)` returns, sooner.

    Takes every argument of `model.generate()`; those that belong to another way of decoding (beam search, an assistant,
    `use_cache=False`, continuous batching, …) raise `UnsupportedArgument`. To keep what is learnt from one call for the
    next, make a `Lookahead` and call its `generate`.

    Args:
        model: a causal language model of a served family.
        inputs: [B, L] token ids, as for `model.generate()`; or give `input_ids=`.
        generation_config: as for `model.generate()`.
        grammar: what the output must be, for all rows, or one for each row of the batch (None: that row is free). The
            output is what `model.generate()` gives with `grammar.processor(tokenizer, eos_token_id=…)` as the last
            of your logits processors, its end tokens those of the call, and drafts follow it. Needs `tokenizer=`. With
            `custom_generate=la` pass that processor instead.
        drafter, sources, nodes, budget, pool, remember, static, invariant, compile, script, packed: see `Lookahead`; a
            pool given as a directory is closed at the end.

    >>> lookahead.generate(model, **tokenizer("def add(", return_tensors="pt"), max_new_tokens=64)
    """
    options: dict[str, Any] = {"drafter": drafter, "sources": sources, "nodes": nodes, "budget": budget}
    options |= {"static": static, "invariant": invariant, "compile": compile, "script": script, "packed": packed}
    with Lookahead(model, arguments.get("tokenizer"), pool=pool, remember=remember, **options) as lookahead:
        return lookahead.generate(inputs, generation_config, **arguments)
