"""Kicks and calls that cannot block, whatever the peer does to the descriptor.

A peer's eventfd is shared with the peer: it can clear O_NONBLOCK and fill the counter at any time,
between any check and the write after it, and the write would then wait for ever. Signalling by the
completion of an asynchronous read never waits; and the read need not succeed.
"""

from __future__ import annotations

import os

from libc.stdint cimport uint64_t

from vring._linux cimport (
    EOPNOTSUPP, ENOTSOCK, MSG_DONTWAIT, MSG_NOSIGNAL, POLLOUT, errno, poll, pollfd, send, write
)

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/aio_abi.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The start of a context's memory, which the kernel shares with us. */
    struct vr_aio_ring {
        unsigned id, count, head, tail, magic, compatible, incompatible, header;
    };

    enum { VR_AIO_EVENTS = 64, VR_AIO_MAGIC = 0xa10a10a1 };

    static aio_context_t vr_aio;        /* 0: none yet */
    static int vr_aio_owner;            /* a context is not its process's child's */
    static int vr_aio_missing;

    static aio_context_t vr_aio_context(void) {
        aio_context_t made = 0, none = 0, now = __atomic_load_n(&vr_aio, __ATOMIC_ACQUIRE);
        const struct vr_aio_ring *ring;
        if (now || __atomic_load_n(&vr_aio_missing, __ATOMIC_RELAXED))
            return now;
        if (syscall(SYS_io_setup, VR_AIO_EVENTS, &made)) {
            __atomic_store_n(&vr_aio_missing, 1, __ATOMIC_RELAXED);
            return 0;
        }
        ring = (const struct vr_aio_ring *)made;
        if (ring->magic != (unsigned)VR_AIO_MAGIC || ring->incompatible) {
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
        struct iocb operation, *operations[1] = {&operation};
        for (int attempt = 0; attempt < 2; attempt++) {
            aio_context_t context = vr_aio_context();
            struct vr_aio_ring *ring = (struct vr_aio_ring *)context;
            if (!context)
                return ENOSYS;
            memset(&operation, 0, sizeof operation);
            operation.aio_lio_opcode = IOCB_CMD_PREAD;
            operation.aio_fildes = fd;          /* an eventfd gives no less than 8 bytes, */
            operation.aio_nbytes = 0;           /* so this fails at once */
            operation.aio_flags = IOCB_FLAG_RESFD;
            operation.aio_resfd = fd;
            if (syscall(SYS_io_submit, context, 1L, operations) == 1) {
                /* What completed is not looked at; threads may undo each other's step here, and
                   the next one makes it good. */
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
    """For descriptors of our own, and where there is no better way: a peer that fills its eventfd
    in between, and made it blocking, stops us.
    """
    cdef pollfd room = pollfd(fd=fd, events=POLLOUT, revents=0)
    if poll(&room, 1, 0) == 1 and room.revents & POLLOUT:
        write(fd, &ONE, sizeof(ONE))


cdef void notify_eventfd(int fd) noexcept nogil:
    if vr_aio_signal(fd):
        write_if_room(fd)


cdef bint notify_socket(int fd) noexcept nogil:
    return send(fd, &ONE, sizeof(ONE), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 or errno != ENOTSOCK


cdef void notify_any(int fd) noexcept nogil:
    """Eight bytes to an eventfd, a socket or a pipe."""
    if vr_aio_signal(fd) and not notify_socket(fd):
        write_if_room(fd)


def notify(int fd):
    """Write the 8 bytes of a kick or call to an eventfd, a socket or a pipe; never waits.

    One that is full has told already. One that is broken is the peer's own doing, and that the peer
    has gone is noticed elsewhere.
    """
    with nogil:
        notify_any(fd)


def drain(int fd):
    """Read what a kick or call wrote; never waits.

    Returns:
        True if it read something, None if there is nothing, False if there will never be: at the
        end of a pipe or socket, or on an error.
    """
    buffer = bytearray(8)
    try:
        return os.preadv(fd, [buffer], -1, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno != EOPNOTSUPP:
            return False
    try:
        # An old kernel's, or a pipe of our own.
        return len(os.read(fd, 8)) > 0
    except BlockingIOError:
        return None
    except OSError:
        return False
