"""What benchmarks note in ``extra_info`` is printed at the end of the run, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

#: (file, test, its notes) in the order they ran.
_found: list[tuple[str, str, dict[str, Any]]] = []


@pytest.fixture(autouse=True)
def _collect(request: pytest.FixtureRequest) -> Iterator[None]:
    if "benchmark" not in request.fixturenames:
        yield
        return
    notes = request.getfixturevalue("benchmark").extra_info
    yield
    if notes:
        _found.append((request.node.path.name, request.node.name, notes))


def _text(value: Any) -> str:
    match value:
        case float():
            return f"{value:.2f}"
        case dict():
            return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
        case _:
            return str(value)


def _table(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A section for each file, with a table for each run of tests that note the same things. Tests
    that note a ``workload`` are called that."""
    for file, of_file in groupby(_found, lambda row: row[0]):
        terminalreporter.section(Path(file).stem.removeprefix("test_").replace("_", " "))
        for names, rows in groupby(of_file, lambda row: tuple(row[2])):
            columns = [name for name in names if name != "workload"]
            lines = [["", *columns]]
            for _, test, notes in rows:
                what = notes.get("workload", test.removeprefix("test_"))
                lines.append([what, *(_text(notes[name]) for name in columns)])
            for line in _table(lines):
                terminalreporter.write_line(line)
