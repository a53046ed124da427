"""The tasks: rename edits, JSON extraction, continuation and copying, all made on the fly."""

from __future__ import annotations

import builtins
import json
import keyword
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from .corpus import BOS, EOS, Corpus
from .facts import extraction

EDIT_PROMPT = "rename {old} -> {new}\n<code>\n{code}</code>\n<code>\n"
JSON_PROMPT = "<facts>\n{facts}\n</facts>\n<schema>\n{schema}\n</schema>\n<json>\n"

ARROW = " -> "  # one token; the lookup heads find the new name behind it
FOCUS_WEIGHT = 4.0
PROMPT_WEIGHT = 0.15  # code in a prompt is worth a little language modelling
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PLAIN_NAME = re.compile(r"\b[a-z]+(?:_[a-z]+)*\b")
QUOTED = re.compile(r"""("[^"\n]*"|'[^'\n]*'|#[^\n]*)""")
RESERVED = set(keyword.kwlist) | set(dir(builtins)) | {"self", "cls", "b", "f", "r", "u"}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, the answer the model should give, and whether the prompt itself is worth loss."""

    kind: str
    prompt: str
    answer: str
    prompt_weight: float = 0.0
    focus: str = ""  # a word of the answer that matters more than the rest


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and the loss weight of each as a target."""

    ids: list[int]
    weights: list[float]
    start: int  # where the answer begins


class Tasks:
    """Makes examples of every kind; `heldout` ones use code that is never trained on."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, longest: int) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.longest = longest
        self.bos, self.eos = (tokenizer.token_to_id(token) for token in (BOS, EOS))
        vocabulary = tokenizer.get_vocab()
        self.names = [word for word in common_names(corpus) if word in vocabulary]
        self.single = set(self.names)

    def edit(self, rng: random.Random, *, heldout: bool = False) -> Example:
        """Rename a variable in 3 to 22 lines of real code."""
        while True:
            code = self._snippet(rng, heldout=heldout)
            names = _renameable(code)
            if rng.random() < 0.9:
                names = [name for name in names if name in self.single]
            if names:
                old = rng.choice(names)
                new = self._new_name(rng, code)
                prompt = EDIT_PROMPT.format(old=old, new=new, code=code)
                answer = re.sub(rf"\b{old}\b", new, code)
                return Example("edit", prompt, answer, PROMPT_WEIGHT, focus=new)

    def json(self, rng: random.Random, *, heldout: bool = False) -> Example:
        """Put facts into the properties of a schema, in one line and in schema order."""
        facts, schema, value = extraction(rng, self.names)
        prompt = JSON_PROMPT.format(facts=facts, schema=json.dumps(schema))
        return Example("json", prompt, json.dumps(value))

    def code(self, rng: random.Random, *, heldout: bool = False) -> Example:
        """Continue real code; the prompt ends at the end of a line, without the line break."""
        lines = self.corpus.file(rng, heldout=heldout).split("\n")
        first = rng.randrange(max(1, len(lines) - 20))
        text = "\n".join(lines[first : first + 80]).rstrip()
        cut = text.find("\n", len(text) // 4)
        return Example("continue", text[:cut], text[cut:], 1.0)

    def copy(self, rng: random.Random, *, heldout: bool = False) -> Encoded:
        """Repeat random tokens."""
        size = self.tokenizer.get_vocab_size()
        words = [rng.randrange(3, size) for _ in range(rng.randint(5, 60))]
        head = self.tokenizer.encode("<copy>\n", add_special_tokens=False).ids
        prompt = [self.bos, *head, *words, *head]
        ids = [*prompt, *words, self.eos]
        return Encoded(ids, [0.0] * len(prompt) + [1.0] * (len(words) + 1), len(prompt))

    def encode(self, example: Example) -> Encoded:
        """Tokenize prompt and answer apart, as `generate()` will see them."""
        prompt = self.tokenizer.encode(example.prompt).ids
        answer = self.tokenizer.encode(example.answer, add_special_tokens=False).ids
        if example.kind != "continue":
            answer.append(self.eos)
        focus = set(self.tokenizer.encode(example.focus, add_special_tokens=False).ids)
        weights = [example.prompt_weight] * len(prompt)
        weights += [FOCUS_WEIGHT if token in focus else 1.0 for token in answer]
        return Encoded(prompt + answer, weights, len(prompt))

    def sample(self, rng: random.Random, kind: str, *, heldout: bool = False) -> Encoded:
        """Return one encoded example of `kind` that fits; continuations are cut to fit."""
        if kind == "copy":
            return self.copy(rng)
        makers: dict[str, Callable[..., Example]]
        makers = {"edit": self.edit, "json": self.json, "continue": self.code}
        while True:
            encoded = self.encode(makers[kind](rng, heldout=heldout))
            if kind == "continue":
                end = rng.choice((self.longest // 4, self.longest // 2, self.longest))
                start = min(encoded.start, end // 2)
                return Encoded(encoded.ids[:end], encoded.weights[:end], start)
            if len(encoded.ids) <= self.longest:
                return encoded

    def _snippet(self, rng: random.Random, *, heldout: bool) -> str:
        """Cut some lines out of a file, often a whole function, and remove their indent."""
        while True:
            lines = self.corpus.file(rng, heldout=heldout).split("\n")
            starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("def ")]
            if starts and rng.random() < 0.6:
                block = _function(lines, rng.choice(starts))
            else:
                first = rng.randrange(len(lines))
                block = lines[first : first + rng.randint(3, 22)]
            block = [line.rstrip() for line in block if line.strip()]
            code = textwrap.dedent("\n".join(block)) + "\n"
            if 3 <= len(block) <= 22 and len(code) < 900 and not code[0].isspace():
                return code

    def _new_name(self, rng: random.Random, code: str) -> str:
        while True:
            name = rng.choice(self.names)
            if not re.search(rf"\b{name}\b", code):
                return name


def common_names(corpus: Corpus, least: int = 40) -> list[str]:
    """Return the lower-case names that the training code uses at least so often, sorted."""
    counts = Counter(word for text in corpus.train for word in PLAIN_NAME.findall(text))
    return sorted(word for word, count in counts.items() if count >= least and word not in RESERVED)


def _function(lines: list[str], start: int) -> list[str]:
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
        end += 1
    return lines[start:end]


def _renameable(code: str) -> list[str]:
    """Return names that stand twice or more and only as plain variables.

    Not as attributes, keyword arguments, or inside strings and comments.
    """
    bare = QUOTED.sub("''", code)
    words = NAME.findall(code)
    counts: dict[str, int] = {}
    for word in NAME.findall(bare):
        counts[word] = counts.get(word, 0) + 1
    return [
        name
        for name, count in counts.items()
        if count >= 2
        and count == words.count(name)
        and name not in RESERVED
        and not re.search(rf"(\.{name}\b|\b{name}=[^=]|\b(def|class|import) {name}\b)", bare)
    ]
