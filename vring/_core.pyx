"""The device's side of virtqueues in hostile guest memory (virtio 1.3, 2.7)."""

from __future__ import annotations

cimport cython
from cpython.number cimport PyNumber_Index
from cpython.object cimport PyObject
from libc.string cimport memset

from vring._chains cimport checked_length, held_once, plain_lengths
from vring._dirty cimport DirtyLog, checked_address, log_chains, log_segments
from vring._linux cimport vr_get_flag, vr_set_flag
from vring._layout cimport QUEUE_SIZE_MAX
from vring._walk cimport (
    FAULT_ADDRESS, FAULT_FULL, FAULT_INDIRECT_ADDRESS, FAULT_INDIRECT_SIZE, FAULT_MEMORY_LOST,
    FAULT_NONE, FAULT_TOO_MANY_SEGMENTS, VR_SEGMENTS_MAX, vr_describe
)
from vring._wire cimport vr_unlikely
from vring.errors import AddressError, LocalMisuseError

cdef enum:
    # Segments of a batch: enough for most queues, and small enough for the L1 cache.
    BATCH_SEGMENTS = 1024
    CHAIN_SEGMENTS = 16

#: Bytes of a queue's record.
RECORD_SIZE = sizeof(vr_record)


cdef class VirtQueue:
    """The device's side of a virtqueue, of either layout: made as SplitQueue or PackedQueue.

    One thread at a time may use a queue and the objects it gave out. While a flow of a pump uses
    the queue, methods that read or change the ring raise LocalMisuseError.

    Args:
        memory: the guest's memory; the queue keeps it alive.
        size: number of descriptors, 1 to 32768; split: a power of two.
        desc, avail, used: guest addresses of descriptor area, driver area and device area (2.6).
        event_idx, indirect, in_order: whether the feature of this name is negotiated.
        index: initial `avail_index`; default: that of a fresh ring.
        used_index: initial `used_index`; default: `index`, so nothing is in flight.
        name: name of the queue in errors.
        record: RECORD_SIZE writable bytes, aligned to 8, in memory that outlives this process: the
            queue records its position there. None: the position is lost if the process is killed.
        resume: continue where the last process with this `record` ended; `index` and `used_index`
            are ignored then.

    Attributes:
        name, size, event_idx, indirect, in_order: as given; read-only.

    Raises:
        AddressError: an area is misaligned or not in one region of memory.
        LocalMisuseError: an impossible size or index, or an invalid record.
    """

    def __cinit__(
        self, GuestMemory memory not None, size, desc, avail, used, *, event_idx=False,
        indirect=False, in_order=False, index=None, used_index=None, name="queue", record=None,
        resume=False
    ):
        cdef int i
        size = PyNumber_Index(size)
        if not 1 <= size <= QUEUE_SIZE_MAX:
            raise LocalMisuseError(f"{name}: size {size} is not 1 to 32768")
        self.name = name
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        self._memory = memory
        for i, at in enumerate((desc, avail, used)):
            self.areas[i] = checked_address(name, at)
        if record is not None:
            self.take_record(record)
        elif resume:
            raise LocalMisuseError(f"{name}: there is no record to go on from")

    def __init__(
        self, memory, size, desc, avail, used, *, event_idx=False, indirect=False, in_order=False,
        index=None, used_index=None, name="queue", record=None, resume=False
    ):
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

    cdef int locate_rings(self, GuestMemory memory, uint8_t** rings) except -1:
        return 0

    cdef void place_rings(self, uint8_t* const* rings) noexcept nogil:
        pass

    cdef void restart(self) noexcept:
        pass

    @property
    def avail_index(self):
        """Next available index to pop, 16 bits (2.7.6; packed: 2.8.1)."""
        raise NotImplementedError

    @property
    def used_index(self):
        """Next used index to publish, 16 bits (2.7.8; packed: 2.8.1)."""
        raise NotImplementedError

    # --- common to all

    cdef int take_record(self, object record) except -1:
        cdef uint8_t[::1] view = record
        if view.shape[0] < <Py_ssize_t>sizeof(vr_record) or <size_t>&view[0] % 8:
            raise LocalMisuseError(
                f"{self.name}: a record has {sizeof(vr_record)} bytes, aligned to 8"
            )
        self._record_owner = view
        self.record = <vr_record*>&view[0]
        return 0

    cdef uint16_t check_index(self, object index) except? 0:
        index = PyNumber_Index(index)
        if not 0 <= index <= 0xFFFF:
            raise LocalMisuseError(f"{self.name}: index {index} is not of 16 bits")
        return index

    cdef uint8_t* locate(
        self, GuestMemory memory, uint64_t address, uint64_t length, uint64_t align, str what
    ) except NULL:
        """Return the address in this process of a part of the ring, or raise AddressError."""
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
        self.fault.index = index
        self.fault.address = address
        self.fault.length = length
        vr_set_flag(&self.fault.code, code)     # last: another thread may look
        return VR_BROKEN

    cdef int chain_fault(
        self, int code, uint32_t at, uint64_t address, uint64_t length
    ) noexcept nogil:
        """Mark the queue broken by the fault of a walk, unless only the segment table was full."""
        if code == FAULT_FULL:
            return VR_TOO_SMALL
        if code == FAULT_ADDRESS or code == FAULT_INDIRECT_SIZE or code == FAULT_INDIRECT_ADDRESS:
            return self.fail(code, at, address, length)
        return self.fail(code, at, 0, 0)

    cdef bint memory_lost(self) noexcept nogil:
        if not (<GuestMemory>self.guarded).is_lost():
            return False
        self.fail(FAULT_MEMORY_LOST, self.popped & 0xFFFF, 0, 0)
        return True

    cdef object make_fault(self):
        kind, cause = vr_describe(self.fault.code)
        if self.fault.length:
            cause = f"{cause}: {self.fault.address:#x}, {self.fault.length:#x} bytes"
        return kind(self.name, self.fault.index, cause)

    cdef int raise_broken(self) except -1:
        raise self.make_fault()

    cdef Batch take_batch(self):
        """Return a batch that nobody else refers to, or a new one.

        Prefer the one used last, whose tables are in the cache; a loop variable may still hold it.
        """
        if self._spare_batch is None or not held_once(<PyObject*>self._spare_batch):
            self._spare_batch, self._older_batch = self._older_batch, self._spare_batch
            if self._spare_batch is None or not held_once(<PyObject*>self._spare_batch):
                self._spare_batch = Batch.make(self.size, max(self.size, <uint32_t>BATCH_SEGMENTS))
        self._spare_batch.forget_views()
        return self._spare_batch

    cdef bint has_spare_chain(self) noexcept:
        """Return whether nobody else refers to `_spare_chain` or its batch."""
        return (
            self._spare_chain is not None and held_once(<PyObject*>self._spare_chain)
            and held_once(<PyObject*>self._spare_chain.batch)
        )

    cdef Chain take_chain(self):
        """Return a single chain that nobody else refers to, with its own batch."""
        if not self.has_spare_chain():
            self._spare_chain, self._older_chain = self._older_chain, self._spare_chain
            if not self.has_spare_chain():
                self._spare_chain = Chain.__new__(Chain)
                self._spare_chain.batch = Batch.make(1, CHAIN_SEGMENTS)
        self._spare_chain.written = 0
        self._spare_chain.forget_views()
        return self._spare_chain

    cdef int fill(self, Batch batch, uint32_t limit, uint64_t max_bytes) except -1:
        """Pop into a batch; return the number of chains."""
        cdef int n
        if self.holder != NULL:
            self.check_free()
        while True:
            n = self.pop_within(
                batch.chains, limit, batch.segments, batch.max_segments, max_bytes
            )
            if n != VR_TOO_SMALL:
                break
            # A table of this size is not kept for the next batch.
            if 2 * batch.max_segments > max(self.size, <uint32_t>BATCH_SEGMENTS):
                if batch is self._spare_batch:
                    self._spare_batch = None
                else:
                    self._spare_chain = None
            if 2 * batch.max_segments > VR_SEGMENTS_MAX:
                n = self.fail(FAULT_TOO_MANY_SEGMENTS, self.popped & 0xFFFF, 0, 0)
                break
            batch.grow()
        if self.memory_lost():
            if n > 0:
                self.unpop_c(n)
            n = VR_BROKEN
        if n < 0:
            self.raise_broken()
        batch.start = 0
        batch.count = n
        batch.first = self.popped - n
        batch.epoch = self.epoch
        batch.current_epoch = &self.epoch
        batch.owner = self if n else None
        batch.memory = self._memory if n else None
        return n

    def pop_many(self, Py_ssize_t limit=0, Py_ssize_t max_bytes=0):
        """Take chains that the driver made available, in its order (2.7.13, 2.8.21).

        Args:
            limit: maximum number of chains; 0: no limit. The batch also ends when its segment table
                (1024 segments, or the queue's size) is full or empty descriptors took as much
                work as filling it, so more chains may be available.
            max_bytes: maximum number of bytes (readable and writable) of the chains together, which
                only the first chain may exceed; 0: no limit.

        Returns:
            The batch; empty (and false) if nothing is available.

        Raises:
            RingError: the driver broke the ring. Chains before the broken one are returned first;
                every later call raises again.
        """
        if limit < 0 or max_bytes < 0:
            raise LocalMisuseError(f"limit {limit}, max_bytes {max_bytes}: below 0")
        cdef Batch batch = self.take_batch()
        cdef uint32_t most = self.size if limit == 0 or limit > self.size else <uint32_t>limit
        self.fill(batch, most, <uint64_t>max_bytes if max_bytes else <uint64_t>-1)
        return batch

    def push_many(self, Batch batch not None, written=None, count=None):
        """Complete a batch, or its first `count` chains, and publish them at once (2.7.8).

        Args:
            batch: from this queue's pop_many. It keeps the chains that are not completed.
            written: bytes stored from the start of each device-writable part: one number per
                completed chain (fastest as a uint32 array), one number for all, or None for zero.
            count: number of chains to complete; default: all.

        Returns:
            Whether the driver wants a notification now.

        Raises:
            LocalMisuseError: the batch is completed or another queue's; `written` exceeds the room;
                memoryviews of its chains are in use; with IN_ORDER, older chains are in flight.
        """
        # Converted first: their own code may use the queue, whose state is checked afterwards.
        if written is not None:
            written = plain_lengths(written, self.size)
        if count is not None:
            count = PyNumber_Index(count)
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
        if batch.viewed_first is not None:
            self.withdraw(batch, n)
        if self.log != NULL:
            self.mark_batch(batch, lengths, n)
        cdef bint notify = self.push_c(batch.chains + batch.start, lengths, n)
        batch.finish(n)
        return notify

    def unpop(self, Batch batch not None):
        """Give back the uncompleted chains of the most recent batch; they will be popped again.

        Raises:
            LocalMisuseError: not the most recent batch of this queue, or views of it are in use.
        """
        self.check_mine(batch)
        if batch.first + batch.count != self.popped:
            raise LocalMisuseError(f"{self.name}: chains were popped after this batch")
        if batch.viewed_first is not None:
            self.withdraw(batch, batch.count - batch.start)
        self.unpop_c(batch.count - batch.start)
        batch.count = batch.start
        batch.finish(0)

    cdef int check_free(self) except -1:
        if self.holder != NULL:
            raise LocalMisuseError(f"{self.name}: a pump's flow has it until it is detached")
        return 0

    cdef int check_mine(self, Batch batch) except -1:
        if self.holder != NULL:
            self.check_free()
        if batch.owner is not self:
            if batch.owner is None and batch.count == batch.start:
                if batch.count == 0:
                    return 0
                raise LocalMisuseError(f"{self.name}: the chains are completed or given back")
            raise LocalMisuseError(f"{self.name}: the chains are another queue's")
        if batch.epoch != self.epoch:
            raise LocalMisuseError(f"{self.name}: the queue was reset after the chains were popped")
        return 0

    cdef int withdraw(self, Batch batch, uint32_t n) except -1:
        """Release the memoryviews of the next n chains of a batch before the chains are completed.

        Callbacks of weak references to a view run here and must not have used the queue.
        """
        cdef uint32_t start = batch.start, epoch = self.epoch
        cdef uint64_t popped = self.popped, pushed = self.pushed
        batch.withdraw_views(start + n)
        if (
            self.popped != popped or self.pushed != pushed or self.epoch != epoch
            or batch.owner is not self or batch.start != start or self.holder != NULL
        ):
            raise LocalMisuseError(f"{self.name}: used while it completed chains")
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
        cdef Batch batch
        cdef uint32_t length = 0
        if written is not None:
            length = checked_length(written)
        batch = chain.batch
        if batch is None:
            chain.row()
        self.check_mine(batch)
        if chain.index != batch.start:
            chain.row()
            raise LocalMisuseError(f"{self.name}: complete the earlier chains of its batch first")
        if written is None:
            length = chain.written
        elif length > batch.chains[chain.index].writable_bytes:
            raise LocalMisuseError(
                f"{length} bytes written, "
                f"but the chain has room for {batch.chains[chain.index].writable_bytes}"
            )
        self.check_order(batch.first + batch.start)
        if batch.viewed_first is not None:
            self.withdraw(batch, 1)
        if self.log != NULL:
            self.mark_batch(batch, &length, 1)
        cdef bint notify = self.push_c(&batch.chains[chain.index], &length, 1)
        batch.finish(1)
        return notify

    def pop(self):
        """Return the next chain that the driver made available, or None.

        The chain is the caller's until it is completed with `push`.

        Raises:
            RingError: the driver broke the ring.
            LocalMisuseError: a flow of a pump uses the queue.
        """
        return self.pop_one()

    def push(self, Chain chain not None, written=None):
        """Complete a chain; return whether the driver wants a notification (2.7.7, 2.7.8).

        Args:
            chain: from pop, or the first uncompleted chain of a batch.
            written: bytes stored from the start of its device-writable part; default:
                ``chain.written``.

        Raises:
            LocalMisuseError: as push_many.
        """
        return self.push_one(chain, written)

    def __iter__(self):
        """Pop until nothing is available; complete each chain before popping the next.

        A chain is completed with ``chain.written`` bytes unless the loop's body completed it. If
        the loop is left early (break, an exception), its chain stays in flight. take_notification
        returns whether the driver wants a notification.
        """
        cdef _QueueIterator iterator = _QueueIterator.__new__(_QueueIterator)
        iterator.queue = self
        return iterator

    def take_notification(self):
        """Return whether chains completed by iteration need a notification; clear the answer."""
        cdef bint due = self.notification_due
        self.notification_due = False
        return due

    def enable_notifications(self):
        """Ask the driver to kick at the next chain (2.7.10, 2.8.14).

        Returns:
            True if chains are available already: they may bring no kick, so continue popping.
        """
        self.check_free()
        return self.enable_notifications_c()

    def disable_notifications(self):
        """Tell the driver that kicks are not needed; it may still send some (2.7.10, 2.8.14)."""
        self.check_free()
        self.disable_notifications_c()

    def available(self):
        """Return the number of chains that can be popped now (packed: 1 means at least one)."""
        self.check_free()
        return self.available_c()

    @property
    def vring_base(self):
        """Ring position for the answer to GET_VRING_BASE (vhost-user) when nothing is in flight.

        Split: the available index. Packed: available index and wrap counter in bits 0 to 15, the
        used ones in bits 16 to 31.
        """
        return self.avail_index

    def reset(self):
        """Restart the ring (RING_RESET, 2.6.1): initial indices, nothing in flight, not broken.

        Chains in flight are dropped, since the driver takes all its buffers back: to complete, read
        or write one raises LocalMisuseError. Their memoryviews still refer to guest memory and
        must not be written to any more.
        """
        self.check_free()
        self.epoch += 1
        self.popped = self.pushed = 0
        self.fault.code = FAULT_NONE
        self.notification_due = False
        self.restart()

    cdef void mark_c(self, const iovec* segments, uint32_t n, uint64_t bytes) noexcept nogil:
        if vr_unlikely(self.log != NULL):
            log_segments(self.log, &self.map, segments, n, bytes)

    cdef void mark_batch(self, Batch batch, const uint32_t* written, uint32_t n) noexcept:
        log_chains(
            self.log, &batch.memory.map, batch.chains + batch.start, batch.segments, written, n
        )

    def set_log(self, DirtyLog log, used_addr=None):
        """Mark in `log` what the device writes from now on, buffers and ring; None: nowhere.

        Buffers are marked when they are completed, and as far as they are said to be written.

        Args:
            used_addr: the guest address that stands for the device area (SET_VRING_ADDR's log
                address); default: its own.

        Raises:
            LocalMisuseError: a pump's flow has the queue; an impossible address.
        """
        self.check_free()
        cdef object at = self.areas[2] if used_addr is None else used_addr
        self.log_device = checked_address(self.name, at)
        self._log_owner = log
        self.log = NULL if log is None else &log.table

    @property
    def in_flight(self):
        """Number of chains popped and neither completed nor given back."""
        return self.popped - self.pushed

    @property
    def broken(self):
        """The RingError if the driver broke the ring, else None."""
        return None if vr_get_flag(&self.fault.code) == FAULT_NONE else self.make_fault()

    @property
    def rings(self):
        """Guest addresses of descriptor area, driver area and device area (2.6)."""
        return self.areas[0], self.areas[1], self.areas[2]

    @property
    def memory(self):
        """The guest memory of the queue. Setting it moves the queue, which no other thread may use,
        to a new region table; chains in flight keep the old one. See move_queues.

        Setting raises AddressError if a part of the ring is not in the new memory.
        """
        return self._memory

    @memory.setter
    def memory(self, GuestMemory memory not None):
        cdef GuestMemory _old = self._memory    # freeing it may run code of its buffers' owners
        cdef vr_move move
        self.check_free()
        self.locate_rings(memory, move.rings)
        move.memory = <void*>memory
        self.move_c(&move)
        self._memory = memory

    cdef void move_c(self, const vr_move* to) noexcept nogil:
        self.guarded = to.memory
        self.map = (<GuestMemory>to.memory).map
        memset(self.hints, 0, sizeof(self.hints))
        self.place_rings(to.rings)


@cython.final
cdef class _QueueIterator:
    """An iterator over a queue; it completes each chain before it pops the next."""

    cdef VirtQueue queue
    cdef Chain last

    def __iter__(self):
        return self

    def __next__(self):
        cdef Chain chain = self.last
        if self.queue is None:
            raise StopIteration
        if chain is not None and chain.batch.owner is self.queue:
            self.queue.notification_due |= self.queue.push_one(chain, None)
        self.last = chain = self.queue.pop_one()
        if chain is None:
            raise StopIteration
        return chain
