"""Runs for the page: one of two rows with all that a tree may hold, and a long one."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

from lookahead.trace import Pass, Run, Share
from lookahead.trees import Tree
from lookahead.wording import Wording

SCRIPT = "</script><script>window.stolen = true</script>"
IMAGE = "<img src=x onerror='window.stolen = true'>"
HOSTILE = (SCRIPT, IMAGE, "<!--", "]]>", "&lt;", "\u2028\u2029", "\ud800", "\udc00", "\0", "\u202e", "\u2066", "\ufeff")

WORDS = dict(enumerate(("def", " add", "\n    ", SCRIPT, "\u202eright to left", "\0\x1b\ud800", IMAGE, "\t", "")))

# Row 0: two of three are accepted; there is a probe, and a node that did not run.
FIRST = Tree(
    row=0,
    ran=5,
    tokens=(0, 1, 2, 3, 6, 4),
    parents=(-1, 0, 1, 1, 0, 2),
    chances=(1.0, 0.9, 0.5, 0.25, 0.0, 0.75),
    sources=(0, 1, 2, 4, 5, 3),
    probes=(4,),
    path=(0, 1, 2),
)
AGREED = Tree(1, 2, (6, 8), (-1, 0), (1.0, 0.6), (0, 1), (), (0,))
"""What was picked had been drafted, but the row went no further: so it is where others are far behind."""
LATER = Tree(1, 3, (2, 3, 4), (-1, 0, 1), (1.0, 0.004, 0.5), (0, 6, 9), (), (0,))
EXAMPLE = Run(
    6,
    (
        Pass(
            5, (3, 1), 3.5, "pays", token_s=2e-3, row_s=1e-4, draft_s=1e-3, model_s=5e-3, verify_s=5e-4, step_s=7e-3,
            sources={"prompt": Share(1, 1, 0.0), "recycle": Share(1, 1, 0.0), "grammar": Share(1), "jacobi": Share(1)},
            trees=(FIRST,),
        ),
        Pass(3, (0, 1), 2.25, "explores", model_s=4e-3, step_s=5e-3, sources={"source 0": Share(1)}, trees=(LATER,)),
        Pass(2, (2, 1), 2.0, "of a later version", model_s=4e-3, step_s=4.5e-3, trees=(AGREED,)),
    ),
    0.02,
    (array("i", [5, 6]), array("i", [7])),
    (array("i", [0, 1, 2, 3, 4, 5]), array("i", [1, 2, 6, 8])),
    Wording(
        ("# a prompt\n" + SCRIPT, "\u202eprompt"),
        (tuple(WORDS[token] for token in range(6)), tuple(WORDS[token] for token in (1, 2, 6, 8))),
        WORDS,
    ),
)  # fmt: skip
OLD = Run(6, tuple(replace(one, trees=()) for one in EXAMPLE.passes))
"""The same, as a trace without texts and trees has it."""


def long_run(passes: int, nodes: int = 32) -> Run:
    """Return a run of one row in which each pass drafts so many nodes."""
    draw = random.Random(0)
    words = {token: draw.choice(("", " ", "\n    ")) + f"w{token}" for token in range(5000)}
    output, steps = [0], []
    for _ in range(passes):
        tree = _tree(draw, output[-1], nodes)
        output += [*(tree.tokens[node] for node in tree.path[1:]), draw.randrange(5000)]
        share = Share(nodes, len(tree.path) - 1)
        steps.append(
            Pass(nodes + 1, (len(tree.path),), 2.5, "pays", draft_s=draw.random() / 1e3, model_s=5e-3, step_s=7e-3,
                 sources={"prompt": share}, trees=(tree,))
        )  # fmt: skip
    said = Wording(("",), (tuple(words[token] for token in output),), words)
    return Run(len(output), tuple(steps), 0.05, (array("i"),), (array("i", output),), said)


def _tree(draw: random.Random, last: int, nodes: int) -> Tree:
    parents = (-1, *(draw.choice((i - 1, draw.randrange(i))) for i in range(1, nodes + 1)))
    path = [0]
    while draw.random() < 0.75 and (below := [i for i in range(1, nodes + 1) if parents[i] == path[-1]]):
        path.append(draw.choice(below))
    tokens = (last, *(draw.randrange(5000) for _ in range(nodes)))
    chances = tuple(round(draw.random(), 4) for _ in tokens)
    sources = (0, *(draw.choice((1, 2)) for _ in range(nodes)))
    return Tree(0, nodes + 1, tokens, parents, chances, sources, (), tuple(path))
