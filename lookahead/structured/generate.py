"""Values instead of text: `generate_json`, `stream_json`, `generate_regex`, `generate_choice`, `generate_grammar`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

import torch

from lookahead.errors import InvalidArgument
from lookahead.grammar.grammar import Grammar, Whitespace
from lookahead.structured.call import Call
from lookahead.structured.memory import MemoryLike
from lookahead.structured.prompts import Message, Prompt
from lookahead.structured.results import JsonReader, Reader, Result, TextReader, raised, results
from lookahead.structured.schemas import Shape
from lookahead.structured.stream import JsonStream

T = TypeVar("T")
One = str | Sequence[Message]
Many = list[str] | tuple[str, ...] | Sequence[Sequence[Message]]


@overload
def generate_json(
    model: Any, tokenizer: Any, prompt: Many, schema: type[T], *, whitespace: Whitespace = ..., lenient: bool = ...,
    memory: MemoryLike = ..., **arguments: Any,
) -> list[Result[T]]: ...  # fmt: skip
@overload
def generate_json(
    model: Any, tokenizer: Any, prompt: One, schema: type[T], *, whitespace: Whitespace = ..., lenient: bool = ...,
    memory: MemoryLike = ..., **arguments: Any,
) -> Result[T]: ...  # fmt: skip
@overload
def generate_json(
    model: Any, tokenizer: Any, prompt: Many, schema: Any, *, whitespace: Whitespace = ..., lenient: bool = ...,
    memory: MemoryLike = ..., **arguments: Any,
) -> list[Result[Any]]: ...  # fmt: skip
@overload
def generate_json(
    model: Any, tokenizer: Any, prompt: One, schema: Any, *, whitespace: Whitespace = ..., lenient: bool = ...,
    memory: MemoryLike = ..., **arguments: Any,
) -> Result[Any]: ...  # fmt: skip
def generate_json(
    model: Any,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    schema: Any,
    *,
    whitespace: Whitespace = "fixed",
    lenient: bool = False,
    memory: MemoryLike = True,
    **arguments: Any,
) -> Any:
    """Return a value of `schema` that the model writes after `prompt`.

    The text is that of `model.generate(…, logits_processor=[processor])`, token for token, where `processor` is
    `grammar.processor(tokenizer, eos_token_id=…)` with the end tokens of the call, and `grammar` is
    `Grammar.json_schema(schema)`, of a Python type `Grammar.json_schema(schema_of(schema))`.

    Args:
        model: a causal language model of a served family; or a `Lookahead`, which keeps what it learns and may have
            pools and options of its own.
        tokenizer: the model's fast tokenizer; None: that of the `Lookahead`.
        prompt: a text, or chat messages (dicts with role and content), which go through the tokenizer's chat template;
            or a list of either, generated in one batch.
        schema: what the value must be: a pydantic model, dataclass, TypedDict, Enum, `Literal`, union, `list[Model]`,
            whatever else `pydantic.TypeAdapter` takes; or a JSON Schema, as a mapping or as JSON.
        whitespace, lenient: see `Grammar.json_schema`.
        memory: earlier texts of a schema, to draft from: True keeps them as long as the model lives, in memory; False:
            none; a directory: in files there, opened and closed in this call; or a `SchemaMemory`, which threads may
            share. No text depends on it.
        arguments: further arguments of `model.generate()`. Without `max_new_tokens` or `max_length` it generates up to
            1024 tokens, or what the model's context leaves. `chat_template_kwargs` go to the chat template.

    Returns:
        A `Result`, of a list of prompts a list of them. `value` is validated by pydantic; of a JSON Schema it is what
        `json.loads` makes of the text.

    Raises:
        IncompleteJson: the text ended early; it has what is there.
        InvalidValue: a validator refuses the value; `__cause__` is pydantic's own error.
        GrammarError: the schema has keywords that are not supported, or is none.
        InvalidArgument: a prompt or an argument that makes no sense here.
        PoolError: the directory of `memory` cannot be used.

    >>> generate_json(model, tokenizer, "Two primes: ", list[int]).value
    [2, 3]
    """
    shape = Shape.of(schema)
    grammar = shape.grammar(whitespace=whitespace, lenient=lenient)
    return _generate(Call(model, tokenizer, prompt, grammar, arguments), JsonReader(shape), memory)


def stream_json(
    model: Any,
    tokenizer: Any,
    prompt: One,
    schema: Any,
    *,
    whitespace: Whitespace = "fixed",
    lenient: bool = False,
    memory: MemoryLike = True,
    **arguments: Any,
) -> JsonStream:
    """Return an iterator over the value of `generate_json` as it grows; its last one is `Result.value`.

    Takes and raises what `generate_json` does, but for lists of prompts; what goes wrong while it generates is raised
    by `next()`. Generation starts with the first `next()`, in a thread of its own.

    >>> for invoice in stream_json(model, tokenizer, prompt, Invoice):
    ...     print(invoice)
    """
    shape = Shape.of(schema)
    grammar, reader = shape.grammar(whitespace=whitespace, lenient=lenient), JsonReader(shape)
    call = Call(model, tokenizer, prompt, grammar, arguments)
    if call.many:
        raise InvalidArgument("stream_json() follows one prompt; make a stream for each, or call generate_json()")
    autocast = _autocast(call.model.device.type)  # of this thread; another one has its own

    def generate(streamer: Any) -> Callable[[], Any]:
        with autocast, call.lookahead(memory) as lookahead:
            texts, trace = call.run(lookahead, streamer=streamer)
        return lambda: raised(results(texts, trace, reader))[0]

    return JsonStream(generate, call.decode)


@overload
def generate_regex(
    model: Any, tokenizer: Any, prompt: Many, pattern: str, *, memory: MemoryLike = ..., **arguments: Any
) -> list[Result[str]]: ...  # fmt: skip
@overload
def generate_regex(
    model: Any, tokenizer: Any, prompt: One, pattern: str, *, memory: MemoryLike = ..., **arguments: Any
) -> Result[str]: ...  # fmt: skip
def generate_regex(
    model: Any,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    pattern: str,
    *,
    memory: MemoryLike = True,
    **arguments: Any,
) -> Any:
    """Return a text that matches all of `pattern`; see `generate_grammar`, and `Grammar.regex` for its syntax.

    >>> generate_regex(model, tokenizer, "The year is ", "[12][0-9]{3}").value
    '1987'
    """
    return _texts(model, tokenizer, prompt, Grammar.regex(pattern), memory, arguments)


@overload
def generate_choice(
    model: Any, tokenizer: Any, prompt: Many, options: Iterable[str], *, memory: MemoryLike = ..., **arguments: Any
) -> list[Result[str]]: ...  # fmt: skip
@overload
def generate_choice(
    model: Any, tokenizer: Any, prompt: One, options: Iterable[str], *, memory: MemoryLike = ..., **arguments: Any
) -> Result[str]: ...  # fmt: skip
def generate_choice(
    model: Any,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    options: Iterable[str],
    *,
    memory: MemoryLike = True,
    **arguments: Any,
) -> Any:
    """Return one of `options`, the one that the model writes; see `generate_grammar`.

    >>> generate_choice(model, tokenizer, "Is water wet? ", ["yes", "no"]).value
    'yes'
    """
    return _texts(model, tokenizer, prompt, Grammar.choice(options), memory, arguments)


@overload
def generate_grammar(
    model: Any, tokenizer: Any, prompt: Many, grammar: Grammar, *, memory: MemoryLike = ..., **arguments: Any
) -> list[Result[str]]: ...  # fmt: skip
@overload
def generate_grammar(
    model: Any, tokenizer: Any, prompt: One, grammar: Grammar, *, memory: MemoryLike = ..., **arguments: Any
) -> Result[str]: ...  # fmt: skip
def generate_grammar(
    model: Any,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    grammar: Grammar,
    *,
    memory: MemoryLike = True,
    **arguments: Any,
) -> Any:
    """Return a text of `grammar` that the model writes after `prompt`.

    Takes what `generate_json` takes, and raises what it raises; a text that ended early is an `IncompleteText`.

    Returns:
        A `Result`, of a list of prompts a list of them; `value` is the text.
    """
    if not isinstance(grammar, Grammar):
        raise InvalidArgument(f"grammar is a {type(grammar).__name__}; give a Grammar, such as Grammar.lark(…)")
    return _texts(model, tokenizer, prompt, grammar, memory, arguments)


def _texts(
    model: Any, tokenizer: Any, prompt: Any, grammar: Grammar, memory: MemoryLike, arguments: dict[str, Any]
) -> Any:
    return _generate(Call(model, tokenizer, prompt, grammar, arguments), TextReader(), memory)


def _autocast(device: str) -> torch.autocast:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled)


def _generate(call: Call, reader: Reader, memory: MemoryLike) -> Any:
    with call.lookahead(memory) as lookahead:
        texts, trace = call.run(lookahead)
    found = raised(results(texts, trace, reader), many=call.many)
    return found if call.many else found[0]
