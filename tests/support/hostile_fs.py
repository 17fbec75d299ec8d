"""A real FUSE file system that stops answering, run as a program of its own.

    python hostile_fs.py FD

It mounts the file system, and an overlayfs over it, in a mount namespace that nobody else has, and
sends descriptors of ``SIZE`` bytes over the socket ``FD``: one of the file system, opened for
reading and writing, one through the overlay, for reading. From then on no request is answered:
a read, a stat and a close wait until the program ends, and no signal helps. It ends when the socket
is closed, and after half a minute in any case.

Exit status 77: the system lets nobody mount that here.
"""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import signal
import socket
import stat
import struct
import sys
import tempfile
from contextlib import suppress
from enum import IntEnum

SIZE = 1 << 20
CANNOT = 77
LIFETIME = 30.0

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_REC_PRIVATE = 0x4000 | 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)

_FILE = 2  # node id; 1 is the root


class Op(IntEnum):
    """Requests of linux/fuse.h."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    BATCH_FORGET = 42


def _attributes(node: int) -> bytes:
    mode = stat.S_IFREG | 0o666 if node == _FILE else stat.S_IFDIR | 0o777
    size = SIZE if node == _FILE else 0
    ids = (mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)
    return struct.pack("6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, *ids)


def _answer(opcode: int, node: int, body: bytes) -> bytes | int:
    """What a well-behaved file system says, or an error."""
    match opcode:
        case Op.INIT:
            return struct.pack("4I2H2I2HI7I", 7, 31, 0, 0, 1, 1, 4096, 1, 1, 0, 0, *[0] * 7)
        case Op.LOOKUP if body.rstrip(b"\0") == b"ram":
            return struct.pack("4Q2I", _FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
        case Op.LOOKUP:
            return errno.ENOENT
        case Op.GETATTR:  # valid for no time: asked for again and again
            return struct.pack("QII", 0, 0, 0) + _attributes(node)
        case Op.OPEN | Op.OPENDIR:
            return struct.pack("QII", 0, 0, 0)
        case Op.STATFS:
            return struct.pack("5Q10I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
        case Op.FLUSH | Op.RELEASE | Op.READDIR | Op.RELEASEDIR:
            return b""
    return errno.ENOSYS


def _serve(device: int, silent: mmap.mmap) -> None:
    while True:
        request = os.read(device, 1 << 17)
        _, opcode, unique, node = struct.unpack_from("IIQQ", request)
        if silent[0] or opcode in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):
            continue
        answer = _answer(opcode, node, request[40:])
        error, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
        os.write(device, struct.pack("IiQ", 16 + len(data), error, unique) + data)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        print(os.strerror(number), file=sys.stderr)
        sys.exit(CANNOT)


def _mount(source: str, target: str, kind: str, options: str) -> None:
    words = (word.encode() for word in (source, target, kind))
    _check(_libc.mount(*words, 0, options.encode()))


def _own_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if uid else 0)))
    if uid:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _check(_libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None))


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    silent = mmap.mmap(-1, 4096)
    try:
        _own_namespace()
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT)
    root = tempfile.mkdtemp()
    server = 0
    try:
        _mount("none", root, "tmpfs", "")
        for name in ("fuse", "upper", "work", "overlay"):
            os.mkdir(f"{root}/{name}")
        ids = f"user_id={os.getuid()},group_id={os.getgid()},allow_other"
        _mount("vring", f"{root}/fuse", "fuse", f"fd={device},rootmode=40000,{ids}")
        server = os.fork()
        if not server:
            control.close()
            _serve(device, silent)
        os.close(device)  # the child's alone: the file system ends with it
        layers = f"lowerdir={root}/fuse,upperdir={root}/upper,workdir={root}/work"
        _mount("none", f"{root}/overlay", "overlay", layers + (",userxattr" if os.getuid() else ""))
        files = array.array("i")
        files.append(os.open(f"{root}/fuse/ram", os.O_RDWR))
        files.append(os.open(f"{root}/overlay/ram", os.O_RDONLY))
        silent[0] = 1
        control.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        control.settimeout(LIFETIME)
        with suppress(TimeoutError):
            control.recv(1)
    finally:
        if server:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
        _libc.umount2(root.encode(), 2)  # MNT_DETACH
        os.rmdir(root)


if __name__ == "__main__":
    main()
