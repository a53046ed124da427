"""What `lookahead json` and `lookahead grammars` do."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lookahead.command import (
    STARTING,
    check_curves,
    check_drafting,
    check_sampling,
    check_writable,
    decoding,
    loaded,
    metered,
    read_text,
    save_trace,
    say_stats,
    served,
    settings,
    status,
)
from lookahead.errors import GrammarError, InvalidArgument, InvalidInput, UnusableText

if TYPE_CHECKING:
    from lookahead.command import Loaded
    from lookahead.grammar.grammar import Grammar
    from lookahead.structured.call import Text
    from lookahead.structured.schemas import Shape
    from lookahead.trace import Run

UNUSABLE = 1


def run(args: argparse.Namespace) -> int:
    """Write a JSON value of a schema."""
    check_sampling(args)
    check_drafting(args, "memory", "trace", "invariant")
    check_curves(args)
    if args.trace is not None:
        check_writable("--trace", args.trace)
    shape, grammar = _schema(args)
    from lookahead.structured.results import JsonReader, raised, results
    from lookahead.trace import Run

    with loaded(args) as found:
        begin = time.perf_counter()
        text, trace = _generate(args, found, grammar)
        seconds = time.perf_counter() - begin
    if trace is not None and args.trace is not None:
        save_trace(args.trace, trace)
    try:
        result = raised(results([text], trace or Run(text.tokens, ()), JsonReader(shape)))[0]
    except UnusableText as error:
        print(error.text)
        said = " ".join(str(error).split()).replace("max_new_tokens", "--max-new-tokens")
        print(f"lookahead: {said}", file=sys.stderr)
        return UNUSABLE
    finally:
        if args.stats:
            say_stats(text.tokens, trace, seconds)
    pretty = sys.stdout is not None and sys.stdout.isatty()
    print(json.dumps(result.value, indent=2, ensure_ascii=False) if pretty else result.text)
    return 0


def _schema(args: argparse.Namespace) -> tuple[Shape, Grammar]:
    """Return shape and grammar of `--schema`, and say what `--lenient` leaves out."""
    from lookahead.structured.schemas import Shape

    shape = Shape.of(read_text("--schema", args.schema))
    try:
        grammar = shape.grammar(whitespace=args.whitespace, lenient=args.lenient)
    except (GrammarError, InvalidArgument) as error:
        said = str(error).replace("give lenient=True", "add --lenient")
        raise InvalidInput(f"--schema {args.schema}: {said}") from error
    if grammar.dropped:
        print(f"lookahead: left out of the schema: {', '.join(grammar.dropped)}", file=sys.stderr)
    return shape, grammar


def _generate(args: argparse.Namespace, found: Loaded, grammar: Grammar) -> tuple[Text, Run | None]:
    """Return the text and, unless plain, what `Lookahead` did."""
    import torch

    from lookahead.engine import Lookahead
    from lookahead.structured.call import Call

    prompt: Any = [{"role": "user", "content": found.prompt}] if args.chat else found.prompt
    limit = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    if args.seed is not None:
        torch.manual_seed(args.seed)
    with served(args), status(STARTING) as say:
        model = found.model
        if not args.plain:
            model = Lookahead(model, found.tokenizer, **settings(args, model))
        call = Call(model, found.tokenizer, prompt, grammar, decoding(args) | limit)
        meter = metered(say, call.arguments.get("max_new_tokens", found.limit), found.model)
        if args.plain:
            return call.run_plain(**meter)[0], None
        with call.lookahead(args.memory or False) as lookahead:
            texts, trace = call.run(lookahead, **meter)
    return texts[0], trace


def grammars(args: argparse.Namespace) -> int:
    """List the grammars that come along, or write one."""
    from lookahead.grammar.library import names, read

    entries = [read(name) for name in ([args.name] if args.name is not None else names())]
    if args.name is not None and not args.json:
        print(entries[0].text.removesuffix("\n"))
        return 0
    if args.json:
        rows = [asdict(entry) for entry in entries]
        print(json.dumps(rows[0] if args.name is not None else rows, indent=2, ensure_ascii=False))
        return 0
    wide = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:{wide}}  {entry.kind:5}  {entry.description}")
    return 0
