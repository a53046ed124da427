"""Prompts of any kind as token ids: texts, chats, lists of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lookahead.errors import InvalidArgument

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
"""A text, or the messages of a chat, {"role": …, "content": …} each."""


def listed(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Return the prompts, and whether they were given as a list."""
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidArgument(f"prompt={prompt!r}; give a text, a list of chat messages, or a list of either")
    items: list[Any] = list(prompt)
    if all(isinstance(item, Mapping) for item in items):
        return [items], False
    for item in items:
        chat = isinstance(item, Sequence) and bool(item) and all(isinstance(turn, Mapping) for turn in item)
        if not isinstance(item, str) and not chat:
            raise InvalidArgument(f"prompt has {item!r}; give a text, or a list of chat messages")
    return items, True


def encoded(tokenizer: Any, prompt: Prompt, template: Mapping[str, Any]) -> list[int]:
    """Return the token ids of one prompt; those of a chat end where the answer begins.

    Args:
        template: further arguments of the chat template, such as `enable_thinking`.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not getattr(tokenizer, "chat_template", None):
        raise InvalidArgument(
            "prompt is a list of chat messages, but the tokenizer has no chat template; give the prompt as one text, "
            "or set tokenizer.chat_template"
        )
    else:
        options = {"add_generation_prompt": True, **template, "tokenize": True, "return_dict": True}
        ids = tokenizer.apply_chat_template(list(prompt), **options)["input_ids"]
    if not ids:
        raise InvalidArgument(f"prompt={prompt!r} has no tokens; give some text to go on from")
    return list(ids)


def padded(prompts: Sequence[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, [B, L] each, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
