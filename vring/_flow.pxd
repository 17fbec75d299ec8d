# One direction of one port: bytes from a queue to a descriptor or back, as a state machine that
# the pump's thread gives turns to. It blocks on nothing and never needs the GIL.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vring._descriptor cimport vr_fd
from vring._sampler cimport vr_sampler
from vring._segments cimport vr_backlog
from vring._walk cimport vr_chain
from vring._wire cimport iovec

cdef extern from *:
    """
    #define VR_THROTTLED (UINT64_C(1) << 63)
    """
    const uint64_t VR_THROTTLED

cdef enum:
    # what comes after a turn
    TURN_WAIT = 0               # a kick, or the descriptor
    TURN_MORE                   # another turn: there is more to do
    TURN_LATER                  # another turn in SAMPLE_NS

cdef enum:
    # news for the flow's owner, in the order in which it is told
    NEWS_OVERFLOW = 1
    NEWS_EOF = 2
    NEWS_ERROR = 4
    NEWS_BROKEN = 8
    NEWS_INEXACT = 16

cdef struct vr_counters:
    # written by the pump's thread alone, with vr_count
    uint64_t bytes
    uint64_t chains
    uint64_t batches
    uint64_t kicks
    uint64_t calls
    uint64_t calls_saved
    uint64_t throttled_ns       # in all; while it goes on, THROTTLED and when it would have begun
    uint64_t dropped

cdef struct vr_tables:
    # scratch of one thread: nothing stays in it between turns
    vr_chain* chains
    uint32_t* written
    iovec* segments
    uint32_t max_segments
    uint8_t* stage              # where small segments are joined for one write

cdef struct vr_flow:
    void* queue                 # a VirtQueue; the owner keeps it alive
    void* owner                 # the Python object, for the one who delivers news
    vr_fd data
    vr_fd kick
    vr_fd call
    bint incoming               # host to guest
    bint lossy
    bint ready                  # the descriptor may take or have bytes
    bint doubtful               # not ready because it took a part; it may have room again already
    bint hangup                 # the peer is gone; unread bytes may be left
    bint failed                 # lossy: the descriptor is dead, bytes are dropped
    bint stopped                # no more turns: end of file, error or broken ring
    bint broken                 # the ring is
    bint listening              # the driver was asked for kicks
    bint call_due               # the driver wants to know of used chains and has not been told
    bint overflowing
    bint inexact                # its owner was told that the end is not recorded
    vr_sampler sampler          # outgoing
    uint32_t offered            # incoming: most buffers the driver had available at once
    uint64_t room               # bytes to try at once: what the descriptor took lately, and more
    uint64_t skip               # bytes of the first available chain that the descriptor took
    uint64_t owed               # bytes that a predecessor moved and did not complete
    uint64_t busy_ns            # how long to poll the queue before asking for kicks
    uint64_t poll_until         # ns
    vr_backlog backlog
    vr_counters counters
    uint32_t news
    int error                   # errno with NEWS_ERROR
    uint8_t* residue            # what flow_finish left over, malloced
    size_t residue_length

cdef int tables_init(vr_tables* tables) noexcept nogil
cdef void tables_free(vr_tables* tables) noexcept nogil

# Does a bounded piece of work; what comes after it.
cdef int flow_turn(vr_flow* flow, vr_tables* tables) noexcept nogil
# After the last turn: leaves nothing in flight, and in `residue` what was accepted from the guest
# and not written.
cdef void flow_finish(vr_flow* flow, vr_tables* tables) noexcept nogil
cdef void flow_stop(vr_flow* flow, uint32_t news, int error) noexcept nogil
