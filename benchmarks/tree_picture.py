"""Draw the token tree of one pass of a trace, as SVG.

    lookahead generate --model demo --prompt-file prompt.txt --trace trace.jsonl
    python benchmarks/tree_picture.py trace.jsonl --pass 3 -o tree.svg

The accepted path runs along the top and ends in the model's own pick; what was rejected hangs below it. Each node says
who proposed it, by colour and letters, and how likely it was said to be accepted, given that its parent was. A trace
without texts is drawn with token ids.
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lookahead.errors import LookaheadError
from lookahead.sources.codes import NAMES, name_of
from lookahead.trace import Run
from lookahead.trees import Tree

MARGIN, TOP, BOX, PITCH, GAP = 16, 58, 36, 48, 18  # heights of the head and a node; from line to line; between nodes
LETTER, SLIM, NARROW = 7.3, 14, 62  # width of a letter, what a box adds to its word, and of the narrowest box
NOTE = 6.3  # width of a letter in a note
LEAST = 680  # width of the picture
CELL = 8  # pixels that are free or taken together
LONGEST, TAIL = 18, 60  # letters of a token, and of the text before
MOST = 120  # nodes that are drawn
SIGNS = {" ": "·", "\n": "⏎", "\t": "→"}
STATES = {
    "root": "last token of the text",
    "accepted": "accepted",
    "rejected": "rejected",
    "pruned": "proposed, not run",
    "probe": "probe: run, never accepted",
    "own": "the model's own pick",
}
HUES = (
    ("#6b7280", "#9aa3af"),
    ("#0069a8", "#5fb0ec"),
    ("#a86400", "#f0b03a"),
    ("#007a58", "#3cc79a"),
    ("#a83e78", "#e79cc6"),
    ("#bf4412", "#f5916a"),
    ("#5b4fc0", "#a79df5"),
)
"""Of sources by their code, on a light and on a dark page; the last one is for all that do not come along."""

LIGHT = """
.page{fill:#fff;stroke:#d0d7de}.title,.word{fill:#1f2328}.note{fill:#59636e}.edge{fill:none;stroke:#8c959f}
.box{fill:#fff;stroke:#afb8c1}.root{fill:#1f2328;stroke:#1f2328}.on-root{fill:#fff}
.accepted{fill:#dafbe1;stroke:#1a7f37;stroke-width:2}.own{fill:#ddf4ff;stroke:#0969da;stroke-width:2}
.pruned{stroke-dasharray:4 3}.probe{stroke-dasharray:1 3;stroke-linecap:round;stroke-width:2}
.on-rejected,.on-pruned,.on-probe{fill:#59636e}.letter{fill:#fff}.main{stroke:#1a7f37;stroke-width:2}
"""
DARK = """
.page{fill:#0d1117;stroke:#3d444d}.title,.word{fill:#e6edf3}.note{fill:#9198a1}.edge{stroke:#656c76}
.box{fill:#0d1117;stroke:#656c76}.root{fill:#e6edf3;stroke:#e6edf3}.on-root{fill:#0d1117}
.accepted{fill:#12361f;stroke:#3fb950}.own{fill:#0c2d4f;stroke:#58a6ff}
.on-rejected,.on-pruned,.on-probe{fill:#9198a1}.letter{fill:#0d1117}.main{stroke:#3fb950}
"""
FONTS = """
.title{font:bold 14px system-ui,sans-serif}.note{font:11px system-ui,sans-serif}
.word,.text{font:12px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}.text{fill:#6e7781}
.letter{font:bold 10px system-ui,sans-serif}.mid{text-anchor:middle}
"""


class NothingToShow(Exception):
    """No such pass, or none that drafted."""


@dataclass(slots=True, eq=False)
class Node:
    """A box of the picture.

    Attributes:
        state: one of `STATES`.
        source: its code; None: nobody proposed it.
        left, line: where it stands.
    """

    word: str
    state: str
    chance: float = 1.0
    source: int | None = None
    above: Node | None = None
    below: list[Node] = field(default_factory=list)
    left: float = 0.0
    line: int = 0

    @property
    def width(self) -> float:
        return max(round(LETTER * columns(self.word)) + SLIM, NARROW)

    @property
    def rank(self) -> float:
        """Where it stands among its siblings."""
        return ["pruned", "probe", "rejected", "accepted", "own"].index(self.state) + self.chance / 2


def draw(run: Run, number: int, row: int = 0) -> str:
    """Return the picture of a pass, counted from 1 behind the prefill, as SVG.

    Raises:
        NothingToShow: there is no such pass, or the row drafted nothing in it.
    """
    if not 1 <= number <= len(run.passes):
        raise NothingToShow(f"--pass {number}: the trace has {len(run.passes)} passes, give a number from 1")
    tree = next((tree for tree in run.passes[number - 1].trees if tree.row == row), None)
    if tree is None:
        drafting = [i for i, one in enumerate(run.passes, 1) if any(tree.row == row for tree in one.trees)]
        raise NothingToShow(f"--pass {number}: row {row} drafted nothing then; it did in {drafting or 'no pass'}")
    nodes, left_out = grown(run, number, tree)
    width, lines = lay_out(nodes[0])
    width = max(width + 2 * MARGIN, LEAST)
    legend, end = _legend(nodes, TOP + PITCH * lines + 8, width)
    drawn, high = [*_head(run, number, tree, left_out), *_edges(nodes), *_boxes(nodes), *legend], end + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {high:g}" width="{width:g}" '
            f'height="{high:g}" role="img" aria-labelledby="name">',
            f'<title id="name">The token tree of pass {number}: {len(tree.tokens) - 1} nodes, '
            f"{max(len(tree.path) - 1, 0)} accepted</title>",
            f"<style>{style(nodes)}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{width - 1:g}" height="{high - 1:g}" rx="8"/>',
            *drawn,
            "</svg>\n",
        ]
    )


def grown(run: Run, number: int, tree: Tree) -> tuple[list[Node], int]:
    """Return the nodes to draw, the root first, and how many are left out."""
    path, kept = set(tree.path), {0}
    nodes = [Node(_word(run, tree.tokens[0]), "root")]
    places = {0: nodes[0]}
    for i in sorted(range(1, len(tree.tokens)), key=lambda i: (i not in path, i)):
        if tree.parents[i] in kept and (len(kept) < MOST or i in path):
            kept.add(i)
    for i in sorted(kept - {0}):
        state = "accepted" if i in path else "probe" if i in tree.probes else "rejected" if i < tree.ran else "pruned"
        above = places[tree.parents[i]]
        node = Node(_word(run, tree.tokens[i]), state, tree.chances[i], tree.sources[i], above)
        above.below.append(node)
        nodes.append(node)
        places[i] = node
    _add_pick(run, number, tree, nodes, places)
    for node in nodes:
        node.below.sort(key=lambda one: -one.rank)
    return nodes, len(tree.tokens) - len(kept)


def _add_pick(run: Run, number: int, tree: Tree, nodes: list[Node], places: dict[int, Node]) -> None:
    """Put the model's own pick behind the accepted path, where the trace tells it."""
    begin = run.prefills + sum(one.committed[tree.row] for one in run.passes[: number - 1])
    at = begin + run.passes[number - 1].committed[tree.row] - 1
    if not tree.path or tree.row >= len(run.outputs) or not begin <= at < len(run.outputs[tree.row]):
        return
    if at - begin < len(tree.path) - 1:  # the text ended within the accepted path
        return
    end = places[tree.path[-1]]
    pick = Node(_word(run, run.outputs[tree.row][at]), "own", above=end)
    end.below.append(pick)
    nodes.append(pick)


def lay_out(root: Node) -> tuple[float, int]:
    """Give every node its place; return how wide the tree is, and of how many lines.

    A node, its first child and so on share a line; each takes the first one below its parent that is free.
    """
    taken: dict[int, int] = {}
    width, lines, waiting = 0.0, 0, [root]
    while waiting:
        chain = list(_chain(waiting.pop()))
        left = chain[0].above.left + chain[0].above.width + GAP if chain[0].above else 0.0
        for node in chain:
            node.left, left = left, left + node.width + GAP
        first = chain[0].left - GAP if chain[0].above else 0.0
        span = range(int(first // CELL), int(left // CELL) + 1)
        line = max([chain[0].above.line + 1 if chain[0].above else 0, *(taken.get(at, 0) for at in span)])
        taken |= dict.fromkeys(span, line + 1)
        for node in chain:
            node.line = line
            waiting += reversed(node.below[1:])  # branches of the end of a chain, and likelier ones, go first
        width, lines = max(width, left - GAP), max(lines, line + 1)
    return width, lines


def _chain(node: Node) -> Iterable[Node]:
    yield node
    while node.below:
        node = node.below[0]
        yield node


def _head(run: Run, number: int, tree: Tree, left_out: int) -> Iterable[str]:
    one, accepted = run.passes[number - 1], max(len(tree.path) - 1, 0)
    said = f"{many(tree.ran - 1, 'node')} ran, {accepted} accepted; {many(one.committed[tree.row], 'token')} came of it"
    if len(tree.tokens) > tree.ran:
        said += f"; {len(tree.tokens) - tree.ran} more were proposed"
    said += f"; {left_out} are not drawn" if left_out else ""
    yield _text(MARGIN, 24, f"pass {number}", "title")
    yield _text(MARGIN + 66, 24, said, "note")
    yield _text(MARGIN, 44, _before(run, number, tree.row), "text")


def _before(run: Run, number: int, row: int) -> str:
    """Return the end of the text before a pass."""
    end = run.prefills + sum(one.committed[row] for one in run.passes[: number - 1])
    if run.wording is None:
        text = " ".join(f"#{token}" for token in run.outputs[row][:end]) if row < len(run.outputs) else ""
    else:
        text = run.wording.prompts[row] + "".join(run.wording.outputs[row][:end])
    shown = visible(re.sub(r"\n[ \t]*", "\n", text)).replace("·", " ")
    return shown if len(shown) <= TAIL else f"… {shown[-TAIL:]}"


def _edges(nodes: Iterable[Node]) -> Iterable[str]:
    for node in nodes:
        if node.above is None:
            continue
        x, y = MARGIN + node.above.left + node.above.width, _y(node.above) + BOX / 2
        kind = "edge main" if node.state in ("accepted", "own") else "edge"
        path = f"M{x:g} {y:g}h{GAP / 2:g}V{_y(node) + BOX / 2:g}H{MARGIN + node.left:g}"
        yield f'<path class="{kind}" d="{path}"/>'


def _boxes(nodes: Iterable[Node]) -> Iterable[str]:
    for node in nodes:
        x, y, middle = MARGIN + node.left, _y(node), MARGIN + node.left + node.width / 2
        yield f'<rect class="box {node.state}" x="{x:g}" y="{y:g}" width="{node.width:g}" height="{BOX}" rx="5"/>'
        if node.source is None:
            yield _text(middle, y + 22, node.word, f"word mid on-{node.state}")
            continue
        yield _text(middle, y + 15, node.word, f"word mid on-{node.state}")
        yield from _mark(x + 6, y + 20, node.source)
        yield _text(x + 27, y + 30, percent(node.chance), "note")


def _mark(x: float, y: float, source: int) -> Iterable[str]:
    yield f'<rect class="hue{hue(source)}" x="{x:g}" y="{y:g}" width="17" height="13" rx="3"/>'
    yield _text(x + 8.5, y + 10, letters(source), "letter mid")


def _legend(nodes: Sequence[Node], top: float, width: float) -> tuple[list[str], float]:
    """Return what says what states and letters mean, of those that are there, and where that ends."""
    lines, x, y = list[str](), float(MARGIN), top
    for state, said in STATES.items():
        if not any(node.state == state for node in nodes):
            continue
        wide = 25 + NOTE * len(said)
        if x + wide > width - MARGIN:
            x, y = float(MARGIN), y + 21
        lines.append(f'<rect class="box {state}" x="{x:g}" y="{y:g}" width="19" height="13" rx="3"/>')
        lines.append(_text(x + 25, y + 10, said, "note"))
        x += wide + 12
    x, y, percents = float(MARGIN), y + 21, "%: chance to be accepted if the node before it is"
    sources = sorted({node.source for node in nodes if node.source is not None})
    for source, said in [*((source, f"by {name_of(source)}") for source in sources), (-1, percents)]:
        wide = 23 * (source >= 0) + NOTE * len(said)
        if x + wide > width - MARGIN:
            x, y = float(MARGIN), y + 21
        if source >= 0:
            lines += _mark(x, y, source)
        lines.append(_text(x + 23 * (source >= 0), y + 10, said, "note"))
        x += wide + 14
    return lines, y + 13


def style(nodes: Iterable[Node]) -> str:
    """Return the style sheet, with the colours of the sources that are there."""
    hues = sorted({hue(node.source) for node in nodes if node.source is not None})
    light, dark = ("".join(f".hue{i}{{fill:{HUES[i][dim]}}}" for i in hues) for dim in (0, 1))
    return f"{FONTS}{LIGHT}{light}\n@media (prefers-color-scheme:dark){{{DARK}{dark}}}\n"


def hue(source: int) -> int:
    return min(source, len(HUES) - 1)


def letters(source: int) -> str:
    """Return what stands for a source: the beginning of its name, or the number of one that does not come along."""
    return "?" if not source else name_of(source)[:2].title() if source < len(NAMES) else f"S{source - len(NAMES)}"


def many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def percent(chance: float) -> str:
    return "<1%" if 0 < chance < 0.01 else f"{100 * chance:.0f}%"


def visible(text: str) -> str:
    """Return `text` with signs for white space, and without characters that XML or a page cannot take as they are."""
    return "".join(map(_sign, text)) or "∅"


def _sign(one: str) -> str:
    if one in SIGNS:
        return SIGNS[one]
    if ord(one) < 32:
        return chr(0x2400 + ord(one))
    return f"⟨{ord(one):04X}⟩" if unicodedata.category(one)[0] in "CZ" else one


def columns(text: str) -> int:
    """Return how many columns of a fixed-width font a text takes."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else not unicodedata.combining(one) for one in text)


def _word(run: Run, token: int) -> str:
    """Return what a token says; a line break takes the indent behind it."""
    text = None if run.wording is None else run.wording.words.get(token)
    if text is None:
        return f"#{token}"
    word = visible(re.sub(r" {5,}", lambda blanks: f" ×{len(blanks[0])}", text))
    return word if len(word) <= LONGEST else word[: LONGEST - 1] + "…"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _y(node: Node) -> float:
    return TOP + PITCH * node.line


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("trace", type=Path, metavar="TRACE", help="a file that --trace or Run.save() wrote")
    add("--pass", dest="number", type=int, required=True, metavar="N", help="the pass, counted from 1")
    add("--row", type=int, default=0, metavar="N", help="the row of the batch (default: 0)")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the picture, as SVG")
    return parser.parse_args(argv)


def main(options: argparse.Namespace) -> None:
    options.output.write_text(draw(Run.load(options.trace), options.number, options.row), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(arguments())
    except (NothingToShow, LookaheadError, OSError) as error:
        raise SystemExit(f"tree_picture.py: {error}") from None
