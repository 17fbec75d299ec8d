# What the pump's thread waits for: descriptors in epoll, and the users of their events.

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
    # for the code that handles the events
    void* owner
    bint is_kick

cdef struct vr_watches:
    int epoll_fd
    vr_watch** table            # by their owners' numbers; those that were reused meanwhile are not
    uint32_t size

# Open an epoll without descriptors; return 0 or errno. Call watches_end in both cases.
cdef int watches_start(vr_watches* watches) noexcept nogil
# Close the epoll. There must be no users.
cdef void watches_end(vr_watches* watches) noexcept nogil
# In a child of fork: close every descriptor, without an effect on the parent's epoll.
cdef void watches_abandon(vr_watches* watches) noexcept nogil
# Watch a descriptor for events; return 0 or errno. Meanwhile fd.number is that of a duplicate.
cdef int start_watching(
    vr_watches* watches, vr_user* user, vr_fd* fd, uint32_t events
) noexcept nogil
# End a user's interest; fd.number becomes -1. Not while events are being processed.
cdef void unwatch(vr_watches* watches, vr_user* user) noexcept nogil
# Register the events that the users want now; return 0 or errno. `anew`: in any case, which brings
# an event with the current state.
cdef int watch_update(vr_watches* watches, vr_watch* watch, bint anew) noexcept nogil
