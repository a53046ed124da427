"""What `hypothesis` draws: calls of `generate()`, and who drafts in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lookahead.families import device_of, text_config, vocabulary
from lookahead.testing.oracles import Adversary, Oracle

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_ROOM = 512  # tokens that a model has positions for, where its config does not say


def calls(
    model: Any, tokenizer: Any = None, *, most_new: int = 32, most_rows: int = 4, most_prompt: int = 24
) -> SearchStrategy[dict[str, Any]]:
    """Return a strategy of keyword arguments of `model.generate()`: prompts, sampling, processors, ends, outputs.

    Prompts are random ids, in batches with padding on the left. A long answer is not a better test than two short ones.

    Args:
        tokenizer: with one, some calls have `stop_strings`; give it to `assert_exact` too.
        most_new: of `max_new_tokens`.
        most_rows: of the batch.
        most_prompt: tokens of a prompt.

    Raises:
        ImportError: `hypothesis` is not installed.

    >>> @given(calls(model), drafters(model))
    ... def test_exact(call, drafts):
    ...     assert_exact(model, **call, **drafts)
    """
    st = _hypothesis()
    positions = getattr(text_config(model), "max_position_embeddings", None) or _ROOM
    most_prompt = max(1, min(most_prompt, positions // 2))
    most_new = max(1, min(most_new, positions - most_prompt))

    def composed(draw: Any) -> dict[str, Any]:
        call = _prompts(draw, st, model, most_rows, most_prompt)
        call["max_new_tokens"] = draw(st.integers(1, most_new), label="max_new_tokens")
        call |= _some(draw, st, _processors(st, call["max_new_tokens"]), 2)
        call["do_sample"] = draw(st.booleans(), label="do_sample")
        if call["do_sample"]:
            call |= _some(draw, st, _warpers(st), 3)
        ends = draw(st.lists(st.integers(0, vocabulary(model) - 1), max_size=4, unique=True), label="ends")
        if ends:
            call["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if tokenizer is not None and draw(st.integers(0, 3), label="stops") == 3:
            call |= _stops(draw, st, model, tokenizer)
        call |= draw(st.sampled_from(_OUTPUTS))
        return call

    return _drawn(st, composed)


def drafters(model: Any, *, most_nodes: int = 32) -> SearchStrategy[dict[str, Any]]:
    """Return a strategy of keyword arguments of `assert_exact` that say who drafts, how much, and with what seed.

    An oracle that knows what plain generates and errs now and then, so that long paths are accepted of a random model
    too; an adversary; what drafts by default, with as many nodes as pay and with a fixed number of them.

    Raises:
        ImportError: `hypothesis` is not installed.
    """
    st = _hypothesis()
    vocab = vocabulary(model)

    def composed(draw: Any) -> dict[str, Any]:
        seed = draw(st.integers(0, 2**16), label="seed")
        kind = draw(st.sampled_from(("oracle", "oracle", "adversary", "fixed", "auto")), label="drafter")
        if kind == "auto":
            return {"nodes": "auto", "seed": seed}
        drafts: dict[str, Any] = {"nodes": draw(st.integers(1, most_nodes), label="nodes"), "seed": seed}
        if kind == "oracle":
            error = draw(st.sampled_from((0.0, 0.1, 0.3, 1.0)), label="error")
            drafts["drafter"] = functools.partial(Oracle, vocab=vocab, error=error, seed=seed)
        elif kind == "adversary":
            drafts["drafter"] = functools.partial(Adversary, vocab=vocab, seed=seed)
        return drafts

    return _drawn(st, composed)


_OUTPUTS: tuple[dict[str, bool], ...] = (
    {},
    {"return_dict_in_generate": True},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
)


def _hypothesis() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        fix = "pip install 'lookahead-decoding[test]'"
        raise ImportError(
            f"lookahead.testing draws its examples with hypothesis, which is not installed; {fix}"
        ) from error
    return strategies


def _drawn(st: Any, draw: Callable[[Any], dict[str, Any]]) -> SearchStrategy[dict[str, Any]]:
    """Return the strategy of what a function draws."""
    strategy: SearchStrategy[dict[str, Any]] = st.composite(draw)()
    return strategy


def _prompts(draw: Any, st: Any, model: Any, most_rows: int, most_prompt: int) -> dict[str, Any]:
    """Draw a batch of prompts, padded on the left."""
    pad = _padding(model)
    word = st.integers(0, vocabulary(model) - 1).filter(lambda token: token != pad)
    prompt = st.lists(word, min_size=1, max_size=most_prompt)
    prompts = draw(st.lists(prompt, min_size=1, max_size=most_rows), label="prompts")
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(one)) + one for one in prompts]
    mask = [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
    device = device_of(model)
    tensors = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
    return tensors | {"pad_token_id": pad}


def _padding(model: Any) -> int:
    """Return the token that fills up short prompts."""
    for config in (model.generation_config, text_config(model)):
        found = getattr(config, "pad_token_id", None)
        if found is not None and 0 <= found < vocabulary(model):
            return int(found)
    return 0


def _processors(st: Any, most_new: int) -> dict[str, Any]:
    return {
        "repetition_penalty": st.sampled_from((0.8, 1.3, 2.0)),
        "no_repeat_ngram_size": st.sampled_from((2, 3)),
        "min_new_tokens": st.integers(1, most_new),
    }


def _warpers(st: Any) -> dict[str, Any]:
    return {
        "temperature": st.sampled_from((0.5, 0.8, 1.7)),
        "top_k": st.sampled_from((1, 4, 20)),
        "top_p": st.sampled_from((0.2, 0.5, 0.8, 0.95)),
        "min_p": st.sampled_from((0.02, 0.2)),
    }


def _some(draw: Any, st: Any, table: dict[str, Any], most: int) -> dict[str, Any]:
    """Draw up to `most` of the entries of `table`, with values."""
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=most, unique=True))
    return {name: draw(table[name], label=name) for name in names}


def _stops(draw: Any, st: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Draw strings to stop at, of tokens that have a text."""
    tokens = draw(st.lists(st.integers(0, min(vocabulary(model), len(tokenizer)) - 1), min_size=1, max_size=3))
    texts = [text for text in (tokenizer.decode([token]) for token in tokens) if text.strip("\ufffd")]
    return {"stop_strings": texts} if texts else {}
