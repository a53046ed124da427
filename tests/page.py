"""The table of `docs/families.md`, from what `lookahead` finds out about the models of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
from transformers.cache_utils import DynamicCache
from zoo import FLOAT32_ONLY, SEQ2SEQ, ZOO, zoo

from lookahead.families import text_config
from lookahead.support import Support, supports

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"
_KEPT = {
    "DynamicLayer": "all", "DynamicSlidingWindowLayer": "window", "LinearAttentionLayer": "state",
    "LinearAttentionAndFullAttentionLayer": "state + all", "DummyLayer": "shared",
}  # fmt: skip


def verdict(name: str) -> Support:
    return supports(model_of(name))


def model_of(name: str) -> Any:
    return zoo(name, dtype="float32" if name in FLOAT32_ONLY else "float64")


def table() -> str:
    """Return the table: the served models first, each kind in alphabetical order."""
    rows = [(verdict(name), name) for name in (*ZOO, *SEQ2SEQ)]
    order = {"tree": 0, "linear": 1, "refused": 2}
    lines = [
        f"transformers {hf.__version__}: {sum(found.kind == 'tree' for found, _ in rows)} with trees, "
        f"{sum(found.kind == 'linear' for found, _ in rows)} with chains, "
        f"{sum(found.kind == 'refused' for found, _ in rows)} refused.\n",
        "| architecture | drafts | batches | cache of the user, and given back | why not trees |",
        "|---|---|---|---|---|",
    ]
    for found, name in sorted(rows, key=lambda row: (order[row[0].kind], row[1])):
        batches = {"tree": "rows run apart", "linear": "rows in step", "refused": "–"}[found.kind]
        cache = _cache(name) if found.kind != "refused" else "–"
        why = found.reason.partition("cannot be served: ")[2].partition("; call model")[0] or found.reason
        lines.append(f"| {name} | {found.kind} | {batches} | {cache} | {_shortened(why)} |")
    return "\n".join(lines) + "\n"


def _cache(name: str) -> str:
    kinds = {_KEPT[type(layer).__name__] for layer in DynamicCache(config=text_config(model_of(name))).layers}
    own = ", ".join(sorted(kinds)) or "all"
    return f"{own}; encoder" if name in SEQ2SEQ else own


def _shortened(why: str) -> str:
    """Return a reason without figures that differ from run to run."""
    words = ("~" if _is_figure(word) else word for word in why.replace("|", "/").split())
    return " ".join(words)


def _is_figure(word: str) -> bool:
    return "." in word.strip(".") and word.replace(".", "").replace("e-", "").isdigit()


def shown() -> str:
    """Return the table that the page has."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


def write() -> None:
    """Put the table of this run into the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
