"""System calls that move bytes to and from descriptors, each in the way that its kind allows."""

from __future__ import annotations

import os

from libc.stdint cimport int64_t, uint8_t, uint32_t

from vring._linux cimport (
    EINTR, EINVAL, EIO, FIONREAD, F_GETFL, F_GETPIPE_SZ, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK,
    O_APPEND, O_NONBLOCK, SEEK_CUR, SEEK_END, SOCK_STREAM, SOL_SOCKET, SO_TYPE, SPLICE_F_NONBLOCK,
    S_IFCHR, S_IFIFO, S_IFMT, S_IFREG, S_IFSOCK, errno, fcntl, fstat, getsockopt, ioctl, isatty,
    lseek, read, readv, recv, splice, stat_t, vr_receive, vr_send, writev
)
from vring._record cimport (
    VR_FILE, VR_RELAY, vr_is_open, vr_moved, vr_open_record, vr_recorded_call
)
from vring.errors import LocalMisuseError

cdef enum:
    # What a terminal gives at once; splice allocates pages for all that it is asked for.
    TTY_BYTES = 4096


cdef int describe(vr_fd* fd, object number, str what) except -1:
    """Find out the kind of a descriptor; raise LocalMisuseError if the number is none."""
    cdef stat_t status
    fd.number = number
    fd.kind = FD_NONE
    fd.pollable = False
    fd.blocking = False
    if fd.number < 0:
        return 0
    cdef int flags = fcntl(fd.number, F_GETFL)
    if flags < 0 or fstat(fd.number, &status):
        raise LocalMisuseError(f"{what} {number}: {os.strerror(errno)}")
    fd.blocking = not flags & O_NONBLOCK
    fd.appends = flags & O_APPEND != 0
    cdef uint32_t kind = status.st_mode & S_IFMT
    if kind == S_IFSOCK:
        fd.kind = FD_SOCKET
    elif kind == S_IFIFO:
        fd.kind = FD_PIPE
    elif kind == S_IFCHR and isatty(fd.number):
        fd.kind = FD_TTY
    elif kind == S_IFREG:
        fd.kind = FD_FILE
    else:
        fd.kind = FD_OTHER
    return kind


cdef int describe_relay(vr_fd* fd, object relay) except -1:
    cdef vr_fd end
    for number in relay:
        if describe(&end, number, "relay") != S_IFIFO or end.blocking:
            raise LocalMisuseError(f"relay {number} is no pipe, or it is blocking")
    fd.relay_out, fd.relay_in = relay
    fd.relayed = True
    return 0


cdef int describe_data(vr_fd* fd, object number, str what, bint kept, object relay) except -1:
    cdef int type = 0
    cdef uint32_t size = sizeof(type)
    describe(fd, number, what)
    fd.kept = kept
    if relay is not None and fd.kind in (FD_PIPE, FD_TTY):
        describe_relay(fd, relay)
    if fd.kind == FD_SOCKET:
        getsockopt(fd.number, SOL_SOCKET, SO_TYPE, &type, &size)
        if type != SOCK_STREAM:
            raise LocalMisuseError(f"{what} {number} is a socket, but not a stream")
    return 0


cdef int waiting_in(const vr_fd* fd) noexcept nogil:
    """Return how many bytes the relay holds."""
    cdef int waiting = 0
    return waiting if ioctl(fd.relay_out, FIONREAD, &waiting) == 0 else 0


cdef int64_t moved_of(const vr_fd* fd, const vr_record* record, bint incoming) noexcept nogil:
    """Return how many bytes the call moved that the record has open."""
    cdef int64_t begun = <int64_t>record.next_position, asked = <int64_t>record.next_left, now
    if record.state == VR_RELAY:
        return asked - waiting_in(fd) if fd.relayed else 0
    if fd.kind != FD_FILE or not fd.kept:
        return 0
    now = lseek(fd.number, 0, SEEK_CUR)
    if now < begun and not incoming:
        return min(now, asked)      # somebody has cut the file off meanwhile
    return min(now - begun, asked)  # or has appended to it


cdef void settle_call(const vr_fd* fd, vr_record* record, bint incoming) noexcept nogil:
    if vr_is_open(record):
        vr_moved(record, <ssize_t>min(moved_of(fd, record, incoming), <int64_t>0x7FFFFFFF))


cdef void begin_end(vr_fd* fd, vr_record* record, bint incoming) noexcept nogil:
    cdef int64_t capacity
    fd.most = <uint64_t>-1
    fd.held = 0
    if record != NULL:
        settle_call(fd, record, incoming)
    if not fd.relayed:
        return
    capacity = fcntl(fd.relay_in, F_GETPIPE_SZ)
    fd.most = capacity if capacity > 0 else TTY_BYTES
    if incoming and fd.kind == FD_TTY:
        fd.most = TTY_BYTES
    fd.held = waiting_in(fd)
    if not incoming:
        discard_held(fd)


cdef void discard_held(vr_fd* fd) noexcept nogil:
    cdef uint8_t[4096] sink
    while fd.held and read(fd.relay_out, sink, sizeof(sink)) > 0:
        fd.held -= min(fd.held, <uint64_t>sizeof(sink))
    fd.held = 0


# --- ways to write

cdef ssize_t put_plainly(const vr_fd* fd, const vr_strip* strip) noexcept nogil:
    if fd.kind == FD_SOCKET:
        return vr_send(fd.number, strip.at, strip.n, MSG_DONTWAIT | MSG_NOSIGNAL)
    return writev(fd.number, strip.at, strip.n)


cdef ssize_t put_into_file(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil:
    cdef ssize_t done
    cdef int64_t position = lseek(fd.number, 0, SEEK_END if fd.appends else SEEK_CUR)
    vr_open_record(record, VR_FILE, position, total)
    done = writev(fd.number, strip.at, strip.n)
    vr_moved(record, done)
    return done


cdef ssize_t put_through_relay(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil:
    """Fill the relay, if it is empty, and pass on what the end takes of it."""
    cdef ssize_t done
    if not fd.held:
        done = writev(fd.relay_in, strip.at, strip.n)
        if done <= 0:
            return done
        fd.held = done
    vr_open_record(record, VR_RELAY, 0, fd.held)
    done = splice(
        fd.relay_out, NULL, fd.number, NULL, min(total, fd.held), SPLICE_F_NONBLOCK
    )
    vr_moved(record, done)
    if done > 0:
        fd.held -= done
    elif done < 0 and errno == EINVAL:
        fd.refused = True
        discard_held(fd)
        return put_plainly(fd, strip)
    return done


cdef ssize_t put(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil:
    cdef ssize_t done
    if fd.kind == FD_NONE:
        return total
    while True:
        if record == NULL:
            done = put_plainly(fd, strip)
        elif fd.kind == FD_SOCKET:
            done = vr_recorded_call(
                record, False, fd.number, strip.at, strip.n, MSG_DONTWAIT | MSG_NOSIGNAL
            )
        elif fd.relayed and not fd.refused:
            done = put_through_relay(fd, strip, total, record)
        elif fd.kind == FD_FILE and fd.kept:
            done = put_into_file(fd, strip, total, record)
        else:
            done = put_plainly(fd, strip)
        if done >= 0:
            # A peer may write to the record, and a driver has changed what it offered: whatever
            # they say now is within what was asked.
            return min(<ssize_t>total, done)
        if errno != EINTR:
            return -errno


# --- ways to read

cdef ssize_t get_plainly(const vr_fd* fd, const vr_strip* strip) noexcept nogil:
    if fd.kind == FD_SOCKET:
        return vr_receive(fd.number, strip.at, strip.n, MSG_DONTWAIT)
    return readv(fd.number, strip.at, strip.n)


cdef ssize_t get_from_file(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil:
    cdef ssize_t done
    vr_open_record(record, VR_FILE, lseek(fd.number, 0, SEEK_CUR), total)
    done = readv(fd.number, strip.at, strip.n)
    vr_moved(record, done)
    return done


cdef ssize_t get_through_relay(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil:
    """Fill the relay, if it is empty, with no more than there is room for, and read from it."""
    cdef ssize_t done
    if not fd.held:
        done = splice(
            fd.number, NULL, fd.relay_in, NULL, min(total, fd.most), SPLICE_F_NONBLOCK
        )
        if done < 0 and errno == EINVAL:
            fd.refused = True
            return get_plainly(fd, strip)
        if done <= 0:
            return done
        fd.held = done
    vr_open_record(record, VR_RELAY, 0, fd.held)
    done = readv(fd.relay_out, strip.at, strip.n)
    vr_moved(record, done)
    if done > 0:
        fd.held -= done
    return done


cdef ssize_t get(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil:
    cdef ssize_t done
    while True:
        if record == NULL:
            done = get_plainly(fd, strip)
        elif fd.kind == FD_SOCKET:
            done = vr_recorded_call(record, True, fd.number, strip.at, strip.n, MSG_DONTWAIT)
        elif fd.relayed and (fd.held or not fd.refused):
            done = get_through_relay(fd, strip, total, record)
        elif fd.kind == FD_FILE and fd.kept:
            done = get_from_file(fd, strip, total, record)
        else:
            done = get_plainly(fd, strip)
        if done >= 0:
            return min(<ssize_t>total, done)
        if errno == EIO and fd.kind == FD_TTY:
            return 0            # how a terminal says that its other end is closed
        if errno != EINTR:
            return -errno


cdef ssize_t unread(const vr_fd* fd) noexcept nogil:
    cdef uint8_t byte
    cdef ssize_t n
    cdef int waiting = 0
    if fd.held:
        return fd.held
    if fd.kind == FD_SOCKET:
        n = recv(fd.number, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
        return n if n >= 0 else -errno
    return waiting if ioctl(fd.number, FIONREAD, &waiting) == 0 else -errno
