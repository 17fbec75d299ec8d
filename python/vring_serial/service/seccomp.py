"""The system calls that a serving process may make, as a seccomp filter by libseccomp.

Every call is of one of three kinds: what C libraries, Python and the libraries that we use may need
while they serve (allowed), what only somebody who has taken the process over would try (ends the
process, and is named), and all others, those that no one knows yet among them (ENOSYS: libraries
try new calls, and go on without). See docs/decisions/0034.
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
_BAD_ARCH, _TSYNC, _OPTIMIZE, _RAW_ERRORS = 2, 4, 8, 9
_BINARY_TREE = 2
#: More than any architecture has.
_NUMBERS = 1024

_FILES = """
    open openat openat2 read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2
    close close_range dup dup2 dup3 lseek _llseek ftruncate ftruncate64 fallocate
    fsync fdatasync fadvise64 fadvise64_64 arm_fadvise64_64 pipe pipe2 splice tee sendfile
    sendfile64 copy_file_range stat stat64 lstat lstat64 fstat fstat64 fstatat64 newfstatat statx
    statfs statfs64 fstatfs fstatfs64 access faccessat faccessat2 readlink readlinkat getdents
    getdents64 getcwd umask unlink unlinkat flock
"""
_MEMORY = """
    brk mmap mmap2 munmap mremap mprotect pkey_alloc pkey_free pkey_mprotect madvise mincore msync
    mlock mlock2 munlock mseal membarrier memfd_create get_mempolicy map_shadow_stack
    cacheflush riscv_flush_icache
"""
_EVENTS = """
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll ppoll_time64
    select _newselect pselect6 pselect6_time64 eventfd eventfd2 signalfd signalfd4 timerfd_create
    timerfd_settime timerfd_settime64 timerfd_gettime timerfd_gettime64 io_setup io_submit
    io_getevents io_cancel io_destroy
"""
_SOCKETS = """
    accept accept4 recv recvfrom recvmsg recvmmsg recvmmsg_time64 send sendto sendmsg sendmmsg
    getsockname getpeername getsockopt setsockopt shutdown
"""
_PROCESS = """
    futex futex_time64 futex_waitv futex_wait futex_wake futex_requeue set_robust_list
    get_robust_list set_tid_address set_tls rseq exit exit_group arch_prctl riscv_hwprobe
    sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_getattr
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval sched_rr_get_interval_time64
    getpriority ioprio_get getcpu gettid getpid getppid getpgrp getpgid getsid getuid geteuid getgid
    getegid getuid32 geteuid32 getgid32 getegid32 getresuid getresuid32 getresgid getresgid32
    getgroups getgroups32 capget getrandom sysinfo uname getrusage times getrlimit ugetrlimit
    rt_sigaction sigaction rt_sigprocmask sigprocmask rt_sigpending rt_sigsuspend rt_sigtimedwait
    rt_sigtimedwait_time64 rt_sigreturn sigreturn sigaltstack pause restart_syscall clock_gettime
    clock_gettime64 clock_getres clock_getres_time64 gettimeofday time nanosleep clock_nanosleep
    clock_nanosleep_time64 alarm getitimer setitimer
"""
_CALLS = " ".join((_FILES, _MEMORY, _EVENTS, _SOCKETS, _PROCESS)).split()
_CONNECTING = ("connect", "bind")
#: What it takes to make sockets, terminals and links while the process serves.
_MAKING = (
    *("listen", "symlink", "symlinkat"),
    *("fchmod", "fchmodat", "chmod", "fchown", "fchownat", "chown", "lchown"),
)

#: Nothing that serves makes these calls; with some of them, a process reaches beyond itself.
_ATTACKS = """
    execve execveat fork vfork uselib
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd
    pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo tkill move_pages migrate_pages
    perf_event_open userfaultfd bpf io_uring_setup io_uring_enter io_uring_register
    unshare setns chroot pivot_root mount umount umount2 move_mount open_tree open_tree_attr
    fsopen fsconfig fsmount fspick mount_setattr
    name_to_handle_at open_by_handle_at mknod mknodat fanotify_init fanotify_mark
    add_key request_key keyctl
    setuid setuid32 setgid setgid32 setreuid setreuid32 setregid setregid32 setresuid setresuid32
    setresgid setresgid32 setfsuid setfsuid32 setfsgid setfsgid32 setgroups setgroups32 capset
    personality modify_ldt iopl ioperm vm86 vm86old
    init_module finit_module create_module delete_module kexec_load kexec_file_load reboot swapon
    swapoff acct syslog quotactl quotactl_fd sethostname setdomainname vhangup
    settimeofday clock_settime clock_settime64 clock_adjtime clock_adjtime64 adjtimex stime
"""

#: What the device and the terminals of host ends need. The four are TCGETS2 and TCSETS2 to
#: TCSETSF2, which newer C libraries prefer; the last are TIOCGPTN,
#: TIOCSBRK and TIOCCBRK.
_IOCTLS = (
    *(termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX, termios.FIONREAD, termios.TIOCOUTQ),
    *(termios.TCGETS, termios.TCSETS, termios.TCSETSW, termios.TCSETSF, termios.TCFLSH),
    *(0x802C542A, 0x402C542B, 0x402C542C, 0x402C542D),
    *(termios.TIOCGWINSZ, termios.TIOCGPGRP, 0x80045430, 0x5427, 0x5428),
)
#: Unlocks a new terminal.
_TIOCSPTLCK = 0x40045431
#: What can be asked of a descriptor: F_DUPFD to F_SETLKW, the same locks with offsets of 64 bits,
#: locks of open files, F_DUPFD_QUERY, F_DUPFD_CLOEXEC, sizes of pipes, seals.
_FCNTLS = (*range(8), *range(12, 15), *range(36, 39), 1027, *range(1030, 1035))
#: F_SETOWN, F_SETSIG and F_SETOWN_EX have another process be sent any signal.
_SIGNALLING = (8, 10, 15)
#: Those that type into a terminal: TIOCSTI, and TIOCLINUX, which pastes.
_TYPING = (termios.TIOCSTI, termios.TIOCLINUX)
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_TIMERSLACK, _PR_SET_VMA = 15, 16, 29, 0x53564D41
_CLONE_THREAD = 0x10000
#: CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
_CLONE_NEW = (0x80, 0x20000, *(1 << bit for bit in range(25, 31)))
#: SOCK_NONBLOCK and SOCK_CLOEXEC, which stand beside a socket's type.
_SOCKET_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
#: What the kernel looks at of an argument that is an int.
_INT = 0xFFFFFFFF


#: The kernel has none, or who started us forbids them; older libraries say ECANCELED for all that.
_NO_FILTERS = {
    *(errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ECANCELED)
}
_NO_FILTERS_TEXT = "this system takes no filters, or not for all threads"


class NoFiltersError(Exception):
    """The system takes no filters."""


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
    rules += [Rule(call, action=_TRAP) for call in _ATTACKS.split()]
    rules += [Rule("ioctl", ((1, _MASKED_EQ, _INT, request),)) for request in _IOCTLS]
    rules += [Rule("ioctl", ((1, _MASKED_EQ, _INT, request),), _TRAP) for request in _TYPING]
    for call in ("fcntl", "fcntl64"):
        rules += [Rule(call, ((1, _MASKED_EQ, _INT, command),)) for command in _FCNTLS]
        rules += [Rule(call, ((1, _MASKED_EQ, _INT, it),), _TRAP) for it in _SIGNALLING]
    options = (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_TIMERSLACK, _PR_SET_VMA)
    rules += [Rule("prctl", ((0, _MASKED_EQ, _INT, option),)) for option in options]
    for call in ("kill", "tgkill"):
        rules.append(Rule(call, ((0, _MASKED_EQ, _INT, pid),)))
        rules += [
            Rule(call, ((0, _MASKED_EQ, 1 << bit, ~pid & 1 << bit),), _TRAP) for bit in range(32)
        ]
    itself = tuple((number, _MASKED_EQ, _INT, pid) for number in range(2))
    rules.append(Rule("kcmp", itself))
    # Pairs lead nowhere else, unless they are of datagrams, which can be sent to any address.
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        compared = (1, _MASKED_EQ, _INT & ~_SOCKET_FLAGS, kind)
        rules.append(Rule("socketpair", ((0, _MASKED_EQ, _INT, socket.AF_UNIX), compared)))
    # Threads, and no processes; clone3 hides its flags, and libraries go back to clone.
    mask = _CLONE_THREAD | sum(_CLONE_NEW)
    rules.append(Rule("clone", ((0, _MASKED_EQ, mask, _CLONE_THREAD),)))
    rules.append(Rule("clone", ((0, _MASKED_EQ, _CLONE_THREAD, 0),), _TRAP))
    rules += [Rule("clone", ((0, _MASKED_EQ, flag, flag),), _TRAP) for flag in _CLONE_NEW]
    # Limits are read and not set.
    rules.append(Rule("prlimit64", ((2, _EQ, 0, 0),)))
    rules.append(Rule("prlimit64", ((2, _NE, 0, 0),), _ERRNO | errno.EPERM))
    families: list[int] = []
    if reach.unix or reach.changed_in:
        families.append(socket.AF_UNIX)
    if reach.tcp:
        families += [socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK]
    rules += [Rule("socket", ((0, _MASKED_EQ, _INT, family),)) for family in families]
    if not families:
        rules.append(Rule("socket", action=_ERRNO | errno.EACCES))
    if reach.renames:
        rules += [Rule(call) for call in ("rename", "renameat", "renameat2")]
    if reach.listens and not reach.changed_in:
        rules.append(Rule("listen"))
    if reach.changed_in:
        rules += [Rule(call) for call in _MAKING]
        rules.append(Rule("ioctl", ((1, _MASKED_EQ, _INT, _TIOCSPTLCK),)))
    connecting = _ALLOW if families else _TRAP
    rules += [Rule(call, action=connecting) for call in _CONNECTING]
    return rules


class Library:
    """libseccomp.

    Raises:
        OSError: it is not installed, or another library has its name.
    """

    def __init__(self) -> None:
        lib = self._lib = ctypes.CDLL(SONAME)
        try:
            lib.seccomp_init.restype = ctypes.c_void_p
            lib.seccomp_init.argtypes = (ctypes.c_uint32,)
            lib.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
            lib.seccomp_load.argtypes = lib.seccomp_release.argtypes = (ctypes.c_void_p,)
            lib.seccomp_rule_add_array.argtypes = (
                *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
                ctypes.POINTER(_Argument),
            )
            lib.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
        except AttributeError as error:
            raise OSError(str(error)) from None

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
        context = lib.seccomp_init(_ERRNO | errno.ENOSYS)
        if not context:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        try:
            for attribute, value in ((_BAD_ARCH, _KILL_PROCESS), (_TSYNC, 1)):
                if lib.seccomp_attr_set(context, attribute, value):  # it asks the kernel
                    raise NoFiltersError(_NO_FILTERS_TEXT)
            for attribute, value in ((_OPTIMIZE, _BINARY_TREE), (_RAW_ERRORS, 1)):
                lib.seccomp_attr_set(context, attribute, value)  # from libseccomp 2.5 on
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
            if error in _NO_FILTERS:
                raise NoFiltersError(_NO_FILTERS_TEXT)
            _check(-error)
        finally:
            lib.seccomp_release(context)
        return len(allowed)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
