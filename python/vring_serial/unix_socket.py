"""Listening unix sockets in the file system: made where nobody listens, removed afterwards."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vring_serial import activation
from vring_serial.errors import ResourceError

MAX_PATH = 107  # bytes: sun_path without its NUL
_SO_PASSRIGHTS = 83


@dataclass(frozen=True, slots=True)
class SocketAccess:
    """Who may connect to the sockets that this process makes in the file system.

    Attributes:
        mode: permissions; None: what the umask leaves.
        uid, gid: owner and group; -1: the process's.
    """

    mode: int | None = None
    uid: int = -1
    gid: int = -1


_access = SocketAccess()


def set_access(access: SocketAccess) -> None:
    """Have all sockets made so from now on, in the whole process, as with umask(2)."""
    global _access
    _access = access


class SocketPathError(ResourceError):
    """A path that no unix socket can be made at, or connected to.

    Attributes:
        path: the path.
        why: what is wrong, without the path.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path = path
        self.why = why


def encode_path(path: str) -> bytes:
    """Encode a path, or a name without its leading NUL, for socket calls.

    Raises:
        SocketPathError: it is too long.
    """
    name = os.fsencode(path)
    if len(name) > MAX_PATH:
        raise SocketPathError(
            path, f"the path has {len(name)} bytes, and a unix socket's has {MAX_PATH} at most"
        )
    return name


def refuse_descriptors(sock: socket.socket) -> None:
    """Let nobody send descriptors to a unix socket, or to those that a listening one accepts.

    The kernel would close them in the thread that reads the bytes beside them, which the sender
    can make last for ever. Linux before 6.16 cannot refuse them.
    """
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


class UnixListener:
    """A non-blocking listening stream socket at a path.

    A socket file on which nobody answers is a stale one, left by a process that was killed: it is
    replaced. Anything else at the path is left alone. A socket that whoever started the process
    listens on there already is taken instead, and never removed.

    The socket has its mode and owner (see set_access) before anybody can connect.

    Args:
        path: where; at most 107 bytes.
        backlog: connections that may wait.
        descriptors: peers may send descriptors, which whoever accepts them must receive.
        inherited: the descriptor of the listener that a predecessor of this process made at
            ``path``, taken over; None: make one.

    Raises:
        SocketPathError: the path exists, is in use, is too long, or cannot be created.
    """

    def __init__(
        self,
        path: str,
        backlog: int = 16,
        *,
        descriptors: bool = False,
        inherited: int | None = None,
    ) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        provided = activation.is_provided(path)
        if inherited is None and provided:
            inherited = activation.take(path)
        if inherited is not None:
            self.socket = socket.socket(fileno=inherited)
            self.socket.setblocking(False)
            if provided and not descriptors:
                refuse_descriptors(self.socket)
            if not provided:
                with suppress(OSError):
                    self._identity = _identity(path)
            return
        name = encode_path(path)
        try:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            if not descriptors:
                refuse_descriptors(self.socket)
            try:
                self._bind(name)
                self._identity = _identity(path)
                if (_access.uid, _access.gid) != (-1, -1):
                    os.chown(path, _access.uid, _access.gid, follow_symlinks=False)
                self.socket.listen(backlog)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise SocketPathError(path, error.strerror or str(error)) from None

    def close(self) -> None:
        """Stop listening and remove the socket, unless another has taken its place. Safe twice."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        with suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)

    def _bind(self, name: bytes) -> None:
        with _mode_at_bind(self.socket):
            self._bind_with_mode(name)

    def _bind_with_mode(self, name: bytes) -> None:
        try:
            self.socket.bind(name)
        except FileNotFoundError:
            raise _no_directory(self.path) from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(self.path, name)
            self.socket.bind(name)


@contextmanager
def _mode_at_bind(sock: socket.socket) -> Iterator[None]:
    """Have bind make the socket's file with the mode that is wanted: Linux takes the socket's."""
    if _access.mode is None:
        yield
        return
    os.fchmod(sock.fileno(), _access.mode)
    umask = os.umask(0)
    try:
        yield
    finally:
        os.umask(umask)


def check_can_listen(path: str) -> None:
    """Check what can be checked without making a socket; the listener itself may fail all the same.

    Raises:
        SocketPathError: a :class:`UnixListener` cannot be there.
    """
    name = encode_path(path)
    if activation.is_provided(path):
        return
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        raise _no_directory(path)
    try:
        if os.path.lexists(path):
            _check_stale(path, name)
        elif not os.access(directory, os.W_OK | os.X_OK):
            raise SocketPathError(path, os.strerror(errno.EACCES))
    except OSError as error:
        raise SocketPathError(path, error.strerror or str(error)) from None


def remove_stale(path: str) -> None:
    """Remove a socket that nobody has open any more; leave anything else at the path alone.

    For those of a process that could not do so itself when it ended, in a sandbox.
    """
    with suppress(SocketPathError, OSError):
        _remove_stale(path, encode_path(path))


def _no_directory(path: str) -> SocketPathError:
    return SocketPathError(path, f"there is no directory {os.path.dirname(path)}")


def _remove_stale(path: str, name: bytes) -> None:
    _check_stale(path, name)
    os.unlink(path)


def _check_stale(path: str, name: bytes) -> None:
    """Raise SocketPathError unless ``path`` is a socket that nobody has open."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise SocketPathError(path, "exists and is not a socket")
    # A datagram socket cannot connect to a stream listener, so the question disturbs nobody: who
    # is there is of the wrong type, and only a path that nobody has bound refuses.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as probe:
        answer = probe.connect_ex(name)
    if answer in (0, errno.EPROTOTYPE, errno.EAGAIN):
        raise SocketPathError(path, f"exists, another process listens on it{_holders(path)}")
    if answer != errno.ECONNREFUSED:
        raise SocketPathError(path, f"exists, {os.strerror(answer)}")


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _holders(path: str) -> str:
    """Return, in brackets, which processes have the socket bound to ``path``, if that can be seen.

    The kernel's table has paths as they were bound, so only one that says where it is tells.
    """
    if not os.path.isabs(path):
        return ""
    with suppress(OSError):
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
        fields = [line.split(maxsplit=7) for line in lines]
        inodes = {f[6] for f in fields if len(f) == 8 and f[7] == path}
        wanted = {f"socket:[{inode}]" for inode in inodes}
        found = set()
        for fd in Path("/proc").glob("[0-9]*/fd/*") if wanted else ():
            with suppress(OSError):
                if os.readlink(fd) in wanted:
                    found.add(int(fd.parts[2]))
        if found:
            return f" (process {', '.join(map(str, sorted(found)))})"
    return ""
