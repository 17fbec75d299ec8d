"""Two processes on one ring, for a bounded time; `make fuzz` runs it for ten thousand wraps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
HAMMER = FUZZ / "hammer.py"


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("suppression", [[], ["--event-idx"]], ids=["flags", "event-idx"])
def test_two_processes_hammer_one_ring(layout: str, suppression: list[str]) -> None:
    command = [sys.executable, str(HAMMER), "--layout", layout, *suppression]
    command += ["--size", "64", "--messages", "200000", "--seconds", "50"]
    out = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_hostile_process_changes_a_ring_under_the_device(layout: str) -> None:
    """`make sanitize` and `make tsan` do the same with instrumented extensions."""
    command = [sys.executable, str(FUZZ / "hostile.py"), "--layout", layout, "--seconds", "3"]
    out = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
