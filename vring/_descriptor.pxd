# A descriptor that a flow reads, writes or is notified by, and the calls on it, which never wait.
#
# With a record, a successor of this process finds out how many bytes went: see `_record.pxd`. The
# ways, by kind of descriptor:
#
#   socket          sendmmsg and recvmmsg store the length into the record
#   file            its position, if the open file outlives the process (`kept`)
#   pipe, terminal  all bytes go through a pipe that outlives the process (the relay), to the end or
#                   from it by splice: bytes that are no longer in the relay have gone
#
# Without one, and for everything else, bytes that are moved at the moment of a kill may be lost or
# doubled. Between two calls a relay holds only bytes that the end has not taken yet (`held`); for
# the guest those bytes have not gone, and they can be discarded.

from libc.stdint cimport uint64_t

from vring._record cimport vr_record
from vring._segments cimport vr_strip

cdef enum vr_fd_kind:
    FD_NONE                     # -1: bytes go nowhere
    FD_SOCKET
    FD_PIPE
    FD_TTY
    FD_FILE                     # a regular one
    FD_OTHER                    # /dev/null, eventfds

cdef struct vr_fd:
    int number
    int kind                    # of vr_fd_kind
    bint blocking               # the description lacks O_NONBLOCK
    bint pollable               # epoll takes it; if not, it is always ready
    bint appends                # the description has O_APPEND
    bint kept                   # the description outlives the process
    bint relayed                # there is a relay
    bint refused                # the kernel does not splice here, so the relay is not used
    int relay_out               # the relay's end to read from
    int relay_in                # the relay's end to write to
    uint64_t held               # bytes in the relay
    uint64_t most               # bytes that one call may move

# Describe a descriptor, whose number may be none. Raise LocalMisuseError, which begins with `what`.
# The first returns the file's type (S_IFMT), or 0 for -1.
cdef int describe(vr_fd* fd, object number, str what) except -1
cdef int describe_data(vr_fd* fd, object number, str what, bint kept, object relay) except -1

# Settle a call that a predecessor process left open in the record.
cdef void settle_call(const vr_fd* fd, vr_record* record, bint incoming) noexcept nogil
# Prepare for the first call: settle the record, if there is one, and find out what the relay holds;
# discard that unless it is for the guest.
cdef void begin_end(vr_fd* fd, vr_record* record, bint incoming) noexcept nogil
# Write or read a strip of `total` bytes; return the number of bytes moved (get: 0 at end of file),
# or -errno.
cdef ssize_t put(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil
cdef ssize_t get(
    vr_fd* fd, const vr_strip* strip, uint64_t total, vr_record* record
) noexcept nogil
# Return more than 0 if there are bytes to read, 0 at end of file, else -errno.
cdef ssize_t unread(const vr_fd* fd) noexcept nogil
# Discard the bytes in the relay, which the end has not taken.
cdef void discard_held(vr_fd* fd) noexcept nogil
