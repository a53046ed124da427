"""The command line: `lookahead demo`, `generate`, `json`, `check` and the other commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookahead.command import (
    STARTING,
    Say,
    check_curves,
    check_drafting,
    check_sampling,
    check_writable,
    decoding,
    loaded,
    metered,
    nodes,
    read_grammar,
    save_trace,
    say_stats,
    served,
    settings,
    status,
    unwritable,
)
from lookahead.errors import LookaheadError
from lookahead.options import parser

# torch, transformers and rich are imported where they are used, so that `lookahead --help` answers at once.
if TYPE_CHECKING:
    from lookahead.compare import Comparison, Row
    from lookahead.memory import Remember
    from lookahead.trace import Run

DIFFERS, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
DEMO_SECONDS = 70.0  # no round that would end later, counted from the start of the command, is begun
NOTHING_ASKED: tuple[list[str], ...] = (
    [],
    *([command] for command in ("generate", "json", "check", "calibrate", "explain", "report", "pool")),
    *(["pool", action] for action in ("build", "add", "info", "merge", "prune")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 outputs differ, a value is incomplete or a pool is damaged,
    2 bad input, 130 interrupted."""
    try:
        _tolerate(sys.stdout)
        code = _run(sys.argv[1:] if argv is None else list(argv))
        print(end="", flush=True)
        return code
    except LookaheadError as error:
        print(f"lookahead: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nlookahead: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return CLOSED_PIPE
    except OSError as error:
        _drop_output()
        print(f"lookahead: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        return BAD_INPUT


def _run(argv: list[str]) -> int:
    asks_nothing = argv in NOTHING_ASKED
    try:
        args = parser().parse_args([*argv, "--help"] if asks_nothing else argv)
    except SystemExit as stop:  # after help or version
        return BAD_INPUT if asks_nothing else int(stop.code or 0)
    if args.command == "pool":
        from lookahead.pool.command import run

        return run(args)
    if args.command in ("json", "grammars"):
        from lookahead import json_command

        return json_command.grammars(args) if args.command == "grammars" else json_command.run(args)
    if args.command == "check":
        from lookahead.check_command import run as check

        return check(args)
    if args.command == "calibrate":
        from lookahead.calibrate_command import run as calibrate

        return calibrate(args)
    if args.command == "bench":
        from lookahead.bench_command import run as bench

        return bench(args)
    if args.command == "explain":
        from lookahead.explain_command import run as explain

        return explain(args)
    if args.command == "report":
        from lookahead.report_command import run as report

        return report(args)
    return demo(args) if args.command == "demo" else generate(args)


def _tolerate(output: Any) -> None:
    """Make `output` write what its encoding lacks as `?` instead of failing."""
    if "utf" not in (getattr(output, "encoding", None) or "utf").lower() and hasattr(output, "reconfigure"):
        output.reconfigure(errors="replace")


def _drop_output() -> None:
    """Let the interpreter flush standard output into nothing when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def generate(args: argparse.Namespace) -> int:
    """Write on from a prompt."""
    check_sampling(args)
    check_drafting(args, "pool", "trace", "invariant")
    check_curves(args)
    if args.trace is not None:
        check_writable("--trace", args.trace)
    grammar = None if args.grammar is None else read_grammar(args.grammar)
    with loaded(args) as found:
        options = decoding(args) | {"max_new_tokens": found.limit} | ({"stop_strings": args.stop} if args.stop else {})
        options |= {} if grammar is None else {"grammar": grammar}
        _write(args, found.model, found.tokenizer, found.inputs, options)
    return 0


def _write(
    args: argparse.Namespace, model: Any, tokenizer: Any, inputs: dict[str, Any], options: dict[str, Any]
) -> None:
    """Generate, write the text as it comes, and end the line."""
    import torch

    from lookahead.stream import TextStream, decode

    written = [""]
    if args.seed is not None:
        torch.manual_seed(args.seed)
    with status(STARTING) as say:

        def write(text: str) -> None:
            say("")
            written.append(text)
            print(text, end="", flush=True)

        meter = metered(say, options["max_new_tokens"], model)
        streamer = meter if args.no_stream else {"streamer": TextStream(tokenizer, write)}
        begin = time.perf_counter()
        ids, run = _decode(args, model, tokenizer, inputs | options | streamer)
        seconds, tokens = time.perf_counter() - begin, ids.shape[1] - inputs["input_ids"].shape[1]
        if args.no_stream:
            write(decode(tokenizer, ids[0, -tokens:].tolist()))
    if not written[-1].endswith("\n"):
        print()
    if args.trace is not None and run is not None:
        save_trace(args.trace, run)
    if args.stats:
        say_stats(tokens, run, seconds)


def _decode(args: argparse.Namespace, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> tuple[Any, Run | None]:
    """Return the sequence and, unless plain, what `Lookahead` did."""
    from lookahead.engine import Lookahead
    from lookahead.request import end_tokens

    grammar = arguments.pop("grammar", None)
    with served(args):
        if args.plain:
            if grammar is not None:
                processor = grammar.processor(tokenizer, eos_token_id=end_tokens(model, arguments))
                arguments = arguments | {"logits_processor": [processor]}
            return model.generate(**arguments, tokenizer=tokenizer), None
        remember: Remember = None if args.no_remember else "output"
        with Lookahead(model, tokenizer, pool=args.pool, remember=remember, **settings(args, model)) as lookahead:
            return lookahead.generate(**arguments, grammar=grammar), lookahead.last


def demo(args: argparse.Namespace) -> int:
    """Compare plain and lookahead decoding on the bundled prompts and show what came out."""
    started = time.monotonic()
    if args.json is not None:
        check_writable("--json", args.json)
    from lookahead.loading import quiet

    with status("loading the model …") as say, quiet():
        import torch

        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(args.threads)
            comparison, compiling = _measure(args, started, say)
        finally:
            torch.set_num_threads(threads)
        rows = comparison.rows
        if args.json is not None:
            _save(args.json, rows)
        say("")
        _show(args, comparison, compiling)
    return 0 if all(row.identical for row in rows) else DIFFERS


def _measure(args: argparse.Namespace, started: float, say: Say) -> tuple[Comparison, float]:
    """Load, warm up, and run rounds while there is time; return the comparison and the seconds of compilation."""
    from lookahead.compare import Comparison, read_tasks
    from lookahead.loading import Checkpoint, check_served

    checkpoint = Checkpoint(args.model)
    config = checkpoint.config()
    check_served(config, args.model)
    tasks, tokenizer = read_tasks(checkpoint.directory), checkpoint.tokenizer()
    comparison = Comparison(checkpoint.model(config, dtype="float32"), tokenizer, tasks, **nodes(args))
    say("warming up (the very first run compiles) …")
    compiling = comparison.warm_up()
    for number in range(args.rounds):
        begin = time.monotonic()
        comparison.round(lambda text, part, done=number: say(text, (done + part) / args.rounds))  # type: ignore[misc]
        if 2 * time.monotonic() - begin - started > DEMO_SECONDS:
            break
    return comparison, compiling


def _show(args: argparse.Namespace, comparison: Comparison, compiling: float) -> None:
    from lookahead.screen import Screen
    from lookahead.show import coloured, legend, table

    screen, rows = Screen(colour=not args.no_color), comparison.rows
    screen.write(comparison.setting)
    if compiling > 1:
        screen.write(f"The first call took {compiling:.0f} s to compile or load its kernels; not in the times below.")
    rounds = f"{comparison.rounds} rounds" if comparison.rounds > 1 else "1 round"
    why = "" if comparison.rounds == args.rounds else f" (of {args.rounds}: the time was up)"
    screen.write(
        f"Greedy, in turns, medians of {rounds}{why}; a fresh Lookahead each run, which remembers no answer.\n"
    )
    screen.print(table(rows, screen.width))
    screen.write(f"\nOutput of {rows[0].task.name!r}; {legend(colour=screen.has_colour)}:\n")
    screen.write(coloured(comparison.tokenizer, rows[0], colour=screen.has_colour))
    different = [row.task.name for row in rows if not row.identical]
    if different:
        screen.write(f"\nDIFFERENT from model.generate(): {', '.join(different)}")
    else:
        screen.write(f"\nAll {len(rows)} outputs are identical to those of model.generate().")


def _save(file: str, rows: Sequence[Row]) -> None:
    try:
        Path(file).write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable("--json", file, error) from error
