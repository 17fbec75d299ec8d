# Strips of segments to move to or from a descriptor, and backlogs of bytes that wait for one:
# arithmetic on memory, without system calls. Inline, since every batch uses both.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from vring._linux cimport IOV_MAX
from vring._record cimport vr_set_record, vr_store
from vring._wire cimport iovec, vr_copy

cdef struct vr_strip:
    # segments still to be moved
    iovec* at
    uint32_t n
    iovec* cut                  # the segment that strip_cut shortened, or NULL
    size_t cut_length           # its length before

cdef struct vr_backlog:
    # a ring of bytes to write before anything from the queue
    uint8_t* data               # NULL until there is something to keep
    size_t capacity
    size_t head
    size_t length
    vr_store* store             # of one that outlives the process, else NULL


# --- strips

cdef inline void strip_skip(vr_strip* strip, uint64_t length) noexcept nogil:
    """Skip the first bytes of the strip."""
    while strip.n and length >= strip.at.iov_len:
        length -= strip.at.iov_len
        strip.at += 1
        strip.n -= 1
    if length and strip.n:
        strip.at.iov_base = <uint8_t*>strip.at.iov_base + length
        strip.at.iov_len -= length


cdef inline uint64_t strip_cut(vr_strip* strip, uint64_t total, uint64_t most) noexcept nogil:
    """Cut the strip to `most` bytes and to what one system call takes; return its bytes."""
    cdef uint64_t left = most
    cdef uint32_t i
    strip.cut = NULL
    if strip.n <= IOV_MAX and total <= most:
        return total
    strip.n = min(strip.n, <uint32_t>IOV_MAX)
    for i in range(strip.n):
        if strip.at[i].iov_len >= left:
            strip.cut = &strip.at[i]
            strip.cut_length = strip.at[i].iov_len
            strip.at[i].iov_len = left
            strip.n = i + 1
            return most
        left -= strip.at[i].iov_len
    return most - left


cdef inline void strip_mend(vr_strip* strip) noexcept nogil:
    """Undo the change of strip_cut to the table."""
    if strip.cut != NULL:
        strip.cut.iov_len = strip.cut_length


cdef inline uint64_t strip_copy(const vr_strip* strip, uint8_t* to, uint64_t most) noexcept nogil:
    """Copy up to `most` bytes of the strip; return the number of bytes."""
    cdef uint64_t done = 0, there
    cdef uint32_t i
    for i in range(strip.n):
        there = min(<uint64_t>strip.at[i].iov_len, most - done)
        vr_copy(to + done, strip.at[i].iov_base, there)
        done += there
    return done


# --- the backlog

cdef inline int backlog_init(
    vr_backlog* backlog, const uint8_t* data, size_t length, size_t capacity
) noexcept nogil:
    """Make a backlog that starts with `data`; return -1 without memory."""
    backlog.data = NULL
    backlog.capacity = max(capacity, length)
    backlog.head = 0
    backlog.length = 0
    backlog.store = NULL
    if length:
        backlog.data = <uint8_t*>malloc(backlog.capacity)
        if backlog.data == NULL:
            return -1
        memcpy(backlog.data, data, length)
        backlog.length = length
    return 0


cdef inline size_t backlog_add(
    vr_backlog* backlog, const uint8_t* data, size_t length
) noexcept nogil:
    """Append as much as there is room for; return the bytes taken."""
    cdef size_t tail, first
    if backlog.data == NULL and backlog.capacity:
        backlog.data = <uint8_t*>malloc(backlog.capacity)
    if backlog.data == NULL:
        return 0
    length = min(length, backlog.capacity - backlog.length)
    tail = (backlog.head + backlog.length) % backlog.capacity
    first = min(length, backlog.capacity - tail)
    memcpy(backlog.data + tail, data, first)
    memcpy(backlog.data, data + first, length - first)
    backlog.length += length
    return length


cdef inline void backlog_drop(vr_backlog* backlog, size_t length) noexcept nogil:
    """Drop the oldest bytes; free the memory with the last, so that idle ports hold none."""
    backlog.length -= length
    backlog.head = (backlog.head + length) % backlog.capacity
    if backlog.store != NULL:
        vr_set_record(&backlog.store.record, 0, backlog.store.record.left + length)
    elif backlog.length == 0:
        free(backlog.data)
        backlog.data = NULL
        backlog.head = 0


cdef inline void backlog_cut(vr_backlog* backlog, size_t length) noexcept nogil:
    """Drop all but the oldest `length` bytes."""
    backlog.length = length
    if backlog.store == NULL:
        backlog_drop(backlog, 0)


cdef inline uint32_t backlog_segments(const vr_backlog* backlog, iovec* segments) noexcept nogil:
    """Describe the backlog as one segment, or two if it wraps around; return their number."""
    cdef size_t first = min(backlog.length, backlog.capacity - backlog.head)
    segments[0].iov_base = backlog.data + backlog.head
    segments[0].iov_len = first
    segments[1].iov_base = backlog.data
    segments[1].iov_len = backlog.length - first
    return 1 if first == backlog.length else 2
