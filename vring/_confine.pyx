"""What every thread of a process gives up, and the last words of one that a seccomp filter ends.

Linux restricts threads, not processes. Only the thread itself can give up its privileges, so each
is sent SIGSYS, whose handler does it. The same signal comes from a seccomp filter for a call that
it does not allow; the handler then writes which one, and ends the process.
"""

from __future__ import annotations

import os
import threading

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/capability.h>
    #include <poll.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef SYS_landlock_restrict_self
    #define SYS_landlock_restrict_self 446
    #endif
    #ifndef SYS_SECCOMP
    #define SYS_SECCOMP 1
    #endif

    enum {
        VR_NO_NEW_PRIVILEGES = 1, VR_BOUNDING = 2, VR_CAPABILITIES = 4, VR_LANDLOCK = 8,
        VR_LINE = 512, VR_NAME = 40, VR_CALLS = 1024, VR_TIME = 23,
        VR_PATIENCE = 5000      /* milliseconds that a thread has to answer */
    };

    /* One order at a time, for one thread: whoever gives it holds the GIL's module lock. */
    static struct { int what, ruleset; uint64_t keep; } vr_order;
    static int vr_answer;       /* -1: none yet; 0 or errno */

    static struct {
        char line[VR_LINE];
        size_t length, time_at, name_at;
        long ahead;             /* seconds */
        int fd;                 /* -1: nothing is to be said */
        char names[VR_CALLS][VR_NAME];
    } vr_words = { .fd = -1 };

    /* Async-signal-safe. 0 or errno. */
    static int vr_give_up(void) {
        if (vr_order.what & VR_NO_NEW_PRIVILEGES && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
            return errno;
        if (vr_order.what & VR_BOUNDING)
            for (int i = 0; i < 64; i++)
                /* EINVAL: the last is behind us. EPERM: never had what this takes. */
                if (!(vr_order.keep >> i & 1) && prctl(PR_CAPBSET_DROP, i, 0, 0, 0))
                    break;
        if (vr_order.what & VR_CAPABILITIES) {
            struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
            struct __user_cap_data_struct data[2];
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
            if (syscall(SYS_capget, &head, data))
                return errno;
            for (int i = 0; i < 2; i++) {
                data[i].permitted &= (uint32_t)(vr_order.keep >> 32 * i);
                data[i].effective = data[i].permitted;
                data[i].inheritable = 0;
            }
            if (syscall(SYS_capset, &head, data))
                return errno;
        }
        if (vr_order.what & VR_LANDLOCK &&
            syscall(SYS_landlock_restrict_self, vr_order.ruleset, 0))
            return errno;
        return 0;
    }

    static void vr_digits(char *at, int n, long value) {
        while (n--) {
            at[n] = (char)('0' + value % 10);
            value /= 10;
        }
    }

    /* YYYY-mm-dd?HH:MM:SS.mmm without a library that may hold a lock. */
    static void vr_put_time(char *at) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        long seconds = (long)now.tv_sec + vr_words.ahead;
        /* Days since 0000-03-01, by eras of 400 years. */
        long days = seconds / 86400 + 719468, era = days / 146097, day = days - era * 146097;
        long year = (day - day / 1460 + day / 36524 - day / 146096) / 365;
        day -= 365 * year + year / 4 - year / 100;
        long month = (5 * day + 2) / 153;
        vr_digits(at + 8, 2, day - (153 * month + 2) / 5 + 1);
        month = month < 10 ? month + 3 : month - 9;
        vr_digits(at + 5, 2, month);
        vr_digits(at, 4, year + era * 400 + (month <= 2));
        vr_digits(at + 11, 2, seconds / 3600 % 24);
        vr_digits(at + 14, 2, seconds / 60 % 60);
        vr_digits(at + 17, 2, seconds % 60);
        vr_digits(at + 20, 3, now.tv_nsec / 1000000);
    }

    static void vr_say_call(int call) {
        char said[VR_LINE + VR_NAME], number[VR_NAME];
        const char *name = number;
        size_t length;
        if (vr_words.fd < 0)
            return;
        if (call >= 0 && call < VR_CALLS && vr_words.names[call][0]) {
            name = vr_words.names[call];
        } else {
            memset(number, 0, sizeof number);
            vr_digits(number, 10, call < 0 ? -(long)call : call);
        }
        length = strlen(name);
        memcpy(said, vr_words.line, vr_words.name_at);
        memcpy(said + vr_words.name_at, name, length);
        memcpy(said + vr_words.name_at + length, vr_words.line + vr_words.name_at,
               vr_words.length - vr_words.name_at);
        vr_put_time(said + vr_words.time_at);
        if (write(vr_words.fd, said, vr_words.length + length) < 0) {
            /* nobody reads it */
        }
    }

    static void vr_on_sigsys(int number, siginfo_t *info, void *context) {
        int error = errno;
        if (info->si_code == SI_TKILL && info->si_pid == getpid()) {
            int answer = -1;
            __atomic_compare_exchange_n(&vr_answer, &answer, vr_give_up(), 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST);
        } else {
            struct sigaction fatal;
            if (info->si_code == SYS_SECCOMP)
                vr_say_call(info->si_syscall);
            memset(&fatal, 0, sizeof fatal);
            fatal.sa_handler = SIG_DFL;
            sigaction(SIGSYS, &fatal, NULL);
            syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), SIGSYS);
            _exit(128 + SIGSYS);    /* not reached */
        }
        errno = error;
    }

    static int vr_hear_sigsys(void) {
        struct sigaction ours;
        memset(&ours, 0, sizeof ours);
        ours.sa_sigaction = vr_on_sigsys;
        ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER | SA_ONSTACK;
        sigemptyset(&ours.sa_mask);
        return sigaction(SIGSYS, &ours, NULL);
    }

    /* 0 or errno; ESRCH: there is no such thread any more. */
    static int vr_restrict(int thread) {
        __atomic_store_n(&vr_answer, -1, __ATOMIC_SEQ_CST);
        if (thread == (pid_t)syscall(SYS_gettid))
            return vr_give_up();
        for (int waited = 0; waited < VR_PATIENCE; waited++) {
            if (syscall(SYS_tgkill, getpid(), thread, waited ? 0 : SIGSYS))
                return errno;
            poll(NULL, 0, 1);
            int answer = __atomic_load_n(&vr_answer, __ATOMIC_SEQ_CST);
            if (answer >= 0)
                return answer;
        }
        return ETIMEDOUT;
    }

    static void vr_order_all(int what, int ruleset, uint64_t keep) {
        vr_order.what = what;
        vr_order.ruleset = ruleset;
        vr_order.keep = keep;
    }
    """
    enum:
        VR_NO_NEW_PRIVILEGES, VR_BOUNDING, VR_CAPABILITIES, VR_LANDLOCK
        VR_LINE, VR_NAME, VR_CALLS, VR_TIME
    int vr_hear_sigsys() nogil
    int vr_restrict(int thread) nogil
    void vr_order_all(int what, int ruleset, unsigned long long keep) nogil

cdef extern from *:
    """
    static void vr_set_words(const char *line, size_t length, size_t time_at, size_t name_at,
                             long ahead, int fd) {
        memcpy(vr_words.line, line, length);
        vr_words.length = length;
        vr_words.time_at = time_at;
        vr_words.name_at = name_at;
        vr_words.ahead = ahead;
        memset(vr_words.names, 0, sizeof vr_words.names);
        vr_words.fd = fd;
    }

    static void vr_set_name(int call, const char *name, size_t length) {
        memcpy(vr_words.names[call], name, length);
    }
    """
    void vr_set_words(const char* line, size_t length, size_t time_at, size_t name_at, long ahead,
                      int fd)
    void vr_set_name(int call, const char* name, size_t length)

from libc.errno cimport ESRCH

NO_NEW_PRIVILEGES = VR_NO_NEW_PRIVILEGES
BOUNDING = VR_BOUNDING
CAPABILITIES = VR_CAPABILITIES
LANDLOCK = VR_LANDLOCK

_lock = threading.Lock()


def restrict_threads(int what, *, unsigned long long keep=0, int ruleset=-1):
    """Have every thread of this process give something up, for ever; threads made later inherit it.

    Args:
        what: a sum of NO_NEW_PRIVILEGES; BOUNDING (capabilities that a new program could have);
            CAPABILITIES (permitted, effective, inheritable and ambient ones); LANDLOCK.
        keep: mask of capabilities that stay, by number.
        ruleset: descriptor of a Landlock ruleset.

    Returns:
        The number of threads.

    Raises:
        OSError: a thread could not, or did not answer (ETIMEDOUT: it blocks SIGSYS).
    """
    cdef int thread, error
    done = set()
    # Opened before Landlock may forbid it.
    tasks = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _lock:
            if vr_hear_sigsys():
                raise OSError("SIGSYS cannot be handled")
            vr_order_all(what, ruleset, keep)
            while there := {int(name) for name in os.listdir(tasks)} - done:
                for thread in there:
                    with nogil:
                        error = vr_restrict(thread)
                    if error and error != ESRCH:
                        raise OSError(error, os.strerror(error))
                done |= there
    finally:
        os.close(tasks)
    return len(done)


def name_refused_calls(bytes line, *, int time_at, int name_at, long ahead_of_utc, int fd, names):
    """Say which call it was, when a seccomp filter ends this process with SECCOMP_RET_TRAP.

    Args:
        line: what is written, with its newline; at most 512 bytes.
        time_at: where in it the time is put, over 23 bytes (``2026-01-31 12:00:00.123``).
        name_at: where in it the name is inserted, behind the time; without a name, its number.
        ahead_of_utc: seconds that the time of the line is ahead.
        fd: where it is written; must stay open.
        names: of system calls, by number.

    Raises:
        ValueError: the line is too long, or a place is not in it.
        OSError: SIGSYS cannot be handled.
    """
    if len(line) > VR_LINE or not 0 <= time_at <= name_at - VR_TIME <= len(line) - VR_TIME:
        raise ValueError("line, time_at or name_at")
    vr_set_words(line, len(line), time_at, name_at, ahead_of_utc, fd)
    for call, name in names.items():
        encoded = name.encode()[: VR_NAME - 1]
        if 0 <= call < VR_CALLS:
            vr_set_name(call, encoded, len(encoded))
    if vr_hear_sigsys():
        raise OSError("SIGSYS cannot be handled")
