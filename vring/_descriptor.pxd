# A descriptor that a flow reads, writes or is notified by, and the calls on it: none of them waits.

from libc.stdint cimport uint8_t, uint64_t

from vring._linux cimport (
    EINTR, EIO, FIONREAD, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, errno, ioctl, readv, recv,
    vr_receive, vr_send, writev
)
from vring._record cimport vr_record, vr_recorded_call
from vring._segments cimport vr_strip

cdef enum vr_fd_kind:
    FD_NONE                     # -1: bytes go nowhere
    FD_SOCKET
    FD_PIPE
    FD_TTY
    FD_OTHER                    # files, /dev/null, eventfds

cdef struct vr_fd:
    int number
    int kind                    # of vr_fd_kind
    bint blocking               # the description lacks O_NONBLOCK
    bint pollable               # epoll takes it; if not, it is always ready


cdef inline ssize_t put(
    const vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil:
    """Write a strip of `total` bytes; return the number of bytes taken, or -errno."""
    cdef ssize_t done
    if fd.kind == FD_NONE:
        return total
    while True:
        if fd.kind == FD_SOCKET and record != NULL:
            # A peer may write to the record: whatever it says now is within what was asked.
            done = min(<ssize_t>total, vr_recorded_call(
                record, False, fd.number, strip.at, strip.n, MSG_DONTWAIT | MSG_NOSIGNAL
            ))
        elif fd.kind == FD_SOCKET:
            done = vr_send(fd.number, strip.at, strip.n, MSG_DONTWAIT | MSG_NOSIGNAL)
        else:
            done = writev(fd.number, strip.at, strip.n)
        if done >= 0:
            return done
        if errno != EINTR:
            return -errno


cdef inline ssize_t get(const vr_fd* fd, const vr_strip* strip, vr_record* record) noexcept nogil:
    """Read into a strip; return the number of bytes, 0 at end of file, or -errno."""
    cdef ssize_t done
    while True:
        if fd.kind == FD_SOCKET and record != NULL:
            done = vr_recorded_call(record, True, fd.number, strip.at, strip.n, MSG_DONTWAIT)
        elif fd.kind == FD_SOCKET:
            done = vr_receive(fd.number, strip.at, strip.n, MSG_DONTWAIT)
        else:
            done = readv(fd.number, strip.at, strip.n)
        if done >= 0:
            return done
        if errno == EIO and fd.kind == FD_TTY:
            return 0            # how a terminal says that its other end is closed
        if errno != EINTR:
            return -errno


cdef inline ssize_t unread(const vr_fd* fd) noexcept nogil:
    """Return more than 0 if there are bytes to read, 0 at end of file, else -errno."""
    cdef uint8_t byte
    cdef ssize_t n
    cdef int waiting = 0
    if fd.kind == FD_SOCKET:
        n = recv(fd.number, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
        return n if n >= 0 else -errno
    return waiting if ioctl(fd.number, FIONREAD, &waiting) == 0 else -errno
