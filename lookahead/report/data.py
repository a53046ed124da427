"""What the page of a run is told, in few bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lookahead.explain import PARTS, Worth, explain
from lookahead.sources.codes import NAMES, name_of
from lookahead.trace import WHY, Pass, Run
from lookahead.trees import Tree

STRANGE = "a reason that this version does not know"
MICRO = 1e6
EXTRA = 3  # hues for sources that do not come along


def data(run: Run, row: int = 0) -> dict[str, Any]:
    """Return what the scripts of the page read, for JSON; seconds are told in microseconds, chances in thousandths.

    A token is the index of its id in `ids`, a source that of its name in `sources`.
    """
    totals, trees = explain(run), [tuple(one.trees) for one in run.passes]
    names = _places([*totals.sources, *_drafting(trees)])
    ids = _places(sorted({*_drafted(trees), *(token for line in run.outputs for token in line)}))
    whys = _places([one.why for one in run.passes])
    said = run.wording
    return {
        "rows": run.rows,
        "row": row,
        "prefill": round(run.prefill_s * MICRO),
        "opens": run.prefills == 0,
        "prompts": [list(line) for line in run.prompts] if said is None else said.prompts,
        "pieces": None if said is None else said.outputs,
        "ids": list(ids),
        "words": None if said is None else [said.words.get(token) for token in ids],
        "outputs": [[ids[token] for token in line] for line in run.outputs],
        "parts": list(totals.seconds),
        "seconds": [round(seconds * MICRO) for seconds in totals.seconds.values()],
        "why": [[why, WHY.get(why, STRANGE), *_means(totals.why[why].as_dict())] for why in whys],
        "sources": [[name, hue(name), *_worth(totals.sources.get(name))] for name in names],
        "unpriced": totals.unpriced,
        "passes": [_pass(one, grown, names, ids, whys) for one, grown in zip(run.passes, trees, strict=True)],
    }


def hue(name: str) -> int:
    """Return which of the page's colours a source has: its code, or one of those behind them."""
    return NAMES.index(name) if name in NAMES else len(NAMES) + sum(map(ord, name)) % EXTRA


def _places(values: Iterable[Any]) -> dict[Any, int]:
    return {value: place for place, value in enumerate(dict.fromkeys(values))}


def _drafting(trees: Iterable[Sequence[Tree]]) -> list[str]:
    """Return the names of those who proposed a node, run or not."""
    codes = {code for grown in trees for tree in grown for code in tree.sources[1:]}
    return [name_of(code) for code in sorted(codes)]


def _drafted(trees: Iterable[Sequence[Tree]]) -> Iterable[int]:
    return (token for grown in trees for tree in grown for token in tree.tokens)


def _means(group: Mapping[str, Any]) -> list[float]:
    """Return how many passes had a reason, and what each ran, was expected to bring, and brought."""
    passes = group["passes"]
    return [passes, *(round(group[name] / passes, 2) for name in ("nodes", "expected", "committed"))]


def _worth(worth: Worth | None) -> list[float | None]:
    if worth is None:
        return [0, 0, None, None]
    earned = [round(seconds * MICRO) if worth.priced else None for seconds in (worth.earned_s, worth.cost_s)]
    return [worth.run, worth.accepted, *earned]


def _pass(
    one: Pass, trees: Iterable[Tree], names: Mapping[str, int], ids: Mapping[int, int], whys: Mapping[str, int]
) -> list[Any]:
    parts = [getattr(one, field) for field in PARTS.values()]
    return [
        one.nodes,
        one.committed,
        round(one.expected, 2),
        whys[one.why],
        round(one.token_s * MICRO),
        round(one.row_s * MICRO, 1),
        [round(seconds * MICRO) for seconds in (*parts, one.step_s - sum(parts))],
        [[names[name], share.run, share.accepted] for name, share in one.sources.items()],
        [_tree(tree, names, ids) for tree in trees],
    ]


def _tree(tree: Tree, names: Mapping[str, int], ids: Mapping[int, int]) -> list[Any]:
    return [
        tree.row,
        tree.ran,
        [ids[token] for token in tree.tokens],
        tree.parents[1:],
        [round(1000 * chance) for chance in tree.chances[1:]],
        [names[name_of(code)] for code in tree.sources[1:]],
        tree.probes,
        tree.path,
    ]
