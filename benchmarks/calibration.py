"""Do drafted nodes come true as often as their weights say? Replays requests with a pool and compares.

    python benchmarks/calibration.py FILE [--tokenizer DIR] [--nodes 32] [--skip N] [--plot OUT.svg] [--json OUT]

FILE is as for replay.py, and the replay is the same: requests in file order, each once, the pool knows those before.
Every drafted node whose parent was accepted is counted once: its `weight` is the predicted chance, and it came true if
its token followed. The weights are what the tree was grown with, before anything was learnt from that step.

The expected calibration error (ECE) is the mean gap between prediction and outcome over bins of predicted chance,
weighted by how many nodes are in them (Naeini et al. 2015). The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recorded import BadInput, Request, load, load_tokenizer
from replay import Contender, Ours, replay, warm_up

import lookahead
from lookahead.draft import Draft, IntArray
from lookahead.drafter import Drafter
from lookahead.errors import LookaheadError
from lookahead.trace import Step

BINS = 10
LEAST = 50  # nodes of a bin that is drawn
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#aa3377", "#ee6677")  # Paul Tol's, told apart by all

Nodes = NDArray[np.float64]  # [N, 2] predicted chance, outcome


@dataclass(slots=True)
class Watched(Drafter):
    """A row that notes, of every drafted node whose parent was accepted, its weight and whether it came true."""

    row: Drafter
    nodes: list[tuple[float, bool]] = field(default_factory=list)

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self.row.propose(context, budget)

    def observe(self, step: Step) -> None:
        draft = step.draft
        for at, token in zip(step.path, step.tokens, strict=True):
            below = np.flatnonzero(draft.parents == at)
            self.nodes += zip(draft.weight[below].tolist(), (draft.tokens[below] == token).tolist(), strict=True)
        self.row.observe(step)


class Watcher(Contender):
    """Our grower with a pool, watched."""

    def __init__(self) -> None:
        self.inside = Ours(min_chance=0.0, pool=True)
        self.settings = self.inside.settings
        self.row = Watched(self.inside)

    def start(self, context: IntArray) -> Drafter:
        self.row = Watched(self.inside.start(context))
        return self.row

    def propose(self, context: IntArray, budget: int) -> Draft:
        return self.inside.propose(context, budget)

    def finish(self, text: IntArray) -> None:
        self.inside.finish(text)


def collect(requests: list[Request], budget: int, skip: int) -> dict[str, Nodes]:
    """Return the nodes of every workload; those of its first `skip` requests are left out."""
    watcher = Watcher()
    found: dict[str, list[tuple[float, bool]]] = {}
    seen: dict[str, int] = {}
    for request in requests:
        replay(request, watcher, budget)
        seen[request.workload] = seen.get(request.workload, 0) + 1
        nodes = found.setdefault(request.workload, [])
        if seen[request.workload] > skip:
            nodes += watcher.row.nodes
    return {workload: np.array(nodes, float).reshape(-1, 2) for workload, nodes in found.items()}


def reliability(nodes: Nodes) -> NDArray[np.float64]:
    """Return for every bin of predicted chance: its nodes, their mean prediction, the share that came true."""
    which = np.minimum((nodes[:, 0] * BINS).astype(int), BINS - 1)
    counts = np.bincount(which, minlength=BINS)
    sums = (np.bincount(which, column, BINS) for column in nodes.T)
    with np.errstate(invalid="ignore"):
        return np.stack([counts, *(s / counts for s in sums)], axis=1)


def expected_error(nodes: Nodes) -> float:
    """Return the expected calibration error."""
    bins = reliability(nodes)
    bins = bins[bins[:, 0] > 0]
    return float(np.average(np.abs(bins[:, 1] - bins[:, 2]), weights=bins[:, 0]))


def brier(nodes: Nodes) -> float:
    """Return the mean squared difference of prediction and outcome."""
    return float(np.mean((nodes[:, 0] - nodes[:, 1]) ** 2))


def tables(found: dict[str, Nodes]) -> str:
    """Return Markdown: the bins of all nodes together, then the error of each workload."""
    lines = ["| predicted | nodes | mean prediction | came true |", "|---|---|---|---|"]
    for i, (count, predicted, true) in enumerate(reliability(found["all"])):
        lines.append(f"| {i / BINS:.1f}–{(i + 1) / BINS:.1f} | {count:,.0f} | {predicted:.3f} | {true:.3f} |")
    lines += ["", "| workload | nodes | came true | mean prediction | ECE | Brier |", "|---|---|---|---|---|---|"]
    for workload, nodes in found.items():
        predicted, true = nodes.mean(axis=0)
        errors = f"{expected_error(nodes):.4f} | {brier(nodes):.4f}"
        lines.append(f"| {workload} | {len(nodes):,} | {true:.3f} | {predicted:.3f} | {errors} |")
    return "\n".join(lines)


def summary(found: dict[str, Nodes]) -> dict[str, Any]:
    """Return the same as plain values."""
    return {
        workload: {
            "nodes": len(nodes),
            "ece": expected_error(nodes),
            "brier": brier(nodes),
            "bins": [[int(n), None if n == 0 else p, None if n == 0 else t] for n, p, t in reliability(nodes).tolist()],
        }
        for workload, nodes in found.items()
    }


def plot(found: dict[str, Nodes], path: Path) -> None:
    """Draw the share that came true against the prediction, and how many nodes stand behind it."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "lookahead"}
    with plt.rc_context(style):
        figure, (curves, counts) = plt.subplots(
            2, 1, figsize=(5.2, 6.0), height_ratios=(5, 1), sharex=True, layout="constrained"
        )
        curves.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle="--")
        for (workload, nodes), colour in zip(_all_last(found), COLOURS * len(found), strict=False):
            _curve(curves, workload, nodes, "black" if workload == "all" else colour)
        curves.set(xlim=(0, 1), ylim=(0, 1), ylabel="share accepted")
        curves.legend(frameon=False, loc="upper left")
        bins = reliability(found["all"])
        counts.bar((np.arange(BINS) + 0.5) / BINS, bins[:, 0], width=0.8 / BINS, color="#bbbbbb")
        counts.set(yscale="log", ylabel="nodes", xlabel="predicted chance of a node whose parent is accepted")
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _all_last(found: dict[str, Nodes]) -> list[tuple[str, Nodes]]:
    return sorted(found.items(), key=lambda item: item[0] == "all")


def _curve(axes: Any, workload: str, nodes: Nodes, colour: str) -> None:
    bins = reliability(nodes)
    bins = bins[bins[:, 0] >= LEAST]
    width = 2.0 if workload == "all" else 1.1
    label = f"{workload} (ECE {expected_error(nodes):.3f})"
    axes.plot(
        bins[:, 1],
        bins[:, 2],
        marker="o",
        markersize=1.7 * width,
        linewidth=width,
        color=colour,
        label=label,
        clip_on=False,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path, metavar="FILE", help="JSON lines, plain or gzipped")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its directory (default: the demo model's)")
    parser.add_argument("--nodes", type=int, default=32, help="nodes that a pass may spend (default: %(default)s)")
    parser.add_argument("--workload", nargs="+", action="extend", default=[], help="these only", metavar="NAME")
    parser.add_argument("--limit", type=int, help="at most so many requests of each workload")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first requests of each workload")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw it, as SVG")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the bins and errors of each workload")
    options = parser.parse_args()
    if options.nodes < 1 or options.skip < 0 or (options.limit is not None and options.limit < 1):
        parser.error("--nodes and --limit must be 1 or more, --skip 0 or more")
    return options


def main(options: argparse.Namespace) -> None:
    tokenizer = options.tokenizer or Path(lookahead.demo_path())
    requests, skipped = load(options.requests, load_tokenizer(tokenizer), options.workload, options.limit)
    if skipped:
        print(f"skipped: {skipped} requests with an empty prompt or output", file=sys.stderr)
    warm_up(Watcher())
    found = {w: nodes for w, nodes in collect(requests, options.nodes, options.skip).items() if len(nodes)}
    if not found:
        raise BadInput(f"{options.requests}: no node was drafted after the first {options.skip} requests")
    if "all" not in found:
        found["all"] = np.concatenate(list(found.values()))
    print(tables(found))
    if options.json:
        options.json.write_text(json.dumps(summary(found), indent=1) + "\n")
    if options.plot:
        try:
            plot(found, options.plot)
        except ImportError as error:
            raise BadInput(f"--plot: {error}; pip install matplotlib") from None


if __name__ == "__main__":
    try:
        main(arguments())
    except (BadInput, LookaheadError, OSError) as error:
        raise SystemExit(f"calibration.py: {error}") from None
