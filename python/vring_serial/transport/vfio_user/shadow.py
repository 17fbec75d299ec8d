"""Rings in memory that only the client can access, served through copies of our own.

The device works on a *copy* of guest memory at the same guest addresses. When the driver notifies,
what it made available is fetched into the copy: ring entries, descriptors, and what they say that
the device may read. When the device has used buffers, what it wrote is stored in the guest's
memory, then the used ring, and when the client has said that this is done, the driver is told.

The device may be the pump's thread. Indices and event indices of the copy, which both sides use at
the same time, are single accesses in order (``GuestMemory.load16``, ``store16``). Of the guest's
ring, the index is read before what it makes available, in an access of its own: a client that
copied both at once could give a new index with an entry of the last round.

Memory of a copy is held only for chains between their fetch and their completion, and for the ring
itself; the rest is given back (see copies).

A copy may outlive the process (``Copy.kept``). The device then goes on in it as in guest memory
that is shared, with the record of the queue. What of it the guest has seen, its used index says,
which is written after all that it makes visible: a successor stores again what came after, and
pages are held until the index was answered.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial

from vring import GuestMemory, SplitDriver, SplitQueue, drain, need_event, notify
from vring import layout as ring
from vring.errors import AddressError, VringError
from vring_serial.device.kicks import KickWatch
from vring_serial.device.virtqueue import RunningQueue
from vring_serial.errors import RemoteProtocolError
from vring_serial.transport.vfio_user.copies import LARGE_BYTES, Held, LargeChains, Room
from vring_serial.transport.vfio_user.dma import DmaTable
from vring_serial.transport.vfio_user.remote import RemoteMemory
from vring_serial.unix_fds import close_all, make_eventfd

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_U16 = struct.Struct("<H")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1
#: Bytes that are asked for, or stored, at once.
FETCH_BYTES = 4 << 20

Segment = tuple[int, int]  # guest address and bytes


@dataclass(frozen=True, slots=True)
class ClientMemory:
    """What a client has mapped, and how to reach what it did not share.

    Attributes:
        dma: the regions that are mapped.
        remote: reads and writes by message what is not shared.
        large: bounds the large chains of all its queues.
    """

    dma: DmaTable
    remote: RemoteMemory
    large: LargeChains = field(default_factory=LargeChains)


@dataclass(slots=True)
class _Chain:
    """A chain as the device gets it.

    Attributes:
        copied: its descriptors and the indirect table: guest address, and bytes.
        readable: what the device may read, where only the client has it.
        writable: what the device may write: address, bytes, and where of that only the client has.
        held: the pages of all that.
    """

    copied: list[tuple[int, bytes]] = field(default_factory=list)
    readable: list[Segment] = field(default_factory=list)
    writable: list[tuple[int, int, list[Segment]]] = field(default_factory=list)
    held: Held = field(default_factory=Held)


@dataclass(frozen=True, slots=True)
class _Table:
    """An indirect table.

    Attributes:
        address, length: guest address, and bytes.
        remote: only the client has all of it.
    """

    address: int
    length: int
    remote: bool


class _Failure:
    """Tells once that the client's memory cannot be accessed, and holds nothing of a ring.

    Requests that are answered late keep it, and must not keep the client's memory mapped.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed: Callable[[Exception], None] | None = failed

    def tell(self, error: Exception) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            failed(error)

    def written(self, write: asyncio.Future[bytes]) -> None:
        error = write.exception()
        if isinstance(error, Exception):
            self.tell(error)

    def forget(self) -> None:
        """Report nothing any more."""
        self._failed = None


class ShadowRing:
    """Keeps the copy of one split ring and the guest's own in step, while the device serves it.

    Args:
        running: the queue over the copy, with the descriptors that the driver and the client know.
        client: the guest's memory. What of it is shared is not copied, but the ring may not be.
        failed: called once, when the guest's memory cannot be accessed.
        owed: what :meth:`stop` returned of the ring before this one.
        resumed: the copy is a predecessor's, with all that it and the device had begun.
        behind: the guest may not have all that the device used.
        settled: called, if it was behind, once all chains are known whose pages are needed.
        written: gets address and bytes of what the client has written at our request.

    Raises:
        RemoteProtocolError: the ring is packed, or a part of it is in shared memory.
    """

    def __init__(
        self,
        running: RunningQueue,
        client: ClientMemory,
        failed: Callable[[Exception], None],
        *,
        owed: bool = False,
        resumed: bool = False,
        behind: bool = False,
        settled: Callable[[], None] = lambda: None,
        written: Callable[[int, int], None] = lambda address, length: None,
    ) -> None:
        queue = running.queue
        if not isinstance(queue, SplitQueue):
            raise RemoteProtocolError(f"{queue.name}: a packed ring needs memory with a descriptor")
        self._loop = asyncio.get_running_loop()
        self._outer = running
        self._size = queue.size
        self._event_idx = queue.event_idx
        self._memory: GuestMemory = queue.memory
        self._descriptors, self._available, self._used = queue.rings
        self._available_event = self._used + ring.avail_event_offset(self._size)
        self._used_event = self._available + ring.used_event_offset(self._size)
        self._dma = client.dma
        self._remote = client.remote
        self._failure = _Failure(failed)
        self._owed = owed or resumed
        self._settled = settled
        self._written = written
        # Of the guest's ring: fetched, made available to the device, stored back, and told.
        self._fetched = self._offered = self._stored = self._told = queue.avail_index
        self._ring = self._hold_ring()
        self._kept = self._ring.kept
        self._behind = (resumed or behind) and self._kept
        self._started_at = queue.avail_index
        self._room = Room(client.large)
        self._chains: dict[int, _Chain] = {}  # by head: those that the device has
        self._answer: asyncio.Future[bytes] | None = None  # to the last used index
        self._kicked = asyncio.Event()
        self._kicked.set()
        self._telling: asyncio.Task[None] | None = None
        if resumed:
            self._go_on()
        else:
            self._begin()
        self.queue = RunningQueue(queue, make_eventfd(), make_eventfd())
        self._kicks = KickWatch(running.kick_fd, self._kicked.set)
        self._loop.add_reader(self.queue.call_fd, self._device_calls)
        self._fetching = self._loop.create_task(self._fetch_all())

    def _begin(self) -> None:
        """Let the copy begin with nothing available: flags, index, the event for the first use."""
        memory = self._memory
        memory.store16(self._available + ring.AVAIL_FLAGS, 0)
        memory.store16(self._available + ring.AVAIL_INDEX, self._fetched)
        memory.store16(self._used + ring.USED_FLAGS, 0)
        memory.store16(self._used + ring.USED_INDEX, self._stored)
        memory.store16(self._used_event, self._stored)

    def _go_on(self) -> None:
        """Take over what a predecessor had made available, and the device has not used yet."""
        memory = self._memory
        index = memory.load16(self._available + ring.AVAIL_INDEX)
        if (index - self._fetched & 0xFFFF) > self._size:
            return  # the device finds that
        for position in range(self._fetched, self._fetched + (index - self._fetched & 0xFFFF)):
            at = self._available + ring.AVAIL_RING + ring.AVAIL_ENTRY * (position % self._size)
            self._adopt(memory.load16(at))
        self._fetched = self._offered = index

    def _adopt(self, head: int) -> None:
        """Hold what is in the copy of a chain that was fetched by a predecessor."""
        if head in self._chains:
            raise RemoteProtocolError(
                f"{self._outer.queue.name}: descriptor {head} is in the copy twice"
            )
        table = self._memory.read(self._descriptors, ring.DESC_SIZE * self._size)
        steps = self._steps(head, table)
        try:
            asked = next(steps)
            while True:
                asked = steps.send(self._read_copy(asked.address, asked.length))
        except StopIteration as done:
            chain: _Chain = done.value
        self._room.take(chain.held.cost)
        chain.held.hold()
        self._chains[head] = chain

    @property
    def owed(self) -> bool:
        """Whether the driver is owed an interrupt for what was stored by now."""
        return self._owed or self._told != self._stored or self._telling is not None

    def stop(self) -> bool:
        """Store what the device used, and close; the device has left the queue.

        Returns whether the driver is owed an interrupt, which cannot be waited for here.
        """
        self._kicks.close()
        self._loop.remove_reader(self.queue.call_fd)
        self._fetching.cancel()
        # Its traceback refers to this object: a cycle would keep the memory until it is collected.
        del self._fetching
        self._store()
        self._failure.forget()
        owed = self.owed
        if self._telling is not None:
            self._telling.cancel()
        close_all([self.queue.kick_fd, self.queue.call_fd])
        for chain in self._chains.values():
            chain.held.release(free_them=not self._behind)
        self._chains.clear()
        release = partial(self._ring.release, free_them=not self._behind)
        if self._kept and self._answer is not None and not self._answer.done():
            self._answer.add_done_callback(lambda _: release())
        else:
            release()
        self._room.close()
        return owed

    @property
    def behind(self) -> bool:
        """Whether it is not known yet how much of what the device used the guest has seen."""
        return self._behind

    def _hold_ring(self) -> Held:
        held = Held()
        parts = SplitDriver.layout(self._size)
        for address, length in zip(self._outer.queue.rings, parts, strict=True):
            if sum(size for _, size in self._add_remote(held, address, length)) != length:
                name = self._outer.queue.name
                raise RemoteProtocolError(f"{name}: a part of its ring is in memory that is shared")
        held.hold()
        return held

    # --- from the driver to the device

    async def _fetch_all(self) -> None:
        try:
            if self._behind:
                await self._settle()
            if self._owed:
                # What was stored is there when something was read that was asked for later. A fetch
                # may wait for room, which there is when the driver has seen it.
                await self._read16(self._used + ring.USED_INDEX)
                self._owed = False
                notify(self._outer.call_fd)
            await self._fetch()
            while True:
                await self._kicked.wait()
                self._kicked.clear()
                while await self._fetch():
                    pass
        except (RemoteProtocolError, VringError, OSError) as error:
            self._failure.tell(error)

    async def _settle(self) -> None:
        """Store what the device used and the guest has not seen; it was read back to begin with."""
        index = await self._read16(self._used + ring.USED_INDEX)
        count = self._started_at - index & 0xFFFF
        if count <= self._size:  # of a driver that says anything else, nothing is known
            for position in range(index, index + count):
                head, _ = _USED.unpack(self._memory.read(self._used_at(position), ring.USED_ENTRY))
                self._adopt(head)
            self._stored = self._told = index
        self._behind = False
        self._store()
        self._told = self._stored  # the driver is interrupted in any case
        self._settled()
        if self._event_idx:
            self._write(self._available_event, _U16.pack(self._fetched))

    def _used_at(self, position: int) -> int:
        return self._used + ring.USED_RING + ring.USED_ENTRY * (position % self._size)

    async def _fetch(self) -> bool:
        """Fetch what the driver made available; return whether there was anything."""
        index = await self._read16(self._available + ring.AVAIL_INDEX)
        count = index - self._fetched & 0xFFFF
        if not count:
            return False
        if count > self._size:
            # That cannot be, which is the device's to find, and to tell.
            self._fetched = index
        else:
            entries_at = self._available + ring.AVAIL_RING
            asked = self._remote.read(entries_at, ring.AVAIL_ENTRY * self._size)
            table = await self._remote.read(self._descriptors, ring.DESC_SIZE * self._size)
            entries = await asked
            for _ in range(count):
                at = ring.AVAIL_ENTRY * (self._fetched % self._size)
                (head,) = _U16.unpack_from(entries, at)
                await self._fetch_chain(head, table)
        self._offer()
        if self._event_idx:
            self._write(self._available_event, _U16.pack(index))
        return True

    def _offer(self) -> None:
        """Make what was fetched available to the device."""
        if self._offered != self._fetched:
            self._offered = self._fetched
            self._memory.store16(self._available + ring.AVAIL_INDEX, self._fetched)
            notify(self.queue.kick_fd)

    async def _fetch_chain(self, head: int, table: bytes) -> None:
        """Fetch what the device may read; the device finds what is wrong with the chain."""
        name = self.queue.queue.name
        if head in self._chains:
            raise RemoteProtocolError(f"{name}: descriptor {head} is available, and in use already")
        chain = await self._walk(head, table)
        cost = chain.held.cost
        if cost > LARGE_BYTES:
            raise RemoteProtocolError(
                f"{name}: a chain of {cost} bytes, at most {LARGE_BYTES} are taken"
            )
        if not self._room.has(cost):
            self._offer()
            await self._room.wait_for(cost)
        self._room.take(cost)
        chain.held.hold()
        self._chains[head] = chain
        for at, data in chain.copied:
            self._memory.write(at, data)
        for address, length in chain.readable:
            for at, size in _pieces(address, length):
                self._memory.write(at, await self._remote.read(at, size))
        slot = self._available + ring.AVAIL_RING
        slot += ring.AVAIL_ENTRY * (self._fetched % self._size)
        self._memory.store16(slot, head)
        self._fetched = self._fetched + 1 & 0xFFFF

    async def _walk(self, head: int, table: bytes) -> _Chain:
        """Return what a chain's descriptors name, as far as they are valid."""
        steps = self._steps(head, table)
        try:
            asked = next(steps)
            while True:
                if asked.remote:
                    asked = steps.send(await self._remote.read(asked.address, asked.length))
                else:
                    asked = steps.send(self._read_copy(asked.address, asked.length))
        except StopIteration as done:
            chain: _Chain = done.value
            return chain

    def _read_copy(self, address: int, length: int) -> bytes | None:
        """Return bytes of guest memory as the device sees it; None if there are none."""
        try:
            return self._memory.read(address, length)
        except AddressError:
            return None

    def _steps(self, head: int, table: bytes) -> Generator[_Table, bytes | None, _Chain]:
        """Walk a chain: yield which indirect table is needed, take it, return what was named.

        What is sent is None if the table is in no memory.
        """
        chain = _Chain()
        at = head
        seen = 0
        indirect = False
        while ring.DESC_SIZE * (at + 1) <= len(table) and seen < self._size:
            seen += 1
            entry = table[ring.DESC_SIZE * at : ring.DESC_SIZE * (at + 1)]
            address, length, flags, following = _DESCRIPTOR.unpack(entry)
            if not indirect:
                chain.copied.append((self._descriptors + ring.DESC_SIZE * at, entry))
            if not flags & _INDIRECT:
                parts = self._add_remote(chain.held, address, length)
                if flags & _WRITE:
                    chain.writable.append((address, length, parts))
                else:
                    chain.readable += parts
                if not flags & _NEXT:
                    break
                at = following
                continue
            if indirect or length % ring.DESC_SIZE or length > ring.DESC_SIZE * self._size:
                break
            parts = self._add_remote(chain.held, address, length)
            entries = yield _Table(address, length, bool(parts))
            if entries is None:
                break
            table = entries
            for start, size in parts:
                chain.copied.append((start, table[start - address : start - address + size]))
            indirect = True
            at = 0
        return chain

    def _add_remote(self, held: Held, address: int, length: int) -> list[Segment]:
        """Return the parts of a range that only the client has, and add their pages to ``held``.

        Those that there is no copy of are not in guest memory, and the device will find that.
        """
        found: list[Segment] = []
        for start, size, copy in self._dma.remote_parts(address, length):
            if copy is not None:
                held.add(copy, start, size)
                found.append((start, size))
        return found

    # --- from the device to the driver

    def _device_calls(self) -> None:
        drain(self.queue.call_fd)
        if self._store() and self._telling is None:
            self._telling = self._loop.create_task(self._tell())

    def _store(self) -> bool:
        """Send what the device used; return whether there was anything."""
        any_stored = False
        while not self._behind:
            index = self._memory.load16(self._used + ring.USED_INDEX)
            count = index - self._stored & 0xFFFF
            if not count or count > self._size:
                return any_stored
            any_stored = True
            stored: list[_Chain] = []
            for position in range(self._stored, self._stored + count):
                at = self._used_at(position)
                entry = self._memory.read(at, ring.USED_ENTRY)
                head, written = _USED.unpack(entry)
                self._store_chain(head, written, stored)
                self._write(at, entry)
            self._answer = self._write(self._used + ring.USED_INDEX, _U16.pack(index))
            if stored:
                self._answer.add_done_callback(partial(_give_back, self._room, stored))
            self._stored = index
            # Asked before the index is looked at again: the device tells of what comes later.
            self._memory.store16(self._used_event, index)
        return any_stored

    def _store_chain(self, head: int, written: int, stored: list[_Chain]) -> None:
        """Store what the device wrote; a chain whose pages are needed longer goes to ``stored``."""
        chain = self._chains.pop(head, None)
        if chain is None:
            return
        last: asyncio.Future[bytes] | None = None
        for address, length, parts in chain.writable:
            end = address + min(length, written)
            written -= end - address
            for start, size in parts:
                for at, piece in _pieces(start, min(size, end - start)):
                    last = self._write(at, self._memory.read(at, piece))
        if self._kept:
            stored.append(chain)
            return
        chain.held.release()
        give = partial(self._room.give, chain.held.cost)
        if last is None:
            give()
        else:
            # What was read of the copy waits in its place until the client has it.
            last.add_done_callback(lambda _: give())

    def _write(self, address: int, data: bytes) -> asyncio.Future[bytes]:
        done = self._remote.write(address, data)
        done.add_done_callback(self._failure.written)
        written, length = self._written, len(data)
        done.add_done_callback(lambda _: written(address, length))
        return done

    async def _tell(self) -> None:
        """Interrupt the driver if it wants that, once it can see what was used."""
        try:
            while self._told != self._stored:
                before, now = self._told, self._stored
                self._told = now
                if await self._wanted(now, before):
                    notify(self._outer.call_fd)
        except (RemoteProtocolError, OSError) as error:
            self._failure.tell(error)
        finally:
            self._telling = None

    async def _wanted(self, now: int, before: int) -> bool:
        # Reads come after the writes before them.
        if self._event_idx:
            return need_event(await self._read16(self._used_event), now, before)
        return not await self._read16(self._available + ring.AVAIL_FLAGS) & _NO_INTERRUPT

    async def _read16(self, address: int) -> int:
        """Read a 16-bit number of the guest's ring."""
        return int.from_bytes(await self._remote.read(address, 2), "little")


def _give_back(room: Room, chains: list[_Chain], _: asyncio.Future[bytes]) -> None:
    """Free the pages of chains that the client has."""
    for chain in chains:
        cost = chain.held.cost
        chain.held.release()
        room.give(cost)


def _pieces(address: int, length: int) -> Iterator[Segment]:
    for at in range(address, address + length, FETCH_BYTES):
        yield at, min(FETCH_BYTES, address + length - at)
