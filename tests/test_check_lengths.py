"""``scripts/check-lengths`` names modules above the limit, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check(*directories: Path) -> tuple[int, list[str]]:
    """Run the script on directories, or on those of the packages; return its status and lines."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check-lengths", *directories],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()


def test_a_module_above_the_limit_is_named(tmp_path: Path) -> None:
    within = tmp_path / "within"
    within.mkdir()
    (within / "long.pyx").write_text("\n" * 601)
    (tmp_path / "full.py").write_text("\n" * 600)
    (tmp_path / "text.md").write_text("\n" * 601)
    assert check(tmp_path) == (1, [f"too long: {within / 'long.pyx'}: 601 lines, at most 600"])


def test_modules_are_as_long_as_they_may_be() -> None:
    assert check() == (0, [])


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert check(tmp_path / "none") == (1, [f"{tmp_path / 'none'}: no directory"])
