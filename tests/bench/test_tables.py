"""Tables at every width, in every encoding: no number is left out."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from vring_serial.bench.results import Report, Result
from vring_serial.bench.tables import comparison, show, tables

SAMPLES = [1.234, 2.345, 3.456]
REPORT = Report(
    [
        Result(
            group, what, "packed", 16, 65536, unit, SAMPLES, {"CPU s/GiB": 0.25, "of plain": 0.61}
        )
        for group, what, unit in (
            ("transfer", "guest to host", "GB/s"),
            ("latency", "port with a process, one processor", "us"),
            ("rings", "pop, gather and push, batches of 256", "ns"),
        )
    ]
)


def shown(width: int) -> str:
    file = io.StringIO()
    console = Console(width=width, file=file)
    for table in (*tables(REPORT), comparison(REPORT, REPORT)[0]):
        show(console, table)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_left_out_at_any_width(width: int) -> None:
    def numbers(text: str) -> list[str]:
        return sorted(re.findall(r"\d+\.\d+", text))

    text = shown(width)
    assert "\u2026" not in text
    assert numbers(text) == numbers(shown(1000))
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_an_encoding_without_the_characters_loses_no_line(term: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vring_serial", "demo", "--size", "1"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "TERM": term, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "guest to host" in done.stdout
