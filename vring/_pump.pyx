"""The data plane: a thread that moves bytes between virtqueues and descriptors without the GIL."""

from __future__ import annotations

import enum
import os
import threading
import warnings
from typing import NamedTuple

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vring._core cimport VirtQueue, vr_move
from vring._backlog cimport Backlog, store_settle
from vring._descriptor cimport begin_end, describe, describe_data, settle_call, vr_fd
from vring._flow cimport (
    NEWS_BROKEN, NEWS_EOF, NEWS_ERROR, NEWS_OVERFLOW, NEWS_UNLOGGED, VR_THROTTLED, vr_counters,
    vr_flow,
)
from vring._linux cimport S_IFIFO, S_IFSOCK, getpid, read, vr_counted, vr_now, write
from vring._reactor cimport (
    COMMAND_ATTACH, COMMAND_DETACH, COMMAND_MOVE, REACTOR_BLOCKING, REACTOR_ENDED, reactor_abandon,
    reactor_command, reactor_halt, reactor_next_news, reactor_start, reactor_stop, vr_moves,
    vr_reactor, vr_seat,
)
from vring._memory cimport GuestMemory
from vring._record cimport vr_recorded_bytes
from vring._segments cimport backlog_init
from vring.errors import AddressError, LocalMisuseError


class FlowEvent(enum.IntEnum):
    """Event of a flow; on_event gets it with a detail."""

    PEER_EOF = 0        # the descriptor is at its end and all of it is with the guest; detail None
    PEER_ERROR = 1      # the descriptor failed in this direction; detail: errno
    RING_BROKEN = 2     # the driver broke the ring; detail: the RingError
    OVERFLOW = 3        # a lossy flow began to drop bytes; detail: bytes dropped so far
    INEXACT = 4         # a descriptor for which there is a relay does not splice; detail None
    UNLOGGED = 5        # the log began to leave bytes out; detail: bytes left out so far


class FlowCounters(NamedTuple):
    """Counters of a flow since it began. Bytes are those that the descriptor took or gave."""

    bytes: int
    chains: int
    batches: int
    kicks: int
    calls: int
    calls_saved: int
    throttled_ns: int
    dropped: int
    unlogged: int


cdef int describe_log(vr_flow* flow, object number) except -1:
    cdef vr_fd log
    if describe(&log, number, "log_fd") not in (0, S_IFIFO) or log.blocking:
        raise LocalMisuseError(f"log_fd {number} is no pipe, or it is blocking")
    flow.logged = log.number >= 0
    flow.log_fd = log.number
    return 0


cdef int describe_notifier(vr_fd* fd, object number, str what) except -1:
    # Writing to a file, polling it on some file systems, and reading from a pipe may block: another
    # process that has the file can make it blocking at any time.
    if describe(fd, number, what) not in (0, S_IFSOCK):
        raise LocalMisuseError(f"{what} {number} is neither an eventfd nor a socket")
    return 0


@cython.final
cdef class Flow:
    """One active direction of a port, from Pump.guest_to_host or Pump.host_to_guest.

    The flow keeps its queue alive and has the sole use of it until `detach` returns: no other flow
    can use it, and methods of the queue that read or change the ring raise LocalMisuseError. The
    caller owns the descriptors and keeps them open until then; the pump watches duplicates.

    Any thread may call any method. After a fork, the child has no part in the flow.

    Attributes:
        queue: its VirtQueue; read-only.
    """

    cdef vr_seat seat
    cdef Pump pump                  # until it is detached
    cdef readonly VirtQueue queue
    cdef object on_event
    cdef Backlog backlog            # one that outlives the process, or None
    cdef uint64_t throttled_told    # ns; the most that counters said

    def __init__(self):
        raise TypeError("flows are made by a Pump")

    def __dealloc__(self):
        free(self.seat.flow.residue)
        if self.seat.flow.backlog.store == NULL:
            free(self.seat.flow.backlog.data)

    def detach(self, complete=True):
        """End the flow, after the turn in progress.

        On return the pump uses neither the queue nor the descriptors, no chain is in flight and no
        more event of this flow is delivered. Guest to host: chains of which the descriptor took at
        least a part are completed, the others are given back to the queue.

        Args:
            complete: False gives back the chain of which the descriptor took a part, too: for a
                queue with a record, whose user completes it once the residue is written down.

        Returns:
            The rest of the chain taken in part, or a lossy flow's backlog: bytes for `residue` of
            the next flow. Empty otherwise, when called again, and in a child of fork. More than
            64 MiB are truncated; the rest counts as dropped.
        """
        cdef Pump pump = self.pump
        cdef bytes residue = b""
        if pump is not None:
            self.seat.flow.gives_back = not complete
            pump.end(self)
        if self.seat.flow.residue != NULL:
            residue = PyBytes_FromStringAndSize(
                <char*>self.seat.flow.residue, self.seat.flow.residue_length
            )
            free(self.seat.flow.residue)
            self.seat.flow.residue = NULL
        return residue

    @property
    def attached(self):
        """Whether the flow runs: False after detach, in a closed pump, and in a child of fork."""
        return self.pump is not None and self.pump.is_ours()

    @property
    def counters(self):
        """A snapshot of the FlowCounters; also valid after detach."""
        cdef vr_counters* c = &self.seat.flow.counters
        cdef uint64_t now = vr_now()
        cdef uint64_t throttled = vr_counted(&c.throttled_ns)
        if throttled & VR_THROTTLED:
            throttled &= ~VR_THROTTLED
            throttled = max(now, throttled) - throttled
        # The pump's clock reading may be older than ours: never report less than before.
        self.throttled_told = throttled = max(throttled, self.throttled_told)
        return FlowCounters(
            vr_counted(&c.bytes), vr_counted(&c.chains), vr_counted(&c.batches),
            vr_counted(&c.kicks), vr_counted(&c.calls), vr_counted(&c.calls_saved), throttled,
            vr_counted(&c.dropped), vr_counted(&c.unlogged),
        )

    cdef int tell(self, uint32_t news, int error) except -1:
        """Call on_event with one kind of news."""
        if news == NEWS_OVERFLOW:
            self.on_event(FlowEvent.OVERFLOW, vr_counted(&self.seat.flow.counters.dropped))
        elif news == NEWS_EOF:
            self.on_event(FlowEvent.PEER_EOF, None)
        elif news == NEWS_ERROR:
            self.on_event(FlowEvent.PEER_ERROR, error)
        elif news == NEWS_BROKEN:
            self.on_event(FlowEvent.RING_BROKEN, self.queue.broken)
        elif news == NEWS_UNLOGGED:
            self.on_event(FlowEvent.UNLOGGED, vr_counted(&self.seat.flow.counters.unlogged))
        else:
            self.on_event(FlowEvent.INEXACT, None)
        return 0


@cython.final
cdef class Pump:
    """A thread that serves any number of flows, fairly and without the GIL.

    Descriptors must be non-blocking (except regular files and /dev/null, which cannot be). Reading
    and writing one descriptor may be two flows. While nothing moves, the thread sleeps.

    Any thread may call any method. After a fork, the child has no part in the pump: there it is
    closed, whatever is called.

    Args:
        busy_poll_us: how long to keep polling after work before sleeping, in microseconds. Polling
            saves kicks and wake-ups while messages are frequent, and occupies a processor.

    Attributes:
        busy_poll_us: as given; read-only.

    Raises:
        OSError: no descriptor or no thread is available.
    """

    cdef vr_reactor reactor
    cdef set flows
    cdef bint running               # the thread does, or did before the fork
    cdef bint closing               # no more flows
    cdef object close_lock
    cdef int pid
    cdef readonly uint32_t busy_poll_us

    def __cinit__(self, busy_poll_us=0):
        if not 0 <= busy_poll_us <= 1_000_000:
            raise LocalMisuseError(f"busy_poll_us {busy_poll_us} is not 0 to 1000000")
        self.busy_poll_us = busy_poll_us
        self.flows = set()
        self.close_lock = threading.Lock()
        cdef int error = reactor_start(&self.reactor, 1000 * <uint64_t>self.busy_poll_us)
        if error:
            raise OSError(error, os.strerror(error))
        self.pid = getpid()
        self.running = True

    def __init__(self, busy_poll_us=0):
        pass

    def __del__(self):
        cdef bint unclosed = self.running and self.is_ours()
        self.close()            # first: the warning may be made an error
        if unclosed:
            warnings.warn(f"unclosed pump {self!r}", ResourceWarning, source=self)

    cdef bint is_ours(self) noexcept:
        """Return whether this process has the thread."""
        return getpid() == self.pid

    @property
    def event_fd(self):
        """Descriptor that is readable while events wait for `dispatch`; -1 when closed."""
        return self.reactor.event_fd if self.is_ours() else -1

    def dispatch(self):
        """Deliver pending events: call on_event(event, detail) of their flows in this thread.

        For an event loop: ``loop.add_reader(pump.event_fd, pump.dispatch)``. An exception of
        on_event propagates from here; later events wait for the next call.
        """
        cdef vr_seat* seat
        cdef uint32_t news
        cdef uint64_t signals
        cdef int error
        cdef Flow flow
        if not self.running or not self.is_ours():
            return
        read(self.reactor.event_fd, &signals, sizeof(signals))
        try:
            while self.running:
                seat = reactor_next_news(&self.reactor, &news, &error)
                if seat == NULL:
                    return
                flow = <Flow>seat.flow.owner
                flow.tell(news, error)
        except BaseException:
            signals = 1
            write(self.reactor.event_fd, &signals, sizeof(signals))
            raise

    def guest_to_host(
        self, VirtQueue queue not None, *, write_fd, kick_fd, call_fd, on_event, lossy=False,
        backlog=1 << 20, residue=b"", kept=False, relay=None, log_fd=-1
    ):
        """Move the bytes that the driver makes available in `queue` to a descriptor.

        A buffer is returned to the driver only after the descriptor took its bytes; while the
        descriptor takes nothing, nothing is popped. Device-writable parts of chains are ignored.

        Args:
            queue: a VirtQueue with no chain in flight and no other flow.
            write_fd: descriptor to write to; -1: discard the bytes.
            kick_fd: eventfd or socket that becomes readable when the driver kicks. It is polled,
                and read only if it is a socket.
            call_fd: eventfd or socket to write 8 bytes to when the driver wants a notification;
                -1: none. It may be replaced meanwhile (dup2), also by the other kind.
            on_event: called by `dispatch` with a FlowEvent and its detail.
            lossy: for consoles: always take what the driver offers. Bytes that the descriptor does
                not take go to a backlog, or are dropped and counted if it is full; after a
                PEER_ERROR all are dropped.
            backlog: size of a lossy flow's backlog in bytes; or a Backlog, for the flow alone until
                it is detached. What that holds is written first, and it gets the rest of a chain
                taken in part as well, as long as it has room: `detach` returns nothing then. With a
                queue that has a record, no byte is in both or in neither.
            residue: bytes to write before those of the queue; copied.
            kept: the open file of `write_fd` outlives this process; with a queue that has a record,
                a successor then knows what was written, if it is a regular file.
            relay: for the same with a pipe or a terminal, both ends (to read, to write) of a pipe
                that outlives this process and that nobody else uses, non-blocking; the caller's.
                None: after a kill, bytes on their way may be lost or doubled there.
            log_fd: end of a non-blocking pipe that gets the bytes as well, once each, when they are
                taken from the driver for good; -1: none. What it has no room for is left out and
                counted: it holds nothing up.

        Raises:
            LocalMisuseError: an unsuitable queue or descriptor, or the pump is closed.
            OSError: the descriptor cannot be watched (out of memory, descriptors or watches).
        """
        cdef Flow flow = self.make(queue, kick_fd, call_fd, on_event)
        describe_data(&flow.seat.flow.data, write_fd, "write_fd", kept, relay)
        describe_log(&flow.seat.flow, log_fd)
        cdef const uint8_t[::1] data = residue
        cdef size_t length = data.shape[0]
        if isinstance(backlog, Backlog):
            if length:
                raise LocalMisuseError("a residue beside a Backlog")
            flow.backlog = backlog
            flow.backlog.check_free()
            flow.seat.flow.backlog = flow.backlog.backlog
        elif backlog < 0:
            raise LocalMisuseError(f"backlog {backlog} is below 0")
        elif backlog_init(
            &flow.seat.flow.backlog, &data[0] if length else NULL, length,
            backlog if lossy else 0,
        ):
            raise MemoryError
        flow.seat.flow.lossy = lossy
        return self.begin(flow, f"write_fd {write_fd}")

    def host_to_guest(
        self, VirtQueue queue not None, *, read_fd, kick_fd, call_fd, on_event, kept=False,
        relay=None
    ):
        """Move bytes from a descriptor into the buffers that the driver makes available in `queue`.

        A chain is completed with the bytes of one read. Device-readable parts of chains are
        ignored; a chain without room is completed with length 0.

        Args: as of guest_to_host, but
            read_fd: descriptor to read from.
            relay: as there, and another one. What it holds is given to the guest first.

        Raises:
            LocalMisuseError: an unsuitable queue or descriptor, or the pump is closed.
            OSError: the descriptor cannot be watched (out of memory, descriptors or watches).
        """
        cdef Flow flow = self.make(queue, kick_fd, call_fd, on_event)
        if read_fd < 0:
            raise LocalMisuseError(f"read_fd {read_fd}: there is nothing to read from")
        describe_data(&flow.seat.flow.data, read_fd, "read_fd", kept, relay)
        flow.seat.flow.incoming = True
        return self.begin(flow, f"read_fd {read_fd}")

    def close(self):
        """Detach all flows and end the thread; `detach` still returns each flow's residue."""
        self.closing = True
        if not self.is_ours():
            if self.running:
                self.running = False
                reactor_abandon(&self.reactor)
            return
        with self.close_lock:       # of two callers, both return when it is done
            while self.flows:
                self.end(next(iter(self.flows)))
            if self.running:
                self.running = False
                with nogil:
                    reactor_stop(&self.reactor)

    def halt(self):
        """End the thread after the turn in progress, and change nothing else: flows stay attached.

        For a process that another one follows: rings are left where their records say, and chains
        that a descriptor took in part stay in the ring. The process is to end; until then no flow
        moves, and none can be detached.
        """
        with self.close_lock:
            if self.running and self.is_ours():
                self.closing = True
                self.running = False
                with nogil:
                    reactor_halt(&self.reactor)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    cdef Flow make(self, VirtQueue queue, object kick_fd, object call_fd, object on_event):
        if not callable(on_event):
            raise TypeError("on_event is not callable")
        cdef Flow flow = Flow.__new__(Flow)
        if kick_fd < 0:
            raise LocalMisuseError(f"kick_fd {kick_fd}: the driver could not be heard")
        describe_notifier(&flow.seat.flow.kick, kick_fd, "kick_fd")
        describe_notifier(&flow.seat.flow.call, call_fd, "call_fd")
        flow.queue = queue
        flow.on_event = on_event
        flow.seat.flow.queue = <void*>queue
        flow.seat.flow.owner = <void*>flow
        return flow

    cdef Flow begin(self, Flow flow, str what):
        cdef vr_seat* seat = &flow.seat
        cdef VirtQueue queue = flow.queue
        cdef int error
        if self.closing or not self.is_ours():
            raise LocalMisuseError("the pump is closed")
        queue.check_free()
        if queue.in_flight:
            raise LocalMisuseError(f"{queue.name}: {queue.in_flight} chains are in flight")
        if flow.backlog is not None:
            settle_call(&seat.flow.data, &seat.flow.backlog.store.record, False)
        begin_end(&seat.flow.data, queue.record, seat.flow.incoming)
        if flow.backlog is not None:
            store_settle(&seat.flow.backlog, queue.record)
            flow.backlog.holder = <void*>flow
        if queue.record != NULL:
            seat.flow.owed = vr_recorded_bytes(queue.record)
        # Before the thread can have news, which go only to attached flows; and all of it before
        # another thread runs, which may close the pump.
        flow.pump = self
        queue.holder = <void*>flow
        self.flows.add(flow)
        with nogil:
            error = reactor_command(&self.reactor, COMMAND_ATTACH, seat)
        if error:
            self.forget(flow)
        if error == REACTOR_BLOCKING:
            raise LocalMisuseError(f"{what} is blocking: set O_NONBLOCK")
        if error == REACTOR_ENDED:
            raise LocalMisuseError("the pump was closed meanwhile")
        if error:
            raise OSError(error, f"{what} or its kick_fd cannot be watched: {os.strerror(error)}")
        return flow

    cdef int end(self, Flow flow) except -1:
        """Detach a flow; a second caller waits as long as the first."""
        cdef vr_seat* seat = &flow.seat
        if self.is_ours():
            with nogil:
                reactor_command(&self.reactor, COMMAND_DETACH, seat)
        self.forget(flow)
        return 0

    cdef list move(self, list queues, GuestMemory memory):
        """Move the queues of flows between two turns; return those whose ring is not there."""
        cdef list left = []
        cdef list olds = []         # until the thread is done with them
        cdef list moved = []
        cdef VirtQueue queue
        cdef vr_moves moves = vr_moves(NULL, 0)
        cdef vr_move* table = <vr_move*>calloc(len(queues), sizeof(vr_move))
        cdef int error
        cdef uint32_t i
        if table == NULL:
            raise MemoryError
        try:
            for queue in queues:
                try:
                    queue.locate_rings(memory, table[moves.count].rings)
                except AddressError:
                    left.append(queue)
                    continue
                table[moves.count].queue = <void*>queue
                table[moves.count].memory = <void*>memory
                moves.count += 1
                moved.append(queue)
                olds.append(queue._memory)
            moves.first = table
            with nogil:
                error = reactor_command(&self.reactor, COMMAND_MOVE, &moves)
            if error:               # no turn comes any more
                for i in range(moves.count):
                    (<VirtQueue>table[i].queue).move_c(&table[i])
            for queue in moved:
                queue._memory = memory
        finally:
            free(table)
        return left

    cdef void forget(self, Flow flow) noexcept:
        flow.pump = None
        self.flows.discard(flow)
        if flow.backlog is not None and flow.backlog.holder == <void*>flow:
            flow.backlog.holder = NULL
            store_settle(&flow.backlog.backlog, NULL)
        if flow.queue.holder == <void*>flow:
            flow.queue.holder = NULL


def move_queues(queues, GuestMemory memory not None):
    """Move queues that may be in use to another table of regions, as the guest maps and unmaps.

    Those that flows have are moved between two turns of their pump's thread. No other thread may
    use the others, or detach a flow, meanwhile. Chains in flight keep the memory that they were
    popped from.

    Args:
        queues: any.
        memory: where all that they use lies from now on.

    Returns:
        The queues of which a part of the ring is not in ``memory``; they stay where they are.

    Raises:
        LocalMisuseError: a flow of another process, before a fork, has one of them.
    """
    cdef dict by_pump = {}
    cdef list left = []
    cdef VirtQueue queue
    cdef Pump pump
    for queue in queues:
        if queue.holder != NULL:
            pump = (<Flow>queue.holder).pump
            if pump is None or not pump.is_ours():
                raise LocalMisuseError(f"{queue.name}: a flow of another process has it")
            by_pump.setdefault(pump, []).append(queue)
            continue
        try:
            queue.memory = memory
        except AddressError:
            left.append(queue)
    for pump, held in by_pump.items():
        left += pump.move(held, memory)
    return left
