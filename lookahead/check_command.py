"""What `lookahead check` does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookahead.command import check_writable, load_model, status, unwritable
from lookahead.errors import InvalidInput

# torch and transformers are imported where they are used, so that bad input is refused at once.
if TYPE_CHECKING:
    from rich.table import Table

    from lookahead.check import Check

DIFFERS = 1
HEADINGS = ("prompt", "tokens", "tokens\nper pass", "plain", "lookahead", "speed-up")


def run(args: argparse.Namespace) -> int:
    """Check a model; return 0 where nothing differs, or by numeric ties only, else 1."""
    if args.json is not None:
        check_writable("--json", args.json)
    from lookahead.loading import quiet

    with status(f"loading {args.model} …") as say, quiet():
        try:
            check = _prepared(args)
            check.run(say)
        except InvalidInput as error:  # there is no option --model here
            raise InvalidInput(str(error).removeprefix("--model ")) from error
        if args.json is not None:
            _save(args, check)
        say("")
        _show(args, check)
    return DIFFERS if check.verdict == "differs" else 0


def _prepared(args: argparse.Namespace) -> Check:
    """Load what is to be checked, once all that was given is seen to be usable."""
    from lookahead.check_prompts import read_prompts
    from lookahead.loading import Checkpoint, check_device, check_served

    checkpoint = Checkpoint(args.model)
    prompts, device = read_prompts(args.prompts, checkpoint.directory), check_device(args.device)
    config = checkpoint.config()
    check_served(config, args.model, "there is nothing to check")
    tokenizer = checkpoint.tokenizer()
    model = load_model(args, checkpoint, config, device)
    from lookahead.check import Check
    from lookahead.support import supports

    if (support := supports(model)).kind == "refused":
        raise InvalidInput(f"{args.model}: {support.reason}")
    return Check(model, tokenizer, prompts, limit=args.max_new_tokens, quick=args.quick, invariant=args.invariant)


def _show(args: argparse.Namespace, check: Check) -> None:
    from lookahead.screen import Screen

    screen, model = Screen(), check.model
    dtype = str(model.dtype).removeprefix("torch.")
    screen.write(f"{args.model}, {dtype}, {model.device}; greedy calls, in seconds:\n")
    screen.print(_speeds(check, screen.width))
    screen.write("")
    screen.print(_kinds(check, screen.width))
    odd = [finding for finding in check.findings if finding.verdict != "equal"]
    if odd or check.skipped:
        screen.write("")
    for line in (*map(str, odd), *check.skipped):
        screen.write(line)
    screen.write(f"\n{verdict(check)}")


def verdict(check: Check) -> str:
    """Return what came of it all in one line."""
    total = len(check.findings)
    ties = sum(finding.verdict == "tie" for finding in check.findings)
    faults = sum(finding.verdict == "differs" for finding in check.findings)
    if check.invariant and faults:
        return f"DIFFERENT: drafts move bits in {faults} of {total} calls."
    if check.invariant:
        return f"Invariant: all {total} calls are equal with drafts and with none, bit by bit."
    if faults:
        return f"DIFFERENT: {faults} of {total} calls differ from plain model.generate(), by more than rounding."
    if ties:
        return (
            f"Exact: {total - ties} of {total} calls are equal to plain model.generate(), {ties} but for numeric ties."
        )
    return f"Exact: all {total} calls are equal to plain model.generate()."


def _speeds(check: Check, width: int) -> Table:
    from lookahead.screen import grid

    rows = [
        (one.prompt, str(one.tokens), f"{one.tokens_per_pass:.2f}", f"{one.plain_s:.2f}", f"{one.lookahead_s:.2f}",
         f"{one.ratio:.2f}x")
        for one in check.speeds
    ]  # fmt: skip
    headings = tuple("no drafts" if check.invariant and one == "plain" else one for one in HEADINGS)
    return _filled(grid, headings, rows, width)


def _kinds(check: Check, width: int) -> Table:
    """Return how many calls of each kind were equal, ties, different."""
    from lookahead.screen import grid

    rows = []
    for kind in dict.fromkeys(finding.kind for finding in check.findings):
        verdicts = [finding.verdict for finding in check.findings if finding.kind == kind]
        rows.append((kind, *(str(verdicts.count(one) or "") for one in ("equal", "tie", "differs"))))
    return _filled(grid, ("kind of call", "equal", "tie", "differs"), rows, width)


def _filled(grid: Any, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], width: int) -> Table:
    table: Table = grid(list(zip(headings, *rows, strict=True)), [True, *[False] * (len(headings) - 1)], width, gap=2)
    for row in rows:
        table.add_row(*row)
    return table


def _save(args: argparse.Namespace, check: Check) -> None:
    model = check.model
    found = {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "invariant": check.invariant,
        "verdict": check.verdict,
        "calls": [asdict(finding) for finding in check.findings],
        "speed": [speed.as_dict() for speed in check.speeds],
        "skipped": check.skipped,
    }
    try:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable("--json", args.json, error) from error
