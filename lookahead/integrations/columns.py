"""Columns of a batch of rows: a pyarrow table, a pandas frame, or arrays by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lookahead.errors import InvalidArgument

Kind = Literal["text", "number"]
"""What is in a column: texts or None; whole numbers."""

_ARROW = {"text": "string", "number": "int64"}
_NUMPY = {"text": object, "number": np.int64}


def values_of(batch: Any, name: str) -> list[Any]:
    """Return the values of a column; None for every row where there is none."""
    if name not in _names(batch):
        return [None] * _rows(batch)
    return list(batch[name].to_pylist() if _is_table(batch) else batch[name])


def extended(batch: Any, new: Mapping[str, tuple[Kind, Sequence[Any]]]) -> Any:
    """Return the batch with new columns; their types do not depend on what is in them.

    Raises:
        InvalidArgument: it has one of them already.
    """
    if taken := [name for name in new if name in _names(batch)]:
        raise InvalidArgument(f"the rows have a column {taken[0]!r} already; give another name for the new one")
    if _is_table(batch):
        import pyarrow

        for name, (kind, values) in new.items():
            batch = batch.append_column(name, pyarrow.array(values, _ARROW[kind]))
        return batch
    arrays = {name: np.array(values, _NUMPY[kind]) for name, (kind, values) in new.items()}
    return {**batch, **arrays} if isinstance(batch, dict) else batch.assign(**arrays)


def _is_table(batch: Any) -> bool:
    return hasattr(batch, "column_names")  # pyarrow's; nothing has to be imported to see that


def _names(batch: Any) -> list[str]:
    return list(batch.column_names if _is_table(batch) else batch)


def _rows(batch: Any) -> int:
    return max(map(len, batch.values()), default=0) if isinstance(batch, dict) else len(batch)
