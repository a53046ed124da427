"""Runs as they may be: any numbers that a trace can hold."""

from __future__ import annotations

from hypothesis import strategies as st

from lookahead.trace import WHY, Pass, Run, Share

names = st.sampled_from(["prompt", "recycle", "pool", "Source é\u2028\n\x1b[0m", "", "\ud800"])


def shares(largest: float) -> st.SearchStrategy[Share]:
    return st.builds(Share, st.integers(0, int(largest)), st.integers(0, int(largest)), st.floats(0, largest))


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
    )


@st.composite
def runs(draw: st.DrawFn, largest: float = 1e6) -> Run:
    """Any run, of numbers up to `largest`."""
    rows = draw(st.integers(1, 3))
    given = draw(st.lists(passes(rows, largest), max_size=6))
    return Run(draw(st.integers(0, int(largest))), tuple(given))
