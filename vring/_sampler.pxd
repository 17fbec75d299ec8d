# The decision to poll the queue of a sending guest again soon, instead of asking for a kick for
# each chain: arithmetic on counts and times, with no system call except for the clock. Inline,
# since it is part of every turn.
#
# Kicks and calls cost the guest far more than its work on a chain. While chains stream in, they are
# taken without kicks every SAMPLE_NS, and one call serves several samples: a driver that continues
# is not waiting for it, and one that waits sends no more, which the next sample notices.

from libc.stdint cimport uint32_t, uint64_t

from vring._linux cimport vr_now

cdef enum:
    # Time between two samples of a stream.
    SAMPLE_NS = 250_000
    # Sampling begins after STREAK chains that came in batches, or with less than SAMPLE_NS between
    # them, and continues while each sample has SAMPLE_CHAINS. If processes in the guest take turns,
    # one may wait TURN_NS for the next: a pause of that length does not end a streak.
    STREAK = 16
    SAMPLE_CHAINS = 3
    TURN_NS = 8_000_000
    # After a stream with so many sampled chains, sampling begins again with its next chains.
    SAMPLED_MIN = 5
    # After fewer, if the last sample had chains (their sender waits for something), sampling is not
    # tried again for so long (ns), twice as long each time.
    CALM_NS_MIN = 500_000
    CALM_NS_MAX = 64_000_000
    # A sample that found 1/CROWDED_PART of the queue full: the driver waits for room, or soon will.
    CROWDED_PART = 2
    # After so many samples the driver is called, although more chains come.
    UNANSWERED_MAX = 4

cdef struct vr_sampler:
    bint sampling               # chains stream in; poll for them, without kicks
    bint warm                   # the last stream was long (SAMPLED_MIN)
    uint32_t found              # chains popped since the queue was last empty
    uint32_t streak             # chains since they began to come fast
    uint32_t sampled            # chains since sampling began
    uint32_t unanswered         # samples for which the driver has not been called
    uint64_t emptied            # ns; when the queue was last empty
    uint64_t calm_until         # ns; no sampling before
    uint64_t calm_ns            # length of the last such pause


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
