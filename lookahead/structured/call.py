"""Prompts and a grammar, made ready for `generate()`, and the texts that come out."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.generation import GenerationMixin

from lookahead.engine import Lookahead
from lookahead.errors import InvalidArgument
from lookahead.grammar.grammar import Grammar
from lookahead.grammar.matcher import ENDED
from lookahead.grammar.vocabulary import Vocabulary
from lookahead.grow import Grower
from lookahead.request import end_tokens
from lookahead.structured.memory import MemoryLike, opened
from lookahead.structured.prompts import Prompt, encoded, listed, padded
from lookahead.trace import Run

NEW_TOKENS = 1024
"""Generated at most where nobody says how many."""

_ELSEWHERE = {
    "streamer": "stream_json() gives a value as it grows",
    "stop_strings": "the grammar says where the text ends",
    "grammar": "the schema, pattern or grammar of the call is the one to follow",
    "return_dict_in_generate": "the results hold texts and values; lookahead.generate(…, grammar=…) returns tensors",
}
_PROMPT = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache")
_LOOKAHEAD = ("nodes", "drafter", "sources", "pool", "remember")


@dataclass(frozen=True, slots=True)
class Text:
    """What was generated for one prompt, special tokens left out.

    Attributes:
        complete: whether it ends where the grammar lets it end.
        tokens: how many tokens it took, its end token included.
    """

    text: str
    complete: bool
    tokens: int


class Call:
    """One call of `generate()` under a grammar.

    Args:
        model: a model, or a `Lookahead` to draft with.
        tokenizer: the model's fast tokenizer; None: the `Lookahead`'s.
        prompt: a text, chat messages, or a list of either.
        given: further arguments of `generate()`, and `chat_template_kwargs`.

    Attributes:
        many: whether the prompts came as a list.
        arguments: all of `generate()`'s, but for the grammar.

    Raises:
        InvalidArgument: an argument that makes no sense here, by name; a prompt that fills the model's context.
    """

    def __init__(
        self, model: Any, tokenizer: Any, prompt: Prompt | Sequence[Prompt], grammar: Grammar, given: dict[str, Any]
    ) -> None:
        self._lookahead = model if isinstance(model, Lookahead) else None
        self.model = model.model if isinstance(model, Lookahead) else model
        if not isinstance(self.model, GenerationMixin):
            raise InvalidArgument(f"model is a {type(model).__name__}; pass a transformers model, or a Lookahead")
        if tokenizer is None and self._lookahead is not None:
            tokenizer = self._lookahead.tokenizer
        if tokenizer is None:
            raise InvalidArgument("tokenizer is None; pass the model's tokenizer, or a Lookahead that was made with it")
        self.tokenizer, self.grammar = tokenizer, grammar
        self._vocabulary = Vocabulary.of(tokenizer)
        _refuse(self.model, given)
        prompts, self.many = listed(prompt)
        template = given.get("chat_template_kwargs") or {}
        if template and all(isinstance(each, str) for each in prompts):
            raise InvalidArgument("chat_template_kwargs: the prompt is no list of chat messages; leave it out")
        self._ends = _ends(self.model, given, self._vocabulary)
        self._pad = _pad(self.model, given, tokenizer, self._ends)
        rows = [encoded(tokenizer, each, template) for each in prompts]
        ids, mask = padded(rows, self._pad, self.model.device)
        self.prompt_length = ids.shape[1]
        self.arguments = {
            **{name: value for name, value in given.items() if name != "chat_template_kwargs"},
            "input_ids": ids,
            "attention_mask": mask,
            "eos_token_id": list(self._ends),
            "pad_token_id": self._pad,
            "return_dict_in_generate": False,
            "num_return_sequences": 1,
            **_limit(self.model, given, self.prompt_length),
        }

    @contextmanager
    def lookahead(self, memory: MemoryLike) -> Iterator[Lookahead]:
        """Give the `Lookahead` that this call is decoded with."""
        given = self._lookahead
        if given is not None and memory is True and not isinstance(given.drafter, Grower):
            memory = False  # a drafter of the user's own asks no pools
        with opened(memory, self.model) as kept:
            if kept is None:
                yield given or Lookahead(self.model)
                return
            pool = kept.pool(self.grammar, self.tokenizer)
            whole = given or Lookahead(self.model, drafter=kept.grower(self.model, pool))
            with whole.beside(pool) as lookahead:
                yield lookahead
            whole.last = lookahead.last

    def run(self, lookahead: Lookahead, **more: Any) -> tuple[list[Text], Run]:
        """Generate; return the text of every prompt, and what happened."""
        arguments = {**self.arguments, **more, "grammar": self.grammar, "tokenizer": self.tokenizer}
        texts = self.texts(lookahead.generate(**arguments))
        assert lookahead.last is not None
        return texts, lookahead.last

    def run_plain(self, **more: Any) -> list[Text]:
        """Return the texts that `run` returns, from plain `model.generate()`."""
        processor = self.grammar.processor(self.tokenizer, eos_token_id=self._ends)
        given = self.arguments.get("logits_processor") or []
        arguments = {**self.arguments, **more, "tokenizer": self.tokenizer, "logits_processor": [*given, processor]}
        return self.texts(self.model.generate(**arguments))

    def texts(self, sequences: Any) -> list[Text]:
        """Return the texts of [B, L] sequences that `generate()` returned."""
        return [self.text(row) for row in sequences[:, self.prompt_length :].tolist()]

    def text(self, tokens: list[int]) -> Text:
        """Return the text of generated tokens."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        body = tokens[:end]
        complete = self._whole(body, ended=end is not None)
        while end is None and body and body[-1] == self._pad and not complete:  # a stopping criterion ended the row
            body = body[:-1]
        return Text(self.decode(body), complete, len(body) + (end is not None))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell so far; of a character that is not whole yet, nothing."""
        body = [token for token in tokens if token not in self._ends]
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self._vocabulary.decode(body))

    def _whole(self, tokens: list[int], *, ended: bool) -> bool:
        """Return whether the text of `tokens` is complete: it has ended, or nothing but its end may follow."""
        matcher = self.grammar.matcher(self._vocabulary, ends=self._ends, size=int(self.model.config.vocab_size))
        try:
            state = matcher.settle(tokens)
            if state == ENDED or not matcher.accepts(state):
                return False
            ends = sum(matcher.allows(state, end) for end in self._ends)
            return ended or int(np.bitwise_count(matcher.mask(state)).sum()) == ends
        finally:
            matcher.close()


def _refuse(model: Any, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is None or value is False:
            continue
        if name in _ELSEWHERE:
            raise InvalidArgument(f"{name}: {_ELSEWHERE[name]}; leave it out")
        if name in _PROMPT:
            raise InvalidArgument(f"{name}: the prompt is an argument of its own; leave it out")
        if name in _LOOKAHEAD:
            advice = f"pass Lookahead(model, tokenizer, {name}=…) in place of the model"
            raise InvalidArgument(f"{name}: {advice}")
    holders = (given.get("generation_config"), model.generation_config)
    asked = given.get("num_return_sequences") or next(
        (n for n in (getattr(holder, "num_return_sequences", None) for holder in holders) if n), 1
    )
    if asked > 1:
        raise InvalidArgument(f"num_return_sequences={asked}: give the prompt as often, [prompt] * {asked}")


def _ends(model: Any, given: dict[str, Any], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the tokens that end a text: as the call, else the model, else the tokenizer says."""
    ends = end_tokens(model, given) or ([] if vocabulary.end is None else [vocabulary.end])
    if not ends:
        raise InvalidArgument("a grammar ends with an end token, and the tokenizer names none; pass eos_token_id")
    return tuple(dict.fromkeys(ends))


def _pad(model: Any, given: dict[str, Any], tokenizer: Any, ends: tuple[int, ...]) -> int:
    known = (
        given.get("pad_token_id"),
        getattr(given.get("generation_config"), "pad_token_id", None),
        model.generation_config.pad_token_id,
        tokenizer.pad_token_id,
        ends[0],
    )
    return int(next(pad for pad in known if pad is not None))


def _limit(model: Any, given: dict[str, Any], prompt: int) -> dict[str, int]:
    """Return `max_new_tokens` where the call does not say how long a text may be."""
    config = given.get("generation_config")
    for name in ("max_new_tokens", "max_length"):
        if given.get(name) is not None or getattr(config, name, None) is not None:
            return {}
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and prompt >= context:
        raise InvalidArgument(f"the prompt has {prompt} tokens, but the model's context is {context}; shorten it")
    return {"max_new_tokens": NEW_TOKENS if context is None else min(NEW_TOKENS, context - prompt)}
