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

cdef struct vr_move:
    # where a queue is to find its ring and its buffers
    void* queue                 # a VirtQueue; the caller keeps it alive, and the memory
    void* memory                # a GuestMemory
    uint8_t* rings[3]           # the areas in this process

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
    cdef void* guarded                      # _memory, for code without the GIL
    cdef vr_map map                         # of _memory
    cdef uint16_t[VR_HINTS] hints
    cdef vr_fault fault
    cdef uint64_t popped                    # chains since the queue was made
    cdef uint64_t pushed
    cdef uint32_t epoch                     # how often reset
    cdef bint notification_due
    # The Flow of a pump that has the queue for itself now, or NULL. Python's methods raise
    # LocalMisuseError meanwhile; the *_c methods do not check.
    cdef void* holder
    # The queue's position, for a successor of this process; NULL: not recorded. `accounted` is an
    # argument of the next push_c: bytes, counted from the oldest chain in flight, that were taken
    # or given.
    cdef vr_record* record
    cdef const uint8_t[::1] _record_owner
    cdef uint64_t accounted
    # Where the device's writes are marked; NULL: nowhere. Code that writes to the ring marks what
    # it writes.
    cdef const vr_log* log
    cdef DirtyLog _log_owner
    cdef uint64_t log_device                # guest address that stands for the device area
    cdef uint64_t[3] areas                  # guest addresses of descriptors, driver's and device's
    cdef Batch _spare_batch
    cdef Batch _older_batch
    cdef Chain _spare_chain
    cdef Chain _older_chain

    # Pop up to max_chains chains and write their segments, as host addresses for readv/writev, to
    # the segment table. Return the number of chains: fewer if the driver made fewer available, the
    # table is full, or chains without bytes took VR_WORK_MAX. Negative: the ring is broken, now or
    # since earlier; raise_broken() raises the cause. A single chain that does not fit max_segments
    # breaks the ring (a chain has at most `size` segments, and one more for each region border that
    # a buffer crosses).
    # The buffers are valid as long as `memory` (take a reference to it) or the queue exists.
    cdef int pop_c(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments
    ) noexcept nogil
    # Do the same, but stop before the chains have more than max_bytes, which only the first may
    # exceed, and return VR_TOO_SMALL with nothing popped if a single chain does not fit.
    cdef int pop_within(
        self, vr_chain* chains, uint32_t max_chains, iovec* segments, uint32_t max_segments,
        uint64_t max_bytes
    ) noexcept nogil
    # Mark the first `bytes` of segments in the log, if there is one. Callers that wrote to buffers
    # do so for each chain's device-writable segments before push_c.
    cdef void mark_c(self, const iovec* segments, uint32_t n, uint64_t bytes) noexcept nogil
    # Complete n chains and publish them at once. written[i]: bytes stored from the start of the
    # device-writable part, at most writable_bytes; NULL: none. Return 1 if the driver wants a
    # notification. With IN_ORDER, chains must be completed in the order in which they were popped.
    cdef bint push_c(
        self, const vr_chain* chains, const uint32_t* written, uint32_t n
    ) noexcept nogil
    # Give back the last n popped chains, which must not be completed; they will be popped again.
    cdef void unpop_c(self, uint32_t n) noexcept nogil
    # Ask the driver for a kick at the next chain. Return 1 if chains are available already: they
    # may bring no kick, so continue popping.
    cdef bint enable_notifications_c(self) noexcept nogil
    # Do the same for the n-th chain from now if EVENT_IDX is negotiated, else for the next. Return
    # 1 if so many are available already. Fewer may become available without a kick.
    cdef bint enable_notifications_after_c(self, uint16_t n) noexcept nogil
    cdef void disable_notifications_c(self) noexcept nogil
    # Return the number of chains that can be popped (packed: 0, or 1 for at least one); 0 if the
    # ring is broken.
    cdef uint32_t available_c(self) noexcept nogil
    # Return whether guest memory was cut off (Region.lost), and mark the ring broken if so. Bytes
    # read from guest memory may be used only after this returned 0.
    cdef bint memory_lost(self) noexcept nogil
    # Raise the RingError of a broken queue. With the GIL.
    cdef int raise_broken(self) except -1

    # Move to another table of regions; `_memory`, which keeps it alive, is the caller's to set.
    cdef void move_c(self, const vr_move* to) noexcept nogil

    cdef int locate_rings(self, GuestMemory memory, uint8_t** rings) except -1
    cdef void place_rings(self, uint8_t* const* rings) noexcept nogil
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
