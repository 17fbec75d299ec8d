"""The console's configuration space (virtio 1.3, 5.3.4), and the features behind it."""

from __future__ import annotations

from collections.abc import Mapping

from vring_serial.device.console.port import Port
from vring_serial.proto.console import ConsoleConfig, ConsoleFeature
from vring_serial.proto.virtio import Feature

SIZE = ConsoleConfig.SIZE
#: What is offered unless the one who builds the device says otherwise.
DEFAULT_FEATURES = (
    Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.VERSION_1
    | ConsoleFeature.SIZE
    | ConsoleFeature.MULTIPORT
    | ConsoleFeature.EMERG_WRITE
)


def console_of(ports: Mapping[int, Port], *, single_port: bool) -> Port | None:
    """Return the port that the space describes: the first console, or the only port."""
    consoles = (port for _, port in sorted(ports.items()) if port.console)
    return next(consoles, ports.get(0) if single_port else None)


def size_of(console: Port | None, offered: int) -> tuple[int, int]:
    """Return columns and rows as the space has them: 0 and 0 for none.

    Args:
        console: the port that the space describes.
        offered: the device's feature bits.
    """
    if console is None or console.size is None or not offered & ConsoleFeature.SIZE:
        return 0, 0
    return console.size


def read_space(size: tuple[int, int], max_ports: int, offset: int, length: int) -> bytes:
    """Return ``length`` bytes of the space; what lies outside reads as zero."""
    config = ConsoleConfig(*size, max_ports).pack()
    return config[offset : offset + length].ljust(length, b"\0")


def emergency_char(offered: int, offset: int, data: bytes) -> int | None:
    """Return the character that a write to the space has for emerg_wr; None if it means nothing."""
    at = ConsoleConfig.EMERG_WR - offset
    if not offered & ConsoleFeature.EMERG_WRITE or not 0 <= at < len(data):
        return None
    # Whoever writes the whole space (QEMU does) writes 0 here and means nothing by it.
    return data[at] if any(data[at : at + 4]) else None
