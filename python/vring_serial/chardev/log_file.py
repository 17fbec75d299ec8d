"""The file of a log: bytes from a pipe, in order, with rotation by size."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import weakref

from vring_serial.chardev.hangup import unread

#: Most bytes of one step; a step of more would notice an order to end late.
STEP_BYTES = 1 << 20

# Those who write to one file take turns: a host end may log where the one that it replaces still
# does. By device and inode.
_turns: weakref.WeakValueDictionary[tuple[int, int], threading.Lock] = weakref.WeakValueDictionary()
_making_turns = threading.Lock()


def _turns_of(status: os.stat_result) -> threading.Lock:
    with _making_turns:
        return _turns.setdefault((status.st_dev, status.st_ino), threading.Lock())


class LogFile:
    """A regular file that grows at its end, also after it was cut off.

    Nothing else writes to it but other objects of this kind, in this process.

    Its methods may take as long as the disk does.

    Args:
        path: the file, made if it does not exist.
        most: bytes after which it is renamed and another one begins; 0: never.
        backups: renamed files that are kept, as ``path.0`` (the newest) and so on.
    """

    def __init__(self, path: str, most: int = 0, backups: int = 0) -> None:
        self.path = path
        self._most = most
        self._backups = backups
        self._fd = -1
        self._turns = threading.Lock()

    def open(self, *, empty: bool = False) -> None:
        """Open the file at the path, instead of the one before, and empty it if so wanted.

        Raises OSError; the one before then stays open.
        """
        # Not O_APPEND: splice does not write to such files.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o666)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            if empty:
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self._fd = fd
        self._turns = _turns_of(status)

    def take(self, pipe: int) -> int:
        """Move bytes from a non-blocking pipe to the end; return how many, 0 if it is empty.

        The kernel does both in one call: a process that is killed meanwhile neither loses nor
        doubles any. Raises OSError.
        """
        if not unread(pipe):
            return 0
        if self._most and os.lseek(self._fd, 0, os.SEEK_END) >= self._most:
            self._rotate()
        with self._turns:
            position = os.lseek(self._fd, 0, os.SEEK_END)
            room = min(max(self._most - position, 1), STEP_BYTES) if self._most else STEP_BYTES
            return os.splice(pipe, self._fd, room, offset_dst=position, flags=os.SPLICE_F_NONBLOCK)

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def _rotate(self) -> None:
        if not self._backups:
            os.ftruncate(self._fd, 0)
            return
        # An attempt that could not make the next file has renamed them already.
        numbers = range(self._backups) if self._is_at_path() else ()
        for number in reversed(numbers):
            before = f"{self.path}.{number - 1}" if number else self.path
            with contextlib.suppress(FileNotFoundError):
                os.rename(before, f"{self.path}.{number}")
        self.open()
