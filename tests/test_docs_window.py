"""The picture of docs/lookahead.md is what its script draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import window_picture
from window_picture import Seen, Use

DOCS = Path(__file__).parent.parent / "docs"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def recorded() -> tuple[Any, list[Seen]]:
    return window_picture.record("json-2")


@pytest.fixture(scope="module")
def story(recorded: tuple[Any, list[Seen]]) -> tuple[list[Seen], list[Use]]:
    return window_picture.choose(recorded[1])


def classes(picture: ElementTree.Element) -> set[str]:
    return {name for element in picture.iter() for name in element.get("class", "").split()}


def test_last_pass_accepts_what_the_others_wrote(story: tuple[list[Seen], list[Use]]) -> None:
    passes, uses = story
    first, last = passes[0], passes[-1]
    assert [one.number for one in passes] == [first.number, first.number + 1, first.number + 2]
    path = last.draft.tokens[last.path].tolist()
    for use in uses:
        column = [level[use.column] for level in passes[use.number - first.number].levels]
        assert (*column, passes[use.number - first.number].picks[use.column]) == use.ngram
        assert list(use.ngram[: use.accepted + 1]) == path[use.at : use.at + use.accepted + 1]
        assert use.accepted >= 2
        assert use.number < last.number


def test_passes_follow_each_other(story: tuple[list[Seen], list[Use]]) -> None:
    for one, other in zip(story[0], story[0][1:], strict=False):
        assert other.text == one.text + one.tokens
        assert other.levels[-1] == one.picks
        assert [level[1:] for level in other.levels[:-1]] == [level[1:] for level in one.levels[1:]]


def test_picture_shows_the_story(recorded: tuple[Any, list[Seen]], story: tuple[list[Seen], list[Use]]) -> None:
    tokenizer, (passes, uses) = recorded[0], story
    text = window_picture.draw(tokenizer, passes, uses)
    assert text == window_picture.draw(tokenizer, *window_picture.choose(recorded[1]))
    picture = ElementTree.fromstring(text)
    for one in passes:
        group = picture.find(f"{SVG}g[@id='pass{one.number}']")
        assert group is not None
        boxes = [element.get("class", "") for element in group.iter(f"{SVG}rect")]
        accepted = [kind for kind in boxes if kind == "box accepted"]
        assert len(accepted) >= len(one.path) - 1
        assert boxes.count("box own") == 1
        assert boxes.count("box said") == window_picture.WINDOW


def test_picture_fits_its_frame(recorded: tuple[Any, list[Seen]], story: tuple[list[Seen], list[Use]]) -> None:
    picture = ElementTree.fromstring(window_picture.draw(recorded[0], *story))
    _, _, width, height = map(float, picture.get("viewBox", "").split())
    for box in picture.iter(f"{SVG}rect"):
        x, y, wide, high = (float(box.get(name, "")) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + wide <= width
        assert y + high <= height


def test_markup_in_tokens_is_escaped() -> None:
    canvas = window_picture.Canvas(Spelling({1: "<a&b>", 2: "a\n  ", 3: "somewhat long"}))
    for token in (1, 2, 3):
        canvas.box(0, 0, token)
    words = ElementTree.fromstring(f"<svg>{''.join(canvas.lines)}</svg>").iter("text")
    assert [word.text for word in words] == ["<a&b>", "a⏎··", "somewh…"]
    assert "&lt;a&amp;b&gt;" in canvas.lines[1]


def test_committed_picture_is_of_this_script(
    recorded: tuple[Any, list[Seen]], story: tuple[list[Seen], list[Use]]
) -> None:
    written = (DOCS / "lookahead.svg").read_text(encoding="utf-8")
    again = window_picture.draw(recorded[0], *story)
    ours, theirs = ElementTree.fromstring(again), ElementTree.fromstring(written)
    fix = "run python benchmarks/window_picture.py, and see that docs/lookahead.md still tells what it shows"
    assert [group.get("id") for group in theirs.iter(f"{SVG}g")] == [
        group.get("id") for group in ours.iter(f"{SVG}g")
    ], fix
    assert classes(theirs) == classes(ours), fix
    assert theirs.get("viewBox") == ours.get("viewBox"), fix
    assert len(written.encode()) < 60_000
    assert "prefers-color-scheme:dark" in written
    assert "&lt;|eos|&gt;" in written


class Spelling:
    """A tokenizer that knows some words."""

    def __init__(self, words: dict[int, str]) -> None:
        self.words = words

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.words[token] for token in tokens)
