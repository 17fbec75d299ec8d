"""The system calls that a serving process may make, as a seccomp filter by libseccomp.

The list is what ``strace -f`` saw 34 serving processes of the tests do, from when they serve until
they have ended, and what C libraries do in the place of those calls on other machines. Any other
call ends the process; a few fail instead, because libraries try them and go on without.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import termios
from dataclasses import dataclass

from vring_serial.service.reach import Reach

SONAME = "libseccomp.so.2"

_ALLOW, _TRAP, _KILL_PROCESS = 0x7FFF0000, 0x00030000, 0x80000000
_ERRNO = 0x00050000
_NE, _EQ, _MASKED_EQ = 1, 4, 7
_BAD_ARCH, _TSYNC, _OPTIMIZE = 2, 4, 8
_BINARY_TREE = 2
#: More than any architecture has.
_NUMBERS = 1024

_FILES = """
    open openat read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 close
    close_range dup dup2 dup3 fcntl fcntl64 lseek _llseek ftruncate ftruncate64 pipe pipe2 splice
    stat stat64 lstat lstat64 fstat fstat64 fstatat64 newfstatat statx statfs statfs64 fstatfs
    fstatfs64 access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd unlink
    unlinkat flock
"""
_MEMORY = """
    brk mmap mmap2 munmap mremap mprotect madvise mlock mlock2 munlock membarrier memfd_create
"""
_EVENTS = """
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll ppoll_time64 select
    _newselect pselect6 pselect6_time64 eventfd2 timerfd_create timerfd_settime io_setup io_submit
    io_destroy kcmp
"""
_SOCKETS = """
    accept accept4 recv recvfrom recvmsg recvmmsg recvmmsg_time64 send sendto sendmsg sendmmsg
    getsockname getpeername getsockopt setsockopt shutdown
"""
_PROCESS = """
    futex futex_time64 set_robust_list rseq exit exit_group sched_yield sched_getaffinity gettid
    getpid getppid getuid geteuid getgid getegid getuid32 geteuid32 getgid32 getegid32 getresuid
    getresgid getrandom
    sysinfo uname getrusage times getrlimit ugetrlimit rt_sigaction rt_sigprocmask rt_sigreturn
    sigreturn sigaltstack restart_syscall clock_gettime clock_gettime64 clock_getres
    clock_getres_time64 gettimeofday time nanosleep clock_nanosleep clock_nanosleep_time64
"""
_CALLS = " ".join((_FILES, _MEMORY, _EVENTS, _SOCKETS, _PROCESS)).split()
_CONNECTING = ("connect", "bind")

#: What the device and the terminals of host ends need; TIOCSTI, which types into one, is not there.
_IOCTLS = (
    *(termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX, termios.FIONREAD, termios.TIOCOUTQ),
    *(termios.TCGETS, termios.TCSETS, termios.TCSETSW, termios.TCSETSF, termios.TCFLSH),
    *(termios.TIOCGWINSZ, termios.TIOCGPGRP, 0x80045430),  # the last is TIOCGPTN
)
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_TIMERSLACK, _PR_SET_VMA = 15, 16, 29, 0x53564D41
_CLONE_THREAD = 0x10000
#: What the kernel looks at of an argument that is an int.
_INT = 0xFFFFFFFF


class NoFiltersError(Exception):
    """The kernel takes no filters."""


class _Argument(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """A call that is not treated as the rest.

    Attributes:
        call: its name.
        arguments: number, comparison and one or two values, all of which must hold.
        action: what then happens.
    """

    call: str
    arguments: tuple[tuple[int, int, int, int], ...] = ()
    action: int = _ALLOW


def rules_for(reach: Reach) -> list[Rule]:
    """Return the rules for a process, which must be the calling one, with this reach."""
    pid = os.getpid()
    rules = [Rule(call) for call in _CALLS]
    rules += [Rule("ioctl", ((1, _MASKED_EQ, _INT, request),)) for request in _IOCTLS]
    options = (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_TIMERSLACK, _PR_SET_VMA)
    rules += [Rule("prctl", ((0, _MASKED_EQ, _INT, option),)) for option in options]
    rules += [Rule(call, ((0, _MASKED_EQ, _INT, pid),)) for call in ("kill", "tgkill")]
    # Pairs lead nowhere else.
    rules.append(Rule("socketpair", ((0, _MASKED_EQ, _INT, socket.AF_UNIX),)))
    # Threads, and no processes; clone3 hides its flags, and libraries go back to clone.
    rules.append(Rule("clone", ((0, _MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD),)))
    rules.append(Rule("clone3", action=_ERRNO | errno.ENOSYS))
    # Limits are read and not set.
    rules.append(Rule("prlimit64", ((2, _EQ, 0, 0),)))
    rules.append(Rule("prlimit64", ((2, _NE, 0, 0),), _ERRNO | errno.EPERM))
    families: list[int] = []
    if reach.unix:
        families.append(socket.AF_UNIX)
    if reach.tcp:
        families += [socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK]
    rules += [Rule("socket", ((0, _MASKED_EQ, _INT, family),)) for family in families]
    if families:
        rules += [Rule(call) for call in _CONNECTING]
    else:
        rules.append(Rule("socket", action=_ERRNO | errno.EACCES))
    return rules


class Library:
    """libseccomp.

    Raises:
        OSError: it is not installed.
    """

    def __init__(self) -> None:
        lib = self._lib = ctypes.CDLL(SONAME)
        lib.seccomp_init.restype = ctypes.c_void_p
        lib.seccomp_init.argtypes = (ctypes.c_uint32,)
        lib.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
        lib.seccomp_load.argtypes = lib.seccomp_release.argtypes = (ctypes.c_void_p,)
        lib.seccomp_rule_add_array.argtypes = (
            *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
            ctypes.POINTER(_Argument),
        )
        lib.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p

    def names(self) -> dict[int, str]:
        """Return the names of this machine's system calls."""
        free = ctypes.CDLL(None).free
        free.argtypes = (ctypes.c_void_p,)
        found = {}
        for number in range(_NUMBERS):
            if name := self._lib.seccomp_syscall_resolve_num_arch(0, number):
                found[number] = ctypes.string_at(name).decode()
                free(name)
        return found

    def confine(self, reach: Reach) -> int:
        """Install the filter in all threads of this process; no_new_privs is set.

        Returns:
            The number of system calls of which some use is allowed.

        Raises:
            NoFiltersError: the kernel takes none.
            OSError: the filter could not be made.
        """
        lib = self._lib
        context = lib.seccomp_init(_TRAP)
        if not context:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        try:
            _check(lib.seccomp_attr_set(context, _BAD_ARCH, _KILL_PROCESS))
            _check(lib.seccomp_attr_set(context, _TSYNC, 1))
            lib.seccomp_attr_set(context, _OPTIMIZE, _BINARY_TREE)  # from libseccomp 2.5 on
            allowed = set()
            for rule in rules_for(reach):
                number = lib.seccomp_syscall_resolve_name(rule.call.encode())
                if number < 0:  # not on this architecture
                    continue
                if rule.action == _ALLOW:
                    allowed.add(number)
                arguments = (_Argument * len(rule.arguments))(
                    *(_Argument(*compared) for compared in rule.arguments)
                )
                action, count = rule.action, len(rule.arguments)
                _check(lib.seccomp_rule_add_array(context, action, number, count, arguments))
            error = -lib.seccomp_load(context)
            if error in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise NoFiltersError("this kernel takes no filters")
            _check(-error)
        finally:
            lib.seccomp_release(context)
        return len(allowed)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
