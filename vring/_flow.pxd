# One direction of one port: a state machine that moves bytes from a queue to a descriptor or back
# in turns, which the pump's thread gives it. It never blocks and never needs the GIL.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vring._descriptor cimport vr_fd
from vring._sampler cimport vr_sampler
from vring._segments cimport vr_backlog
from vring._tables cimport vr_tables

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
    # news for the flow's owner, in the order of delivery
    NEWS_OVERFLOW = 1
    NEWS_EOF = 2
    NEWS_ERROR = 4
    NEWS_BROKEN = 8
    NEWS_INEXACT = 16
    NEWS_UNLOGGED = 32

cdef struct vr_counters:
    # written by the pump's thread alone, with vr_count
    uint64_t bytes
    uint64_t chains
    uint64_t batches
    uint64_t kicks
    uint64_t calls
    uint64_t calls_saved
    uint64_t throttled_ns       # total; while throttled: VR_THROTTLED | now - total, at its start
    uint64_t dropped
    uint64_t unlogged           # bytes that the log did not take

cdef struct vr_flow:
    void* queue                 # a VirtQueue; the owner keeps it alive
    void* owner                 # the Python object that gets the news
    vr_fd data
    vr_fd kick
    vr_fd call
    bint incoming               # host to guest
    bint lossy
    bint ready                  # the descriptor may have room, or bytes to read
    bint doubtful               # not ready since it took only a part; it may have room again
    bint hangup                 # the peer is gone; unread bytes may be left
    bint failed                 # lossy: the descriptor is dead, bytes are dropped
    bint stopped                # no more turns: end of file, error or broken ring
    bint broken                 # the ring is
    bint listening              # the driver was asked for kicks
    bint call_due               # the driver wants a call for used chains and has not got it
    bint overflowing
    bint inexact                # its owner was told that the end is not recorded
    bint logged                 # outgoing: bytes go to log_fd too, a pipe that does not block
    bint unlogging              # it took less than all of the last bytes
    int log_fd
    vr_sampler sampler          # outgoing
    uint32_t offered            # incoming: most buffers that were available at once so far
    uint64_t room               # bytes to try at once, from what the descriptor took lately
    uint64_t skip               # bytes of the first available chain that the descriptor has taken
    uint64_t owed               # bytes that a predecessor moved without completing their chains
    uint64_t busy_ns            # how long to poll the queue before asking for kicks
    uint64_t poll_until         # ns
    vr_backlog backlog
    vr_counters counters
    uint32_t news
    int error                   # errno with NEWS_ERROR
    bint gives_back             # flow_finish is to return the chain that was taken in part
    uint8_t* residue            # malloced by flow_finish: see there
    size_t residue_length

# Do a bounded amount of work; return TURN_WAIT, TURN_MORE or TURN_LATER.
cdef int flow_turn(vr_flow* flow, vr_tables* tables) noexcept nogil
# End the flow after its last turn: nothing stays in flight, and `residue` gets the bytes that were
# accepted from the guest and not written.
cdef void flow_finish(vr_flow* flow, vr_tables* tables) noexcept nogil
cdef void flow_stop(vr_flow* flow, uint32_t news, int error) noexcept nogil
