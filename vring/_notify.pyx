"""Kicks and calls that cannot block, whatever the peer does to the descriptor.

An eventfd is shared with the peer, which can clear O_NONBLOCK and fill the counter at any time,
also between a check and the write after it; the write would then block for ever. The completion of
an asynchronous read signals an eventfd without ever blocking, and the read need not succeed.

A descriptor number may refer to another file after any system call (a frontend sends another call
descriptor while its ring runs). So each kind is tried with a call that refuses the other kinds and
never blocks, and nothing is written to a file that is neither an eventfd nor a socket.
"""

from __future__ import annotations

import enum
import os

from libc.stdint cimport uint64_t

from vring._linux cimport (
    EINVAL, ENOSYS, ENOTSOCK, EOPNOTSUPP, F_DUPFD_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, POLLOUT,
    S_IFMT, close, errno, fcntl, fstat, poll, pollfd, send, stat_t, write
)

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/aio_abi.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The start of a context's memory, which the kernel shares with the process. */
    struct vr_aio_ring {
        unsigned id, count, head, tail, magic, compatible, incompatible, header;
    };

    enum { VR_AIO_EVENTS = 64, VR_AIO_MAGIC = 0xa10a10a1 };

    static aio_context_t vr_aio;        /* 0: none yet */
    static int vr_aio_owner;            /* pid: a child does not inherit the context */
    static int vr_aio_missing;

    /* Submit an asynchronous read that fails at once and signals `event`. */
    static int vr_aio_submit(aio_context_t context, int event) {
        struct iocb operation, *operations[1] = {&operation};
        memset(&operation, 0, sizeof operation);
        operation.aio_lio_opcode = IOCB_CMD_PREAD;
        operation.aio_fildes = event;       /* an eventfd gives no less than 8 bytes, */
        operation.aio_nbytes = 0;           /* so this fails at once */
        operation.aio_flags = IOCB_FLAG_RESFD;
        operation.aio_resfd = event;
        return syscall(SYS_io_submit, context, 1L, operations) == 1;
    }

    /* Return whether the kernel can do it: kernels before 5.8 cannot read eventfds this way. */
    static int vr_aio_suits(aio_context_t context) {
        const struct vr_aio_ring *ring = (const struct vr_aio_ring *)context;
        int event, suits;
        if (ring->magic != (unsigned)VR_AIO_MAGIC || ring->incompatible)
            return 0;
        event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        suits = event < 0 || vr_aio_submit(context, event);
        if (event >= 0)
            close(event);
        return suits;
    }

    static aio_context_t vr_aio_context(void) {
        aio_context_t made = 0, none = 0, now = __atomic_load_n(&vr_aio, __ATOMIC_ACQUIRE);
        if (now || __atomic_load_n(&vr_aio_missing, __ATOMIC_RELAXED))
            return now;
        if (syscall(SYS_io_setup, VR_AIO_EVENTS, &made)) {
            /* EAGAIN: the system's limit of contexts is reached, which can change. */
            __atomic_store_n(&vr_aio_missing, errno != EAGAIN, __ATOMIC_RELAXED);
            return 0;
        }
        if (!vr_aio_suits(made)) {
            syscall(SYS_io_destroy, made);
            __atomic_store_n(&vr_aio_missing, 1, __ATOMIC_RELAXED);
            return 0;
        }
        vr_aio_owner = getpid();
        if (!__atomic_compare_exchange_n(&vr_aio, &none, made, 0, __ATOMIC_ACQ_REL,
                                         __ATOMIC_ACQUIRE)) {
            syscall(SYS_io_destroy, made);      /* another thread was faster */
            return none;
        }
        return made;
    }

    /* 0, or errno: EINVAL if it is no eventfd, ENOSYS if there is no way. */
    static int vr_aio_signal(int fd) {
        for (int attempt = 0; attempt < 4; attempt++) {
            aio_context_t context = vr_aio_context();
            struct vr_aio_ring *ring = (struct vr_aio_ring *)context;
            if (!context)
                return ENOSYS;
            if (vr_aio_submit(context, fd)) {
                /* Completions are discarded unread. Threads may undo each other's store here; the
                   next one repairs that. */
                __atomic_store_n(&ring->head, __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE),
                                 __ATOMIC_RELEASE);
                return 0;
            }
            if (errno == EAGAIN)
                __atomic_store_n(&ring->head, __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE),
                                 __ATOMIC_RELEASE);
            else if (errno == EINVAL && getpid() != vr_aio_owner)
                __atomic_store_n(&vr_aio, 0, __ATOMIC_RELEASE);
            else
                return errno;
        }
        return ENOSYS;
    }
    """
    int vr_aio_signal(int fd) nogil

cdef uint64_t ONE = 1


cdef void write_if_room(int fd) noexcept nogil:
    """Write to an eventfd if it has room, on kernels without a call that never blocks.

    A peer that fills its blocking eventfd between check and write blocks the caller.
    """
    cdef int own = fcntl(fd, F_DUPFD_CLOEXEC, 0)    # what it is may not change meanwhile
    cdef pollfd room = pollfd(fd=own, events=POLLOUT, revents=0)
    cdef stat_t status
    if own < 0:
        return
    # Pipes, files and terminals have a type, and are not written to.
    if fstat(own, &status) == 0 and status.st_mode & S_IFMT == 0:
        if poll(&room, 1, 0) == 1 and room.revents & POLLOUT:
            write(own, &ONE, sizeof(ONE))
    close(own)


cdef bint notify_socket(int fd) noexcept nogil:
    """Notify through a socket; return False if `fd` is not one."""
    return send(fd, &ONE, sizeof(ONE), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 or errno != ENOTSOCK


cdef bint notify_any(int fd, bint is_socket) noexcept nogil:
    cdef int error
    for _ in range(2):              # what it was meanwhile, it may be no more
        if is_socket and notify_socket(fd):
            return True
        error = vr_aio_signal(fd)
        if error != EINVAL:
            if error == ENOSYS and not notify_socket(fd):
                write_if_room(fd)
            return False
        is_socket = True
    return False


class Drained(enum.Enum):
    """Result of `drain`."""

    READ = "read"       # a kick or call, which is read now
    EMPTY = "empty"     # none so far
    ENDED = "ended"     # none, now or later: the end of a pipe or socket, or an error


def notify(int fd):
    """Write the 8 bytes of a kick or call to an eventfd or a socket; never waits (2.3).

    A full descriptor is readable already. A broken one or one of another kind is ignored: a peer
    that left is noticed elsewhere.

    Args:
        fd: descriptor number, owned by the caller; any number is allowed.
    """
    with nogil:
        notify_any(fd, False)


def drain(int fd):
    """Read what a kick or call wrote; never waits, except for a blocking eventfd of an old kernel.

    Args:
        fd: descriptor number, owned by the caller; any number is allowed.

    Returns:
        A `Drained`. Compare it with a member: every member is true.
    """
    buffer = bytearray(8)
    try:
        return Drained.READ if os.preadv(fd, [buffer], -1, os.RWF_NOWAIT) else Drained.ENDED
    except BlockingIOError:
        return Drained.EMPTY
    except OSError as error:
        if error.errno != EOPNOTSUPP:
            return Drained.ENDED
    try:
        # An eventfd on an old kernel, or a pipe of our own.
        return Drained.READ if os.read(fd, 8) else Drained.ENDED
    except BlockingIOError:
        return Drained.EMPTY
    except OSError:
        return Drained.ENDED
