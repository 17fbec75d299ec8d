"""Every test that docs/conformance.md names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "docs" / "conformance.md").read_text().splitlines()
    if line.startswith("| ") and not re.match(r"\| (section|---)", line)
]


def test_there_are_rows():
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_tests_that_exist(row):
    section, demand, where = (cell.strip() for cell in row.strip("| ").split(" | "))
    assert section
    assert demand
    if where.startswith(("not offered", "there is none")):
        return
    path = ""
    for name in where.split(", "):
        file, _, test = name.partition("::")
        path = file or path
        text = (ROOT / path).read_text()
        assert re.search(rf"^(async )?def {test}\b", text, re.MULTILINE), name
