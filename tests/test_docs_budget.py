"""The page about the budget: its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lookahead import Budget, purse
from lookahead.sources.paid import CODES, EXPLORE, SPELLS
from lookahead.switch import MARGIN
from lookahead.trace import WHY

PAGE = Path(__file__).parents[1] / "docs" / "budget.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_reasons_are_those_of_traces() -> None:
    table = re.findall(r"^\| `([a-z ]+)` \| (.*) \|$", TEXT, re.MULTILINE)
    assert {name: text for name, text in table if name in WHY} == WHY


def test_numbers_are_those_of_the_code() -> None:
    budget = Budget()
    assert f"| `most` | {budget.most} |" in TEXT
    assert f"| `explore` | {budget.explore} |" in TEXT
    assert f"{purse.ASKING:.1f}% into drafts" in TEXT
    assert f"{purse.SIZES:.1f}% into passes" in TEXT
    assert f"less than {MARGIN} times its price" in TEXT
    assert f"to bring {purse._EARNS} times what they cost" in TEXT
    assert purse._GUIDED == 1.0
    assert f"told {purse._CAUTION} of that" in TEXT
    assert (SPELLS["pool"], SPELLS["grammar"], SPELLS["jacobi"]) == (8, 8, 24)
    assert len(CODES) * EXPLORE + budget.explore * (purse.ASKING + purse.SIZES) == pytest.approx(budget.explore)
