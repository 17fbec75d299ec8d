/* The yardstick of test_ring.py: what a careful C programmer writes for one fixed ring. It walks
   every available chain, checks and translates each descriptor (read once), uses its buffers in the
   same pass (here: sums them up, so that the compiler must produce them), and publishes per batch:
   acquire on the available index, release on the used index, one fence, one notify decision. */
#include <stdint.h>
#include <string.h>

#define NEXT 1
#define WRITE 2
#define INDIRECT 4
#define AVAIL_BIT (1 << 7)
#define USED_BIT (1 << 15)

struct region { uint64_t guest, size; uint8_t *host; };
struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };

struct ring {
    const struct region *regions;
    uint64_t n_regions;
    uint64_t size;
    uint8_t *desc, *avail, *used;       /* packed: ring, driver event, device event */
    uint64_t event_idx;
    uint64_t next_avail, next_used;     /* packed: slots, wrap counters follow */
    uint64_t avail_wrap, used_wrap;
    uint8_t *copy_to;                   /* where payloads are copied, or NULL */
    uint64_t notifications, checksum;
};

static inline struct desc read_desc(const void *p) {
    uint64_t w0 = ((const volatile uint64_t *)p)[0], w1 = ((const volatile uint64_t *)p)[1];
    return (struct desc){w0, (uint32_t)w1, (uint16_t)(w1 >> 32), (uint16_t)(w1 >> 48)};
}

static inline uint8_t *translate(const struct ring *r, const struct region **last, uint64_t addr,
                                 uint64_t len) {
    const struct region *g = *last;
    uint64_t offset = addr - g->guest;
    if (__builtin_expect(offset < g->size && len <= g->size - offset, 1)) return g->host + offset;
    for (uint64_t i = 0; i < r->n_regions; i++) {
        g = &r->regions[i];
        offset = addr - g->guest;
        if (offset < g->size && len <= g->size - offset) {
            *last = g;
            return g->host + offset;
        }
    }
    return 0;
}

static inline int use(struct ring *r, uint8_t *host, uint32_t len, uint64_t *sum) {
    if (!host) return -1;
    if (r->copy_to) {
        memcpy(r->copy_to, host, len);
        r->copy_to += len;
    }
    *sum += (uint64_t)host + len;
    return 0;
}

/* One available chain of a split ring, bytes in *bytes. */
static inline int split_chain(struct ring *r, const struct region **last, uint16_t head,
                              uint64_t *sum, uint64_t *bytes) {
    const uint8_t *table = r->desc;
    uint64_t entries = r->size, left = r->size;
    int inside = 0, writable = 0;
    if (head >= entries) return -1;
    struct desc d = read_desc(table + 16 * (uint64_t)head);
    for (;;) {
        if (d.flags & INDIRECT) {
            if (inside || (d.flags & NEXT) || !d.len || d.len % 16) return -1;
            table = translate(r, last, d.addr, d.len);
            if (!table) return -1;
            entries = d.len / 16;
            inside = 1;
            d = read_desc(table);
            continue;
        }
        if (!left--) return -1;
        if (d.flags & WRITE) writable = 1;
        else if (writable) return -1;
        if (use(r, translate(r, last, d.addr, d.len), d.len, sum)) return -1;
        *bytes += d.len;
        if (!(d.flags & NEXT)) return 0;
        if (d.next >= entries) return -1;
        d = read_desc(table + 16 * (uint64_t)d.next);
    }
}

/* Everything that is available, `batches` times; the driver's refill is one store. */
int split_run(struct ring *r, uint64_t batches, uint64_t chains) {
    uint16_t mask = r->size - 1;
    uint8_t *copy_to = r->copy_to;
    for (uint64_t b = 0; b < batches; b++) {
        __atomic_store_n((uint16_t *)(r->avail + 2), (uint16_t)(r->next_avail + chains),
                         __ATOMIC_RELAXED);
        uint16_t before = r->next_used, index = r->next_avail;
        uint16_t ready = __atomic_load_n((uint16_t *)(r->avail + 2), __ATOMIC_ACQUIRE) - index;
        const struct region *last = r->regions;
        uint64_t sum = 0;
        if (ready > r->size) return -1;
        r->copy_to = copy_to;
        for (uint16_t i = 0; i < ready; i++) {
            uint16_t head = *(volatile uint16_t *)(r->avail + 4 + 2 * (uint64_t)((index + i) & mask));
            uint64_t bytes = 0;
            if (split_chain(r, &last, head, &sum, &bytes)) return -1;
            uint32_t element[2] = {head, 0};
            memcpy(r->used + 4 + 8 * (uint64_t)((before + i) & mask), element, 8);
        }
        uint16_t after = before + ready;
        __atomic_store_n((uint16_t *)(r->used + 2), after, __ATOMIC_RELEASE);
        r->next_avail = (uint16_t)(index + ready);
        r->next_used = after;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (r->event_idx) {
            uint16_t event = *(volatile uint16_t *)(r->avail + 4 + 2 * r->size);
            r->notifications += (uint16_t)(after - event - 1) < (uint16_t)(after - before);
        } else {
            r->notifications += !(*(volatile uint16_t *)r->avail & 1);
        }
        r->checksum += sum;
    }
    return 0;
}

/* The same for a packed ring: the driver's refill is one store per chain, of its flags. */
int packed_run(struct ring *r, uint64_t batches, uint64_t chains) {
    uint8_t *copy_to = r->copy_to;
    for (uint64_t b = 0; b < batches; b++) {
        const struct region *last = r->regions;
        uint64_t sum = 0, slot = r->next_avail, wrap = r->avail_wrap, done = 0;
        uint64_t first = r->next_used, first_wrap = r->used_wrap, first_id = 0;
        r->copy_to = copy_to;
        while (done < chains) {
            uint8_t *p = r->desc + 16 * slot;
            uint16_t flags = __atomic_load_n((uint16_t *)(p + 14), __ATOMIC_ACQUIRE);
            if (((flags & AVAIL_BIT) != 0) != wrap || ((flags & USED_BIT) != 0) == wrap) break;
            uint64_t slots = 0, bytes = 0, id;
            int writable = 0;
            for (;;) {
                struct desc d = read_desc(r->desc + 16 * slot);
                flags = d.next;
                id = d.flags;
                if (++slots > r->size) return -1;
                if (++slot == r->size) {
                    slot = 0;
                    wrap = !wrap;
                }
                if (flags & INDIRECT) return -1;
                if (flags & WRITE) writable = 1;
                else if (writable) return -1;
                if (use(r, translate(r, &last, d.addr, d.len), d.len, &sum)) return -1;
                bytes += d.len;
                if (!(flags & NEXT)) break;
            }
            if (done) {
                uint64_t word = id << 32 | (r->used_wrap ? (uint64_t)(AVAIL_BIT | USED_BIT) << 48 : 0);
                memcpy(r->desc + 16 * r->next_used + 8, &word, 8);
            } else {
                first_id = id;
            }
            r->next_used += slots;
            if (r->next_used >= r->size) {
                r->next_used -= r->size;
                r->used_wrap = !r->used_wrap;
            }
            done++;
        }
        if (done) {
            uint64_t word =
                first_id << 32 | (first_wrap ? (uint64_t)(AVAIL_BIT | USED_BIT) << 48 : 0);
            __atomic_store_n((uint64_t *)(r->desc + 16 * first + 8), word, __ATOMIC_RELEASE);
        }
        r->next_avail = slot;
        r->avail_wrap = wrap;
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        r->notifications += (*(volatile uint32_t *)r->avail >> 16 & 3) != 1;
        r->checksum += sum;
    }
    return 0;
}

/* Pieces of memory one after the other. */
void copy_pieces(uint8_t *to, const uint64_t *from, uint64_t count, uint64_t length) {
    for (uint64_t i = 0; i < count; i++, to += length) memcpy(to, (const void *)from[i], length);
}
