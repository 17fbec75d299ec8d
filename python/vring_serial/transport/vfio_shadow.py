"""Rings in memory that only the client can access, served through copies of our own.

The device works on a *copy* of guest memory at the same guest addresses. When the driver notifies,
what it made available is fetched into the copy: ring entries, descriptors, and what they say that
the device may read. When the device has used buffers, what it wrote is stored in the guest's
memory, then the used ring, and when the client has said that this is done, the driver is told.

The device may be the pump's thread. Indices and event indices of the copy, which both sides use at
the same time, are single accesses in order (``GuestMemory.load16``, ``store16``). Of the guest's
ring, the index is read before what it makes available, in an access of its own: a client that
copied both at once could give a new index with an entry of the last round.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress

from vring import GuestMemory, SplitQueue, drain, need_event, notify
from vring.errors import AddressError
from vring_serial.device.kicks import KickWatch
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import ProtocolError
from vring_serial.transport.event_fds import make_eventfd
from vring_serial.transport.vfio_remote import RemoteMemory
from vring_serial.unix_fds import close_all

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_U16 = struct.Struct("<H")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1
#: Bytes that are asked for, or stored, at once.
FETCH_BYTES = 4 << 20
#: Bytes that the device may be given with one chain.
CHAIN_BYTES = 64 << 20

Segment = tuple[int, int]  # guest address and bytes


class ShadowRing:
    """Keeps the copy of one split ring and the guest's own in step, while the device serves it.

    Args:
        running: the queue over the copy, with the descriptors that the driver and the client know.
        remote: the guest's memory.
        is_remote: whether an address is in such memory; what is not is shared, and is not copied.
        failed: called once, when the guest's memory cannot be accessed.
        owed: what :meth:`stop` returned of the ring before this one.
    """

    def __init__(
        self,
        running: RunningQueue,
        remote: RemoteMemory,
        is_remote: Callable[[int], bool],
        failed: Callable[[Exception], None],
        *,
        owed: bool = False,
    ) -> None:
        queue = running.queue
        if not isinstance(queue, SplitQueue):
            raise ProtocolError(f"{queue.name}: a packed ring needs memory with a descriptor")
        self._loop = asyncio.get_running_loop()
        self._outer = running
        self._size = queue.size
        self._event_idx = queue.event_idx
        self._memory: GuestMemory = queue.memory
        self._descriptors, self._available, self._used = queue.rings
        self._remote = remote
        self._is_remote = is_remote
        self._failed = failed
        self._owed = owed
        self._fetched = self._stored = self._told = queue.avail_index
        self._writable: dict[int, list[Segment]] = {}  # by head: what the device may write
        self._kicked = asyncio.Event()
        self._kicked.set()
        self._telling: asyncio.Task[None] | None = None
        # The copy begins with nothing available: flags, index, and the event for the first use.
        memory = self._memory
        self._available_event = self._used + 4 + 8 * self._size
        self._used_event = self._available + 4 + 2 * self._size
        memory.store16(self._available, 0)
        memory.store16(self._available + 2, self._fetched)
        memory.store16(self._used, 0)
        memory.store16(self._used + 2, self._stored)
        memory.store16(self._used_event, self._stored)
        self.queue = RunningQueue(queue, make_eventfd(), make_eventfd())
        self._kicks = KickWatch(running.kick_fd, self._kicked.set)
        self._loop.add_reader(self.queue.call_fd, self._device_calls)
        self._fetching = self._loop.create_task(self._fetch_all())

    def stop(self) -> bool:
        """The device has left the queue: store what it used, and close.

        Returns whether the driver is owed an interrupt, which cannot be waited for here.
        """
        self._kicks.close()
        self._loop.remove_reader(self.queue.call_fd)
        self._fetching.cancel()
        # Its traceback refers to this object: a cycle would keep the memory until it is collected.
        del self._fetching
        self._store()
        owed = self._owed or self._told != self._stored or self._telling is not None
        if self._telling is not None:
            self._telling.cancel()
        close_all([self.queue.kick_fd, self.queue.call_fd])
        return owed

    # --- from the driver to the device

    async def _fetch_all(self) -> None:
        try:
            await self._fetch()
            if self._owed:
                # What was stored then is there now, since it came before what was read.
                self._owed = False
                notify(self._outer.call_fd)
            while True:
                await self._kicked.wait()
                self._kicked.clear()
                while await self._fetch():
                    pass
        except (ProtocolError, OSError) as error:
            self._failed(error)

    async def _fetch(self) -> bool:
        """Bring what the driver made available; whether there was anything."""
        index = await self._read16(self._available + 2)
        count = index - self._fetched & 0xFFFF
        if not count:
            return False
        if count <= self._size:
            entries = await self._remote.read(self._available + 4, 2 * self._size)
            table = await self._remote.read(self._descriptors, 16 * self._size)
            self._memory.write(self._descriptors, table)
            self._memory.write(self._available + 4, entries)
            for position in range(self._fetched, self._fetched + count):
                (head,) = _U16.unpack_from(entries, 2 * (position % self._size))
                await self._fetch_chain(head, table)
        # An index that cannot be is the device's to find, and to tell.
        self._fetched = index
        self._memory.store16(self._available + 2, index)
        notify(self.queue.kick_fd)
        if self._event_idx:
            self._remote.write(self._available_event, _U16.pack(index))
        return True

    async def _read16(self, address: int) -> int:
        """A number of the guest's ring."""
        return int.from_bytes(await self._remote.read(address, 2), "little")

    async def _fetch_chain(self, head: int, table: bytes) -> None:
        """Bring what the device may read; what is wrong with the chain is the device's to find."""
        left = CHAIN_BYTES
        writable: list[Segment] = []
        for address, length, flags in await self._walk(head, table):
            if not self._is_remote(address):
                continue
            if flags & _WRITE:
                writable.append((address, length))
                continue
            left -= length
            if left < 0:
                raise ProtocolError(f"{self.queue.queue.name}: a chain of over {CHAIN_BYTES} bytes")
            for at in range(address, address + length, FETCH_BYTES):
                size = min(FETCH_BYTES, address + length - at)
                with suppress(AddressError):
                    self._memory.read(at, 1)  # before asking for what cannot be kept
                    self._memory.write(at, await self._remote.read(at, size))
        self._writable[head] = writable

    async def _walk(self, head: int, table: bytes) -> list[tuple[int, int, int]]:
        """Address, length and flags of a chain's descriptors, as far as they make sense."""
        found: list[tuple[int, int, int]] = []
        at = head
        indirect = False
        while 16 * at < len(table) and len(found) < self._size:
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * at)
            if not flags & _INDIRECT:
                found.append((address, length, flags))
                if not flags & _NEXT:
                    break
                at = following
                continue
            if indirect or length % 16 or length > 16 * self._size:
                break
            try:
                table = await self._table(address, length)
            except AddressError:
                break
            indirect = True
            at = 0
        return found

    async def _table(self, address: int, length: int) -> bytes:
        """An indirect table. Raises AddressError if the copy has no place for it."""
        if not self._is_remote(address):
            return self._memory.read(address, length)
        self._memory.read(address, length)
        table = await self._remote.read(address, length)
        self._memory.write(address, table)
        return table

    # --- from the device to the driver

    def _device_calls(self) -> None:
        drain(self.queue.call_fd)
        if self._store() and self._telling is None:
            self._telling = self._loop.create_task(self._tell())

    def _store(self) -> bool:
        """Send what the device used; whether there was anything."""
        any_stored = False
        while True:
            index = self._memory.load16(self._used + 2)
            count = index - self._stored & 0xFFFF
            # Asked before the index is looked at again: the device tells of what comes later.
            self._memory.store16(self._used_event, index)
            if not count or count > self._size:
                return any_stored
            any_stored = True
            for position in range(self._stored, self._stored + count):
                at = self._used + 4 + 8 * (position % self._size)
                entry = self._memory.read(at, 8)
                head, written = _USED.unpack(entry)
                self._store_chain(head, written)
                self._remote.write(at, entry)
            self._remote.write(self._used + 2, _U16.pack(index))
            self._stored = index

    def _store_chain(self, head: int, written: int) -> None:
        for address, length in self._writable.pop(head, ()):
            size = min(length, written)
            written -= size
            for at in range(address, address + size, FETCH_BYTES):
                piece = min(FETCH_BYTES, address + size - at)
                self._remote.write(at, self._memory.read(at, piece))

    async def _tell(self) -> None:
        """Interrupt the driver if it wants that, once it can see what was used."""
        try:
            while self._told != self._stored:
                before, now = self._told, self._stored
                self._told = now
                if await self._wanted(now, before):
                    notify(self._outer.call_fd)
        except (ProtocolError, OSError) as error:
            self._failed(error)
        finally:
            self._telling = None

    async def _wanted(self, now: int, before: int) -> bool:
        # Reads come after the writes before them.
        if self._event_idx:
            return need_event(await self._read16(self._used_event), now, before)
        return not await self._read16(self._available) & _NO_INTERRUPT
