"""The common part of both layouts' drivers, for guests, tests, benchmarks and fuzzing."""

from __future__ import annotations

import numpy as np

from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.number cimport PyNumber_Index
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from vring._layout cimport DESC_SIZE, QUEUE_SIZE_MAX
from vring._wire cimport DESC_F_WRITE, UINT32_MAX, UINT64_MAX, vr_need_event
from vring.errors import LocalMisuseError, QueueFullError, UsedRingError

_ARRAY = np.ndarray
_UINT32 = np.dtype(np.uint32)
_UINT64 = np.dtype(np.uint64)


cdef bint plain_numbers(list values, uint64_t most) except -1:
    """Return whether all are plain ints from 0 to `most` that fit a signed 64-bit number."""
    cdef long long number
    cdef int overflow = 0
    for value in values:
        if not PyLong_CheckExact(value):
            return False
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow or number < 0 or <uint64_t>number > most:
            return False
    return True


def need_event(uint16_t event, uint16_t after, uint16_t before):
    """Return whether moving an index from `before` to `after` passes `event` (2.7.7.2).

    All three are 16-bit indices and may wrap around.
    """
    return bool(vr_need_event(event, after, before))


cdef class Driver:
    """The driver's side of a virtqueue, of either layout: made as SplitDriver or PackedDriver.

    The rings' memory must be zero, or in use by a device set up with the same `index`. The caller
    manages the buffers that it adds.

    Args:
        memory: the guest's memory, kept alive.
        size: number of descriptors, 1 to 32768; split: a power of two.
        desc, avail, used: guest addresses of descriptor area, driver area and device area (2.6).
        event_idx, indirect, in_order: whether the feature of this name is negotiated.
        index: initial `avail_index` and `used_index`; default: those of a fresh ring.
        name: name of the queue in errors.

    Attributes:
        memory, name, size, event_idx, indirect, in_order: as given; read-only.
        num_free: free descriptors.

    Raises:
        AddressError: an area is not in one region of memory.
        LocalMisuseError: one is misaligned, or an impossible size or index.
    """

    def __cinit__(
        self, GuestMemory memory not None, size, desc, avail, used, *, event_idx=False,
        indirect=False, in_order=False, index=None, name="driver"
    ):
        size = PyNumber_Index(size)
        if not 1 <= size <= QUEUE_SIZE_MAX:
            raise LocalMisuseError(f"{name}: size {size} is not 1 to 32768")
        self.memory = memory
        self.name = name
        self.size = self.num_free = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.in_order = in_order
        self.descriptors = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        self.writable = <uint32_t*>calloc(self.size, sizeof(uint32_t))
        self.order = <uint16_t*>calloc(self.size, sizeof(uint16_t))
        if self.descriptors == NULL or self.writable == NULL or self.order == NULL:
            raise MemoryError

    def __init__(
        self, memory, size, desc, avail, used, *, event_idx=False, indirect=False, in_order=False,
        index=None, name="driver"
    ):
        if type(self) is Driver:
            raise TypeError("Driver is abstract: make a SplitDriver or a PackedDriver")

    def __dealloc__(self):
        free(self.descriptors)
        free(self.writable)
        free(self.order)
        free(self.scratch)

    cdef uint8_t* locate(self, uint64_t address, uint64_t length, uint64_t align) except NULL:
        cdef uint8_t* host = self.memory.locate(address, length)
        if <size_t>host % align or address % align:
            raise LocalMisuseError(
                f"{self.name}: ring part at {address:#x} is not aligned to {align} bytes"
            )
        return host

    cdef uint32_t read_buffers(
        self, object pairs, vr_buffer* buffers, uint32_t n, uint32_t flags
    ) except? 0:
        """Append (address, length) pairs to n buffers; return the new number of buffers."""
        for address, length in pairs:
            if n == self.size:
                raise LocalMisuseError(
                    f"{self.name}: a chain of more buffers than the queue's size {self.size}"
                )
            buffers[n].address = self.check_number(address, UINT64_MAX, "address of a buffer")
            buffers[n].length = self.check_number(length, UINT32_MAX, "length of a buffer")
            buffers[n].flags = flags
            n += 1
        return n

    cdef uint64_t check_number(self, object value, uint64_t most, str what) except? 0:
        """Convert a caller's number once; raise LocalMisuseError unless it is 0 to `most`."""
        cdef uint64_t number
        if not PyLong_CheckExact(value):
            value = PyNumber_Index(value)
        try:
            number = value
            if number <= most:
                return number
        except OverflowError:
            pass
        raise LocalMisuseError(f"{self.name}: {what}: {value} is not 0 to {most}")

    cdef object check_numbers(self, object values, object kind, uint64_t most, str what):
        """Return the values as an array of `kind`; refuse values that it cannot hold exactly."""
        if isinstance(values, _ARRAY) and values.dtype == kind:
            return np.ascontiguousarray(values)
        if type(values) is list and plain_numbers(<list>values, most):
            return np.ascontiguousarray(values, kind)
        values = np.asarray(values)
        if values.size == 0:
            return np.empty(0, kind)
        if values.dtype.kind not in "iu" or int(values.min()) < 0 or int(values.max()) > most:
            raise LocalMisuseError(f"{self.name}: {what}: not all are integers of 0 to {most}")
        return np.ascontiguousarray(values, kind)

    cdef void note(self, uint16_t head, uint32_t descriptors, uint32_t writable) noexcept nogil:
        """Record a chain that is in flight from now on."""
        self.descriptors[head] = <uint16_t>descriptors
        self.writable[head] = writable
        self.order[self.youngest] = head
        self.youngest = self.youngest + 1 if self.youngest + 1 < self.size else 0
        self.flying += 1

    cdef bint next_element(self, uint32_t* head, uint32_t* length) except -1:
        return False

    cdef void take_back(self, uint16_t head) noexcept nogil:
        pass

    cdef void restart(self) noexcept:
        pass

    cdef int batch_size(self, uint32_t head) except -1:
        """Return how many chains a used element for `head` covers: with IN_ORDER all up to it."""
        cdef uint32_t n, at = self.oldest
        if head >= self.size or self.descriptors[head] == 0:
            raise UsedRingError(self.name, head, "the device used a buffer that is not in flight")
        if not self.in_order:
            return 1
        for n in range(1, self.flying + 1):
            if self.order[at] == head:
                return n
            at = at + 1 if at + 1 < self.size else 0
        raise UsedRingError(self.name, head, "the device used a buffer out of order")

    cdef tuple collect(self, Py_ssize_t limit):
        cdef uint32_t most = self.flying, i = 0, n, head = 0, length = 0
        if limit < 0:
            raise LocalMisuseError(f"limit {limit} is below 0")
        if 0 < limit < most:
            most = limit
        heads = np.empty(self.flying, np.uint32)
        lengths = np.empty(self.flying, np.uint32)
        cdef uint32_t[::1] head_rows = heads
        cdef uint32_t[::1] length_rows = lengths
        try:
            while i < most and self.next_element(&head, &length):
                n = self.batch_size(head)
                if n > <uint32_t>head_rows.shape[0] - i:
                    raise LocalMisuseError(f"{self.name}: used while it took chains back")
                while n > 1:
                    # IN_ORDER (2.7.9): skipped buffers were used completely.
                    head_rows[i] = self.order[self.oldest]
                    length_rows[i] = self.writable[head_rows[i]]
                    self.take_back(<uint16_t>head_rows[i])
                    i += 1
                    n -= 1
                head_rows[i] = head
                length_rows[i] = length
                self.take_back(<uint16_t>head)
                i += 1
        except UsedRingError:
            if i == 0:
                raise
            # Valid chains are returned first; the next call meets the broken one again.
        return heads[:i], lengths[:i]

    def get_used(self, Py_ssize_t limit=0):
        """Take chains back that the device has used (2.7.14, 2.8.22).

        Args:
            limit: maximum number of chains (the last IN_ORDER batch may exceed it); 0: no limit.

        Returns:
            Their heads (packed: buffer ids) and the bytes the device stored in each, two uint32
            arrays.

        Raises:
            RingError: the device used a chain that is not in flight, or its index jumped. Chains
                used before are returned first; the next call raises.
        """
        return self.collect(limit)

    def reset(self):
        """Restart the ring (RING_RESET, 2.6.1): all buffers are the caller's again.

        The device must have stopped using the ring, and must reset it before the next ``publish``.
        """
        memset(self.descriptors, 0, self.size * sizeof(uint16_t))
        self.oldest = self.youngest = self.flying = 0
        self.num_free = self.size
        self.restart()

    # --- what a layout implements

    cdef uint16_t put_one(self, uint64_t address, uint32_t length, uint32_t flags) noexcept nogil:
        return 0

    cdef uint16_t put_chain(
        self, const vr_buffer* buffers, uint32_t n, uint64_t table_at, uint8_t* table
    ) noexcept nogil:
        return 0

    # --- common to both

    def add(self, readable, writable, *, indirect_at=None):
        """Add a chain; the device sees it after ``publish`` (2.7.13, 2.8.21).

        Args:
            readable, writable: (guest address, length in bytes) of device-readable and
                device-writable buffers, in order; at least one in all.
            indirect_at: guest address of free memory, 16 bytes per buffer, for an indirect table:
                the chain then takes one descriptor. Keep the memory until the chain is used.

        Returns:
            The head (packed: the buffer id), with which get_used identifies the chain.

        Raises:
            QueueFullError: not enough free descriptors.
            LocalMisuseError: no buffer, more than the queue's size, a number that a descriptor
                cannot hold, or indirect not negotiated.
            AddressError: `indirect_at` is not in one region of memory.

        If it raises, nothing has been taken or written.
        """
        cdef vr_buffer* buffers = self.scratch
        cdef uint64_t table_at = 0, total = 0
        cdef uint8_t* table = NULL
        cdef uint32_t n, i, needed
        cdef uint16_t head
        # Code of the caller's numbers may call `add`; that call has its own scratch table.
        self.scratch = NULL
        if buffers == NULL:
            buffers = <vr_buffer*>calloc(self.size, sizeof(vr_buffer))
            if buffers == NULL:
                raise MemoryError
        try:
            if indirect_at is not None:
                table_at = self.check_number(indirect_at, UINT64_MAX, "indirect_at")
            n = self.read_buffers(readable, buffers, 0, 0)
            n = self.read_buffers(writable, buffers, n, DESC_F_WRITE)
            # From here on no code of the caller's runs.
            if n == 0:
                raise LocalMisuseError(f"{self.name}: a chain of no buffers")
            if indirect_at is not None:
                if not self.indirect:
                    raise LocalMisuseError(f"{self.name}: INDIRECT_DESC is not negotiated")
                table = self.memory.locate(table_at, n * DESC_SIZE)
            needed = 1 if table != NULL else n
            if needed > self.num_free:
                raise QueueFullError(
                    f"{self.name}: {self.num_free} free descriptors, {needed} needed"
                )
            for i in range(n):
                if buffers[i].flags:
                    total += buffers[i].length
            head = self.put_chain(buffers, n, table_at, table)
            self.note(head, needed, <uint32_t>min(total, <uint64_t>UINT32_MAX))
            return head
        finally:
            if self.scratch == NULL:
                self.scratch = buffers
            else:
                free(buffers)

    def add_many(self, addresses, lengths, writable):
        """Add one-descriptor chains until all are added or no descriptor is free; return how many.

        Args:
            addresses: guest addresses (uint64 array or sequence).
            lengths: bytes of each (uint32 array or sequence).
            writable: True: all are device-writable; False: all are device-readable.

        Raises:
            LocalMisuseError: the numbers of lengths and addresses differ, or a value does not fit.
        """
        cdef uint32_t flags = DESC_F_WRITE if writable else 0
        cdef const uint64_t[::1] at = self.check_numbers(
            addresses, _UINT64, UINT64_MAX, "addresses"
        )
        cdef const uint32_t[::1] length = self.check_numbers(
            lengths, _UINT32, UINT32_MAX, "lengths"
        )
        if at.shape[0] != length.shape[0]:
            raise LocalMisuseError(f"{at.shape[0]} addresses, {length.shape[0]} lengths")
        cdef uint32_t n = min(<uint64_t>at.shape[0], self.num_free), i
        with nogil:
            for i in range(n):
                self.note(
                    self.put_one(at[i], length[i], flags), 1, length[i] if flags else 0
                )
        return n

    def publish(self):
        """Make all added chains available; return whether the device must be kicked."""
        raise NotImplementedError

    def enable_notifications(self, after=1):
        """Ask the device to notify; return True if `after` chains are used already."""
        raise NotImplementedError

    def disable_notifications(self):
        """Tell the device that notifications are not needed; it may still send some."""
        raise NotImplementedError

    def notification_data(self, queue):
        """Return the 32 bits that a kick of queue `queue` carries (NOTIFICATION_DATA, 2.9)."""
        return queue | self.avail_index << 16

    @property
    def avail_index(self):
        """Next available index to publish, 16 bits."""
        raise NotImplementedError

    @property
    def used_index(self):
        """Next used index to take back, 16 bits."""
        raise NotImplementedError

    @property
    def in_flight(self):
        """Number of chains added and not taken back."""
        return self.flying
