"""Runs as they may be: any numbers that a trace can hold."""

from __future__ import annotations

from array import array
from dataclasses import replace

from hypothesis import strategies as st

from lookahead.trace import WHY, Pass, Run, Share
from lookahead.trees import Tree
from lookahead.wording import Wording

names = st.sampled_from(["prompt", "recycle", "pool", "Source é\u2028\n\x1b[0m", "", "\ud800"])


def shares(largest: float) -> st.SearchStrategy[Share]:
    return st.builds(Share, st.integers(0, int(largest)), st.integers(0, int(largest)), st.floats(0, largest))


texts = st.text(st.characters(exclude_categories=()), max_size=6) | st.sampled_from(
    ["</script>", "\u2028", "\u202e", "\0"]
)


@st.composite
def trees(draw: st.DrawFn, rows: int) -> Tree:
    """Any tree of one of `rows` rows."""
    size = draw(st.integers(1, 8))
    ran = draw(st.integers(1, size))
    parents = (-1, *(draw(st.integers(0, i - 1)) for i in range(1, size)))
    path = [0] if draw(st.booleans()) else []
    while path and (below := [i for i in range(1, ran) if parents[i] == path[-1]]) and draw(st.booleans()):
        path.append(draw(st.sampled_from(below)))
    return Tree(
        row=draw(st.integers(0, rows - 1)),
        ran=ran,
        tokens=tuple(draw(st.integers(0, 2**31 - 1)) for _ in range(size)),
        parents=parents,
        chances=tuple(round(draw(st.floats(0, 1)), 4) for _ in range(size)),
        sources=tuple(draw(st.integers(0, 255)) for _ in range(size)),
        probes=tuple(i for i in range(1, ran) if i not in path and draw(st.booleans())),
        path=tuple(path),
    )


def passes(rows: int, largest: float) -> st.SearchStrategy[Pass]:
    seconds, prices = st.floats(0, largest), st.one_of(st.just(0.0), st.floats(1e-6, largest))
    counts = st.integers(0, int(largest))
    return st.builds(
        Pass,
        nodes=counts,
        committed=st.tuples(*[counts] * rows),
        expected=seconds,
        why=st.sampled_from([*WHY, "of a later version"]),
        token_s=prices,
        row_s=prices,
        **{f"{part}_s": seconds for part in ("draft", "mask", "model", "verify", "cache", "learn", "step")},
        sources=st.dictionaries(names, shares(largest), max_size=3),
        trees=st.lists(trees(rows), max_size=2).map(tuple),
    )


@st.composite
def runs(draw: st.DrawFn, largest: float = 1e6) -> Run:
    """Any run, of numbers up to `largest`."""
    rows = draw(st.integers(1, 3))
    given = draw(st.lists(passes(rows, largest), max_size=6))
    if given and draw(st.booleans()):
        given[0] = replace(given[0], opens=True)
    run = Run(draw(st.integers(0, int(largest))), tuple(given), draw(st.floats(0, largest)))
    return replace(run, **_texts(draw, rows)) if draw(st.booleans()) else run


def _texts(draw: st.DrawFn, rows: int) -> dict[str, object]:
    """Return tokens of all rows and, sometimes, what they say."""
    tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda row: array("i", row))
    prompts, outputs = (tuple(draw(tokens) for _ in range(rows)) for _ in range(2))
    found: dict[str, object] = {"prompts": prompts, "outputs": outputs}
    if draw(st.booleans()):
        words = {token: draw(texts) for row in outputs for token in row}
        says = tuple(tuple(draw(texts) for _ in row) for row in outputs)
        found["wording"] = Wording(tuple(draw(texts) for _ in prompts), says, words)
    return found
