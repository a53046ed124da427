"""The page of a run in a real browser: it steps, it fits, and what a model wrote stays text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser as chromium
import pytest
from browser import Browser
from hypothesis import HealthCheck, given, settings
from showcase import EXAMPLE, OLD, long_run
from traces import runs

from lookahead.report.page import fragment, page
from lookahead.trace import Run

pytestmark = pytest.mark.skipif(not (chromium.CHROMIUM and chromium.DRIVER), reason=chromium.MISSING)

STEP = "document.documentElement.dataset.step"
NODES = """return [...document.querySelectorAll(".node")].map(
    (node) => [node.classList[1], node.querySelector(".word").textContent])"""
LOOKS = """return [...document.querySelectorAll(".node:not(.root)")].map((node) => {
    const look = getComputedStyle(node);
    return [node.classList[1], look.borderTopStyle + look.borderTopWidth + look.borderBottomWidth + look.borderRadius];
  })"""
TEXTS = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent.toWellFormed())"
CHOOSE = """const rows = document.getElementById("row");
    rows.value = arguments[0];
    rows.dispatchEvent(new Event("change"))"""
CLICK = """const bars = document.getElementById("timeline");
    const {left, width} = bars.getBoundingClientRect();
    for (const inside of [0.1, 0.9]) {
      bars.dispatchEvent(new MouseEvent("click", {clientX: left + ((arguments[0] + inside) * width) / 4}));
    }"""
FOCUS = """const at = document.activeElement;
    return [at.id || at.tagName + at.className, getComputedStyle(at).outlineStyle]"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with chromium.browser() as found:
        yield found


@pytest.fixture
def show(tab: Browser, tmp_path: Path) -> Iterator[Show]:
    """Open a run; whatever it is, the console stays empty and nothing of it runs."""
    tab.resize(1280)
    tab.prefer(color_scheme="light")
    found = Show(tab, tmp_path / "page.html")
    yield found
    found.check()


class Show:
    def __init__(self, tab: Browser, file: Path) -> None:
        self.tab, self._file = tab, file

    def __call__(self, run: Run, **options: int) -> Browser:
        self._file.write_text(page(run, **options), encoding="utf-8")
        self.tab.open(self._file)
        self.tab.wait("'ready' in document.documentElement.dataset")
        return self.tab

    def check(self) -> None:
        assert self.tab.complaints() == []
        assert self.tab.run("return [window.stolen, document.scripts.length, document.images.length]") == [None, 2, 0]


def step(tab: Browser) -> int:
    return int(tab.run(f"return {STEP}"))


def goes(tab: Browser, to: int) -> None:
    tab.wait(f"{STEP} === '{to}'")
    assert tab.run("return document.getElementById('slider').value") == str(to)


def text_of(tab: Browser, selector: str) -> list[str]:
    return list(tab.run(TEXTS, selector))


# -- stepping ---------------------------------------------------------------------------------------------------------


def test_it_opens_at_the_pass_with_the_most_tokens(show: Show) -> None:
    tab = show(EXAMPLE)
    goes(tab, 1)
    assert text_of(tab, "#where") == ["pass 1 of 3"]
    assert text_of(tab, ".now .token") == [" add", "\n    ", EXAMPLE.wording.words[3]]  # type: ignore[union-attr]
    assert text_of(tab, ".later") == [EXAMPLE.wording.words[4] + "\0\x1b\ufffd"]  # type: ignore[union-attr]


def test_buttons_keys_slider_timeline_and_tokens_step(show: Show) -> None:
    tab = show(EXAMPLE)
    for button, to in (("last", 3), ("next", 3), ("previous", 2), ("first", 0), ("previous", 0), ("next", 1)):
        tab.click(f"#{button}")
        goes(tab, to)
    tab.run("document.activeElement.blur()")
    for key, to in (("end", 3), ("right", 3), ("left", 2), ("home", 0), ("left", 0), ("right", 1)):
        tab.press(key)
        goes(tab, to)
    tab.run("document.getElementById('slider').focus()")
    for key, to in (("end", 3), ("left", 2), ("home", 0), ("right", 1)):
        tab.press(key)
        goes(tab, to)
    tab.click("#text .token")
    goes(tab, 0)
    tab.click("#text .token", at=5)
    goes(tab, 3)
    for to in (0, 3, 2, 1):
        tab.run(CLICK, to)
        goes(tab, to)


def test_it_plays_to_the_end_and_from_the_start(show: Show) -> None:
    tab = show(EXAMPLE)
    tab.run("document.activeElement.blur()")
    tab.press(" ")
    assert tab.run("return document.getElementById('play').getAttribute('aria-pressed')") == "true"
    goes(tab, 3)
    tab.wait("document.getElementById('play').getAttribute('aria-pressed') === 'false'")
    tab.click("#play")
    goes(tab, 0)
    goes(tab, 2)
    tab.click("#play")
    tab.wait("document.getElementById('play').getAttribute('aria-pressed') === 'false'")


def test_rows_of_the_batch(show: Show) -> None:
    tab = show(EXAMPLE, row=1)
    words = EXAMPLE.wording.outputs[1]  # type: ignore[union-attr]
    assert text_of(tab, "#text .token") == list(words)
    tab.run(CHOOSE, 0)
    assert len(text_of(tab, "#text .token")) == 6
    tab.press("home")
    goes(tab, 0)
    assert text_of(tab, ".now .token") == ["def"]


# -- what it shows ----------------------------------------------------------------------------------------------------


def test_nodes_are_told_apart(show: Show) -> None:
    tab = show(EXAMPLE)
    nodes = tab.run(NODES)
    assert sorted(nodes) == sorted(
        [
            ["root", "def"],
            ["accepted", "␣add"],
            ["accepted", "↵␣␣␣␣"],
            ["own", "</script><script>window.sto…"],
            ["rejected", "</script><script>window.sto…"],
            ["probe", "<img␣src=x␣onerror='window.…"],
            ["pruned", "⟨202E⟩right␣to␣left"],
        ]
    )
    looks = tab.run(LOOKS)
    assert len({look for _, look in looks}) == len({state for state, _ in looks}) == 5
    assert [text.split()[-1] for text in text_of(tab, ".node.accepted .note")] == ["90%", "50%"]
    assert tab.run("return document.querySelectorAll('#edges path').length") == len(nodes) - 1


def test_a_drafted_node_that_is_not_what_came(show: Show) -> None:
    tab = show(EXAMPLE, row=1)
    tab.press("right")
    goes(tab, 2)
    states = {word: state for state, word in tab.run(NODES)}
    assert states["↵␣␣␣␣"] == "root"
    assert states["</script><script>window.sto…"] == "rejected"
    assert states["⟨202E⟩right␣to␣left"] == "rejected"
    assert states["<img␣src=x␣onerror='window.…"] == "own"
    assert "<1%" in text_of(tab, ".node.rejected .note")[0]


def test_a_node_that_was_picked_though_the_row_went_no_further(show: Show) -> None:
    tab = show(EXAMPLE, row=1)
    tab.press("end")
    goes(tab, 3)
    assert tab.run(NODES) == [["root", "<img␣src=x␣onerror='window.…"], ["own", "∅"]]
    assert text_of(tab, ".node.own .note") == ["Pr 60%"]
    assert tab.run("return document.querySelector('.node.own').title.includes('went no further')")


def test_why_and_how_much(show: Show) -> None:
    tab = show(EXAMPLE)
    assert text_of(tab, "#why") == ["These nodes were worth more than they cost."]
    assert dict(zip(text_of(tab, "#numbers dt"), text_of(tab, "#numbers dd"), strict=True)) == {
        "nodes run, with the root": "5",
        "proposed, not run": "1",
        "tokens expected, all rows": "3.5",
        "tokens came, all rows": "4",
        "a token was worth": "2.00 ms",
        "one more node cost": "0.10 ms",
    }
    times = dict(zip(text_of(tab, "#times tbody th"), text_of(tab, "#times tbody td:nth-child(2)"), strict=True))
    assert (times[" forward"], times[" other"]) == ("5.00", "0.50")
    assert text_of(tab, "#sources tbody td:nth-child(2)")[:2] == ["1", "1"]
    tab.press("end")
    goes(tab, 3)
    assert text_of(tab, "#why") == ["A reason that this version does not know."]


def test_a_token_says_where_it_comes_from(show: Show) -> None:
    tab = show(EXAMPLE)
    tab.hover("#text .token", at=1)
    tab.wait("document.getElementById('tip').textContent === 'pass 1: accepted, source prompt, chance 90%'")
    tab.hover("#text .token", at=3)
    tab.wait("document.getElementById('tip').textContent === \"pass 1: the model's own pick\"")
    tab.run("document.querySelector('.now .token').focus()")
    tab.wait("document.getElementById('tip').textContent.includes('source prompt')")
    tab.press("escape")
    assert tab.run("return document.getElementById('tip').hidden")


def test_what_a_model_wrote_stays_text(show: Show) -> None:
    tab = show(EXAMPLE)
    for at in range(4):
        tab.press("home", *["right"] * at)
        goes(tab, at)
    words = EXAMPLE.wording
    assert words is not None
    assert text_of(tab, "#prompt-text") == [words.prompts[0]]
    assert text_of(tab, "#text .token")[3] == words.words[3]
    assert tab.run("return getComputedStyle(document.getElementById('text')).unicodeBidi") == "isolate"


def test_an_old_trace_and_a_run_without_passes(show: Show) -> None:
    tab = show(OLD)
    assert text_of(tab, "#text .count") == ["+1", "+3", "+2"]
    tab.press("end")
    goes(tab, 3)
    assert text_of(tab, ".now") == ["+2"]
    for run in (Run(1, ()), Run(0, ())):
        goes(show(run), 0)


def test_a_prompt_that_ran_with_the_first_draft(show: Show) -> None:
    first, *others = EXAMPLE.passes
    tab = show(replace(EXAMPLE, passes=(replace(first, opens=True), *others)))
    tab.press("home")
    goes(tab, 0)
    assert "first draft" in text_of(tab, "#came")[0]
    assert text_of(tab, ".now") == []
    tab.press("right")
    goes(tab, 1)
    assert text_of(tab, ".now")[0].startswith(text_of(tab, "#text .token")[0])


def test_ids_where_no_tokenizer_is_known(show: Show) -> None:
    tab = show(Run(EXAMPLE.tokens, EXAMPLE.passes, 0.0, EXAMPLE.prompts, EXAMPLE.outputs))
    assert text_of(tab, "#text .token") == ["0", "1", "2", "3", "4", "5"]
    assert text_of(tab, "#prompt-text") == ["5 6"]
    assert ["accepted", "#1"] in tab.run(NODES)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(runs())
def test_any_run_steps_from_end_to_end(show: Show, run: Run) -> None:
    tab = show(run)
    for row in range(max(run.rows, 1)):
        tab.run(CHOOSE, row)
        tab.press("home")
        goes(tab, 0)
        for at in range(1, len(run.passes) + 1):
            tab.press("right")
            goes(tab, at)
    show.check()


def test_thousands_of_tokens(show: Show) -> None:
    run = long_run(1900)
    tab = show(run)
    assert run.tokens > 5000
    assert len(text_of(tab, "#text .token")) == run.tokens
    tab.press("end", "left")
    goes(tab, 1899)


# -- everywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("run", [EXAMPLE, OLD, long_run(40)], ids=["new", "old", "long"])
def test_the_page_never_scrolls_sideways(show: Show, run: Run, width: int) -> None:
    show.tab.resize(width)
    tab = show(run)
    for at in range(min(len(run.passes), 3)):
        tab.press("home", *["right"] * at)
        goes(tab, at)
        wide = "[document.scrollingElement.scrollWidth, innerWidth]"
        assert tab.run(f"return {wide}") == [width, width]


def test_light_and_dark(show: Show) -> None:
    tab = show(EXAMPLE)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(f"return {paper}")
    tab.click("#theme")
    dark = tab.run(f"return {paper}")
    assert dark != light
    tab.click("#theme")
    assert tab.run(f"return {paper}") == light
    show.tab.prefer(color_scheme="dark")
    tab = show(EXAMPLE)
    assert tab.run(f"return {paper}") == dark
    tab.click("#theme")
    assert tab.run(f"return {paper}") == light


def test_all_controls_can_be_reached_by_keyboard_and_seen(show: Show) -> None:
    tab = show(EXAMPLE)
    tab.run("document.activeElement.blur()")
    reached = []
    for _ in range(15):
        tab.press("tab")
        name, outline = tab.run(FOCUS)
        reached.append(name)
        assert outline == "solid" or name == "BODY", name
    assert [name for name in reached if name.islower()][:8] == [
        "row", "theme", "first", "previous", "play", "next", "last", "slider",
    ]  # fmt: skip
    assert {"SUMMARY", "text", "tree"} <= set(reached)
    assert sum(name.startswith("SPANtoken") for name in reached) == 3


def test_everything_has_a_name(show: Show) -> None:
    tab = show(EXAMPLE)
    tree = tab.tools("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "slider", "combobox", "group", "navigation", "region", "image", "listitem"}
    named = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node["ignored"]]
    assert {role for role, _ in named} >= roles - {"listitem"}
    assert [role for role, name in named if role in roles - {"listitem"} and not name] == []
    assert ("slider", "Pass") in named


def test_the_policy_would_be_heard_of(tab: Browser, tmp_path: Path) -> None:
    """What a model wrote would not run even if it got into the page as markup, and these tests would notice."""
    inside = "<script>window.stolen = true</script></body>"
    (tmp_path / "page.html").write_text(page(EXAMPLE).replace("</body>", inside), encoding="utf-8")
    tab.open(tmp_path / "page.html")
    tab.wait("'ready' in document.documentElement.dataset")
    assert tab.run("return window.stolen") is None
    assert any("Content Security Policy" in said for said in tab.complaints())


def test_a_notebook_shows_it(tab: Browser, tmp_path: Path) -> None:
    tab.resize(900)
    (tmp_path / "book.html").write_text(f"<!DOCTYPE html><title>book</title>{fragment(EXAMPLE)}", encoding="utf-8")
    tab.open(tmp_path / "book.html")
    assert tab.run("return document.querySelector('iframe').contentDocument") is None  # another origin
    with tab.inside("iframe"):
        tab.wait("'ready' in document.documentElement.dataset")
        tab.click("#next")
        tab.wait(f"{STEP} === '2'")
        assert tab.run("return window.stolen") is None
    assert tab.complaints() == []
    assert tab.run("return document.scrollingElement.scrollWidth") <= 900
