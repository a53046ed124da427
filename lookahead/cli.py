"""The command line: `lookahead demo`, `lookahead generate` and `lookahead pool`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lookahead.errors import InvalidInput, LookaheadError, UnsupportedArgument, UnsupportedModel
from lookahead.options import parser

# torch, transformers and rich are imported where they are used, so that `lookahead --help` answers at once.
if TYPE_CHECKING:
    from lookahead.compare import Comparison, Row
    from lookahead.memory import Remember
    from lookahead.trace import Run

DIFFERS, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
DEMO_SECONDS = 70.0  # no round that would end later, counted from the start of the command, is begun
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
POOL_ACTIONS = (["build"], ["add"], ["info"], ["prune"])
Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 outputs differ or a pool is damaged, 2 bad input, 130
    interrupted."""
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
    asks_nothing = argv in ([], ["generate"], ["pool"]) or (argv[0] == "pool" and argv[1:] in POOL_ACTIONS)
    try:
        args = parser().parse_args([*argv, "--help"] if asks_nothing else argv)
    except SystemExit as stop:  # after help or version
        return BAD_INPUT if asks_nothing else int(stop.code or 0)
    if args.command == "pool":
        from lookahead.pool.command import run

        return run(args)
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
    from lookahead.loading import Checkpoint, check_device, check_fit, check_served, encode, quiet, read_prompt, room

    if args.greedy and (given := [name for name in SAMPLING if getattr(args, name) is not None]):
        raise InvalidInput(f"--greedy takes the likeliest token; leave out --{given[0].replace('_', '-')}, or --greedy")
    if args.plain and args.pool:
        raise InvalidInput("--plain drafts nothing; leave out --pool, or --plain")
    prompt = read_prompt(args.prompt, args.prompt_file)
    with _status(f"loading {args.model} …") as say, quiet():
        checkpoint, device = Checkpoint(args.model), check_device(args.device)
        config = checkpoint.config()
        if not args.plain:
            check_served(config, args.model)
        tokenizer = checkpoint.tokenizer()
        inputs = encode(tokenizer, prompt, chat=args.chat)
        check_fit(config, inputs)
        limit = room(config, inputs["input_ids"].shape[1], args.max_new_tokens)
        dtype = "float32" if (args.model, args.dtype) == ("demo", "auto") else args.dtype
        model = checkpoint.model(config, dtype=dtype, device=device)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        say("")
        _write(args, model, tokenizer, inputs, _decoding(args, limit))
    return 0


def _decoding(args: argparse.Namespace, limit: int) -> dict[str, Any]:
    """Return the arguments of `generate()` that the options stand for."""
    names = [name for name in (*SAMPLING, "repetition_penalty") if getattr(args, name) is not None]
    options = {name: getattr(args, name) for name in names} | {"max_new_tokens": limit}
    if args.greedy:
        options["do_sample"] = False
    elif args.sample or any(name in SAMPLING for name in names):
        options["do_sample"] = True
    return options | ({"stop_strings": args.stop} if args.stop else {})


def _write(
    args: argparse.Namespace, model: Any, tokenizer: Any, inputs: dict[str, Any], options: dict[str, Any]
) -> None:
    """Generate, write the text as it comes, and end the line."""
    import torch

    from lookahead.stream import TextStream, decode

    written = [""]

    def write(text: str) -> None:
        written.append(text)
        print(text, end="", flush=True)

    if args.seed is not None:
        torch.manual_seed(args.seed)
    if not args.no_stream:
        options = options | {"streamer": TextStream(tokenizer, write)}
    begin = time.perf_counter()
    ids, run = _decode(args, model, tokenizer, inputs | options)
    seconds, tokens = time.perf_counter() - begin, ids.shape[1] - inputs["input_ids"].shape[1]
    if args.no_stream:
        write(decode(tokenizer, ids[0, -tokens:].tolist()))
    if not written[-1].endswith("\n"):
        print()
    if args.stats:
        passes = tokens if run is None else len(run.passes) + 1
        each = f"{tokens / passes:.2f} tokens per pass"
        print(f"{tokens} tokens, {passes} passes, {each}, {seconds:.2f} s", file=sys.stderr, flush=True)


def _decode(args: argparse.Namespace, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> tuple[Any, Run | None]:
    """Return the sequence and, unless plain, what `Lookahead` did."""
    import torch

    from lookahead.engine import Lookahead

    try:
        if args.plain:
            return model.generate(**arguments, tokenizer=tokenizer), None
        remember: Remember = None if args.no_remember else "output"
        with Lookahead(model, tokenizer, pool=args.pool, remember=remember, **_nodes(args)) as lookahead:
            return lookahead.generate(**arguments), lookahead.last
    except (UnsupportedModel, UnsupportedArgument) as error:
        raise InvalidInput(f"--model {args.model}: {error}; or add --plain") from error
    except torch.OutOfMemoryError as error:
        raise InvalidInput(
            "the device has too little memory; give a shorter prompt or fewer --max-new-tokens"
        ) from error
    except RuntimeError as error:
        if "probability tensor" in str(error):
            fix = "use a higher --temperature, or --dtype float32"
            raise InvalidInput(f"the model's scores cannot be sampled from, they are not finite; {fix}") from error
        raise


def _nodes(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.nodes is None else {"nodes": args.nodes}


def demo(args: argparse.Namespace) -> int:
    """Compare plain and lookahead decoding on the bundled prompts and show what came out."""
    started = time.monotonic()
    if args.json is not None:
        _check_writable(args.json)
    from lookahead.loading import quiet

    with _status("loading the model …") as say, quiet():
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
    comparison = Comparison(checkpoint.model(config, dtype="float32"), tokenizer, tasks, **_nodes(args))
    say("warming up (the very first run compiles) …")
    compiling = comparison.warm_up()
    for _ in range(args.rounds):
        begin = time.monotonic()
        comparison.round(say)
        if 2 * time.monotonic() - begin - started > DEMO_SECONDS:
            break
    return comparison, compiling


def _show(args: argparse.Namespace, comparison: Comparison, compiling: float) -> None:
    from lookahead.show import Screen, coloured, legend, table

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


@contextlib.contextmanager
def _status(first: str) -> Iterator[Say]:
    """Give a function that shows one line of progress where a person watches standard error; no thread disturbs."""
    watched, width = sys.stderr is not None and sys.stderr.isatty(), shutil.get_terminal_size().columns - 1
    shown = ""

    def say(text: str) -> None:
        nonlocal shown
        if watched and (text or shown):  # with nothing to clear, the line may hold output
            print(f"\r{'':{len(shown)}}\r{text[:width]}", end="", file=sys.stderr, flush=True)
        shown = text[:width]

    try:
        say(first)
        yield say
    finally:
        say("")


def _check_writable(file: str) -> None:
    """Raise `InvalidInput` before the work where the rows could not be saved after it."""
    path = Path(file)
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise _unwritable(file, error) from error


def _save(file: str, rows: Sequence[Row]) -> None:
    try:
        Path(file).write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: str, error: OSError) -> InvalidInput:
    return InvalidInput(f"--json {file}: {(error.strerror or str(error)).lower()}; give a file that can be written")
