"""What `lookahead calibrate` does."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookahead.command import Say, check_writable, load_model, status, unwritable
from lookahead.errors import InvalidInput, UnsupportedModel

# torch and transformers are imported where they are used, so that a bad file is refused at once.
if TYPE_CHECKING:
    from rich.table import Table

    from lookahead.curves import Curve


def run(args: argparse.Namespace) -> int:
    """Measure the passes of a model; each batch size is stored as soon as it is measured."""
    from lookahead.curves import default_path
    from lookahead.loading import quiet

    file = default_path() if args.curves is None else Path(args.curves)
    _check_file(file)
    curves = []
    with status(f"loading {args.model} …") as say, quiet():
        model = _load(args)
        for rows in dict.fromkeys(args.rows):
            curves.append(_measured(args, model, rows, say))
            _store(curves[-1], file)
            say("")
            if not args.json:
                _show(curves[-1], first=len(curves) == 1)
    if args.json:
        print(json.dumps({"file": str(file), "curves": [asdict(curve) for curve in curves]}, indent=2))
    else:
        print(f"\nstored in {file}")
    return 0


def _check_file(file: Path) -> None:
    """Raise `InvalidInput` before the work where its outcome could not be stored, or would replace something else."""
    from lookahead.curves import Curves

    if os.path.exists(file):
        Curves.load(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable("--curves", str(file), error) from error
    check_writable("--curves", str(file))


def _load(args: argparse.Namespace) -> Any:
    from lookahead.loading import Checkpoint, check_device, check_served

    checkpoint, device = Checkpoint(args.model), check_device(args.device)
    config = checkpoint.config()
    check_served(config, args.model, "give one of them")
    _check_fit(args, config)
    return load_model(args, checkpoint, config, device)


def _check_fit(args: argparse.Namespace, config: Any) -> None:
    """Raise `InvalidInput` for what was asked, and is more than the model has positions for."""
    from lookahead.calibrate import CONTEXT, MOST, fitting

    most, asked = args.most or MOST, args.context or CONTEXT
    positions = getattr(config, "max_position_embeddings", None)
    if args.most is not None and positions is not None and most + 1 >= positions:
        fix = f"ask for at most {positions - 2}"
        raise InvalidInput(f"--most {most}: that exceeds the model's context of {positions}; {fix}")
    context, sizes = fitting(config, asked, most)
    if args.context is not None and context < asked:
        said = f"with {sizes[-1]} tokens behind it that exceeds the model's context of {positions}"
        raise InvalidInput(f"--context {asked}: {said}; ask for at most {context}")


def _measured(args: argparse.Namespace, model: Any, rows: int, say: Say) -> Curve:
    from lookahead.calibrate import CONTEXT, MOST, measure

    options = {"rows": rows, "context": args.context or CONTEXT, "most": args.most or MOST}
    with _refused(args.model, rows):
        return measure(model, **options, say=lambda text, part: say(f"batch size {rows}, {text}", part))


@contextlib.contextmanager
def _refused(name: str, rows: int) -> Iterator[None]:
    """Say in one line what keeps a model from being measured."""
    try:
        yield
    except UnsupportedModel as error:
        raise InvalidInput(f"--model {name}: {error}") from error
    except (MemoryError, RuntimeError) as error:  # the latter is what torch raises, on whatever device
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fix = "give smaller batch sizes, or a smaller --most or --context"
        raise InvalidInput(f"--rows {rows}: the device has too little memory for such passes; {fix}") from error


def _store(curve: Curve, file: Path) -> None:
    """Add a curve to the file as it is by now."""
    from lookahead.curves import Curves

    kept = Curves.load(file) if os.path.exists(file) else Curves()
    try:
        kept.replaced(curve).save(file)
    except OSError as error:
        raise unwritable("--curves", str(file), error) from error


def _show(curve: Curve, *, first: bool) -> None:
    from lookahead.screen import Screen

    screen = Screen()
    if first:
        screen.write(f"{curve.setting}; passes behind {curve.context} tokens")
    screen.write(f"\nbatch size {curve.rows}")
    screen.print(table(curve, screen.width))


def table(curve: Curve, width: int) -> Table:
    """Return the milliseconds of a pass by its nodes, and how often a pass over one node fits into that."""
    from lookahead.screen import grid

    rows = [
        (str(nodes), f"{1e3 * seconds:.2f}", f"{seconds / curve.seconds[0]:.2f}x")
        for nodes, seconds in zip(curve.nodes, curve.seconds, strict=True)
    ]
    headings = ("nodes", "ms", "times one")
    found = grid(list(zip(headings, *rows, strict=True)), [False] * len(headings), width, gap=2)
    for row in rows:
        found.add_row(*row)
    return found
