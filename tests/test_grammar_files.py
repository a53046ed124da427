"""The bundled grammars: they accept and refuse what their headers say, and what their masks allow does parse."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from formats import PARSERS, compiled, parses, python, xml_with_its_names_mended
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer
from walks import Walk, accepts, matcher_of, tokens_allowed

import lookahead
from lookahead.errors import InvalidArgument
from lookahead.grammar import library

SAMPLES = Path(__file__).parent / "samples"
NAMES = library.names()
FINISHED = 0.8  # share of the walks that must reach an end
STANDARD_LIBRARY = 0.92  # share of its functions that the Python grammar accepts: 0.97 with Python 3.11


# --- samples


def samples(name: str, section: str) -> list[str]:
    """Return the samples of a section of `samples/<name>.txt`: parts between `--`, or lines."""
    text = (SAMPLES / f"{name}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^== (.*)\n", text, flags=re.M)
    chosen = dict(zip(parts[1::2], parts[2::2], strict=True)).get(section, "")
    if "\n--\n" not in text:
        return chosen.splitlines()
    return [sample.removesuffix("\n") for sample in re.split(r"^--\n", chosen, flags=re.M)] if chosen else []


@pytest.mark.parametrize("name", NAMES)
def test_accepts_what_its_header_promises(name: str) -> None:
    good = samples(name, "accepted")
    assert len(good) >= 3
    assert [text for text in good if not accepts(name, text)] == []
    assert [text for text in good if not parses(name, text)] == []


@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_does_not_parse(name: str) -> None:
    bad = samples(name, "refused")
    assert len(bad) >= 6
    assert [text for text in bad if accepts(name, text)] == []
    assert [text for text in bad if parses(name, text)] == []


@pytest.mark.parametrize("name", NAMES)
def test_leaves_out_what_its_header_says(name: str) -> None:
    valid = samples(name, "left out")
    assert [text for text in valid if accepts(name, text)] == []


@pytest.mark.parametrize("text", samples("python", "refused by the compiler"))
def test_python_knows_where_it_stands(text: str) -> None:
    python(text)  # it parses, and yet:
    with pytest.raises(SyntaxError):
        compiled(text)
    assert not accepts("python", text)


CLAUSES = (
    "if a:\n    b\nelif c:\n    d\nelif e:\n    f\nelse:\n    g",
    "while a:\n    break\nelse:\n    b",
    "for a in b:\n    continue\nelse:\n    c",
    "try:\n    a\nexcept b:\n    c\nexcept d as e:\n    f\nexcept:\n    g\nelse:\n    h\nfinally:\n    i",
    "try:\n    a\nfinally:\n    b",
    "try:\n    a\nexcept:\n    b",
    "try:\n    a\nexcept b:\n    c\nfinally:\n    d",
    "@a\n@b(1)\ndef f():\n    return\n@c\nclass A:\n    b",
)


@pytest.mark.parametrize("level", range(7))
@pytest.mark.parametrize("clauses", CLAUSES)
def test_python_clauses_stand_at_the_level_of_their_statement(clauses: str, level: int) -> None:
    """At each level they are accepted; one line moved in or out is refused wherever Python refuses it."""
    if level == 6:  # no room for a block
        clauses = clauses.replace(":\n    ", ": ")
    outer = [" " * 4 * depth + "with x:" for depth in range(level)]
    lines = [" " * 4 * level + line for line in clauses.split("\n")]
    assert accepts("python", "\n".join(outer + lines))
    assert accepts("python", "\n".join([*outer, *lines, "after"]))
    for number, line in enumerate(lines):
        for moved in ("    " + line, line.removeprefix("    ")):
            text = "\n".join([*outer, *lines[:number], moved, *lines[number + 1 :]])
            if not parses("python", text):
                assert not accepts("python", text), text


@pytest.mark.parametrize("text", samples("xml", "accepted though wrong"))
def test_xml_does_not_match_names_as_its_header_says(text: str) -> None:
    assert accepts("xml", text)
    assert not parses("xml", text)
    xml_with_its_names_mended(text)


@pytest.mark.parametrize("columns", range(1, 14))
def test_every_row_has_as_many_columns_as_the_first(columns: int) -> None:
    def row(cells: int) -> str:
        return ",".join(["x", *[""] * (cells - 1)])

    def line(cell: str, cells: int) -> str:
        return "|" + cell * cells

    for rows in (1, 2, 3):
        assert accepts("csv", "\n".join([row(columns)] * rows)) == (columns <= 12)
        head = [line(" a |", columns), line(" - |", columns)]
        assert accepts("markdown_table", "\n".join([*head, *[line(" |", columns)] * rows])) == (columns <= 8)
        for other in (columns - 1, columns + 1):
            if other:
                assert not accepts("csv", "\n".join([*[row(columns)] * rows, row(other)]))
                assert not accepts("markdown_table", "\n".join([*head, line(" b |", other)]))


@pytest.mark.parametrize(
    ("name", "before", "repeated", "after", "most"),
    [
        ("json", "[\n", " ", "1]", 40),
        ("json", "[1\n", " ", "]", 40),
        ("markdown_table", "|", " ", "a |\n| - |\n| b |", 30),
        ("markdown_table", "| a", " ", "|\n| - |\n| b |", 30),
        ("markdown_table", "| a |\n| ", "-", " |\n| b |", 40),
        ("python", "x", " ", "# comment", 30),
        ("python", "x = [\n", " ", "1]", 60),
        ("python", "x\n", "\n", "y", 2),
        ("python", "x = [1,\n", "\n", "2]", 2),
        ("sql_select", "SELECT\n", " ", "1", 16),
        ("arithmetic", "1", "0", "", 15),
        ("number", "1", "0", "", 14),
        ("phone_e164", "+1", "0", "", 14),
        ("semver", "1", "0", ".0.0", 8),
        ("email", "a", "b", "@example.org", 19),
        ("url", "http://a/?", "b", "", 200),
    ],
)
def test_nothing_can_be_repeated_for_ever(name: str, before: str, repeated: str, after: str, most: int) -> None:
    assert accepts(name, before + repeated * most + after)
    assert not accepts(name, before + repeated * (most + 1) + after)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_can_be_told_from_an_end(name: str) -> None:
    """Fed byte by byte, every good sample is allowed by the mask at every place."""
    for text in samples(name, "accepted"):
        matcher = matcher_of(name)
        for byte in text.encode():
            assert matcher.compute_logit_bias()[byte], text
            assert matcher.consume_token(byte)
        assert matcher.is_accepting()


@cache
def demo_tokenizer() -> tuple[Any, LLTokenizer]:
    tokenizer = AutoTokenizer.from_pretrained(lookahead.demo_path())
    return tokenizer, from_tokenizer(tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_rolled_back_it_masks_as_before(name: str) -> None:
    """A real tokenizer's tokens are allowed all along a good sample; a detour that is taken back leaves no trace."""
    tokenizer, tokens_of = demo_tokenizer()
    for text in samples(name, "accepted"):
        matcher, draw = matcher_of(name, tokens_of), random.Random(text)
        for token in tokenizer.encode(text, add_special_tokens=False):
            mask = matcher.compute_logit_bias()
            assert mask[token], text
            detour, length = 0, draw.choice((0, 0, 0, 3))
            while detour < length and (allowed := tokens_allowed(matcher, tokenizer.eos_token_id)):
                assert matcher.consume_token(draw.choice(allowed)), matcher.get_error()
                detour += 1
            assert matcher.rollback(detour)
            assert matcher.compute_logit_bias() == mask
            assert matcher.consume_token(token)
        assert matcher.is_accepting()


# --- walks

PYTHON_WORDS = (
    *("def ", "async def ", "class ", "@a\n", "return", "yield", "raise", "assert ", "del ", "global ", "nonlocal "),
    *(
        "if ",
        "elif ",
        "else",
        "while ",
        "for ",
        "async for ",
        "with ",
        "async with ",
        "try",
        "except",
        "finally",
        "pass",
    ),
    *(
        "break",
        "continue",
        "import ",
        "from ",
        "lambda",
        "await ",
        " in ",
        " as ",
        " import ",
        " if ",
        " else ",
        " for ",
    ),
    *(" and ", " or ", "not ", " is ", ": ", " = ", " -> ", " += ", " := ", "**", "...", "()", "0x1", "1.5", "None"),
    *("self", 'f"', "b'", '"""', "{x}", "{x:>", ":\n    ", "\n    ", "\n        ", "\n            ", "# x"),
)
SQL_WORDS = (
    *(
        "SELECT ",
        "DISTINCT ",
        " FROM ",
        " WHERE ",
        " GROUP BY ",
        " HAVING ",
        " ORDER BY ",
        " LIMIT ",
        " OFFSET ",
        " DESC",
    ),
    *("WITH ", " AS ", " AS (", " JOIN ", " LEFT JOIN ", " ON ", " USING (", " UNION ", " UNION ALL ", " EXCEPT "),
    *(" AND ", " OR ", "NOT ", " IS ", " IN (", " NOT IN (", " LIKE ", " BETWEEN ", "EXISTS (", "CAST(", " AS INTEGER"),
    *("CASE ", "WHEN ", " WHEN ", " THEN ", " ELSE ", " END", " OVER (", "PARTITION BY ", "NULL", "*", "count("),
)
WALKS = {
    "arithmetic": Walk(closing=("0", ")")),
    "csv": Walk((",", "\n", '""', "é"), closing=('"', ",", "x"), budget=60),
    "email": Walk(("@", ".", ".org", "-"), closing=("@", "a", ".org"), budget=30),
    "ipv4": Walk(closing=("0", ".")),
    "iso8601": Walk(("2024-", "02-29", "T"), closing=tuple("0123456789-:")),
    "json": Walk(
        ('{"a":', "[1, ", "null", "\n    ", '"é"', "\\u00e9", "1.5e+3"), closing=(*'0":}]e', "null"), budget=60
    ),
    "json_lines": Walk(('{"a":', "[1, ", "null", "\n", '"é"', "\\n"), closing=(*'0":}]e', "null"), budget=60),
    "markdown_table": Walk(
        ("| ", " | ", "\n| ", "---", " --- |", ":---", " x |"), closing=("| ", " |", "\n|", " --- |", " x |")
    ),
    "number": Walk(closing=("0",)),
    "phone_e164": Walk(closing=("1",)),
    "python": Walk(
        PYTHON_WORDS, (*"0x\"')]}:\n", ": ", "pass", "except", " in ", " import ", " else ", '"""'), 60, 200
    ),
    "semver": Walk(("-rc", ".1", "+", "-alpha", "0."), closing=("0", ".")),
    "sql_select": Walk(
        SQL_WORDS, (*"1x)'\" ", " THEN 1", " END", " AS INTEGER", " FROM x", " AND ", "SELECT 1"), 60, 500
    ),
    "url": Walk(
        ("http://", "https://", "/", "?", "#", "%20", ":80", ".org"), closing=("0", "a", "/", "http://", ".org")
    ),
    "uuid": Walk(closing=tuple("0123456789abcdef-")),
    "xml": Walk(
        ("<a", "</", "/>", "<b>", ' x="', "&amp;", "<!--", "-->", "<![CDATA[", "]]>", "é", "&#65;", "<?xml"),
        closing=("<a", "a", ">", "</", "/>", '="', '"', "'", "-->", "]]>", "amp;", "?>", ";", "1"),
        budget=60,
    ),
}
WRITTEN = {**PARSERS, "xml": xml_with_its_names_mended}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_walk_writes_parses(name: str) -> None:
    """Whatever the masks allow up to an accepting place is text of the format; and nearly every walk gets there."""
    finished: list[bool] = []

    @settings(max_examples=40)
    @given(st.integers(0, 2**32 - 1))
    def walk(seed: int) -> None:
        text = WALKS[name].run(name, seed)
        finished.append(text is not None)
        if text is not None:
            with warnings.catch_warnings(action="ignore"):
                WRITTEN[name](text)
            assert accepts(name, text)  # token by token or byte by byte: one language

    walk()
    assert sum(finished) >= FINISHED * len(finished)


# --- real code


def functions(every: int) -> Iterator[str]:
    """Yield one in `every` functions of one in five modules of the standard library, dedented."""
    count = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::5]:
        source = path.read_text(encoding="utf-8", errors="ignore")
        lines = source.splitlines(keepends=True)
        with warnings.catch_warnings(action="ignore"):
            nodes = list(ast.walk(ast.parse(source)))
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count += 1
                if count % every == 0:
                    start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                    yield textwrap.dedent("".join(lines[start - 1 : node.end_lineno]))


def test_python_accepts_the_standard_library() -> None:
    chosen = [text for text in functions(every=10) if parses("python", text)]
    assert len(chosen) > 100
    assert sum(accepts("python", text) for text in chosen) >= STANDARD_LIBRARY * len(chosen)


# --- the loader


def test_every_file_is_read_and_described() -> None:
    assert set(NAMES) == set(PARSERS) == set(WALKS) == {path.stem for path in SAMPLES.glob("*.txt")}
    for name in NAMES:
        entry = library.read(name)
        assert entry.name == name
        assert entry.kind in ("lark", "regex")
        assert len(entry.description) > 20
        assert entry.description.endswith(".")
        assert "Accepts:" in (library.folder() / f"{name}.{entry.kind}").read_text(encoding="utf-8")


def test_the_text_of_a_regex_is_its_pattern() -> None:
    assert library.read("phone_e164").text == r"\+[1-9][0-9]{6,14}"
    assert library.read("json").text.startswith("// JSON")


def test_an_unknown_name_is_answered_with_those_that_come_close() -> None:
    with pytest.raises(InvalidArgument, match=r"'pyhton'; did you mean 'python'"):
        library.read("pyhton")
    with pytest.raises(InvalidArgument, match=r"there are arithmetic, csv, "):
        library.read("../README")
