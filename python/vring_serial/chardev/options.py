"""The common part of the option classes of all kinds.

Each kind has a frozen dataclass of options beside its class. Field names are the keys of QEMU's
``-chardev`` with ``_`` for ``-``; a field's type says how a string is converted (bool: on/off; int;
str). ``__post_init__`` refuses invalid values with a ConfigError whose ``where`` is the key.
"""

from __future__ import annotations

import dataclasses
import os

from vring_serial.errors import ConfigError

#: Ports that may share a host end (``mux=on``), as in QEMU.
FRONTS_MAX = 4
#: Kinds that ports cannot share (``mux=on``): they are code for one port.
UNSHARED = ("spicevmc", "spiceport", "udp")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Base class of the options of every kind."""

    @classmethod
    def keys(cls) -> dict[str, dataclasses.Field[object]]:
        """Return the field of each key, by the key in QEMU's spelling (``reconnect-ms``)."""
        return {field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}


def base_id(id: str) -> str:
    """Return QEMU's name for what is behind a host end that ports share."""
    return f"{id}-base"


def check_path(key: str, path: str) -> None:
    """Raise ConfigError for a path that no system call accepts."""
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
