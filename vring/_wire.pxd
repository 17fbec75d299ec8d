# Access to guest memory: entries of rings (virtio 1.3, 2.7 and 2.8), flags, atomics and the one
# wrap-safe event comparison. Declared once; everything else cimports it. Offsets and sizes are in
# _layout.
#
# Every access to shared memory goes through a function of this file. They load or store exactly
# once (atomic or volatile), so that a driver that changes memory meanwhile cannot show two values,
# and they convert from the rings' little-endian order.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<stdint.h>" nogil:
    const uint32_t UINT32_MAX
    const uint64_t UINT64_MAX

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from * nogil:
    """
    #ifndef VRING_WIRE_H
    #define VRING_WIRE_H
    #include <endian.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    /* 2.7.5 The Virtqueue Descriptor Table */
    typedef struct {
        uint64_t addr;
        uint32_t len;
        uint16_t flags;
        uint16_t next;
    } vr_desc;
    /* 2.8.13 The Virtqueue Descriptor Ring */
    typedef struct {
        uint64_t addr;
        uint32_t len;
        uint16_t id;
        uint16_t flags;
    } vr_packed_desc;
    /* 2.7.8 The Virtqueue Used Ring, one element */
    typedef struct {
        uint32_t id;
        uint32_t len;
    } vr_used_elem;
    /* 2.8.14 Event Suppression Structure Format */
    typedef struct {
        uint16_t off_wrap;
        uint16_t flags;
    } vr_packed_event;

    _Static_assert(sizeof(vr_desc) == 16, "split descriptor");
    _Static_assert(offsetof(vr_desc, len) == 8, "split descriptor len");
    _Static_assert(offsetof(vr_desc, flags) == 12, "split descriptor flags");
    _Static_assert(offsetof(vr_desc, next) == 14, "split descriptor next");
    _Static_assert(sizeof(vr_packed_desc) == 16, "packed descriptor");
    _Static_assert(offsetof(vr_packed_desc, id) == 12, "packed descriptor id");
    _Static_assert(offsetof(vr_packed_desc, flags) == 14, "packed descriptor flags");
    _Static_assert(sizeof(vr_used_elem) == 8, "used element");
    _Static_assert(sizeof(vr_packed_event) == 4, "event suppression structure");
    _Static_assert(sizeof(void *) == 8 && sizeof(size_t) == 8, "64-bit hosts only");

    #define vr_likely(x) __builtin_expect(!!(x), 1)
    #define vr_unlikely(x) __builtin_expect(!!(x), 0)

    typedef uint16_t vr_u16 __attribute__((may_alias));
    typedef uint32_t vr_u32 __attribute__((may_alias));
    typedef uint64_t vr_u64 __attribute__((may_alias));
    /* used elements are aligned to 4 bytes, indirect tables to nothing (2.7.5.3) */
    typedef uint64_t vr_u64_half __attribute__((may_alias, aligned(4)));
    typedef uint64_t vr_u64_any __attribute__((may_alias, aligned(1)));

    static inline uint16_t vr_load16(const void *p) {
        return le16toh(__atomic_load_n((const vr_u16 *)p, __ATOMIC_RELAXED));
    }
    static inline uint16_t vr_load16_acquire(const void *p) {
        return le16toh(__atomic_load_n((const vr_u16 *)p, __ATOMIC_ACQUIRE));
    }
    static inline uint32_t vr_load32(const void *p) {
        return le32toh(__atomic_load_n((const vr_u32 *)p, __ATOMIC_RELAXED));
    }
    static inline void vr_store16(void *p, uint16_t v) {
        __atomic_store_n((vr_u16 *)p, htole16(v), __ATOMIC_RELAXED);
    }
    static inline void vr_store16_release(void *p, uint16_t v) {
        __atomic_store_n((vr_u16 *)p, htole16(v), __ATOMIC_RELEASE);
    }
    static inline void vr_store32(void *p, uint32_t v) {
        __atomic_store_n((vr_u32 *)p, htole32(v), __ATOMIC_RELAXED);
    }
    /* Set bits of a byte in which others clear bits; a full fence. */
    static inline void vr_or8(void *p, uint8_t bits) {
        __atomic_fetch_or((uint8_t *)p, bits, __ATOMIC_SEQ_CST);
    }
    /* Clears bits, and returns those of them that were set. */
    static inline uint8_t vr_take8(void *p, uint8_t bits) {
        return __atomic_fetch_and((uint8_t *)p, (uint8_t)~bits, __ATOMIC_SEQ_CST) & bits;
    }
    /* Store-load ordering: our index before our reading of the other side's suppression state. */
    static inline void vr_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

    /* A descriptor that was read, with fields as wide as registers like them. */
    typedef struct {
        uint64_t addr;
        uint32_t len;
        uint32_t flags;
        uint32_t next;      /* packed: not used */
        uint32_t id;        /* split: not used */
    } vr_entry;
    /* Load one of the two words of a descriptor, once. In a ring it is aligned. For processors
       without unaligned loads and stores (RISC-V), compilers assemble a possibly unaligned word
       byte by byte: only descriptors of unaligned indirect tables are read so. */
    static inline uint64_t vr_load_word(const void *p, int i) {
    #if !defined(__x86_64__) && !defined(__aarch64__)
        if (vr_likely(((uintptr_t)p & 7) == 0))
            return ((const volatile vr_u64 *)p)[i];
    #endif
        return ((const volatile vr_u64_any *)p)[i];
    }
    static inline void vr_store_word(void *p, int i, uint64_t v) {
    #if !defined(__x86_64__) && !defined(__aarch64__)
        if (vr_likely(((uintptr_t)p & 7) == 0)) {
            ((volatile vr_u64 *)p)[i] = v;
            return;
        }
    #endif
        ((vr_u64_any *)p)[i] = v;
    }
    static inline vr_entry vr_read_desc(const void *p) {
        uint64_t addr = le64toh(vr_load_word(p, 0)), rest = le64toh(vr_load_word(p, 1));
        vr_entry d = {addr, (uint32_t)rest, (uint32_t)(rest >> 32) & 0xffff,
                      (uint32_t)(rest >> 48), 0};
        return d;
    }
    static inline vr_entry vr_read_packed(const void *p) {
        uint64_t addr = le64toh(vr_load_word(p, 0)), rest = le64toh(vr_load_word(p, 1));
        vr_entry d = {addr, (uint32_t)rest, (uint32_t)(rest >> 48), 0,
                      (uint32_t)(rest >> 32) & 0xffff};
        return d;
    }
    /* Store len, id and flags at once, after everything before it. */
    static inline void vr_write_packed_used(void *p, uint32_t len, uint16_t id, uint16_t flags) {
        uint64_t word = (uint64_t)len | (uint64_t)id << 32 | (uint64_t)flags << 48;
        __atomic_store_n((vr_u64 *)((uint8_t *)p + 8), htole64(word), __ATOMIC_RELEASE);
    }
    /* Chains mostly lie in sequence. Guessing so lets the processor read the next descriptor
       before `next` has arrived. The empty asms keep the compiler from proving the guess right. */
    static inline uint32_t vr_follow(uint32_t at, uint32_t next) {
        uint32_t follow = at + 1;
        __asm__("" : "+r"(follow));
        if (vr_unlikely(at + 1 != next)) {
            follow = next;
            __asm__ volatile("" : "+r"(follow));
        }
        return follow;
    }
    static inline void vr_write_desc(void *p, uint64_t addr, uint32_t len, uint16_t flags,
                                     uint16_t next) {
        vr_store_word(p, 0, htole64(addr));
        vr_store_word(p, 1,
                      htole64((uint64_t)len | (uint64_t)flags << 32 | (uint64_t)next << 48));
    }
    /* Copy a descriptor as it is in memory. */
    static inline void vr_read_whole(void *entry, const void *p) {
        uint64_t words[2] = {vr_load_word(p, 0), vr_load_word(p, 1)};
        memcpy(entry, words, sizeof words);
    }
    /* Ordered by the index that is published later. */
    static inline void vr_write_used(void *p, uint32_t id, uint32_t len) {
        *(vr_u64_half *)p = htole64((uint64_t)id | (uint64_t)len << 32);
    }

    /* Store value in one of two adjacent numbers and 0 in the other, at once. */
    static inline void vr_store_one_of(void *p, uint32_t value, int second) {
        uint64_t pair = (uint64_t)value << ((__BYTE_ORDER == __BIG_ENDIAN) ^ !!second) * 32;
        memcpy(p, &pair, sizeof pair);
    }

    /* Return whether moving an index from `before` to `after` passes `event` (2.7.7.2). */
    static inline int vr_need_event(uint16_t event, uint16_t after, uint16_t before) {
        return (uint16_t)(after - event - 1) < (uint16_t)(after - before);
    }

    /* glibc copies more than 2112 bytes with `rep movsb` on some processors, which falls to as
       little as a tenth of its speed when the destination lies 1 to 127 bytes past the source,
       modulo a page. There, and only there, copy with a loop of our own (destination aligned: as
       fast as `rep movsb` at its best). Without AVX2 glibc has no need of `rep movsb`. */
    #define VR_COPY_STRING 2112
    #if defined(__x86_64__)
    #include <immintrin.h>
    __attribute__((target("avx2"), noinline, unused))
    static void vr_copy_vectors(uint8_t *to, const uint8_t *from, size_t n) {
        size_t head = -(uintptr_t)to & 31;
        memcpy(to, from, 32);
        to += head;
        from += head;
        for (n -= head; n >= 128; n -= 128) {
            __m256i a = _mm256_loadu_si256((const __m256i *)from);
            __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
            __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64));
            __m256i d = _mm256_loadu_si256((const __m256i *)(from + 96));
            _mm256_store_si256((__m256i *)to, a);
            _mm256_store_si256((__m256i *)(to + 32), b);
            _mm256_store_si256((__m256i *)(to + 64), c);
            _mm256_store_si256((__m256i *)(to + 96), d);
            to += 128;
            from += 128;
        }
        memcpy(to, from, n);
    }
    #endif
    /* The ranges may overlap: a driver can make its buffers do so. glibc has one function for
       memcpy and memmove. */
    static inline void vr_copy(void *to, const void *from, size_t n) {
    #if defined(__x86_64__)
        size_t distance = ((uintptr_t)to - (uintptr_t)from) & 4095;
        if (n > VR_COPY_STRING && distance - 1 < 127 && (uintptr_t)to - (uintptr_t)from >= n &&
            (uintptr_t)from - (uintptr_t)to >= n && __builtin_cpu_supports("avx2")) {
            vr_copy_vectors((uint8_t *)to, (const uint8_t *)from, n);
            return;
        }
    #endif
        memmove(to, from, n);
    }
    #endif
    """
    ctypedef struct vr_entry:
        uint64_t addr
        uint32_t len
        uint32_t flags
        uint32_t next
        uint32_t id
    uint16_t vr_load16(const void* p)
    uint16_t vr_load16_acquire(const void* p)
    uint32_t vr_load32(const void* p)
    void vr_store16(void* p, uint16_t value)
    void vr_store16_release(void* p, uint16_t value)
    void vr_store32(void* p, uint32_t value)
    void vr_or8(void* p, uint8_t bits)
    uint8_t vr_take8(void* p, uint8_t bits)
    void vr_fence()
    vr_entry vr_read_desc(const void* p)
    vr_entry vr_read_packed(const void* p)
    void vr_write_packed_used(void* p, uint32_t len, uint16_t id, uint16_t flags)
    uint32_t vr_follow(uint32_t at, uint32_t next)
    void vr_write_desc(void* p, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
    void vr_read_whole(void* entry, const void* p)
    void vr_write_used(void* p, uint32_t id, uint32_t len)
    void vr_store_one_of(void* p, uint32_t value, bint second)
    bint vr_likely(bint condition)
    bint vr_unlikely(bint condition)
    bint vr_need_event(uint16_t event, uint16_t after, uint16_t before)
    void vr_copy(void* to, const void* source, size_t n)

cdef enum:
    # flags of a descriptor (2.7.5, 2.8.13)
    DESC_F_NEXT = 1
    DESC_F_WRITE = 2
    DESC_F_INDIRECT = 4
    DESC_F_AVAIL = 1 << 7
    DESC_F_USED = 1 << 15
    # flags of the split rings (2.7.6, 2.7.8)
    AVAIL_F_NO_INTERRUPT = 1
    USED_F_NO_NOTIFY = 1
    # flags of the packed event suppression structures (2.8.14)
    EVENT_ENABLE = 0
    EVENT_DISABLE = 1
    EVENT_DESC = 2
