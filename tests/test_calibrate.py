"""Laws of `lookahead calibrate`: it measures what fits and changes nothing; what it keeps never changes a text."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from models import EOS, FAMILIES, JSON_VOCAB, PAD, WORDS, json_tokenizer, tiny
from transformers import GenerationConfig
from zoo import zoo

import lookahead
from lookahead import calibrate, calibrate_command, cli, json_command
from lookahead.budget import Budget
from lookahead.calibrate import ROUNDS, fitting, measure
from lookahead.cli import main
from lookahead.cost import KNOTS
from lookahead.curves import Curve, Curves, default_path, key_of, setting_of
from lookahead.errors import InvalidArgument, UnsupportedModel
from lookahead.loading import Checkpoint, quiet
from lookahead.target import Target

PROMPT = "the name "
SMALL = {"context": 16, "most": 8, "rounds": 2}
SIZES = (1, 2, 3, 5, 8)
TEXTS = ["--prompt", PROMPT, "--max-new-tokens", "40"]


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run on the CPU, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("calibrated")
    with quiet():
        tiny("llama", "sdpa", "float64", vocab_size=JSON_VOCAB).save_pretrained(folder)
        json_tokenizer().save_pretrained(folder)
        GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default file of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return default_path()


@pytest.fixture
def schema(tmp_path: Path) -> str:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "integer"}, "maxItems": 4}')
    return str(tmp_path / "schema.json")


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_curve_is_of_the_model_and_never_falls(family: str, rows: int) -> None:
    model = tiny(family)
    curve = measure(model, rows=rows, **SMALL)  # a `Curve` is checked: finite seconds above 0 that never fall
    assert (curve.nodes, curve.rows, curve.context) == (SIZES, rows, 16)
    assert (curve.key, curve.setting) == (key_of(model), setting_of(model))


@pytest.mark.parametrize("most", [0, 1, 3, 64, 128])
def test_sizes_are_the_knots_up_to_the_largest_tree(most: int) -> None:
    curve = measure(tiny("llama"), context=4, most=most, rounds=1)
    assert list(curve.nodes) == [knot for knot in KNOTS if knot <= most + 1]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize(("positions", "fits"), [(9, 1), (10, 2), (24, 16), (25, 16), (4, 1)])
def test_passes_stay_within_the_positions(
    family: str, positions: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = Target.forward

    def watched(self: Target, drafts: Any, columns: Any) -> Any:
        seen.extend(int(self._next_position[row]) + columns[row] + max(d.depth) for row, d in enumerate(drafts))
        return forward(self, drafts, columns)

    monkeypatch.setattr(Target, "forward", watched)
    curve = measure(tiny(family, max_position_embeddings=positions), rows=2, **SMALL)
    assert curve.context == fits
    assert max(seen) == curve.context + curve.nodes[-1] - 1 < positions


@given(st.integers(2, 3000), st.integers(1, 3000), st.integers(0, 2000))
def test_what_fits_is_the_most_that_fits(positions: int, context: int, most: int) -> None:
    fit, sizes = fitting(hf.LlamaConfig(max_position_embeddings=positions), context, most)
    assert 1 <= fit <= context
    assert sizes == [knot for knot in KNOTS if knot <= min(most + 1, positions - 1)]
    assert fit == context or fit + sizes[-1] == positions


def test_without_a_limit_all_fits() -> None:
    assert fitting(hf.PretrainedConfig(), 10**6, 8) == (10**6, list(SIZES))


def test_sizes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    forward = Target.forward

    def watched(self: Target, drafts: Any, columns: Any) -> Any:
        assert self.cache.used == 16  # nothing was kept
        seen.append(tuple(len(draft) for draft in drafts))
        return forward(self, drafts, columns)

    monkeypatch.setattr(Target, "forward", watched)
    measure(tiny("llama"), rows=2, context=16, most=8, rounds=4)
    rounds = [seen[i : i + len(SIZES)] for i in range(0, len(seen), len(SIZES))]
    assert len(rounds) == 1 + 4
    assert all(sorted(one) == [(size, size) for size in SIZES] for one in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_the_median_counts_and_not_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {1: [9.0, 3.0, 1.0, 2.0], 2: [0.1, 5.0, 50.0, 4.0], 3: [0.1, 4.0, 4.0, 4.0], 5: [0.1, 8.0, 8.0, 0.5]}
    monkeypatch.setattr(calibrate._Trees, "seconds", lambda self, size: script[size].pop(0))
    curve = measure(tiny("llama"), context=4, most=4, rounds=3)
    assert (curve.nodes, curve.seconds) == ((1, 2, 3, 5), (2.0, 4.0, 4.0, 8.0))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_rising_is_the_largest_that_never_falls(given: list[float]) -> None:
    seconds = np.array(given)
    found = calibrate._rising(seconds)
    assert found.tolist() == [min(given[i:]) for i in range(len(given))]
    assert (np.diff(found) >= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_model_nor_generator_are_changed(family: str) -> None:
    model = tiny(family)
    ids = torch.tensor([[*WORDS][:9]])
    options = {"max_new_tokens": 12, "do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    weights, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    torch.manual_seed(3)
    before = model.generate(ids, **options)
    torch.manual_seed(3)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    measure(model, rows=2, **SMALL)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # type: ignore[index]  # noqa: NPY002
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = model.generate(ids, **options)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(*pair) for pair in zip(before.logits, after.logits, strict=True))


def test_it_says_how_far_it_is() -> None:
    said: list[str] = []
    measure(tiny("llama"), context=4, most=1, rounds=2, say=lambda text, part: said.append(text))
    assert sorted(said) == [
        *(f"round {i} of 2: {size} nodes …" for i in (1, 2) for size in (1, 2)),
        *(f"warming up: {size} nodes …" for size in (1, 2)),
    ]


@pytest.mark.parametrize("name", ["gemma3_text", "bloom", "qwen3_next", "mamba2", "gemma3n_text"])
def test_any_kind_of_model_is_measured(name: str) -> None:
    curve = measure(zoo(name), **SMALL)
    assert all(second > 0 for second in curve.seconds)


def test_models_that_are_not_served_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"(indexed|sparse)_attention"):
        measure(zoo("deepseek_v32"), **SMALL)
    with pytest.raises(UnsupportedModel, match="has an encoder"):
        measure(zoo("t5"), **SMALL)
    restless = copy.deepcopy(tiny("gpt2")).train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        measure(restless, **SMALL)
    assert restless.training


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rows": 0}, "rows=0; give a whole number of 1 or more"),
        ({"rows": True}, "rows=True"),
        ({"context": 0}, "context=0"),
        ({"context": 1.5}, "context=1.5"),
        ({"most": -1}, "most=-1; give a whole number of 0 or more"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(says)):
        measure(tiny("llama"), **given)


@pytest.mark.law
@pytest.mark.parametrize("seconds", [None, (1e-9, 1e-9), (1e-9, 1e9), (1e3, 1e3)])
@pytest.mark.parametrize("rows", [1, 2])
def test_curves_never_change_the_output(tmp_path: Path, seconds: tuple[float, ...] | None, rows: int) -> None:
    model = tiny("llama")
    curve = measure(model, **SMALL)
    if seconds is not None:
        curve = Curve(curve.key, 1, 16, (1, 65), seconds)
    Curves((curve,)).save(tmp_path / "curves.json")
    ids = torch.tensor([[*WORDS][row : row + 9] * 2 for row in range(rows)])
    plain = model.generate(ids, max_new_tokens=60, do_sample=False)
    la = lookahead.Lookahead(model, budget=Budget(curves=tmp_path / "curves.json"))
    assert torch.equal(la.generate(ids, max_new_tokens=60, do_sample=False), plain)


# -- the command ------------------------------------------------------------------------------------------------------


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


def loaded(folder: str) -> Any:
    """The model as the commands load it."""
    with quiet():
        checkpoint = Checkpoint(folder)
        return checkpoint.model(checkpoint.config())


def a_curve(key: str, rows: int = 1) -> Curve:
    return Curve(key, rows, 7, (1, 9), (0.25, 0.5), "made up")


def test_it_shows_and_keeps_what_it_measures(model_dir: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Curves((a_curve("other"),)).save(file)
    out, err = written(capsys, ["calibrate", "--model", model_dir, "--rows", "2", "1", "2", "--most", "8"])
    assert err == ""
    model = loaded(model_dir)
    kept = Curves.load(file).curves
    assert kept[0] == a_curve("other")
    assert [(one.key, one.rows, one.nodes, one.context) for one in kept[1:]] == [
        (key_of(model), rows, SIZES, 256) for rows in (2, 1)
    ]
    header, *tables, last = out.strip().split("\n\n")
    assert " ".join(header.split()) == f"{setting_of(model)}; passes behind 256 tokens"
    assert last == f"stored in {file}"
    for table, curve in zip(tables, kept[1:], strict=True):
        title, headings, *lines = table.splitlines()
        assert (title, headings.split()) == (f"batch size {curve.rows}", ["nodes", "ms", "times", "one"])
        assert [line.split() for line in lines] == [
            [str(nodes), f"{1e3 * seconds:.2f}", f"{seconds / curve.seconds[0]:.2f}x"]
            for nodes, seconds in zip(curve.nodes, curve.seconds, strict=True)
        ]
        assert len({len(line) for line in lines}) == 1


def test_measuring_again_replaces_the_same_batch_size_only(
    model_dir: str, tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, key = tmp_path / "new" / "named.json", key_of(loaded(model_dir))
    Curves((a_curve(key, 1), a_curve(key, 2), a_curve("other", 1))).save(named)
    written(capsys, ["calibrate", "--model", model_dir, "--curves", str(named), "--most", "2", "--context", "9"])
    kept = Curves.load(named).curves
    assert kept[:2] == (a_curve(key, 2), a_curve("other", 1))
    assert [(one.key, one.rows, one.nodes, one.context) for one in kept[2:]] == [(key, 1, (1, 2, 3), 9)]
    assert not file.exists()


@pytest.mark.parametrize(("given", "meant"), [([], "float64"), (["--dtype", "bfloat16"], "bfloat16")])
def test_json_holds_what_is_kept(
    model_dir: str, file: Path, capsys: pytest.CaptureFixture[str], given: list[str], meant: str
) -> None:
    out, err = written(capsys, ["calibrate", "--model", model_dir, "--rows", "1", "2", "--most", "1", "--json", *given])
    found = json.loads(out)
    assert err == ""
    assert found["file"] == str(file)
    assert json.loads(file.read_text())["curves"] == found["curves"]
    assert [one["rows"] for one in found["curves"]] == [1, 2]
    assert all(f", {meant}, cpu, " in one["setting"] for one in found["curves"])


def test_a_terminal_sees_how_far_it_is(
    model_dir: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, err = written(capsys, ["calibrate", "--model", model_dir, "--most", "1"])
    assert f"% batch size 1, round {ROUNDS} of {ROUNDS}: 2 nodes …" in err
    assert err.split("\r")[-1] == ""  # the line is cleared


def test_an_interruption_loses_nothing_that_was_stored(
    model_dir: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(model: Any, *, rows: int, **_: Any) -> Curve:
        if rows == 3:
            raise KeyboardInterrupt
        if rows == 2:  # another process stores something meanwhile
            Curves.load(file).replaced(a_curve("meanwhile")).save(file)
        return a_curve(key_of(model), rows)

    Curves((a_curve("before"),)).save(file)
    monkeypatch.setattr(calibrate, "measure", measured)
    _, err = written(capsys, ["calibrate", "--model", model_dir, "--rows", "1", "2", "3"], 130)
    assert "interrupted" in err
    key = key_of(loaded(model_dir))
    assert Curves.load(file).curves == (a_curve("before"), a_curve(key), a_curve("meanwhile"), a_curve(key, 2))
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("data", [b"{", b"\xff", b'{"format": "other"}'])
def test_a_file_of_something_else_is_not_replaced(
    model_dir: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(calibrate_command, "_load", None)  # fails where it gets there
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    for more in ([], ["--curves", str(file)]):
        assert f"curves {file}: not " in refusal(capsys, ["calibrate", "--model", model_dir, *more])
    assert file.read_bytes() == data


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_command, "_load", None)
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file" / "curves.json", tmp_path / ("x" * 300)):
        said = refusal(capsys, ["calibrate", "--model", model_dir, "--curves", str(place)])
        assert f"--curves {place}: " in said
        assert "give a file that can be written" in said
    assert f"curves {tmp_path}: is a directory" in refusal(
        capsys, ["calibrate", "--model", model_dir, "--curves", str(tmp_path)]
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rows", "0"], "--rows"),
        (["--rows"], "--rows"),
        (["--rows", "1", "x"], "--rows"),
        (["--context", "0"], "--context"),
        (["--most", "0"], "--most"),
        (["--most", "4097"], "--most"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "warp"], "--device warp"),
        (["--model", "./none"], "--model ./none"),
        (["--context", "960"], "--context 960: with 65 tokens behind it that exceeds the model's context of 1024; "
                               "ask for at most 959"),
        (["--context", "1020", "--most", "8"], "ask for at most 1016"),
        (["--most", "1023"], "--most 1023: that exceeds the model's context of 1024; ask for at most 1022"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_by_name(
    model_dir: str, file: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:
    assert says in refusal(capsys, ["calibrate", "--model", model_dir, *given])
    assert not file.exists()


def test_models_that_cannot_be_measured_are_refused_by_name(
    model_dir: str, tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v32"}))
    said = refusal(capsys, ["calibrate", "--model", str(tmp_path)])
    why = r"it has layers of (indexed|deepseek_sparse)_attention"
    assert re.search(re.escape(f"--model {tmp_path}: 'deepseek_v32' models are not served: ") + why, said)
    assert "--plain" not in said

    def fails(error: Exception) -> None:
        monkeypatch.setattr(calibrate, "measure", mock.Mock(side_effect=error))

    for error, says in (
        (UnsupportedModel("it cannot be served"), f"--model {model_dir}: it cannot be served"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--rows 5: the device has too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--rows 5: the device has too little memory"),
        (MemoryError(), "--rows 5: the device has too little memory"),
    ):
        fails(error)
        assert says in refusal(capsys, ["calibrate", "--model", model_dir, "--rows", "5"])
    fails(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        main(["calibrate", "--model", model_dir])
    assert not file.exists()


def test_nothing_asked_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = written(capsys, ["calibrate"], 2)
    assert "usage: lookahead calibrate" in out


# -- what starts from it ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows with every question for a stored curve: whether there was one."""
    found: list[bool] = []
    find = Curves.find

    def watched(self: Curves, key: str, rows: int) -> Any:
        curve = find(self, key, rows)
        found.append(curve is not None)
        return curve

    monkeypatch.setattr(Curves, "find", watched)
    return found


def commands(model_dir: str, schema: str) -> list[list[str]]:
    return [
        ["generate", "--model", model_dir, *TEXTS],
        ["json", "--model", model_dir, "--schema", schema, *TEXTS[:2]],
    ]


def test_commands_start_from_what_was_measured(
    model_dir: str, schema: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[bool]
) -> None:
    named = str(tmp_path / "named.json")
    for command in commands(model_dir, schema):
        file.unlink(missing_ok=True)
        plain = written(capsys, [*command, "--plain"])
        assert written(capsys, command) == plain
        assert asked == []
        for more in ([], ["--curves", named]):
            written(capsys, ["calibrate", "--model", model_dir, "--most", "8", *more])
            assert written(capsys, [*command, *more]) == plain
            assert asked == [True]
            asked.clear()
        assert written(capsys, [*command, "--nodes", "4"]) == plain
        assert written(capsys, [*command, "--dtype", "float32"])[1] == ""  # the default file holds none of that
        assert asked == []


@pytest.mark.parametrize("threads", [1, 2])
def test_curves_of_other_threads_are_others(
    model_dir: str, file: Path, capsys: pytest.CaptureFixture[str], asked: list[bool], threads: int
) -> None:
    assert torch.get_num_threads() == 1
    written(capsys, ["calibrate", "--model", model_dir, "--most", "1"])
    try:
        torch.set_num_threads(threads)
        written(capsys, ["generate", "--model", model_dir, *TEXTS])
    finally:
        torch.set_num_threads(1)
    assert asked == ([True] if threads == 1 else [])


def test_a_named_file_without_the_model_is_refused(
    model_dir: str, schema: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Curves((a_curve("other"),)).save(file)
    for command in commands(model_dir, schema):
        said = refusal(capsys, [*command, "--curves", str(file)])
        assert f"--curves {file}: holds nothing of this model as it runs here ({setting_of(loaded(model_dir))})" in said
        assert "`lookahead calibrate`" in said
        written(capsys, command)


def test_curves_are_refused_before_the_work(
    model_dir: str, schema: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, module in zip(commands(model_dir, schema), (cli, json_command), strict=True):
        monkeypatch.setattr(module, "loaded", None)  # fails where it gets there
        assert "no such file; write it with `lookahead calibrate`" in refusal(capsys, [*command, "--curves", "none"])
        said = refusal(capsys, [*command, "--curves", "none", "--nodes", "8"])
        assert "--nodes 8 runs so many, whatever they cost; leave out --curves, or --nodes" in said
        said = refusal(capsys, [*command, "--curves", "none", "--plain"])
        assert "--plain drafts nothing; leave out --curves, or --plain" in said
        Curves((a_curve("other"),)).save(file)
        file.write_bytes(file.read_bytes()[:-9])
        said = refusal(capsys, command)
        assert f"curves {file}: not JSON" in said
        assert "delete this one" in said


def test_a_damaged_default_file_is_nothing_to_plain_decoding(
    model_dir: str, schema: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("{")
    for command in commands(model_dir, schema):
        assert written(capsys, [*command, "--plain"])[1] == ""
        assert written(capsys, [*command, "--nodes", "0"])[1] == ""
