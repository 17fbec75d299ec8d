"""Tables at every width, in every encoding: no number is left out."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.waiting import wait_until
from vring_serial.bench.results import Report, Result
from vring_serial.bench.tables import comparison, tables
from vring_serial.cli.tables import show

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


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vring_serial", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_of_a_demo_says_all_at_any_width(width: int, encoding: str) -> None:
    out = run("demo", "--size", "1", COLUMNS=str(width), PYTHONIOENCODING=encoding)
    steps, table = out.split("vring demo")
    table = " ".join(re.sub(r"[│┃|]", " ", table).split())  # lines that were wrapped
    told = re.findall(r"^(?:✓|\\u2713) (.+?): (.+)$", steps, re.MULTILINE)
    assert len(told) == 10
    for step, detail in told:
        for word in (*step.split(), *detail.split()):
            assert word in table or word in table.replace(" ", ""), f"{word} of {step}"
    assert len(re.findall(r"\bok\b", table)) == len(told)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_list_of_ports_leaves_out_no_name(tmp_path: Path, width: int, encoding: str) -> None:
    names = ["a" * 60, "org.vring.:warning:[red].0", "caf\u00e9"]
    options = []
    for number, name in enumerate(names):
        options += ["--chardev", f"null,id=n{number}", "--port", f"chardev=n{number},name={name}"]
    socket = tmp_path / "v"
    serve = subprocess.Popen(
        [sys.executable, "-m", "vring_serial", "serve", "--vhost-user", str(socket), *options],
        stderr=subprocess.DEVNULL,
    )
    with serve:
        try:
            wait_until(socket.exists, "not served", unless=lambda: serve.poll() is not None)
            arguments = ("guest", "--vhost-user", str(socket), "--list")
            out = run(*arguments, COLUMNS=str(width), PYTHONIOENCODING=encoding)
        finally:
            serve.terminate()
    # A name that is longer than a line goes on in the next.
    shown = re.sub(r"\s", "", out)
    assert "\u2026" not in out
    for name in names:
        assert (name if encoding == "utf-8" else ascii(name)[1:-1]) in shown


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_an_encoding_without_the_characters_loses_no_line(term: str) -> None:
    out = run("demo", "--size", "1", PYTHONIOENCODING="ascii", TERM=term, NO_COLOR="1")
    assert out.isascii()
    assert "guest to host" in out
