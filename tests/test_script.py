"""Recorded passes: the same bits as passes as they are written, and none where that cannot be known."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from law import Case, assert_exact, model_of
from models import FAMILIES, tiny
from torch import Tensor, nn
from zoo import zoo

from lookahead import InvalidArgument, Lookahead, recording
from lookahead import script as scripts
from lookahead.cache import NAME
from lookahead.cost import KNOTS
from lookahead.model_state import state_of
from lookahead.script import recorded_of
from lookahead.support import family_of
from lookahead.target import Target
from lookahead.testing import Oracle

RECORDED = {
    "llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "mistral", "gemma2", "gemma3_text", "granite",
    "olmo2", "starcoder2", "cohere", "smollm3", "glm4", "stablelm", "falcon",
}  # fmt: skip
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "glm4_moe"}


def ids_of(rows: int = 1, length: int = 9, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, (rows, length), generator=generator)
    return {"inputs": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}


def kinds_of(model: Any) -> dict[str, str]:
    """Return why each kind of pass of `model` runs as it is written; "": it does not."""
    return {one.kind: one.refused for one in recorded_of(model)}


def passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that tells of every pass to come whether it runs as it was recorded."""
    found: list[bool] = []
    run, forward = scripts.Script.run, Target.forward

    def scripted(self: Any, *given: Any) -> Tensor | None:
        found[-1] = True
        return run(self, *given)

    def any_pass(self: Any, *given: Any) -> Tensor:
        if self._model is model:
            found.append(False)
        return forward(self, *given)

    monkeypatch.setattr(scripts.Script, "run", scripted)
    monkeypatch.setattr(Target, "forward", any_pass)
    return found


def fresh(name: str = "llama", dtype: str = "float32") -> Any:
    return copy.deepcopy(tiny(name, dtype=dtype) if name in FAMILIES else zoo(name, dtype=dtype))


# The same bits


@pytest.mark.parametrize("name", sorted(RECORDED | EXPERTS))
def test_what_is_recorded_is_exact_and_what_routes_rows_is_not_recorded(name: str) -> None:
    """Experts in a loop over those that are wanted, as in float64; there are kernels for them that can be recorded."""
    case = Case(family=name, way="recorded", new=28, prompt=9, nodes=8)
    assert_exact(replace(case, seed=1, output="dict"))
    assert_exact(replace(case, seed=2, rows=3, mask="left", sample=True, drafter="prompt+recycle", output="ids"))
    assert_exact(replace(case, seed=3, rows=2, eos=(4, 9), drafter="adversary"))
    assert_exact(replace(case, seed=4, nodes=0, output="ids"))
    found = kinds_of(model_of(case))
    assert (found["tree"] == "") == (name in RECORDED), found
    assert found["tree"] == "" or "may depend on numbers" in found["tree"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma3_text", "mistral"])
def test_recorded_passes_give_the_bits_of_written_ones(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several lengths, with trees of all sizes, in buffers that have to grow."""
    model, given = fresh(name, dtype), ids_of(rows=2)
    monkeypatch.setattr("lookahead.cache.BLOCK", 3)
    arguments = {**given, "max_new_tokens": 40, "output_logits": True, "return_dict_in_generate": True}
    for nodes in (0, 1, 5, 20):
        plain = model.generate(**arguments)
        answers = plain.sequences[:, 9:].tolist()
        ran = [
            Lookahead(model, drafter=Oracle(answers, 48, error=0.3, seed=nodes), nodes=nodes, script=script).generate(
                **arguments
            )
            for script in (False, True)
        ]
        assert torch.equal(ran[0].sequences, ran[1].sequences)
        assert all(torch.equal(a, b) for a, b in zip(ran[0].logits, ran[1].logits, strict=True))
    assert kinds_of(model)["tree"] == ""


def test_passes_are_recorded_once_they_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = fresh(), ids_of()
    monkeypatch.setattr(scripts, "WORTH", 6)
    found = passes(model, monkeypatch)
    la = Lookahead(model, nodes=0)
    for _ in range(2):
        la.generate(**given, max_new_tokens=6)
    assert found == [False] * 6 + [True] * 4
    assert [(one.kind, one.rows, one.refused) for one in la.recorded] == [("prompt", 1, ""), ("node", 1, "")]
    assert all(one.seconds > 0 for one in la.recorded)
    found.clear()
    Lookahead(model, nodes=0, script=False).generate(**given, max_new_tokens=6)
    assert not any(found)
    found.clear()
    la.generate(**ids_of(rows=2), max_new_tokens=6)
    assert not any(found), "another batch size is another recording"
    la.release()
    assert la.recorded == []


def test_models_of_few_positions_are_recorded() -> None:
    model, given = copy.deepcopy(tiny("gpt2", dtype="float32", n_positions=64)), ids_of()
    la = Lookahead(model, nodes=6, script=True)
    assert torch.equal(la.generate(**given, max_new_tokens=50), model.generate(**given, max_new_tokens=50))
    assert kinds_of(model)["tree"] == ""


def test_recordings_do_nothing_twice_and_count_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found, lighten = [], recording.lighten

    def watched(script: Any) -> None:
        before = [one.kind() for one in script.inlined_graph.nodes()]
        lighten(script)
        found.append((before, [one.kind() for one in script.graph.nodes()]))

    monkeypatch.setattr(recording, "lighten", watched)
    model = fresh()
    expected = model.generate(**ids_of(), max_new_tokens=12)
    assert torch.equal(Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=12), expected)
    assert "tree" in kinds_of(model)
    assert not any(kinds_of(model).values())
    for before, after in found:
        assert len(after) < len(before)
        assert after.count("aten::floor_divide") <= before.count("aten::floor_divide") - 8, (
            "of queries and keys, halves"
        )


def test_what_another_torch_cannot_lighten_runs_as_it_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_jit_pass_cse")
    model = fresh()
    expected = model.generate(**ids_of(), max_new_tokens=12)
    assert torch.equal(Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=12), expected)
    assert not any(kinds_of(model).values())


def test_long_passes_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, what Python takes is nothing."""
    model = fresh()
    monkeypatch.setattr(scripts, "WORTH", 1)
    monkeypatch.setattr(scripts, "_SLOW_S", 0.0)
    Lookahead(model, nodes=0, packed=False).generate(**ids_of(), max_new_tokens=6)
    assert recorded_of(model) == []
    Lookahead(model, nodes=0, packed=False, script=True).generate(**ids_of(), max_new_tokens=6)
    assert kinds_of(model) == {"prompt": "", "node": ""}


def test_long_passes_are_recorded_where_that_makes_products_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    monkeypatch.setattr(scripts, "WORTH", 1)
    monkeypatch.setattr(scripts, "_SLOW_S", 0.0)
    Lookahead(model, nodes=0).generate(**ids_of(), max_new_tokens=6)
    assert kinds_of(model) == {"prompt": "", "node": ""}


# What a recording cannot know


class Branching(nn.Module):
    """Does something else behind many tokens, or where numbers are large, in code that hides it more or less well."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Any:
        y = self.inner(x, *given, **named)
        if self.what == "size":
            return -y if x.shape[1] > 30 else y
        if self.what == "data":
            return -y if x.abs().max() > 3.0 else y
        if self.what == "count":
            return y * len(x[0])
        if self.what == "equal":
            return -y if torch.equal(x.abs().amax().clamp(max=9.0), x.new_tensor(9.0)) else y
        if self.what == "close":
            return -y if torch.allclose(x, x.new_tensor(9.0)) else y
        if self.what == "quiet":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return -y if x.abs().max() > 9.0 else y
        if self.what == "inside":  # as in functions of torch that are written in Python
            with torch._C.DisableTorchFunction():
                return -y if x.abs().max() > 9.0 else y
        if self.what == "list":
            return y * (1.0 if max(x.flatten().tolist()) < 9.0 else -1.0)
        return y * float(x.shape[1])


@pytest.mark.parametrize("what", ["size", "data", "count", "number", "equal", "close", "quiet", "inside", "list"])
def test_what_depends_on_numbers_is_not_recorded(what: str) -> None:
    model = fresh()
    model.model.layers[0].mlp = Branching(model.model.layers[0].mlp, what)
    Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=12)
    found = kinds_of(model)
    assert all("test_script.py" in reason for reason in found.values()), found
    assert set(found) in ({"opening", "tree", "node"}, {"opening", "tree"})


class Asking(nn.Module):
    """Attention that does something else behind a long context."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **named: Any) -> Any:
        length = named[NAME].get_seq_length(1)
        out, weights = self.inner(*given, **named)
        return (-out if length > 2000 else out), weights


@pytest.mark.parametrize("nodes", [0, 6])
def test_what_asks_for_the_length_of_the_cache_is_not_recorded(nodes: int) -> None:
    model = fresh()
    model.model.layers[1].self_attn = Asking(model.model.layers[1].self_attn)
    Lookahead(model, nodes=nodes, script=True).generate(**ids_of(), max_new_tokens=12)
    found = kinds_of(model)
    assert found.pop("opening" if nodes else "prompt") == "", "before one there is nothing"
    assert all("length > 2000" in reason for reason in found.values())
    assert found


def test_conversions_are_found_while_other_threads_look_at_warnings() -> None:
    """Warnings belong to the whole process."""
    done = threading.Event()

    def other() -> None:
        while not done.is_set():
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("ignore")

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for what in ("data", "quiet", "size"):
            model = fresh()
            model.model.layers[0].mlp = Branching(model.model.layers[0].mlp, what)
            Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=6)
            assert kinds_of(model)
            assert all(kinds_of(model).values())
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("recorded", ["node", "tree"])
def test_recorded_and_written_passes_in_turns(recorded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A written pass may make the buffers larger, too."""
    model, given = fresh("llama", "float64"), ids_of()
    monkeypatch.setattr("lookahead.cache.BLOCK", 3)
    find = scripts.Scripts.find

    def only(self: Any, *arguments: Any) -> Any:
        found = find(self, *arguments)
        return found if (arguments[1] is None) == (recorded == "node") else None

    monkeypatch.setattr(scripts.Scripts, "find", only)
    plain = model.generate(**given, max_new_tokens=700)
    answers = plain[:, 9:].tolist()
    drafter = Oracle(answers, 48, error=0.4, relay=2, seed=3)
    found = passes(model, monkeypatch)
    assert torch.equal(
        Lookahead(model, drafter=drafter, nodes=12, script=True).generate(**given, max_new_tokens=700), plain
    )
    assert 0 < sum(found) < len(found)


def test_a_recording_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PYTORCH_JIT=0 torch gives back what it was to record."""
    model = fresh()
    monkeypatch.setattr(torch.jit, "trace", lambda module, *given, **named: module)
    Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=6)
    assert set(kinds_of(model).values()) == {"torch records nothing here"}


def test_no_more_is_recorded_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    monkeypatch.setattr(recording, "_MOST", 0)
    Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=6)
    assert all("does not free" in reason for reason in kinds_of(model).values())
    assert kinds_of(model)


def test_large_tensors_besides_weights_are_not_kept() -> None:
    model = fresh()

    class Adding(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.table = inner, [torch.zeros(200, 32)]

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) + self.table[0][0]

    model.model.layers[0].mlp = Adding(model.model.layers[0].mlp)
    Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=6)
    assert set(kinds_of(model).values()) == {"it holds tensors that are neither weights nor buffers"}


def test_a_recording_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = fresh(), recording.run
    monkeypatch.setattr(recording, "run", lambda *tensors: run(*tensors) + 1e-4)
    la = Lookahead(model, nodes=6, script=True)
    assert torch.equal(la.generate(**ids_of(), max_new_tokens=12), model.generate(**ids_of(), max_new_tokens=12))
    assert set(kinds_of(model).values()) == {"recorded, it computes something else"}


def test_a_recording_that_fails_later_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = fresh(), ids_of()
    la = Lookahead(model, nodes=6, script=True)
    plain = la.generate(**given, max_new_tokens=12)
    run = scripts.run
    calls = []

    def fails(*tensors: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no such kernel")
        return run(*tensors)

    monkeypatch.setattr(scripts, "run", fails)
    found = passes(model, monkeypatch)
    assert torch.equal(la.generate(**given, max_new_tokens=12), plain)
    assert len(calls) >= 2
    assert any("no such kernel" in one.refused for one in la.recorded)
    assert not found[-1]


def _hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def _own_forward(model: Any) -> None:
    model.model.norm.forward = type(model.model.norm).forward.__get__(model.model.norm)


def _train(model: Any) -> None:
    model.train()


def _compile(model: Any) -> None:
    model.compile(backend="eager")


@pytest.mark.parametrize("change", [_hook, _own_forward, _train, _compile])
def test_what_runs_code_of_the_users_is_never_recorded(change: Any) -> None:
    model = fresh()
    Lookahead(model, script=True).generate(**ids_of(), max_new_tokens=8)
    before = len(recorded_of(model))
    change(model)
    assert scripts.scripts_of(model, family_of(model), 1) is None
    Lookahead(model, script=True).generate(**ids_of(), max_new_tokens=8)
    assert len(recorded_of(model)) == before


def test_nothing_is_recorded_under_autocast() -> None:
    model = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        assert scripts.scripts_of(model, family_of(model), 1) is None
    assert scripts.scripts_of(model, family_of(model), 1) is not None


def test_nothing_is_recorded_under_a_mode_of_torch() -> None:
    """With a default device torch looks at every call."""
    model, given = fresh(), ids_of()
    expected = model.generate(**given, max_new_tokens=8)
    with torch.device("cpu"):
        assert scripts.scripts_of(model, family_of(model), 1) is None
        assert torch.equal(Lookahead(model, script=True).generate(**given, max_new_tokens=8), expected)
    assert scripts.scripts_of(model, family_of(model), 1) is not None


def test_sparse_weights_are_served_and_not_recorded() -> None:
    model, given = fresh(), ids_of()
    layer = model.model.layers[0].mlp.down_proj
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
        expected = model.generate(**given, max_new_tokens=8)
        assert torch.equal(Lookahead(model, nodes=0, script=True).generate(**given, max_new_tokens=8), expected)
    assert recorded_of(model) == []


class Odd(Tensor):
    """A weight of a class of its own."""


def test_quantized_weights_are_not_recorded() -> None:
    model = fresh()
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Odd), requires_grad=False)  # type: ignore[no-untyped-call]
    assert scripts.scripts_of(model, family_of(model), 1) is None


# A model that changes


def _scale(model: Any) -> None:
    model.model.norm.weight.data.mul_(-1.5)


def _replace(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())


def _swap(model: Any) -> None:
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number


def _setting(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = -1.0


def _transpose(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight.detach().t())


class Held(nn.Module):
    """Does what its attributes say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factor, self.table, self.choose = inner, torch.ones(1), {"a": [1.0]}, torch.abs
        self.first: float | None = 1.0
        self.second: float | None = None

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x) * self.factor * self.table["a"][0] * (1.0 if self.second is None else -1.0)
        return y + self.choose(y)


def _attribute(name: str, value: Any) -> Any:
    def change(model: Any) -> None:
        held = model.model.layers[0].mlp
        if name == "swap":
            held.first, held.second = held.second, held.first
        elif name == "table":
            held.table["a"][0] = value
        else:
            setattr(held, name, value)

    return change


class Steered(nn.Module):
    """Adds a tensor that is no weight."""

    def __init__(self, inner: nn.Module, vector: Tensor) -> None:
        super().__init__()
        self.inner, self.held = inner, {"vector": [vector]}

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + self.held["vector"][0]


@pytest.mark.parametrize("shape", [(), (32,)])
@pytest.mark.parametrize("layer", [0, 1])
def test_tensors_that_are_no_weights_may_change_in_place(shape: tuple[int, ...], layer: int) -> None:
    """torch keeps but one of several that were equal."""
    model, given = fresh("llama", "float64"), ids_of()
    for one in model.model.layers:
        one.mlp = Steered(one.mlp, torch.zeros(shape, dtype=torch.float64))
    la = Lookahead(model, nodes=6, script=True)
    before = [la.generate(**given, max_new_tokens=20) for _ in range(2)][1]
    model.model.layers[layer].mlp.held["vector"][0].data.add_(torch.linspace(3.0, -2.0, 32).double() if shape else 3.0)
    expected = model.generate(**given, max_new_tokens=20)
    assert torch.equal(la.generate(**given, max_new_tokens=20), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize(
    ("name", "value"), [("factor", torch.tensor([-1.0])), ("table", -1.0), ("choose", torch.neg), ("swap", None)]
)
def test_attributes_that_were_changed_count(name: str, value: Any) -> None:
    model, given = fresh(), ids_of()
    model.model.layers[0].mlp = Held(model.model.layers[0].mlp)
    la = Lookahead(model, nodes=6, script=True)
    before = la.generate(**given, max_new_tokens=20)
    assert "" in kinds_of(model).values()
    _attribute(name, value)(model)
    expected = model.generate(**given, max_new_tokens=20)
    assert torch.equal(la.generate(**given, max_new_tokens=20), expected)
    assert not torch.equal(before, expected)


def test_a_forward_that_was_replaced_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = fresh(), ids_of()
    la = Lookahead(model, nodes=6, script=True)
    before, kind = la.generate(**given, max_new_tokens=20), type(model.model.norm)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: -forward(self, x))
    expected = model.generate(**given, max_new_tokens=20)
    assert torch.equal(la.generate(**given, max_new_tokens=20), expected)
    assert not torch.equal(before, expected)


def test_another_way_to_run_experts_is_another_state() -> None:
    model = fresh("mixtral")
    before = state_of(model)
    model.set_experts_implementation("eager")
    assert state_of(model).key != before.key


def test_weights_that_were_replaced_are_freed() -> None:
    model, old = fresh(), []
    la = Lookahead(model, nodes=0, script=True)
    for _ in range(4):
        la.generate(**ids_of(), max_new_tokens=4)
        old.append(weakref.ref(model.lm_head.weight))
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    la.generate(**ids_of(), max_new_tokens=4)
    gc.collect()
    assert [one() for one in old] == [None] * 4


def _attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def _double(model: Any) -> None:
    model.double()


@pytest.mark.parametrize("change", [_scale, _replace, _swap, _setting, _transpose, _attention, _double])
def test_a_model_that_was_changed_runs_as_it_is_now(change: Any) -> None:
    model, given = fresh(), ids_of()
    la = Lookahead(model, nodes=6, script=True)
    before = la.generate(**given, max_new_tokens=20)
    change(model)
    expected = model.generate(**given, max_new_tokens=20)
    assert torch.equal(la.generate(**given, max_new_tokens=20), expected)
    if change is not _attention and change is not _double:
        assert not torch.equal(before, expected), "the change changes something"


def test_recordings_do_not_keep_a_model_alive() -> None:
    model = fresh()
    Lookahead(model, nodes=6, script=True).generate(**ids_of(), max_new_tokens=12)
    assert recorded_of(model)
    weight, one = weakref.ref(model.lm_head.weight), weakref.ref(model)
    del model
    gc.collect()
    assert one() is None
    assert weight() is None


def test_few_recordings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    monkeypatch.setattr(scripts, "_KEPT", 2)
    for rows in (1, 2, 1, 3):
        Lookahead(model, nodes=0, script=True).generate(**ids_of(rows), max_new_tokens=4)
    assert sorted({one.rows for one in recorded_of(model)}) == [1, 3]


def test_threads_share_recordings() -> None:
    model, given = fresh(), ids_of()
    expected = model.generate(**given, max_new_tokens=24)
    found: list[Tensor] = []

    def work() -> None:
        la = Lookahead(model, nodes=6, script=True)
        found.extend(la.generate(**given, max_new_tokens=24) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(torch.equal(one, expected) for one in found)


def test_recorded_calls_under_inference_mode_and_with_gradients() -> None:
    model, given = fresh(), ids_of()
    expected = model.generate(**given, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    la = Lookahead(model, nodes=6, script=True)
    with torch.inference_mode():
        assert torch.equal(la.generate(**given, max_new_tokens=12), expected.sequences)
    ours = la.generate(**given, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    assert not any(one.is_inference() for one in ours.logits)
    model.generate(
        **given | {"inputs": ours.sequences, "attention_mask": torch.ones_like(ours.sequences)}, max_new_tokens=4
    )
    keys = ours.past_key_values.layers[0].keys if hasattr(ours, "past_key_values") else ours.cache.layers[0].keys
    assert not keys.is_inference()


def test_bad_settings() -> None:
    with pytest.raises(InvalidArgument, match="script='yes'"):
        Lookahead(fresh(), script="yes")  # type: ignore[arg-type]
    for name in ("static", "invariant", "compile"):
        with pytest.raises(InvalidArgument, match="script=True"):
            Lookahead(fresh(), script=True, **{name: True})


# The state of a model


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_the_state_of_a_model_is_the_same_while_nothing_changes(name: str) -> None:
    """Else it would never be recorded by itself."""
    model = fresh(name)
    before = state_of(model)
    Lookahead(model, script=True).generate(**ids_of(), max_new_tokens=8)
    model.generate(**ids_of(), max_new_tokens=8)
    assert state_of(model) == before
    assert state_of(copy.deepcopy(model)).key != before.key


def test_tables_that_hold_themselves_have_a_state() -> None:
    model = fresh()
    model.model.norm.table = held = {"a": [1.0]}
    held["self"] = held  # type: ignore[assignment]
    before = state_of(model)
    assert state_of(model) == before
    held["a"][0] = 2.0
    assert state_of(model) != before


# What recorded passes take


def test_what_recorded_passes_take_is_measured_and_tells_the_budget() -> None:
    model, given = fresh(), ids_of()
    la = Lookahead(model, script=True)
    for _ in range(2):
        la.generate(**given, max_new_tokens=12)
    (found,) = scripts._OF[model].scripts.values()
    assert found.costs is not None
    seconds = found.costs(np.array([1.0, 3.0, 5.0, 25.0, 49.0, 99.0]))
    assert (seconds > 0).all()
    assert (np.diff(seconds) >= 0).all()
    known = [curve._known for curve in la.budget._curves.values() if curve._known is not None]
    assert any(np.array_equal(one, found.costs(KNOTS)) for one in known)


def test_what_passes_take_is_not_measured_behind_a_long_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples would hold its keys and values several times."""
    model, example, seen = fresh(), recording._example, []

    def noted(module: Any, cache: Any, nodes: int, used: int) -> Any:
        seen.append((nodes, used))
        return example(module, cache, nodes, used)

    monkeypatch.setattr(recording, "_example", noted)
    Lookahead(model, script=True).generate(**ids_of(length=800), max_new_tokens=12)
    assert (49, 512) in seen
    assert max(used for _, used in seen) <= 700


def test_a_clock_that_stands_still_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = fresh(), ids_of()
    monkeypatch.setattr(recording, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: 1.0)}))
    la = Lookahead(model, script=True)
    expected = model.generate(**given, max_new_tokens=12)
    for _ in range(2):
        assert torch.equal(la.generate(**given, max_new_tokens=12), expected)
    (found,) = scripts._OF[model].scripts.values()
    assert found.costs is None
