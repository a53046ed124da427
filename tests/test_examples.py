"""The examples run as they stand, with the bundled model."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, dynamic_module_utils

import lookahead

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "extract_invoice.py": (
        "Invoice(order_id='RK-2417', customer='Nora Fischer', items=['lamp', 'kettle', 'mirror'], total=318.45",
        "{'order_id': 'RK-2417', 'customer': 'Nora '}\n",
    ),
    "tool_calls.py": ("18 degrees in Oslo on 2024-05-03", "a seat from Porto to Kyoto at 06:15"),
    "sql_from_question.py": ("[('Mei', 977.15), ('Nora', 318.45), ('Hugo', 64.2)]", "('Hugo', 105.2)]"),
    "python_function.py": ("return amount / len(values)\n", "mean([1, 2, 6]) = 3.0"),
    "own_drafter.py": ("the same as plain generate(): True",),
}


@pytest.mark.parametrize("name", SAYS)
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *(["--call"] if name == "python_function.py" else [])])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    for expected in SAYS[name]:
        assert expected in said
    assert said.count(" tokens a pass") >= 1


def test_json_extraction_prints_objects(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "json_extraction.py"), run_name="__main__")
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" (")[0][:1] for line in lines] == ["{", "{"]


def test_a_directory_brings_our_generate_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `transformers serve --trust-remote-code` loads it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(lookahead.demo_path(), tmp_path / "served")
    shutil.copytree(EXAMPLES / "custom_generate", tmp_path / "served" / "custom_generate")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served")
    plain, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "served", trust_remote_code=trusted)
        for trusted in (False, True)
    )
    inputs = tokenizer("import os\nimport re\n", return_tensors="pt")
    texts, streamed = [], []
    for model in (plain, ours):
        streamer = TextIteratorStreamer(tokenizer)
        texts.append(model.generate(**inputs, streamer=streamer, max_new_tokens=24).tolist())
        streamed.append("".join(streamer))
    assert texts[0] == texts[1]
    assert streamed[0] == streamed[1]
    kept = ours.generate.func.__globals__["KEPT"].lookahead
    assert kept.last is not None
    assert kept.last.tokens_per_pass > 2
