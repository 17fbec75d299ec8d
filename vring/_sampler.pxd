# When the queue of a guest that sends is looked at again soon, instead of being kicked for each
# chain: arithmetic on counts and times, without a system call but for the clock. Inline, for it is
# part of every turn.
#
# Kicks and calls cost the guest far more than its work on a chain. As long as chains stream in,
# they are taken unkicked, as many as came in SAMPLE_NS, and one call serves several samples: a
# driver that goes on is not waiting for it, and one that waits sends no more, which is noticed by
# the next sample.

from libc.stdint cimport uint32_t, uint64_t

from vring._linux cimport vr_now

cdef enum:
    # How long chains may gather that come in a stream.
    SAMPLE_NS = 250_000
    # Sampling begins after so many chains that came in batches, or with less than SAMPLE_NS between
    # them, and goes on while each sample has so many. Of several processes in the guest that take
    # turns, one may wait so long (ns) for the next: that is no end of its stream.
    STREAK = 16
    SAMPLE_CHAINS = 3
    TURN_NS = 8_000_000
    # A stream that had so many chains sampled is believed at once when it goes on later.
    SAMPLED_MIN = 5
    # After fewer, the last of them with chains in it whose sender waits for something, sampling is
    # not tried again for so long (ns), twice as long each time.
    CALM_NS_MIN = 500_000
    CALM_NS_MAX = 64_000_000
    # A sample that found such a part of the queue full: the driver waits for room, or soon will.
    CROWDED_PART = 2
    # Samples after which the driver is called although more chains come.
    UNANSWERED_MAX = 4

cdef struct vr_sampler:
    bint sampling               # chains stream in; look for them now and then, unkicked
    bint warm                   # there were many of them the last time
    uint32_t found              # chains popped since the queue was last empty
    uint32_t streak             # since they come fast
    uint32_t sampled            # chains since sampling began
    uint32_t unanswered         # samples for which the driver has not been called
    uint64_t emptied            # ns; when the queue was last empty
    uint64_t calm_until         # ns; until then, no sampling
    uint64_t calm_ns            # how long that was


cdef inline bint sampler_goes_on(vr_sampler* sampler, uint32_t size) noexcept nogil:
    """Return whether to look again in SAMPLE_NS at a queue of `size` that is empty now."""
    cdef uint64_t now
    cdef uint32_t found = sampler.found
    sampler.found = 0
    if CROWDED_PART * found >= size:
        return False
    now = vr_now()
    if sampler.sampling:
        if found >= SAMPLE_CHAINS:
            sampler.sampled += found
            return True
        sampler.sampling = False
        sampler.warm = sampler.sampled >= SAMPLED_MIN
        if sampler.warm:
            sampler.calm_ns = 0
        elif found:
            sampler.calm_ns = min(
                max(2 * sampler.calm_ns, <uint64_t>CALM_NS_MIN), <uint64_t>CALM_NS_MAX
            )
            sampler.calm_until = now + sampler.calm_ns
    if found >= SAMPLE_CHAINS or now < sampler.emptied + SAMPLE_NS:
        sampler.streak += found
    elif now >= sampler.emptied + TURN_NS:
        sampler.streak = 0
    sampler.emptied = now
    if now >= sampler.calm_until and (sampler.streak >= STREAK or (sampler.warm and found)):
        sampler.sampling = True
        sampler.warm = False
        sampler.streak = sampler.sampled = 0
    return sampler.sampling


cdef inline bint sampler_call_waits(vr_sampler* sampler, bint again) noexcept nogil:
    """Return whether the driver's call may wait after a turn; `again`: a sample follows it."""
    if again and sampler.unanswered < UNANSWERED_MAX:
        sampler.unanswered += 1
        return True
    sampler.unanswered = 0
    return False
