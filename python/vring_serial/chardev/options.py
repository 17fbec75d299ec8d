"""What the option classes of all kinds share.

Each kind has a frozen dataclass of options beside its class. Field names are the keys of QEMU's
``-chardev`` with ``-`` written ``_``; every field has a type that says how a string becomes its
value (bool: on/off; int; str), and ``__post_init__`` refuses what cannot be with a ConfigError
whose ``where`` is the key.
"""

from __future__ import annotations

import dataclasses
import os

from vring_serial.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Base of the options of every kind."""

    @classmethod
    def keys(cls) -> dict[str, dataclasses.Field[object]]:
        """Key as QEMU spells it (``reconnect-ms``) → the dataclass field that holds it."""
        return {field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}


def check_path(key: str, path: str) -> None:
    """Raise ConfigError for a path that no system call would take."""
    if not path:
        raise ConfigError("a path is needed", key)
    if "\0" in path:
        raise ConfigError(f"{path!r} contains a NUL character", key)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ConfigError(f"{path!r} cannot be a file name", key) from None


def check_range(key: str, value: int, lowest: int, highest: int) -> None:
    """Raise ConfigError unless ``lowest <= value <= highest``."""
    if not lowest <= value <= highest:
        raise ConfigError(f"{value} is not between {lowest} and {highest}", key)
