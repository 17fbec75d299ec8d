"""Protection from truncated files behind guest memory (SIGBUS).

A frontend may truncate its memfd at any time. The next access to the lost part would then kill the
process, in whatever thread it happens. The handler here maps zeros there instead.
"""

from __future__ import annotations

import logging
import os

cimport cython

cdef extern from *:
    """
    #include <errno.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/types.h>
    #include <sys/uio.h>
    #include <unistd.h>

    enum { VR_SLOTS = 256, VR_PROBE_STEP = 4096, VR_HANDLERS = 16, VR_PASSING = 8 };

    /* Slots are reused but never freed: the handler may read the table in any thread at any time.
       It skips a slot that is being changed, whose mapping cannot be the one being accessed. */
    typedef struct vr_slots {
        vr_guarded slots[VR_SLOTS];
        struct vr_slots *next;
    } vr_slots;

    static vr_slots vr_table;
    static uint64_t vr_losses;

    /* The handlers that ours replaced, the newest last. */
    static struct sigaction vr_before[VR_HANDLERS];
    static int vr_before_count;

    /* A thread that runs one of them, and the number of handlers before it. */
    typedef struct vr_passing {
        pid_t thread;                   /* 0: free */
        int level;
    } vr_passing;
    static vr_passing vr_passes[VR_PASSING];

    static vr_guarded *vr_guard_find(uintptr_t address) {
        vr_slots *some = &vr_table;
        for (; some; some = __atomic_load_n(&some->next, __ATOMIC_ACQUIRE))
            for (int i = 0; i < VR_SLOTS; i++) {
                vr_guarded *slot = &some->slots[i];
                unsigned version = __atomic_load_n(&slot->version, __ATOMIC_ACQUIRE);
                uintptr_t base = __atomic_load_n(&slot->base, __ATOMIC_RELAXED);
                size_t length = __atomic_load_n(&slot->length, __ATOMIC_RELAXED);
                __atomic_thread_fence(__ATOMIC_ACQUIRE);
                if (base && address - base < length && !(version & 1) &&
                    version == __atomic_load_n(&slot->version, __ATOMIC_RELAXED))
                    return slot;
            }
        return NULL;
    }

    /* Replace a slot's mapping by zeros. Async-signal-safe. The whole mapping is replaced: each
       page alone would need a fault and a mapping, and the number of mappings is limited. */
    static int vr_guard_lose(vr_guarded *slot) {
        static const uint64_t one = 1;
        /* First of all, and in every thread that comes here: whoever reads a zero must find mark
           and count set, no matter which thread mapped the zeros. */
        __atomic_store_n(&slot->lost, 1, __ATOMIC_SEQ_CST);
        __atomic_fetch_add(&vr_losses, 1, __ATOMIC_SEQ_CST);
        if (mmap((void *)slot->base, slot->length, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            return 0;
        madvise((void *)slot->base, slot->length, MADV_DONTDUMP);
        if (slot->event_fd >= 0 && write(slot->event_fd, &one, sizeof one) < 0) {
            /* full: it is readable already */
        }
        return 1;
    }

    /* Do what an earlier handler does or, without one, the system. */
    static void vr_guard_let(const struct sigaction *before, int number, siginfo_t *info,
                             void *context) {
        int fault = info->si_code == BUS_ADRERR || info->si_code == BUS_ADRALN
        #ifdef BUS_MCEERR_AR
            || info->si_code == BUS_MCEERR_AR
        #endif
            ;
        struct sigaction fatal;
        sigset_t raised;
        if (before && before->sa_flags & SA_NODEFER) {
            /* It may raise the signal and expect that to end the process. */
            sigemptyset(&raised);
            sigaddset(&raised, number);
            pthread_sigmask(SIG_UNBLOCK, &raised, NULL);
        }
        if (before && before->sa_flags & SA_SIGINFO) {
            before->sa_sigaction(number, info, context);
        } else if (before && before->sa_handler == SIG_IGN && !fault) {
            return;
        } else if (!before || before->sa_handler == SIG_DFL || before->sa_handler == SIG_IGN) {
            memset(&fatal, 0, sizeof fatal);
            fatal.sa_handler = SIG_DFL;
            sigaction(number, &fatal, NULL);
            if (!fault)
                raise(number);  /* else the access is made again, and is the last */
        } else {
            before->sa_handler(number);
        }
    }

    /* Find the place of thread `noted` (0: a free place) and note `thread` in it; or NULL. */
    static vr_passing *vr_guard_place(pid_t noted, pid_t thread) {
        for (int i = 0; i < VR_PASSING; i++) {
            pid_t there = noted;
            if (__atomic_compare_exchange_n(&vr_passes[i].thread, &there, thread, 0,
                                            __ATOMIC_RELAXED, __ATOMIC_RELAXED))
                return &vr_passes[i];
        }
        return NULL;
    }

    /* Do what the process would have done without this handler, the newest handler first. A handler
       installed after ours may pass the signal back, by a call or by raising it (faulthandler
       does): then the one before it is next. */
    static void vr_guard_pass_on(int number, siginfo_t *info, void *context) {
        pid_t thread = (pid_t)syscall(SYS_gettid);
        vr_passing *outer = vr_guard_place(thread, thread);
        vr_passing *place = outer ? outer : vr_guard_place(0, thread);
        int level = outer ? outer->level : __atomic_load_n(&vr_before_count, __ATOMIC_ACQUIRE);
        if (!place || level == 0) {
            vr_guard_let(NULL, number, info, context);
            return;
        }
        place->level = level - 1;
        vr_guard_let(&vr_before[level - 1], number, info, context);
        place->level = level;
        if (!outer)
            __atomic_store_n(&place->thread, 0, __ATOMIC_RELAXED);
    }

    static void vr_on_sigbus(int number, siginfo_t *info, void *context) {
        int error = errno;
        vr_guarded *slot = NULL;
        /* Hardware errors (BUS_MCEERR_*) and signals sent by a process are not ours. */
        if (info->si_code == BUS_ADRERR)
            slot = vr_guard_find((uintptr_t)info->si_addr);
        if (!slot || !vr_guard_lose(slot))
            vr_guard_pass_on(number, info, context);
        errno = error;
    }

    /* Install our handler. 1: another had been installed over it; -1: error. */
    static int vr_guard_install(void) {
        struct sigaction ours, there, *newest = &vr_before[vr_before_count];
        if (sigaction(SIGBUS, NULL, &there))
            return -1;
        if (there.sa_flags & SA_SIGINFO && there.sa_sigaction == vr_on_sigbus)
            return 0;
        int again = vr_before_count > 0;
        int known = again && newest[-1].sa_flags == there.sa_flags &&
                    newest[-1].sa_handler == there.sa_handler;
        /* Stored before ours can run. Handlers beyond VR_HANDLERS are not called. */
        if (!known && vr_before_count < VR_HANDLERS) {
            *newest = there;
            __atomic_store_n(&vr_before_count, vr_before_count + 1, __ATOMIC_RELEASE);
        }
        memset(&ours, 0, sizeof ours);
        ours.sa_sigaction = vr_on_sigbus;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&ours.sa_mask);
        return sigaction(SIGBUS, &ours, NULL) ? -1 : again;
    }

    static void vr_guard_set(vr_guarded *slot, uintptr_t base, size_t length, int event_fd) {
        __atomic_store_n(&slot->version, slot->version + 1, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_RELEASE);
        __atomic_store_n(&slot->base, base, __ATOMIC_RELAXED);
        __atomic_store_n(&slot->length, length, __ATOMIC_RELAXED);
        __atomic_store_n(&slot->event_fd, event_fd, __ATOMIC_RELAXED);
        __atomic_store_n(&slot->lost, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&slot->version, slot->version + 1, __ATOMIC_RELEASE);
    }

    static vr_guarded *vr_guard_free_slot(void) {
        for (vr_slots *some = &vr_table;; some = some->next) {
            for (int i = 0; i < VR_SLOTS; i++)
                if (!some->slots[i].base)
                    return &some->slots[i];
            if (!some->next) {
                vr_slots *more = calloc(1, sizeof *more);
                if (!more)
                    return NULL;
                __atomic_store_n(&some->next, more, __ATOMIC_RELEASE);
            }
        }
    }

    /* Both are called after guest memory was read. Only a fence keeps those loads before this. */
    static int vr_guard_is_lost(const vr_guarded *slot) {
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        return __atomic_load_n(&slot->lost, __ATOMIC_ACQUIRE);
    }

    static uint64_t vr_guard_count(void) {
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        return __atomic_load_n(&vr_losses, __ATOMIC_ACQUIRE);
    }

    static int vr_guard_touch(const struct iovec *segment) {
        const vr_guarded *slot = segment->iov_len ? vr_guard_find((uintptr_t)segment->iov_base) : 0;
        const volatile char *bytes = segment->iov_base;
        if (!slot)
            return 0;
        for (size_t at = 0; at < segment->iov_len && !vr_guard_is_lost(slot); at += VR_PROBE_STEP)
            (void)bytes[at];
        (void)bytes[segment->iov_len - 1];
        return vr_guard_is_lost(slot);
    }
    """
    int vr_guard_install() nogil
    vr_guarded* vr_guard_free_slot() nogil
    void vr_guard_set(vr_guarded* slot, size_t base, size_t length, int event_fd) nogil
    vr_guarded* vr_guard_find(size_t address) nogil
    bint vr_guard_is_lost(const vr_guarded* slot) nogil
    uint64_t vr_guard_count() nogil
    bint vr_guard_touch(const iovec* segment) nogil

_said = False


cdef vr_guarded* guard_add(void* base, size_t length, int event_fd) noexcept:
    cdef vr_guarded* slot = vr_guard_free_slot()
    cdef int installed = vr_guard_install()
    if slot == NULL or installed < 0:
        return NULL
    if installed:
        _say_displaced()
    vr_guard_set(slot, <size_t>base, length, event_fd)
    return slot


def _say_displaced():
    """Log once that another handler for SIGBUS had replaced ours."""
    global _said
    if not _said:
        _said = True
        logging.getLogger("vring").warning(
            "another handler of SIGBUS was installed over vring's (faulthandler, signal.signal?): "
            "vring's is in front again and passes on to it what is not about guest memory"
        )


cdef void guard_remove(vr_guarded* guarded) noexcept:
    vr_guard_set(guarded, 0, 0, -1)


cdef bint guard_lost(const vr_guarded* guarded) noexcept nogil:
    return vr_guard_is_lost(guarded)


cdef uint64_t guard_losses() noexcept nogil:
    return vr_guard_count()


cdef bint guard_lost_at(const void* address) noexcept nogil:
    cdef const vr_guarded* slot = vr_guard_find(<size_t>address)
    return slot != NULL and vr_guard_is_lost(slot)


cdef bint guard_probe(const iovec* segments, uint64_t n) noexcept nogil:
    cdef uint64_t i
    for i in range(n):
        if vr_guard_touch(&segments[i]):
            return True
    return False


@cython.final
cdef class MemoryWatch:
    """A descriptor that becomes readable when guest memory is lost (see Region.lost).

    Pass it to Region.map for each region to watch, and wait for it in an event loop:
    ``loop.add_reader(watch, ...)``. It is an eventfd that stays open as long as the watch or one of
    its regions lives.

    Attributes:
        fd: the eventfd's number, owned by the watch; read-only.

    Raises:
        OSError: no file descriptor is available.
    """

    def __cinit__(self):
        self.fd = -1
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)

    def fileno(self):
        """Return the eventfd's number."""
        return self.fd

    def clear(self):
        """Make it unreadable until more memory is lost."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
