"""`vring bench` from end to end: real processes, few messages."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from vring_serial.bench.usage import cpu_seconds

WITH_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
FEW = ["--sizes", "64,5000", "--ports", "1,3", "--rounds", "1", "--messages", "2000"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vring_serial", "bench", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def test_transfer_measures_both_ways_and_saves(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    done = bench("transfer", *FEW, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "guest to host" in done.stdout
    assert "processes of their own" in done.stdout
    document = json.loads(path.read_text())
    found = {(r["what"], r["ring"], r["ports"], r["size"]) for r in document["results"]}
    assert found == {
        *(
            (way, ring, ports, size)
            for way in ("guest to host", "host to guest")
            for ring in ("split", "packed")
            for ports, size in ((1, 64), (1, 5000), (3, 64), (3, 65536))
        ),
        ("plain socket", "", 1, 64),
        ("plain socket", "", 1, 5000),
    }
    assert all(sample > 0 for r in document["results"] for sample in r["samples"])

    compared = bench("compare", str(path), str(path))
    assert compared.returncode == 0
    assert compared.stdout.count("the same") == len(document["results"])


def test_latency_and_rings(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert bench("latency", "--pings", "50", "--json", str(path)).returncode == 0
    results = json.loads(path.read_text())["results"]
    assert all(len(r["samples"]) == 50 for r in results)
    ports = ("port with a FIFO", "port with a process")
    kinds = {f"{port}{place}" for port in ports for place in ("", ", one processor")}
    kinds.add("port with a FIFO, busy-poll")
    assert {(r["what"], r["ring"]) for r in results} == {
        *((kind, ring) for kind in kinds for ring in ("split", "packed")),
        ("eventfd", ""),
        ("eventfd, one processor", ""),
    }
    rings = bench("rings", "--rounds", "1", "--ring", "packed")
    assert rings.returncode == 0
    assert "batches of 256" in rings.stdout
    assert "split" not in rings.stdout


@pytest.mark.skipif(not WITH_MATPLOTLIB, reason="vring[plot] is not installed")
@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_plot(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    done = bench("--plot", str(path), *FEW, "--pings", "20")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.skipif(WITH_MATPLOTLIB, reason="matplotlib is installed")
def test_plot_without_matplotlib_is_one_line_before_anything_is_measured(tmp_path: Path) -> None:
    done = bench("--plot", str(tmp_path / "a.png"))
    assert done.returncode == 1
    assert done.stderr == (
        "vring: --plot needs matplotlib, which is not installed: pip install 'vring[plot]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--sizes", "64,x"], "'x' is not a number"),
        (["--sizes", "0"], "'0' is not in 1 to"),
        (["--sizes", "1G"], "'1G' is not a number"),
        (["--ports", "126"], "'126' is not in 1 to 125"),
        (["--rounds", "0"], "--rounds"),
        (["--plot", "a.jpg"], "ends neither in .png nor in .svg"),
        (["nothing"], "No such command 'nothing'"),
        (["compare", "only-one"], "Missing argument 'B'"),
    ],
)
def test_usage_errors(arguments: list[str], word: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1


def children(pid: int) -> set[int]:
    """Processes whose parent this is."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.add(int(entry.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_leaves_nothing(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vring_serial", "bench", "transfer", "--rounds", "1000"]
    process = subprocess.Popen(
        ["env", "--default-signal=HUP", *command],  # these tests may run under nohup
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    started: set[int] = set()
    try:
        wait_until(lambda: len(children(process.pid)) >= 3, "device, guest and peer are started")
        started = children(process.pid)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    except BaseException:
        for pid in {process.pid, *children(process.pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        raise
    assert list(tmp_path.iterdir()) == []
    for pid in started:
        with pytest.raises(FileNotFoundError):
            cpu_seconds(pid)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_is_told_before_anything_is_measured(
    option: str, tmp_path: Path
) -> None:
    path = tmp_path / "absent" / "x.svg"
    done = bench("transfer", option, str(path))
    assert done.returncode == 2
    assert done.stderr == f"vring: {option}: '{path}': there is no such directory\n"
