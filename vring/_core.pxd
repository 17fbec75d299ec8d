# The device's side of a virtqueue: the contract for extensions that drive queues without the GIL.
#
# One thread at a time may touch a queue. All of the *_c methods may be called with or without the
# GIL. They are virtual: VirtQueue is the type to ask for, whatever the layout of the ring.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._chains cimport Batch, Chain
from vring._dirty cimport DirtyLog, vr_log
from vring._memory cimport GuestMemory, VR_HINTS, vr_map
from vring._record cimport vr_record
from vring._walk cimport vr_chain
from vring._wire cimport iovec

cdef struct vr_fault:
    # why the ring is broken
    int code                    # of vr_fault_code, FAULT_NONE while it is sound
    uint32_t index              # descriptor index, head or ring index, as the code says
    uint64_t address            # of the buffer or table, guest address
    uint64_t length             # bytes

cdef enum:
    VR_BROKEN = -1
    VR_TOO_SMALL = -2           # of pop_within alone: one chain does not fit the segment table


cdef class VirtQueue:
    cdef readonly str name
    cdef readonly uint32_t size             # descriptors
    cdef readonly bint event_idx
    cdef readonly bint indirect
    cdef readonly bint in_order
    cdef GuestMemory _memory
    cdef vr_map map                         # of _memory
    cdef uint16_t[VR_HINTS] hints
    cdef vr_fault fault
    cdef uint64_t popped                    # chains since the queue was made
    cdef uint64_t pushed
    cdef uint32_t epoch                     # how often reset
    cdef bint notification_due
    # Who alone may use the queue now, else NULL: the Flow of a pump. Python's methods refuse then;
    # the *_c methods do not look.
    cdef void* holder
    # Where the queue is, for a successor of this process; NULL: none. `accounted` is for the
    # next push_c: bytes of the chains from the oldest on that were taken or given in all.
    cdef vr_record* record
    cdef const uint8_t[::1] _record_owner
    cdef uint64_t accounted
    # Where the device's writes are marked, NULL: nowhere. What writes to the ring marks it.
    cdef const vr_log* log
    cdef DirtyLog _log_owner
    cdef uint64_t log_device                # guest address that stands for the device area
    cdef uint64_t[3] areas                  # guest addresses of descriptors, driver's and device's
    cdef Batch _spare_batch
    cdef Batch _older_batch
    cdef Chain _spare_chain
    cdef Chain _older_chain

    # Pops up to max_chains chains and writes their segments, as host addresses that feed
    # readv/writev, to the segment table. Returns how many: fewer when the driver made fewer
    # available, the table is full, or chains without bytes took VR_WORK_MAX. Negative: the ring is
    # broken, now or since earlier; raise_broken() says why. A chain that alone does not fit
    # max_segments breaks the ring (a chain has at most `size` segments, and one more for each
    # region border that a buffer crosses).
    # The buffers are valid as long as `memory` (take a reference to it) or the queue lives.
    cdef int pop_c(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments
    ) noexcept nogil
    # The same, ending before the chains have more than max_bytes (but for the first), and
    # VR_TOO_SMALL, with nothing popped, for the chain that does not fit.
    cdef int pop_within(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments,
        uint64_t max_bytes
    ) noexcept nogil
    # Marks the first `bytes` of segments in the log, if there is one. Whoever wrote to buffers
    # calls it, for each chain's device-writable segments, before push_c.
    cdef void mark_c(self, const iovec* segments, uint32_t n, uint64_t bytes) noexcept nogil
    # Completes n chains and publishes them at once. written[i]: bytes stored from the start of the
    # device-writable part, at most writable_bytes; NULL: none. Returns 1 if the driver wants a
    # notification. With IN_ORDER chains must be completed in the order they were popped.
    cdef bint push_c(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil
    # Gives back the last n popped chains, which must not be completed: they are popped again.
    cdef void unpop_c(self, uint32_t n) noexcept nogil
    # Asks the driver for a kick at the next chain. Returns 1 if chains are available already: no
    # kick may come for those, so go on popping.
    cdef bint enable_notifications_c(self) noexcept nogil
    # The same for the n-th chain from now, where EVENT_IDX lets one ask for that, else for the
    # next. Returns 1 if so many are available already. Without a kick fewer may become available.
    cdef bint enable_notifications_after_c(self, uint16_t n) noexcept nogil
    cdef void disable_notifications_c(self) noexcept nogil
    # How many chains (packed: 0 or at least 1) can be popped; 0 when the ring is broken.
    cdef uint32_t available_c(self) noexcept nogil
    # Whether guest memory was cut off (Region.lost); the ring is broken then. What was read of it
    # before this says no may be used.
    cdef bint memory_lost(self) noexcept nogil
    # Raises the RingError of a broken queue; with the GIL.
    cdef int raise_broken(self) except -1

    cdef int locate_rings(self, GuestMemory memory) except -1
    cdef void restart(self) noexcept
    cdef int take_record(self, object record) except -1
    cdef uint8_t* locate(
        self, GuestMemory memory, uint64_t address, uint64_t length, uint64_t align, str what
    ) except NULL
    cdef int fail(self, int code, uint32_t index, uint64_t address, uint64_t length) noexcept nogil
    cdef int chain_fault(
        self, int code, uint32_t at, uint64_t address, uint64_t length
    ) noexcept nogil
    cdef object make_fault(self)
    cdef int fill(self, Batch batch, uint32_t limit, uint64_t max_bytes) except -1
    cdef Batch take_batch(self)
    cdef bint has_spare_chain(self) noexcept
    cdef Chain take_chain(self)
    cdef void mark_batch(self, Batch batch, const uint32_t* written, uint32_t n) noexcept
    cdef int check_free(self) except -1
    cdef uint16_t check_index(self, object index) except? 0
    cdef int check_mine(self, Batch batch) except -1
    cdef int withdraw(self, Batch batch, uint32_t n) except -1
    cdef int check_order(self, uint64_t first) except -1
    cdef Chain pop_one(self)
    cdef bint push_one(self, Chain chain, object written) except -1
