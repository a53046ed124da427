"""Laws of `lookahead pool`: what is read, that a build can be stopped and goes on, what the commands say."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lookahead.cli import main
from lookahead.errors import InvalidInput
from lookahead.loading import DEMO
from lookahead.pool import command, ingest, report
from lookahead.pool.corpus import Corpus, Skipped, digest, documents, shown
from lookahead.pool.ingest import encoder, pieces, undivided
from lookahead.pool.pool import LIMIT, Pool

FILE = str(DEMO / "tokenizer.json")
CODE = "def add(a, b):\n    return a + b\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def demo() -> Any:
    return Tokenizer.from_file(FILE)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Twelve different files of code."""
    return write(tmp_path / "src", {f"m{i:02}.py": CODE.replace("add", f"add_{i}") * (i + 1) for i in range(12)})


def build(pool: Path, *arguments: str | Path) -> int:
    return main(["pool", "build", str(pool), *map(str, arguments), "--tokenizer", FILE])


def contents(path: Path, tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """All that can be asked of a pool about these texts."""
    with Pool.open(path, read_only=True) as pool:
        tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        digests = sorted(int(name) for segment in pool.segments for name in segment.run.digests)
        asked = [pool.successors(some[:end]) for some in tokens for end in range(1, len(some), 7)]
        matches = [pool.longest_match(some[:end]) for some in tokens for end in range(1, len(some), 7)]
        return [pool.tokens, pool.documents, digests, asked, matches]


def refusal(capsys: Capture, arguments: list[str]) -> str:
    """The one line that a command says; fails unless it is one line with exit code 2."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    *progress, line = err.splitlines()
    assert line.startswith("lookahead: ")
    assert all(said.startswith(("reading ", "writing")) for said in progress)
    return line


# -- what is read -----------------------------------------------------------------------------------------------------


def read(*paths: Path, **options: Any) -> tuple[dict[str, str], Skipped]:
    """Texts by name relative to the first path, and what was skipped."""
    skipped = Skipped()
    found = list(documents(paths, skipped=skipped, **options))
    assert all(document.digest == digest(document.text) for document in found)
    return {document.name.removeprefix(f"{paths[0]}/"): document.text for document in found}, skipped


def test_text_is_read_in_order_and_the_rest_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "z.py": CODE,
            "b/first.txt": "in b",
            "a/b.txt": "é\r\nlast",
            "a/b/c.json": '{"a": 1}',
            "bom.md": b"\xef\xbb\xbf# title",
            "pack.txt.gz": gzip.compress(b"packed"),
            "picture.png": b"\x89PNG\0",
            "late.bin": b"x" * 10_000 + b"\0",
            "latin.txt": "é".encode("latin-1"),
            "nothing": "",
            "spaces.txt": " \n\t",
            "large.txt": "x" * 20_001,
            "large.txt.gz": gzip.compress(b"x" * 20_001),
            "cut.gz": gzip.compress(os.urandom(100))[:60],
            "bad.gz": b"no gzip",
            ".env": "SECRET=1",
            ".git/config": "x",
            "a/__pycache__/b.pyc": "x",
            "node_modules/x/index.js": "x",
        },
    )
    found, skipped = read(tmp_path, max_bytes=20_000)
    assert list(found.items()) == [
        ("bom.md", "# title"),
        ("pack.txt.gz", "packed"),
        ("z.py", CODE),
        ("a/b.txt", "é\r\nlast"),
        ("a/b/c.json", '{"a": 1}'),
        ("b/first.txt", "in b"),
    ]
    assert {reason: sorted(Path(name).name for name in names) for reason, names in skipped.names.items()} == {
        "binary": ["late.bin", "picture.png"],
        "not UTF-8": ["latin.txt"],
        "empty": ["nothing", "spaces.txt"],
        "larger than 20,000 bytes": ["large.txt", "large.txt.gz"],
        "damaged gzip": ["bad.gz", "cut.gz"],
        "hidden or cache": [".env", ".git", "node_modules"],
    }
    assert skipped.counts["hidden or cache"] == 4


def test_links_lead_nowhere_twice_and_pipes_are_not_waited_for(tmp_path: Path) -> None:
    top = write(tmp_path / "top", {"a/x.py": "x = 1"})
    outside = write(tmp_path / "outside", {"y.py": "y = 1"})
    (top / "a" / "loop").symlink_to(top)
    (top / "out").symlink_to(outside)
    (top / "file.py").symlink_to(outside / "y.py")
    (top / "broken.py").symlink_to(tmp_path / "none")
    (top / "self").symlink_to(top / "self")
    os.mkfifo(top / "pipe")
    found, skipped = read(top)
    assert found == {"file.py": "y = 1", "a/x.py": "x = 1"}
    assert skipped.counts == {
        "link to a directory": 2,
        "no regular file": 1,
        "unreadable (no such file or directory)": 1,
        "unreadable (too many levels of symbolic links)": 1,
    }
    (tmp_path / "linked").symlink_to(outside)
    assert list(read(tmp_path / "linked")[0]) == ["y.py"]


def test_unreadable_files_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.py": "a", "b.py": "b"})
    opened = Path.open

    def refuse(path: Path, *rest: Any) -> Any:
        if path.name == "a.py":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(Path, "open", refuse)
    found, skipped = read(tmp_path)
    assert found == {"b.py": "b"}
    (line,) = skipped.lines()
    assert line.startswith("1 unreadable (permission denied): ")
    assert line.endswith("/a.py")


def test_a_path_that_is_given_is_read_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path, {".hidden/.x": "x", ".env": "y"})
    assert read(tmp_path / ".hidden" / ".x", tmp_path / ".env")[0].keys() == {
        str(tmp_path / ".hidden" / ".x"),
        str(tmp_path / ".env"),
    }
    with pytest.raises(InvalidInput, match="none: no such file or directory"):
        Corpus([tmp_path / "none"])


LINES = [
    {"output": "one", "a": {"b": "deep"}, "messages": [{"content": "first"}]},
    {"output": {"k": ["é", 1]}, "a.b": "flat", "a": {"b": "deep"}},
    {"output": None, "messages": []},
    {"other": 1},
    {"output": ""},
]


@pytest.mark.parametrize(
    ("field", "texts", "lacking"),
    [
        (None, [json.dumps(line) for line in LINES], 0),
        ("output", ["one", '{"k": ["é", 1]}'], 2),
        ("a.b", ["deep", "flat"], 3),
        ("messages.0.content", ["first"], 4),
        ("output.k", ['["é", 1]'], 4),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.jsonl.gz"])
def test_json_lines_are_a_document_each(
    tmp_path: Path, name: str, field: str | None, texts: list[str], lacking: int
) -> None:
    raw = "\r\n".join(json.dumps(line) for line in LINES).encode() + b"\n\n"
    write(tmp_path, {name: gzip.compress(raw) if name.endswith("gz") else raw})
    found, skipped = read(tmp_path, field=field)
    assert list(found.values()) == texts
    assert next(iter(found)) == f"{name}:{1 + (field == 'output.k')}"
    assert skipped.counts.pop("empty", 0) == (field == "output")
    assert sum(skipped.counts.values()) == lacking
    assert not lacking or list(skipped.counts) == [f"without the field {field}"]


def test_bad_lines_do_not_spoil_good_ones(tmp_path: Path) -> None:
    lines = [
        b'{"o": "1"}',
        b"{",
        b"\xff",
        b"a\0b",
        b'{"o": "\\ud800"}',
        b'{"o": "' + b"x" * 99,
        b"[" * 90,
        b'{"o": "2"}',
    ]
    write(tmp_path, {"x.jsonl": b"\n".join(lines)})
    found, skipped = read(tmp_path, field="o", max_bytes=95)
    assert found == {"x.jsonl:1": "1", "x.jsonl:8": "2"}
    assert skipped.counts == {"no JSON": 2, "not UTF-8": 2, "binary": 1, "larger than 95 bytes": 1}
    assert skipped.names["larger than 95 bytes"][0].endswith("x.jsonl:6")


def test_json_is_one_document_also_with_a_field(tmp_path: Path) -> None:
    write(tmp_path, {"x.json": '{\n"o": "1"}'})
    assert read(tmp_path, field="o")[0] == {"x.json": '{\n"o": "1"}'}


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["*.py"], [], ["a.py", "src/b.py", "src/tests/c.py"]),
        (["*.md", "src/*.py"], [], ["a.md", "src/b.py", "src/tests/c.py"]),
        (["**/*.py"], ["tests"], ["a.py", "src/b.py"]),
        ([], ["src/tests/", "*.md"], ["a.py", "src/b.py"]),
        (["/a.*"], [], ["a.md", "a.py"]),
    ],
)
def test_patterns_choose_files(tmp_path: Path, include: list[str], exclude: list[str], names: list[str]) -> None:
    every = ["a.md", "a.py", "src/b.py", "src/tests/c.py"]
    write(tmp_path, {name: name for name in every})
    found, skipped = read(tmp_path, include=include, exclude=exclude)
    assert list(found) == names
    assert set(skipped.counts) == {"left out by --include or --exclude"}


def test_only_a_few_names_are_kept() -> None:
    skipped = Skipped()
    for name in ["a", "/a/very/long/way/to/some/b.so", "c", "d", "e"]:
        skipped.add("binary", name)
    skipped.add("empty", "f")
    assert skipped.lines() == ["5 binary: a, …/to/some/b.so, c, …", "1 empty: f"]


def test_a_digest_is_of_all_of_the_text() -> None:
    assert len({digest("x" * 1000), digest("x" * 1000 + "y"), digest("y" + "x" * 1000)}) == 3


def test_any_name_can_be_shown() -> None:
    assert shown(os.fsdecode(b"a\xff\n\x1b[2J")) == "a\ufffd??[2J"


# -- tokens -----------------------------------------------------------------------------------------------------------


@given(st.text(alphabet="ab\n", max_size=40), st.integers(1, 9))
def test_pieces_make_up_the_text(text: str, size: int) -> None:
    parts = pieces(text, size)
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts) or parts == [""]
    assert all(part.endswith("\n") or (len(part) == size and "\n" not in part) for part in parts[:-1])


def test_long_texts_are_whole_documents(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CODE * 20
    (whole,) = encoder(demo)([text])
    assert whole.tolist() == demo.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(ingest, "PIECE", 64)
    monkeypatch.setattr(pieces, "__defaults__", (64,))
    (joined,) = encoder(demo)([text])
    assert demo.decode(joined.tolist()) == text


def test_nothing_is_cut_off_or_filled_up(demo: Any) -> None:
    tokenizer = Tokenizer.from_str(demo.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=500)
    found = encoder(tokenizer)([CODE, "x"])
    assert [some.tolist() for some in found] == [some.tolist() for some in encoder(demo)([CODE, "x"])]
    assert tokenizer.truncation is not None
    assert tokenizer.padding is not None


def test_tokenizers_in_python_are_asked_themselves() -> None:
    def letters(texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    assert [some.tolist() for some in encoder(letters)(["ab", "c"])] == [[97, 98], [99]]


def test_documents_go_into_a_pool_without_the_command(tree: Path, demo: Any) -> None:
    pool, reports = Pool(), []
    tally = ingest.ingest(pool, documents([tree]), demo, report=lambda tally: reports.append(tally.documents))
    assert (tally.documents, tally.tokens, tally.known) == (12, pool.tokens, 0)
    assert reports == list(range(1, 13))
    assert ingest.ingest(pool, documents([tree]), demo).known == pool.documents == 12


def test_ctrl_c_waits_for_the_end_of_a_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with undivided():
            signal.raise_signal(signal.SIGINT)
            done.append("block")
        done.append("after")
    assert done == ["block"]
    with pytest.raises(KeyboardInterrupt), undivided():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("block")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- build ------------------------------------------------------------------------------------------------------------


def test_build_holds_all_documents_and_says_so(tree: Path, tmp_path: Path, demo: Any, capsys: Capture) -> None:
    write(tree, {"same.py": (tree / "m03.py").read_text(), "x.bin": b"\0", "y.jsonl": '{"o": "text"}\n{}\n'})
    assert build(tmp_path / "pool", "--from", tree, "--field", "o") == 0
    out, err = capsys.readouterr()
    texts = [path.read_text() for path in sorted(tree.glob("m*.py"))] + ["text"]
    tokens = [demo.encode(text, add_special_tokens=False).ids for text in texts]
    total = sum(map(len, tokens))
    lines = out.splitlines()
    assert lines[0].startswith(f"added    13 documents, {total:,} tokens in ")
    assert lines[0].endswith(" tokens/s")
    assert lines[1] == "known    1 document, not added again"
    assert "1 binary: " in out
    assert "1 without the field o: " in out
    assert lines[-1].startswith(f"pool     {tmp_path / 'pool'}: {total:,} tokens in 13 documents, 1 segment, ")
    assert err.splitlines() == ["reading 15 files, " + err.split("files, ")[1].split("\n")[0], "writing"]
    assert "\x1b" not in out + err
    with Pool.open(tmp_path / "pool", tokenizer=demo, read_only=True) as pool:
        assert all(digest(text) in pool for text in texts)
        for some in tokens:
            assert pool.longest_match(some) == min(32, len(some))


def test_a_second_build_adds_what_is_new_only(
    tree: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tree / "my pool"  # in the tree that it is built from
    assert build(pool, "--from", tree) == 0
    tokenized = count_texts(monkeypatch)
    assert build(pool, "--from", tree) == 0
    assert tokenized == []
    assert "known    12 documents" in capsys.readouterr().out
    write(tree, {"new.py": "new = 1"})
    assert build(pool, "--from", tree) == 0
    assert tokenized == ["new = 1"]
    assert "1 segment, " in capsys.readouterr().out


def count_texts(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None, error: Any = OSError) -> list[str]:
    """Collect the texts that are tokenized, one a batch; raise `error` instead of tokenizing number `fail_at`."""
    tokenized: list[str] = []

    def counting(tokenizer: Any) -> Callable[[Sequence[str]], list[Any]]:
        def encode(texts: Sequence[str]) -> list[Any]:
            if len(tokenized) == fail_at:
                raise error
            tokenized.extend(texts)
            return encoder(tokenizer)(texts)

        return encode

    monkeypatch.setattr(ingest, "encoder", counting)
    monkeypatch.setattr(ingest, "BATCH", 1)
    return tokenized


@pytest.mark.parametrize(("error", "code"), [(OSError(5, "bad disk"), 2), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("live", [20, 1 << 20])
def test_a_build_that_was_stopped_goes_on(
    tree: Path,
    tmp_path: Path,
    demo: Any,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    live: int,
) -> None:
    monkeypatch.setattr(command, "LIVE", live)
    assert build(tmp_path / "whole", "--from", tree) == 0
    with monkeypatch.context() as patch:
        first = count_texts(patch, fail_at=5, error=error)
        assert build(tmp_path / "pool", "--from", tree) == code
    said = capsys.readouterr().err
    assert ("interrupted; 5 documents (" in said) == (code == 130)
    second = count_texts(monkeypatch)
    assert build(tmp_path / "pool", "--from", tree) == 0
    texts = [path.read_text() for path in sorted(tree.iterdir())]
    assert first + second == texts
    assert contents(tmp_path / "pool", demo, texts) == contents(tmp_path / "whole", demo, texts)


def test_a_build_that_was_killed_goes_on(
    tree: Path, tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""if True:
        import os
        from lookahead.cli import main
        from lookahead.pool import command, ingest
        from lookahead.pool.pool import Pool
        command.LIVE, ingest.BATCH, add = 20, 1, Pool.add
        def dying(pool, tokens, **rest):
            if pool.documents == 7:
                pool.settle()
                os._exit(9)
            return add(pool, tokens, **rest)
        Pool.add = dying
        main(["pool", "build", {str(tmp_path / "pool")!r}, "--from", {str(tree)!r}, "--tokenizer", {FILE!r}])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    tokenized = count_texts(monkeypatch)
    texts = [path.read_text() for path in sorted(tree.iterdir())]
    assert build(tmp_path / "pool", "--from", tree) == 0
    assert tokenized == texts[-len(tokenized) :]
    assert len(tokenized) <= 6  # what had been committed is not tokenized again
    assert build(tmp_path / "whole", "--from", tree) == 0
    assert contents(tmp_path / "pool", demo, texts) == contents(tmp_path / "whole", demo, texts)


def test_a_build_ends_in_one_segment(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LIVE", 20)
    monkeypatch.setattr(ingest, "BATCH", 1)
    assert build(tmp_path / "pool", "--from", tree) == 0
    with Pool.open(tmp_path / "pool", read_only=True) as pool:
        assert len(pool.segments) == 1
    monkeypatch.setattr(command, "COMPACTED", 10)
    monkeypatch.delattr(Pool, "compact")
    assert build(tmp_path / "large", "--from", tree) == 0


def test_the_limit_is_kept_with_the_pool(tree: Path, tmp_path: Path, demo: Any, capsys: Capture) -> None:
    assert build(tmp_path / "pool", "--from", tree, "--max-tokens", "0.2k") == 2
    assert "--max-tokens" in capsys.readouterr().err
    assert build(tmp_path / "pool", "--from", tree, "--max-tokens", "200") == 0
    out = capsys.readouterr().out
    assert "dropped  " in out
    assert "the pool's limit is 200 " in out
    assert main(["pool", "info", str(tmp_path / "pool"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["max_tokens"] == 200
    assert 0 < figures["tokens"] <= 200
    with Pool.open(tmp_path / "pool", tokenizer=demo) as pool:
        assert pool.max_tokens == 200
        assert digest((tree / "m11.py").read_text()) in pool
        assert digest((tree / "m00.py").read_text()) not in pool
    assert build(tmp_path / "other", "--from", tree, "--max-tokens", "3M") == 0
    with Pool.open(tmp_path / "other", read_only=True) as pool:
        assert pool.max_tokens == 3_000_000


def test_another_tokenizer_is_refused(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    assert build(tmp_path / "pool", "--from", tree) == 0
    other = Tokenizer(models.WordLevel({"<unk>": 0, "x": 1}, unk_token="<unk>"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.save(str(tmp_path / "other.json"))
    for action in (["build", "--from"], ["add"]):
        arguments = ["pool", action[0], str(tmp_path / "pool"), *action[1:], str(tree / "m00.py")]
        said = refusal(capsys, [*arguments, "--tokenizer", str(tmp_path / "other.json")])
        assert "is of another tokenizer" in said


def test_a_model_and_its_tokenizer_file_make_one_pool(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    assert build(tmp_path / "pool", "--from", tree) == 0
    for which in (["--model", "demo"], ["--tokenizer", str(DEMO)]):
        assert main(["pool", "build", str(tmp_path / "pool"), "--from", str(tree), *which]) == 0
        assert "known    12 documents" in capsys.readouterr().out


def test_a_tokenizer_beside_an_unknown_model_is_found(
    made: Path, tree: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "odd", {"config.json": '{"model_type": "of tomorrow"}', "tokenizer.json": Path(FILE).read_bytes()})

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("the architecture is not known")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    assert main(["pool", "add", str(made), str(tree), "--tokenizer", str(tmp_path / "odd")]) == 0
    assert "known    12 documents" in capsys.readouterr().out


def test_documents_without_tokens_are_said(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1}, unk_token="<unk>"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.Whitespace(), normalizers.Replace("\u3042", "")
    words.save(str(tmp_path / "words.json"))
    write(tree, {"other.txt": "\u3042"})
    arguments = ["--from", str(tree / "other.txt"), str(tree / "m00.py"), "--tokenizer", str(tmp_path / "words.json")]
    code = main(["pool", "build", str(tmp_path / "pool"), *arguments])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "1 without tokens: " in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "none"], "none: no such file or directory"),
        (["--from", "src", "--include", "*.rs"], "12 left out by --include or --exclude: "),
        (["--from", "empty"], "give other files"),
        (["--from", "binary"], "skipped: 1 binary: binary"),
        (["--from", "src", "--tokenizer", "none.json"], "--tokenizer none.json: no such file"),
        (["--from", "src", "--tokenizer", "src/m00.py"], "--tokenizer src/m00.py: no tokenizer that can be loaded"),
        (["--from", "src", "--tokenizer", "empty"], "--tokenizer empty: no tokenizer that can be loaded"),
        (["--from", "src", "--tokenizer", FILE, "--model", "demo"], "--model"),
        (["--from", "src", "--field", "."], "--field"),
        (["--from", "src", "--max-tokens", "0"], "--max-tokens"),
        (["--from", "src", "--max-file-bytes", "many"], "--max-file-bytes"),
        (["--tokenizer", FILE], "--from"),
    ],
)
def test_builds_that_cannot_be_are_refused(
    tree: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(write(tmp_path, {"binary": b"\0"}))
    (tmp_path / "empty").mkdir()
    given = arguments if "--tokenizer" in arguments else [*arguments, "--tokenizer", FILE]
    assert says in refusal(capsys, ["pool", "build", "pool", *given])


def test_directories_of_others_are_left_alone(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    before = sorted(tree.iterdir())
    arguments = ["--from", str(tree), "--tokenizer", FILE]
    (tree.parent / "other").mkdir()
    write(tree.parent / "other", {"x": "x"})
    assert "that is DIR" in refusal(capsys, ["pool", "build", str(tree), *arguments])
    assert "holds files but no pool" in refusal(capsys, ["pool", "build", str(tree.parent / "other"), *arguments])
    assert "is a file" in refusal(capsys, ["pool", "build", str(tree / "m00.py"), *arguments])
    assert sorted(tree.iterdir()) == before


def test_what_a_writer_left_that_was_killed_at_once_is_no_hindrance(tree: Path, tmp_path: Path) -> None:
    write(tmp_path / "pool", {"lock": "", "lock.pid": "1 on here", "manifest.json.tmp": "{"})
    assert build(tmp_path / "pool", "--from", tree) == 0


def test_a_tokenizer_that_fails_is_named(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    words = Tokenizer(models.WordLevel({"def": 0}, unk_token="<unk>"))
    words.save(str(tmp_path / "words.json"))
    arguments = ["--from", str(tree), "--tokenizer", str(tmp_path / "words.json")]
    assert "give another tokenizer" in refusal(capsys, ["pool", "build", str(tmp_path / "pool"), *arguments])


def test_quiet_says_nothing(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    assert build(tmp_path / "pool", "--from", tree, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_lines_tell_the_progress_where_no_terminal_is(
    tree: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "EVERY", 0.0)
    assert build(tmp_path / "pool", "--from", tree) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading 12 files, ")
    assert "11/12 files, " in lines[-2] or "12/12 files, " in lines[-2]
    assert lines[-1] == "writing"


def test_a_bar_tells_the_progress_on_a_terminal(
    tree: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(report, "FRAME", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert build(tmp_path / "pool", "--from", tree) == 0
    assert "12/12 files, " in screen.getvalue()
    assert "added    12 documents" in capsys.readouterr().out


# -- add --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tree: Path, tmp_path: Path, capsys: Capture) -> Path:
    """A pool that was built."""
    assert build(tmp_path / "pool", "--from", tree) == 0
    capsys.readouterr()
    return tmp_path / "pool"


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def add(pool: Path, *arguments: str | Path) -> int:
    return main(["pool", "add", str(pool), *map(str, arguments), "--tokenizer", FILE])


def test_add_takes_files_and_standard_input(
    made: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"a.txt": "alpha", "b.bin": b"\0", "c.txt.gz": gzip.compress(b"gamma")})
    pipe(monkeypatch, b"typed in")
    assert add(made, tmp_path / "a.txt", tmp_path / "b.bin", "-", tmp_path / "c.txt.gz") == 0
    out = capsys.readouterr().out
    assert "added    3 documents, " in out
    assert "1 binary: " in out
    pipe(monkeypatch, b'{"o": "one"}\n{"o": "two"}\n')
    assert add(made, "-", "--field", "o") == 0
    with Pool.open(made, read_only=True) as pool:
        assert all(digest(text) in pool for text in ("alpha", "typed in", "gamma", "one", "two"))
        assert pool.documents == 17


def test_add_refuses_what_it_cannot_add(
    made: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b"\xff")
    tail = ["--tokenizer", FILE]
    assert "1 not UTF-8: standard input" in refusal(capsys, ["pool", "add", str(made), "-", *tail])
    assert "no such file" in refusal(capsys, ["pool", "add", str(made), "none.txt", *tail])
    said = refusal(capsys, ["pool", "add", str(tmp_path / "none"), str(tmp_path), *tail])
    assert "`lookahead pool build`" in said
    assert not (tmp_path / "none").exists()
    assert "--tokenizer" in refusal(capsys, ["pool", "add", str(made), "x"])


def test_a_second_writer_is_told(made: Path, tree: Path, capsys: Capture) -> None:
    with Pool.open(made):
        arguments = ["pool", "add", str(made), str(tree / "m00.py"), "--tokenizer", FILE]
        assert "is being written by process" in refusal(capsys, arguments)


# -- info and prune ---------------------------------------------------------------------------------------------------


def test_info_says_what_is_there(made: Path, demo: Any, capsys: Capture) -> None:
    with Pool.open(made, tokenizer=demo) as writer:
        writer.add([1, 2, 3])
        for verify in ([], ["--verify"]):
            assert main(["pool", "info", str(made), "--json", *verify]) == 0
            figures = json.loads(capsys.readouterr().out)
            (segment,) = writer.segments
            assert segment.entry is not None
            size = (made / segment.entry.name).stat().st_size
            assert figures.pop("bytes_per_token") == pytest.approx(size / segment.run.tokens, abs=1e-3)
            assert figures.pop("segments") == [
                {
                    "name": segment.entry.name,
                    "tokens": segment.run.tokens,
                    "documents": 12,
                    "nbytes": size,
                    "age_s": pytest.approx(0, abs=100),
                }
            ]
            assert figures == {
                "path": str(made),
                "tokens": segment.run.tokens,
                "documents": 12,
                "nbytes": size,
                "max_tokens": LIMIT,
                "tokenizer": writer.settings["tokenizer"],
                "damaged": [],
                "verified": bool(verify),
            }
    assert main(["pool", "info", str(made), "--verify"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1] == "limit      200,000,000 tokens"
    assert writer.settings["tokenizer"] in out
    assert "damaged    nothing" in out


def test_info_refuses_what_is_no_pool(tmp_path: Path, capsys: Capture) -> None:
    assert "`lookahead pool build`" in refusal(capsys, ["pool", "info", str(tmp_path / "none")])
    assert "is no pool" in refusal(capsys, ["pool", "info", str(tmp_path)])


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A pool of two segments, and the one of them that has a wrong byte."""
    write(tmp_path, {"more.txt": "more and more"})
    assert add(made, tmp_path / "more.txt", "--quiet") == 0
    file = min(made.glob("*.segment"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    return made, file


def test_damage_is_listed_and_can_be_dropped(damaged: tuple[Path, Path], tree: Path, capsys: Capture) -> None:
    made, file = damaged
    assert main(["pool", "info", str(made), "--json"]) == 1
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 1
    assert len(figures["damaged"]) == 1
    assert figures["damaged"][0].startswith(str(file))
    assert main(["pool", "info", str(made)]) == 1
    assert f"`lookahead pool prune {made} --damaged`" in capsys.readouterr().out
    tail = [str(tree / "m00.py"), "--tokenizer", FILE]
    for arguments in (["add", str(made), *tail], ["build", str(made), "--from", *tail], ["prune", str(made)]):
        given = [*arguments, "--max-tokens", "5"] if arguments[0] == "prune" else arguments
        assert f"`lookahead pool prune {made} --damaged`" in refusal(capsys, ["pool", *given])
    assert main(["pool", "prune", str(made), "--damaged"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dropped  {file} ")
    assert not list(made.glob("*damaged*"))
    assert main(["pool", "info", str(made), "--verify"]) == 0
    assert main(["pool", "prune", str(made), "--damaged"]) == 0
    assert "nothing is damaged" in capsys.readouterr().out
    assert build(made, "--from", tree) == 0
    assert "added    12 documents" in capsys.readouterr().out


def test_damage_that_a_sample_misses_is_found(
    damaged: tuple[Path, Path], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, file = damaged
    monkeypatch.setattr("lookahead.pool.snapshot.CHECKED", 0)
    monkeypatch.setattr("lookahead.pool.snapshot.SAMPLED", 0)
    assert main(["pool", "info", str(made)]) == 0
    assert main(["pool", "info", str(made), "--verify"]) == 1
    capsys.readouterr()
    assert main(["pool", "prune", str(made), "--damaged"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 tokens are left"
    assert not file.exists()


def test_a_lost_manifest_is_made_again(made: Path, capsys: Capture) -> None:
    (made / "manifest.json").write_text("{")
    assert main(["pool", "info", str(made)]) == 1
    assert main(["pool", "prune", str(made), "--damaged"]) == 0
    capsys.readouterr()
    assert main(["pool", "info", str(made), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 12


def test_prune_keeps_the_youngest(made: Path, tree: Path, capsys: Capture) -> None:
    with Pool.open(made, read_only=True) as pool:
        before = pool.tokens
    assert main(["pool", "prune", str(made), "--max-tokens", "400"]) == 0
    out = capsys.readouterr().out
    with Pool.open(made, read_only=True) as pool:
        assert 0 < pool.tokens <= 400
        assert out.startswith(
            f"dropped {before - pool.tokens:,} tokens of the oldest documents; {pool.tokens:,} tokens"
        )
        assert digest((tree / "m11.py").read_text()) in pool
        assert digest((tree / "m00.py").read_text()) not in pool
    assert main(["pool", "prune", str(made), "--max-tokens", "0"]) == 0
    assert "0 tokens in 0 documents are left" in capsys.readouterr().out
    assert "say what to drop" in refusal(capsys, ["pool", "prune", str(made)])


# -- the command itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [[], ["build"], ["add"], ["info"], ["prune"]])
def test_help(capsys: Capture, action: list[str]) -> None:
    assert main(["pool", *action]) == 2
    usage = capsys.readouterr().out
    assert main(["pool", *action, "--help"]) == 0
    assert capsys.readouterr().out == usage
    assert usage.startswith(" ".join(["usage: lookahead pool", *action]))


def test_figures_are_short() -> None:
    assert [report.count(n) for n in (0, 999, 1_000, 2_345_678)] == ["0", "999", "1 k", "2.35 M"]
    assert [report.size(n) for n in (999, 1_000, 7_040_000, 3 * 10**9)] == ["999 B", "1.0 kB", "7.0 MB", "3.0 GB"]
    assert [report.age(n) for n in (-1, 119, 600, 7200, 9e5)] == ["0 s", "119 s", "10 min", "2 h", "10 days"]


def test_info_needs_neither_torch_nor_transformers(made: Path) -> None:
    code = f"import sys; from lookahead.cli import main; main(['pool', 'info', {str(made)!r}, '--json'])"
    code += "; print({'torch', 'transformers', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_ids_are_numbers_of_32_bits(demo: Any) -> None:
    assert encoder(demo)([CODE])[0].dtype == np.int32
