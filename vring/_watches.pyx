"""Descriptors in epoll, each once for all who want its events.

Every descriptor is edge-triggered. Its user keeps whether it is ready.
"""

from __future__ import annotations

from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from vring._linux cimport (
    ENOMEM, EPERM, EPOLLET, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD,
    F_DUPFD_CLOEXEC, S_IFMT, S_IFREG, close, epoll_create1, epoll_ctl, epoll_event, errno, fcntl,
    fstat, stat_t, vr_same_file
)

cdef enum:
    FIRST_SIZE = 64             # numbers in the table before it has to grow


cdef int watches_start(vr_watches* watches) noexcept nogil:
    watches.size = FIRST_SIZE
    watches.table = <vr_watch**>calloc(FIRST_SIZE, sizeof(vr_watch*))
    watches.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    if watches.epoll_fd < 0:
        return errno
    return ENOMEM if watches.table == NULL else 0


cdef void watches_end(vr_watches* watches) noexcept nogil:
    if watches.epoll_fd >= 0:
        close(watches.epoll_fd)
    watches.epoll_fd = -1
    free(watches.table)
    watches.table = NULL


cdef void watches_abandon(vr_watches* watches) noexcept nogil:
    cdef uint32_t i
    for i in range(watches.size):
        if watches.table[i] != NULL:
            close(watches.table[i].own)
    watches_end(watches)


cdef int watch_update(vr_watches* watches, vr_watch* watch, bint anew) noexcept nogil:
    """Register the events that the users want, if they changed; return 0 or errno.

    `anew`: register in any case, to get an event with the current state.
    """
    cdef epoll_event event
    cdef vr_user* user = watch.users
    cdef uint32_t events = EPOLLET
    cdef int operation = EPOLL_CTL_MOD if watch.events else EPOLL_CTL_ADD
    while user != NULL:
        events |= user.events
        user = user.next
    if not watch.pollable or (events == watch.events and not anew):
        return 0
    event.events = events
    event.data.ptr = watch
    if epoll_ctl(watches.epoll_fd, operation, watch.own, &event):
        if errno != EPERM:
            return errno
        watch.pollable = False      # a regular file or the like, which is always ready
    watch.events = events
    return 0


cdef int watch_of(vr_watches* watches, int fd, vr_watch** found) noexcept nogil:
    """Find or make the watch of a descriptor; return 0 or errno.

    A watch has a duplicate that nobody else can close: otherwise epoll would keep reporting a file
    whose number was closed or reused, as long as any process has the file open.
    """
    cdef uint32_t size = watches.size
    cdef vr_watch** bigger
    cdef vr_watch* watch
    cdef int error
    if <uint32_t>fd >= size:
        while <uint32_t>fd >= size:
            size *= 2
        bigger = <vr_watch**>realloc(watches.table, size * sizeof(vr_watch*))
        if bigger == NULL:
            return ENOMEM
        memset(bigger + watches.size, 0, (size - watches.size) * sizeof(vr_watch*))
        watches.table = bigger
        watches.size = size
    watch = watches.table[fd]
    if watch != NULL and vr_same_file(watch.own, fd):
        found[0] = watch
        return 0
    watch = <vr_watch*>calloc(1, sizeof(vr_watch))
    if watch == NULL:
        return ENOMEM
    watch.fd = fd
    watch.own = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    watch.pollable = True
    if watch.own < 0:
        error = errno
        free(watch)
        return error
    found[0] = watches.table[fd] = watch
    return 0


cdef void unwatch(vr_watches* watches, vr_user* user) noexcept nogil:
    """End a user's interest. Not to be called while events are being processed."""
    cdef vr_watch* watch = user.watch
    cdef vr_user** link
    if watch == NULL:
        return
    user.watch = NULL
    user.fd.number = -1
    link = &watch.users
    while link[0] != user:
        link = &link[0].next
    link[0] = user.next
    if watch.users != NULL:
        watch_update(watches, watch, False)
        return
    if watches.table[watch.fd] == watch:
        watches.table[watch.fd] = NULL
    if watch.pollable and watch.events:
        epoll_ctl(watches.epoll_fd, EPOLL_CTL_DEL, watch.own, NULL)
    close(watch.own)
    free(watch)


cdef int start_watching(
    vr_watches* watches, vr_user* user, vr_fd* fd, uint32_t events
) noexcept nogil:
    """Watch a user's descriptor; return 0 or errno. -1 is never ready and not watched.

    A file is not watched either: it is always ready, and closing a duplicate may wait for its disk.
    """
    cdef stat_t status
    cdef int error
    user.watch = NULL
    user.fd = fd
    user.events = events
    if fd.number < 0:
        return 0
    if fstat(fd.number, &status):
        return errno
    if status.st_mode & S_IFMT == S_IFREG:
        return 0
    error = watch_of(watches, fd.number, &user.watch)
    if error:
        return error
    fd.number = user.watch.own
    user.next = user.watch.users
    user.watch.users = user
    error = watch_update(watches, user.watch, False)
    if error:
        unwatch(watches, user)
    return error
