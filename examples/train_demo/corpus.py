"""The training text: standard library and permissively licensed packages, and the tokenizer."""

from __future__ import annotations

import hashlib
import importlib.metadata
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 8192

PACKAGES = _words(
    "annotated-types anyio click execnet filelock fsspec h11 httpcore2 httpx2 huggingface_hub "
    "iniconfig Jinja2 markdown-it-py MarkupSafe networkx packaging pluggy pydantic pytest rich "
    "shellingham typer typing-inspection typing_extensions"
)
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF)\b", re.IGNORECASE)
COPYLEFT = re.compile(r"\b(A?L?GPL|MPL|Mozilla|GNU)\b", re.IGNORECASE)
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo"}

KEYWORDS = _words(
    "and as assert async await class def del elif else except for from if import in is lambda "
    "not or raise return while with yield"
)
# No token but a keyword or punctuation takes a space with it, so a name is the same tokens
# wherever it stands: after an indent, a bracket or a space.
PIECES = "|".join(
    (
        r"\n+ *",
        rf" ?\b(?:{'|'.join(KEYWORDS)})\b ?",
        r"\d",
        r"[^\W\d]\w*",
        r" ?[^\s\w]+ ?",
        r" +",
        r"\s",
    )
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Python source texts; `heldout` files are never trained on."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]  # (name and version, licence)

    def file(self, rng: random.Random, *, heldout: bool = False) -> str:
        return rng.choice(self.heldout if heldout else self.train)


def load_corpus() -> Corpus:
    """Read the sources installed here; every 40th file, chosen by its path, is held out."""
    train: list[str] = []
    heldout: list[str] = []
    sources = []
    for name, licence, paths in _libraries():
        sources.append((name, licence))
        for key, path in paths:
            text = path.read_text(encoding="utf-8", errors="ignore").replace("\t", "    ")
            if len(text) > 400:
                part = heldout if hashlib.sha256(key.encode()).digest()[0] % 40 == 0 else train
                part.append(text)
    return Corpus(tuple(train), tuple(heldout), tuple(sources))


def _libraries() -> Iterator[tuple[str, str, list[tuple[str, Path]]]]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    yield "Python standard library", "PSF-2.0", list(_standard_library(stdlib))
    for package in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        licence = _licence(distribution)
        if PERMISSIVE.search(licence) and not COPYLEFT.search(licence):
            name = f"{package} {distribution.version}"
            yield name, licence, list(_package_files(distribution))


def _standard_library(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if not parts & (SKIPPED_FOLDERS | {"site-packages", "ensurepip"}):
            yield path.relative_to(root).as_posix(), path


def _package_files(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for file in sorted(distribution.files or ()):
        path = Path(str(distribution.locate_file(file)))
        if file.suffix == ".py" and not set(file.parts) & SKIPPED_FOLDERS and path.exists():
            yield file.as_posix(), path


def _licence(distribution: importlib.metadata.Distribution) -> str:
    meta = distribution.metadata
    if meta.get("License-Expression"):
        return str(meta["License-Expression"])
    classifiers = [c for c in meta.get_all("Classifier") or () if c.startswith("License")]
    if classifiers:
        return classifiers[0].rsplit(" :: ", 1)[-1]
    return str(meta.get("License") or "unknown").split("\n")[0]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the byte-level BPE tokenizer; it puts BOS in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer
