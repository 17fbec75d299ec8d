"""The pump's thread: it waits for descriptors (`_watches`), schedules flows and takes commands.

Every descriptor is edge-triggered and the flow keeps its state, so a peer that left causes no busy
loop, a throttled flow costs nothing and a kick needs no reading. Commands are taken between turns,
never while events are being processed, so the object that an event points to exists.
"""

from __future__ import annotations

from libc.stdint cimport uint8_t
from libc.string cimport memset

from vring._core cimport VirtQueue
from vring._descriptor cimport FD_PIPE, FD_SOCKET
from vring._flow cimport TURN_LATER, TURN_MORE, flow_finish, flow_turn
from vring._linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, ENOMEM, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP,
    EPOLL_CTL_ADD, MSG_DONTWAIT, POLLIN, PR_SET_TIMERSLACK, SIGBUS, SIGFPE, SIGILL, SIGSEGV,
    SIGSYS, SIG_SETMASK, close, epoll_ctl, epoll_event, epoll_wait, errno, eventfd, pollfd, ppoll,
    prctl, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait,
    pthread_create, pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, pthread_setname_np, pthread_sigmask, read, recv, sigdelset, sigfillset,
    sigset_t, timespec, vr_count, vr_get_flag, vr_now, vr_set_flag, write
)
from vring._sampler cimport SAMPLE_NS
from vring._tables cimport tables_free, tables_init
from vring._watches cimport (
    start_watching, unwatch, vr_watch, watch_update, watches_abandon, watches_end, watches_start
)

cdef enum:
    EVENTS = 64                 # taken from epoll at once

cdef uint64_t ONE = 1


# --- whose turn it is

cdef void leave_line(vr_seat* seat) noexcept nogil:
    cdef vr_line* line = seat.line
    if line == NULL:
        return
    if seat.ahead != NULL:
        seat.ahead.behind = seat.behind
    else:
        line.first = seat.behind
    if seat.behind != NULL:
        seat.behind.ahead = seat.ahead
    else:
        line.last = seat.ahead
    seat.line = NULL
    line.count -= 1


cdef void stand_in_line(vr_line* line, vr_seat* seat) noexcept nogil:
    if seat.line == line:
        return
    leave_line(seat)
    seat.line = line
    seat.behind = NULL
    seat.ahead = line.last
    if line.last != NULL:
        line.last.behind = seat
    else:
        line.first = seat
    line.last = seat
    line.count += 1


cdef void want_turn(vr_reactor* reactor, vr_seat* seat) noexcept nogil:
    stand_in_line(&reactor.now, seat)


cdef void want_turn_later(vr_reactor* reactor, vr_seat* seat) noexcept nogil:
    """Queue a turn for later. All waiting flows wake together, SAMPLE_NS after the first."""
    if reactor.later.count == 0:
        reactor.later_at = vr_now() + SAMPLE_NS
    stand_in_line(&reactor.later, seat)


# --- news

cdef void post(vr_reactor* reactor, vr_seat* seat) noexcept nogil:
    """Queue a flow's news for dispatch."""
    pthread_mutex_lock(&reactor.lock)
    if seat.news == 0:
        seat.news_next = NULL
        if reactor.news_last != NULL:
            reactor.news_last.news_next = seat
        else:
            reactor.news = seat
        reactor.news_last = seat
    seat.news |= seat.flow.news
    seat.error = seat.flow.error
    pthread_mutex_unlock(&reactor.lock)
    seat.flow.news = 0
    write(reactor.event_fd, &ONE, sizeof(ONE))


cdef void unpost(vr_reactor* reactor, vr_seat* seat) noexcept nogil:
    """Drop a flow's undelivered news."""
    cdef vr_seat* at
    cdef vr_seat* before = NULL
    pthread_mutex_lock(&reactor.lock)
    if seat.news:
        at = reactor.news
        while at != seat:
            before = at
            at = at.news_next
        if before != NULL:
            before.news_next = seat.news_next
        else:
            reactor.news = seat.news_next
        if reactor.news_last == seat:
            reactor.news_last = before
        seat.news = 0
    pthread_mutex_unlock(&reactor.lock)


cdef vr_seat* reactor_next_news(
    vr_reactor* reactor, uint32_t* news, int* error
) noexcept nogil:
    cdef vr_seat* seat
    pthread_mutex_lock(&reactor.lock)
    seat = reactor.news
    if seat != NULL:
        # One kind at a time, the lowest: the others stay queued, however this one is handled.
        news[0] = seat.news & (~seat.news + 1)
        error[0] = seat.error
        seat.news ^= news[0]
        if seat.news == 0:
            reactor.news = seat.news_next
            if reactor.news == NULL:
                reactor.news_last = NULL
    pthread_mutex_unlock(&reactor.lock)
    return seat


cdef void after_turn(vr_reactor* reactor, vr_seat* seat) noexcept nogil:
    """Queue the flow's news and watch for the events that it waits for."""
    if seat.flow.news:
        post(reactor, seat)
    if seat.flow.stopped:
        unwatch(&reactor.watches, &seat.kick)
    if seat.flow.stopped or seat.flow.failed:
        unwatch(&reactor.watches, &seat.data)
    elif not seat.flow.incoming and not seat.flow.ready and (
        seat.flow.doubtful or not seat.data.events
    ):
        seat.data.events = EPOLLOUT
        if seat.data.watch != NULL:
            watch_update(&reactor.watches, seat.data.watch, seat.flow.doubtful)
        seat.flow.doubtful = False


cdef void run_turns(vr_reactor* reactor) noexcept nogil:
    """Give each flow that wants one a turn; after the first, commands come before the others."""
    cdef uint32_t n
    cdef vr_seat* seat
    cdef int after
    if reactor.later.count and vr_now() >= reactor.later_at:
        while reactor.later.first != NULL:
            want_turn(reactor, reactor.later.first)
    n = reactor.now.count
    while n:
        n -= 1
        seat = reactor.now.first
        leave_line(seat)
        after = flow_turn(&seat.flow, &reactor.tables)
        after_turn(reactor, seat)
        if after == TURN_MORE:
            want_turn(reactor, seat)
        elif after == TURN_LATER:
            want_turn_later(reactor, seat)
        reactor.busy_until = max(reactor.busy_until, seat.flow.poll_until)
        if vr_get_flag(&reactor.asked):
            return


# --- events of epoll

cdef void kicked(vr_reactor* reactor, vr_seat* seat, uint32_t events) noexcept nogil:
    cdef uint8_t[4096] sink     # as much as makes room for the next kick, whoever filled the socket
    if not events & EPOLLIN:
        return
    vr_count(&seat.flow.counters.kicks, 1)
    if seat.flow.kick.kind == FD_SOCKET:
        recv(seat.flow.kick.number, sink, sizeof(sink), MSG_DONTWAIT)
    # Otherwise the flow checks its queue anyway before it next waits for a kick.
    if seat.flow.listening:
        want_turn(reactor, seat)


cdef void may_read(vr_reactor* reactor, vr_seat* seat, uint32_t events) noexcept nogil:
    if events & (EPOLLHUP | EPOLLRDHUP | EPOLLERR):
        seat.flow.hangup = True
    elif not events & EPOLLIN:
        return
    seat.flow.ready = True
    want_turn(reactor, seat)


cdef void may_write(vr_reactor* reactor, vr_seat* seat, uint32_t events) noexcept nogil:
    if events & EPOLLERR and seat.flow.data.kind == FD_PIPE:
        seat.flow.hangup = True             # the last reader has closed it
        want_turn(reactor, seat)
    if not events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
        return
    if not seat.flow.ready:
        seat.flow.ready = True
        want_turn(reactor, seat)
    elif seat.data.events:
        # No flow waits for room any more. Disarming only now saves a system call each time.
        seat.data.events = 0
        watch_update(&reactor.watches, seat.data.watch, False)


cdef void look_at(vr_reactor* reactor, vr_watch* watch, uint32_t events) noexcept nogil:
    cdef vr_user* user = watch.users
    cdef vr_seat* seat
    while user != NULL:
        seat = <vr_seat*>user.owner
        if not seat.flow.stopped:
            if user.is_kick:
                kicked(reactor, seat, events)
            elif seat.flow.incoming:
                may_read(reactor, seat, events)
            else:
                may_write(reactor, seat, events)
        user = user.next


# --- commands

cdef int attach(vr_reactor* reactor, vr_seat* seat) noexcept nogil:
    """Attach a flow; return 0, errno, REACTOR_BLOCKING or REACTOR_ENDED."""
    cdef uint32_t events = <uint32_t>EPOLLIN | EPOLLRDHUP if seat.flow.incoming else 0
    cdef int error
    if seat.detached:
        return REACTOR_ENDED
    seat.kick.owner = seat.data.owner = seat
    seat.kick.is_kick = True
    error = start_watching(&reactor.watches, &seat.kick, &seat.flow.kick, EPOLLIN)
    if error:
        return error
    error = start_watching(&reactor.watches, &seat.data, &seat.flow.data, events)
    if error == 0 and seat.data.watch != NULL:
        seat.flow.data.pollable = seat.data.watch.pollable
        if seat.flow.data.pollable and seat.flow.data.blocking and (
            seat.flow.data.kind != FD_SOCKET        # for those, each call says that it must not
        ):
            error = REACTOR_BLOCKING
    if error:
        unwatch(&reactor.watches, &seat.data)
        unwatch(&reactor.watches, &seat.kick)
        return error
    seat.attached = True
    seat.flow.ready = True
    seat.flow.room = -1
    seat.flow.busy_ns = reactor.busy_ns
    (<VirtQueue>seat.flow.queue).disable_notifications_c()
    want_turn(reactor, seat)
    return 0


cdef void detach(vr_reactor* reactor, vr_seat* seat) noexcept nogil:
    seat.detached = True
    if not seat.attached:
        return
    seat.attached = False
    leave_line(seat)
    unwatch(&reactor.watches, &seat.kick)
    unwatch(&reactor.watches, &seat.data)
    unpost(reactor, seat)
    flow_finish(&seat.flow, &reactor.tables)


cdef void move(const vr_moves* moves) noexcept nogil:
    cdef uint32_t i
    for i in range(moves.count):
        (<VirtQueue>moves.first[i].queue).move_c(&moves.first[i])


cdef bint serve(vr_reactor* reactor) noexcept nogil:
    """Execute the queued commands in order; return 0 to end the thread."""
    cdef vr_command* command
    cdef vr_command* next
    cdef bint go_on = True
    if not vr_get_flag(&reactor.asked):
        return True
    pthread_mutex_lock(&reactor.lock)
    command = reactor.commands
    reactor.commands = reactor.commands_last = NULL
    vr_set_flag(&reactor.asked, 0)
    pthread_mutex_unlock(&reactor.lock)
    while command != NULL:
        next = command.next         # an answered command is its owner's again
        if command.operation == COMMAND_ATTACH:
            command.answer = attach(reactor, <vr_seat*>command.subject)
        elif command.operation == COMMAND_DETACH:
            detach(reactor, <vr_seat*>command.subject)
        elif command.operation == COMMAND_MOVE:
            move(<const vr_moves*>command.subject)
        else:
            go_on = False
        pthread_mutex_lock(&reactor.lock)
        command.answered = True
        pthread_cond_broadcast(&reactor.answered)
        pthread_mutex_unlock(&reactor.lock)
        command = next
    return go_on


cdef int reactor_command(vr_reactor* reactor, int operation, void* subject) noexcept nogil:
    cdef vr_command command
    memset(&command, 0, sizeof(command))
    command.operation = operation
    command.subject = subject
    pthread_mutex_lock(&reactor.lock)
    if reactor.ending:
        pthread_mutex_unlock(&reactor.lock)
        return REACTOR_ENDED
    reactor.ending = operation == COMMAND_STOP
    reactor.waiting += 1
    if reactor.commands_last != NULL:
        reactor.commands_last.next = &command
    else:
        reactor.commands = &command
    reactor.commands_last = &command
    vr_set_flag(&reactor.asked, 1)
    write(reactor.wake_fd, &ONE, sizeof(ONE))
    while not command.answered:
        pthread_cond_wait(&reactor.answered, &reactor.lock)
    reactor.waiting -= 1
    if reactor.ending:
        pthread_cond_broadcast(&reactor.answered)
    pthread_mutex_unlock(&reactor.lock)
    return command.answer


# --- the thread

cdef int wait(vr_reactor* reactor, epoll_event* events) noexcept nogil:
    """Wait until there is something to do; return the number of events."""
    cdef bint awake = reactor.now.count != 0
    cdef uint64_t now
    cdef timespec left
    cdef pollfd some
    if not awake and reactor.busy_ns:
        awake = vr_now() < reactor.busy_until
    if not awake and reactor.later.count:
        now = vr_now()
        if now < reactor.later_at:
            left = timespec(tv_sec=0, tv_nsec=reactor.later_at - now)
            some = pollfd(fd=reactor.watches.epoll_fd, events=POLLIN, revents=0)
            ppoll(&some, 1, &left, NULL)    # epoll_wait's milliseconds are too long
        awake = True
    return epoll_wait(reactor.watches.epoll_fd, events, EVENTS, 0 if awake else -1)


cdef void* reactor_main(void* argument) noexcept nogil:
    cdef vr_reactor* reactor = <vr_reactor*>argument
    cdef epoll_event[EVENTS] events
    cdef uint64_t wakes
    cdef int n, i
    prctl(PR_SET_TIMERSLACK, 1)     # else every SAMPLE_NS is 50 microseconds longer
    while serve(reactor):
        n = wait(reactor, events)
        for i in range(n):
            if events[i].data.ptr == NULL:
                read(reactor.wake_fd, &wakes, sizeof(wakes))
            else:
                look_at(reactor, <vr_watch*>events[i].data.ptr, events[i].events)
        run_turns(reactor)
    return NULL


cdef int launch(vr_reactor* reactor) noexcept nogil:
    """Start the thread with all signals blocked except its own faults and SIGSYS.

    Other threads handle the rest. Return 0 or errno.
    """
    cdef sigset_t others, before
    cdef int error
    sigfillset(&others)
    sigdelset(&others, SIGBUS)
    sigdelset(&others, SIGFPE)
    sigdelset(&others, SIGILL)
    sigdelset(&others, SIGSEGV)
    sigdelset(&others, SIGSYS)      # see _confine
    pthread_sigmask(SIG_SETMASK, &others, &before)
    error = pthread_create(&reactor.thread, NULL, reactor_main, reactor)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if error == 0:
        pthread_setname_np(reactor.thread, "vring-pump")
    return error


cdef int open_descriptors(vr_reactor* reactor) noexcept nogil:
    cdef epoll_event event
    cdef int error = watches_start(&reactor.watches)
    if error:
        return error
    reactor.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if reactor.wake_fd < 0:
        return errno
    reactor.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if reactor.event_fd < 0:
        return errno
    event.events = EPOLLIN
    event.data.ptr = NULL
    error = epoll_ctl(reactor.watches.epoll_fd, EPOLL_CTL_ADD, reactor.wake_fd, &event)
    return errno if error else 0


cdef void close_descriptor(int* fd) noexcept nogil:
    if fd[0] >= 0:
        close(fd[0])
    fd[0] = -1


cdef void close_descriptors(vr_reactor* reactor) noexcept nogil:
    watches_end(&reactor.watches)
    close_descriptor(&reactor.wake_fd)
    close_descriptor(&reactor.event_fd)
    tables_free(&reactor.tables)


cdef void release(vr_reactor* reactor) noexcept nogil:
    close_descriptors(reactor)
    pthread_mutex_destroy(&reactor.lock)
    pthread_cond_destroy(&reactor.answered)


cdef int reactor_start(vr_reactor* reactor, uint64_t busy_ns) noexcept nogil:
    cdef int error
    memset(reactor, 0, sizeof(vr_reactor))
    reactor.watches.epoll_fd = reactor.wake_fd = reactor.event_fd = -1
    reactor.busy_ns = busy_ns
    pthread_mutex_init(&reactor.lock, NULL)
    pthread_cond_init(&reactor.answered, NULL)
    error = open_descriptors(reactor)
    if error == 0 and tables_init(&reactor.tables):
        error = ENOMEM
    if error == 0:
        error = launch(reactor)
    if error:
        release(reactor)
    return error


cdef void reactor_halt(vr_reactor* reactor) noexcept nogil:
    # What it has open stays: nothing of it may move, and the process is to end.
    reactor_command(reactor, COMMAND_STOP, NULL)
    pthread_join(reactor.thread, NULL)


cdef void reactor_stop(vr_reactor* reactor) noexcept nogil:
    reactor_halt(reactor)
    pthread_mutex_lock(&reactor.lock)
    while reactor.waiting:
        pthread_cond_wait(&reactor.answered, &reactor.lock)     # answered, and not yet awake
    pthread_mutex_unlock(&reactor.lock)
    release(reactor)


cdef void reactor_abandon(vr_reactor* reactor) noexcept nogil:
    # Nothing else inherited is touched: the parent's thread may have held the lock.
    watches_abandon(&reactor.watches)
    close_descriptors(reactor)
