# Bytes that wait for a host end, in memory that outlives the process.
#
# The memory begins with a vr_store, and the bytes are in the ring behind it. How many were put in
# is recorded by the queue that they came from, in the step that books their chains as taken
# (`vr_keep`): no byte can be in both, or in neither. How many the end took is in the store's own
# record, as for a queue.

from libc.stdint cimport uint8_t

from vring._record cimport vr_record
from vring._segments cimport vr_backlog

# Looks how much is in it; `record`: of the queue that bytes come from, which may know of more, or
# NULL. Whatever others wrote there, it is within the memory.
cdef void store_settle(vr_backlog* backlog, vr_record* record) noexcept nogil


cdef class Backlog:
    cdef uint8_t[::1] area
    cdef vr_backlog backlog
    cdef void* holder               # the flow that has it, or NULL

    cdef int check_free(self) except -1
