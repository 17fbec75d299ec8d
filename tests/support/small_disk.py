"""A file system that is soon full."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted tmpfs; made by :func:`small_disk`.

    Attributes:
        path: its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self, room: int = 0) -> None:
        """Leave room for so many bytes, rounded up to pages, and no more."""
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        if room:
            with self._filler.open("r+b") as file:
                file.truncate(max(self._filler.stat().st_size - room, 0))

    def free(self) -> None:
        """Have room again."""
        self._filler.unlink()


@contextlib.contextmanager
def small_disk(path: Path, options: str) -> Iterator[SmallDisk]:
    """Mount one for a block; skip the test where nobody may.

    Args:
        path: a directory to make.
        options: of tmpfs: ``size=256k,nr_inodes=8``.
    """
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "vring-test", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)
