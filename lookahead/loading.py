"""Model, tokenizer and prompt for the command line; whatever cannot be used raises `InvalidInput` with the fix."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lookahead.errors import InvalidInput

DEMO = Path(__file__).parent / "demo"
NEW_TOKENS = 256  # unless the user says how many, or fewer fit


def demo_path() -> str:
    """Return the directory of the bundled model, for `from_pretrained`."""
    return str(DEMO)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings and progress bars of `transformers` and the Hub, which are for programmers."""
    from huggingface_hub.utils import logging as hub
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as models

    levels, bars = (models.get_verbosity(), hub.get_verbosity()), are_progress_bars_disabled()
    model_bars = models.is_progress_bar_enabled()
    models.set_verbosity(models.CRITICAL)
    hub.set_verbosity(models.CRITICAL)
    models.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        models.set_verbosity(levels[0])
        hub.set_verbosity(levels[1])
        if model_bars:
            models.enable_progress_bar()
        if not bars:
            enable_progress_bars()


def read_prompt(text: str | None, file: str | None) -> str:
    """Return the prompt of `--prompt`, `--prompt-file` or standard input, exactly as it is there."""
    if text is not None:
        option, data = "--prompt", text.encode(errors="surrogateescape")
    elif file is not None and file != "-":
        option = f"--prompt-file {file}"
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise InvalidInput(f"{option}: {_reason(error)}; give a text file that can be read") from error
    elif sys.stdin is None or (file is None and sys.stdin.isatty()):
        raise InvalidInput("no prompt; give --prompt TEXT, --prompt-file FILE, or pipe text in")
    else:
        option, data = "standard input", sys.stdin.buffer.read()
    return _text(option, data)


def _text(option: str, data: bytes) -> str:
    if b"\0" in data:
        raise InvalidInput(f"{option}: binary data; give a prompt in UTF-8 text")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{option}: not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from error
    if not text.strip():
        raise InvalidInput(f"{option}: the prompt is empty; give some text to go on from")
    return text


class Checkpoint:
    """A model directory or Hub name; config, tokenizer and weights are read when they are asked for.

    Args:
        name: a directory, the name of a model on the Hugging Face Hub, or "demo" for the bundled model.

    Attributes:
        directory: where a local one lies.

    Raises:
        InvalidInput: it is neither.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if not name.strip():
            raise InvalidInput("--model is empty; give a model directory or a Hub name")
        path = DEMO if name == "demo" else Path(name).expanduser()
        self.directory = path
        self._local = path.is_dir()
        self._place = str(path) if self._local else name
        if name == "demo" and not (path / "config.json").exists():
            raise InvalidInput("--model demo: the bundled model is missing here; install lookahead-decoding again")
        if self._local and not (path / "config.json").exists():
            raise InvalidInput(f"--model {name}: the directory has no config.json; give a saved transformers model")
        if not self._local and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise InvalidInput(f"--model {name}: no such directory; give a model directory or a Hub name")

    def config(self) -> Any:
        """Return the model's config."""
        from transformers import AutoConfig

        return self._read("config", AutoConfig.from_pretrained, trust_remote_code=False)

    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        from transformers import AutoTokenizer

        return self._read("tokenizer", AutoTokenizer.from_pretrained, trust_remote_code=False)

    def model(self, config: Any, *, dtype: str = "auto", device: str = "cpu") -> Any:
        """Return the model, ready to generate."""
        import torch
        from transformers import AutoModelForCausalLM

        model, report = self._read(
            "weights",
            AutoModelForCausalLM.from_pretrained,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=False,
        )
        if report["missing_keys"]:
            some = ", ".join(sorted(report["missing_keys"])[:2])
            raise InvalidInput(f"--model {self.name}: the weights lack {some}, …; save the whole model again")
        try:
            return model.to(device).eval()
        except torch.OutOfMemoryError as error:
            raise InvalidInput(f"--device {device}: the model does not fit its memory; try --dtype bfloat16") from error

    def _read(self, what: str, read: Callable[..., Any], **options: Any) -> Any:
        """Call `read`; it may raise nearly anything on a file that is not what it should be."""
        try:
            return read(self._place, local_files_only=self._local, **options)
        except Exception as error:
            raise InvalidInput(f"--model {self.name}: {self._explain(what, error)}") from error

    def _explain(self, what: str, error: Exception) -> str:
        from huggingface_hub import errors as hub

        chain: list[BaseException] = [error]
        while above := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(above)
        for kinds, text in (
            (hub.GatedRepoError, "the model is gated; ask for access on its Hub page, then `hf auth login`"),
            (hub.RepositoryNotFoundError, "no such directory, and no such model on the Hub (private: `hf auth login`)"),
            (hub.LocalEntryNotFoundError, "no such directory, and the Hugging Face Hub cannot be reached from here"),
            (hub.HFValidationError, "no such directory; give a model directory or a Hub name"),
        ):
            if any(isinstance(link, kinds) for link in chain):
                return text
        if what == "tokenizer" and "backend tokenizer" in str(error):
            return "no tokenizer that can be loaded is there (tokenizer.json); save it next to the model"
        return f"cannot load its {what}: {_reason(error)}"


def read_tokenizer(name: str) -> Any:
    """Return the tokenizer of `--tokenizer`: a tokenizer.json, or a directory that holds a saved tokenizer."""
    path, fix = Path(name).expanduser(), "give a tokenizer.json, or a directory with a saved tokenizer"
    if not name or not path.exists():
        raise InvalidInput(f"--tokenizer {name}: no such file or directory; {fix}")
    from tokenizers import Tokenizer

    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a file that is not what it should be, nearly anything
        if (path / "tokenizer.json").exists():  # beside the config of a model that transformers does not know
            return read_tokenizer(str(path / "tokenizer.json"))
        raise InvalidInput(f"--tokenizer {name}: no tokenizer that can be loaded ({_reason(error)}); {fix}") from error


def _reason(error: BaseException) -> str:
    """Return an error in one sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return re.split(r"(?<=[a-z)`'\"])\. ", lines[0].strip())[0].rstrip(".")


def check_device(name: str | None) -> str:
    """Return the device to use: the one asked for, else a GPU if there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("holds no numbers")
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidInput(f"--device {name}: not usable here; give cpu, or cuda where there is such a GPU") from error
    return name


def encode(tokenizer: Any, prompt: str, *, chat: bool = False) -> dict[str, Any]:
    """Return `input_ids` and `attention_mask` of the prompt, [1, L] each."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InvalidInput("--chat: this model's tokenizer has no chat template; leave --chat out")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer([prompt], return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise InvalidInput("the prompt has no tokens for this model; give some other text")
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}


def check_served(config: Any, name: str, fix: str = "add --plain") -> None:
    """Raise `InvalidInput` where a config alone rules a model out; `fix` is what to do then."""
    from lookahead.families import refusal

    if getattr(config, "is_encoder_decoder", False):
        raise InvalidInput(
            f"--model {name}: {config.model_type!r} is an encoder-decoder, which does not write on from a prompt; "
            "in Python: lookahead.generate(model, inputs)"
        )
    if reason := refusal(config):
        raise InvalidInput(f"--model {name}: {config.model_type!r} models are not served: {reason}; {fix}")


def check_fit(config: Any, inputs: dict[str, Any]) -> None:
    """Raise `InvalidInput` where the tokenizer's ids are beyond the model's vocabulary."""
    vocab, largest = getattr(config, "vocab_size", None), int(inputs["input_ids"].max())
    if vocab is not None and largest >= vocab:
        raise InvalidInput(
            f"the prompt has token {largest}, but the model knows {vocab} tokens; its tokenizer is of another model"
        )


def room(config: Any, prompt: int, asked: int | None) -> int:
    """Return how many tokens to generate after `prompt` tokens: as asked, or what fits up to `NEW_TOKENS`."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return asked or NEW_TOKENS
    if prompt >= context:
        raise InvalidInput(f"the prompt has {prompt} tokens, but the model's context is {context}; shorten the prompt")
    if asked is not None and prompt + asked > context:
        raise InvalidInput(
            f"--max-new-tokens {asked}: with {prompt} prompt tokens that exceeds the model's context of {context}; "
            f"ask for at most {context - prompt}"
        )
    return asked or min(NEW_TOKENS, context - prompt)
