"""Laws of `lookahead bench`: fair turns, figures that add up, reasons for what cannot run, files that read back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, tiny

from lookahead import bench_command
from lookahead.bench import others, systems
from lookahead.bench.contest import Contest, Score
from lookahead.bench.outside import PeerFailed
from lookahead.bench.peak import Peak
from lookahead.bench.scoreboard import as_json, check_plot, markdown, plot
from lookahead.bench.systems import Answer, CannotRun
from lookahead.bench.workloads import Item, items_of, nothing_items, read_prompts
from lookahead.cli import main
from lookahead.compare import Task
from lookahead.errors import InvalidInput

ROOT = Path(__file__).parents[1]


@dataclass
class Fake:
    """A system that takes `seconds` and answers as it is told."""

    name: str
    seconds: float
    passes: int | None = 2
    tokens: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    settings: dict[str, Any] = field(default_factory=dict)
    fails: str = ""
    log: list[str] = field(default_factory=list)

    def run(self, item: Item) -> Answer:
        self.log.append(item.workload)
        if self.fails and item.workload == self.fails:
            raise CannotRun("does not do that")
        return Answer(self.tokens, self.seconds * len(item.ids), self.passes, 1.0)


ITEMS = [Item("a", (1,), 4), Item("a", (1, 2), 4), Item("b", (1,), 4)]


def contest(*more: Fake, rounds: int = 2, absent: dict[str, str] | None = None) -> Contest:
    one = Contest(ITEMS, [Fake("plain", 2.0, 4), *more], absent or {})
    one.warm_up()
    for _ in range(rounds):
        one.round()
    return one


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_sums_over_texts() -> None:
    scores = contest(Fake("fast", 0.5, 1), Fake("other", 4.0, None, [1, 2, 3])).scores()
    plain, fast, other = (scores["a"][name] for name in ("plain", "fast", "other"))
    assert (plain.seconds, plain.ratio, plain.tokens_per_pass, plain.identical) == (6.0, 1.0, 1.0, True)
    assert (fast.seconds, fast.ratio, fast.least, fast.most, fast.tokens_per_pass) == (1.5, 4.0, 4.0, 4.0, 4.0)
    assert (other.ratio, other.tokens_per_pass, other.identical, other.differing) == (0.5, None, False, 2)
    assert scores["b"]["fast"].seconds == 0.5


def test_what_cannot_run_is_listed_with_its_reason() -> None:
    scores = contest(Fake("some", 1.0, fails="b"), absent={"none": "is not there"}).scores()
    assert scores["a"]["some"].seconds == 3.0
    assert scores["b"]["some"] == Score(reason="does not do that")
    assert scores["a"]["none"] == scores["b"]["none"] == Score(reason="is not there")
    said = markdown(scores)
    assert "- some (b): does not do that" in said
    assert "- none: is not there" in said
    assert as_json(scores)["b"]["some"]["seconds"] is None
    assert as_json(scores)["b"]["some"]["reason"] == "does not do that"


def test_one_that_fails_is_not_asked_again() -> None:
    failing = Fake("some", 1.0, fails="a")
    contest(failing, rounds=3)
    assert Counter(failing.log) == {"a": 1, "b": 4}


def test_everybody_goes_first_as_often() -> None:
    order: list[str] = []

    class Logged(Fake):
        def run(self, item: Item) -> Answer:
            order.append(self.name)
            return super().run(item)

    three = Contest([Item("a", (1,), 4)], [Logged("plain", 1.0), Logged("x", 1.0), Logged("y", 1.0)])
    for _ in range(3):
        three.round()
    assert sorted(order[::3]) == ["plain", "x", "y"]


def test_figures_are_written_as_asked(tmp_path: Path) -> None:
    scores = contest(Fake("lookahead", 0.5, 1)).scores()
    found = json.loads(json.dumps(as_json(scores)))
    assert set(found) == {"a", "b"}
    assert {"seconds", "tokens_per_pass", "identical"} <= set(found["a"]["lookahead"])
    assert "| **lookahead** | **4.00x (4.00–4.00)** | **4.00x (4.00–4.00)** |" in markdown(scores)


def test_other_engines_are_judged_by_their_own_plain_decoding_too() -> None:
    said = markdown(contest(Fake("vLLM", 1.0), Fake("vLLM n-gram", 0.25)).scores())
    assert "| vLLM n-gram, against vLLM | 4.00x | 4.00x |" in said


def test_outputs_that_differ_are_told() -> None:
    said = markdown(contest(Fake("odd", 1.0, tokens=[9])).scores())
    assert "Outputs that are not those of plain `generate()`:\n\n- odd, a: 2\n- odd, b: 1" in said


@pytest.mark.parametrize("kind", [".png", ".svg"])
def test_pictures_are_drawn(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = contest(Fake("lookahead", 0.5, 1), Fake("some", 1.0, fails="b"), absent={"none": "is not there"}).scores()
    file = tmp_path / f"scores{kind}"
    check_plot(str(file))
    plot(scores, "title", str(file))
    assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_pictures_of_other_kinds_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"--plot scores\.gif: .*\.png or \.svg"):
        check_plot("scores.gif")


# -- systems ----------------------------------------------------------------------------------------------------------


def test_systems_here_write_what_plain_writes() -> None:
    model = tiny("llama", "sdpa", "float32")
    item = Item("a", tuple(range(8, 20)), 16, ends=False)
    plain = systems.plain(model, None).run(item)
    assert len(plain.tokens) == plain.passes == 16
    for system in (systems.ours(model, None), systems.ours(model, None, nodes=4), systems.prompt_lookup(model, None)):
        answer = system.run(item)
        assert answer.tokens == plain.tokens
        assert answer.passes is not None
        assert answer.passes <= plain.passes
        assert answer.seconds > 0


def test_an_error_of_a_peer_is_a_reason_and_one_of_ours_is_heard() -> None:
    def fails(given: dict[str, Any]) -> torch.Tensor:
        raise ValueError("not with this model")

    model = tiny("llama", "sdpa", "float32")
    with pytest.raises(CannotRun, match="ValueError: not with this model"):
        systems.Here("prompt lookup", model, None, lambda item: fails).run(ITEMS[0])
    for name in (systems.PLAIN, systems.OURS):
        with pytest.raises(ValueError, match="not with this model"):
            systems.Here(name, model, None, lambda item: fails).run(ITEMS[0])


def test_ours_remembers_only_what_came_before() -> None:
    model = tiny("llama", "sdpa", "float32")
    ids = tuple(range(8, 20))
    fresh, again, known = (Item("a", ids, 16, ends=False, before=before) for before in (None, (), (ids,)))
    ours = systems.ours(model, None, nodes=16)
    first = ours.run(fresh).passes
    assert first is not None
    assert ours.run(fresh).passes == ours.run(again).passes == first
    assert (ours.run(known).passes or 99) < first


def test_arctic_drafts_for_our_verifier() -> None:
    pytest.importorskip("arctic_inference")
    model = tiny("llama", "sdpa", "float32")
    ids = tuple(range(8, 20))
    item, known = Item("a", ids, 16, ends=False), Item("a", ids, 16, ends=False, before=(ids,))
    plain = systems.plain(model, None).run(item)
    for tree in (True, False):
        arctic = systems.arctic(model, None, tree=tree)
        assert arctic.run(item).tokens == plain.tokens
        assert arctic.run(known).tokens == plain.tokens
        assert (arctic.run(known).passes or 99) < 16


def test_arctic_that_is_not_installed_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    with pytest.raises(CannotRun, match=r"not installed .*pip install"):
        systems.arctic(tiny("llama"), None)


def test_memory_of_a_call_is_measured() -> None:
    with Peak() as peak:
        block = bytearray(60_000_000)
        block[::4096] = b"x" * len(block[::4096])
    assert peak.mb is None or peak.mb > 40


# -- others -----------------------------------------------------------------------------------------------------------


def test_peers_without_an_environment_are_listed(tmp_path: Path) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        running, absent = others.started(stack, tmp_path, tmp_path, dtype="float32", threads=1)
    assert running == []
    assert set(absent) == {peer.name for peer in others.PEERS}
    assert all("benchmarks/peers.sh" in reason for reason in absent.values())


class Silent:
    """A peer that fails."""

    about: dict[str, Any] = {"x": "1"}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012

    def run(self, *args: Any, **options: Any) -> Any:
        raise PeerFailed("it has ended")


def test_a_peer_that_ends_is_a_reason() -> None:
    peer = others.Started(others.PEERS[0], Silent())  # type: ignore[arg-type]
    with pytest.raises(CannotRun, match="it has ended"):
        peer.run(ITEMS[0])
    from lookahead import Grammar

    with pytest.raises(CannotRun, match="grammar"):
        peer.run(Item("a", (1,), 4, grammar=Grammar.json_schema({"type": "object"})))


def test_scripts_of_peers_are_there() -> None:
    for peer in others.PEERS:
        assert (others.HERE / peer.script).is_file()
        assert peer.environment in (ROOT / "benchmarks" / "peers.sh").read_text(encoding="utf-8")


# -- texts ------------------------------------------------------------------------------------------------------------


def test_prompts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "x"}, {"workload": "j", "prompt": "y", "max_new_tokens": 7, "schema": {"type": "object"}}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    tasks = read_prompts(str(file))
    assert [(task.kind, task.prompt, task.max_new_tokens, task.grammar is None) for task in tasks] == [
        ("prompts", "x", 128, True),
        ("j", "y", 7, True),
        ("j + schema", "y", 7, False),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing in it"),
        ("{", "line 1: not JSON"),
        ("[]", 'line 1: no "prompt"'),
        ('{"prompt": ""}', 'line 1: no "prompt"'),
        ('{"prompt": "x"}\n{"prompt": 3}', 'line 2: no "prompt"'),
        ('{"prompt": "x", "max_new_tokens": 0}', 'line 1: "max_new_tokens" is 0'),
        ('{"prompt": "x", "max_new_tokens": "9"}', "line 1: \"max_new_tokens\" is '9'"),
        ('{"prompt": "x", "schema": 3}', "line 1: "),
        ('{"prompt": "x", "schema": {"not": {}}}', "line 1: "),
    ],
)
def test_prompts_that_are_none_are_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_prompts(str(file))
    assert says in str(caught.value)
    with pytest.raises(InvalidInput, match="no such file"):
        read_prompts(str(tmp_path / "none"))


def test_items_fit_the_model() -> None:
    class Words:
        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            return {"input_ids": torch.tensor([[1] * len(texts[0])])}

    model = tiny("llama")
    task = Task("t", "k", "xxxx", 5, before=("yy",))
    assert items_of([task], Words(), model.config) == [Item("k", (1,) * 4, 5, before=((1, 1),))]
    texts = nothing_items(VOCAB, 2)
    assert texts == nothing_items(VOCAB, 2)
    assert all(3 <= token < VOCAB for item in texts for token in item.ids)


# -- the command ------------------------------------------------------------------------------------------------------


def test_it_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"workload": "mine", "prompt": "def add(a, b):", "max_new_tokens": 8}) + "\n")
    out, table = tmp_path / "scores.json", tmp_path / "scores.md"
    argv = ["bench", "--prompts", str(file), "--rounds", "1", "--peers", str(tmp_path), "--threads", "1"]
    assert main([*argv, "--json", str(out), "--markdown", str(table)]) == 0
    printed = capsys.readouterr()
    assert printed.out == table.read_text()
    assert printed.err == ""
    scores = json.loads(out.read_text())
    assert set(scores) == {"mine", "nothing to reuse"}
    for workload in scores.values():
        assert workload["plain"]["ratio"] == 1.0
        assert workload["lookahead"]["identical"] is True
        assert "benchmarks/peers.sh" in workload["vLLM n-gram"]["reason"]
    assert scores["mine"]["plain"]["tokens_per_pass"] == 1.0


def test_a_text_that_differs_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {
        "mine": {
            "plain": Score(1.0, 1.0, 1.0, 1.0, 1.0, True, 0),
            "lookahead": Score(1.0, 1.0, 1.0, 1.0, 1.0, False, 1),
        }
    }
    monkeypatch.setattr(bench_command, "_measure", lambda *args: (bad, "here"))
    assert main(["bench", "--peers", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--plot", "x.gif"], "--plot x.gif: give a file that ends in .png or .svg"),
        (["--json", "none/scores.json"], "--json none/scores.json: no such file"),
        (["--rounds", "0"], "--rounds: '0' does not do"),
        (["--model", "./none"], "--model ./none: no such directory"),
        (["--prompts", "none.jsonl"], "--prompts none.jsonl: no such file"),
        (["--threads", "0"], "--threads: '0' does not do"),
    ],
)
def test_bad_input_gets_one_line(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_models_without_prompts_need_some(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ROOT / "lookahead" / "demo" / name).read_bytes())
    assert main(["bench", "--model", str(tmp_path)]) == 2
    assert "give --prompts FILE" in capsys.readouterr().err


def test_the_line_protocol_needs_no_lookahead() -> None:
    """What peers import from here runs where there is no `lookahead`."""
    program = "import sys; sys.path[0] = sys.argv[1]; import peak, serving; assert 'lookahead' not in sys.modules"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1]); {program}", str(others.HERE)]
    subprocess.run(command, check=True)
