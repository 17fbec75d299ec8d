# The driver's side of virtqueues: what both layouts have.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vring._memory cimport GuestMemory

cdef struct vr_buffer:
    uint64_t address
    uint32_t length
    uint32_t flags              # DESC_F_WRITE or 0


cdef class Driver:
    cdef readonly GuestMemory memory
    cdef readonly str name
    cdef readonly uint32_t size
    cdef readonly uint32_t num_free
    cdef readonly bint event_idx
    cdef readonly bint indirect
    cdef readonly bint in_order
    cdef uint16_t* descriptors      # per head in flight, how many descriptors its chain has, else 0
    cdef uint32_t* writable         # per head in flight, bytes of its device-writable part
    cdef uint16_t* order            # with IN_ORDER: heads in flight, a ring of `size`
    cdef uint32_t oldest            # where in it the oldest is
    cdef uint32_t youngest          # and where the next goes
    cdef uint32_t flying            # chains in flight
    cdef vr_buffer* scratch         # of add, `size` entries; NULL while it is in use

    cdef uint64_t check_number(self, object value, uint64_t most, str what) except? 0
    cdef object check_numbers(self, object values, object kind, uint64_t most, str what)
    cdef uint32_t read_buffers(
        self, object pairs, vr_buffer* buffers, uint32_t n, uint32_t flags
    ) except? 0
    cdef void note(self, uint16_t head, uint32_t descriptors, uint32_t writable) noexcept nogil
    cdef uint8_t* locate(self, uint64_t address, uint64_t length, uint64_t align) except NULL
    cdef int batch_size(self, uint32_t head) except -1
    cdef tuple collect(self, Py_ssize_t limit)
    # What a layout implements. put_one, put_chain: write a chain (into the indirect table, if there
    # is one) and return its head. next_element: get the next used element; return 0 if there is
    # none. take_back: take back the oldest chain of a batch.
    cdef uint16_t put_one(self, uint64_t address, uint32_t length, uint32_t flags) noexcept nogil
    cdef uint16_t put_chain(
        self, const vr_buffer* buffers, uint32_t n, uint64_t table_at, uint8_t* table
    ) noexcept nogil
    cdef bint next_element(self, uint32_t* head, uint32_t* length) except -1
    cdef void take_back(self, uint16_t head) noexcept nogil
    cdef void restart(self) noexcept
