"""The table of kinds: makes a chardev by the name that ``-chardev`` and the domain XML use.

The module of a kind is imported when it is first needed, so a process loads only what it uses.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from typing import NamedTuple, cast

from vring_serial.chardev.base import Chardev
from vring_serial.chardev.log import LogOptions, OutputLog
from vring_serial.chardev.options import Options
from vring_serial.errors import ConfigError


class _Entry(NamedTuple):
    module: str
    chardev: str
    options: str


_TABLE = {
    "socket": _Entry("socket", "SocketChardev", "SocketOptions"),
    "pty": _Entry("pty", "PtyChardev", "PtyOptions"),
    "file": _Entry("file", "FileChardev", "FileOptions"),
    "pipe": _Entry("pipe", "PipeChardev", "PipeOptions"),
    "serial": _Entry("serial", "SerialChardev", "SerialOptions"),
    "stdio": _Entry("stdio", "StdioChardev", "StdioOptions"),
    "udp": _Entry("udp", "UdpChardev", "UdpOptions"),
    "null": _Entry("null", "NullChardev", "NullOptions"),
    "ringbuf": _Entry("ringbuf", "RingbufChardev", "RingbufOptions"),
    "console": _Entry("console", "ConsoleChardev", "ConsoleOptions"),
    "spicevmc": _Entry("protocol", "ProtocolChardev", "SpicevmcOptions"),
    "spiceport": _Entry("protocol", "ProtocolChardev", "SpiceportOptions"),
}
#: Kinds whose end is Python code that the caller supplies, with the code's name for messages.
_NEEDS_CODE = {"spicevmc": "a SPICE agent end", "spiceport": "a SPICE server"}


def kinds() -> tuple[str, ...]:
    """Return the names of all kinds."""
    return tuple(_TABLE)


def options_type(kind: str) -> type[Options]:
    """Return the options class of a kind; raise ConfigError with all kinds if it is unknown."""
    return cast("type[Options]", _load(kind)[1])


def make(
    kind: str,
    id: str,
    options: Options | None = None,
    *,
    factory: Callable[[], asyncio.Protocol] | None = None,
    log: LogOptions | None = None,
) -> Chardev:
    """Make a chardev, not started.

    Args:
        kind: one of :func:`kinds`.
        id: the chardev's name.
        options: an instance of ``options_type(kind)``; None: all defaults.
        factory: for kinds whose end is Python code (spicevmc, spiceport): makes one protocol per
            connection.
        log: where what the guest writes is logged; None: nowhere.

    Raises:
        ConfigError: the kind is unknown, or a required option or factory is missing.
    """
    chardev_type, wanted = _load(kind)
    if options is None:
        options = cast(Options, wanted())
    if not isinstance(options, wanted):
        raise TypeError(f"{kind} takes {wanted.__name__}, not {type(options).__name__}")
    if kind in _NEEDS_CODE:
        if factory is None:
            raise ConfigError(f"chardev {id}: {kind} needs {_NEEDS_CODE[kind]}, and none is given")
        made = cast(Chardev, chardev_type(id, factory, description=kind))
    else:
        made = cast(Chardev, chardev_type(id, options))
    if log is not None and log.logfile:
        made.log = OutputLog(id, log)
    return made


def _load(kind: str) -> tuple[type, type]:
    try:
        entry = _TABLE[kind]
    except KeyError:
        raise ConfigError(
            f"there is no chardev {kind!r}; there are {', '.join(sorted(_TABLE))}"
        ) from None
    module = importlib.import_module(f"vring_serial.chardev.{entry.module}")
    return getattr(module, entry.chardev), getattr(module, entry.options)
