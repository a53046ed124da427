"""Prompts that run together with the first draft: the same texts in a pass less, and only where nobody can tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, tiny
from test_prefill import WINDOWED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from zoo import zoo

from lookahead import Budget, Grammar, Lookahead, demo_path, opening, recording
from lookahead.cache import NAME
from lookahead.lighten import spare
from lookahead.opening import Opening
from lookahead.purse import Purse
from lookahead.script import Script, recorded_of
from lookahead.testing.oracles import Oracle

NAMES = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "granite", "olmo2", "starcoder2", "cohere"]


def fresh(name: str = "llama", dtype: str = "float64", attention: str = "sdpa", **options: Any) -> Any:
    return copy.deepcopy(
        tiny(name, attention, dtype, **options) if name in FAMILIES else zoo(name, attention, dtype, **options)
    )


def ids_of(length: int = 9, seed: int = 0, tokens: int = 24, rows: int = 1) -> dict[str, Any]:
    ids = torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(97 * seed + length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": tokens}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Prompts and trees, in tokens, that run together."""
    found: list[tuple[int, int]] = []
    forward = Opening.forward

    def seen(self: Opening, drafts: Any, columns: Any) -> Tensor:
        found.append((len(self._prompt), len(drafts[0])))
        assert list(columns) == [-1]
        return forward(self, drafts, columns)

    monkeypatch.setattr(Opening, "forward", seen)
    return found


def kinds_of(model: Any) -> dict[str, str]:
    return {one.kind: one.refused for one in recorded_of(model)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_openings_change_no_token(name: str, attention: str, opened: list[tuple[int, int]]) -> None:
    model, told = fresh(name, attention=attention), []
    plain = [model.generate(**ids_of(length, length)) for length in (9, 2, 5, 33, 80)]
    for i, length in enumerate((9, 2, 5, 33, 80)):
        drafter = Oracle([plain[i][0, length:].tolist()], 48, error=0.3, branch=0.4, seed=i)
        la = Lookahead(model, drafter=drafter, nodes=12, script=True)
        assert torch.equal(la.generate(**ids_of(length, length)), plain[i])
        assert la.last is not None
        assert sum(one.committed[0] for one in la.last.passes) + la.last.prefills == la.last.tokens == 24
        told.append([one.opens for one in la.last.passes])
    assert kinds_of(model)["opening"] == ""
    assert [length for length, _ in opened] == [2, 5, 33, 80]
    assert not any(told[0])
    assert all(one[0] and not any(one[1:]) for one in told[1:])


def test_an_opening_keeps_what_the_model_agreed_with(opened: list[tuple[int, int]]) -> None:
    """With a right draft the first pass gives all of it, behind whose rows the text goes on."""
    model = fresh()
    plain = model.generate(**ids_of())
    for error in (0.0, 0.0, 1.0):
        drafter = Oracle([plain[0, 9:].tolist()], 48, error=error, branch=0.0, probe=0.0)
        la = Lookahead(model, drafter=drafter, nodes=7, script=True)
        assert torch.equal(la.generate(**ids_of()), plain)
        assert la.last is not None
        if la.last.prefills:
            assert [one.committed[0] for one in la.last.passes] == [8, 8, 7]
        else:
            assert la.last.passes[0].committed[0] == (1 if error else 8)
            assert la.last.tokens_per_pass == 24 / len(la.last.passes)
    assert opened == [(9, 8), (9, 8)]


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_texts_that_end_with_the_opening(tokens: int, opened: list[tuple[int, int]]) -> None:
    model, given = fresh(), ids_of(tokens=tokens)
    plain = model.generate(**given)
    for _ in range(2):
        la = Lookahead(model, drafter=Oracle([plain[0, 9:].tolist()], 48, error=0.0), nodes=12, script=True)
        assert torch.equal(la.generate(**given), plain)
    assert len(opened) == 1
    assert la.last is not None
    assert la.last.forwards == len(la.last.passes)


def test_an_end_token_within_the_opening_ends_the_text() -> None:
    model, given = fresh(), ids_of()
    end = int(model.generate(**given)[0, 9 + 3])
    plain = model.generate(**given, eos_token_id=end)
    assert plain.shape[1] <= 9 + 4
    for _ in range(2):
        la = Lookahead(model, drafter=Oracle([[*plain[0, 9:].tolist(), 5, 6]], 48, error=0.0), nodes=9, script=True)
        assert torch.equal(la.generate(**given, eos_token_id=end), plain)
    assert la.last is not None
    assert la.last.prefills == 0


@pytest.mark.parametrize("seed", range(3))
def test_sampled_texts_and_the_generator_are_as_plain_leaves_them(seed: int, opened: list[tuple[int, int]]) -> None:
    model = fresh("llama", "float32")
    given = ids_of() | {"do_sample": True, "temperature": 0.7, "top_k": 0}
    Lookahead(model, nodes=12, script=True).generate(**given)
    torch.manual_seed(seed)
    plain = model.generate(**given)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    assert torch.equal(Lookahead(model, nodes=12, script=True).generate(**given), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(opened) == 1


def test_processors_and_streamers_see_what_they_see_plainly(opened: list[tuple[int, int]]) -> None:
    class Seen:
        def __init__(self) -> None:
            self.tokens: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.tokens.append(value.flatten().tolist())

        def end(self) -> None:
            self.tokens.append([])

    model, given = fresh(), ids_of() | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    found = []
    for generate in (model.generate, *[Lookahead(model, nodes=12, script=True).generate] * 2):
        streamer = Seen()
        generate(**given, streamer=streamer)
        found.append(streamer.tokens)
    assert found[0] == found[1] == found[2]
    assert len(opened) == 1


@pytest.mark.parametrize("nodes", [12, "auto"])
def test_texts_that_follow_a_grammar_open_too(nodes: Any, opened: list[tuple[int, int]]) -> None:
    path = demo_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).float(), AutoTokenizer.from_pretrained(path)
    grammar = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    given = dict(tokenizer("{}", return_tensors="pt")) | {"max_new_tokens": 24, "do_sample": False}
    processor = grammar.processor(tokenizer, eos_token_id=model.generation_config.eos_token_id)
    plain = model.generate(**given, logits_processor=[processor])
    for _ in range(3):
        la = Lookahead(model, tokenizer, nodes=nodes, script=True)
        assert torch.equal(la.generate(**given, grammar=grammar), plain)
    assert len(opened) >= 1


def _returned(given: dict[str, Any], model: Any) -> None:
    given["return_dict_in_generate"] = True


def _new_cache(given: dict[str, Any], model: Any) -> None:
    given[NAME] = DynamicCache(config=model.config)


def _padded(given: dict[str, Any], model: Any) -> None:
    given["attention_mask"][0, :2] = 0


def _two_rows(given: dict[str, Any], model: Any) -> None:
    given |= {name: given[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}


def _short(given: dict[str, Any], model: Any) -> None:
    given |= {name: given[name][:, :1] for name in ("input_ids", "attention_mask")}


def _long(given: dict[str, Any], model: Any) -> None:
    given |= {name: given[name].repeat(1, 2) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("change", [_returned, _new_cache, _padded, _two_rows, _short, _long])
def test_prompts_that_somebody_sees_or_that_are_more_than_tokens_run_alone(
    change: Any, monkeypatch: pytest.MonkeyPatch, opened: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(opening, "_LONGEST", 9)
    model = fresh()
    la = Lookahead(model, nodes=4, script=True)
    la.generate(**ids_of())
    plain, ours = ids_of(), ids_of()
    change(plain, model)
    change(ours, model)
    expected, found = model.generate(**plain), la.generate(**ours)
    if change is _returned:
        expected, found = expected.sequences, found.sequences
    assert torch.equal(expected, found)
    assert opened == []
    la.generate(**ids_of())
    assert len(opened) == 1


@pytest.mark.parametrize("options", [{"nodes": 0}, {"script": False}])
def test_without_drafts_or_recordings_nothing_opens(options: dict[str, Any], opened: list[tuple[int, int]]) -> None:
    model = fresh()
    for given in ({"nodes": 4, "script": True}, options, options):
        Lookahead(model, **given).generate(**ids_of())
    assert opened == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_low_precision_prompts_keep_their_bits(dtype: str, opened: list[tuple[int, int]]) -> None:
    model = fresh("llama", dtype)
    for _ in range(3):
        Lookahead(model, nodes=4, script=True).generate(**ids_of())
    assert opened == []
    assert "opening" not in kinds_of(model)


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_models_with_windows_run_their_prompts_alone(name: str, opened: list[tuple[int, int]]) -> None:
    model = fresh(name, "float32")
    for _ in range(3):
        la = Lookahead(model, nodes=4, script=True)
        assert torch.equal(la.generate(**ids_of()), model.generate(**ids_of()))
    assert opened == []
    assert "windows" in kinds_of(model)["opening"]


def test_a_model_that_computes_all_logits_runs_its_prompts_alone(
    monkeypatch: pytest.MonkeyPatch, opened: list[tuple[int, int]]
) -> None:
    model = fresh()
    monkeypatch.setattr(type(model), "_supports_logits_to_keep", lambda self: False)
    for _ in range(3):
        assert torch.equal(Lookahead(model, nodes=4, script=True).generate(**ids_of()), model.generate(**ids_of()))
    assert opened == []
    assert "all tokens" in kinds_of(model)["opening"]
    assert kinds_of(model)["prompt"] == ""


def test_an_opening_that_fails_is_run_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    expected = model.generate(**ids_of())
    for _ in range(2):
        Lookahead(model, nodes=4, script=True).generate(**ids_of())

    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("lookahead.script.run", fails)
    drafter = Oracle([expected[0, 9:].tolist()], 48, error=0.0)
    la = Lookahead(model, drafter=drafter, nodes=12, script=True)
    assert torch.equal(la.generate(**ids_of()), expected)
    assert la.last is not None
    assert la.last.passes[0].opens
    assert la.last.passes[0].committed[0] > 1
    assert "no such kernel" in kinds_of(model)["opening"]
    monkeypatch.undo()
    assert torch.equal(Lookahead(model, nodes=4, script=True).generate(**ids_of()), expected)


def test_a_prompt_that_is_wrong_in_itself_changes_nothing(opened: list[tuple[int, int]]) -> None:
    model = fresh()
    la = Lookahead(model, nodes=4, script=True)
    la.generate(**ids_of())
    with pytest.raises(IndexError):
        la.generate(torch.tensor([[5, 99, 7]]), max_new_tokens=4)
    assert not any(kinds_of(model).values())
    assert torch.equal(la.generate(**ids_of()), model.generate(**ids_of()))
    assert len(opened) == 2


def test_a_guess_that_overflows_is_left_out_of_an_opening(opened: list[tuple[int, int]]) -> None:
    """Its keys are infinite, which no mask stops."""
    model = fresh("llama", "float32")
    plain = model.generate(**ids_of())
    drafter = Oracle([plain[0, 9:].tolist()], 48, error=0.4, wrong=47, branch=0.6)
    Lookahead(model, nodes=12, script=True).generate(**ids_of())
    with torch.no_grad():
        assert 47 not in plain
        model.get_input_embeddings().weight[47] = float("nan")
    for _ in range(2):
        assert torch.equal(Lookahead(model, drafter=drafter, nodes=12, script=True).generate(**ids_of()), plain)
    assert (9, 1) in opened


def test_openings_stay_within_the_table_of_positions(opened: list[tuple[int, int]]) -> None:
    model = fresh("gpt2", n_positions=32)
    for length in (9, 28, 31):
        given = ids_of(length, tokens=32 - length)
        plain = model.generate(**given)
        drafter = Oracle([[*plain[0, length:].tolist(), *range(3, 40)]], 48, error=0.0)
        assert torch.equal(Lookahead(model, drafter=drafter, nodes=40, script=True).generate(**given), plain)
    assert len(opened) == 2


def test_prompts_open_once_that_is_worth_a_recording(
    monkeypatch: pytest.MonkeyPatch, opened: list[tuple[int, int]]
) -> None:
    model = fresh()
    monkeypatch.setattr("lookahead.script.WORTH", 8)
    la = Lookahead(model, nodes=4)
    for _ in range(5):
        la.generate(**ids_of() | {"max_new_tokens": 1})
    assert len(opened) == 2
    assert "prompt" not in kinds_of(model)


def test_what_an_opening_takes_teaches_the_budget_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[int] = []
    observe = Purse.observe

    def seen(self: Purse, one: Any, followed: Any) -> None:
        spent.append(one.size)
        observe(self, one, followed)

    monkeypatch.setattr(Purse, "observe", seen)
    model = fresh()
    Lookahead(model, script=True).generate(**ids_of())
    spent.clear()
    la = Lookahead(model, budget=Budget(), script=True)
    la.generate(**ids_of(length=80))
    assert la.last is not None
    first, *others = la.last.passes
    assert first.opens
    assert spent == [one.nodes for one in others]
    assert first.model_s == 0.0
    assert 0.0 < first.step_s < la.last.prefill_s


def test_rows_that_nobody_reads_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the attention of the last layer, products are of the rows whose logits are wanted, and no others."""
    products: list[list[str]] = []
    record = recording.lighten

    def watched(script: Any) -> None:
        record(script)
        products.append([one.kind() for one in script.graph.nodes()])

    monkeypatch.setattr(recording, "lighten", watched)
    model = fresh("llama", "float32")
    for _ in range(2):
        Lookahead(model, nodes=4, script=True).generate(**ids_of())
    assert kinds_of(model)["opening"] == ""
    kinds = products[0]
    assert kinds.count("aten::index_select") == 2, "what attention gives, and what it is added to"
    assert "aten::index" not in kinds
    picks = [i for i, kind in enumerate(kinds) if kind == "aten::index_select"]
    attends = [i for i, kind in enumerate(kinds) if kind == "aten::scaled_dot_product_attention"]
    assert picks[0] > attends[-1]
    behind = [kind for kind in kinds[picks[0] :] if kind in ("aten::linear", "mkldnn::_linear_pointwise")]
    assert 3 <= len(behind) <= 5, "of attention, two or three of the network, the logits"


def test_a_model_whose_rows_cannot_be_left_out_opens_even_so(
    monkeypatch: pytest.MonkeyPatch, opened: list[tuple[int, int]]
) -> None:
    def refuses(*_: Any) -> None:
        raise ValueError("rows are not picked once")

    monkeypatch.setattr(recording, "spare", refuses)
    model = fresh()
    for _ in range(2):
        assert torch.equal(Lookahead(model, nodes=4, script=True).generate(**ids_of()), model.generate(**ids_of()))
    assert kinds_of(model)["opening"] == ""
    assert len(opened) == 1


def test_wrong_rows_are_found_out(monkeypatch: pytest.MonkeyPatch, opened: list[tuple[int, int]]) -> None:
    def shifts(script: Any, place: int) -> None:
        spare(script, place)
        node = script.graph.findNode("aten::index_select")
        wanted = list(node.inputs())[2]
        other = script.graph.create("aten::flip", [wanted, script.graph.insertConstant([0])], 1)
        other.insertBefore(node)
        node.replaceInput(2, other.output())

    monkeypatch.setattr(recording, "spare", shifts)
    model = fresh()
    for _ in range(2):
        assert torch.equal(Lookahead(model, nodes=4, script=True).generate(**ids_of()), model.generate(**ids_of()))
    assert kinds_of(model)["opening"] == ""
    assert len(opened) == 1


class Mixing(nn.Module):
    """A network in which rows do not stand for themselves."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.cumsum(1) / x.shape[1])


class Inside(nn.Module):
    """A last norm that changes its input in place, and another that looks at all rows."""

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "add":
            return self.inner(x.mul_(1.5))
        return self.inner(x - x.mean(1, keepdim=True))


@pytest.mark.parametrize("way", ["mixing", "add", "mean"])
def test_models_whose_rows_depend_on_each_other_are_recorded_with_all_that_they_need(way: str) -> None:
    """Such a model is no language model; what is recorded has to compute what it computes all the same."""
    model = fresh("llama", "float32")
    if way == "mixing":
        model.model.layers[-1].mlp = Mixing(model.model.layers[-1].mlp)
    else:
        model.model.norm = Inside(model.model.norm, way)
    found: list[Any] = []
    compare = recording._compare

    def seen(written: Any, script: Any, tensors: Any) -> None:
        compare(written, script, tensors)
        found.append(written.kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "_compare", seen)
        Lookahead(model, nodes=4, script=True).generate(**ids_of(tokens=4))
    assert "opening" in found


def test_the_script_of_an_opening_knows_how_wide_logits_are() -> None:
    model = fresh()
    Lookahead(model, nodes=4, script=True).generate(**ids_of())
    made = [one for one in _scripts(model) if one.width]
    assert made
    assert {one.width for one in made} == {model.lm_head.weight.shape[0]}


def _scripts(model: Any) -> list[Script]:
    from lookahead import script

    return [one for scripts in script._OF[model].scripts.values() for one in scripts._made.values()]
