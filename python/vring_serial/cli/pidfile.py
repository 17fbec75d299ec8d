"""The pid file, locked as QEMU locks its own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator

from vring_serial.errors import ResourceError


@contextlib.contextmanager
def pid_file(path: str | None, owned: int = -1) -> Iterator[int]:
    """Own the pid file until the end of the block; None does nothing.

    Gives the descriptor that holds the lock; -1 without one. A process that replaces its code
    passes it on as ``owned``.

    Only the lock counts: a file that is not locked was left by a killed process, and its number
    may have been reused.

    Raises:
        ResourceError: another process holds the file, it is not a pid file, or it cannot be made.
    """
    if path is None:
        yield -1
        return
    try:
        fd = _take(path) if owned < 0 else owned
    except OSError as error:
        raise ResourceError(f"--pid-file {path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        # While the lock is held: afterwards another process may own the file.
        with contextlib.suppress(OSError):
            if _is_at(fd, path):
                os.unlink(path)
        os.close(fd)


def _take(path: str) -> int:
    """Lock the file, write our process id, and return the descriptor."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
        try:
            _lock(fd, path, _content(fd, path))
            # Its owner may have removed it between open and lock: then try again.
            if _is_at(fd, path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _content(fd: int, path: str) -> str:
    """Return the process id in the file, or "". Raise ResourceError for other contents."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ResourceError(f"--pid-file {path}: exists and is no regular file")
    text = os.pread(fd, 32, 0)
    if text and not re.fullmatch(rb"[1-9][0-9]{0,9}\n?", text):
        raise ResourceError(f"--pid-file {path}: exists and holds no process id")
    return text.decode().rstrip()


def _lock(fd: int, path: str, owner: str) -> None:
    """Take the lock that QEMU takes, an fcntl write lock on the whole file, or ResourceError."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        who = f"process {owner} is running" if owner else "another process has it"
        raise ResourceError(f"--pid-file {path}: exists, {who}") from None


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
