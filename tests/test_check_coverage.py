"""scripts/check-coverage: what `make check` says of the last measured run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "check-coverage"


def check(total: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, total], capture_output=True, text=True)


def test_without_a_measured_run_it_says_how_to_measure(tmp_path):
    done = check(tmp_path / "total")
    assert done.returncode == 0
    assert "`make coverage`" in done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(("total", "status"), [("100\n", 0), ("12.34\n", 1)])
def test_a_total_below_the_threshold_fails(tmp_path, total, status):
    (tmp_path / "total").write_text(total)
    done = check(tmp_path / "total")
    assert done.returncode == status
    assert total.strip() in (done.stdout if status == 0 else done.stderr)
    if status:
        assert str(tmp_path / "report.txt") in done.stderr
