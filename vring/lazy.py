"""Names that a package exports and imports when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make what a package needs to export names without importing their modules.

    Args:
        package: its ``__name__``.
        modules: module → the names that it has, between spaces.

    Returns:
        The package's ``__getattr__`` and ``__dir__``. The former keeps what it has found in the
        package, and raises AttributeError for names that are not exported.
    """
    home = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, listed
