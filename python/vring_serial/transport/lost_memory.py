"""Peers that cut off the files behind their guest's memory."""

from __future__ import annotations

from vring import GuestMemory, MemoryWatch
from vring_serial.errors import ResourceError


def make_watch(name: str) -> MemoryWatch:
    """For the memory of all peers of one socket. Raises ResourceError, which names the socket."""
    try:
        return MemoryWatch()
    except OSError as error:
        raise ResourceError(f"{name}: {error.strerror}") from error


def describe_loss(memory: GuestMemory) -> str | None:
    """What is gone, for log lines; None while all is there."""
    for region in memory.regions:
        if region.lost:
            return (
                f"its memory at guest address {region.guest_addr:#x}, {region.size:#x} bytes, "
                "is gone: the file was cut off"
            )
    return None
