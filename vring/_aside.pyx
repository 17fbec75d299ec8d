"""Close descriptors in a process of their own, for one that may have no thread and may not wait."""

from __future__ import annotations

import os
from array import array

from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #include <errno.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The child shares the descriptors, and has a copy of everything else. */
    static long vr_share_descriptors(void) {
        const unsigned long flags = CLONE_FILES | SIGCHLD;
    #ifdef __s390__
        return syscall(SYS_clone, 0, flags, 0, 0, 0);
    #else
        return syscall(SYS_clone, flags, 0, 0, 0, 0);
    #endif
    }

    /* A process id, or a negative errno. */
    static long vr_close_aside(const int *fds, size_t count, volatile uint32_t *begun) {
        sigset_t all, before;
        sigfillset(&all);
        sigprocmask(SIG_BLOCK, &all, &before);  /* its handlers would write to what is shared */
        long pid = vr_share_descriptors();
        if (pid == 0) {
            prctl(PR_SET_NAME, "vring-close", 0, 0, 0);
            for (size_t i = 0; i < count; i++) {
                *begun = (uint32_t)i + 1;
                close(fds[i]);
            }
            _exit(0);
        }
        if (pid < 0)
            pid = -errno;
        sigprocmask(SIG_SETMASK, &before, NULL);
        return pid;
    }
    """
    long vr_close_aside(const int* fds, size_t count, uint32_t* begun)


def close_aside(fds, uint32_t[::1] begun) -> int:
    """Have a child process close descriptors of this process, one after another; return its id.

    Each number is free as soon as its turn has come, however long the rest of closing it takes. The
    child shares all descriptors: if it waits for ever, nothing that is open when this process ends
    is closed then. It is reaped like any other child.

    Args:
        fds: at least one descriptor; from now on the child's to close.
        begun: one number in memory that the child shares; it says there how many had their turn.

    Raises:
        OSError: there is no other process to be had.
    """
    numbers = array("i", fds)
    cdef const int[::1] view = numbers
    cdef long pid
    if not numbers:
        raise ValueError("there is nothing to close")
    pid = vr_close_aside(&view[0], view.shape[0], &begun[0])
    if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    return pid
