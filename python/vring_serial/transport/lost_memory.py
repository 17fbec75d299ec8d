"""Watch for peers that truncate the files behind their guest's memory."""

from __future__ import annotations

from vring import GuestMemory, MemoryWatch
from vring_serial.errors import ResourceError


def make_watch(name: str) -> MemoryWatch:
    """Return a watch for the memory of all peers of one socket.

    Raises:
        ResourceError: no descriptor is left; the message names the socket.
    """
    try:
        return MemoryWatch()
    except OSError as error:
        raise ResourceError(f"{name}: {error.strerror}") from error


def describe_loss(memory: GuestMemory) -> str | None:
    """Return which memory is lost, for log lines; None if none is."""
    for region in memory.regions:
        if region.lost:
            return (
                f"its memory at guest address {region.guest_addr:#x}, {region.size:#x} bytes, "
                "is gone: the file was cut off"
            )
    return None
