"""The turns of a flow: batches of chains to a descriptor, or from a descriptor into chains.

Nothing stays in flight between turns. What a descriptor did not take is given back to the queue and
popped again later; of a chain that it took in part, only the number of bytes is remembered. So
a thousand idle or throttled flows share one set of tables, and stopping one needs no clean-up.

An outgoing flow with something left to write (a backlog, a half-written chain) waits for nothing
but its descriptor: after a turn it is ready, and gets another turn, or an event for room is due.
"""

from __future__ import annotations

from libc.stdint cimport uint16_t
from libc.stdlib cimport malloc, realloc

from vring._core cimport VR_TOO_SMALL, VirtQueue
from vring._descriptor cimport FD_NONE, FD_OTHER, FD_SOCKET, discard_held, get, put, unread
from vring._guard cimport guard_probe
from vring._linux cimport EAGAIN, EFAULT, EPIPE, IOV_MAX, vr_count, vr_note, vr_now, writev
from vring._notify cimport notify_any
from vring._record cimport vr_keep, vr_record, vr_set_record, vr_store
from vring._sampler cimport sampler_call_waits, sampler_goes_on
from vring._segments cimport (
    backlog_add, backlog_cut, backlog_drop, backlog_segments, strip_copy, strip_cut, strip_mend,
    strip_skip, vr_strip
)
from vring._tables cimport CHAINS, SMALL, gather, vr_tables
from vring._walk cimport VR_SEGMENTS_MAX
from vring._wire cimport iovec

cdef enum:
    # A turn ends after this many bytes or batches, so that a busy port delays the others little.
    TURN_BYTES = 256 << 10
    TURN_BATCHES = 8
    # Bytes that one read may ask for: reading into part of a chain would complete it half empty.
    READ_BYTES = 1 << 20
    ROOM_MIN = 16 << 10
    # Fraction of its buffers that a reading guest gives back before it has to kick.
    OFFERED_PART = 4
    # A longer rest of a half-written chain is cut off when the flow ends, and counted as dropped.
    RESIDUE_MAX = 64 << 20


# --- what both directions share

cdef void call_driver(vr_flow* flow) noexcept nogil:
    """Write 8 bytes to the call descriptor, if a call is due."""
    if not flow.call_due or flow.call.kind == FD_NONE:
        return
    flow.call_due = False
    vr_count(&flow.counters.calls, 1)
    # The owner may have put another file behind the number; the kind says what to try first.
    flow.call.kind = (
        FD_SOCKET if notify_any(flow.call.number, flow.call.kind == FD_SOCKET) else FD_OTHER
    )


cdef void look_if_refused(vr_flow* flow) noexcept nogil:
    """Report, once, that the kernel does not splice here."""
    if flow.data.refused and not flow.inexact:
        flow.inexact = True
        flow.news |= NEWS_INEXACT


cdef void flow_stop(vr_flow* flow, uint32_t news, int error) noexcept nogil:
    """End the flow's turns and report `news` to its owner."""
    flow.news |= news
    flow.error = error
    flow.stopped = True


cdef bint memory_gone(vr_flow* flow, const vr_strip* refused) noexcept nogil:
    """Stop the flow and return 1 if guest memory was truncated: what was read may be zeros.

    `refused`: segments that a system call refused, or NULL.
    """
    if refused != NULL:
        guard_probe(refused.at, refused.n)
    if not (<VirtQueue>flow.queue).memory_lost():
        return False
    flow.broken = True
    flow_stop(flow, NEWS_BROKEN, 0)
    return True


cdef void throttle(vr_flow* flow) noexcept nogil:
    """Note that the other side takes nothing from now on; one number is all that readers need."""
    cdef uint64_t before = flow.counters.throttled_ns
    if not before & VR_THROTTLED:
        vr_note(&flow.counters.throttled_ns, VR_THROTTLED | (vr_now() - before))


cdef void unthrottle(vr_flow* flow) noexcept nogil:
    cdef uint64_t state = flow.counters.throttled_ns
    if state & VR_THROTTLED:
        vr_note(&flow.counters.throttled_ns, vr_now() - (state & ~VR_THROTTLED))


cdef void adapt(vr_flow* flow, uint64_t asked, uint64_t done) noexcept nogil:
    """Adapt how much is tried: popping and giving back costs as much as moving."""
    if done == asked:
        flow.room = min(max(flow.room, 2 * done), <uint64_t>TURN_BYTES)
    else:
        flow.room = min(max(2 * done, <uint64_t>ROOM_MIN), <uint64_t>TURN_BYTES)


cdef int take(vr_flow* flow, vr_tables* tables, uint32_t most) noexcept nogil:
    """Pop a batch into the tables; return its chains, or < 0 if the ring broke (flow stopped)."""
    cdef iovec* bigger
    cdef uint32_t size
    cdef int n
    while True:
        n = (<VirtQueue>flow.queue).pop_within(
            tables.chains, most, tables.segments, tables.max_segments, flow.room
        )
        if n != VR_TOO_SMALL:
            break
        size = 2 * tables.max_segments
        bigger = NULL
        if size <= VR_SEGMENTS_MAX:
            bigger = <iovec*>realloc(tables.segments, size * sizeof(iovec))
        if bigger == NULL:
            # marks the ring broken, for this cause
            n = (<VirtQueue>flow.queue).pop_c(
                tables.chains, 1, tables.segments, tables.max_segments
            )
            break
        tables.segments = bigger
        tables.max_segments = size
    if memory_gone(flow, NULL):
        if n > 0:
            (<VirtQueue>flow.queue).unpop_c(n)
        return -1
    if n < 0:
        flow.broken = True
        flow_stop(flow, NEWS_BROKEN, 0)
    elif n and flow.busy_ns:
        flow.poll_until = vr_now() + flow.busy_ns
    return n


cdef void complete(
    vr_flow* flow, const vr_tables* tables, const uint32_t* written, uint32_t n
) noexcept nogil:
    """Return the first n chains to the driver. The call for them may wait for more."""
    if n == 0:
        return
    vr_count(&flow.counters.chains, n)
    vr_count(&flow.counters.batches, 1)
    if (<VirtQueue>flow.queue).push_c(tables.chains, written, n) and not flow.call_due:
        flow.call_due = True
    else:
        vr_count(&flow.counters.calls_saved, 1)


cdef void give_back(vr_flow* flow, uint32_t n) noexcept nogil:
    if n:
        (<VirtQueue>flow.queue).unpop_c(n)


cdef bint wait_for_chains(vr_flow* flow) noexcept nogil:
    """Handle an empty queue; return 1 to poll it again, 0 if the driver will kick."""
    if flow.busy_ns and vr_now() < flow.poll_until:
        return True
    flow.listening = True
    # A guest that reads gives its buffers back one by one. It has all of them now and will give
    # back a good part if it wants more; one kick serves for all of that part.
    return (<VirtQueue>flow.queue).enable_notifications_after_c(
        <uint16_t>max(flow.offered // <uint32_t>OFFERED_PART, <uint32_t>1)
    )


# --- what a successor process must know

cdef void account(vr_flow* flow, uint64_t bytes) noexcept nogil:
    """Record in the queue how many bytes of the oldest chains the descriptor took or gave."""
    (<VirtQueue>flow.queue).accounted = bytes


cdef void record_skip(vr_flow* flow) noexcept nogil:
    """Record that the descriptor took part of a chain, and no whole chain."""
    cdef vr_record* record = (<VirtQueue>flow.queue).record
    (<VirtQueue>flow.queue).accounted = 0
    if record != NULL:
        vr_set_record(record, record.position, flow.skip)


cdef void settle_owed(vr_flow* flow, vr_tables* tables) noexcept nogil:
    """Complete the chains that a predecessor process moved and did not complete."""
    cdef uint64_t owed = flow.owed
    cdef vr_strip strip
    cdef int n
    flow.owed = 0
    flow.room = <uint64_t>-1
    n = take(flow, tables, CHAINS)
    flow.room = TURN_BYTES
    if n <= 0:
        record_skip(flow)       # the driver took back what it had offered
    elif flow.incoming:
        deliver(flow, tables, n, min(owed, gather(&strip, tables, n, True)))
    else:
        settle(flow, tables, n, owed)


# --- guest to host

cdef void settle(vr_flow* flow, const vr_tables* tables, uint32_t n, uint64_t taken) noexcept nogil:
    """Complete the chains within the first `taken` bytes of a batch; give back the others."""
    cdef uint32_t done = 0
    account(flow, taken)
    while done < n and taken >= tables.chains[done].readable_bytes:
        taken -= tables.chains[done].readable_bytes
        done += 1
    flow.skip = taken if done < n else 0
    if done == 0:
        record_skip(flow)
    complete(flow, tables, NULL, done)
    give_back(flow, n - done)


cdef void put_failed(vr_flow* flow, int error) noexcept nogil:
    """Wait for room, or give up, after the descriptor took nothing."""
    if error == EAGAIN and flow.data.pollable:
        flow.ready = False
        if not flow.lossy:
            throttle(flow)
    elif flow.lossy:
        # A console driver spins until its buffer is used, so keep draining.
        flow.failed = True
        flow.news |= NEWS_ERROR
        flow.error = error
        vr_count(&flow.counters.dropped, flow.backlog.length)
        if flow.backlog.length:
            backlog_drop(&flow.backlog, flow.backlog.length)
    else:
        flow_stop(flow, NEWS_ERROR, error)


cdef uint64_t put_some(
    vr_flow* flow, const vr_tables* tables, const vr_strip* strip, uint64_t total,
    vr_record* record
) noexcept nogil:
    """Write to the descriptor; return the bytes it took: all, unless it is full or fails."""
    cdef ssize_t done
    cdef iovec segment
    cdef vr_strip staged
    if strip.n > 2 and total <= <uint64_t>SMALL * strip.n:
        segment.iov_base = tables.stage
        segment.iov_len = strip_copy(strip, tables.stage, total)
        staged.at = &segment
        staged.n = 1
        if memory_gone(flow, NULL):
            return 0
        done = put(&flow.data, &staged, total, record)
    else:
        done = put(&flow.data, strip, total, record)
    look_if_refused(flow)
    if done == -EFAULT and memory_gone(flow, strip):
        return 0
    if done < 0:
        put_failed(flow, <int>-done)
        return 0
    vr_count(&flow.counters.bytes, done)
    if <uint64_t>done < total and (flow.data.pollable or done == 0):
        # It was full, or the next segments were no longer memory. Either may have ended by now
        # without an event, so ask for the descriptor's state. A file simply continues.
        put_failed(flow, EAGAIN)
        flow.doubtful = done != 0
    return done


cdef void log_taken(vr_flow* flow, const vr_strip* strip) noexcept nogil:
    """Write to the log, as far as it has room, what has been taken from the guest for good."""
    cdef uint64_t asked
    cdef ssize_t done
    cdef uint32_t at = 0, i, n
    cdef bint left_out = False
    while at < strip.n:
        n = min(strip.n - at, <uint32_t>IOV_MAX)
        asked = 0
        for i in range(n):
            asked += strip.at[at + i].iov_len
        # What follows a gap may fit again; a log with one gap is worth more than one with many.
        done = 0 if left_out else max(writev(flow.log_fd, strip.at + at, n), <ssize_t>0)
        if <uint64_t>done < asked:
            left_out = True
            vr_count(&flow.counters.unlogged, asked - <uint64_t>done)
        at += n
    if left_out and not flow.unlogging:
        flow.news |= NEWS_UNLOGGED
    flow.unlogging = left_out


cdef void flush(vr_flow* flow, const vr_tables* tables) noexcept nogil:
    """Write the backlog."""
    cdef iovec[2] segments
    cdef vr_strip strip
    cdef vr_record* record = NULL
    cdef uint64_t done
    strip.at = segments
    strip.n = backlog_segments(&flow.backlog, segments)
    if flow.backlog.store != NULL:
        record = &flow.backlog.store.record
    done = put_some(flow, tables, &strip, flow.backlog.length, record)
    if flow.backlog.length:         # a lossy flow that failed has dropped all
        backlog_drop(&flow.backlog, done)
    if flow.backlog.length == 0:
        flow.overflowing = False


cdef bint absorb(vr_flow* flow, const vr_strip* strip, uint64_t total) noexcept nogil:
    """Store what a console's descriptor did not take in the backlog, or drop it; 0: flow ended."""
    cdef uint64_t kept = 0
    cdef size_t before = flow.backlog.length, there
    cdef uint32_t i
    if not flow.failed:
        for i in range(strip.n):
            there = backlog_add(
                &flow.backlog, <const uint8_t*>strip.at[i].iov_base, strip.at[i].iov_len
            )
            kept += there
            if there < strip.at[i].iov_len:
                break
    if kept and memory_gone(flow, NULL):
        backlog_cut(&flow.backlog, before)
        return False
    if kept < total:
        vr_count(&flow.counters.dropped, total - kept)
        if not flow.overflowing and not flow.failed:
            flow.overflowing = True
            flow.news |= NEWS_OVERFLOW
    return True


cdef void commit_backlog(vr_flow* flow, uint64_t left) noexcept nogil:
    """Record that `left` bytes of the oldest chains are taken, those added to the backlog too."""
    cdef vr_store* store = flow.backlog.store
    cdef vr_record* record = (<VirtQueue>flow.queue).record
    cdef uint64_t added
    if store == NULL:
        return
    added = store.record.left + flow.backlog.length
    if record != NULL:
        vr_keep(record, left, added)
    store.added = added


cdef uint64_t send_batch(vr_flow* flow, vr_tables* tables, uint32_t n) noexcept nogil:
    """Move popped chains to the descriptor; return a measure of the work."""
    cdef uint64_t total, asked, done = 0, skip
    cdef vr_strip strip, part
    total = gather(&strip, tables, n, False)
    # The driver may have made the chain shorter meanwhile; it then counts as written.
    skip = min(flow.skip, <uint64_t>tables.chains[0].readable_bytes)
    strip_skip(&strip, skip)
    total -= skip
    part = strip
    if flow.ready and not flow.failed and not flow.backlog.length and total:
        asked = strip_cut(&part, total, min(<uint64_t>TURN_BYTES, flow.data.most))
        done = put_some(flow, tables, &part, asked, (<VirtQueue>flow.queue).record)
        strip_mend(&part)
        if flow.logged and done:
            part = strip
            strip_cut(&part, total, done)
            log_taken(flow, &part)
            strip_mend(&part)
        adapt(flow, asked, done)
        if done == asked and asked < total:
            settle(flow, tables, n, skip + done)        # the rest in the next round
            return done
    if flow.lossy and done < total and not flow.stopped:
        if not flow.backlog.length:
            discard_held(&flow.data)    # it is still in the queue
        strip_skip(&strip, done)
        if absorb(flow, &strip, total - done):
            done = total
            commit_backlog(flow, skip + done)
            if flow.logged:
                log_taken(flow, &strip)
    settle(flow, tables, n, skip + done)
    return done


cdef int turn_out(vr_flow* flow, vr_tables* tables) noexcept nogil:
    cdef int64_t left = TURN_BYTES
    cdef int n
    if flow.ready:
        unthrottle(flow)
    if flow.hangup and not flow.failed:
        put_failed(flow, EPIPE)
    for _ in range(TURN_BATCHES):
        if flow.backlog.length and flow.ready:
            flush(flow, tables)
        if flow.stopped or (not flow.lossy and (flow.backlog.length or not flow.ready)):
            return TURN_MORE if not flow.stopped and flow.ready else TURN_WAIT
        n = take(flow, tables, CHAINS)
        if n < 0:
            return TURN_WAIT
        if n == 0:
            if flow.backlog.length and flow.ready:
                return TURN_MORE
            # A console's driver does wait, for each chain.
            if not flow.lossy and not flow.busy_ns and sampler_goes_on(
                &flow.sampler, (<VirtQueue>flow.queue).size
            ):
                return TURN_LATER
            return TURN_MORE if wait_for_chains(flow) else TURN_WAIT
        flow.sampler.found += n
        left -= send_batch(flow, tables, n)
        if left <= 0:
            break
    return TURN_MORE if not flow.stopped and (flow.lossy or flow.ready) else TURN_WAIT


# --- host to guest

cdef void deliver(vr_flow* flow, vr_tables* tables, uint32_t n, uint64_t length) noexcept nogil:
    """Complete the chains that the first `length` bytes of a strip went into; give back others."""
    cdef uint32_t used = 0, there
    (<VirtQueue>flow.queue).mark_c(tables.segments, tables.max_segments, length)
    account(flow, length)
    while used < n and length:
        there = <uint32_t>min(length, <uint64_t>tables.chains[used].writable_bytes)
        tables.written[used] = there
        length -= there
        used += 1
    complete(flow, tables, tables.written, used)
    give_back(flow, n - used)


cdef uint64_t receive_batch(vr_flow* flow, vr_tables* tables, uint32_t n) noexcept nogil:
    """Read into popped chains; return the bytes read."""
    cdef uint64_t asked
    cdef vr_strip strip
    cdef ssize_t done
    asked = gather(&strip, tables, n, True)
    if asked == 0:
        complete(flow, tables, NULL, n)         # buffers for nothing: nothing is what they get
        return 0
    asked = strip_cut(&strip, asked, READ_BYTES)
    done = get(&flow.data, &strip, asked, (<VirtQueue>flow.queue).record)
    look_if_refused(flow)
    if done > 0:
        vr_count(&flow.counters.bytes, done)
        adapt(flow, asked, done)
        deliver(flow, tables, n, done)
        if <uint64_t>done < asked:
            call_driver(flow)       # it was the last for now: before looking whether that is so
        return done
    give_back(flow, n)
    if done == -EFAULT and memory_gone(flow, &strip):
        return 0
    if done == 0:
        flow_stop(flow, NEWS_EOF, 0)
    elif done == -EAGAIN and flow.data.pollable:
        flow.ready = False
    else:
        flow_stop(flow, NEWS_ERROR, <int>-done)
    return 0


cdef void check_peer(vr_flow* flow) noexcept nogil:
    """End the flow if the peer left and no bytes are left to read (the guest has no buffers)."""
    cdef ssize_t waiting = unread(&flow.data)
    if waiting == 0:
        flow_stop(flow, NEWS_EOF, 0)
    elif waiting < 0 and waiting != -EAGAIN:
        flow_stop(flow, NEWS_ERROR, <int>-waiting)


cdef int turn_in(vr_flow* flow, vr_tables* tables) noexcept nogil:
    cdef int64_t left = TURN_BYTES
    cdef int n
    flow.offered = max(flow.offered, (<VirtQueue>flow.queue).available_c())
    for _ in range(TURN_BATCHES):
        if not flow.ready or flow.stopped:
            return TURN_WAIT
        n = take(flow, tables, CHAINS)
        if n < 0:
            return TURN_WAIT
        if n == 0:
            throttle(flow)
            if flow.hangup:
                check_peer(flow)
            return TURN_MORE if not flow.stopped and wait_for_chains(flow) else TURN_WAIT
        unthrottle(flow)
        left -= receive_batch(flow, tables, n)
        if left <= 0:
            break
    return TURN_MORE if not flow.stopped and flow.ready else TURN_WAIT


# --- the flow as a whole

cdef int flow_turn(vr_flow* flow, vr_tables* tables) noexcept nogil:
    cdef int after
    if flow.stopped:
        return TURN_WAIT
    if flow.listening:
        flow.listening = False
        (<VirtQueue>flow.queue).disable_notifications_c()
    if flow.owed:
        settle_owed(flow, tables)
    after = turn_in(flow, tables) if flow.incoming else turn_out(flow, tables)
    if not sampler_call_waits(&flow.sampler, after == TURN_LATER):
        call_driver(flow)
    return after


cdef void keep_residue(vr_flow* flow, const vr_strip* strip, uint64_t total) noexcept nogil:
    """Copy the rest that the descriptor did not take into the flow's residue."""
    cdef uint64_t length = min(total, <uint64_t>RESIDUE_MAX)
    flow.residue = <uint8_t*>malloc(length) if length else NULL
    flow.residue_length = 0
    if flow.residue != NULL:
        flow.residue_length = strip_copy(strip, flow.residue, length)
    vr_count(&flow.counters.dropped, total - flow.residue_length)


cdef void flow_finish(vr_flow* flow, vr_tables* tables) noexcept nogil:
    cdef iovec[2] segments
    cdef vr_strip strip
    cdef uint64_t total, skip
    unthrottle(flow)
    if not flow.incoming:
        discard_held(&flow.data)    # it is still in the queue
    if flow.owed and not flow.broken:
        settle_owed(flow, tables)
    if flow.backlog.length and flow.backlog.store != NULL:
        pass                            # it stays there
    elif flow.backlog.length:
        strip.at = segments
        strip.n = backlog_segments(&flow.backlog, segments)
        keep_residue(flow, &strip, flow.backlog.length)
        backlog_drop(&flow.backlog, flow.backlog.length)
    elif flow.skip:
        if take(flow, tables, 1) > 0:
            total = gather(&strip, tables, 1, False)
            skip = min(flow.skip, total)
            strip_skip(&strip, skip)
            if flow.backlog.store != NULL and total - skip <= flow.backlog.capacity:
                if absorb(flow, &strip, total - skip):
                    commit_backlog(flow, total)
            else:
                keep_residue(flow, &strip, total - skip)
            if memory_gone(flow, NULL):
                vr_count(&flow.counters.dropped, flow.residue_length)
                flow.residue_length = 0
                give_back(flow, 1)
            elif flow.gives_back:
                give_back(flow, 1)      # a record says how much of it was taken
            else:
                if flow.logged:
                    log_taken(flow, &strip)
                complete(flow, tables, NULL, 1)
    call_driver(flow)
    flow.skip = 0
    # As in a new queue: its next user need not know of the pump.
    if not flow.broken:
        (<VirtQueue>flow.queue).enable_notifications_c()
