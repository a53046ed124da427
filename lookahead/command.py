"""What the commands share: a model that is checked and loaded, decoding options, errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lookahead.errors import GrammarError, InvalidArgument, InvalidInput, UnsupportedArgument, UnsupportedModel

# torch and transformers are imported where they are used, so that `lookahead --help` answers at once.
if TYPE_CHECKING:
    from lookahead.grammar.grammar import Grammar
    from lookahead.loading import Checkpoint
    from lookahead.trace import Run

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
BAR = 20  # letters of a whole bar


class Say(Protocol):
    """Shows in one line what goes on, and how much of it is done (0 to 1), where that is known."""

    def __call__(self, text: str, part: float | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what it is to go on from.

    Attributes:
        inputs: the prompt for `generate()`.
        limit: how many tokens to generate.
    """

    model: Any
    tokenizer: Any
    prompt: str
    inputs: dict[str, Any]
    limit: int


def check_sampling(args: argparse.Namespace) -> None:
    """Raise `InvalidInput` for sampling options beside --greedy."""
    if args.greedy and (given := [name for name in SAMPLING if getattr(args, name) is not None]):
        raise InvalidInput(f"--greedy takes the likeliest token; leave out --{given[0].replace('_', '-')}, or --greedy")


def check_drafting(args: argparse.Namespace, *names: str) -> None:
    """Raise `InvalidInput` for one of these options, which need drafts, beside --plain."""
    if args.plain and (given := [name for name in names if getattr(args, name) not in (None, False)]):
        raise InvalidInput(f"--plain drafts nothing; leave out --{given[0]}, or --plain")


def read_grammar(name: str) -> Grammar:
    """Return the grammar of `--grammar`: a file, or the name of one that comes along."""
    from lookahead.grammar.grammar import Grammar
    from lookahead.grammar.library import pattern

    try:
        match Path(name).suffix:
            case ".lark":
                return Grammar.lark(read_text("--grammar", name))
            case ".gbnf":
                return Grammar.gbnf(read_text("--grammar", name))
            case ".regex":
                return Grammar.regex(pattern(read_text("--grammar", name)))
            case _:
                return Grammar.named(name)
    except (GrammarError, InvalidArgument) as error:
        raise InvalidInput(f"--grammar {name}: {error}") from error


def read_text(option: str, file: str) -> str:
    """Return the text of a UTF-8 file that an option names."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{option} {file}: {(error.strerror or str(error)).lower()}; give a text file") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{option} {file}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def check_curves(args: argparse.Namespace) -> None:
    """Raise `InvalidInput` before the work for measured costs that cannot be read, or that nothing asks for."""
    check_drafting(args, "curves")
    if args.curves is not None and args.nodes is not None:
        raise InvalidInput(f"--nodes {args.nodes} runs so many, whatever they cost; leave out --curves, or --nodes")
    if args.curves is not None and args.invariant:
        raise InvalidInput("--invariant runs 32 rows a pass, whatever they cost; leave out --curves, or --invariant")
    if args.nodes is None and not args.plain and (file := _curves_file(args)) is not None:
        from lookahead.curves import Curves

        Curves.load(file)


def _curves_file(args: argparse.Namespace) -> Path | None:
    """Return the file of `--curves`, else the default one where it is there."""
    from lookahead.curves import default_path

    if args.curves is not None:
        return Path(args.curves)
    file = default_path()
    return file if os.path.exists(file) else None  # Path.exists() raises where the user may not look


def settings(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return what the options say of how `Lookahead` runs.

    Raises:
        InvalidInput: they cannot be served with this model.
    """
    found = budget(args, model)
    if args.invariant:
        from lookahead.errors import InvalidArgument, UnsupportedModel
        from lookahead.static.choice import static_of
        from lookahead.support import family_of

        try:
            static_of(model, family_of(model), None, invariant=True, compile=False)
        except (InvalidArgument, UnsupportedModel) as error:
            raise InvalidInput(f"--invariant: {error}") from error
        found["invariant"] = True
    return found


def budget(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Return `nodes` or `budget` for `Lookahead`, where nodes were given, or the costs of the model are known."""
    file = None if args.nodes is not None else _curves_file(args)
    if file is None:
        return nodes(args)
    from lookahead.budget import Budget
    from lookahead.curves import Curves, key_of, setting_of

    if Curves.load(file).holds(key_of(model)):
        return {"budget": Budget(curves=file)}
    if args.curves is None:
        return {}
    fix = "measure it: `lookahead calibrate`, with the same --model, --dtype, --device and --curves"
    raise InvalidInput(f"--curves {file}: holds nothing of this model as it runs here ({setting_of(model)}); {fix}")


@contextlib.contextmanager
def loaded(args: argparse.Namespace) -> Iterator[Loaded]:
    """Give what to generate with, once all of it is checked."""
    from lookahead.loading import Checkpoint, check_device, check_fit, check_served, encode, quiet, read_prompt, room

    prompt = read_prompt(args.prompt, args.prompt_file)
    with status(f"loading {args.model} …") as say, quiet():
        checkpoint, device = Checkpoint(args.model), check_device(args.device)
        config = checkpoint.config()
        if not args.plain:
            check_served(config, args.model)
        tokenizer = checkpoint.tokenizer()
        inputs = encode(tokenizer, prompt, chat=args.chat)
        check_fit(config, inputs)
        limit = room(config, inputs["input_ids"].shape[1], args.max_new_tokens)
        model = load_model(args, checkpoint, config, device)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        say("")
        yield Loaded(model, tokenizer, prompt, inputs, limit)


def load_model(args: argparse.Namespace, checkpoint: Checkpoint, config: Any, device: str) -> Any:
    """Return the model in the dtype of `--dtype`."""
    dtype = "float32" if (args.model, args.dtype) == ("demo", "auto") else args.dtype
    return checkpoint.model(config, dtype=dtype, device=device)


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate()` that the sampling options stand for."""
    names = [name for name in (*SAMPLING, "repetition_penalty") if getattr(args, name) is not None]
    options = {name: getattr(args, name) for name in names}
    if args.greedy:
        options["do_sample"] = False
    elif args.sample or any(name in SAMPLING for name in names):
        options["do_sample"] = True
    return options


def nodes(args: argparse.Namespace) -> dict[str, Any]:
    """Return `nodes` for `Lookahead`, where it was given."""
    return {} if args.nodes is None else {"nodes": args.nodes}


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[None]:
    """Say in one line, with a way out, what keeps a model from generating."""
    import torch

    try:
        yield
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


def say_stats(tokens: int, run: Run | None, seconds: float) -> None:
    """Write to standard error what a call took; without a run it was plain."""
    passes = tokens if run is None else run.forwards
    each = f"{tokens / passes:.2f} tokens per pass"
    print(f"{tokens} tokens, {passes} passes, {each}, {seconds:.2f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def status(first: str) -> Iterator[Say]:
    """Give a function that shows a bar, or a line, where a person watches standard error; no thread disturbs."""
    shows, width, shown = watched(), shutil.get_terminal_size().columns - 1, ""

    def say(text: str, part: float | None = None) -> None:
        nonlocal shown
        text = text if part is None else f"{bar(part)} {text}"
        if shows and (text or shown):  # with nothing to clear, the line may hold output
            print(f"\r{'':{len(shown)}}\r{text[:width]}", end="", file=sys.stderr, flush=True)
        shown = text[:width]

    try:
        say(first)
        yield say
    finally:
        say("")


class Meter:
    """A streamer for `generate()` that shows how many tokens there are.

    Args:
        limit: how many there may be.
    """

    def __init__(self, say: Say, limit: int) -> None:
        self._say, self._limit, self._tokens = say, limit, -1

    def put(self, tokens: Any) -> None:
        """Take the prompt at the first call, then the next tokens."""
        self._tokens = 0 if self._tokens < 0 else self._tokens + int(tokens.numel())
        if self._tokens:
            self._say(f"{self._tokens} tokens of at most {self._limit}", self._tokens / self._limit)

    def end(self) -> None:
        """Clear the line."""
        self._say("")


def metered(say: Say, limit: int, model: Any) -> dict[str, Any]:
    """Return the streamer that shows progress, for `generate()`; none where nobody watches, or it takes none."""
    beams = getattr(model.generation_config, "num_beams", None) or 1
    return {"streamer": Meter(say, limit)} if watched() and beams == 1 else {}


def watched() -> bool:
    """Whether a person sees what is written to standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


STARTING = "starting (the very first run compiles) …"


def bar(part: float) -> str:
    """Return a bar that is filled up to `part`, and the percentage.

    >>> bar(0.25)
    '[#####...............]  25%'
    """
    part = min(max(part, 0.0), 1.0)
    return f"[{'#' * round(BAR * part):.<{BAR}}] {100 * part:3.0f}%"


def check_writable(option: str, file: str) -> None:
    """Raise `InvalidInput` before the work where the rows could not be saved after it."""
    path = Path(file)
    try:
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise unwritable(option, file, error) from error


def save_trace(file: str, run: Run) -> None:
    """Write the trace of `--trace`."""
    try:
        run.save(file)
    except OSError as error:
        raise unwritable("--trace", file, error) from error


def unwritable(option: str, file: str, error: OSError) -> InvalidInput:
    return InvalidInput(f"{option} {file}: {(error.strerror or str(error)).lower()}; give a file that can be written")
