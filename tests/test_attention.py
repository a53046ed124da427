"""Attention whose heads share keys: the bits of `transformers`, and a config that is left as it was."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lookahead import Lookahead
from lookahead.attention import NAME, attend, implementation_of, shared_heads


@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from((1, 2, 3)),
    groups=st.sampled_from((1, 2, 7)),
    nodes=st.sampled_from((1, 2, 9, 33)),
    slots=st.integers(1, 700),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    kind=st.sampled_from(("tree", "tree", "none", "bool")),
    seed=st.integers(0, 99),
)
def test_the_bits_are_those_of_transformers(
    batch: int, heads: int, groups: int, nodes: int, slots: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, nodes, heads * groups, 8, generator=draw).to(dtype).transpose(1, 2)
    buffer = torch.randn(2, batch, heads, slots + 5, 8, generator=draw).to(dtype)
    key, value = buffer[:, :, :, :slots]
    shown = torch.rand(batch, 1, nodes, slots, generator=draw) < 0.7
    shown[..., 0] = True
    mask = torch.zeros(shown.shape, dtype=dtype).masked_fill_(~shown, torch.finfo(dtype).min)
    given_mask = {"tree": mask, "none": None, "bool": shown}[kind]
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, given_mask, scaling=0.3)
    found, weights = attend(module, query, key, value, given_mask, scaling=0.3)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert weights is None


def test_what_only_transformers_can_do_is_left_to_it() -> None:
    states, mask = torch.randn(1, 4, 3, 8), torch.zeros(1, 1, 3, 3)
    module, asked = SimpleNamespace(num_key_value_groups=2), list[dict[str, Any]]()

    def theirs(*_: Any, **given: Any) -> tuple[torch.Tensor, None]:
        asked.append(given)
        return states, None

    with mock.patch("lookahead.attention.sdpa_attention_forward", theirs):
        for given in ({"softcap": 3.0}, {"position_bias": mask}, {}):
            attend(module, states, states[:, :2], states[:, :2], mask, **given)
        attend(module, states, states[:, :2], states[:, :2], mask == 0)
    assert [set(one) & {"softcap", "position_bias"} for one in asked] == [{"softcap"}, {"position_bias"}, set()]


def test_a_config_is_left_as_it_was() -> None:
    config = tiny("llama").config

    def fail() -> None:
        with shared_heads(config):
            assert config._attn_implementation == NAME
            assert implementation_of(config) == "sdpa"
            with shared_heads(config):
                assert config._attn_implementation == NAME
            assert config._attn_implementation == NAME
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert config._attn_implementation == "sdpa"


def test_only_sdpa_with_shared_heads_is_changed() -> None:
    for config in (tiny("llama", "eager").config, tiny("gpt2").config, tiny("gpt_neox").config):
        before = config._attn_implementation
        with shared_heads(config):
            assert config._attn_implementation == before


def test_threads_that_run_one_model_leave_it_as_it_was() -> None:
    model, errors = tiny("llama", vocab_size=60), list[BaseException]()
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    expected = model.generate(ids, max_new_tokens=20)

    def write() -> None:
        try:
            for _ in range(3):
                assert torch.equal(Lookahead(model).generate(ids, max_new_tokens=20), expected)
                assert torch.equal(model.generate(ids, max_new_tokens=20), expected)
        except BaseException as error:
            errors.append(error)

    threads: list[Any] = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert model.config._attn_implementation == "sdpa"
