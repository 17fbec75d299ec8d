# What the pump's thread waits for: descriptors in epoll, and who wants which of their events.

from libc.stdint cimport uint32_t

from vring._descriptor cimport vr_fd

cdef struct vr_watch:
    # one descriptor in epoll, for all its users: a socket may be read and written by two flows,
    # and queues may share a kick descriptor
    int fd                      # its owner's number
    int own                     # a duplicate, whatever becomes of that
    uint32_t events             # registered
    bint pollable
    vr_user* users

cdef struct vr_user:
    vr_watch* watch             # NULL: not watching
    vr_user* next
    vr_fd* fd                   # what is watched; -1: nothing
    uint32_t events             # of interest
    # for the one who handles events
    void* owner
    bint is_kick

cdef struct vr_watches:
    int epoll_fd
    vr_watch** table            # by their owners' numbers; those that were reused meanwhile are not
    uint32_t size

# Opens an epoll without descriptors; 0 or errno. Call watches_end in both cases.
cdef int watches_start(vr_watches* watches) noexcept nogil
# Without users.
cdef void watches_end(vr_watches* watches) noexcept nogil
# In a child of fork: closes every descriptor, and changes nothing in the parent's epoll.
cdef void watches_abandon(vr_watches* watches) noexcept nogil
# While a descriptor is watched, its number is the duplicate's.
cdef int start_watching(
    vr_watches* watches, vr_user* user, vr_fd* fd, uint32_t events
) noexcept nogil
cdef void unwatch(vr_watches* watches, vr_user* user) noexcept nogil
cdef int watch_update(vr_watches* watches, vr_watch* watch, bint anew) noexcept nogil
