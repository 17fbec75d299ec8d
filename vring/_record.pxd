# The record of a queue and its flow, in memory that outlives the process: the position of the ring,
# and how many bytes beyond it a host end has taken or given.
#
# The kernel stores the result of sendmmsg and recvmmsg into the record within the call, so a kill
# cannot come between the bytes and their record. For other ends the result is in something else
# that outlives the process: the position of an open file, or the rest in a pipe through which all
# bytes go (the relay, see `_descriptor.pxd`). Every other step is one store, which has happened or
# not, and a successor may repeat what follows from each state:
#
#   state    what is known                                          a successor
#   IDLE     the ring is at `position`, and `left` bytes of the     continues there
#            chains from there on have been taken (or given)
#   CALL     the same, and `call.msg_len` bytes more, unless that   settles left + msg_len bytes
#            is UNSET: then the call has not happened
#   FILE     as IDLE, and a call on an open file that was at        compares the file's position;
#            `next_position`, for at most `next_left` bytes         as CALL
#   RELAY    as IDLE, and a call on a relay that held               compares what the relay holds;
#            `next_left` bytes                                      as CALL
#   BOOKED   chains up to `next_position` are to be published,      checks the ring: if they are
#            `next_left` bytes remain after them                    published, IDLE at
#                                                                   next_position, else as CALL
#
# Only the order of the program matters: a reader of the record has waited for the writer's end.

from libc.stdint cimport uint32_t, uint64_t

from vring._walk cimport vr_chain
from vring._wire cimport iovec

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <stddef.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    enum { VR_IDLE, VR_CALL, VR_BOOKED, VR_FILE, VR_RELAY };
    #define VR_UNSET UINT32_MAX

    /* The kernel follows the pointers of call.msg_hdr: where a peer can write to a record, the
       part from call.msg_len on is in its memory and what is before is not (SharedRecords). */
    typedef struct {
        struct mmsghdr call;
        uint64_t state;
        uint64_t position;          /* used index; packed: with the wrap counter in bit 15 */
        uint64_t left;
        uint64_t next_position;
        uint64_t next_left;
        uint64_t kept;              /* bytes that were put into a backlog in all, */
        uint64_t next_kept;
        uint64_t kept_in;           /* and the backlog's number */
    } vr_record;
    enum { VR_RECORD_PRIVATE = offsetof(vr_record, call.msg_len) };
    _Static_assert(VR_RECORD_PRIVATE % 8 == 0, "a record is aligned to 8");
    _Static_assert(sizeof(vr_record) == 128, "the layout is shared with other versions");

    #define vr_in_order() __asm__ __volatile__("" ::: "memory")

    /* Bytes that wait for a host end, in memory that outlives the process: see `_backlog.pxd`. */
    typedef struct {
        vr_record record;           /* `left`: bytes that the end took in all */
        uint64_t added;             /* bytes put in, in all, unless a queue's record has more */
        uint64_t number;            /* another one for each backlog */
        uint64_t unused[14];
    } vr_store;
    _Static_assert(sizeof(vr_store) == 256, "the layout is shared with other versions");

    static inline void vr_book_kept(
        vr_record *record, uint64_t position, uint64_t left, uint64_t kept
    ) {
        record->next_position = position;
        record->next_left = left;
        record->next_kept = kept;
        vr_in_order();
        record->state = VR_BOOKED;
        vr_in_order();
    }

    /* Announce the chains that are about to be published. */
    static inline void vr_book(vr_record *record, uint64_t position, uint64_t left) {
        vr_book_kept(record, position, left, record->kept);
    }

    /* Record that they are published. */
    static inline void vr_close_record(vr_record *record) {
        vr_in_order();
        record->position = record->next_position;
        record->left = record->next_left;
        record->kept = record->next_kept;
        record->call.msg_len = VR_UNSET;
        vr_in_order();
        record->state = VR_IDLE;
        vr_in_order();
    }

    /* Return whether the end must be asked for the result of the last call: see vr_moved. */
    static inline int vr_is_open(const vr_record *record) {
        return record->state == VR_FILE || record->state == VR_RELAY;
    }

    /* Return how many bytes of the chains from `position` on were taken or given. */
    static inline uint64_t vr_recorded_bytes(const vr_record *record) {
        uint64_t more = record->call.msg_len;
        if (record->state == VR_IDLE || vr_is_open(record) || more == VR_UNSET)
            more = 0;
        return record->left + more;
    }

    /* Announce a call whose result will be in something else than the record. */
    static inline void vr_open_record(
        vr_record *record, uint64_t state, uint64_t position, uint64_t bytes
    ) {
        record->next_position = position;
        record->next_left = bytes;
        vr_in_order();
        record->state = state;
        vr_in_order();
    }

    /* Record that it moved so many bytes; less than 0: none. */
    static inline void vr_moved(vr_record *record, ssize_t bytes) {
        vr_in_order();
        record->call.msg_len = bytes > 0 ? (unsigned)bytes : 0;
        vr_in_order();
        record->state = VR_CALL;
        vr_in_order();
    }

    /* Send or receive one message; return its length, or -1 with errno. */
    static inline ssize_t vr_recorded_message(
        vr_record *record, int receive, int fd, struct msghdr message, int flags
    ) {
        record->call.msg_hdr = message;
        record->call.msg_len = VR_UNSET;
        vr_in_order();
        record->state = VR_CALL;
        vr_in_order();
        /* Not the C library's functions: one library makes several system calls of one. */
        long done = receive ? syscall(SYS_recvmmsg, fd, &record->call, 1, flags, NULL)
                            : syscall(SYS_sendmmsg, fd, &record->call, 1, flags);
        vr_in_order();
        return done == 1 ? (ssize_t)*(volatile unsigned *)&record->call.msg_len : -1;
    }

    static inline ssize_t vr_recorded_call(
        vr_record *record, int receive, int fd, const struct iovec *segments, size_t n, int flags
    ) {
        struct msghdr message = {.msg_iov = (struct iovec *)segments, .msg_iovlen = n};
        return vr_recorded_message(record, receive, fd, message, flags);
    }

    /* Descriptors beside a message in the kernel's format: at most VR_FDS_MAX (SCM_MAX_FD). */
    enum { VR_FDS_MAX = 253 };
    typedef union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(VR_FDS_MAX * sizeof(int))];
    } vr_rights;

    /* Send one message with n descriptors beside it. */
    static inline ssize_t vr_recorded_rights(
        vr_record *record, int fd, const struct iovec *segment, vr_rights *rights, size_t n,
        int flags
    ) {
        rights->head.cmsg_len = CMSG_LEN(n * sizeof(int));
        rights->head.cmsg_level = SOL_SOCKET;
        rights->head.cmsg_type = SCM_RIGHTS;
        struct msghdr message = {
            .msg_iov = (struct iovec *)segment,
            .msg_iovlen = 1,
            .msg_control = rights->bytes,
            .msg_controllen = CMSG_SPACE(n * sizeof(int)),
        };
        return vr_recorded_message(record, 0, fd, message, flags);
    }

    static inline int *vr_rights_fds(vr_rights *rights) {
        return (int *)CMSG_DATA(&rights->head);
    }

    /* Return a copy of the numbers, each read once: a peer may write to the record meanwhile. */
    static inline vr_record vr_read_record(const vr_record *shared) {
        const volatile vr_record *from = shared;
        vr_record record = {
            .state = from->state,
            .position = from->position,
            .left = from->left,
            .next_position = from->next_position,
            .next_left = from->next_left,
            .kept = from->kept,
            .next_kept = from->next_kept,
        };
        record.call.msg_len = from->call.msg_len;
        return record;
    }
    """
    enum:
        VR_IDLE, VR_CALL, VR_BOOKED, VR_FILE, VR_RELAY
        VR_RECORD_PRIVATE           # bytes before the part that a peer may write to
    ctypedef struct vr_record:
        uint64_t state
        uint64_t position
        uint64_t left
        uint64_t next_position
        uint64_t next_left
        uint64_t kept
        uint64_t next_kept
        uint64_t kept_in
    ctypedef struct vr_store:
        vr_record record
        uint64_t added
        uint64_t number
    void vr_book_kept(vr_record* record, uint64_t position, uint64_t left, uint64_t kept)
    void vr_book(vr_record* record, uint64_t position, uint64_t left)
    bint vr_is_open(const vr_record* record)
    void vr_moved(vr_record* record, ssize_t bytes)
    void vr_open_record(vr_record* record, uint64_t state, uint64_t position, uint64_t bytes)
    vr_record vr_read_record(const vr_record* shared)
    void vr_close_record(vr_record* record)
    uint64_t vr_recorded_bytes(const vr_record* record)
    ssize_t vr_recorded_call(
        vr_record* record, int receive, int fd, const iovec* segments, size_t n, int flags
    )
    enum:
        VR_FDS_MAX
    ctypedef struct vr_rights:
        pass
    int* vr_rights_fds(vr_rights* rights)
    ssize_t vr_recorded_rights(
        vr_record* record, int fd, const iovec* segment, vr_rights* rights, size_t n, int flags
    )

cdef inline void vr_set_record(vr_record* record, uint64_t position, uint64_t left) noexcept nogil:
    """Record a position of the ring, in one step for a successor."""
    vr_book(record, position, left)
    vr_close_record(record)


cdef inline void vr_resume_record(
    vr_record* record, const vr_record* found, uint64_t position, uint64_t left
) noexcept nogil:
    """Records where a successor goes on that has read `found`."""
    vr_book_kept(
        record, position, left, found.next_kept if found.state == VR_BOOKED else found.kept
    )
    vr_close_record(record)


cdef inline void vr_keep(vr_record* record, uint64_t left, uint64_t kept) noexcept nogil:
    """Records that `left` bytes are taken, some of them by a backlog up to `kept`, in one step."""
    vr_book_kept(record, record.position, left, kept)
    vr_close_record(record)


cdef inline uint64_t vr_left_after(
    uint64_t* accounted, const vr_chain* chains, const uint32_t* written, uint32_t n
) noexcept nogil:
    # Return how many of the `accounted` bytes remain after the next n chains; set it to 0.
    cdef uint64_t left = accounted[0], bytes
    cdef uint32_t i
    for i in range(n if left else 0):
        bytes = written[i] if written != NULL else chains[i].readable_bytes
        left -= min(left, bytes)
    accounted[0] = 0
    return left
