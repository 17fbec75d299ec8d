"""The device's side of virtqueues in hostile guest memory (virtio 1.3, 2.7)."""

from __future__ import annotations

cimport cython
from cpython.object cimport PyObject

from vring._chains cimport (
    FAULT_ADDRESS, FAULT_AVAIL_INDEX, FAULT_FULL, FAULT_HEAD, FAULT_INDIRECT_ADDRESS,
    FAULT_INDIRECT_FEATURE, FAULT_INDIRECT_NESTED, FAULT_INDIRECT_NEXT, FAULT_INDIRECT_SIZE,
    FAULT_NEXT, FAULT_NONE, FAULT_ORDER, FAULT_TOO_LONG, FAULT_TOO_MANY_BYTES,
    FAULT_TOO_MANY_SEGMENTS, vr_add_buffer, vr_check_table, vr_end_chain, vr_end_readable,
    vr_room, vr_single, vr_start_chain
)
from vring._memory cimport VR_HINTS, vr_find, vr_lookup, vr_region
from vring._wire cimport (
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, QUEUE_SIZE_MAX,
    USED_F_NO_NOTIFY, vr_fence, vr_follow, vr_likely, vr_load16, vr_load16_acquire, vr_need_event,
    vr_read_desc, vr_store16, vr_store16_release, vr_unlikely, vr_write_used
)
from vring.errors import (
    AddressError, AvailableIndexError, BufferAddressError, ChainError, ChainOrderError,
    DescriptorFlagsError, HeadError, IndirectError, LocalMisuseError
)

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject* o)

cdef enum:
    # Segments of a batch: enough for most queues, and small enough to stay in the first cache.
    BATCH_SEGMENTS = 1024
    CHAIN_SEGMENTS = 16

_FAULTS = {
    FAULT_AVAIL_INDEX: (AvailableIndexError, "the driver made more available than the queue has"),
    FAULT_HEAD: (HeadError, "the available ring names a head outside the descriptor table"),
    FAULT_NEXT: (ChainError, "next names a descriptor outside its table"),
    FAULT_TOO_LONG: (ChainError, "the chain loops or has more descriptors than the queue"),
    FAULT_TOO_MANY_BYTES: (ChainError, "the chain has more than 2**32 - 1 bytes"),
    FAULT_TOO_MANY_SEGMENTS: (ChainError, "the chain has more segments than the device takes"),
    FAULT_ORDER: (ChainOrderError, "a device-readable descriptor after a device-writable one"),
    FAULT_INDIRECT_FEATURE: (DescriptorFlagsError, "INDIRECT, but the feature is not negotiated"),
    FAULT_INDIRECT_NESTED: (IndirectError, "INDIRECT inside an indirect table"),
    FAULT_INDIRECT_NEXT: (IndirectError, "INDIRECT and NEXT in one descriptor"),
    FAULT_INDIRECT_SIZE: (IndirectError, "the length of an indirect table is 0 or not 16 * n"),
    FAULT_INDIRECT_ADDRESS: (IndirectError, "an indirect table outside guest memory"),
    FAULT_ADDRESS: (BufferAddressError, "a buffer outside guest memory"),
}


cdef bint read_scattered(const vr_map* memory, uint64_t address, uint8_t* entry) noexcept nogil:
    """One descriptor of an indirect table that crosses region borders, byte by byte, once each."""
    cdef const vr_region* region
    cdef int i
    for i in range(DESC_SIZE):
        region = vr_find(memory, address + i)
        if region == NULL or address + i < address:
            return False
        entry[i] = (<volatile uint8_t*>region.host)[address + i - region.guest]
    return True


cdef class VirtQueue:
    """What the layouts of rings have in common. Made as SplitQueue (or another subclass).

    One thread at a time may use a queue; objects it gave out count as using it.
    """

    def __init__(self, *args, **kwargs):
        if type(self) is VirtQueue:
            raise TypeError("VirtQueue is abstract: make a SplitQueue or a PackedQueue")

    # --- what a layout implements

    cdef int pop_within(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments,
        uint64_t max_bytes
    ) noexcept nogil:
        return 0

    cdef bint push_c(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil:
        return False

    cdef void unpop_c(self, uint32_t n) noexcept nogil:
        pass

    cdef bint enable_notifications_c(self) noexcept nogil:
        return False

    cdef bint enable_notifications_after_c(self, uint16_t n) noexcept nogil:
        return self.enable_notifications_c()

    cdef void disable_notifications_c(self) noexcept nogil:
        pass

    cdef uint32_t available_c(self) noexcept nogil:
        return 0

    cdef int locate_rings(self, GuestMemory memory) except -1:
        return 0

    cdef void restart(self) noexcept:
        pass

    @property
    def avail_index(self):
        """The next available index to pop."""
        raise NotImplementedError

    @property
    def used_index(self):
        """The next used index to publish."""
        raise NotImplementedError

    # --- common to all

    cdef uint8_t* locate(
        self, GuestMemory memory, uint64_t address, uint64_t length, uint64_t align, str what
    ) except NULL:
        """Where a part of the ring lies in this process. Raises AddressError, naming the part."""
        cdef uint8_t* host
        what = f"{self.name}: {what}"
        if address % align:
            raise AddressError(address, length, f"{what} is not aligned to {align} bytes")
        try:
            host = memory.locate(address, length)
        except AddressError as error:
            raise AddressError(address, length, f"{what} is not in one region") from error
        if <size_t>host % align:
            raise AddressError(address, length, f"{what}: its region's buffer is not aligned")
        return host

    cdef int pop_c(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments
    ) noexcept nogil:
        cdef int n = self.pop_within(
            chains, max_chains, segments, max_segments, <uint64_t>-1
        )
        if n == VR_TOO_SMALL:
            return self.fail(FAULT_TOO_MANY_SEGMENTS, self.popped & 0xFFFF, 0, 0)
        return n

    cdef int fail(
        self, int code, uint32_t index, uint64_t address, uint64_t length
    ) noexcept nogil:
        self.fault.code = code
        self.fault.index = index
        self.fault.address = address
        self.fault.length = length
        return VR_BROKEN

    cdef int chain_fault(
        self, int code, uint32_t at, uint64_t address, uint64_t length
    ) noexcept nogil:
        """What a walk that ended with a fault at descriptor `at` means for the queue."""
        if code == FAULT_FULL:
            return VR_TOO_SMALL
        if code == FAULT_ADDRESS or code == FAULT_INDIRECT_SIZE or code == FAULT_INDIRECT_ADDRESS:
            return self.fail(code, at, address, length)
        return self.fail(code, at, 0, 0)

    cdef object make_fault(self):
        kind, cause = _FAULTS[self.fault.code]
        if self.fault.length:
            cause = f"{cause}: {self.fault.address:#x}, {self.fault.length:#x} bytes"
        return kind(self.name, self.fault.index, cause)

    cdef int raise_broken(self) except -1:
        raise self.make_fault()

    cdef Batch take_batch(self):
        """A batch that nobody refers to any more, or a new one."""
        cdef Batch batch = self._older_batch
        self._older_batch = self._spare_batch
        # referred to by `batch` alone
        if batch is None or Py_REFCNT(<PyObject*>batch) != 1:
            batch = Batch.make(self.size, max(self.size, <uint32_t>BATCH_SEGMENTS))
        self._spare_batch = batch
        batch.viewed_first = batch.viewed = None
        return batch

    cdef Chain take_chain(self):
        cdef Chain chain = self._older_chain
        self._older_chain = self._spare_chain
        if chain is None or Py_REFCNT(<PyObject*>chain) != 1 or (
            Py_REFCNT(<PyObject*>chain.batch) != 1
        ):
            chain = Chain.__new__(Chain)
            chain.batch = Batch.make(1, CHAIN_SEGMENTS)
        self._spare_chain = chain
        chain.written = 0
        chain._readable = chain._writable = None
        chain.batch.viewed_first = chain.batch.viewed = None
        return chain

    cdef int fill(self, Batch batch, uint32_t limit, uint64_t max_bytes) except -1:
        """Pops into a batch; the number of chains."""
        cdef int n
        while True:
            n = self.pop_within(
                batch.chains, limit, batch.segments, batch.max_segments, max_bytes
            )
            if n != VR_TOO_SMALL:
                break
            batch.grow()
        if n < 0:
            self.raise_broken()
        batch.start = 0
        batch.count = n
        batch.first = self.popped - n
        batch.epoch = self.epoch
        batch.owner = self if n else None
        batch.memory = self._memory if n else None
        return n

    def pop_many(self, Py_ssize_t limit=0, Py_ssize_t max_bytes=0):
        """Takes chains that the driver made available, in its order.

        Args:
            limit: at most so many chains; 0: as many as there are. The batch also ends where its
                segment table (of 1024 segments, or the queue's size) is full, so there may be more.
            max_bytes: end before the chains hold more bytes (readable and writable) than this; the
                first chain is taken whatever it holds. 0: no such end.

        Returns:
            The batch; empty (and false) if nothing is available.

        Raises:
            RingError: the driver broke the ring. The chains before the broken one are delivered
                first; later calls raise again.
        """
        if limit < 0 or max_bytes < 0:
            raise LocalMisuseError(f"limit {limit}, max_bytes {max_bytes}: below 0")
        cdef Batch batch = self.take_batch()
        cdef uint32_t most = self.size if limit == 0 or limit > self.size else <uint32_t>limit
        self.fill(batch, most, <uint64_t>max_bytes if max_bytes else <uint64_t>-1)
        return batch

    def push_many(self, Batch batch not None, written=None, count=None):
        """Completes a batch, or its first `count` chains, and publishes them at once.

        Args:
            batch: from this queue's pop_many. It keeps the chains that are not completed.
            written: bytes stored from the start of each device-writable part: one number per
                chain completed (fastest as an uint32 array), or one for all, or None for none.
            count: how many; default all.

        Returns:
            Whether the driver wants a notification now.

        Raises:
            LocalMisuseError: the batch is completed or another queue's; more written than there is
                room; memoryviews of its chains are in use; not the oldest chains, with IN_ORDER.
        """
        self.check_mine(batch)
        cdef uint32_t n = batch.count - batch.start
        if count is not None:
            if not 0 <= count <= n:
                raise LocalMisuseError(f"{count} chains to complete, the batch has {n}")
            n = count
        if n == 0:
            return False
        self.check_order(batch.first + batch.start)
        cdef const uint32_t* lengths = NULL
        if written is not None:
            batch.take_written(written, n)
            lengths = batch.written
        batch.withdraw_views(batch.start + n)
        cdef bint notify = self.push_c(batch.chains + batch.start, lengths, n)
        batch.finish(n)
        return notify

    def unpop(self, Batch batch not None):
        """Gives back what is not completed of the most recent batch: it will be popped again.

        Raises:
            LocalMisuseError: not the most recent batch of this queue, or views of it are in use.
        """
        self.check_mine(batch)
        if batch.first + batch.count != self.popped:
            raise LocalMisuseError(f"{self.name}: chains were popped after this batch")
        batch.withdraw_views(batch.count)
        self.unpop_c(batch.count - batch.start)
        batch.count = batch.start
        batch.finish(0)

    cdef int check_mine(self, Batch batch) except -1:
        if batch.owner is not self:
            if batch.owner is None and batch.count == batch.start:
                if batch.count == 0:
                    return 0
                raise LocalMisuseError(f"{self.name}: the chains are completed or given back")
            raise LocalMisuseError(f"{self.name}: the chains are another queue's")
        if batch.epoch != self.epoch:
            raise LocalMisuseError(f"{self.name}: the queue was reset after the chains were popped")
        return 0

    cdef int check_order(self, uint64_t first) except -1:
        if self.in_order and first != self.pushed:
            raise LocalMisuseError(f"{self.name}: IN_ORDER, but older chains are not completed")
        return 0

    cdef Chain pop_one(self):
        cdef Chain chain = self.take_chain()
        if self.fill(chain.batch, 1, <uint64_t>-1) == 0:
            return None
        return chain

    cdef bint push_one(self, Chain chain, object written) except -1:
        cdef Batch batch = chain.batch
        cdef uint32_t length
        self.check_mine(batch)
        if chain.index != batch.start:
            chain.row()
            raise LocalMisuseError(f"{self.name}: complete the earlier chains of its batch first")
        if written is None:
            length = chain.written
        elif 0 <= written <= batch.chains[chain.index].writable_bytes:
            length = written
        else:
            raise LocalMisuseError(
                f"{written} bytes written, "
                f"but the chain has room for {batch.chains[chain.index].writable_bytes}"
            )
        self.check_order(batch.first + batch.start)
        batch.withdraw_views(chain.index + 1)
        cdef bint notify = self.push_c(&batch.chains[chain.index], &length, 1)
        batch.finish(1)
        return notify

    def pop(self):
        """The next chain the driver made available, or None. Raises RingError."""
        return self.pop_one()

    def push(self, Chain chain not None, written=None):
        """Completes a chain; whether the driver wants a notification.

        Args:
            chain: from pop, or the first not completed one of a batch.
            written: bytes stored from the start of its device-writable part; default: what
                ``chain.write`` stored.

        Raises:
            LocalMisuseError: as push_many.
        """
        return self.push_one(chain, written)

    def __iter__(self):
        """Pops until nothing is available, completing each chain when the next is asked for.

        A chain is completed with the bytes ``chain.write`` stored, unless the loop's body completed
        it itself. One that the loop was left with (break, an exception) stays in flight. Whether
        the driver wants a notification is gathered for take_notification.
        """
        cdef _QueueIterator iterator = _QueueIterator.__new__(_QueueIterator)
        iterator.queue = self
        return iterator

    def take_notification(self):
        """Whether chains completed by iteration make the driver want a notification; clears it."""
        cdef bint due = self.notification_due
        self.notification_due = False
        return due

    def enable_notifications(self):
        """Asks the driver to kick at the next chain (2.7.10).

        Returns:
            True if chains are available already: no kick may come for those, so go on popping.
        """
        return self.enable_notifications_c()

    def disable_notifications(self):
        """Tells the driver that kicks are not needed; it may still send some."""
        self.disable_notifications_c()

    def available(self):
        """How many chains can be popped now (packed: 1 stands for at least one)."""
        return self.available_c()

    @property
    def vring_base(self):
        """What GET_VRING_BASE answers when nothing is in flight (vhost-user).

        Split: the available index. Packed: available index and wrap counter in bits 0 to 15, the
        used ones in bits 16 to 31.
        """
        return self.avail_index

    def reset(self):
        """Starts the ring anew (RING_RESET, 2.6.1): first indices, nothing in flight, not broken.

        Chains in flight are forgotten: the driver takes all its buffers back, and completing one
        raises LocalMisuseError.
        """
        self.epoch += 1
        self.popped = self.pushed = 0
        self.fault.code = FAULT_NONE
        self.notification_due = False
        self.restart()

    @property
    def in_flight(self):
        """Chains popped and neither completed nor given back."""
        return self.popped - self.pushed

    @property
    def broken(self):
        """The RingError of a ring that the driver broke, else None."""
        return None if self.fault.code == FAULT_NONE else self.make_fault()

    @property
    def rings(self):
        """Guest addresses of descriptor area, driver area and device area (2.6)."""
        return self._rings

    @property
    def memory(self):
        """The guest memory the queue works in. Setting it moves the queue to a new region table;
        chains in flight keep the old one. Not while another thread uses the queue.

        Raises:
            AddressError: on setting, when a ring is not in the new memory.
        """
        return self._memory

    @memory.setter
    def memory(self, GuestMemory memory not None):
        self.locate_rings(memory)
        self._memory = memory
        self.map = memory.map
        for i in range(VR_HINTS):
            self.hints[i] = 0


@cython.final
cdef class _QueueIterator:
    """Iterator over a queue: completes the chain before when the next is asked for."""

    cdef VirtQueue queue
    cdef Chain last

    def __iter__(self):
        return self

    def __next__(self):
        cdef Chain chain = self.last
        if chain is not None:
            self.last = None
            if chain.batch.owner is self.queue:
                self.queue.notification_due |= self.queue.push_one(chain, None)
            chain = None
        chain = self.queue.pop_one()
        if chain is None:
            raise StopIteration
        self.last = chain
        return chain


cdef inline int walk_table(
    vr_room* room, vr_walk* walk, vr_chain* chain, const uint8_t* table, uint32_t entries
) noexcept nogil:
    """Takes the buffers of a chain from entry walk.at of a descriptor table on.

    Ends after the last descriptor, at one that names an indirect table, or at a fault; walk.at and
    walk.desc tell where. Returns a vr_fault_code.
    """
    cdef int code
    while True:
        walk.desc = vr_read_desc(table + <size_t>walk.at * DESC_SIZE)
        if (walk.desc.flags & (DESC_F_WRITE | DESC_F_INDIRECT)) != walk.writable:
            if walk.desc.flags & DESC_F_INDIRECT:
                return FAULT_NONE
            if vr_unlikely(walk.writable):
                return FAULT_ORDER
            walk.writable = DESC_F_WRITE
            vr_end_readable(room, walk, chain)
        code = vr_add_buffer(room, walk, chain)
        if vr_unlikely(code) or not walk.desc.flags & DESC_F_NEXT:
            return code
        if vr_unlikely(walk.desc.next >= entries):
            return FAULT_NEXT
        walk.at = vr_follow(walk.at, walk.desc.next)


cdef int walk_scattered(
    vr_room* room, vr_walk* walk, vr_chain* chain, uint64_t table, uint32_t entries
) noexcept nogil:
    """Like walk_table, for an indirect table that crosses region borders: entry by entry."""
    cdef uint8_t[DESC_SIZE] entry
    cdef uint32_t at = 0
    cdef int code
    while True:
        if not read_scattered(room.memory, table + at * DESC_SIZE, entry):
            walk.desc.addr = table
            walk.desc.len = entries * DESC_SIZE
            return FAULT_INDIRECT_ADDRESS
        walk.at = 0
        code = walk_table(room, walk, chain, entry, 0)
        walk.at = at
        # A table of no entries makes every `next` a fault.
        if code != FAULT_NEXT or walk.desc.next >= entries:
            return code
        at = walk.desc.next


cdef inline int walk_indirect(
    vr_room* room, vr_walk* walk, vr_chain* chain, bint negotiated
) noexcept nogil:
    """Goes on in the indirect table that walk.desc names. Returns a vr_fault_code."""
    cdef uint64_t table = walk.desc.addr, offset
    cdef uint32_t length = walk.desc.len
    cdef const vr_region* region
    cdef vr_walk copy
    cdef int code = vr_check_table(negotiated, walk.desc.flags, length)
    if vr_unlikely(code):
        return code
    region = walk.near
    offset = table - region.guest
    if offset >= region.size:
        region = vr_lookup(room.memory, room.hints, table)
        if vr_unlikely(region == NULL):
            return FAULT_INDIRECT_ADDRESS
        offset = table - region.guest
    walk.at = 0
    if vr_likely(length <= region.size - offset):
        code = walk_table(room, walk, chain, region.host + offset, length // DESC_SIZE)
    else:
        copy = walk[0]
        code = walk_scattered(room, &copy, chain, table, length // DESC_SIZE)
        walk[0] = copy
    if vr_unlikely(walk.desc.flags & DESC_F_INDIRECT and not code):
        return FAULT_INDIRECT_NESTED
    return code


cdef uint32_t pop_singles(
    const uint8_t* heads, const uint8_t* table, uint16_t index, uint32_t ready, vr_chain* chains,
    const vr_room* room, iovec* segments
) noexcept nogil:
    """Pops one-descriptor chains, the most common, up to the first of another kind; how many.

    What is unusual about a chain or wrong with it is left to the loop over all kinds.
    """
    cdef const vr_region* near = room.memory.regions
    cdef vr_entry desc
    cdef uint64_t offset
    cdef uint32_t i, at, size = room.size
    for i in range(ready):
        at = vr_load16(heads + 2 * <size_t>((index + i) & (size - 1)))
        if vr_unlikely(at >= size):
            return i
        desc = vr_read_desc(table + <size_t>at * DESC_SIZE)
        if desc.flags & (DESC_F_NEXT | DESC_F_INDIRECT):
            return i
        offset = desc.addr - near.guest
        if offset >= near.size:
            near = vr_lookup(room.memory, room.hints, desc.addr)
            if vr_unlikely(near == NULL):
                return i
            offset = desc.addr - near.guest
        if vr_unlikely(<uint64_t>desc.len - 1 >= near.size - offset):
            return i
        segments[i].iov_base = near.host + offset
        segments[i].iov_len = desc.len
        vr_single(&chains[i], at, i, desc.len, desc.flags & DESC_F_WRITE)
    return ready


@cython.final
cdef class SplitQueue(VirtQueue):
    """The device's side of a split virtqueue (virtio 1.3, 2.7).

    Args:
        memory: the guest's memory; the queue keeps it alive.
        size: number of descriptors: a power of two, 1 to 32768.
        desc, avail, used: guest addresses of descriptor table, available and used ring.
        event_idx, indirect, in_order: the negotiated features of these names.
        index: available index to start from (GET/SET_VRING_BASE).
        used_index: used index to start from; default: `index`, so nothing is in flight.
        name: what errors call the queue.

    Raises:
        AddressError: a ring is misaligned or not in one region of memory.
        LocalMisuseError: an impossible size or index.
    """

    def __cinit__(
        self, GuestMemory memory not None, size, desc, avail, used, *, event_idx=False,
        indirect=False, in_order=False, index=0, used_index=None, name="queue"
    ):
        if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
            raise LocalMisuseError(f"{name}: size {size} is not a power of two from 1 to 32768")
        if used_index is None:
            used_index = index
        for at in (index, used_index):
            if not 0 <= at <= 0xFFFF:
                raise LocalMisuseError(f"{name}: index {at} is not of 16 bits")
        self.name = name
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        self.next_avail = index
        self.next_used = used_index
        self._rings = (desc, avail, used)
        self.memory = memory

    def __init__(
        self, memory, size, desc, avail, used, *, event_idx=False, indirect=False, in_order=False,
        index=0, used_index=None, name="queue"
    ):
        pass

    cdef int locate_rings(self, GuestMemory memory) except -1:
        desc_at, avail_at, used_at = self._rings
        # The event indices at the ends exist only with EVENT_IDX.
        cdef uint64_t event = 2 if self.event_idx else 0
        cdef uint8_t* desc = self.locate(
            memory, desc_at, self.size * DESC_SIZE, 16, "descriptor table"
        )
        cdef uint8_t* avail = self.locate(
            memory, avail_at, 4 + self.size * 2 + event, 2, "available ring"
        )
        self.used = self.locate(memory, used_at, 4 + self.size * 8 + event, 4, "used ring")
        self.desc = desc
        self.avail = avail
        return 0

    cdef void restart(self) noexcept:
        self.next_avail = self.next_used = 0

    @property
    def avail_index(self):
        """The next available index to pop (0 to 65535)."""
        return self.next_avail

    @property
    def used_index(self):
        """The next used index to publish (0 to 65535)."""
        return self.next_used

    cdef int pop_within(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments,
        uint64_t max_bytes
    ) noexcept nogil:
        cdef uint16_t index = self.next_avail
        cdef uint32_t size = self.size, mask = self.size - 1
        cdef uint32_t ready = <uint16_t>(vr_load16_acquire(self.avail + 2) - index)
        cdef uint32_t i = 0
        cdef const uint8_t* heads = self.avail + 4
        cdef const uint8_t* table = self.desc
        cdef bint indirect = self.indirect
        cdef vr_chain* chain
        cdef vr_room room
        cdef vr_walk walk
        cdef int code = 0
        if self.fault.code:
            return VR_BROKEN
        # What is in flight still occupies descriptors, so the driver cannot add a whole ring.
        if ready + (self.popped - self.pushed) > size:
            return self.fail(FAULT_AVAIL_INDEX, <uint16_t>(index + ready), 0, 0)
        if ready > max_chains:
            ready = max_chains
        room.memory = &self.map
        room.hints = self.hints
        room.size = size
        room.extra = 0
        room.segments = segments
        room.end = segments + max_segments
        if max_bytes == <uint64_t>-1:
            i = pop_singles(
                heads, table, index, min(ready, max_segments), chains, &room, segments
            )
        walk.near = self.map.regions
        walk.segment = segments + i
        while i < ready:
            walk.at = vr_load16(heads + 2 * <size_t>((index + i) & mask))
            if vr_unlikely(walk.at >= size):
                code = self.fail(FAULT_HEAD, walk.at, 0, 0)
                break
            chain = &chains[i]
            chain.head = walk.at
            chain.descriptors = 1
            vr_start_chain(&walk, chain, <uint32_t>(walk.segment - segments))
            code = walk_table(&room, &walk, chain, table, size)
            if walk.desc.flags & DESC_F_INDIRECT and not code:
                code = walk_indirect(&room, &walk, chain, indirect)
            if vr_likely(not code):
                code = vr_end_chain(&room, &walk, chain)
            if vr_unlikely(code):
                code = self.chain_fault(code, walk.at, walk.desc.addr, walk.desc.len)
                break
            if vr_unlikely(walk.bytes > max_bytes):
                i = max(i, 1)
                break
            max_bytes -= walk.bytes
            i += 1
        if code and i:
            # Deliver what is sound; the next pop meets the broken chain again, or the bigger table.
            self.fault.code = FAULT_NONE
            code = 0
        self.next_avail = index + i
        self.popped += i
        return code if code else <int>i

    cdef bint push_c(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil:
        cdef uint16_t before = self.next_used
        cdef uint16_t after = before + n
        cdef uint32_t mask = self.size - 1
        cdef uint32_t i
        cdef uint8_t* elements = self.used + 4
        for i in range(n):
            vr_write_used(
                elements + 8 * <size_t>((before + i) & mask), chains[i].head,
                written[i] if written != NULL else 0
            )
        vr_store16_release(self.used + 2, after)
        self.next_used = after
        self.pushed += n
        # The index must be visible before the driver's wish is read, or both sides may sleep.
        vr_fence()
        if self.event_idx:
            return vr_need_event(
                vr_load16(self.avail + 4 + 2 * <size_t>self.size), after, before
            )
        return not vr_load16(self.avail) & AVAIL_F_NO_INTERRUPT

    cdef void unpop_c(self, uint32_t n) noexcept nogil:
        self.next_avail -= n
        self.popped -= n

    cdef bint enable_notifications_c(self) noexcept nogil:
        if self.event_idx:
            vr_store16(self.used + 4 + 8 * <size_t>self.size, self.next_avail)
        else:
            vr_store16(self.used, 0)
        # The wish must be visible before the index is read again: the driver may have added a
        # chain after the last pop and before it could see the wish.
        vr_fence()
        return vr_load16(self.avail + 2) != self.next_avail

    cdef bint enable_notifications_after_c(self, uint16_t n) noexcept nogil:
        if n <= 1 or not self.event_idx:
            return self.enable_notifications_c()
        vr_store16(self.used + 4 + 8 * <size_t>self.size, <uint16_t>(self.next_avail + n - 1))
        vr_fence()
        return <uint16_t>(vr_load16(self.avail + 2) - self.next_avail) >= n

    cdef void disable_notifications_c(self) noexcept nogil:
        # With EVENT_IDX the event index stays behind, which asks for nothing until it is set.
        if not self.event_idx:
            vr_store16(self.used, USED_F_NO_NOTIFY)

    cdef uint32_t available_c(self) noexcept nogil:
        cdef uint32_t ready = <uint16_t>(vr_load16_acquire(self.avail + 2) - self.next_avail)
        return 0 if self.fault.code or ready > self.size else ready
