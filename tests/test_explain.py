"""Laws of `lookahead explain`: its totals are sums over the passes, its tables fit, bad input gets one line."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from traces import runs

from lookahead import explain_command
from lookahead.cli import main
from lookahead.explain import PARTS, Group, Totals, explain
from lookahead.trace import WHY, Pass, Run, Share

GROUP = {"passes", "nodes", "expected", "committed"}
WORTH = {"run", "accepted", "hit_rate", "priced", "earned_s", "cost_s", "net_s"}

# Two rows: a token is worth 10 ms, a node in both rows costs 2 ms, so one in one row costs 1 ms.
PRICED = {"token_s": 0.010, "row_s": 0.002}
EXAMPLE = Run(
    8,
    (
        Pass(4, (2, 1), 2.0, "explores", step_s=0.030, sources={"prompt": Share(6, 1, 0.5)}),
        Pass(5, (3, 1), 4.5, "pays", **PRICED, step_s=0.040, sources={"prompt": Share(5, 2, 0.001), "pool": Share(3)}),
        Pass(1, (1, 1), 2.0, "rests", **PRICED, step_s=0.020),
        Pass(5, (1, 2), 3.5, "pays", **PRICED, step_s=0.040, sources={"pool": Share(4, 1)}),
        Pass(9, (1, 1), 0.0, "fixed", model_s=0.015, draft_s=0.005, step_s=0.020, sources={"late": Share(8, 0)}),
    ),
)


def near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-6)


# -- totals -----------------------------------------------------------------------------------------------------------


@given(runs())
def test_seconds_are_those_of_the_passes(run: Run) -> None:
    totals = explain(run)
    assert list(totals.seconds) == ["draft", "mask", "forward", "verify", "cache", "learn", "other"]
    for part, field in PARTS.items():
        assert near(totals.seconds[part], sum(getattr(one, field) for one in run.passes))
    assert near(totals.step_s, sum(one.step_s for one in run.passes))


def test_every_measured_part_is_told() -> None:
    measured = {name for name in Pass.__slots__ if name.endswith("_s")}
    assert set(PARTS.values()) == measured - {"token_s", "row_s", "step_s"}


@given(runs())
def test_reasons_divide_the_passes(run: Run) -> None:
    totals = explain(run)
    assert list(totals.why) == [
        why for why in (*WHY, "of a later version") if any(one.why == why for one in run.passes)
    ]
    for why, group in totals.why.items():
        assert group == Group.of([one for one in run.passes if one.why == why])
    for whole, groups in (
        (totals.all, totals.why.values()),
        (totals.chosen, [group for why, group in totals.why.items() if why != "fixed"]),
    ):
        assert whole.passes == sum(group.passes for group in groups)
        assert whole.nodes == sum(group.nodes for group in groups)
        assert whole.committed == sum(group.committed for group in groups)
        assert near(whole.expected, sum(group.expected for group in groups))
    assert totals.all.passes == len(run.passes)
    assert totals.all.nodes == sum(one.nodes for one in run.passes)
    assert totals.all.committed == sum(sum(one.committed) for one in run.passes)
    assert near(totals.all.expected, sum(one.expected for one in run.passes))


@given(runs(largest=1000))
def test_sources_earn_and_cost_what_their_passes_say(run: Run) -> None:
    totals = explain(run)
    assert set(totals.sources) == {name for one in run.passes for name in one.sources}
    for name, worth in totals.sources.items():
        earned = cost = 0.0
        ran = accepted = priced = 0
        for one in run.passes:
            share = one.sources.get(name, Share())
            ran, accepted = ran + share.run, accepted + share.accepted
            if name in one.sources and one.token_s:
                priced += 1
                earned += share.accepted * one.token_s
                cost += share.run * one.row_s / len(one.committed) + share.seconds
        assert (worth.run, worth.accepted, worth.priced) == (ran, accepted, priced)
        assert near(worth.earned_s, earned)
        assert near(worth.cost_s, cost)
        assert near(worth.net_s, earned - cost)
        assert near(worth.hit_rate * ran, accepted if ran else 0)
    order = [worth.accepted for worth in totals.sources.values()]
    assert order == sorted(order, reverse=True)
    assert totals.unpriced == len([one for one in run.passes if one.sources and one.token_s == 0])


def test_prices_are_of_a_node_in_one_row() -> None:
    sources = explain(EXAMPLE).sources
    assert list(sources) == ["prompt", "pool", "late"]
    prompt, pool, late = sources.values()
    assert (prompt.run, prompt.accepted, prompt.priced) == (11, 3, 1)
    assert (prompt.earned_s, prompt.cost_s) == pytest.approx((0.020, 0.006))
    assert (pool.earned_s, pool.cost_s, pool.net_s) == pytest.approx((0.010, 0.007, 0.003))
    assert (late.run, late.priced, late.earned_s, late.cost_s) == (8, 0, 0.0, 0.0)
    assert explain(EXAMPLE).unpriced == 2


def test_what_was_expected_leaves_given_numbers_of_nodes_out() -> None:
    chosen = explain(EXAMPLE).chosen
    assert (chosen.passes, chosen.expected, chosen.committed) == (4, 12.0, 12)


def test_a_run_without_passes_is_all_zeros() -> None:
    totals = explain(Run(1, ()))
    nothing = Group(0, 0, 0.0, 0)
    assert totals == Totals(1, 0, 1, 1.0, nothing, nothing, dict.fromkeys([*PARTS, "other"], 0.0), {}, {}, 0)


@given(runs())
def test_json_holds_the_totals_under_stable_keys(run: Run) -> None:
    totals = explain(run)
    data = json.loads(json.dumps(totals.as_dict(), allow_nan=False))
    keys = ["tokens", "rows", "passes", "tokens_per_pass", "all", "chosen", "seconds", "why", "sources", "unpriced"]
    assert list(data) == keys
    assert data["passes"] == run.forwards
    assert near(data["tokens_per_pass"] * data["passes"], run.tokens)
    assert list(data["seconds"]) == [*totals.seconds, "step"]
    assert all(set(group) == GROUP for group in (data["all"], data["chosen"], *data["why"].values()))
    assert all(set(worth) == WORTH for worth in data["sources"].values())
    for name, worth in totals.sources.items():
        assert all(data["sources"][name][key] == getattr(worth, key) for key in WORTH)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> str:
    EXAMPLE.save(tmp_path / "trace.jsonl")
    return str(tmp_path / "trace.jsonl")


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


TEXT = """\
8 tokens in 6 passes with the prefill, 1.33 tokens per pass in each of 2 rows;
3.00 a pass expected, 3.00 came

time     seconds  ms a pass   share
draft      0.005      1.000    3.3%
mask       0.000      0.000    0.0%
forward    0.015      3.000   10.0%
verify     0.000      0.000    0.0%
cache      0.000      0.000    0.0%
learn      0.000      0.000    0.0%
other      0.130     26.000   86.7%
step       0.150     30.000  100.0%

why       passes  nodes  expected  came
fixed          1    9.0         -  2.00
pays           2    5.0      4.00  3.50
rests          1    1.0      2.00  2.00
explores       1    4.0      2.00  3.00

fixed     a number of nodes was given
pays      these nodes were worth more than they cost
rests     drafting has not paid lately, so nothing was drafted
explores  to learn what a pass of this size costs and brings

source  nodes  accepted  hit rate  earned ms  cost ms  net ms
prompt     11         3     27.3%       20.0      6.0    14.0
pool        7         1     14.3%       10.0      7.0     3.0
late        8         0      0.0%          -        -       -

2 passes did not know yet what a token is worth: earned, cost and net leave that
out
"""
STEPS = """
pass  nodes  expected  came  why          ms
   1      4      2.00     3  explores  30.00
   2      5      4.50     4  pays      40.00
   3      1      2.00     2  rests     20.00
   4      5      3.50     3  pays      40.00
   5      9         -     2  fixed     20.00
"""


def stripped(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.parametrize(("more", "text"), [([], TEXT), (["--steps"], TEXT + STEPS)])
def test_a_trace_is_told_in_tables(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str], text: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out, err = written(capsys, ["explain", trace, *more])
    assert (stripped(out), err) == (text, "")


def test_standard_input_is_read(
    trace: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(trace).read_bytes()), encoding="utf-8"))
    assert json.loads(written(capsys, ["explain", "-", "--json"])[0]) == explain(EXAMPLE).as_dict()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}\n"), encoding="utf-8"))
    assert "standard input, line 1: not a trace" in refusal(capsys, ["explain", "-"])
    monkeypatch.setattr(sys, "stdin", None)
    assert "no standard input" in refusal(capsys, ["explain", "-"])


def test_runs_that_leave_something_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(1, ()).save(tmp_path / "none")
    Run(3, (Pass(1, (2,)),)).save(tmp_path / "bare")
    Run(3, (Pass(1, (2,), 1.5, "a new one", step_s=1.0),)).save(tmp_path / "new")
    assert written(capsys, ["explain", str(tmp_path / "none")])[0] == (
        "1 token in 1 pass with the prefill, 1.00 tokens per pass\n"
    )
    bare, new = (written(capsys, ["explain", str(tmp_path / name)])[0] for name in ("bare", "new"))
    assert bare.startswith("3 tokens in 2 passes with the prefill, 1.50 tokens per pass\n\n")
    for out in (bare, new):
        assert "source" not in out
        assert "earned" not in out
    assert "a new one  a reason that this version does not know" in new


@pytest.mark.parametrize("width", [40, 44, 60, 71, 72, 80, 120])
@settings(max_examples=50, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(run=runs(largest=900))
def test_tables_fit_the_terminal_and_keep_their_figures(width: int, run: Run) -> None:
    if not run.passes:
        return
    from lookahead.screen import Screen

    file = io.StringIO()
    screen = Screen()
    screen.file, screen.width = file, width
    totals = explain(run)
    for made in (explain_command.times, explain_command.reasons, explain_command.sources):
        screen.print(made(totals, width))
    screen.print(explain_command.meanings(totals))
    screen.print(explain_command.passes(run.passes, width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in file.getvalue()
    for group in totals.why.values():
        assert any(line.split()[-1:] == [f"{group.committed / group.passes:.2f}"] for line in lines)
    for worth in totals.sources.values():
        net = f"{1e3 * worth.net_s:.1f}" if worth.priced else "-"
        assert any(line.split()[-1:] == [net] for line in lines)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["."], ".: is a directory"),
        ([__file__], f"{__file__}, line 1: not JSON"),
        (["--steps"], "TRACE"),
        (["a", "b"], "b"),
        (["a", "--steps", "--json"], "--json"),
        (["a", "--step"], "--step"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], given: list[str], says: str) -> None:
    assert says in refusal(capsys, ["explain", *given])


def test_nothing_asked_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = written(capsys, ["explain"], 2)
    assert "TRACE" in out
    shown = " ".join(written(capsys, ["explain", "--help"])[0].split())
    keys: list[Any] = [*explain(EXAMPLE).as_dict(), *GROUP, *WORTH, *PARTS, "other", "step"]
    assert all(key in shown.split("keys of --json")[1] for key in keys)


def test_nothing_heavy_is_loaded(trace: str) -> None:
    heavy = "{'torch', 'transformers', 'numba', 'numpy', 'lookahead.compare'}"
    for more in ("'--steps'", "'--json'"):
        code = f"import sys; from lookahead.cli import main; main(['explain', {trace!r}, {more}])"
        code += f"; print({heavy} & {{*sys.modules}})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("set()\n")
