# The tables that a batch is popped into: its chains, their segments, and room to join small ones.
# Scratch memory of one thread, which holds nothing between turns. Inline, as every batch uses it.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from vring._linux cimport IOV_MAX
from vring._segments cimport vr_strip
from vring._walk cimport vr_chain
from vring._wire cimport iovec

cdef enum:
    CHAINS = 1024               # entries of `chains` and `written`
    # Copying up to this many bytes takes less time than the kernel needs for a segment.
    SMALL = 512

cdef struct vr_tables:
    vr_chain* chains
    uint32_t* written
    iovec* segments
    uint32_t max_segments
    uint8_t* stage              # IOV_MAX * SMALL bytes, where small segments are joined


cdef inline int tables_init(vr_tables* tables) noexcept nogil:
    """Allocate zeroed tables; return 0, or -1 without memory. Call tables_free in both cases."""
    tables.max_segments = IOV_MAX
    tables.chains = <vr_chain*>calloc(CHAINS, sizeof(vr_chain))
    tables.written = <uint32_t*>calloc(CHAINS, sizeof(uint32_t))
    tables.segments = <iovec*>calloc(IOV_MAX, sizeof(iovec))
    tables.stage = <uint8_t*>malloc(IOV_MAX * SMALL)
    return -(
        tables.chains == NULL or tables.written == NULL or tables.segments == NULL
        or tables.stage == NULL
    )


cdef inline void tables_free(vr_tables* tables) noexcept nogil:
    free(tables.chains)
    free(tables.written)
    free(tables.segments)
    free(tables.stage)
    tables.stage = NULL
    tables.chains = NULL
    tables.written = NULL
    tables.segments = NULL


cdef inline uint64_t gather(
    vr_strip* strip, const vr_tables* tables, uint32_t n, bint writable
) noexcept nogil:
    """Make a strip of all readable (or all writable) segments of n chains; return its bytes.

    A chain may have both kinds although its queue is meant for one; the segments of the other kind
    are removed from the table.
    """
    cdef const vr_chain* chain
    cdef uint64_t total = 0
    cdef uint32_t i, j, first, count, filled = 0
    for i in range(n):
        chain = &tables.chains[i]
        total += chain.writable_bytes if writable else chain.readable_bytes
        first = chain.first_segment + (chain.n_readable if writable else 0)
        count = chain.n_writable if writable else chain.n_readable
        if first != filled:
            for j in range(count):
                tables.segments[filled + j] = tables.segments[first + j]
        filled += count
    strip.at = tables.segments
    strip.n = filled
    return total
