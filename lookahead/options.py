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


def _number(kind: Callable[[str], Any], fits: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
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


def _name(text: str) -> str:
    if not text.strip("."):
        raise argparse.ArgumentTypeError(f"{text!r} is no field; give its name, such as output or message.content")
    return text


def _filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty string is everywhere; give some text to stop at")
    return text


def _whole(text: str) -> int:
    """Read a whole number that may end in k, M or G: thousands, millions, billions."""
    power = {"k": 1, "m": 2, "g": 3}.get(text[-1:].lower(), 0)
    return int(text[:-1] if power else text) * int(1000**power)


_COUNT = _number(int, lambda n: n >= 1, "a whole number of 1 or more")
_SIZE = _number(_whole, lambda n: n >= 1, "a whole number of 1 or more, such as 500000, 500k, 20M or 1G")
_NODES = _number(int, lambda n: 0 <= n <= MAX_NODES, f"a whole number from 0 (plain decoding) to {MAX_NODES}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of `lookahead`; `command` of what it parses is the name of the command."""
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
    _add_json(commands.add_parser("json", help="write a JSON value of a schema", allow_abbrev=False))
    _add_check(commands.add_parser("check", help="try out that drafts change nothing of a model", allow_abbrev=False))
    _add_calibrate(
        commands.add_parser("calibrate", help="measure what a pass of a model costs, to start from", allow_abbrev=False)
    )
    _add_bench(commands.add_parser("bench", help="measure lookahead beside other ways to generate", allow_abbrev=False))
    _add_explain(commands.add_parser("explain", help="say where the time of a run went, and why", allow_abbrev=False))
    _add_report(commands.add_parser("report", help="show a run pass by pass on an HTML page", allow_abbrev=False))
    _add_grammars(commands.add_parser("grammars", help="list the grammars that come along", allow_abbrev=False))
    _add_pool(
        commands.add_parser("pool", help="keep n-grams of a corpus on the disk to draft from", allow_abbrev=False)
    )
    return top


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Three prompts of each kind, plain and with lookahead: time, model passes, same output or not."
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument(
        "--nodes", type=_NODES, metavar="N", help="drafted tokens a pass checks (default: as many as pay)"
    )
    parser.add_argument("--rounds", type=_COUNT, default=3, metavar="R", help="runs of each prompt (default 3)")
    _add_threads(parser)
    parser.add_argument("--no-color", action="store_true", help="no colours; mark the passes with |")
    parser.add_argument("--model", default="demo", metavar="DIR", help=argparse.SUPPRESS)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    cores = os.cpu_count() or 1
    threads = _number(int, lambda n: 1 <= n <= cores, f"a whole number from 1 to {cores}, the cores of this machine")
    parser.add_argument(
        "--threads",
        type=threads,
        default=min(2, cores),
        metavar="T",
        help="CPU threads of torch (default: up to 2; more slow a small model down, and so does a busy machine)",
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write on from a prompt: --prompt, --prompt-file, or standard input, taken exactly as it is."
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="a model directory, a Hub name, or demo for the bundled model"
    )
    _add_prompt(parser)
    parser.add_argument(
        "--grammar", metavar="NAME", help="keep to a .lark, .gbnf or .regex file, or `lookahead grammars`"
    )
    parser.add_argument("--max-new-tokens", type=_COUNT, metavar="N", help="default: 256, or what fits the context")
    parser.add_argument(
        "--stop", type=_filled, action="append", metavar="STRING", help="stop after this string; may be repeated"
    )
    _add_sampling(parser.add_argument_group("sampling (without any of these: as the model is set up)"))
    add = parser.add_argument_group("running").add_argument
    _add_running(add)
    add("--pool", metavar="DIR", action="append", help="draft from this pool too, made if it is not there; repeatable")
    add("--no-remember", action="store_true", help="add nothing to the (first) pool")
    add("--no-stream", action="store_true", help="write the text when it is complete")


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text file; - is standard input")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def _add_running(add: Callable[..., Any]) -> None:
    add("--nodes", type=_NODES, metavar="N", help="drafted tokens a pass checks (default: as many as pay)")
    add("--curves", metavar="FILE", help="costs of passes to start from, by `lookahead calibrate` (default: its file)")
    add("--invariant", action="store_true", help="passes of one shape, so that drafts do not even change rounding")
    _add_loading(add)
    add("--plain", action="store_true", help="plain model.generate(), for comparison")
    add("--stats", action="store_true", help="write tokens, passes and seconds to standard error")
    add("--trace", metavar="FILE", help="write what every pass did as JSON lines, for `lookahead explain`")


def _add_loading(add: Callable[..., Any]) -> None:
    """Add what says how a model is loaded."""
    add("--dtype", default="auto", choices=DTYPES, metavar="TYPE", help=f"{', '.join(DTYPES)} (default: as stored)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a value of a JSON Schema: indented on a terminal, else exactly as generated, in one line. Exit code 1, "
        "and what is there of the value, where --max-new-tokens ends it early."
    )
    parser.epilog = "for example: lookahead json --schema invoice.json --prompt-file letter.txt --model path/to/model"
    parser.add_argument("--schema", required=True, metavar="FILE", help="a JSON Schema")
    _add_prompt(parser)
    parser.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="a model directory or a Hub name (default: demo, the bundled one)",
    )
    parser.add_argument("--max-new-tokens", type=_COUNT, metavar="N", help="default: 1024, or what fits the context")
    parser.add_argument(
        "--whitespace", default="fixed", choices=("fixed", "compact", "indented"), metavar="STYLE",
        help="of the generated text: fixed (one line, the default), compact (none), or indented",
    )  # fmt: skip
    parser.add_argument(
        "--lenient", action="store_true", help="leave out keywords that are not supported, and say which"
    )
    _add_sampling(parser.add_argument_group("sampling (without any of these: as the model is set up)"))
    add = parser.add_argument_group("running").add_argument
    _add_running(add)
    add("--memory", metavar="DIR", help="draft from earlier values of this schema, kept here")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generate plainly and with drafts, greedy, sampled with a seed, with logits processors, in batches, under a "
        "JSON grammar, with stop strings; and compare. Exit code 0 where all calls are equal, or numeric ties are all "
        "that differs; 1 where one differs; 2 for bad input, or a model that is not served."
    )
    parser.epilog = "for example: lookahead check path/to/model --dtype bfloat16 --prompts prompts.jsonl"
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model directory, a Hub name, or demo for the bundled model")
    add(
        "--prompts",
        metavar="FILE",
        help=".jsonl with a field prompt, .json with a list, or .txt with an empty line between prompts (default: the "
        "model's prompts.json, or a few that come along)",
    )
    _add_loading(add)
    add("--max-new-tokens", type=_COUNT, metavar="N", help="of each call (default: 64, --quick 24, or what fits)")
    add("--quick", action="store_true", help="fewer kinds of calls, and three prompts at most")
    add(
        "--invariant", action="store_true",
        help="compare passes of one shape, with drafts and with none, bit by bit (Lookahead(invariant=True))",
    )  # fmt: skip
    add("--json", metavar="FILE", help="also write what came of every call as JSON")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure what a pass of a model costs by the nodes that it runs, and keep that: `lookahead generate` and "
        "`lookahead json` start from it where model, device, dtype and CPU threads are the same, instead of finding it "
        "out as they go. In Python: Lookahead(model, budget=Budget(curves=FILE))."
    )
    parser.epilog = "for example: lookahead calibrate --model path/to/model --rows 1 4 16"
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a model directory, a Hub name, or demo for the bundled model")
    add("--rows", nargs="+", type=_COUNT, default=[1], metavar="N", help="batch sizes (default: 1)")
    add("--context", type=_COUNT, metavar="N", help="tokens before the drafts (default: 256, or what fits)")
    most = _number(int, lambda n: 1 <= n <= MAX_NODES, f"a whole number from 1 to {MAX_NODES}")
    add("--most", type=most, metavar="N", help="drafted tokens of the largest pass (default: 64, or what fits)")
    _add_loading(add)
    add("--curves", metavar="FILE", help="keep it here (default: lookahead/curves.json in $XDG_CACHE_HOME or ~/.cache)")
    add("--json", action="store_true", help="write what was measured as one JSON object")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generate the same texts, greedily, by plain generate(), lookahead, the prompt lookup of transformers, Arctic "
        "Inference's suffix trees, LookaheadDecoding and vLLM, in turns; write how fast each was, its tokens per pass, "
        "memory, and whether its texts are plain's. What cannot run is listed with the reason. Exit code 1 where a "
        "text of lookahead is not plain's."
    )
    parser.epilog = "for example: lookahead bench --quick --json scores.json --plot scores.png"
    add = parser.add_argument
    add("--model", default="demo", metavar="NAME", help="a model directory or a Hub name (default: the bundled one)")
    add(
        "--prompts", metavar="FILE",
        help='JSON lines of {"workload": …, "prompt": …, "max_new_tokens": …, "schema": …} (default: prompts.json of '
        "the model)",
    )  # fmt: skip
    add("--quick", action="store_true", help="3 texts of a workload, 2 rounds, under 5 minutes for the bundled model")
    add("--rounds", type=_COUNT, metavar="R", help="runs of each text (default 5, with --quick 2)")
    add("--each", type=_COUNT, metavar="N", help="most texts of a workload (default: all, with --quick 3)")
    add("--no-nothing", action="store_true", help="leave out random text, in which nothing can be reused")
    add("--nodes", type=_NODES, metavar="N", help="drafted tokens a pass of lookahead checks (default: as many as pay)")
    add(
        "--peers", default=".peers", metavar="DIR",
        help="environments of other systems, made by benchmarks/peers.sh (default: .peers)",
    )  # fmt: skip
    _add_loading(add)
    _add_threads(parser)
    add("--json", metavar="FILE", help="write the scores by workload and system")
    add("--markdown", metavar="FILE", help="write the tables that are printed")
    add("--plot", metavar="FILE", action="append", help="draw them, as .png or .svg; repeatable")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say of a run whose --trace was written how many tokens came a pass and were expected to; where the time went; "
        "why passes ran as many nodes as they did; and what each source earned, at what tokens and nodes were worth."
    )
    parser.epilog = (
        "The keys of --json: tokens, rows, passes (with the prefill), tokens_per_pass; all, chosen (passes that chose "
        "how many nodes) and each reason in why, with passes, nodes, expected, committed; seconds, with draft, mask, "
        "forward, verify, cache, learn, other, step; each source in sources, with run, accepted, hit_rate, priced "
        "(passes), earned_s, cost_s, net_s; unpriced (passes). Sums leave the prefill out."
    )
    parser.add_argument("trace", metavar="TRACE", help="a file that --trace wrote; - is standard input")
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--steps", action="store_true", help="also write a line for each pass")
    more.add_argument("--json", action="store_true", help="write all totals as one JSON object")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an HTML page that shows a run whose --trace was written, pass by pass: the text, coloured by who "
        "drafted it, the token trees, and where the time went. One file, which needs no network; open it in a browser."
    )
    parser.epilog = "for example: lookahead report trace.jsonl"
    parser.add_argument("trace", metavar="TRACE", help="a file that --trace wrote; - is standard input")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write the page here, over what is there; - is standard output (default: TRACE with .html)",
    )
    parser.add_argument("--title", metavar="TEXT", help="heading of the page (default: the name of the trace)")


def _add_grammars(parser: argparse.ArgumentParser) -> None:
    parser.description = "List the grammars that come along, for --grammar and Grammar.named; or write one of them."
    parser.add_argument("name", nargs="?", metavar="NAME", help="write the text of this grammar")
    parser.add_argument("--json", action="store_true", help="write it as JSON")


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


def _add_pool(parser: argparse.ArgumentParser) -> None:
    parser.description = "A pool holds the n-grams of a corpus and of earlier answers in a directory, to draft from."
    parser.epilog = "for example: lookahead pool build my-pool --from src data.jsonl.gz --field output --model demo"
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    build = actions.add_parser("build", help="fill a pool from files and directories", allow_abbrev=False)
    build.description = (
        "Read files and directories into a pool, made if it is not there. Code, text and JSON are one document a file, "
        "JSON lines (.jsonl, .ndjson) one a line; all may be compressed (.gz). What is in the pool is not read twice: "
        "the same command goes on where an earlier one was stopped, and later adds what has changed."
    )
    build.add_argument("directory", metavar="DIR", help="the pool")
    build.add_argument(
        "--from", dest="paths", nargs="+", action="extend", required=True, metavar="PATH", help="files, directories"
    )
    _add_reading(build)
    build.add_argument(
        "--max-tokens", type=_SIZE, metavar="N", help="limit, kept with the pool; the oldest leave first (default 200M)"
    )
    build.add_argument("--quiet", action="store_true", help="write nothing but errors")
    add = actions.add_parser("add", help="add files to a pool", allow_abbrev=False)
    add.description = "Add files to a pool that is there, read as `lookahead pool build` reads them."
    add.add_argument("directory", metavar="DIR", help="the pool")
    add.add_argument("paths", nargs="+", metavar="FILE", help="files; - is standard input, one document")
    _add_reading(add)
    add.add_argument("--quiet", action="store_true", help="write nothing but errors")
    info = actions.add_parser("info", help="say what a pool holds, and whether it is whole", allow_abbrev=False)
    info.description = "Say what a pool holds; exit code 1 where something is damaged. A writer may have it open."
    info.add_argument("directory", metavar="DIR", help="the pool")
    info.add_argument("--json", action="store_true", help="write it as JSON")
    info.add_argument("--verify", action="store_true", help="read every byte; without it, a sample of a large pool")
    merge = actions.add_parser("merge", help="add the documents of other pools", allow_abbrev=False)
    merge.description = "Add the documents of other pools to a pool; those that it holds already are not added again."
    merge.add_argument("directory", metavar="DIR", help="the pool, made if it is not there")
    merge.add_argument("others", nargs="+", metavar="OTHER", help="pools of the same tokenizer; they stay as they are")
    prune = actions.add_parser("prune", help="drop what is oldest, or damaged", allow_abbrev=False)
    prune.description = "Drop the oldest documents of a pool, or its damaged files, for good."
    prune.add_argument("directory", metavar="DIR", help="the pool")
    rest = _number(_whole, lambda n: n >= 0, "a whole number, such as 500000, 500k or 20M; 0 drops all")
    prune.add_argument("--max-tokens", type=rest, metavar="N", help="keep the youngest documents up to N tokens")
    prune.add_argument("--damaged", action="store_true", help="read every byte, and drop the files that are damaged")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """Add what says how documents are read and tokenized."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json, or a directory with a saved tokenizer")
    which.add_argument("--model", metavar="NAME", help="the tokenizer of a model: a directory, a Hub name, or demo")
    add = parser.add_argument_group("reading").add_argument
    add("--field", type=_name, metavar="NAME", help="of each JSON line take this field; a.b is the field b of a")
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "GLOB"}
    add("--include", **many, help="only files that fit: '*.py' by name, 'src/*.py' by path below the directory")
    add("--exclude", **many, help="no files and directories that fit (hidden ones and caches are never walked into)")
    add("--max-file-bytes", type=_SIZE, metavar="N", help="skip documents that are larger (default: 16 MiB)")
