"""What README.md and docs/ say can be done is done here: programs and commands run, links and trees lead to files.

The programs of a page run in order and in one namespace, its commands line by line, both in a directory with the files
that pages name. A command of a form that is not known here fails, so that none is left out unseen.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import json
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field, create_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import lookahead
from lookahead.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
KINDS = ("python", "sh", "text", "")

Invoice = create_model("Invoice", customer=(str, Field(max_length=16)), total=(int, Field(ge=0, le=999)))
SCHEMA = lookahead.schema_of(Invoice)
FACTS = "Order: The customer is Nora Fischer; the total comes to 318."
MAIL = f"<facts>\n{FACTS}\n</facts>\n<schema>\n{json.dumps(SCHEMA)}\n</schema>\n<json>\n"
FILES = {
    "prompt.txt": "class Stack:\n    def push(self, item):",
    "invoice.json": json.dumps(SCHEMA),
    "mail.txt": MAIL,
    "notes.md": "# Notes\n\nWhat should be drafted from.\n",
    "prompts.jsonl": '{"prompt": "def add(a, b):"}\n',
    "src/one.py": "def add(a, b):\n    return a + b\n",
    "docs/one.md": "# One\n",
}
"""Files that commands of pages read; beside them there are path/to/model, data.jsonl.gz and trace.jsonl."""

NEEDS = {"ray.md": "ray", "vllm.md": "vllm"}
"""What the programs of some pages need beside this package; those of vllm.md run in `tests/test_vllm.py` too."""

REDUCED: dict[str, tuple[str, ...]] = {
    "demo": ("--model", "path/to/model", "--rounds", "1", "--threads", "1"),
    "bench": ("--model", "path/to/model", "--rounds", "1", "--each", "1", "--no-nothing", "--threads", "1"),
    "check": ("--quick", "--max-new-tokens", "4", "--prompts", "prompts.jsonl"),
    "generate": ("--max-new-tokens", "16"),
    "calibrate": ("--context", "8", "--most", "2"),
}
"""What is added to a command that would take long. The model is the bundled one with two prompts."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    line: int


@functools.cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = list(re.finditer(r"^```(.*)$", text, re.MULTILINE))
    assert len(fences) % 2 == 0, f"{page.name}: a fence is not closed"
    return [
        Block(begin[1].strip(), text[begin.end() + 1 : end.start()], text.count("\n", 0, begin.start()) + 2)
        for begin, end in zip(fences[::2], fences[1::2], strict=True)
    ]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def of_kind(kind: str) -> Any:
    """Parametrize over the pages that have such blocks."""
    pages = [page for page in PAGES if any(block.kind == kind for block in blocks(page))]
    return pytest.mark.parametrize("page", pages, ids=_name)


every_page = pytest.mark.parametrize("page", PAGES, ids=_name)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    path = lookahead.demo_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def trace(demo: tuple[Any, Any]) -> lookahead.Run:
    la = lookahead.Lookahead(*demo)
    la.generate(**demo[1](FILES["prompt.txt"], return_tensors="pt"), max_new_tokens=16)
    assert la.last is not None
    return la.last


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trace: lookahead.Run) -> Iterator[Path]:
    """The current directory, with the files that pages name; random numbers are as before afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b'{"output": "return a + b"}\n'))
    trace.save(tmp_path / "trace.jsonl")
    model, prompts = tmp_path / "path" / "to" / "model", Path(lookahead.demo_path(), "prompts.json")
    model.mkdir(parents=True)
    for file in prompts.parent.iterdir():
        if file != prompts:
            (model / file.name).symlink_to(file)
    tasks = [task for task in json.loads(prompts.read_text("utf-8")) if task["task"] in ("edit-1", "json-4")]
    (model / "prompts.json").write_text(json.dumps([task | {"max_new_tokens": 24} for task in tasks]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = torch.get_rng_state()
    yield tmp_path
    torch.set_rng_state(state)


def prepared(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the names that pages use without defining them."""
    return {
        "__name__": "page",
        "lookahead": lookahead,
        "model": model,
        "tokenizer": tokenizer,
        "inputs": tokenizer(FILES["prompt.txt"], return_tensors="pt"),
        "prompt": MAIL,
        "messages": MAIL,  # the bundled model has no chat template
        "Invoice": Invoice,
        "streamer": TextStreamer(tokenizer),
        "repository": "repository",
    }


@of_kind("python")
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")  # of the defaults of its own settings
def test_programs_run(page: Path, demo: tuple[Any, Any], place: Path) -> None:
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    names = prepared(*demo)
    try:
        for block in blocks(page):
            if block.kind == "python":
                exec(compile("\n" * (block.line - 1) + block.text, page.name, "exec", dont_inherit=True), names)
    finally:
        for value in names.values():
            if isinstance(value, lookahead.Lookahead | lookahead.Pool):
                value.close()


@of_kind("sh")
def test_commands_run(page: Path, place: Path, pytestconfig: pytest.Config) -> None:
    threads = torch.get_num_threads()
    try:
        for block in blocks(page):
            for line in block.text.replace("\\\n", " ").splitlines() if block.kind == "sh" else ():
                for chain in _split(_words(line), "&&"):
                    Pipeline(f"{page.name}: {line}", pytestconfig).run(chain)
    finally:
        torch.set_num_threads(threads)


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|<>;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    return list(lexer)


def _split(words: Sequence[str], mark: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


class Pipeline:
    """Runs commands as a shell would, in this process."""

    def __init__(self, where: str, config: pytest.Config) -> None:
        self.where, self.config = where, config

    def run(self, words: list[str]) -> None:
        data = b""
        for part in _split(words, "|"):
            data = self._redirected(part, data)

    def _redirected(self, words: list[str], data: bytes) -> bytes:
        """Run one command; return what it wrote."""
        target = None
        for mark in ("<", ">"):
            if mark in words:
                at = words.index(mark)
                file, words = Path(words[at + 1]), words[:at] + words[at + 2 :]
                target, data = (file, data) if mark == ">" else (target, file.read_bytes())
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
            self._command(words)
            out.flush()
            written: bytes = out.buffer.getvalue()  # type: ignore[attr-defined]
        if target is not None:
            target.write_bytes(written)
            return b""
        return written

    def _command(self, words: list[str]) -> None:
        name, arguments = words[0], words[1:]
        known: dict[str, Callable[[list[str]], None]] = {
            "lookahead": self._lookahead,
            "echo": lambda said: print(*said),
            "python": self._script,
            "pip": self._pip,
            "pytest": self._pytest,
            "git": lambda said: self._same(said, ["clone", "…", "lookahead"]),
            "cd": lambda said: self._same(said, ["lookahead"]),
            "benchmarks/peers.sh": functools.partial(self._shell, ROOT / "benchmarks" / "peers.sh"),
            ".ci/run": functools.partial(self._shell, ROOT / ".ci" / "run"),
            ".ci/versions": functools.partial(self._shell, ROOT / ".ci" / "versions"),
        }
        assert name in known, f"{self.where}: nothing here runs or checks {name}"
        known[name](arguments)

    def _lookahead(self, arguments: list[str]) -> None:
        code = main([*arguments, *REDUCED.get(arguments[0], ())])
        assert code == 0, f"{self.where}: exit code {code}"

    def _script(self, arguments: list[str]) -> None:
        """Run a script as far as its arguments are parsed."""
        assert re.fullmatch(r"(benchmarks|examples)/\w+\.py", arguments[0]), self.where

        class Parsed(BaseException):
            pass

        def parse(parser: argparse.ArgumentParser, *given: Any) -> None:
            _, unknown = parser.parse_known_args(*given)
            if unknown:
                parser.error(f"{unknown} are not known")
            raise Parsed

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            patch.setattr(sys, "argv", arguments)
            patch.syspath_prepend(ROOT / Path(arguments[0]).parent)
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")

    def _pip(self, arguments: list[str]) -> None:
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("-c", type=Path)
        parser.add_argument("-e")
        parser.add_argument("--no-deps", action="store_true")
        parser.add_argument("package", nargs="?", default="")
        given = parser.parse_args(self._after(arguments, "install"))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        name, _, extras = (given.e or given.package).rstrip("]").partition("[")
        assert given.c is None or (ROOT / given.c).is_file(), self.where
        assert name in (".", project["name"]), self.where
        assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"]), self.where

    def _pytest(self, arguments: list[str]) -> None:
        for word in arguments:
            if word.startswith("-"):
                self.config.getoption(word.partition("=")[0])  # raises where there is no such option
            else:
                assert word.isdigit() or (ROOT / word.partition("::")[0]).exists(), f"{self.where}: {word}"

    def _shell(self, script: Path, arguments: list[str]) -> None:
        assert os.access(script, os.X_OK), self.where
        for word in arguments:
            assert re.fullmatch(r"[\d.]+", word) or word in script.read_text("utf-8"), f"{self.where}: {word}"

    def _after(self, arguments: list[str], action: str) -> list[str]:
        assert arguments[0] == action, self.where
        return arguments[1:]

    def _same(self, said: list[str], expected: list[str]) -> None:
        assert said == expected, self.where


@pytest.mark.parametrize(
    "line", ["rm -r .", "lookahead pool info nowhere", "pytest --no-such-option", "pip install other", "sleep 1 | cd x"]
)
def test_unknown_commands_are_found(line: str, place: Path, pytestconfig: pytest.Config) -> None:
    with pytest.raises((AssertionError, ValueError)):
        Pipeline(line, pytestconfig).run(_words(line))


def test_unknown_options_of_scripts_are_found(place: Path, pytestconfig: pytest.Config) -> None:
    with pytest.raises(SystemExit):
        Pipeline("", pytestconfig).run(_words("python benchmarks/tree_picture.py trace.jsonl --no-such-option"))


@every_page
def test_blocks_are_of_known_kinds(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in KINDS, f"{page.name}, line {block.line}: a block of {block.kind}"
        looks_run = re.search(r"^(import |from \w+ import |lookahead |python |pip )", block.text, re.MULTILINE)
        assert block.kind in ("python", "sh") or not looks_run, f"{page.name}, line {block.line}: is it to be run?"


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        more = (f"{slug}-{i}" for i in range(1, 100))
        found.add(next(name for name in (slug, *more) if name not in found))
    return found


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith("https://"):
            continue
        file, _, place = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.is_relative_to(ROOT), f"{page.name}: {target} leads out of the repository"
        assert other.exists(), f"{page.name}: {target}"
        assert not place or place in _anchors(other), f"{page.name}: {target}"


def test_index_names_every_page_once() -> None:
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = [link for link in re.findall(r"^- \[.*?\]\(([^)]+)\)", text, re.MULTILINE) if "/" not in link]
    assert sorted(linked) == sorted(page.name for page in PAGES[1:] if page.name != "README.md")


def test_tree_of_readme_names_files() -> None:
    """In its columns names stand first; in what is said of a directory, its files are named."""
    (tree,) = (block.text for block in blocks(PAGES[0]) if block.text.startswith("lookahead/\n"))
    folder = ROOT
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = ROOT / line.split("/")[0]
            assert folder.is_dir(), line
            line = line.partition("/")[2]
        for name in re.findall(r"[\w…./]+\.(?:py|sh|md|svg)\b|(?<![\w.])\w+/(?=\s)", line):
            found = list(folder.glob(name.replace("…", "*").rstrip("/")))
            assert found, f"{name} is not in {folder.name}/"
    (examples,) = re.findall(r"^examples/ +([\w, ]+);", tree, re.MULTILINE)
    for name in examples.split(", "):
        assert (ROOT / "examples" / f"{name}.py").is_file(), name


def test_first_program_of_readme_prints_a_validated_object(capsys: pytest.CaptureFixture[str]) -> None:
    program = next(block.text for block in blocks(PAGES[0]) if block.kind == "python")
    exec(compile(program, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == "Book(title='The Silver Harbor', author='Omar Haddad', pages=412)"
