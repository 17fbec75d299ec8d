# The pump's thread: which flow has its turn next, commands from other threads, news for owners.

from libc.stdint cimport uint32_t, uint64_t

from vring._core cimport vr_move
from vring._flow cimport vr_flow
from vring._linux cimport pthread_cond_t, pthread_mutex_t, pthread_t
from vring._tables cimport vr_tables
from vring._watches cimport vr_user, vr_watches

cdef enum:
    COMMAND_ATTACH
    COMMAND_DETACH
    COMMAND_MOVE
    COMMAND_STOP
    # answers to COMMAND_ATTACH besides errno: the descriptor could block the thread
    REACTOR_BLOCKING = -1
    # the flow was detached, or the thread told to end, before it was attached
    REACTOR_ENDED = -2

cdef struct vr_seat:
    # a flow and its place in the reactor; memory of the owner, which only the thread may touch
    # while the flow is attached
    vr_flow flow
    vr_user data
    vr_user kick
    vr_line* line               # for a turn, or NULL
    vr_seat* behind
    vr_seat* ahead
    bint attached
    bint detached               # for good
    # under the lock
    uint32_t news               # not yet delivered
    int error
    vr_seat* news_next

cdef struct vr_line:
    # seats that want a turn, first come first served
    vr_seat* first
    vr_seat* last
    uint32_t count

cdef struct vr_moves:
    const vr_move* first
    uint32_t count

cdef struct vr_command:
    int operation
    void* subject               # vr_seat of a flow; of COMMAND_MOVE: vr_moves
    int answer
    bint answered
    vr_command* next

cdef struct vr_reactor:
    int wake_fd                 # eventfd: commands wait
    int event_fd                # eventfd: news waits
    pthread_t thread
    pthread_mutex_t lock
    pthread_cond_t answered
    # under the lock
    vr_command* commands        # oldest first
    vr_command* commands_last
    uint32_t waiting            # callers of reactor_command that have not returned yet
    bint ending                 # no more commands are accepted
    vr_seat* news
    vr_seat* news_last
    # atomic: whether there are commands
    int asked
    # the thread's own
    vr_line now
    vr_line later               # flows whose turn comes at later_at
    uint64_t later_at           # ns
    vr_watches watches
    vr_tables tables
    uint64_t busy_ns
    uint64_t busy_until

# Start the thread; return 0 or errno. A failure leaves nothing behind.
cdef int reactor_start(vr_reactor* reactor, uint64_t busy_ns) noexcept nogil
# Join the thread and close everything. No flow may be attached.
cdef void reactor_stop(vr_reactor* reactor) noexcept nogil
# End the thread, and leave flows and descriptors as they are.
cdef void reactor_halt(vr_reactor* reactor) noexcept nogil
# In a child of fork, which has no thread: close the descriptors, without an effect on the parent.
cdef void reactor_abandon(vr_reactor* reactor) noexcept nogil
# Give the thread a command, wait, and return its answer: 0, errno, REACTOR_BLOCKING or
# REACTOR_ENDED. From any thread. A flow that is detached before it was attached cannot be attached
# any more.
cdef int reactor_command(vr_reactor* reactor, int operation, void* subject) noexcept nogil
# Take one kind of news off the list and return its seat; NULL if there is no news.
cdef vr_seat* reactor_next_news(vr_reactor* reactor, uint32_t* news, int* error) noexcept nogil
