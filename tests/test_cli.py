"""Laws of the command line: exit codes, one line for bad input, and text equal to that of `model.generate()`."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import lookahead
from lookahead import Pool, budget, cli, options, show
from lookahead.cli import main
from lookahead.compare import Comparison, Row, Task, Trial, read_tasks
from lookahead.loading import DEMO, quiet
from lookahead.screen import Screen
from lookahead.stream import TextStream, decode
from lookahead.trace import Pass, Run

CONTEXT = 128
PROMPT = "def add(a, b):\n    return a + b\ndef add("
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
KEYS = {"task", "kind", "identical", "plain_s", "lookahead_s", "ratio", "tokens", "passes"}


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte; generated text is rich in broken UTF-8, which streaming must get right."""
    vocab = {text: i for i, text in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", **special)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"vocab_size": 257, "max_position_embeddings": CONTEXT, "eos_token_id": 0, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config, "pad_token_id": 0, **changes}))


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references are made on the CPU, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, laid out as the bundled one."""
    folder = tmp_path_factory.mktemp("tiny")
    with quiet():
        tiny_llama().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    tasks = [
        {"task": f"{kind} [{i}]", "kind": kind, "prompt": PROMPT + str(i), "max_new_tokens": 24}
        for kind in ("edit", "json", "continue")
        for i in range(4)
    ]
    (folder / "prompts.json").write_text(json.dumps(tasks))
    return folder


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def reference(folder: Path, prompt: str = PROMPT, seed: int | None = None, **arguments: Any) -> str:
    """The text that plain `model.generate()` writes."""
    with quiet():
        model, tokenizer = loaded(folder)
        if seed is not None:
            torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, **{"max_new_tokens": 40, **arguments}, tokenizer=tokenizer)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def line(text: str) -> str:
    """`text` as the command ends it."""
    return text if text.endswith("\n") else text + "\n"


# -- generate ---------------------------------------------------------------------------------------------------------

WAYS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--greedy", "--repetition-penalty", "1.2"], {"do_sample": False, "repetition_penalty": 1.2}),
    (["--sample", "--seed", "3"], {"do_sample": True, "seed": 3}),
    (
        ["--temperature", "0.7", "--top-k", "9", "--top-p", "0.9", "--seed", "1"],
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 1},
    ),
    (["--min-p", "0.05", "--seed", "5"], {"do_sample": True, "min_p": 0.05, "seed": 5}),
]


@pytest.mark.law
@pytest.mark.parametrize("mode", [[], ["--plain"], ["--no-stream"], ["--nodes", "0"], ["--nodes", "7"]])
@pytest.mark.parametrize(("given", "meant"), WAYS)
def test_output_is_that_of_plain_generate(
    model_dir: Path, capsys: pytest.CaptureFixture[str], mode: list[str], given: list[str], meant: dict[str, Any]
) -> None:
    code = main(["generate", "--model", str(model_dir), "--prompt", PROMPT, "--max-new-tokens", "40", *given, *mode])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out == line(reference(model_dir, **meant))


def test_another_seed_gives_another_text(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for seed in ("1", "2", "1"):
        arguments = ["generate", "--model", str(model_dir), "--prompt", PROMPT, "--sample", "--seed", seed]
        assert main([*arguments, "--max-new-tokens", "20"]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 2


@pytest.mark.parametrize("mode", [[], ["--plain"]])
def test_stop_strings_end_the_text(model_dir: Path, capsys: pytest.CaptureFixture[str], mode: list[str]) -> None:
    text = reference(model_dir)
    stops = [next(letter for letter in text[3:] if letter.isascii()), "never in there"]
    arguments = ["generate", "--model", str(model_dir), "--prompt", PROMPT, "--max-new-tokens", "40", *mode]
    assert main([*arguments, *(word for stop in stops for word in ("--stop", stop))]) == 0
    out = capsys.readouterr().out
    assert out == line(reference(model_dir, stop_strings=stops))
    assert len(out) < len(text)


def test_prompt_comes_exactly_from_file_and_standard_input(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "def f(é):\r\n\treturn\n"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    expected = line(reference(model_dir, prompt, max_new_tokens=12))
    common = ["generate", "--model", str(model_dir), "--max-new-tokens", "12"]
    assert main([*common, "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
    assert capsys.readouterr().out == expected
    for source in ([], ["--prompt-file", "-"]):
        pipe(monkeypatch, prompt.encode())
        assert main([*common, *source]) == 0
        assert capsys.readouterr().out == expected


def test_chat_uses_the_template(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    assert main(["generate", "--model", str(copy), "--prompt", "hi", "--chat", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == line(reference(copy, "<user>hi<assistant>", max_new_tokens=12))


def test_stats_count_tokens_and_passes(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--model", str(model_dir), "--prompt", PROMPT, "--max-new-tokens", "40", "--stats"]
    assert main([*common, "--nodes", "32"]) == 0
    fast = capsys.readouterr().err
    assert main([*common, "--plain"]) == 0
    plain = capsys.readouterr().err
    assert plain.startswith("40 tokens, 40 passes, 1.00 tokens per pass, ")
    assert fast.startswith("40 tokens, ")
    assert int(fast.split()[2]) < 40
    assert fast.count("\n") == 1


@pytest.mark.parametrize("mode", [[], ["--no-stream"], ["--nodes", "0"]])
def test_trace_says_what_every_pass_did(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    common = ["generate", "--model", str(model_dir), "--prompt", PROMPT, "--max-new-tokens", "40", "--stats", *mode]
    assert main([*common, "--trace", str(tmp_path / "trace.jsonl")]) == 0
    out, err = capsys.readouterr()
    assert out == line(reference(model_dir))
    trace = Run.load(tmp_path / "trace.jsonl")
    assert 1 + sum(sum(each.committed) for each in trace.passes) == trace.tokens == 40
    assert trace.forwards == int(err.split()[2])
    assert all(each.nodes >= 1 and each.step_s >= each.model_s > 0 for each in trace.passes)


def test_trace_is_refused_before_the_work(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "loaded", None)  # fails where it gets there
    common = ["generate", "--model", str(model_dir), "--prompt", PROMPT]
    said = refusal(capsys, [*common, "--trace", "no/such/folder/x"])
    assert "--trace no/such/folder/x: no such file or directory; give a file that can be written" in said
    said = refusal(capsys, [*common, "--trace", str(tmp_path / "x"), "--plain"])
    assert "--plain drafts nothing; leave out --trace, or --plain" in said
    said = refusal(capsys, [*common, "--invariant", "--plain"])
    assert "--plain drafts nothing; leave out --invariant, or --plain" in said
    said = refusal(capsys, [*common, "--invariant", "--curves", "x"])
    assert "leave out --curves, or --invariant" in said
    assert not (tmp_path / "x").exists()


def test_default_length_is_what_fits(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "x" * (CONTEXT - 5)
    assert main(["generate", "--model", str(model_dir), "--prompt", prompt, "--stats"]) == 0
    assert capsys.readouterr().err.startswith("5 tokens, ")


def test_model_settings_decide_between_sampling_and_greedy(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**config, "do_sample": True, "temperature": 0.8}))
    common = ["generate", "--model", str(copy), "--prompt", PROMPT, "--max-new-tokens", "40", "--seed", "4"]
    assert main(common) == 0
    assert capsys.readouterr().out == line(reference(copy, seed=4))
    assert main([*common, "--greedy"]) == 0
    assert capsys.readouterr().out == line(reference(copy, do_sample=False))


@pytest.mark.parametrize(("text", "out"), [("a", "a\n"), ("a\n", "a\n"), ("", "\n")])
def test_the_last_line_is_ended_once(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, out: str
) -> None:
    monkeypatch.setattr("lookahead.stream.decode", lambda *_: text)
    arguments = ["generate", "--model", str(model_dir), "--prompt", PROMPT, "--max-new-tokens", "2", "--no-stream"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("given", "meant"),
    [([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16), (["--dtype", "float64"], torch.float64)],
)
def test_dtype_is_that_of_the_model(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], meant: torch.dtype
) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(cli, "_write", lambda _, model, *rest: seen.append(model.dtype))
    assert main(["generate", "--model", str(model_dir), "--prompt", PROMPT, *given]) == 0
    assert seen == [meant]


class Pieces:
    """A tokenizer of fixed pieces that strips a leading space, as SentencePiece ones do."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        data = b"".join([b" a", b"\n", b"    b", b"\xe4", b"\xb8", b"\xad", b"", b"\xff"][token] for token in tokens)
        return data.decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("steps", [[[0], [1], [2]], [[3], [4], [5, 6]], [[0, 3], [4, 5, 1], [2, 0]], [[7], [3]], [[6]]])
def test_stream_writes_what_one_decode_gives(steps: list[list[int]]) -> None:
    written: list[str] = []
    stream = TextStream(Pieces(), written.append)
    stream.put(torch.tensor([[0, 0]]))
    for step in steps:
        stream.put(torch.tensor(step))
    stream.end()
    assert "".join(written) == Pieces().decode([token for step in steps for token in step])


def test_special_tokens_are_hidden() -> None:
    tokenizer = byte_tokenizer()
    assert decode(tokenizer, [*tokenizer.encode("a "), tokenizer.eos_token_id]) == "a "


def test_stream_does_not_wait_for_the_end_of_a_word() -> None:
    written: list[str] = []
    stream = TextStream(Pieces(), written.append)
    stream.put(torch.tensor([[0]]))
    stream.put(torch.tensor([0]))
    assert written == ["a"]


# -- bad input --------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command says; fails unless it is one line with exit code 2."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("lookahead: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--max-new-tokens", "-3"], "--max-new-tokens"),
        (["--max-new-tokens", "many"], "--max-new-tokens"),
        (["--max-new-tokens", "9999"], f"context of {CONTEXT}"),
        (["--temperature", "0"], "--greedy"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--temperature", "1e-300"], "--temperature"),
        (["--top-k", "-1"], "--top-k"),
        (["--top-k", "1.5"], "--top-k"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.01"], "--top-p"),
        (["--min-p", "-0.1"], "--min-p"),
        (["--min-p", "2"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--nodes", "-1"], "--nodes"),
        (["--nodes", "4097"], "--nodes"),
        (["--stop", ""], "--stop"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "warp"], "--device warp"),
        (["--device", "cuda:97"], "--device cuda:97"),
        (["--device", "meta"], "--device meta"),
        (["--chat"], "--chat"),
        (["--greedy", "--top-p", "0.5"], "--top-p"),
        (["--greedy", "--sample"], "--greedy"),
        (["--prompt-file", "x"], "--prompt-file"),
        (["--max-new", "3"], "--max-new"),
        (["stray"], "stray"),
    ],
)
def test_bad_options_are_refused_by_name(
    model_dir: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert says in refusal(capsys, ["generate", "--model", str(model_dir), "--prompt", PROMPT, *given])


@pytest.mark.parametrize("prompt", ["", " \n\t", "bad \udcff byte", "nul \0"])
def test_unusable_prompts_are_refused(model_dir: Path, capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    assert "--prompt" in refusal(capsys, ["generate", "--model", str(model_dir), "--prompt", prompt])


@pytest.mark.parametrize("data", [b"", b"\n", b"\x89PNG\r\n", b"a\0b"])
def test_unusable_standard_input_is_refused(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    pipe(monkeypatch, data)
    assert "standard input" in refusal(capsys, ["generate", "--model", str(model_dir)])


def test_a_terminal_is_not_waited_for(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b"typed")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "no prompt" in refusal(capsys, ["generate", "--model", str(model_dir)])


def test_unreadable_prompt_files_are_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    for name in ("missing", ".", "binary"):
        said = refusal(capsys, ["generate", "--model", str(model_dir), "--prompt-file", str(tmp_path / name)])
        assert f"--prompt-file {tmp_path / name}" in said


def test_prompt_beyond_the_context_is_refused_with_both_numbers(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, ["generate", "--model", str(model_dir), "--prompt", "x" * 300])
    assert "300" in said
    assert str(CONTEXT) in said


@pytest.mark.parametrize("name", ["./none", "/none", "~/none", "a/b/c", "a b"])
def test_names_of_no_model_are_refused(capsys: pytest.CaptureFixture[str], name: str) -> None:
    said = refusal(capsys, ["generate", "--model", name, "--prompt", PROMPT])
    assert f"--model {name}: no such directory" in said


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "--model is empty" in refusal(capsys, ["generate", "--model", name, "--prompt", PROMPT])


def test_hub_names_are_refused_offline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal(capsys, ["generate", "--model", "no-such-owner/no-such-model", "--prompt", PROMPT])
    assert "--model no-such-owner/no-such-model: no such directory, and the Hugging Face Hub cannot be reached" in said


def damage(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    match what:
        case "config.json":
            (folder / what).unlink()
        case "model.safetensors":
            (folder / what).write_bytes(b"no weights")
        case "prompt has token":
            config["vocab_size"] = 40
            (folder / "config.json").write_text(json.dumps(config))
        case "cannot load its config":
            (folder / "config.json").write_text("{")
        case "cannot load its weights":
            (folder / "model.safetensors").unlink()
        case "the weights lack":
            config["num_hidden_layers"] = 3
            (folder / "config.json").write_text(json.dumps(config))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
        case "not served":
            (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
        case "is an encoder-decoder":
            (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


@pytest.mark.parametrize(
    "what",
    [
        "config.json",
        "prompt has token",
        "cannot load its config",
        "cannot load its weights",
        "the weights lack",
        "no tokenizer",
        "not served",
        "is an encoder-decoder",
    ],
)
def test_damaged_models_are_refused(copy: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    damage(copy, what)
    assert what in refusal(capsys, ["generate", "--model", str(copy), "--prompt", PROMPT])


def test_unserved_settings_name_the_way_out(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**config, "num_beams": 2}))
    arguments = ["generate", "--model", str(copy), "--prompt", PROMPT, "--max-new-tokens", "4"]
    assert "--plain" in refusal(capsys, arguments)
    assert main([*arguments, "--plain", "--no-stream"]) == 0


# -- demo -------------------------------------------------------------------------------------------------------------


def test_demo_compares_three_prompts_of_each_kind(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    code = main(
        ["demo", "--model", str(model_dir), "--json", str(file), "--rounds", "2", "--nodes", "8", "--threads", "1"]
    )
    out, err = capsys.readouterr()
    rows = json.loads(file.read_text())
    assert (code, err) == (0, "")
    assert [row["kind"] for row in rows] == ["edit"] * 3 + ["json"] * 3 + ["continue"] * 3
    for row in rows:
        assert row.keys() >= KEYS
        assert row["identical"] is True
        assert row["rounds"] == 2
        assert row["tokens"] == 24
        assert 1 <= row["passes"] <= row["tokens"]
        assert row["plain_s"] > 0 < row["lookahead_s"]
        assert row["task"] in out
    assert "median" in out
    assert "All 9 outputs are identical" in out
    assert "\x1b" not in out


def test_rows_may_replace_a_file_but_not_a_bad_run(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "prompts.json").unlink()
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("kept")
    for file in (old, new):
        refusal(capsys, ["demo", "--model", str(copy), "--json", str(file)])
    assert old.read_text() == "kept"
    assert not new.exists()


def test_demo_stops_rounds_when_time_is_up(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DEMO_SECONDS", 0)
    assert main(["demo", "--model", str(model_dir)]) == 0
    assert "medians of 1 round (of 3: the time was up)" in capsys.readouterr().out


def test_demo_tells_a_difference(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = Comparison.run_plain

    def other(self: Comparison, index: int, limit: int) -> tuple[torch.Tensor, float]:
        ids, seconds = plain(self, index, limit)
        if index == 1:
            ids[0, -1] += 1
        return ids, seconds

    monkeypatch.setattr(Comparison, "run_plain", other)
    file = tmp_path / "rows.json"
    assert main(["demo", "--model", str(model_dir), "--rounds", "1", "--json", str(file)]) == 1
    assert "DIFFERENT from model.generate(): edit [1]" in capsys.readouterr().out
    assert [row["identical"] for row in json.loads(file.read_text())] == [True, False] + [True] * 7


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
        (["--threads", "100000"], "--threads"),
        (["--nodes", "-2"], "--nodes"),
        (["--json", "."], "--json ."),
        (["--json", "no/such/rows.json"], "--json no/such/rows.json"),
        (["--model", "./none"], "--model ./none"),
    ],
)
def test_demo_refuses_bad_options(capsys: pytest.CaptureFixture[str], given: list[str], says: str) -> None:
    assert says in refusal(capsys, ["demo", *given])


@pytest.mark.parametrize("text", [None, "{", "[]", "[1]", '[{"task": "a", "kind": "b", "prompt": ""}]'])
def test_demo_refuses_bad_prompts(copy: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    (copy / "prompts.json").unlink() if text is None else (copy / "prompts.json").write_text(text)
    assert "prompts.json" in refusal(capsys, ["demo", "--model", str(copy)])


def test_demo_says_when_the_bundled_model_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lookahead.loading.DEMO", tmp_path)
    assert "bundled model is missing" in refusal(capsys, ["demo"])


def example(text: str, committed: tuple[int, ...]) -> Row:
    ids = byte_tokenizer().encode(text)
    assert sum(committed) + 1 == len(ids)
    run = Run(len(ids), tuple(Pass(8, (count,), 0.0, 0.0, 0.0) for count in committed))
    return Row(Task("a long name of a task", "edit", "p", 9), (Trial(2.0, 1.0, True, ids, run),))


@pytest.mark.parametrize("text", ["abcdefgh", "a[b]:x:\nh", "aé中h中"[:4] + "z"])
def test_marked_output_keeps_the_text(text: str) -> None:
    size = len(byte_tokenizer().encode(text))
    row = example(text, (3, 1, size - 5))
    assert show.coloured(byte_tokenizer(), row, colour=True).plain == text
    assert show.coloured(byte_tokenizer(), row, colour=False).plain.replace(show.MARK, "") == text


def test_each_pass_has_its_mark() -> None:
    row = example("abcdefgh", (2, 1, 4))
    assert show.coloured(byte_tokenizer(), row, colour=False).plain == "abc|defgh|"
    spans = show.coloured(byte_tokenizer(), row, colour=True).spans
    assert [(span.start, span.end, span.style) for span in spans] == [(1, 3, show.COLOURS[0]), (4, 8, show.COLOURS[1])]


def test_a_row_counts_the_prefill_and_every_round() -> None:
    good = example("abcdefgh", (2, 1, 4))
    assert (good.tokens, good.passes, good.identical) == (8, 4, True)
    bad = replace(good.trials[0], identical=False, plain_s=8.0)
    row = replace(good, trials=(*good.trials, bad, good.trials[0]))
    assert (row.identical, row.plain_s, row.as_dict()["rounds"]) == (False, 2.0, 3)


@pytest.mark.parametrize("width", [40, 53, 54, 79, 80, 120])
def test_table_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    screen = Screen()
    screen.print(show.table([example("abcdefgh", (3, 1, 3))] * 3, screen.width))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert all("2.00x" in shown for shown in lines[-4:])
    assert all("yes" in shown for shown in lines[-4:-1])


def test_tasks_are_the_first_of_each_kind(model_dir: Path) -> None:
    assert [task.name for task in read_tasks(model_dir, each=1)] == ["edit [0]", "json [0]", "continue [0]"]


@pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the bundled model is not there yet")
def test_bundled_model_is_exact_and_saves_passes() -> None:
    from lookahead.loading import Checkpoint

    with quiet():
        checkpoint = Checkpoint("demo")
        tasks = [replace(task, max_new_tokens=min(task.max_new_tokens, 24)) for task in read_tasks(DEMO, each=1)]
        model = checkpoint.model(checkpoint.config(), dtype="float32")
        comparison = Comparison(model, checkpoint.tokenizer(), tasks, nodes=32)
        comparison.round()
    assert [row.task.kind for row in comparison.rows] == [
        "edit",
        "json",
        "json + schema",
        "continue",
        "cold pool",
        "warm pool",
    ]
    assert all(row.identical for row in comparison.rows)
    assert comparison.rows[0].passes < comparison.rows[0].tokens


# -- the command itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["generate"]])
def test_nothing_asked_shows_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    assert "usage: lookahead" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["generate", "--help"], ["explain", "--help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert "usage: lookahead" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lookahead {lookahead.__version__}\n"


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'fly'" in refusal(capsys, ["fly"])


def test_option_limits_are_those_of_the_engine() -> None:
    assert options.MAX_NODES == budget.MAX_NODES


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (OSError(28, "full"), 2)]
)
def test_interruptions_end_without_a_traceback(
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(TextStream, "put", fail)
    assert main(["generate", "--model", str(model_dir), "--prompt", PROMPT, "--max-new-tokens", "4"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_transformers_speaks_as_before_afterwards(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert main(["generate", "--model", str(model_dir), "--prompt", PROMPT, "--max-new-tokens", "2"]) == 0
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_help_loads_neither_torch_nor_rich() -> None:
    heavy = "{'torch', 'rich', 'numba', 'numpy'}"
    code = f"import sys; from lookahead.cli import main; main(['--help']); print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lookahead", "--help"], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: lookahead")


def test_generate_drafts_from_a_pool_and_adds_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, command = tmp_path / "pool", ["generate", "--model", "demo", "--prompt", PROMPT, "--max-new-tokens", "24"]
    command += ["--nodes", "32"]
    passes, texts = [], []
    for more in ([], ["--pool", str(pool)], ["--pool", str(pool)], ["--pool", str(pool), "--no-remember"]):
        assert main([*command, "--stats", *more]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        passes.append(int(re.search(r"(\d+) passes", err)[1]))  # type: ignore[index]
    assert len(set(texts)) == 1
    assert passes[2] <= passes[1]
    with Pool.open(pool) as kept:
        assert kept.documents == 1
    assert main([*command[:-2], "--plain", "--pool", str(pool)]) == 2
    assert "--plain drafts nothing" in capsys.readouterr().err


def test_a_terminal_sees_how_many_tokens_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["generate", "--model", "demo", "--prompt", "def add(a, b):", "--max-new-tokens", "8", "--no-stream"]
    assert main(argv) == 0
    piped = capsys.readouterr()
    assert piped.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(argv) == 0
    seen = capsys.readouterr()
    assert seen.out == piped.out
    assert "[####################] 100% 8 tokens of at most 8" in seen.err
    assert seen.err.split("\r")[-1] == ""  # the line is cleared
