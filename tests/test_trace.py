"""Laws of a trace's file: it reads back as it was; whatever else is there is refused by file and line."""

from __future__ import annotations

import json
import math
import tempfile
from array import array
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import runs

from lookahead.errors import InvalidInput
from lookahead.trace import Pass, Run, Share
from lookahead.tracefile import KINDS, VERSION
from lookahead.trees import Tree
from lookahead.wording import Wording

TREE = Tree(1, 4, (7, 8, 9, 2, 3), (-1, 0, 1, 0, 1), (1.0, 0.5, 0.25, 0.1, 0.0), (0, 1, 1, 5, 3), (3,), (0, 1))
EXAMPLE = Run(
    6,
    (
        Pass(5, (3, 1), 3.5, "pays", 0.02, 1e-5, *[0.001] * 6, 0.01, {"prompt": Share(4, 2, 2e-4)}, (TREE,)),
        Pass(1, (1, 1)),
    ),
    0.25,
    (array("i", [5, 6]), array("i")),
    (array("i", [7, 8, 9, 1]), array("i", [7])),
    Wording(("a b", ""), (("c", " d", "", "é"), ("c",)), {7: "c", 8: " d", 9: "<0xc3>", 1: "<0xa9>"}),
)


def again(run: Run) -> Run:
    """The run, written and read."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.jsonl")
        run.save(file)
        return Run.load(str(file))


def same(one: Any, other: Any) -> bool:
    """Whether values are equal, floats up to the rounding."""
    if isinstance(one, Pass | Share):
        pairs = [(getattr(one, each.name), getattr(other, each.name)) for each in fields(one)]
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return type(other) is float and abs(one - other) <= 5e-10 + 1e-15 * one
    return type(one) is type(other) and one == other


@given(runs() | runs(largest=1e15))
def test_a_run_reads_back_as_it_was(run: Run) -> None:
    back = again(run)
    assert (back.tokens, len(back.passes)) == (run.tokens, len(run.passes))
    assert (back.prompts, back.outputs, back.wording) == (run.prompts, run.outputs, run.wording)
    assert same(run.prefill_s, back.prefill_s)
    assert all(same(*pair) for pair in zip(run.passes, back.passes, strict=True))
    assert again(back) == back


def test_a_run_whose_prompt_ran_with_the_first_draft_has_no_prefill() -> None:
    run = Run(6, (Pass(9, (4,), opens=True), Pass(9, (2,))))
    assert again(run) == run
    assert (run.prefills, run.forwards, run.tokens_per_pass) == (0, 2, 3.0)
    other = replace(run, passes=(Pass(9, (3,)), Pass(9, (2,))))
    assert (other.prefills, other.forwards, other.tokens_per_pass) == (1, 3, 2.0)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_run_without_passes_reads_back(tokens: int) -> None:
    assert again(Run(tokens, ())) == Run(tokens, ())


def test_every_field_of_a_pass_is_written(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "trace")
    header, *lines = map(json.loads, (tmp_path / "trace").read_text().splitlines())
    assert header == {
        "format": "lookahead trace",
        "version": 1,
        "tokens": 6,
        "rows": 2,
        "passes": 2,
        "tokens_per_pass": 2.0,
        "prefill_s": 0.25,
        "prompts": [[5, 6], []],
        "outputs": [[7, 8, 9, 1], [7]],
        "wording": {
            "prompts": ["a b", ""],
            "outputs": [["c", " d", "", "é"], ["c"]],
            "words": {"7": "c", "8": " d", "9": "<0xc3>", "1": "<0xa9>"},
        },
    }
    assert all(list(line) == [each.name for each in fields(Pass)] for line in lines)
    assert lines[0]["sources"] == {"prompt": [4, 2, 0.0002]}
    assert lines[0]["trees"] == [{each.name: _plain(getattr(TREE, each.name)) for each in fields(Tree)}]
    assert {str(each.type) for each in fields(Pass)} <= set(KINDS)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_numbers_of_other_libraries_are_written_as_numbers() -> None:
    import numpy as np

    one = Pass(np.int32(3), (np.int64(2),), np.float64(1.5), step_s=np.float32(0.5), sources={"a": Share(np.int32(1))})
    assert again(Run(3, (one,))) == Run(3, (Pass(3, (2,), 1.5, step_s=0.5, sources={"a": Share(1)}),))


def test_a_run_that_cannot_be_written_leaves_the_file(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "trace")
    with pytest.raises(ValueError, match="JSON"):
        Run(3, (Pass(1, (1,), step_s=math.nan),)).save(tmp_path / "trace")
    assert Run.load(tmp_path / "trace") == EXAMPLE
    with pytest.raises(OSError, match="directory"):
        EXAMPLE.save(tmp_path)


# -- what is read -----------------------------------------------------------------------------------------------------


def lines_of(run: Run, tmp_path: Path) -> list[dict[str, Any]]:
    run.save(tmp_path / "good")
    return [json.loads(line) for line in (tmp_path / "good").read_text().splitlines()]


def reread(tmp_path: Path, lines: list[Any], ends: str = "\n") -> Run:
    (tmp_path / "trace").write_bytes("".join(json.dumps(line) + ends for line in lines).encode())
    return Run.load(tmp_path / "trace")


def refused(tmp_path: Path, data: bytes) -> str:
    """The one line that says why `data` is no trace; it ends with a way out."""
    (tmp_path / "trace").write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        Run.load(tmp_path / "trace")
    said = str(caught.value)
    assert "\n" not in said
    assert "; " in said
    assert len(said) < len(str(tmp_path)) + 260
    return said.removeprefix(f"{tmp_path / 'trace'}")


def test_what_later_versions_add_is_not_read(tmp_path: Path) -> None:
    lines = [line | {"leaf": [[0, math.nan]], "note": "x"} for line in lines_of(EXAMPLE, tmp_path)]
    lines[1]["sources"]["prompt"] += [9, "more"]
    assert reread(tmp_path, lines) == EXAMPLE


def test_optional_fields_may_be_left_out(tmp_path: Path) -> None:
    header, *lines = lines_of(EXAMPLE, tmp_path)
    brief = [{key: line[key] for key in ("nodes", "committed")} for line in lines]
    for name in ("prefill_s", "prompts", "outputs", "wording"):
        del header[name]
    assert reread(tmp_path, [header, *brief]) == Run(6, (Pass(5, (3, 1)), Pass(1, (1, 1))))


@pytest.mark.parametrize("change", [lambda d: d.replace(b"\n", b"\r\n"), lambda d: b"\xef\xbb\xbf" + d, bytes.rstrip])
def test_other_line_ends_are_read(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    EXAMPLE.save(tmp_path / "trace")
    (tmp_path / "trace").write_bytes(change((tmp_path / "trace").read_bytes()))
    assert Run.load(tmp_path / "trace") == EXAMPLE


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for name, says in (("none", "no such file"), (".", "directory"), ("a\0b", "null")):
        with pytest.raises(InvalidInput, match=says) as caught:
            Run.load(str(tmp_path / name))
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "--trace" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", ": there is nothing in it"),
        (b" \n\n", ": there is nothing in it"),
        (b"\xff\xfe{\0", ", line 1: not UTF-8 text (byte 0)"),
        (b"text", ", line 1: not JSON (Expecting value"),
        (b'{"tokens": 3,\n', ", line 1: not JSON"),
        (b"[" * 100_000, ", line 1: not JSON"),
        (b"9" * 5_000, ", line 1: not JSON"),
        (b"[]", ", line 1: [] is no JSON object"),
        (b"null", ", line 1: None is no JSON object"),
        (b"{}", ", line 1: not a trace"),
        (b'{"format": "lookahead pool", "version": 1}', ", line 1: not a trace"),
        (b'{"format": ["lookahead trace"], "version": 1}', ", line 1: not a trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    assert refused(tmp_path, data).startswith(says)


def spoilt(tmp_path: Path, line: int, changes: dict[str, Any]) -> str:
    lines = lines_of(EXAMPLE, tmp_path)
    lines[line] |= changes
    return refused(tmp_path, "".join(json.dumps(each) + "\n" for each in lines).encode())


def test_newer_versions_name_the_way_out(tmp_path: Path) -> None:
    said = spoilt(tmp_path, 0, {"version": VERSION + 1, "tokens": "other by then"})
    assert said.startswith(f", line 1: a trace of version {VERSION + 1}, ")
    assert "upgrade" in said


WRONG_COUNTS = [None, "3", 1.0, True, -1, [], 10**15 + 1, 10**400]
WRONG_NUMBERS = [None, "3", False, -0.001, math.nan, math.inf, -math.inf, {}, 1e300, 10**400]


GOOD_TREE = {each.name: _plain(getattr(TREE, each.name)) for each in fields(Tree)}
BAD_TREES = [
    GOOD_TREE | changes
    for changes in (
        {"row": -1},
        {"ran": 0},
        {"ran": 6},
        {"tokens": [7, 8]},
        {"tokens": [7, 8, 9, 2, "3"]},
        {"parents": [0, 0, 1, 0, 1]},
        {"parents": [-1, 0, 2, 0, 1]},
        {"parents": [-1, 0, 1, 0]},
        {"chances": [1.0, None, 0.25, 0.1, 0.0]},
        {"chances": 1.0},
        {"sources": [0, 1]},
        {"probes": [0]},
        {"probes": [4]},
        {"path": [1]},
        {"path": [0, 2]},
        {"path": [0, 1, 4]},
        {"path": [0, 1, 1]},
    )
]


@pytest.mark.parametrize(
    ("line", "key", "values"),
    [
        (0, "version", WRONG_COUNTS),
        (0, "tokens", WRONG_COUNTS),
        (0, "rows", WRONG_COUNTS),
        (0, "passes", WRONG_COUNTS),
        (0, "tokens_per_pass", WRONG_NUMBERS),
        (1, "nodes", WRONG_COUNTS),
        (2, "committed", [None, 2, {}, "12", [1, None], [1.0, 1], [True, 1], [-1, 1]]),
        *((1, each.name, WRONG_NUMBERS) for each in fields(Pass) if each.type == "float"),
        (2, "why", [None, 3, ["pays"]]),
        (1, "opens", [None, 0, 1, "true", []]),
        (2, "sources", [None, [], 3, {"a": 1}, {"a": None}, {"a": [1, 2]}, {"a": {"run": 1}}]),
        *((1, "sources", [{"a": [wrong, 0, 0.0]}, {"a": [0, wrong, 0.0]}]) for wrong in WRONG_COUNTS),
        *((1, "sources", [{"a": [0, 0, wrong]}]) for wrong in WRONG_NUMBERS),
        (0, "prefill_s", WRONG_NUMBERS),
        *((0, name, [None, 3, [3], [[-1]], [["a"]], [[2**31]]]) for name in ("prompts", "outputs")),
        (0, "wording", [3, {}, [], {"prompts": ["a"], "outputs": [], "words": {"a": "b"}}]),
        (1, "trees", [None, 3, [3], [{}], *([tree] for tree in BAD_TREES)]),
    ],
)
def test_wrong_values_are_refused_by_field(tmp_path: Path, line: int, key: str, values: list[Any]) -> None:
    for value in values:
        assert spoilt(tmp_path, line, {key: value}).startswith(f', line {line + 1}: "{key}" is ')


@pytest.mark.parametrize(
    ("line", "key"),
    [
        *((0, key) for key in ("version", "tokens", "rows", "passes", "tokens_per_pass")),
        *((line, key) for line in (1, 2) for key in ("nodes", "committed")),
    ],
)
def test_missing_fields_are_refused_by_name(tmp_path: Path, line: int, key: str) -> None:
    lines = lines_of(EXAMPLE, tmp_path)
    del lines[line][key]
    said = refused(tmp_path, "".join(json.dumps(each) + "\n" for each in lines).encode())
    assert said.startswith(f', line {line + 1}: "{key}" is missing; ')


def test_numbers_beyond_a_float_are_refused(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes().replace(b'"step_s": 0.01', b'"step_s": 1e999')
    assert refused(tmp_path, data).startswith(', line 2: "step_s" is inf')


def test_texts_are_of_as_many_rows(tmp_path: Path) -> None:
    assert spoilt(tmp_path, 0, {"outputs": [[1]]}).startswith(', line 1: "prompts" and "outputs" are of different')
    assert spoilt(tmp_path, 0, {"outputs": [[1], [2]]}).startswith(', line 1: "wording" does not fit ')
    assert spoilt(tmp_path, 0, {"prompts": [[1]], "outputs": [[7]]}).startswith(', line 1: "prompts" is of 1 rows')


def test_rows_are_those_of_the_header(tmp_path: Path) -> None:
    assert spoilt(tmp_path, 2, {"committed": [1]}).startswith(', line 3: "committed" is of 1 rows, ')


@given(st.data())
def test_a_file_that_was_cut_is_refused(data: st.DataObject) -> None:
    run = replace(EXAMPLE, passes=EXAMPLE.passes * 3)
    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder, "trace"))
        whole = Path(folder, "trace").read_bytes().rstrip()
        cut = data.draw(st.integers(0, len(whole) - 1))
        Path(folder, "trace").write_bytes(whole[:cut])
        with pytest.raises(InvalidInput, match=r"trace(, line \d)?: "):
            Run.load(Path(folder, "trace"))


def test_lines_that_are_too_many_are_refused(tmp_path: Path) -> None:
    lines = lines_of(EXAMPLE, tmp_path)
    said = refused(tmp_path, "".join(json.dumps(each) + "\n" for each in [*lines, lines[-1]]).encode())
    assert said.startswith(", line 4: the file ends after 3 passes, but its header promises 2")
    said = refused(tmp_path, "\n\n".join(json.dumps(each) for each in lines).encode())
    assert said.startswith(", line 2: not JSON")
