"""``scripts/check-docstrings`` names what a package leaves undocumented, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "check-docstrings"

MODULE = '''\
"""A module."""

from dataclasses import dataclass


@dataclass
class Size:
    """A size.

    Attributes:
        cols, rows: in characters.
    """

    cols: int
    rows: int = 0
    _cache: int = 0


@dataclass
class Cell(Size):
    """A size and {prose}.

    Attributes:
        char: a code point.{listed}
    """

    char: int = 0
    color: int = 0


class Plain:
    """Not a dataclass."""

    color: int

    def paint(self) -> None:
        """Paint."""
'''


def check(directory: Path, source: str) -> tuple[int, list[str]]:
    """Run the script on a package of one module; return its exit status and lines."""
    (directory / "tiny.py").write_text(source)
    done = subprocess.run(
        [sys.executable, SCRIPT, "tiny"],
        env={**os.environ, "PYTHONPATH": str(directory)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()


def test_a_field_that_no_class_lists_is_named(tmp_path: Path) -> None:
    source = MODULE.format(prose="a color: any", listed="")
    assert check(tmp_path, source) == (1, ["undocumented: tiny.Cell.color"])


def test_a_package_that_lists_every_field_passes(tmp_path: Path) -> None:
    source = MODULE.format(prose="more", listed="\n        color: RGB, 24 bits.")
    assert check(tmp_path, source) == (0, [])


def test_a_method_without_docstring_is_named(tmp_path: Path) -> None:
    source = MODULE.format(prose="more", listed="\n        color: RGB, 24 bits.")
    source = source.replace('        """Paint."""\n', "        ...\n")
    assert check(tmp_path, source) == (1, ["undocumented: tiny.Plain.paint"])
