"""A keeper whose worker enters the sandbox and tries to leave it: run by tests as a process.

Each life of the worker tries the next way, says what became of it, and dies. Usage::

    prisoner.py SANDBOX DIRECTORY USER WAY...

``USER`` is a number; a superuser becomes that user first of all. A way is the name of one below,
``paths`` or ``calls``. ``DIRECTORY`` holds ``secret`` and the socket ``elsewhere``. Standard input
is a terminal.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial

from vring_serial.service.keeper import Keeper
from vring_serial.service.last_words import LastWords
from vring_serial.service.reach import Reach
from vring_serial.service.sandbox import Sandbox, enter
from vring_serial.service.shelf import open_shelf
from vring_serial.service.worker import Inheritance, WorkerSpec

libc = ctypes.CDLL(None, use_errno=True)
keeper = os.getpid()
directory = sys.argv[2]
secret = f"{directory}/secret"
#: Opened before there is a sandbox.
home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
pidfd = os.pidfd_open(keeper)
namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
program = os.memfd_create("program")
with open("/bin/true", "rb") as file:
    os.write(program, file.read())


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library, or a system call by its number."""
    function = libc.syscall if name.isdecimal() else getattr(libc, name)
    words = (int(name), *arguments) if name.isdecimal() else arguments
    done: int = function(*(ctypes.c_long(w) if isinstance(w, int) else w for w in words))
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return done


def open_how(flags: int) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("<QQQ", flags, 0, 0), 24)


def write_into(path: str) -> None:
    os.write(os.open(path, os.O_WRONLY), b"x")


def write_into_keeper() -> None:
    there = ctypes.create_string_buffer(b"x", 8)
    vector = struct.pack("<QQ", ctypes.addressof(there), 8)
    call("process_vm_writev", keeper, vector, 1, vector, 1, 0)


def machine_code(code: bytes) -> int:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()


def send_elsewhere(sock: socket.socket) -> None:
    """Send a datagram with a descriptor to an address that nobody of ours has."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [home]))]
    sock.sendmsg([b"hello"], rights, 0, f"{directory}/elsewhere")


def send_by_every_socket() -> None:
    """Use each socket that is there; what became of it is seen at the other end."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            send_elsewhere(socket.socket(fileno=int(fd)))
    raise PermissionError(1, "wherever it went")


def signal_by_input() -> None:
    """Have the kernel send the keeper a signal when there is input."""
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, keeper)
    fcntl.fcntl(reader, 10, signal.SIGKILL)  # F_SETSIG
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writer, b"x")


def raise_limit() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))
    except ValueError as error:
        raise PermissionError(1, str(error)) from None


def replace_handler() -> None:
    """Have no handler of SIGSYS: the call must fail or end the process all the same."""
    signal.signal(signal.SIGSYS, signal.SIG_IGN)
    os.execv("/bin/true", ["true"])


#: By paths, which Landlock refuses.
PATHS: dict[str, Callable[[], object]] = {
    "open": lambda: os.open(secret, os.O_RDONLY),
    "open for writing": lambda: os.open(secret, os.O_WRONLY | os.O_TRUNC),
    "open by a directory": lambda: os.open("secret", os.O_RDONLY, dir_fd=home),
    "open by another root": lambda: os.open(f"/proc/self/root{secret}", os.O_RDONLY),
    "open of the keeper's": lambda: os.open(f"/proc/{keeper}/fd/0", os.O_RDWR),
    "openat2": lambda: call("437", -100, secret.encode(), open_how(0), 24),
    "make": lambda: os.open(f"{directory}/new", os.O_CREAT | os.O_WRONLY),
    "shared memory": lambda: os.open("/dev/shm/vring-new", os.O_CREAT | os.O_WRONLY),
    "unlink": lambda: os.unlink(secret),
    "list": lambda: os.listdir("/root"),
    "keeper's memory": lambda: write_into(f"/proc/{keeper}/mem"),
    "core_pattern": lambda: write_into("/proc/sys/kernel/core_pattern"),
    "sysrq": lambda: os.open("/proc/sysrq-trigger", os.O_WRONLY),
    "disk": lambda: os.open("/dev/kmsg", os.O_WRONLY),
    "terminal": lambda: os.open(os.ttyname(0), os.O_RDWR),
}
#: By system calls, which seccomp refuses.
CALLS: dict[str, Callable[[], object]] = {
    "rename": lambda: os.rename(secret, f"{directory}/new"),
    "link": lambda: os.link(secret, f"{directory}/new"),
    "symlink": lambda: os.symlink("/etc", f"{directory}/new"),
    "mkdir": lambda: os.mkdir(f"{directory}/new"),
    "mknod": lambda: os.mknod(f"{directory}/new"),
    "chmod": lambda: os.chmod(secret, 0o777),
    "chown": lambda: os.chown(secret, 1, 1),
    "setxattr": lambda: os.setxattr(secret, "user.x", b"x"),
    "truncate": lambda: os.truncate(secret, 0),
    "chroot": lambda: os.chroot(directory),
    "mount": lambda: call("mount", b"none", directory.encode(), b"tmpfs", 0, None),
    "umount": lambda: call("umount2", b"/proc", 2),
    "pivot_root": lambda: call("155", directory.encode(), directory.encode()),
    "open_tree": lambda: call("428", -100, b"/", 1),
    "fsopen": lambda: call("430", b"tmpfs", 0),
    "open_by_handle_at": lambda: call("304", home, b"\0" * 64, 0),
    "new user namespace": lambda: call("unshare", 0x10000000),
    "new mount namespace": lambda: call("unshare", 0x20000),
    "another namespace": lambda: call("setns", namespace, 0),
    "clone into a namespace": lambda: call("56", 0x10000000 | 17, 0, 0, 0, 0),
    "clone of a thread's kind into a namespace": lambda: call("56", 0x10010000, 0, 0, 0, 0),
    "clone3": lambda: call("435", b"\0" * 88, 88),
    "fork": os.fork,
    "vfork": lambda: call("58"),
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "execve without a handler": replace_handler,
    "execveat": lambda: os.execve(program, ["true"], {}),
    "ptrace": lambda: call("ptrace", 16, keeper, 0, 0),
    "ptrace me": lambda: call("ptrace", 0, 0, 0, 0),
    "process_vm_writev": write_into_keeper,
    "pidfd_getfd": lambda: call("438", pidfd, 0, 0),
    "kcmp": lambda: call("312", keeper, keeper, 0, 0, 1),
    "kill": lambda: os.kill(keeper, signal.SIGURG),
    "kill everybody": lambda: os.kill(-1, 0),
    "kill the group": lambda: os.kill(0, 0),
    "tgkill": lambda: call("234", keeper, keeper, signal.SIGURG),
    "tkill": lambda: call("200", keeper, signal.SIGURG),
    "sigqueue": lambda: call("129", keeper, signal.SIGURG, b"\0" * 128),
    "signal by a descriptor": lambda: signal.pidfd_send_signal(pidfd, 0),
    "signal by input": signal_by_input,
    "slower keeper": lambda: os.setpriority(os.PRIO_PROCESS, keeper, 19),
    "another processor": lambda: os.sched_setaffinity(keeper, {0}),
    "limit of the keeper": lambda: resource.prlimit(keeper, resource.RLIMIT_NOFILE, (64, 64)),
    "limit": raise_limit,
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
    "internet socket": lambda: socket.socket(socket.AF_INET),
    "packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "vsock": lambda: socket.socket(socket.AF_VSOCK),
    "algorithm socket": lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET),
    "pair of datagrams": lambda: send_elsewhere(
        socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
    ),
    "sockets that are there": send_by_every_socket,
    "connect": lambda: call("connect", 0, b"\0" * 16, 16),
    "bind": lambda: call("bind", 0, b"\0" * 16, 16),
    "io_uring": lambda: call("425", 8, ctypes.create_string_buffer(120)),
    "bpf": lambda: call("321", 5, b"\0" * 128, 128),
    "add_key": lambda: call("248", b"user", b"vring", b"x", 1, -3),
    "keyctl": lambda: call("250", 0, -3, 1),
    "perf_event_open": lambda: call("298", b"\0" * 128, 0, -1, -1, 0),
    "userfaultfd": lambda: call("323", 1),
    "fanotify": lambda: call("300", 0, 0),
    "inotify": lambda: call("inotify_init1", 0),
    "shmget": lambda: call("shmget", 0, 4096, 0o1600),
    "message queue": lambda: call("240", b"vring", 0o102, 0o600, None),
    "init_module": lambda: call("175", b"", 0, b""),
    "kexec": lambda: call("246", 0, 0, None, 0),
    "reboot": lambda: call("169", 0, 0, 0, 0),
    "setuid": lambda: os.setresuid(0, 0, 0),
    "setgroups": lambda: os.setgroups([0]),
    "capabilities": lambda: call("capset", struct.pack("<Ii", 0x20080522, 0), b"\0" * 24),
    "personality": lambda: call("personality", 0x0040000),
    "seccomp": lambda: call("317", 1, 0, None),
    "core dumps": lambda: call("prctl", 4, 0, 0, 0, 0),
    "clock": lambda: call("clock_settime", 0, struct.pack("<qq", 1, 0)),
    "TIOCSTI": lambda: fcntl.ioctl(0, 0x5412, b"x"),
    "TIOCLINUX": lambda: fcntl.ioctl(0, 0x541C, b"\2"),
    "TIOCSCTTY": lambda: fcntl.ioctl(0, 0x540E, 1),
    # mov eax, 20; int 0x80; ret: getpid of another architecture
    "calls of 32 bits": lambda: machine_code(bytes.fromhex("b814000000cd80c3")),
    "calls of x32": lambda: call(str(0x40000000 | 39)),
    "a call that nobody knows": lambda: call("1000"),
}
WAYS = PATHS | CALLS
KINDS = {"paths": [*PATHS], "calls": [*CALLS]}


def work(sandbox: Sandbox, ways: list[str], inheritance: Inheritance) -> int:
    """Try one way more than the lives before."""
    shelf = open_shelf(inheritance.journal, inheritance.notifier, inheritance.descriptors)
    shelf.write("life", str(inheritance.restarts).encode())
    shelf.serving()
    if inheritance.restarts == len(ways):
        return 0
    name = ways[inheritance.restarts]
    line = b"YYYY-mm-dd HH:MM:SS.mmm refused \n"
    words = LastWords(line, time_at=0, name_at=32, ahead_of_utc=0, fd=1)
    reach = Reach(read={sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/proc/self"})
    print("try", name, flush=True)
    enter(sandbox, reach, words)
    try:
        WAYS[name]()
    except OSError as error:
        print("refused", error.errno, flush=True)
    else:
        print("went through", flush=True)
    os._exit(3)


if __name__ == "__main__":
    user = int(sys.argv[3])
    if user != os.getuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        libc.prctl(4, 1, 0, 0, 0)  # as a process is that was executed by that user
    chosen = [way for word in sys.argv[4:] for way in KINDS.get(word, [word])]
    worker = partial(work, Sandbox.parse(sys.argv[1]), chosen)
    say = lambda level, event, text, **fields: print(event, text, flush=True)  # noqa: E731
    sys.exit(Keeper([WorkerSpec("prisoner", worker)], say).run())
