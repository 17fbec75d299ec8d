"""Several versions of the packages beside each other, as an upgrade on disk finds them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import vring
import vring_serial

_SOURCES = {
    "vring": Path(vring.__file__).parent,
    "vring_serial": Path(vring_serial.__file__).parent,
}

#: Passages that are replaced, by file below the directory of packages: what stands, and what is to.
Changes = Mapping[str, tuple[str, str]]


class Versions:
    """Versions in a directory, one of which is installed.

    Args:
        directory: for them.

    Attributes:
        environment: for processes that are to find the one that is installed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._current = directory / "current"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(self._current),
            "PYTHONDONTWRITEBYTECODE": "1",  # what is compiled belongs to the real packages
        }

    def make(self, version: str, changes: Changes | None = None) -> None:
        """Make a version: these packages but for their number and some passages."""
        directory = self._directory / version
        number = {"vring/__init__.py": (vring.__version__, version)}
        for name, (stands, is_to) in {**number, **(changes or {})}.items():
            package, *rooms, file = name.split("/")
            source, target = _SOURCES[package], directory / package
            for room in (*rooms, None):
                _mirror(source, target)
                if room is not None:
                    source, target = source / room, target / room
            text = (source / file).read_text()
            assert stands in text, f"{name} has changed"
            (target / file).unlink()
            (target / file).write_text(text.replace(stands, is_to))
        for package, source in _SOURCES.items():
            _mirror(source, directory / package)

    def install(self, version: str) -> None:
        """Have processes that start from now on find this version."""
        new = self._directory / "new"
        new.symlink_to(version)
        os.replace(new, self._current)


def _mirror(source: Path, target: Path) -> None:
    """Make ``target`` a directory of links to what is in ``source``, as far as it is none."""
    if target.is_symlink():
        target.unlink()
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
