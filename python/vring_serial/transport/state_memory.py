"""Memory with a device's state on its way to or from another server; it outlives the process."""

from __future__ import annotations

import fcntl
import os

from vring_serial.errors import StateError

#: Largest state in bytes, either way.
MAX_STATE = 16 << 20

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def make_memory(size: int, content: bytes = b"") -> int:
    """Return the descriptor of new memory that can neither shrink nor grow, the caller's.

    Memory with content is read-only. Raises OSError without memory.
    """
    fd = os.memfd_create("vring-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        write_at(fd, content, 0)
        seals = _FIXED_SIZE | fcntl.F_SEAL_SEAL | (fcntl.F_SEAL_WRITE if content else 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_at(fd: int, content: bytes, offset: int) -> None:
    """Write all of ``content`` there. Raises OSError without memory."""
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written:], offset + written)


def check_memory(fd: int, size: int) -> None:
    """Make sure that what a predecessor of this process left is such memory, of ``size`` bytes.

    Raises StateError: another descriptor could be cut off, or be no file at all.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & _FIXED_SIZE != _FIXED_SIZE:
        raise StateError("the memory of a device state is another descriptor")
    if (there := os.fstat(fd).st_size) < size:
        raise StateError(f"the memory of a device state has {there} bytes, not {size}")
