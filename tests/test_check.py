"""`lookahead check`: exact models pass, planted faults and faulty models do not, and bad input is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from models import BOS, EOS, PAD, VOCAB, tiny, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lookahead import support
from lookahead.cache import TreeCache
from lookahead.check import ALONE, TOGETHER, Check, Finding
from lookahead.check_command import verdict
from lookahead.check_prompts import BUILT_IN, Prompt, read_prompts
from lookahead.cli import main
from lookahead.draft import Draft
from lookahead.errors import GrammarError, InvalidInput
from lookahead.loading import DEMO, quiet
from lookahead.sampling import NoiseLedger, Sampler
from lookahead.static.shapes import Counts
from lookahead.target import Target

PROMPTS = [
    "<code>\ndef add(items):\n    total = 0\n    for item in items:\n        total += item\n    return total\n",
    "<facts>\nThe order of Ada has 3 lamps.\n</facts>\n<json>\n",
]


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "two.json"
    file.write_text(json.dumps(PROMPTS))
    return str(file)


@pytest.fixture(scope="module")
def prompt(prompts: str) -> str:
    file = Path(prompts).with_name("one.txt")
    file.write_text(PROMPTS[0].replace("\n\n", "\n"))
    return str(file)


def check_demo(prompts: str, *options: str) -> int:
    return main(["check", "demo", "--quick", "--max-new-tokens", "12", "--prompts", prompts, *options])


# Models that are exact


def test_demo_is_exact(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert check_demo(prompts, "--json", str(report)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(report.read_text())
    quick = sum(kind.quick for kind in ALONE)
    assert out.splitlines()[-1] == f"Exact: all {len(found['calls'])} calls are equal to plain model.generate()."
    assert len(found["calls"]) == 2 * (quick + 5) + sum(kind.quick for kind in TOGETHER) + 1
    assert {call["verdict"] for call in found["calls"]} == {"equal"}
    assert (found["verdict"], found["dtype"], found["device"]) == ("equal", "float32", "cpu")
    assert [speed["prompt"] for speed in found["speed"]] == ["prompt 1", "prompt 2"]
    assert all(speed["ratio"] > 0 and 1 <= speed["tokens_per_pass"] <= 13 for speed in found["speed"])


def test_demo_is_exact_in_low_precision(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_demo(prompt, "--dtype", "bfloat16") == 0
    assert "demo, bfloat16, cpu" in capsys.readouterr().out


def test_demo_is_invariant(prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert check_demo(prompt, "--dtype", "bfloat16", "--invariant", "--json", str(report)) == 0
    out, found = capsys.readouterr().out, json.loads(report.read_text())
    assert (
        out.splitlines()[-1]
        == f"Invariant: all {len(found['calls'])} calls are equal with drafts and with none, bit by bit."
    )
    assert "no drafts" in out
    assert found["invariant"] is True


def test_bits_that_drafts_move_are_found(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where passes have the rows that their nodes need, logits differ in the last bits."""
    with mock.patch("lookahead.engine.Counts", return_value=Counts()):
        assert check_demo(prompt, "--invariant") == 1
    assert "DIFFERENT: drafts move bits in" in capsys.readouterr().out


def test_models_that_cannot_be_invariant_are_refused() -> None:
    prompts = [Prompt("one", "abc abc")]
    with pytest.raises(InvalidInput, match="invariant=True does not serve Mixtral"):
        Check(tiny("mixtral"), tokenizer(), prompts, limit=4, invariant=True).run()


def test_a_bundled_prompt_file_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [prompt.name for prompt in read_prompts(None, DEMO)]
    assert 3 < len(names) <= 8
    assert {name.split("-")[0] for name in names} >= {"edit", "json", "continue"}
    assert read_prompts(None, DEMO / "missing") == list(BUILT_IN)


def checked(model: Any, texts: tuple[str, ...] = ("abcabcab", "the cat in the hat"), **options: Any) -> Check:
    named = [Prompt(f"prompt {i}", text.replace(" ", "")) for i, text in enumerate(texts)]
    with quiet():
        check = Check(model, tokenizer(), named, **{"limit": 16} | options)
        check.run()
    return check


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_all_kinds_run_on_other_models(family: str) -> None:
    check = checked(tiny(family, dtype="float32"))
    assert check.verdict == "equal", [str(one) for one in check.findings if one.verdict != "equal"]
    assert {one.kind for one in check.findings} >= {kind.name for kind in (*ALONE, *TOGETHER)} | {
        "stop strings",
        "early end",
        "sampled, early end",
    }
    assert all("JSON grammar: not compared" in line for line in check.skipped)  # its tokenizer has no brackets


def test_what_cannot_be_tried_is_said() -> None:
    with mock.patch("lookahead.check.Grammar.processor", side_effect=GrammarError("bytes are missing")):
        check = checked(tiny("llama", dtype="float32"), ("abc",), quick=True)
    assert check.skipped == ["a JSON grammar was not tried: bytes are missing"]
    assert {one.prompt for one in check.findings} == {"prompt 0", "prompt 0 + half of it"}


# Planted faults


def siblings_visible() -> Any:
    return mock.patch.object(Draft, "ancestors", lambda draft: np.tril(np.ones((len(draft), len(draft)), np.bool_)))


def positions_shifted() -> Any:
    forward = Target.forward

    def planted(self: Any, *args: Any) -> Any:
        model = self._model

        class Shifted:
            def __getattr__(self, name: str) -> Any:
                return getattr(model, name)

            def __call__(self, **inputs: Any) -> Any:
                inputs["position_ids"][:, 1:] += 1
                return model(**inputs)

        with mock.patch.object(self, "_model", Shifted()):
            return forward(self, *args)

    return mock.patch.object(Target, "forward", planted)


def wrong_row_kept() -> Any:
    keep = TreeCache.keep

    def planted(self: Any, paths: Any) -> None:
        keep(self, [[*path[:-1], max(path[-1] - 1, 0)] if path else path for path in paths])

    return mock.patch.object(TreeCache, "keep", planted)


def one_draw_too_many() -> Any:
    draw = Sampler._draw

    def planted(self: Any, *args: Any) -> Any:
        tokens = draw(self, *args)
        torch.rand(1)
        return tokens

    return mock.patch.object(Sampler, "_draw", planted)


def seldom_second_best() -> Any:
    """Greedy decoding takes the second best token of every 5th pass."""
    load, count = Sampler.load, iter(range(10**9))

    def planted(self: Any, logits: Any, top: int) -> Any:
        if next(count) % 5 == 4:
            logits = logits.clone()
            logits.scatter_(-1, logits.argmax(-1, keepdim=True), -torch.inf)
        return load(self, logits, top)

    return mock.patch.object(Sampler, "load", planted)


def noise_not_rewound() -> Any:
    return mock.patch.object(NoiseLedger, "rewind", return_value=None)


FAULTS: dict[str, Callable[[], Any]] = {
    plant.__name__: plant
    for plant in (
        siblings_visible,
        positions_shifted,
        wrong_row_kept,
        one_draw_too_many,
        noise_not_rewound,
        seldom_second_best,
    )
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FAULTS[name]():
        assert check_demo(prompt) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("DIFFERENT: ")
    assert "differs" in out


@pytest.mark.parametrize("name", ["siblings_visible"])
def test_low_precision_hides_no_fault(name: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FAULTS[name]():
        assert check_demo(prompt, "--dtype", "bfloat16") == 1
    assert "DIFFERENT" in capsys.readouterr().out


# Models that are at fault


class AtFaultConfig(LlamaConfig):
    model_type = "at_fault"

    def __init__(self, fault: float = 0.0, **options: Any) -> None:
        self.fault = fault
        super().__init__(**options)


class AtFault(LlamaForCausalLM):
    """A model whose logits depend on how many tokens a pass has."""

    config_class = AtFaultConfig

    def forward(self, input_ids=None, past_key_values=None, position_ids=None, **inputs):  # type: ignore[no-untyped-def]
        several = input_ids.shape[1] > 1 and past_key_values is not None and past_key_values.get_seq_length() > 0
        outputs = super().forward(input_ids, past_key_values=past_key_values, position_ids=position_ids, **inputs)
        if several:
            outputs.logits = outputs.logits + self.config.fault * torch.linspace(-1, 1, VOCAB).sin()
        return outputs


@pytest.fixture
def at_fault(tmp_path: Path) -> Callable[[float], str]:
    """Save models of another size of fault."""
    AutoConfig.register("at_fault", AtFaultConfig, exist_ok=True)
    AutoModelForCausalLM.register(AtFaultConfig, AtFault, exist_ok=True)

    def saved(fault: float) -> str:
        options = {"num_key_value_heads": 2, "intermediate_size": 48, "hidden_size": 32, "num_hidden_layers": 2}
        tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(0)
            config = AtFaultConfig(fault=fault, num_attention_heads=4, initializer_range=0.3, **options, **tokens)
            AtFault(config).save_pretrained(tmp_path)
            tokenizer().save_pretrained(tmp_path)
        (tmp_path / "prompts.json").write_text('["abcabcabc", "thedog"]')
        return str(tmp_path)

    return saved


def test_exact_model_of_its_own_kind_passes(at_fault: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", at_fault(0.0), "--quick"]) == 0
    assert "Exact" in capsys.readouterr().out


def test_model_that_fails_its_trial_is_refused(at_fault: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", directory := at_fault(0.5), "--quick"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"lookahead: {directory}: AtFault cannot be served: passes over several tokens differ")
    assert err.count("\n") == 1


def test_fault_that_its_trial_lets_pass_is_found(at_fault: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = at_fault(0.004)
    model = AtFault.from_pretrained(directory)
    found = support.supports(model)
    assert found.kind == "tree", found.reason
    assert main(["check", directory, "--quick"]) == 1
    out = capsys.readouterr().out
    assert "logits of column" in out
    assert "DIFFERENT" in out


# Findings


def test_verdicts_are_one_line() -> None:
    check = mock.Mock(invariant=False, findings=[Finding("a", "greedy", "equal"), Finding("b", "greedy", "tie")])
    assert verdict(check) == "Exact: 1 of 2 calls are equal to plain model.generate(), 1 but for numeric ties."
    check.findings.append(Finding("c", "greedy", "differs"))
    assert verdict(check).startswith("DIFFERENT: 1 of 3 calls")


def test_a_finding_says_where_and_how_near() -> None:
    found = Finding("a", "greedy", "tie", 0, 3, " x", " y", 0.01, 0.02, 0.5)
    assert str(found) == (
        "a, greedy: tie in row 0, token 3: plain ' x', ours ' y'; plain's is 0.01 ahead, its two best are 0.02 apart; "
        "rounding here: 0.5"
    )


# Prompts and bad input


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": "two\\n", "task": "second"}\n', ["one", "two\n"]),
        ("a.ndjson", '"one"\n', ["one"]),
        ("a.json", '["one", {"prompt": "two", "name": "second"}]', ["one", "two"]),
        ("a.txt", "one\nand more\n\n \n\n  two\n", ["one\nand more", "  two"]),
        ("a", "\ufeffone\r\nmore\r\n\r\ntwo", ["one\nmore", "two"]),
    ],
)
def test_prompts_are_read(name: str, text: str, expected: list[str], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode())
    found = read_prompts(str(file), tmp_path)
    assert [prompt.text for prompt in found] == expected
    assert found[0].name == "prompt 1"
    assert found[-1].name in ("second", f"prompt {len(expected)}")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"one", r"not read from \.csv files; give \.jsonl"),
        ("a.jsonl", b'{"prompt": "one"}\n{"text": "two"}', r"line 2: no prompt; give a string, or an object"),
        ("a.jsonl", b"one", r"line 1: not JSON .*; give \.jsonl"),
        ("a.json", b'{"prompt": "one"}', r"holds no list; give a JSON list"),
        ("a.json", b'["one", " "]', r"entry 2: no prompt"),
        ("a.json", b"[]", r"holds no prompts"),
        ("a.txt", b" \n", r"holds no prompts"),
        ("a.txt", b"a\0b", r"binary data"),
        ("a.txt", b"\xff\xfe", r"not UTF-8"),
    ],
)
def test_bad_prompts_are_named(
    name: str, data: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    assert main(["check", "demo", "--prompts", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lookahead: --prompts {file}")
    assert err.count("\n") == 1
    with pytest.raises(InvalidInput, match=said):
        read_prompts(str(file), tmp_path)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["no/such/model"], "lookahead: no/such/model: "),
        (["demo", "--prompts", "missing.txt"], "lookahead: --prompts missing.txt: no such file"),
        (["demo", "--json", "no/such/dir.json"], "lookahead: --json no/such/dir.json: "),
        (["demo", "--max-new-tokens", "5000"], "lookahead: edit-1: --max-new-tokens 5000: "),
        (["demo", "--device", "nowhere"], "lookahead: --device nowhere: "),
    ],
)
def test_bad_input_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said), err
    assert err.count("\n") == 1


def test_long_prompts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "long.txt"
    file.write_text("short\n\n" + "word " * 2000)
    assert main(["check", "demo", "--prompts", str(file)]) == 2
    assert "prompt 2: the prompt has" in capsys.readouterr().err
