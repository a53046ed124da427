"""The pictures of token trees: well-formed, small, complete, and safe with whatever a model wrote."""

from __future__ import annotations

import contextlib
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tree_picture
from hypothesis import given
from showcase import EXAMPLE, HOSTILE, OLD, WORDS, long_run
from traces import runs
from tree_picture import NothingToShow, draw

from lookahead.trace import Run

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
LARGEST = 30_000


def boxes(text: str) -> list[str]:
    """Return the state of every node; the legend has smaller boxes."""
    found = ElementTree.fromstring(text).iter(f"{SVG}rect")
    return [box.get("class", "")[4:] for box in found if box.get("height") == str(tree_picture.BOX)]


def words(text: str) -> list[str]:
    return [str(one.text) for one in ElementTree.fromstring(text).iter(f"{SVG}text")]


def test_every_node_is_drawn_with_what_became_of_it() -> None:
    text = draw(EXAMPLE, 1)
    assert sorted(boxes(text)) == ["accepted", "accepted", "own", "probe", "pruned", "rejected", "root"]
    for said in ("pass 1", "4 nodes ran, 2 accepted; 3 tokens came of it; 1 more were proposed", "90%", "25%", "0%"):
        assert said in words(text)
    for letters, name in (("Pr", "prompt"), ("Po", "pool"), ("Re", "recycle"), ("Gr", "grammar"), ("Ja", "jacobi")):
        assert words(text).count(letters) == 2  # at the node, and in the legend
        assert f"by {name}" in words(text)


def test_a_source_of_the_user_has_its_number() -> None:
    text = draw(EXAMPLE, 2, row=1)
    assert {"S0", "S3", "by source 0", "by source 3", "<1%"} <= set(words(text))


def test_hostile_words_are_text() -> None:
    for word in HOSTILE:
        said = replace(EXAMPLE.wording, words=dict.fromkeys(WORDS, word), prompts=(word, word))  # type: ignore[type-var]
        text = draw(replace(EXAMPLE, wording=said), 1)
        picture = ElementTree.fromstring(text.encode())
        assert {element.tag for element in picture.iter()} == {
            f"{SVG}{tag}" for tag in ("svg", "title", "style", "rect", "path", "text")
        }
        assert not any(name.startswith("on") or "href" in name for element in picture.iter() for name in element.attrib)
        assert not set(text) & set("\0\u2028\u202e\u2066\ud800\udc00\ufeff")


def test_boxes_keep_apart_and_within_the_picture() -> None:
    for run, number in ((EXAMPLE, 1), (long_run(8), 5), (long_run(3, nodes=400), 2)):
        picture = ElementTree.fromstring(draw(run, number))
        _, _, width, high = map(float, picture.get("viewBox", "").split())
        places = [
            tuple(float(box.get(name, "")) for name in ("x", "y", "width", "height"))
            for box in picture.iter(f"{SVG}rect")
            if box.get("class", "").startswith("box")
        ]
        assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= high for x, y, w, h in places)
        for i, (x, y, w, h) in enumerate(places):
            assert all(x >= a + b or a >= x + w or y >= c + d or c >= y + h for a, c, b, d in places[:i])
        assert len(draw(run, number).encode()) < 2 * LARGEST


@given(runs())
def test_any_trace_gives_a_picture_or_a_reason(run: Run) -> None:
    for number in range(1, len(run.passes) + 2):
        for row in range(2):
            drafted = number <= len(run.passes) and any(tree.row == row for tree in run.passes[number - 1].trees)
            with contextlib.nullcontext() if drafted else pytest.raises(NothingToShow, match=f"--pass {number}: "):
                ElementTree.fromstring(draw(run, number, row).encode())


def test_traces_without_texts_show_ids() -> None:
    with pytest.raises(NothingToShow, match="no pass"):
        draw(OLD, 1)
    assert "#1" in words(draw(replace(EXAMPLE, wording=None), 1))


def test_the_command_writes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EXAMPLE.save(tmp_path / "trace.jsonl")
    command = ["tree_picture.py", str(tmp_path / "trace.jsonl"), "--pass", "1", "-o", str(tmp_path / "tree.svg")]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(tree_picture.__file__, run_name="__main__")
    assert boxes((tmp_path / "tree.svg").read_text("utf-8"))[0] == "root"
    monkeypatch.setattr(sys, "argv", [*command[:3], "9", *command[4:]])
    with pytest.raises(SystemExit, match="the trace has 3 passes"):
        runpy.run_path(tree_picture.__file__, run_name="__main__")


@pytest.mark.parametrize(("name", "states"), [("edit", {"rejected"}), ("json", {"rejected", "pruned"})])
def test_committed_pictures_are_as_the_page_says(name: str, states: set[str]) -> None:
    text = (ROOT / "docs" / f"tree-{name}.svg").read_text("utf-8")
    assert {"root", "accepted", "own"} | states == set(boxes(text))
    assert len(text.encode()) < LARGEST
    assert "prefers-color-scheme:dark" in text
