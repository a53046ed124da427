"""What the formats of the bundled grammars are, in the words of parsers that know nothing of those grammars."""

from __future__ import annotations

import ast
import csv
import io
import ipaddress
import json
import re
import sqlite3
import urllib.parse
import uuid
import warnings
import xml.etree.ElementTree as etree
from collections.abc import Callable
from datetime import datetime
from email.headerregistry import Address


def python(text: str) -> None:
    ast.parse(text)


def compiled(text: str) -> None:
    compile(text, "sample", "exec", dont_inherit=True)


def arithmetic(text: str) -> None:
    ast.parse(text, mode="eval")


def json_value(text: str) -> None:
    json.loads(text, parse_constant=_no_constant)


def json_lines(text: str) -> None:
    for line in text.removesuffix("\n").split("\n"):
        if not isinstance(json.loads(line, parse_constant=_no_constant), dict | list):
            raise ValueError(f"not an object or array: {line}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def csv_table(text: str) -> None:
    widths = {len(record) for record in csv.reader(io.StringIO(text, newline=""), strict=True)}
    if len(widths) != 1:
        raise ValueError(f"records of {sorted(widths)} fields")


def markdown_table(text: str) -> None:
    rows = [re.split(r"(?<!\\)\|", line) for line in text.removesuffix("\n").split("\n")]
    if len(rows) < 3 or any(row[0] or row[-1] or len(row) != len(rows[0]) or len(row) < 3 for row in rows):
        raise ValueError("not a table")
    if not all(re.fullmatch(r" *:?-+:? *", cell) for cell in rows[1][1:-1]):
        raise ValueError("no delimiter row")


def sql(text: str) -> None:
    """Let SQLite parse it; that nothing exists there, or counts of columns, are no errors of syntax."""
    known = r"no such |no tables specified|same number of result columns|RIGHT and FULL|wrong number of arguments|"
    known += r"misuse of |window function|out of range|ORDER BY term does not match|cannot join using column|"
    known += r"ambiguous column|aggregate functions are not allowed|sub-select returns|circular reference|"
    known += r"row value misused|HAVING clause on a non-aggregate|duplicate WITH table name"
    try:
        with _DATABASE:
            _DATABASE.execute("EXPLAIN " + text)
    except (sqlite3.OperationalError, sqlite3.Warning, sqlite3.ProgrammingError) as error:
        if not re.search(known, str(error)):
            raise ValueError(str(error)) from None


_DATABASE = sqlite3.connect(":memory:", check_same_thread=False)


def xml(text: str) -> None:
    etree.fromstring(text)


def xml_with_its_names_mended(text: str) -> None:
    """Parse after giving each end tag the name of its start tag and each attribute a name of its own."""
    tags = re.compile(
        r"<!--.*?-->|<!\[CDATA\[.*?\]\]>|<\?.*?\?>|</?([A-Za-z_][\w.-]*)((?: [\w.-]+=(?:\"[^\"]*\"|'[^']*'))*)", re.S
    )
    opened: list[str] = []

    def mend(tag: re.Match[str]) -> str:
        if tag[1] is None:
            return tag[0]
        if tag[0].startswith("</"):
            return f"</{opened.pop()}"
        if not text.startswith("/>", tag.end()) and not text.startswith(" />", tag.end()):
            opened.append(tag[1])
        names = iter(range(len(tag[0])))
        return f"<{tag[1]}" + re.sub(
            r" [\w.-]+=(\"[^\"]*\"|'[^']*')", lambda found: f" a{next(names)}={found[1]}", tag[2]
        )

    etree.fromstring(tags.sub(mend, text))


def number(text: str) -> None:
    value = json.loads(text, parse_constant=_no_constant)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) == float("inf"):
        raise ValueError(text)


def uuid_text(text: str) -> None:
    value = uuid.UUID(text)
    if str(value) != text.lower() or value.variant != uuid.RFC_4122 or value.version not in range(1, 9):
        raise ValueError(text)


def url(text: str) -> None:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 0) > 65535:
        raise ValueError(text)
    if re.search(r"%(?![0-9A-Fa-f]{2})|[\s\"<>\\^`{|}]|#.*#", text) or parts.hostname.startswith("-"):
        raise ValueError(text)
    if re.fullmatch(r"[\d.]+", parts.hostname):
        ipaddress.IPv4Address(parts.hostname)


def phone(text: str) -> None:
    digits = text.removeprefix("+")
    if digits == text or not digits.isdecimal() or digits.startswith("0") or not 7 <= len(digits) <= 15:
        raise ValueError(text)


def semver(text: str) -> None:
    text, plus, build = text.partition("+")
    core, hyphen, release = text.partition("-")
    numbers = core.split(".")
    identifiers = (release.split(".") if hyphen else []) + (build.split(".") if plus else [])
    numbers += [each for each in (release.split(".") if hyphen else []) if each.isdecimal()]
    if core.count(".") != 2 or not all(each.isdecimal() and str(int(each)) == each for each in numbers):
        raise ValueError(text)
    if not all(re.fullmatch("[0-9A-Za-z-]+", each) for each in identifiers):
        raise ValueError(text)


def email(text: str) -> None:
    if not Address(addr_spec=text).domain:
        raise ValueError(text)


PARSERS: dict[str, Callable[[str], object]] = {
    "arithmetic": arithmetic,
    "csv": csv_table,
    "email": email,
    "ipv4": ipaddress.IPv4Address,
    "iso8601": datetime.fromisoformat,
    "json": json_value,
    "json_lines": json_lines,
    "markdown_table": markdown_table,
    "number": number,
    "phone_e164": phone,
    "python": python,
    "semver": semver,
    "sql_select": sql,
    "url": url,
    "uuid": uuid_text,
    "xml": xml,
}


def parses(name: str, text: str) -> bool:
    with warnings.catch_warnings(action="ignore"):
        try:
            PARSERS[name](text)
        except Exception:  # each parser has its own errors, and all of them mean no
            return False
    return True
