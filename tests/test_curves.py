"""Laws of stored cost curves: a file reads back as it was, and anything else is refused; the nearest curve is found."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny

from lookahead.curves import LIMIT, Curve, Curves, default_path, key_of, setting_of
from lookahead.errors import InvalidArgument, InvalidInput

EXAMPLE = Curve("k", 2, 256, (1, 2, 5), (0.5, 0.5, 2.0), "a model")
KEYS = st.sampled_from(["a", "b", "é"])
ROWS = st.integers(1, 300)


@st.composite
def a_curve(draw: st.DrawFn, keys: st.SearchStrategy[str] = KEYS) -> Curve:
    nodes = sorted(draw(st.sets(st.integers(1, 5000), min_size=1, max_size=6)))
    seconds = sorted(draw(st.floats(1e-7, 1e3)) for _ in nodes)
    return Curve(draw(keys), draw(ROWS), draw(st.integers(1, 9000)), tuple(nodes), tuple(seconds), draw(st.text()))


SOME = st.lists(a_curve(), max_size=5).map(lambda found: Curves(tuple(found)))

# -- files ------------------------------------------------------------------------------------------------------------


@given(SOME)
def test_a_file_reads_back_as_it_was(curves: Curves) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "not", "there", "yet.json")
        curves.save(file)
        assert Curves.load(file) == curves
        assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_save_that_is_stopped_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "curves.json"
    Curves((EXAMPLE,)).save(file)
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        Curves().save(file)
    assert Curves.load(file).curves == (EXAMPLE,)
    assert list(tmp_path.iterdir()) == [file]


def file_of(*curves: Any, **changes: Any) -> bytes:
    return json.dumps({"format": "lookahead curves", "version": 1, "curves": list(curves), **changes}).encode()


def changed(**changes: Any) -> dict[str, Any]:
    return asdict(EXAMPLE) | changes


UNREADABLE: list[tuple[bytes, str]] = [
    (b"\xff\xfe", "not UTF-8 text (byte 0)"),
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "not a file of cost curves"),
    (b'{"format": "lookahead trace", "version": 1}', "not a file of cost curves"),
    (file_of(version=2), "of version 2, and this lookahead reads 1"),
    (file_of(version=None), "of version None"),
    (b'{"format": "lookahead curves", "version": 1}', "a curve is damaged"),
    (file_of(curves=None), "a curve is damaged"),
    (file_of(curves={"a": 1}), "a curve is damaged"),
    (file_of(asdict(EXAMPLE), 7), "a curve is damaged"),
    (file_of({key: value for key, value in asdict(EXAMPLE).items() if key != "rows"}), "a curve is damaged"),
    *(
        (file_of(changed(**changes)), "a curve is damaged")
        for changes in (
            {"more": 1},
            {"key": None},
            {"setting": 1},
            {"rows": 0},
            {"rows": True},
            {"rows": "2"},
            {"rows": 10**400},
            {"context": 1.5},
            {"nodes": None},
            {"nodes": [1, 2]},
            {"nodes": [1, 1, 5]},
            {"nodes": [5, 2, 1]},
            {"nodes": [0, 1, 2]},
            {"nodes": [1, 2, LIMIT + 1]},
            {"nodes": [], "seconds": []},
            {"seconds": [0.5, 0.5]},
            {"seconds": [0.5, 0.4, 0.6]},
            {"seconds": [0.0, 0.5, 0.5]},
            {"seconds": [0.5, 0.5, math.nan]},
            {"seconds": [0.5, 0.5, math.inf]},
            {"seconds": [0.5, 0.5, 10**400]},
            {"seconds": [0.5, 0.5, "1"]},
        )
    ),
]


@pytest.mark.parametrize(("data", "says"), UNREADABLE)
def test_what_save_does_not_write_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    file = tmp_path / "curves.json"
    file.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        Curves.load(file)
    said = str(caught.value)
    assert said.startswith(f"curves {file}: {says}")
    assert "delete this one and write it anew with `lookahead calibrate`" in said


def test_the_example_of_damage_is_whole_without_it(tmp_path: Path) -> None:
    (tmp_path / "curves.json").write_bytes(file_of(changed()))
    assert Curves.load(tmp_path / "curves.json") == Curves((EXAMPLE,))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file; write it with `lookahead calibrate`"):
        Curves.load(tmp_path / "none")
    with pytest.raises(InvalidInput, match="is a directory; give another file"):
        Curves.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"rows": 0}, {"nodes": (2, 1, 5)}, {"nodes": (1, 2)}, {"seconds": (0.1, 0.3, 0.2)}, {"seconds": (1, 2, 3)}],
)
def test_a_curve_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="curve"):
        replace(EXAMPLE, **changes)


# -- one curve --------------------------------------------------------------------------------------------------------


@given(a_curve(), st.lists(st.floats(0.0, 20_000.0), min_size=2, max_size=20))
def test_seconds_never_fall_and_are_what_was_measured(curve: Curve, nodes: list[float]) -> None:
    assert curve.at(np.array(curve.nodes, float)).tolist() == list(curve.seconds)
    found = curve.at(np.sort(nodes))
    assert (found[1:] >= found[:-1] * (1 - 1e-12)).all()
    assert (found >= curve.seconds[0]).all()
    assert np.isfinite(found).all()


def test_between_and_beyond_are_straight_lines() -> None:
    nodes, seconds = [0.0, 1.0, 1.5, 3.5, 5.0, 6.0, 11.0], [0.5, 0.5, 0.5, 1.25, 2.0, 2.5, 5.0]
    assert EXAMPLE.at(np.array(nodes)) == pytest.approx(seconds)
    alone = replace(EXAMPLE, nodes=(3,), seconds=(0.5,))
    assert alone.at(np.array([1.0, 3.0, 99.0])).tolist() == [0.5] * 3


# -- all of them ------------------------------------------------------------------------------------------------------


@given(SOME, a_curve())
def test_a_curve_replaces_its_like_and_keeps_the_others(curves: Curves, curve: Curve) -> None:
    after = curves.replaced(curve)
    like = (curve.key, curve.rows)
    assert [one for one in after.curves if (one.key, one.rows) == like] == [curve]
    assert [one for one in after.curves if (one.key, one.rows) != like] == [
        one for one in curves.curves if (one.key, one.rows) != like
    ]
    assert after.replaced(curve) == after
    assert after.holds(curve.key)


@given(st.lists(a_curve(st.just("a")), min_size=1, unique_by=lambda one: one.rows), a_curve(st.just("b")), ROWS)
def test_the_nearest_batch_size_is_found_and_scaled(fit: list[Curve], other: Curve, rows: int) -> None:
    find = Curves((*fit, other)).find("a", rows)
    assert find is not None
    nodes = np.arange(1.0, 200.0)
    factor = min(max(one.rows / rows, rows / one.rows) for one in fit)
    near = [one for one in fit if max(one.rows / rows, rows / one.rows) <= factor * (1 + 1e-12)]
    found = find(nodes)
    assert any(np.array_equal(found, one.at(np.maximum(nodes * rows / one.rows, 1.0))) for one in near)
    exact = next((one for one in fit if one.rows == rows), None)
    if exact is not None:
        assert found.tolist() == exact.at(nodes).tolist()


@given(SOME, ROWS)
def test_no_curve_of_a_key_is_none(curves: Curves, rows: int) -> None:
    assert curves.find("other", rows) is None
    assert not curves.holds("other")
    for key in ("a", "b"):
        assert curves.holds(key) == (curves.find(key, rows) is not None)


def test_twice_the_rows_cost_twice_the_nodes() -> None:
    nodes = np.arange(1.0, 9.0)
    for factor in (2, 8):
        find = Curves((EXAMPLE,)).find("k", factor * EXAMPLE.rows)
        assert find is not None
        assert find(nodes).tolist() == EXAMPLE.at(factor * nodes).tolist()


# -- keys and places --------------------------------------------------------------------------------------------------


def test_a_key_is_of_shape_dtype_attention_and_threads() -> None:
    model = tiny("llama")
    assert key_of(model) == key_of(model)
    others = [
        tiny("qwen2"),
        tiny("llama", "eager"),
        tiny("llama", "sdpa", "float32"),
        tiny("llama", num_hidden_layers=3),
        tiny("llama", vocab_size=64),
        tiny("llama", num_key_value_heads=4, intermediate_size=47),
    ]
    keys = {key_of(one) for one in (model, *others)}
    assert len(keys) == 1 + len(others)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert key_of(model) not in keys
        assert setting_of(model).endswith(f"float64, cpu, {threads + 1} threads")
    finally:
        torch.set_num_threads(threads)


def test_the_default_file_is_in_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_path() == tmp_path / "cache" / "lookahead" / "curves.json"
    at_home = tmp_path / "home" / ".cache" / "lookahead" / "curves.json"
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_path() == at_home
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path() == at_home
