"""What `lookahead report` does."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lookahead.command import unwritable
from lookahead.errors import InvalidInput
from lookahead.explain_command import STANDARD_INPUT, read_trace

STANDARD_OUTPUT = "-"


def run(args: argparse.Namespace) -> int:
    """Write a trace as a page."""
    trace, output = read_trace(args.trace), args.output or _beside(args.trace)
    _check_other(args.trace, output)
    from lookahead.report.page import page

    text = page(trace, title=_title(args.trace) if args.title is None else args.title)
    if output == STANDARD_OUTPUT:
        sys.stdout.buffer.write(text.encode())
    else:
        _write(output, text)
        print(output.encode(errors="replace").decode())  # a name may hold bytes that are no text
    return 0


def _beside(trace: str) -> str:
    """Return where the page of a trace lies unless another place is named."""
    return STANDARD_OUTPUT if trace == STANDARD_INPUT else str(Path(trace).with_suffix(".html"))


def _check_other(trace: str, output: str) -> None:
    """Raise `InvalidInput` where the page would be written over the trace."""
    if STANDARD_INPUT in (trace, output):
        return
    same = os.path.realpath(trace) == os.path.realpath(output)
    if same or (os.path.exists(trace) and os.path.exists(output) and os.path.samefile(trace, output)):
        raise InvalidInput(f"-o {output}: that is the trace itself; give another file")


def _title(trace: str) -> str:
    return "Trace" if trace == STANDARD_INPUT else Path(trace).name


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_bytes(text.encode())
    except OSError as error:
        raise unwritable("-o", file, error) from error
