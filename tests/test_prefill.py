"""Prompts as recorded: the bits of prompts as they are written, and only where they are nothing but tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, tiny
from torch import Tensor
from transformers.cache_utils import DynamicCache
from zoo import zoo

from lookahead import Lookahead
from lookahead import script as scripts
from lookahead.cache import NAME
from lookahead.script import Script, recorded_of

SAME = {"llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "granite", "olmo2", "starcoder2", "cohere"}
WINDOWED = {"gemma2", "gemma3_text"}


def fresh(name: str = "llama", dtype: str = "float32", attention: str = "sdpa") -> Any:
    return copy.deepcopy(tiny(name, attention, dtype) if name in FAMILIES else zoo(name, attention, dtype))


def ids_of(rows: int = 1, length: int = 9) -> dict[str, Any]:
    ids = torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prompts that run as recorded."""
    found: list[int] = []
    prefill = Script.prefill

    def seen(self: Any, tokens: Tensor, *given: Any) -> Tensor | None:
        found.append(tokens.shape[1])
        return prefill(self, tokens, *given)

    monkeypatch.setattr(Script, "prefill", seen)
    return found


def held(cache: Any) -> list[Tensor]:
    return [one for layer in cache.layers for one in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(SAME))
def test_recorded_prompts_leave_the_bits_of_plain_ones(name: str, attention: str, dtype: str, ran: list[int]) -> None:
    model = fresh(name, dtype, attention)
    la = Lookahead(model, nodes=0, script=True, packed=False)
    la.generate(**ids_of())
    la.generate(**ids_of(rows=2))
    for rows, length in ((1, 2), (1, 5), (2, 33), (1, 80), (2, 2)):
        given = ids_of(rows, length) | {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
        plain, ours = model.generate(**given), la.generate(**given)
        assert torch.equal(plain.sequences, ours.sequences)
        assert torch.equal(plain.logits[0], ours.logits[0])
        pairs = zip(held(plain[NAME]), held(ours[NAME]), strict=True)
        assert all(torch.equal(a[:, :, :length], b[:, :, :length]) for a, b in pairs)
    assert ran == [2, 5, 33, 80, 2]


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_models_with_windows_make_their_masks_themselves(name: str, ran: list[int]) -> None:
    model = fresh(name)
    la = Lookahead(model, nodes=4, script=True)
    for _ in range(3):
        assert torch.equal(la.generate(**ids_of()), model.generate(**ids_of()))
    assert ran == []
    assert "windows" in next(one.refused for one in recorded_of(model) if one.kind == "prompt")


def _padded(given: dict[str, Any], model: Any) -> None:
    given["attention_mask"][0, :2] = 0


def _cached(given: dict[str, Any], model: Any) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=given["input_ids"][:, :4], use_cache=True, **{NAME: cache})
    given[NAME] = cache


def _embedded(given: dict[str, Any], model: Any) -> None:
    given["inputs_embeds"] = model.get_input_embeddings()(given["input_ids"]).detach()


def _in_chunks(given: dict[str, Any], model: Any) -> None:
    given |= {"prefill_chunk_size": 4}
    del given["attention_mask"]


def _short(given: dict[str, Any], model: Any) -> None:
    given |= {name: given[name][:, :1] for name in ("input_ids", "attention_mask")}


def _elsewhere(given: dict[str, Any], model: Any) -> None:
    given["position_ids"] = torch.arange(0, 18, 2)[None].expand_as(given["input_ids"])


def _new_cache(given: dict[str, Any], model: Any) -> None:
    given[NAME] = DynamicCache(config=model.config)


def _no_mask(given: dict[str, Any], model: Any) -> None:
    del given["attention_mask"]


def _counted(given: dict[str, Any], model: Any) -> None:
    given["position_ids"] = torch.arange(9)[None].expand_as(given["input_ids"])


def told(change: Any) -> tuple[Any, Lookahead, dict[str, Any], dict[str, Any]]:
    """Compare texts behind a changed prompt, after a recorded one; return the model, and what both were given."""
    model = fresh("llama", "float64")
    la = Lookahead(model, nodes=0, script=True)
    la.generate(**ids_of())
    plain, ours = ids_of(), ids_of()
    change(plain, model)
    change(ours, model)
    assert torch.equal(model.generate(**plain), la.generate(**ours))
    return model, la, plain, ours


@pytest.mark.parametrize("change", [_padded, _cached, _embedded, _in_chunks, _short, _elsewhere])
def test_prompts_that_are_more_than_tokens_run_as_they_are_written(change: Any, ran: list[int]) -> None:
    _, la, _, _ = told(change)
    assert ran == []
    la.generate(**ids_of())
    assert ran == [9]


@pytest.mark.parametrize("change", [_new_cache, _no_mask, _counted])
def test_prompts_that_are_told_what_they_are_anyhow(change: Any, ran: list[int]) -> None:
    model, la, plain, ours = told(change)
    assert ran == [9]
    if change is _new_cache:
        pairs = list(zip(held(plain[NAME]), held(ours[NAME]), strict=True))
        assert len(pairs) == 4
        for a, b in pairs:
            torch.testing.assert_close(a, b)
        ids = torch.cat([model.generate(**ids_of()), torch.tensor([[5]])], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 9}
        assert torch.equal(model.generate(**again, **{NAME: plain[NAME]}), la.generate(**again, **{NAME: ours[NAME]}))


def test_a_recorded_prompt_that_fails_is_run_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llama", "float64")
    la = Lookahead(model, nodes=0, script=True)
    expected = la.generate(**ids_of())

    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    run = scripts.run
    monkeypatch.setattr(scripts, "run", fails)
    assert torch.equal(la.generate(**ids_of()), expected)
    refused = {one.kind: one.refused for one in recorded_of(model)}
    assert "no such kernel" in refused["prompt"]
    monkeypatch.setattr(scripts, "run", run)
    assert torch.equal(la.generate(**ids_of()), expected)


def test_a_prompt_that_is_wrong_in_itself_changes_nothing(ran: list[int]) -> None:
    model = fresh("llama", "float64")
    la = Lookahead(model, nodes=0, script=True)
    la.generate(**ids_of())
    with pytest.raises(IndexError):
        la.generate(torch.tensor([[5, 99, 7]]), max_new_tokens=4)
    assert not any(one.refused for one in recorded_of(model))
    la.generate(**ids_of())
    assert ran == [3, 9]


def test_prompts_are_recorded_once_that_is_worth_it(monkeypatch: pytest.MonkeyPatch, ran: list[int]) -> None:
    model = fresh()
    monkeypatch.setattr(scripts, "WORTH", 8)
    la = Lookahead(model, nodes=0)
    for _ in range(5):
        la.generate(**ids_of() | {"max_new_tokens": 1})
    assert ran == [9, 9]
    Lookahead(model, nodes=0, script=False).generate(**ids_of())
    assert ran == [9, 9]
