"""Too little memory is told in one line, by whoever finds out."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES
from vring_serial.cli import _report, limits


def run(limit: int, mib: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``vring`` with its memory limited."""
    limited = ["prlimit", f"--{limit_name(limit)}={mib << 20}"]
    return subprocess.run(
        [*limited, sys.executable, "-m", "vring_serial", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def limit_name(limit: int) -> str:
    return {resource.RLIMIT_AS: "as", resource.RLIMIT_DATA: "data"}[limit]


@pytest.mark.parametrize("mib", [64, 120, 200, 300])
@pytest.mark.parametrize(
    ("limit", "how"), [(resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")]
)
@pytest.mark.parametrize(
    "command", [["serve", "--help"], ["guest", "--vhost-user", "/nowhere", "--list"]]
)
def test_too_little_memory_to_start(limit: int, how: str, mib: int, command: list[str]) -> None:
    done = run(limit, mib, *command)
    assert done.returncode == 1
    assert done.stderr == (
        f"vring: memory is limited to {mib} MiB ({how}), and {limits.NEEDED >> 20} MiB are needed\n"
    )


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_what_is_needed_is_enough(tmp_path: Path, limit: int) -> None:
    """On however many processors: OpenBLAS would reserve memory for each of them."""
    domain = EXAMPLES / "spice-agent.xml"
    mib = limits.NEEDED >> 20
    missing = str(tmp_path / "missing" / "s")
    arguments = ("--vhost-user", missing, "--domain", str(domain))
    done = run(limit, mib, "serve", "--no-keeper", *arguments)
    assert done.returncode == 1
    assert "there is no directory" in done.stderr


def test_a_keeper_needs_room_for_a_journal(tmp_path: Path) -> None:
    arguments = ("serve", "--vhost-user", str(tmp_path / "missing" / "s"))
    arguments += ("--chardev", "null,id=n", "--port", "chardev=n")
    needed = limits.NEEDED_WITH_KEEPER >> 20
    done = run(resource.RLIMIT_AS, needed - 1, *arguments)
    assert (done.returncode, done.stderr) == (
        1,
        f"vring: memory is limited to {needed - 1} MiB (ulimit -v), and "
        f"{needed} MiB are needed ({limits.NEEDED >> 20} MiB with --no-keeper)\n",
    )
    done = run(resource.RLIMIT_AS, needed, *arguments)
    assert done.returncode == 1
    assert "there is no directory" in done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "vring: out of memory"),
        (OSError(12, "Cannot allocate memory"), "vring: out of memory"),
        (RuntimeError("can't start new thread"), "no more threads and processes can be started"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "no more threads and processes"),
    ],
)
def test_what_runs_out_later(
    error: Exception,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _report(error, "vring") == 1
    assert line in (first := capsys.readouterr().err)
    assert first.count("\n") == 1
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 30, resource.RLIM_INFINITY))
    _report(error, "vring")
    assert "memory is limited to 1024 MiB (ulimit -d)" in capsys.readouterr().err
