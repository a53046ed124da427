"""The arguments of `generate()`, for plain and for us."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lookahead.errors import InvalidArgument
from lookahead.families import device_of
from lookahead.request import end_tokens, served_arguments
from lookahead.testing.outcome import Outcome

_SHARED = ("tokenizer", "prefix_allowed_tokens_fn", "grammar")
"""What both runs have in common."""


class Call:
    """A call of `generate()`, with fresh arguments for each run.

    Args:
        tokenizer: for `stop_strings` and `grammar`.
        arguments: of `generate()`; each run has its own copies.
        fresh: returns more of them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        arguments: Mapping[str, Any],
        fresh: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._arguments, self._fresh = model, tokenizer, dict(arguments), fresh

    def logged(self) -> Call:
        """Return the same call, with logits returned."""
        returned = {"return_dict_in_generate": True, "output_logits": True}
        return Call(self._model, self._tokenizer, self._arguments | returned, self._fresh)

    def made(self) -> dict[str, Any]:
        """Return fresh arguments of `lookahead.generate`."""
        made = {name: value if name in _SHARED else _copied(name, value) for name, value in self._arguments.items()}
        made |= dict(self._fresh()) if self._fresh is not None else {}
        if self._tokenizer is not None:
            made["tokenizer"] = self._tokenizer
        return made

    def _for_plain(self) -> dict[str, Any]:
        """Return fresh arguments of plain `generate()`: a grammar is the last of the processors."""
        made = self.made()
        grammar = made.pop("grammar", None)
        if grammar is not None:
            from lookahead.grammar.processor import GrammarProcessor

            processor = GrammarProcessor(grammar, self._tokenizer, eos_token_id=end_tokens(self._model, made))
            made["logits_processor"] = [*(made.get("logits_processor") or []), processor]
        return made

    def plainly(self) -> dict[str, Any]:
        """Return them for `custom_generate`, which carries neither streamer nor stop strings."""
        made = self._for_plain()
        made.pop("streamer", None)
        return served_arguments(self._model, made, self._tokenizer)

    def run(self, generate: Callable[..., Any], seed: int, *, plain: bool) -> Outcome:
        """Return what `generate` does, plain `generate()` or that of a `Lookahead`."""
        made = self._for_plain() if plain else self.made()
        streamed: list[Any] = []
        if made.get("streamer") is not None:
            _overhear(made["streamer"], streamed)
        found = Outcome.of(generate, made, seed=seed, device=device_of(self._model))
        found.streamed = streamed
        return found

    def answers(self, plain: Outcome) -> list[list[int]]:
        """Return what each row generated; nothing where plain raised an error."""
        if plain.error is not None:
            return [[]]
        made = self._arguments | dict(self._fresh() if self._fresh is not None else {})
        decoder = self._model.config.is_encoder_decoder
        given = made.get("decoder_input_ids") if decoder else made.get("input_ids", made.get("inputs"))
        start = int(decoder) if given is None else given.shape[1]
        answers: list[list[int]] = plain.sequences[:, start:].tolist()
        return answers


def _copied(name: str, value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception as error:
        fix = f"give it by fresh=lambda: {{{name!r}: …}}, which makes one for each run"
        raise InvalidArgument(f"{name} is a {type(value).__name__} that cannot be copied ({error}); {fix}") from error


def _overhear(streamer: Any, log: list[Any]) -> None:
    """Let a streamer write down what it receives; its type stays what it is."""
    put, end = streamer.put, streamer.end

    def heard(value: Any) -> None:
        log.append(value)
        put(value)

    def ended() -> None:
        log.append("end")
        end()

    streamer.put, streamer.end = heard, ended
