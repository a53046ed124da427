"""Types to generate values of, and the texts that plain constrained `generate()` writes."""

from __future__ import annotations

import dataclasses
import enum
import json
from datetime import date
from typing import Annotated, Any, Literal

import pytest
import torch
from models import EOS, JSON_VOCAB, PAD, json_tokenizer, tiny
from pydantic import BaseModel, Field, TypeAdapter, field_validator
from typing_extensions import TypedDict

from lookahead import Grammar
from lookahead.errors import IncompleteJson
from lookahead.structured.generate import generate_json
from lookahead.structured.partial import same

Word = Annotated[str, Field(max_length=5)]
Digit = Annotated[int, Field(ge=-3, le=120)]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "the blue"


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: Digit


class Square(BaseModel):
    kind: Literal["square"]
    side: Digit
    name: Word = "none"


class Drawing(BaseModel):
    title: Word
    colour: Colour
    shapes: Annotated[list[Annotated[Circle | Square, Field(discriminator="kind")]], Field(max_length=2)]


@dataclasses.dataclass
class Point:
    x: Digit
    y: Digit
    label: Word | None = None


class Row(TypedDict):
    id: Digit
    tags: Annotated[list[Word], Field(max_length=3)]


ROW_SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "na": {"type": "string", "maxLength": 4}},
    "required": ["id", "na"],
    "additionalProperties": False,
}
FORMS: dict[str, Any] = {
    "model": Drawing,
    "dataclass": Point,
    "typed dict": Row,
    "list of models": Annotated[list[Square], Field(min_length=1, max_length=2)],
    "literal": Literal["ab", "abc", 12, None],
    "enum": Colour,
    "union": Circle | Word | None,
    "dictionary": dict[Literal["the", "name"], Digit],
    "set": Annotated[set[Colour], Field(max_length=2)],
    "date": date,
    "schema": ROW_SCHEMA,
    "schema as text": json.dumps(ROW_SCHEMA),
    "adapter": TypeAdapter(tuple[Digit, bool]),
}
PROMPTS = ('{"name": "the ', "abc 12 ", "[[")
LONG = 160


def model(dtype: str = "float64") -> Any:
    return tiny("llama", "sdpa", dtype, vocab_size=JSON_VOCAB)


def plain(prompt: str, grammar: Grammar, *, seed: int | None = None, dtype: str = "float64", **arguments: Any) -> str:
    """The text that plain `model.generate()` writes, read token by token."""
    tokenizer = json_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    if seed is not None:
        torch.manual_seed(seed)
    ids = (
        model(dtype)
        .generate(
            **inputs,
            **{"max_new_tokens": LONG, **arguments},
            eos_token_id=EOS,
            pad_token_id=PAD,
            logits_processor=[grammar.processor(tokenizer)],
        )[0, inputs["input_ids"].shape[1] :]
        .tolist()
    )
    text: str = tokenizer.decode(ids[: ids.index(EOS)] if EOS in ids else ids)
    return text


def grows(smaller: Any, larger: Any) -> bool:
    """Whether `larger` goes on from `smaller`."""
    if smaller is None:
        return True
    if type(smaller) is not type(larger):
        return False
    if isinstance(smaller, str):
        return bool(larger.startswith(smaller))
    if isinstance(smaller, list):
        return len(smaller) <= len(larger) and all(map(grows, smaller, larger))
    if isinstance(smaller, dict):
        there = list(larger)[: len(smaller)] == list(smaller)
        return there and all(grows(smaller[key], larger[key]) for key in smaller)
    return same(smaller, larger)


class Picky(BaseModel):
    id: Digit

    @field_validator("id")
    @classmethod
    def never(cls, value: int) -> int:
        raise ValueError("never good enough")


class Broken(BaseModel):
    id: Digit

    @field_validator("id")
    @classmethod
    def fails(cls, value: int) -> int:
        raise KeyError("lost")


def early(prompt: Any, schema: Any, **arguments: Any) -> IncompleteJson:
    with pytest.raises(IncompleteJson) as caught:
        generate_json(model(), json_tokenizer(), prompt, schema, **arguments)
    return caught.value
