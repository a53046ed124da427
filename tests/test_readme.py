"""The README's first program and the examples run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_first_program_prints_a_validated_object(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    printed = "Book(title='The Silver Harbor', author='Omar Haddad', pages=412)"
    assert capsys.readouterr().out.strip() == printed


def test_own_drafter_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_drafter.py"), run_name="__main__")
    assert "the same as plain generate(): True" in capsys.readouterr().out


def test_json_extraction_prints_objects(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "json_extraction.py"), run_name="__main__")
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" (")[0][:1] for line in lines] == ["{", "{"]
