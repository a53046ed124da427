"""Laws of `lookahead json`, `lookahead grammars` and `--grammar`: plain's text, one line for bad input, exit codes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EOS, JSON_VOCAB, PAD, json_tokenizer, tiny
from transformers import AutoModelForCausalLM, GenerationConfig

from lookahead.cli import main
from lookahead.grammar import library
from lookahead.grammar.grammar import Grammar
from lookahead.loading import DEMO, quiet
from lookahead.trace import Run

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["the é", "abc"]},
    },
    "required": ["id", "name", "kind"],
    "additionalProperties": False,
}
PROMPT = "the name "
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references are made on the CPU, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    with quiet():
        tiny("llama", "sdpa", "float64", vocab_size=JSON_VOCAB).save_pretrained(folder)
        json_tokenizer().save_pretrained(folder)
        GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture
def schema_file(tmp_path: Path) -> str:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA, ensure_ascii=False), encoding="utf-8")
    return str(tmp_path / "schema.json")


def reference(folder: Path, grammar: Grammar, prompt: str = PROMPT, seed: int | None = None, **arguments: Any) -> str:
    """The text that plain constrained `generate()` writes."""
    tokenizer = json_tokenizer()
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder)
        inputs = tokenizer(prompt, return_tensors="pt")
        if seed is not None:
            torch.manual_seed(seed)
        processor = grammar.processor(tokenizer)
        ids = model.generate(**inputs, **{"max_new_tokens": 200, **arguments}, logits_processor=[processor])
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def written(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command says; fails unless it is one line with exit code 2."""
    out, err = written(capsys, arguments, 2)
    assert out == ""
    assert err.startswith("lookahead: ")
    assert err.count("\n") == 1
    return err


# -- json -------------------------------------------------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.parametrize("mode", [[], ["--plain"], ["--nodes", "0"], ["--nodes", "5"]])
@pytest.mark.parametrize("sampled", [False, True])
def test_text_is_that_of_plain_constrained_generate(
    model_dir: Path, schema_file: str, capsys: pytest.CaptureFixture[str], mode: list[str], sampled: bool
) -> None:
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file, "--prompt", PROMPT, *mode]
    if sampled:
        arguments += ["--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]
    out, err = written(capsys, arguments)
    assert out == reference(model_dir, Grammar.json_schema(SCHEMA), **(SAMPLED if sampled else {})) + "\n"
    assert err == ""
    assert set(json.loads(out)) == {"id", "name", "kind"}


@pytest.mark.parametrize("whitespace", ["fixed", "compact", "indented"])
def test_white_space_is_as_asked(
    model_dir: Path, schema_file: str, capsys: pytest.CaptureFixture[str], whitespace: Any
) -> None:
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file, "--prompt", PROMPT]
    out, _ = written(capsys, [*arguments, "--whitespace", whitespace])
    assert out == reference(model_dir, Grammar.json_schema(SCHEMA, whitespace=whitespace)) + "\n"


def test_a_terminal_gets_it_indented(
    model_dir: Path, schema_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file, "--prompt", PROMPT]
    text, _ = written(capsys, arguments)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    pretty, _ = written(capsys, arguments)
    assert pretty == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def test_prompt_comes_from_standard_input_and_file(
    model_dir: Path, schema_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "prompt").write_text(PROMPT)
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file]
    expected = reference(model_dir, Grammar.json_schema(SCHEMA)) + "\n"
    assert written(capsys, [*arguments, "--prompt-file", str(tmp_path / "prompt")])[0] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert written(capsys, arguments)[0] == expected


def test_chat_uses_the_template(
    model_dir: Path, schema_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "chat"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    arguments = ["json", "--model", str(folder), "--schema", schema_file, "--prompt", "hi", "--chat"]
    assert written(capsys, arguments)[0] == reference(model_dir, Grammar.json_schema(SCHEMA), "[user]hi!") + "\n"


@pytest.mark.parametrize("mode", [[], ["--plain"]])
def test_what_is_there_of_an_early_end_is_written(
    model_dir: Path, schema_file: str, capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file, "--prompt", PROMPT, *mode]
    out, err = written(capsys, [*arguments, "--max-new-tokens", "9", "--stats"], 1)
    assert out == reference(model_dir, Grammar.json_schema(SCHEMA), max_new_tokens=9) + "\n"
    first, second = err.splitlines()
    assert first.startswith("lookahead: the text ended early, after ")
    assert "--max-new-tokens" in first
    assert second.startswith("9 tokens, ")


def test_memory_changes_passes_and_no_text(
    model_dir: Path, schema_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file, "--prompt", PROMPT, "--stats"]
    arguments += ["--nodes", "32"]
    runs = [written(capsys, [*arguments, "--memory", str(tmp_path / "memory")]) for _ in range(3)]
    assert {out for out, _ in runs} == {written(capsys, arguments)[0]}
    passes = [int(err.split()[2]) for _, err in runs]
    assert passes[2] < passes[0]
    assert len(list((tmp_path / "memory").iterdir())) == 1


def test_trace_says_what_every_pass_did(
    model_dir: Path, schema_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file, "--prompt", PROMPT]
    _, err = written(capsys, [*arguments, "--trace", str(tmp_path / "trace.jsonl"), "--stats"])
    trace = Run.load(tmp_path / "trace.jsonl")
    assert 1 + sum(sum(each.committed) for each in trace.passes) == trace.tokens == int(err.split()[0])
    assert trace.forwards == int(err.split()[2])
    assert all(each.nodes >= 1 and each.model_s > 0 for each in trace.passes)


def test_nodes_bound_the_drafts(model_dir: Path, schema_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["json", "--model", str(model_dir), "--schema", schema_file, "--prompt", PROMPT, "--stats"]
    tokens, _, passes = written(capsys, [*arguments, "--nodes", "0"])[1].split()[:3]
    assert tokens == passes
    assert int(written(capsys, [*arguments, "--nodes", "32"])[1].split()[2]) < int(passes)


def test_lenient_says_what_it_leaves_out(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.json").write_text('{"enum": ["ab"], "not": {"const": 3}}')
    arguments = ["json", "--model", str(model_dir), "--schema", str(tmp_path / "odd.json"), "--prompt", PROMPT]
    said = refusal(capsys, arguments)
    assert "not" in said
    assert "--lenient" in said
    assert written(capsys, [*arguments, "--lenient"]) == ('"ab"\n', "lookahead: left out of the schema: not\n")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--schema", "missing.json"], "--schema missing.json: no such file"),
        (["--schema", str(Path(__file__).parent)], "--schema"),
        (["--whitespace", "none"], "--whitespace"),
        (["--max-new-tokens", "9999"], "context of 1024"),
        (["--chat"], "--chat"),
        (["--plain", "--memory", "x"], "--memory"),
        (["--plain", "--trace", "x"], "--trace"),
        (["--trace", "no/such/folder/x"], "--trace no/such/folder/x"),
        (["--greedy", "--top-k", "3"], "--top-k"),
        (["--memory", __file__], "memory"),
        (["--prompt-file", "x"], "--prompt"),
        (["--stop", "x"], "--stop"),
    ],
)
def test_bad_options_are_refused_by_name(
    model_dir: Path, schema_file: str, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    schema = [] if "--schema" in given else ["--schema", schema_file]
    assert says in refusal(capsys, ["json", "--model", str(model_dir), "--prompt", PROMPT, *schema, *given])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"type": "nothing"}', b"false", b"\xff\xfe", b'{"$ref": "#/no"}']
)
def test_files_that_are_no_schema_are_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    arguments = ["json", "--model", str(model_dir), "--schema", str(tmp_path / "bad.json"), "--prompt", PROMPT]
    assert f"--schema {tmp_path / 'bad.json'}: " in refusal(capsys, arguments)


def test_nothing_asked_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = written(capsys, ["json"], 2)
    assert "--schema" in out
    assert "--schema" in refusal(capsys, ["json", "--prompt", "x"])


def test_the_bundled_model_fills_a_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = next(t for t in json.loads((DEMO / "prompts.json").read_text()) if t["task"] == "json-1")
    (tmp_path / "schema.json").write_text(task["prompt"].split("<schema>\n")[1].split("\n</schema>")[0])
    (tmp_path / "prompt").write_text(task["prompt"])
    arguments = ["json", "--schema", str(tmp_path / "schema.json"), "--prompt-file", str(tmp_path / "prompt")]
    out, _ = written(capsys, arguments)
    assert json.loads(out) == json.loads(task["expected"])


# -- grammars ---------------------------------------------------------------------------------------------------------


def test_grammars_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = written(capsys, ["grammars"])[0].splitlines()
    assert [line.split()[0] for line in lines] == library.names()
    rows = json.loads(written(capsys, ["grammars", "--json"])[0])
    assert [row["name"] for row in rows] == library.names()
    assert all(set(row) == {"name", "kind", "description", "text"} for row in rows)


def test_a_grammar_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    for name in library.names():
        entry = library.read(name)
        assert written(capsys, ["grammars", name])[0] == entry.text.removesuffix("\n") + "\n"
    assert json.loads(written(capsys, ["grammars", "uuid", "--json"])[0])["text"] == library.read("uuid").text
    assert "uuid" in refusal(capsys, ["grammars", "uui"])


# -- generate --grammar -----------------------------------------------------------------------------------------------

FILES = {
    "digits.lark": 'start: "[" /[0-9]{1,3}/ "]"\n',
    "digits.gbnf": 'root ::= "[" [0-9] [0-9]? "]"\n',
    "digits.regex": "# some digits\n[0-9]{2}\n(ab|the){2}\n",
}
MEANT = {
    "digits.lark": Grammar.lark(FILES["digits.lark"]),
    "digits.gbnf": Grammar.gbnf(FILES["digits.gbnf"]),
    "digits.regex": Grammar.regex("[0-9]{2}(ab|the){2}"),
}


@pytest.mark.law
@pytest.mark.parametrize("mode", [[], ["--plain"], ["--no-stream"], ["--seed", "5", "--sample"]])
@pytest.mark.parametrize("name", [*FILES, "ipv4"])
def test_generate_keeps_to_a_grammar(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, mode: list[str]
) -> None:
    for file, content in FILES.items():
        (tmp_path / file).write_text(content)
    given = str(tmp_path / name) if name in FILES else name
    grammar = MEANT.get(name) or Grammar.named(name)
    sampling = {"do_sample": True, "seed": 5} if "--sample" in mode else {}
    arguments = ["generate", "--model", str(model_dir), "--prompt", PROMPT, "--grammar", given, *mode]
    out, err = written(capsys, arguments)
    assert (out, err) == (reference(model_dir, grammar, **sampling) + "\n", "")
    assert grammar.accepts(out.removesuffix("\n"))


def test_grammars_that_are_none_are_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.lark").write_text("start: (")
    (tmp_path / "bad.regex").write_text("(")
    (tmp_path / "bad.gbnf").write_text("root :=")
    for name in ("nothing", "missing.lark", *(str(tmp_path / f"bad.{kind}") for kind in ("lark", "regex", "gbnf"))):
        arguments = ["generate", "--model", str(model_dir), "--prompt", PROMPT, "--grammar", name]
        assert f"--grammar {name}: " in refusal(capsys, arguments)
