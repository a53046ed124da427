"""Draw the window of lookahead decoding at work: three consecutive passes of a real run, as SVG.

    python benchmarks/window_picture.py [--task json-2] [--out docs/lookahead.svg]

The bundled demo model answers one of its own prompts with a window of 5 columns and n-grams of 4 tokens, and nothing
else to draft from. Those three passes are drawn whose last one accepts most tokens of n-grams that the two before it
wrote first, in a tree that is small enough to draw. The same model and libraries give the same file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead
from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.trace import Step

PICTURE = Path(__file__).parent.parent / "docs" / "lookahead.svg"
WINDOW, NGRAM, VERIFY = 5, 4, 5
NEW = 96
SHOWN = 3  # passes
DEEPEST, BRANCHES = 4, 3  # of a tree that is drawn

Ngram = tuple[int, ...]  # the key and what follows it


class NothingToShow(Exception):
    """No such prompt, or no three passes that tell the story."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One pass.

    Attributes:
        number: counted from 1, the first one after the prefill.
        text: all tokens before the pass, the last one being the root.
        draft: what ran, the window's probes included.
        levels: [N - 1, W] the guesses; that of level 0 and column 0 is the root.
        nodes: [N - 1, W] their nodes.
        picks: [W] what the model picked at the end of each column.
        path: the accepted nodes, the root first.
        tokens: what was committed, the model's own pick last.
    """

    number: int
    text: list[int]
    draft: Draft
    levels: list[list[int]]
    nodes: list[list[int]]
    picks: list[int]
    path: list[int]
    tokens: list[int]

    @property
    def ngrams(self) -> list[Ngram]:
        """The n-gram that each column completes; empty where one of its guesses is not known."""
        columns = [(*column, pick) for *column, pick in zip(*self.levels, self.picks, strict=True)]
        return [column if min(column) >= 0 else () for column in columns]

    @property
    def drafted(self) -> list[int]:
        """The nodes that may be accepted, the root left out."""
        return [int(node) for node in np.flatnonzero(~self.draft.probe) if node > 0]

    def kind(self, node: int) -> str:
        """Return what became of a node."""
        if node == 0:
            return "root"
        return "probe" if self.draft.probe[node] else "accepted" if node in self.path else "rejected"

    @property
    def rejected(self) -> int:
        return len(self.drafted) - len(self.path) + 1

    @property
    def drawable(self) -> bool:
        """Whether the drafted tree fits beside the window."""
        leaves = set(self.drafted) - set(self.draft.parents[self.drafted].tolist())
        return int(self.draft.depth[self.drafted].max(initial=0)) <= DEEPEST and len(leaves) <= BRANCHES


class Recorder(Drafter):
    """Passes everything on to the default drafter and notes what its window does; for one row.

    Attributes:
        passes: those in which the window had all its levels and nothing was cut.
    """

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.passes = inner, list[Seen]()
        self._number, self._text = 0, list[int]()

    @property
    def probes(self) -> int:
        return self.inner.probes

    def start(self, context: IntArray) -> Drafter:
        self.inner = self.inner.start(context)
        return self

    def propose(self, context: IntArray, budget: int) -> Draft:
        self._text, self._number = context.tolist(), self._number + 1
        self._laid = self.inner.propose(context, budget)
        self._levels, self._nodes = self._guesses.levels.copy(), self._guesses.nodes.copy()
        self._columns = int(self._guesses.state[1])
        return self._laid

    def observe(self, step: Step) -> None:
        self.inner.observe(step)
        if self._columns != WINDOW or len(step.draft) != len(self._laid):
            return
        levels, nodes = self._levels[:, :WINDOW].tolist(), self._nodes[:, :WINDOW].tolist()
        levels[0][0] = self._text[-1]
        picks = step.top_tokens[nodes[-1], 0].tolist()
        path, tokens = step.path.tolist(), step.tokens.tolist()
        self.passes.append(Seen(self._number, self._text, step.draft, levels, nodes, picks, path, tokens))

    @property
    def _guesses(self) -> Any:
        return self.inner._window.guesses  # type: ignore[attr-defined]  # there is no interface: nobody else looks in


def record(task: str) -> tuple[Any, list[Seen]]:
    """Return the tokenizer and what happened on the demo model's prompt `task`."""
    directory = Path(lookahead.demo_path())
    prompts = {item["task"]: item["prompt"] for item in json.loads((directory / "prompts.json").read_text("utf-8"))}
    if task not in prompts:
        raise NothingToShow(f"--task {task}: not one of {', '.join(prompts)}")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    jacobi = lookahead.Jacobi(window=WINDOW, ngram=NGRAM, verify=VERIFY, switch="on")
    la = lookahead.Lookahead(model, sources=(jacobi,), nodes=VERIFY * (NGRAM - 1))
    la.drafter = recorder = Recorder(la.drafter)
    ids = torch.tensor([tokenizer(prompts[task])["input_ids"]])
    la.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return tokenizer, recorder.passes


@dataclass(frozen=True, slots=True)
class Use:
    """An n-gram that one shown pass wrote and the last one accepted.

    Attributes:
        number, column: where it was written.
        at: place of its key in the last pass's path.
        accepted: how many of the tokens that follow the key were drafted and accepted there.
    """

    ngram: Ngram
    number: int
    column: int
    at: int
    accepted: int


def choose(passes: Sequence[Seen]) -> tuple[list[Seen], list[Use]]:
    """Return the passes to show and the n-grams to follow through them.

    Raises:
        NothingToShow: no pass accepts two tokens of an n-gram that one of the passes just before it wrote first.
    """
    best: tuple[Any, list[Seen], list[Use]] | None = None
    known: set[Ngram] = set()
    for end in range(len(passes)):
        shown = list(passes[max(end - SHOWN + 1, 0) : end + 1])
        if len(shown) == SHOWN and shown[-1].number - shown[0].number == SHOWN - 1 and all(s.drawable for s in shown):
            uses = list(_uses(shown, known))
            score = (sum(use.accepted for use in uses), shown[-1].rejected > 0, -len(shown[-1].drafted))
            if uses and (best is None or score > best[0]):
                best = score, shown, uses
        if end >= SHOWN - 1:
            known |= {ngram[:3] for ngram in passes[end - SHOWN + 1].ngrams}
    if best is None:
        raise NothingToShow("no pass accepts what one of the passes before it wrote; take another --task")
    return best[1], best[2]


def _uses(shown: Sequence[Seen], known: set[Ngram]) -> Iterator[Use]:
    """Yield of each earlier pass the n-gram that the last one accepts most of, if its beginning was not `known`."""
    seen, path = set(known), shown[-1].draft.tokens[shown[-1].path].tolist()
    for one in shown[:-1]:
        found = []
        for column, ngram in enumerate(one.ngrams):
            for at, key in enumerate(path):
                same = 0
                while ngram and same + 1 < len(ngram) and path[at + 1 :][same : same + 1] == [ngram[same + 1]]:
                    same += 1
                if ngram and key == ngram[0] and same > 1 and ngram[:3] not in seen:
                    found.append(Use(ngram, one.number, column, at, same))
        seen |= {ngram[:3] for ngram in one.ngrams}
        if found:
            yield max(found, key=lambda use: use.accepted)


WIDTH, MARGIN = 900, 20
CELL, PITCH, HIGH, LINE = 62, 70, 24, 30  # width and pitch of a cell, height and pitch of a row
GRID = 148  # where the window's columns begin
TREE, NODE, STEP = 534, 52, 60  # where the drafted tree begins, width and pitch of its nodes
LONGEST, LETTER = 7, 6.7  # characters of a token, and how wide one is
BEFORE = 8  # tokens of the text
PANEL = 58 + LINE * NGRAM + 26
TINTS = NGRAM  # so many passes are to be seen in one window

STYLE = """
.page{fill:#fff;stroke:#d0d7de}.title,.word{fill:#1f2328}.word{font:11px ui-monospace,Menlo,Consolas,monospace}
.title{font:bold 14px system-ui,sans-serif}.note{fill:#59636e;font:11px system-ui,sans-serif}
.mid{text-anchor:middle}.end{text-anchor:end}.edge{fill:none;stroke:#8c959f}
.box{fill:#fff;stroke:#d0d7de}.root{fill:#1f2328;stroke:#1f2328}.on-root{fill:#fff}
.accepted{fill:#dafbe1;stroke:#1a7f37}.own{fill:#ddf4ff;stroke:#0969da}.on-rejected{fill:#8c959f}
.probe{stroke:#818b98;stroke-dasharray:3 2}.said{stroke:#818b98}
.tint0{fill:#f8ecd4}.tint1{fill:#ece4fa}.tint2{fill:#d9eef2}.tint3{fill:#fce3ec}
.gram{fill:none;stroke-width:2}.gram0{stroke:#bc4c00}.gram1{stroke:#8250df}
.on-gram0{fill:#bc4c00}.on-gram1{fill:#8250df}
@media (prefers-color-scheme:dark){
.page{fill:#0d1117;stroke:#3d444d}.title,.word{fill:#e6edf3}.note{fill:#9198a1}.edge{stroke:#656c76}
.box{fill:#0d1117;stroke:#3d444d}.root{fill:#e6edf3;stroke:#e6edf3}.on-root{fill:#0d1117}
.accepted{fill:#12361f;stroke:#3fb950}.own{fill:#0c2d4f;stroke:#58a6ff}.on-rejected{fill:#656c76}
.probe,.said{stroke:#7d8590}.tint0{fill:#3b301b}.tint1{fill:#2d2645}.tint2{fill:#15343b}.tint3{fill:#42212d}
.gram0{stroke:#f0883e}.gram1{stroke:#a371f7}.on-gram0{fill:#f0883e}.on-gram1{fill:#a371f7}}
"""


@dataclass(slots=True)
class Canvas:
    """SVG elements, one a line."""

    tokenizer: Any
    lines: list[str] = field(default_factory=list)

    def write(self, x: float, y: float, text: str, kind: str) -> None:
        self.lines.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def rect(self, x: float, y: float, width: float, high: float, kind: str) -> None:
        self.lines.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{high:g}" rx="4"/>')

    def line(self, path: str, kind: str) -> None:
        self.lines.append(f'<path class="{kind}" d="{path}"/>')

    def box(self, x: float, y: float, token: int, kind: str = "", width: float = CELL) -> None:
        """Draw a token in a box; `kind` is one of the classes root, accepted, rejected, own, probe and said."""
        self.rect(x, y, width, HIGH, f"box {kind}".rstrip())
        self.write(x + width / 2, y + 16, self.spell(token), f"word mid{f' on-{kind}' if kind else ''}")

    def spell(self, token: int) -> str:
        """Return the text of a token, its white space made visible."""
        text = "?" if token < 0 else self.tokenizer.decode([token])
        text = text.replace("\n", "⏎").replace(" ", "·")
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def draw(tokenizer: Any, passes: Sequence[Seen], uses: Sequence[Use]) -> str:
    """Return the picture as SVG."""
    canvas = Canvas(tokenizer)
    for i, one in enumerate(passes):
        top = MARGIN + PANEL * i
        canvas.lines.append(f'<g id="pass{one.number}">')
        _draw_text(canvas, one, top)
        _draw_window(canvas, one, uses, top + 58)
        _draw_tree(canvas, one, uses if i == len(passes) - 1 else (), top + 58)
        _draw_kept(canvas, one, uses, top + 58)
        canvas.lines.append("</g>")
    high = MARGIN + PANEL * len(passes) + 62
    _draw_legend(canvas, high - 62)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" width="{WIDTH}" height="{high}" '
        'role="img" aria-labelledby="name">',
        '<title id="name">Three passes of lookahead decoding: the window, its n-grams, and the tree they draft</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{high - 1}" rx="8"/>',
    ]
    return "\n".join([*head, *canvas.lines, "</svg>"]) + "\n"


def _draw_text(canvas: Canvas, one: Seen, top: float) -> None:
    """Draw the end of the text, and what the pass adds to it."""
    canvas.write(MARGIN, top + 17, f"pass {one.number}", "title")
    canvas.write(GRID - 14, top + 16, "text …", "note end")
    x = float(GRID)
    for i, token in enumerate(one.text[-BEFORE:]):
        width = 9 + LETTER * len(canvas.spell(token))
        canvas.box(x, top, token, "root" if i == BEFORE - 1 else "", width)
        x += width + 3
    canvas.write(TREE, top + 16, f"adds {len(one.tokens)} token{'s' if len(one.tokens) > 1 else ''}", "note")


def _draw_window(canvas: Canvas, one: Seen, uses: Sequence[Use], top: float) -> None:
    """Draw the levels, oldest first, and what the model picked below them; each pass's guesses have a tint."""
    for column in range(WINDOW):
        canvas.write(GRID + PITCH * column + CELL / 2, top - 8, f"column {column}", "note mid")
    for level, tokens in enumerate([*one.levels, one.picks]):
        y, last = top + LINE * level, level == len(one.levels)
        said = one.number - len(one.levels) + level
        canvas.rect(GRID - 4, y - 3, PITCH * WINDOW, LINE, f"tint{said % TINTS}")
        canvas.write(MARGIN, y + 16, "picks" if last else f"level {level}", "note")
        canvas.write(GRID - 14, y + 16, "of this pass" if last else f"of pass {said}", "note end")
        for column, token in enumerate(tokens):
            kind = "said" if last else one.kind(one.nodes[level][column])
            canvas.box(GRID + PITCH * column, y, token, kind)
        if level > 0:
            x = GRID + PITCH * WINDOW + 6
            canvas.line(f"M{x} {y + 10:g}v-{LINE - 10}m-4 5l4 -5l4 5", "edge")
    for i, use in enumerate(uses):
        if use.number == one.number:
            canvas.rect(GRID + PITCH * use.column - 3, top - 2, CELL + 6, LINE * NGRAM - 2, f"gram gram{i}")


def _draw_kept(canvas: Canvas, one: Seen, uses: Sequence[Use], top: float) -> None:
    """Write below the tree which n-gram the outlined column completes."""
    y = top + LINE * (NGRAM - 1)
    for i, use in enumerate(uses):
        if use.number == one.number:
            canvas.write(TREE, y - 8, f"n-gram that column {use.column} completes, key first", f"note on-gram{i}")
            for j, token in enumerate(use.ngram):
                canvas.box(TREE + STEP * j, y, token, f"gram{i}", NODE)


def _draw_tree(canvas: Canvas, one: Seen, uses: Sequence[Use], top: float) -> None:
    """Draw what was drafted, the accepted path straight on, and above it the n-grams that it was drafted from."""
    canvas.write(TREE, top - 8, "draft tree", "note")
    for i, use in enumerate(uses):
        x, y = TREE + STEP * use.at, top + 18 + 20 * i
        canvas.write(x, y - 4, f"n-gram of pass {use.number}", f"note on-gram{i}")
        canvas.line(f"M{x} {y + 4}v-4h{STEP * use.accepted + NODE}v4", f"gram gram{i}")
    top += 20 * len(uses) + 6 * (len(uses) > 0)
    rows = _rows(one)
    for node, row in rows.items():
        if node > 0:
            above, depth = int(one.draft.parents[node]), int(one.draft.depth[node])
            _draw_edge(canvas, top, depth, rows[above], row)
            canvas.box(TREE + STEP * depth, top + LINE * row, int(one.draft.tokens[node]), one.kind(node), NODE)
    canvas.box(TREE, top, one.text[-1], "root", NODE)
    _draw_edge(canvas, top, len(one.path), 0, 0)
    canvas.box(TREE + STEP * len(one.path), top, one.tokens[-1], "own", NODE)


def _draw_edge(canvas: Canvas, top: float, depth: int, above: int, row: int) -> None:
    x, y = TREE + STEP * depth, top + HIGH / 2
    middle = f"h{(STEP - NODE) / 2:g}V{y + LINE * row:g}H{x}"
    canvas.line(f"M{x - STEP + NODE} {y + LINE * above:g}{middle}", "edge")


def _rows(one: Seen) -> dict[int, int]:
    """Return the line of every drafted node: 0 for the accepted path, which ends in the model's own pick."""
    rows, used = dict.fromkeys(one.path, 0), 0
    for node in one.drafted:
        above = int(one.draft.parents[node])
        if node not in rows:
            first = above not in one.path and not any(one.draft.parents[other] == above for other in rows if other)
            used += not first
            rows[node] = rows[above] if first else used
    return rows


def _draw_legend(canvas: Canvas, top: float) -> None:
    entries = (
        ("root", "last token of the text"),
        ("accepted", "drafted, accepted"),
        ("rejected", "drafted, rejected"),
        ("own", "the model's own pick"),
        ("probe", "probe: runs, never accepted"),
    )
    x = float(MARGIN)
    for kind, text in entries:
        canvas.rect(x, top + 2, 22, 14, f"box {kind}")
        canvas.write(x + 28, top + 13, text, "note")
        x += 50 + 5.8 * len(text)
    notes = (
        "A column read downwards is an n-gram. Rows of one tint are what one pass picked: in each pass they move up,",
        "and the picks become the last level. “·” is a space, “⏎” a line break, “…” the rest of a longer token.",
    )
    for i, note in enumerate(notes):
        canvas.write(MARGIN, top + 34 + 15 * i, note, "note")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="json-2", help="of the demo model's prompts.json (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PICTURE, help="(default: docs/lookahead.svg)")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    tokenizer, passes = record(options.task)
    options.out.write_text(draw(tokenizer, *choose(passes)), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(arguments())
    except (NothingToShow, OSError) as error:
        raise SystemExit(f"window_picture.py: {error}") from None
