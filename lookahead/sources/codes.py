"""What `Draft.source` says: who says most of a node."""

from __future__ import annotations

UNKNOWN, PROMPT, RECYCLE, POOL, GRAMMAR, JACOBI = range(6)

NAMES = ("unknown", "prompt", "recycle", "pool", "grammar", "jacobi")
"""Names of the codes; the code of the i-th `Source` object is `len(NAMES) + i`."""


def name_of(code: int) -> str:
    """Return the name of a source by its code in `Draft.source`."""
    return NAMES[code] if code < len(NAMES) else f"source {code - len(NAMES)}"
