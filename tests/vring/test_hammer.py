"""Two processes on one ring, for a bounded time; `make fuzz` runs it for ten thousand wraps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HAMMER = Path(__file__).parents[2] / "fuzz" / "hammer.py"


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("suppression", [[], ["--event-idx"]], ids=["flags", "event-idx"])
def test_two_processes_hammer_one_ring(layout: str, suppression: list[str]) -> None:
    command = [sys.executable, str(HAMMER), "--layout", layout, *suppression]
    command += ["--size", "64", "--messages", "200000", "--seconds", "50"]
    out = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
