"""What a VMM does with an embedded guest's memory to move it: rounds of copies from a dirty log."""

from __future__ import annotations

import abc
import ctypes
import mmap
import os
import struct
from collections.abc import Iterator, Mapping

from vring import LOG_PAGE, PackedDriver, layout
from vring_serial import EmbeddedGuest
from vring_serial.guest.memory import GuestRam
from vring_serial.guest.queue import DriverQueue
from vring_serial.proto.vhost_user import F_LOG_ALL

_MAP_FIXED = 0x10
_DESCRIPTOR = struct.Struct("<QI")  # of either layout: address, length
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    *[ctypes.c_int] * 3,
    ctypes.c_long,
]


class MovedMemory(abc.ABC):
    """The memory of a guest on its way to another file, as to another machine.

    What the device writes comes from its dirty log alone. What the guest itself writes its VMM
    knows: here, all but the buffers of its receive queues and the used rings of split ones.

    Args:
        ram, queues: the guest's, which goes on meanwhile.

    Attributes:
        copied: pages that were copied because the log said so.
    """

    def __init__(self, ram: GuestRam, queues: Mapping[int, DriverQueue]) -> None:
        self._ram = ram
        self._queues = queues
        self.copied = 0
        self._fd = os.memfd_create("moved", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, ram.size)
        self._old = mmap.mmap(ram.fd, ram.size)
        self._new = mmap.mmap(self._fd, ram.size)

    @abc.abstractmethod
    def _copy_last(self) -> None:
        """Copy what was marked since the last round, when nothing runs any more."""

    def finish(self) -> None:
        """Copy what is left while nothing runs, and let the guest have the new memory."""
        self._copy_last()
        start = 0
        for begin, end in sorted(self._written_by_the_device()):
            if start < begin:
                self._new[start:begin] = self._old[start:begin]
            start = max(start, end)
        self._new[start:] = self._old[start:]
        ram = self._ram
        view = ram.view(ram.guest_addr, ram.size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        got = _libc.mmap(address, ram.size, protection, mmap.MAP_SHARED | _MAP_FIXED, self._fd, 0)
        assert got == address
        os.close(ram.fd)
        ram.fd = os.dup(self._fd)

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._old.close()
        self._new.close()

    def _copy_marked(self, bits: bytes, first: int) -> None:
        """Copy pages; ``first`` is the number of the page at the start of memory."""
        for at, byte in enumerate(bits):
            for bit in range(8) if byte else ():
                if byte >> bit & 1:
                    start = (at * 8 + bit - first) * LOG_PAGE
                    assert start >= 0
                    self._new[start : start + LOG_PAGE] = self._old[start : start + LOG_PAGE]
                    self.copied += 1

    def _written_by_the_device(self) -> Iterator[tuple[int, int]]:
        """Where nobody but the device writes: offsets in memory, from and to."""
        base = self._ram.guest_addr
        for queue in self._queues.values():
            if not isinstance(queue.ring, PackedDriver):
                start = queue.used - base
                yield start, start + queue.ring.layout(queue.size)[2]
            if queue.index % 2:
                continue
            for slot in range(queue.size):
                at = queue.desc - base + slot * layout.DESC_SIZE
                address, _ = _DESCRIPTOR.unpack_from(self._old, at)
                if address:
                    assert address % LOG_PAGE == 0
                    yield address - base, address - base + LOG_PAGE


class Migration(MovedMemory):
    """The memory of an embedded guest, with logs that are given to its backend."""

    def __init__(self, guest: EmbeddedGuest) -> None:
        ram = guest.ram
        assert ram is not None
        super().__init__(ram, guest.queues)
        self._guest = guest
        self._log_size = (ram.guest_addr + ram.size) // LOG_PAGE // 8 + 1
        self._log = -1

    async def begin(self) -> None:
        """Have everything that is written from now on marked, and copy all."""
        await self._change_log()
        frontend = self._guest.frontend
        await frontend.set_features(self._guest.features | 1 << F_LOG_ALL)
        self._new[:] = self._old[:]

    async def round(self) -> None:
        """Copy what was marked since the last round."""
        marked = await self._change_log()
        self._copy(marked)

    async def cancel(self) -> None:
        """Have nothing marked any more."""
        await self._guest.frontend.set_features(self._guest.features)
        self.close()

    async def stop(self) -> dict[int, int]:
        """Stop the rings; where they are to go on."""
        return await self._guest.frontend.stop_queues(list(self._guest.queues))

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        super().close()
        if self._log >= 0:
            os.close(self._log)
        self._log = -1

    async def _change_log(self) -> int:
        """Give the backend a new log; the descriptor of the one before."""
        newer = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(newer, self._log_size)
        await self._guest.frontend.set_log(newer, self._log_size)
        older, self._log = self._log, newer
        return older

    def _copy_last(self) -> None:
        self._copy(self._log)

    def _copy(self, log: int) -> None:
        """Copy the pages that are marked in a log, which is closed."""
        first = self._ram.guest_addr // LOG_PAGE
        bits = os.pread(log, self._log_size, 0)
        os.close(log)
        if log == self._log:
            self._log = -1
        self._copy_marked(bits, first)
