"""The scores of a contest as JSON, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lookahead.bench.contest import Score
from lookahead.bench.systems import OURS, PLAIN
from lookahead.errors import InvalidInput

Scores = Mapping[str, Mapping[str, Score]]
UNKNOWN = "–"
COLOURS = {PLAIN: "#8c8c8c", OURS: "#0b6e4f"}
OTHERS = ("#4c72b0", "#dd8452", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974")
OWN = {"vLLM n-gram": "vLLM", "vLLM suffix": "vLLM"}
"""Systems of another engine, and what plain decoding there is called."""
FORMATS = (".png", ".svg")


def as_json(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Return `{workload: {system: {"seconds": …, "tokens_per_pass": …, "identical": …, …}}}`.

    Of a system that could not run all figures are None, and `reason` says why.
    """
    return {
        workload: {name: _rounded(asdict(score)) for name, score in systems.items()}
        for workload, systems in scores.items()
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name != "reason" or value is not None}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in kept.items()}


def markdown(scores: Scores) -> str:
    """Return a table of each figure, workloads across; and who could not run, and why."""
    parts = [
        "Times as fast as plain `generate()` (in brackets the slowest and the fastest round):",
        "\n".join([_table(scores, _speed), *_against_their_own(scores)]),
        "Tokens per pass:",
        _table(scores, lambda score: _number(score.tokens_per_pass, "{:.2f}")),
        "Seconds, and memory of a call on top of what was held before it (MB):",
        _table(scores, lambda score: f"{_number(score.seconds, '{:.2f}')} / {_number(score.peak_mb, '{:.0f}')}"),
    ]
    if told := _differences(scores):
        parts += ["Outputs that are not those of plain `generate()`:", told]
    if told := _reasons(scores):
        parts += ["Not run:", told]
    return "\n\n".join(parts) + "\n"


def _table(scores: Scores, cell: Any) -> str:
    workloads = list(scores)
    lines = ["| | " + " | ".join(workloads) + " |", "|---" * (len(workloads) + 1) + "|"]
    for system in _names(scores):
        cells = [cell(scores[workload].get(system, Score())) for workload in workloads]
        strong = "**" if system == OURS else ""
        if any(score.seconds is not None for score in (scores[w].get(system, Score()) for w in workloads)):
            lines.append(
                f"| {strong}{system}{strong} | " + " | ".join(f"{strong}{one}{strong}" for one in cells) + " |"
            )
    return "\n".join(lines)


def _against_their_own(scores: Scores) -> list[str]:
    """Return a row for each system of another engine: how fast it is against that engine's own plain decoding."""
    lines = []
    for name, own in OWN.items():
        pairs = [(systems.get(own, Score()).seconds, systems.get(name, Score()).seconds) for systems in scores.values()]
        cells = [f"{base / ours:.2f}x" if base and ours else UNKNOWN for base, ours in pairs]
        if any(cell != UNKNOWN for cell in cells):
            lines.append(f"| {name}, against {own} | " + " | ".join(cells) + " |")
    return lines


def _names(scores: Scores) -> list[str]:
    return list(dict.fromkeys(name for systems in scores.values() for name in systems))


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else form.format(value)


def _speed(score: Score) -> str:
    if score.ratio is None:
        return UNKNOWN
    return f"{score.ratio:.2f}x ({score.least:.2f}–{score.most:.2f})"


def _differences(scores: Scores) -> str:
    return "\n".join(
        f"- {system}, {workload}: {score.differing}"
        for workload, systems in scores.items()
        for system, score in systems.items()
        if score.differing
    )


def _reasons(scores: Scores) -> str:
    """Return a line for each system and reason; the workloads are named where it ran others."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for workload, systems in scores.items():
        for system, score in systems.items():
            if score.reason is not None:
                reasons.setdefault((system, score.reason), []).append(workload)
    told = []
    for (system, reason), where in reasons.items():
        only = "" if len(where) == len(scores) else f" ({', '.join(where)})"
        told.append(f"- {system}{only}: {reason}")
    return "\n".join(told)


def check_plot(file: str) -> None:
    """Raise `InvalidInput` before the work where a picture could not be drawn after it."""
    if Path(file).suffix.lower() not in FORMATS:
        raise InvalidInput(f"--plot {file}: give a file that ends in {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InvalidInput("--plot needs matplotlib; pip install 'lookahead-decoding[plots]'") from error


def plot(scores: Scores, title: str, file: str) -> None:
    """Draw how fast each system was on each workload, plain being 1.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: F401 - so that it is there
    from matplotlib.figure import Figure

    names = [name for name in _names(scores) if any(name in s and s[name].ratio for s in scores.values())]
    figure = Figure(figsize=(max(7.0, 1.3 * len(scores) + 2), 4.2), layout="constrained")
    axes, width = figure.subplots(), 0.8 / max(len(names), 1)
    others = iter(OTHERS * len(names))
    for place, name in enumerate(names):
        shown = [
            (i, systems[name]) for i, systems in enumerate(scores.values()) if name in systems and systems[name].ratio
        ]
        at, heights = [i + place * width for i, _ in shown], [score.ratio or 0.0 for _, score in shown]
        spread = [
            [max((s.ratio or 0) - (s.least or 0), 0) for _, s in shown],
            [max((s.most or 0) - (s.ratio or 0), 0) for _, s in shown],
        ]
        colour = COLOURS.get(name) or next(others)
        bars = axes.bar(
            at, heights, width, label=name, color=colour, yerr=spread, ecolor="#555555", error_kw={"lw": 0.8}
        )
        if name == OURS:
            axes.bar_label(bars, [f"{height:.1f}x" for height in heights], fontsize=7, padding=2)
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(scores))], list(scores), fontsize=8)
    axes.set_ylabel("times as fast as plain generate()")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=160)
