"""Calls on sockets whose lengths outlive the process: see `_record.pxd`.

A record says of one sequence of bytes how many of them a socket took or gave. The kernel writes the
length of a call into it, so that a process that is killed at any instruction leaves the right one.
"""

from __future__ import annotations

from libc.stdint cimport uint8_t, uint64_t

from vring._linux cimport MSG_DONTWAIT, MSG_NOSIGNAL, errno
from vring._record cimport (
    VR_BOOKED, VR_FDS_MAX, vr_record, vr_recorded_bytes, vr_recorded_call, vr_recorded_rights,
    vr_rights, vr_rights_fds, vr_set_record
)
from vring._wire cimport iovec

from vring.errors import LocalMisuseError


cdef vr_record* record_of(uint8_t[::1] view) except NULL:
    if view.shape[0] < <Py_ssize_t>sizeof(vr_record) or <size_t>&view[0] % 8:
        raise LocalMisuseError(f"a record has {sizeof(vr_record)} bytes, aligned to 8")
    return <vr_record*>&view[0]


cdef uint64_t length_of(const vr_record* record) noexcept nogil:
    """Bytes that went; once they are booked, the call's length is among them already."""
    return record.next_left if record.state == VR_BOOKED else vr_recorded_bytes(record)


cdef uint64_t number_of(const vr_record* record) noexcept nogil:
    return record.next_position if record.state == VR_BOOKED else record.position


cdef Py_ssize_t recorded_call(
    int fd, const uint8_t* data, size_t size, vr_record* record, bint receive,
    vr_rights* rights=NULL, size_t n_fds=0
) except -1:
    cdef iovec segment = iovec(iov_base=<void*>data, iov_len=size)
    cdef ssize_t moved
    cdef int error
    with nogil:
        vr_set_record(record, number_of(record), length_of(record))
        if n_fds:
            moved = vr_recorded_rights(
                record, fd, &segment, rights, n_fds, MSG_DONTWAIT | MSG_NOSIGNAL
            )
        else:
            moved = vr_recorded_call(record, receive, fd, &segment, 1, MSG_DONTWAIT | MSG_NOSIGNAL)
        error = errno
        vr_set_record(record, number_of(record), length_of(record))
    if moved < 0:
        raise OSError(error, "recvmmsg" if receive else "sendmmsg")
    return moved


def send_recorded(
    int fd, const uint8_t[::1] data not None, uint8_t[::1] record not None, fds=()
):
    """Send as much of `data` as fits, with descriptors beside its first byte; never waits.

    Args:
        fd: a connected socket, the caller's.
        data: 1 byte or more.
        record: RECORD_SIZE bytes, aligned to 8, of memory that outlives this process; gets the
            bytes sent added.
        fds: at most 253 descriptors; they stay the caller's, and go as soon as a byte goes.

    Returns:
        Bytes sent.

    Raises:
        BlockingIOError: there is no room.
        OSError: the connection is broken.
        LocalMisuseError: `record` cannot be one, or there are too many descriptors.
    """
    cdef vr_rights rights
    cdef size_t n = 0
    for beside in fds:
        if n == VR_FDS_MAX:
            raise LocalMisuseError(f"more than {VR_FDS_MAX} descriptors beside one message")
        vr_rights_fds(&rights)[n] = beside
        n += 1
    return recorded_call(fd, &data[0], data.shape[0], record_of(record), False, &rights, n)


def receive_recorded(int fd, uint8_t[::1] data not None, uint8_t[::1] record not None):
    """Receive as much as there is and `data` has room for; never waits.

    Descriptors beside the bytes are closed.

    Args:
        fd: a connected socket, the caller's.
        data: 1 byte or more; what was received is put there.
        record: as for `send_recorded`; gets the bytes received added.

    Returns:
        Bytes received; 0: the peer has gone.

    Raises:
        BlockingIOError: there is nothing.
        OSError: the connection is broken.
        LocalMisuseError: `record` cannot be one.
    """
    return recorded_call(fd, &data[0], data.shape[0], record_of(record), True)


def set_record(uint8_t[::1] record not None, uint64_t number, uint64_t length=0):
    """Begin to record another sequence of bytes, in one step for whoever comes after.

    Args:
        record: as for `send_recorded`.
        number: of the sequence.
        length: bytes of it that have gone already.

    Raises LocalMisuseError if `record` cannot be one.
    """
    vr_set_record(record_of(record), number, length)


def recorded(uint8_t[::1] record not None):
    """Return the number of the sequence, and how many bytes of it have gone.

    Raises LocalMisuseError if `record` cannot be one.
    """
    cdef vr_record* found = record_of(record)
    return number_of(found), length_of(found)
