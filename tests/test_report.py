"""Laws of the page of a run: it holds the run, it is one file, and nothing that a model wrote can run in it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from showcase import EXAMPLE, HOSTILE, OLD, SCRIPT, long_run
from traces import runs, texts

from lookahead.cli import main
from lookahead.errors import InvalidArgument
from lookahead.explain import explain
from lookahead.report.data import data
from lookahead.report.embed import embedded
from lookahead.report.page import SCRIPTS, fragment, page
from lookahead.sources.codes import NAMES, name_of
from lookahead.trace import WHY, Run

ASSETS = files("lookahead.report")
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


class Elements(HTMLParser):
    """What a page consists of, as a browser would read it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside.append((f"/{tag}", ""))

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, text = self.inside[-1]
            self.inside[-1] = tag, text + data

    def texts(self, tag: str) -> list[str]:
        return [text for name, text in self.inside if name == tag]

    @property
    def run(self) -> Any:
        return json.loads(self.texts("script")[0])


# -- what could break out ---------------------------------------------------------------------------------------------


@given(anything)
def test_embedded_json_is_what_it_was_and_stays_in_its_element(value: Any) -> None:
    text = embedded(value)
    assert json.loads(text) == value
    assert not re.search("[<>&\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert text.encode().decode() == text


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_stay_in_their_element(word: str) -> None:
    assert json.loads(embedded({word: [word]})) == {word: [word]}
    shown = Elements(page(EXAMPLE, title=word))
    assert [tag for tag, _ in shown.tags] == [tag for tag, _ in Elements(page(EXAMPLE, title="calm")).tags]
    assert shown.run == Elements(page(EXAMPLE, title="calm")).run


@given(runs(), texts)
def test_a_page_is_the_same_elements_whatever_the_run_holds(run: Run, title: str) -> None:
    text = page(run, title=title)
    shown = Elements(text)
    assert text.encode().decode() == text
    assert [tag for tag, _ in shown.tags] == [tag for tag, _ in Elements(page(EXAMPLE)).tags]
    assert shown.run == json.loads(json.dumps(data(run)))


def test_a_page_asks_for_nothing_and_runs_nothing_but_its_own_script() -> None:
    shown = Elements(page(EXAMPLE))
    policy = next(given["content"] for tag, given in shown.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("img-src") == "data:"
    for kind, text in (("style", shown.texts("style")[0]), ("script", shown.texts("script")[1])):
        assert rules.pop(f"{kind}-src") == f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
    assert rules == {"base-uri": "'none'", "form-action": "'none'"}
    for _, attributes in shown.tags:
        assert not any(name.startswith("on") or name in ("style", "src") for name in attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"url\(|@import|https?:(?!//www.w3.org/2000/svg)", page(EXAMPLE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_write_text_only(name: str) -> None:
    text = ASSETS.joinpath(name).read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc|</|<!--", text
    )


def test_every_asset_is_used() -> None:
    kept = {item.name for item in ASSETS.iterdir() if item.name.endswith((".js", ".css", ".html"))}
    assert kept == {*SCRIPTS, "page.css", "page.html"}


# -- what it says -----------------------------------------------------------------------------------------------------


@given(runs())
def test_the_page_is_told_every_node_and_token(run: Run) -> None:
    said = data(run)
    ids, names = said["ids"], [source[0] for source in said["sources"]]
    assert [[ids[place] for place in line] for line in said["outputs"]] == [list(line) for line in run.outputs]
    if run.wording is None:
        assert said["words"] is said["pieces"] is None
        assert said["prompts"] == [list(line) for line in run.prompts]
    else:
        assert said["words"] == [run.wording.words.get(token) for token in ids]
        assert (said["pieces"], said["prompts"]) == (run.wording.outputs, run.wording.prompts)
    for one, told in zip(run.passes, said["passes"], strict=True):
        assert (told[0], told[1], said["why"][told[3]][0]) == (one.nodes, one.committed, one.why)
        assert [(names[place], ran, taken) for place, ran, taken in told[7]] == [
            (name, share.run, share.accepted) for name, share in one.sources.items()
        ]
        for tree, (row, ran, tokens, parents, chances, sources, probes, path) in zip(one.trees, told[8], strict=True):
            assert (row, ran, parents, probes, path) == (tree.row, tree.ran, tree.parents[1:], tree.probes, tree.path)
            assert [ids[place] for place in tokens] == list(tree.tokens)
            assert [names[place] for place in sources] == [name_of(code) for code in tree.sources[1:]]
            assert all(abs(1000 * a - b) <= 0.5 for a, b in zip(tree.chances[1:], chances, strict=True))


@given(runs(largest=1000))
def test_its_times_and_totals_are_those_of_explain(run: Run) -> None:
    said, totals = data(run), explain(run)
    assert dict(zip(said["parts"], said["seconds"], strict=True)) == {
        part: round(1e6 * seconds) for part, seconds in totals.seconds.items()
    }
    for one, told in zip(run.passes, said["passes"], strict=True):
        assert abs(sum(told[6]) - 1e6 * one.step_s) <= len(said["parts"])
    earned = {name: rest for name, _, *rest in said["sources"]}
    for name, worth in totals.sources.items():
        assert earned[name][:2] == [worth.run, worth.accepted]
        assert earned[name][2:] == (
            [round(1e6 * worth.earned_s), round(1e6 * worth.cost_s)] if worth.priced else [None, None]
        )
    assert {why: sentence for why, sentence, *_ in said["why"]}.items() <= {
        **WHY, "of a later version": "a reason that this version does not know",
    }.items()  # fmt: skip


def test_each_source_that_comes_along_has_a_colour_of_its_own() -> None:
    style = ASSETS.joinpath("page.css").read_text(encoding="utf-8")
    hues = {source[0]: source[1] for source in data(EXAMPLE)["sources"]}
    assert len({hues[name] for name in NAMES if name in hues}) == 5
    assert all(f"\n.h{hue} {{" in style for hue in hues.values())


@pytest.mark.parametrize("run", [Run(1, ()), Run(0, ()), OLD, EXAMPLE], ids=["prefill", "nothing", "old", "new"])
def test_headings_say_what_the_run_amounts_to(run: Run) -> None:
    shown = Elements(page(run, title="A & B"))
    assert shown.texts("title") == shown.texts("bdi") == ["A & B"]
    figures = dict(zip(shown.texts("dt"), shown.texts("dd"), strict=False))
    assert list(figures) == ["tokens", "passes", "tokens per pass", "seconds", "tokens per second"]
    assert figures["passes"] == str(run.forwards)
    assert figures["tokens"].split()[0] == str(sum(map(len, run.outputs)) or run.tokens * max(run.rows, 1))
    assert figures["seconds"] == (f"{run.seconds:.2f}" if run.seconds else "–")


def test_the_row_that_is_shown_first() -> None:
    assert Elements(page(EXAMPLE, row=1)).run["row"] == 1
    for row in (-1, 2):
        with pytest.raises(InvalidArgument, match="row="):
            page(EXAMPLE, row=row)


def test_a_long_run_is_a_small_page() -> None:
    run = long_run(200)
    assert len(page(run)) < 60_000 + 25 * sum(len(tree.tokens) for one in run.passes for tree in one.trees)


# -- in a notebook ----------------------------------------------------------------------------------------------------


class Spelling:
    """A tokenizer that says a token's number."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f"<{token}>" for token in tokens)

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


def test_a_notebook_shows_the_page_in_a_frame_of_its_own() -> None:
    run = Run(EXAMPLE.tokens, EXAMPLE.passes, 0.0, EXAMPLE.prompts, EXAMPLE.outputs, tokenizer=Spelling())
    shown = Elements(run._repr_html_())
    ((tag, frame),) = shown.tags
    assert tag == "iframe"
    assert frame["sandbox"] == "allow-scripts"
    assert frame["srcdoc"] == page(run)
    assert Elements(str(frame["srcdoc"])).run["pieces"][1] == ["<1>", "<2>", "<6>", "<8>"]


def test_a_frame_holds_whatever_a_page_holds() -> None:
    assert unescape(fragment(EXAMPLE).split('srcdoc="')[1].split('"')[0]) == page(EXAMPLE)


# -- contrast ---------------------------------------------------------------------------------------------------------

STYLE = ASSETS.joinpath("page.css").read_text(encoding="utf-8")
COLOURS = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", STYLE)}


def light(colour: tuple[float, ...]) -> float:
    """The relative luminance of WCAG 2."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_every_ground(theme: int) -> None:
    def colour(name: str) -> tuple[float, ...]:
        digits = COLOURS[name][theme]
        return tuple(int(digits[i : i + 2], 16) / 255 for i in (1, 3, 5))

    def tinted(name: str, share: float) -> tuple[float, ...]:
        return tuple(share * a + (1 - share) * b for a, b in zip(colour(name), colour("card"), strict=True))

    for ground in ("paper", "card", "line", "mark"):
        assert contrast(colour("ink"), colour(ground)) >= 4.5
    for ground in ("paper", "card"):
        assert contrast(colour("soft"), colour(ground)) >= 4.5
        assert contrast(colour("edge"), colour(ground)) >= 3
        assert contrast(colour("focus"), colour(ground)) >= 3
    for hue in range(len(NAMES) + 3):
        assert contrast(colour("card"), colour(f"h{hue}")) >= 4.5
        for share in (20, 38):
            assert f"var(--own) {share}%" in STYLE
            assert contrast(colour("ink"), tinted(f"h{hue}", share / 100)) >= 4.5
        assert "var(--own) 9%" in STYLE
        assert contrast(colour("soft"), tinted(f"h{hue}", 0.09)) >= 4.5


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    EXAMPLE.save(tmp_path / "trace.jsonl")
    return tmp_path / "trace.jsonl"


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lookahead: ")
    assert err.count("\n") == 1
    return err


def test_the_page_lies_beside_the_trace(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trace)]) == 0
    written = trace.with_suffix(".html")
    assert capsys.readouterr().out == f"{written}\n"
    assert written.read_text(encoding="utf-8") == page(Run.load(trace), title="trace.jsonl")


def test_the_page_lies_where_it_is_asked_for(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("an older page")
    assert main(["report", str(trace), "-o", str(tmp_path / "page.html"), "--title", SCRIPT]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(Run.load(trace), title=SCRIPT)
    assert not trace.with_suffix(".html").exists()


def test_a_name_that_is_no_text(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        odd = trace.rename(trace.with_name(os.fsdecode(b"trace\xff.jsonl")))
    except OSError:
        pytest.skip("this file system has no such names")
    assert main(["report", str(odd)]) == 0
    assert capsys.readouterr().out.endswith("trace?.html\n")
    assert odd.with_suffix(".html").read_text(encoding="utf-8") == page(Run.load(odd), title="trace\ufffd.jsonl")


@pytest.mark.parametrize("more", [[], ["-o", "-"]])
def test_standard_input_and_output(
    trace: Path, more: list[str], capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(trace.read_bytes())))
    assert main(["report", "-", *more]) == 0
    assert capsysbinary.readouterr().out.decode() == page(Run.load(trace), title="Trace")


def test_the_trace_is_never_written_over(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, folder = trace.read_bytes(), trace.parent
    (folder / "link.html").symlink_to(trace)
    (folder / "hard.html").hardlink_to(trace)
    for output in (trace, folder / "." / "trace.jsonl", folder / "link.html", folder / "hard.html"):
        assert "the trace itself" in refusal(capsys, [str(trace), "-o", str(output)])
    assert "the trace itself" in refusal(capsys, [str(folder / "hard.html")])
    assert trace.read_bytes() == before


def test_what_cannot_be_used_gets_one_line(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refusal(capsys, [str(tmp_path / "none.jsonl")])
    assert "is a directory" in refusal(capsys, ["."])
    assert not (tmp_path / "none.html").exists()
    assert "give a file that can be written" in refusal(capsys, [str(trace), "-o", str(tmp_path)])
    (tmp_path / "text.jsonl").write_text("no trace")
    assert "line 1: not JSON" in refusal(capsys, [str(tmp_path / "text.jsonl")])
    assert not (tmp_path / "text.html").exists()


def test_nothing_asked_gets_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "--title" in capsys.readouterr().out


def test_old_traces_get_a_page(trace: Path) -> None:
    new = ("prefill_s", "prompts", "outputs", "wording", "trees")
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    old = [{name: value for name, value in line.items() if name not in new} for line in lines]
    trace.write_text("\n".join(map(json.dumps, old)))
    assert Run.load(trace) == OLD
    assert main(["report", str(trace)]) == 0
    said = Elements(trace.with_suffix(".html").read_text(encoding="utf-8")).run
    assert (said["outputs"], said["words"], [one[8] for one in said["passes"]]) == ([], None, [[], [], []])
    assert [one[1] for one in said["passes"]] == [[3, 1], [0, 1], [2, 1]]


def test_a_page_is_written_without_torch_and_numba(trace: Path) -> None:
    script = (
        "import sys; from lookahead.cli import main; "
        f"assert main(['report', {str(trace)!r}]) == 0; "
        "assert not {'torch', 'numba', 'numpy', 'transformers'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
