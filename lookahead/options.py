"""The options of the command line; values out of range are refused in one line that names the option."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

from lookahead import __version__
from lookahead.errors import InvalidInput

DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")
MAX_NODES = 4096  # as in `lookahead.engine`, which takes seconds to import


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def _number(kind: type, fits: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """Return a reader of option values that names what is wanted."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
            if math.isfinite(value) and fits(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} does not do; give {wanted}")

    return read


def _filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty string is everywhere; give some text to stop at")
    return text


_COUNT = _number(int, lambda n: n >= 1, "a whole number of 1 or more")
_NODES = _number(int, lambda n: 0 <= n <= MAX_NODES, f"a whole number from 0 (plain decoding) to {MAX_NODES}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of `lookahead`; `command` of what it parses is "demo" or "generate"."""
    top = _Parser(
        prog="lookahead",
        description="Exact lookahead decoding: the same tokens as generate(), sooner.",
        epilog="for example: lookahead generate --model demo --prompt 'def add(a, b):' --stats",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"lookahead {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", dest="command", required=True)
    _add_demo(commands.add_parser("demo", help="compare with plain decoding on the bundled model", allow_abbrev=False))
    _add_generate(commands.add_parser("generate", help="write on from a prompt", allow_abbrev=False))
    return top


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Three prompts of each kind, plain and with lookahead: time, model passes, same output or not."
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--nodes", type=_NODES, metavar="N", help="drafted tokens a pass may check")
    parser.add_argument("--rounds", type=_COUNT, default=3, metavar="R", help="runs of each prompt (default 3)")
    cores = os.cpu_count() or 1
    threads = _number(int, lambda n: 1 <= n <= cores, f"a whole number from 1 to {cores}, the cores of this machine")
    parser.add_argument(
        "--threads",
        type=threads,
        default=min(2, cores),
        metavar="T",
        help="CPU threads of torch (default: up to 2; more slow a small model down, and so does a busy machine)",
    )
    parser.add_argument("--no-color", action="store_true", help="no colours; mark the passes with |")
    parser.add_argument("--model", default="demo", metavar="DIR", help=argparse.SUPPRESS)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write on from a prompt: --prompt, --prompt-file, or standard input, taken exactly as it is."
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="a model directory, a Hub name, or demo for the bundled model"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text file; - is standard input")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=_COUNT, metavar="N", help="default: 256, or what fits the context")
    parser.add_argument(
        "--stop", type=_filled, action="append", metavar="STRING", help="stop after this string; may be repeated"
    )
    _add_sampling(parser.add_argument_group("sampling (without any of these: as the model is set up)"))
    add = parser.add_argument_group("running").add_argument
    add("--nodes", type=_NODES, metavar="N", help="drafted tokens a pass may check")
    add("--dtype", default="auto", choices=DTYPES, metavar="TYPE", help=f"{', '.join(DTYPES)} (default: as stored)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    add("--plain", action="store_true", help="plain model.generate(), for comparison")
    add("--stats", action="store_true", help="write tokens, passes and seconds to standard error")
    add("--no-stream", action="store_true", help="write the text when it is complete")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    way = group.add_mutually_exclusive_group()
    way.add_argument("--greedy", action="store_true", help="take the likeliest token")
    way.add_argument(
        "--sample", action="store_true", help="draw tokens; --temperature, --top-k, --top-p, --min-p imply it"
    )
    add = group.add_argument
    hot = _number(float, lambda x: x > 0, "a number above 0, or --greedy instead")
    add("--temperature", type=hot, metavar="X", help="below 1: likelier tokens; above 1: more variety")
    whole = _number(int, lambda n: n >= 0, "a whole number; 0 is no limit")
    add("--top-k", type=whole, metavar="N", help="draw from the N likeliest tokens; 0: from all")
    share = _number(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
    add("--top-p", type=share, metavar="X", help="draw from the likeliest tokens that make up X of the chances")
    least = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    add("--min-p", type=least, metavar="X", help="draw from tokens with at least X of the best one's chance")
    positive = _number(float, lambda x: x > 0, "a number above 0")
    add("--repetition-penalty", type=positive, metavar="X", help="above 1: fewer repetitions")
    seed = _number(int, lambda n: 0 <= n < 2**64, "a whole number from 0 to 2^64 - 1")
    add("--seed", type=seed, metavar="N", help="the same seed draws the same text, also with --plain")
