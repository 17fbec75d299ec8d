"""Listening unix sockets in the file system: made where nobody listens, removed afterwards."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress

from vring_serial.errors import ResourceError


class UnixListener:
    """A non-blocking listening stream socket at a path.

    A socket file on which nobody answers is a stale one, left by a process that was killed: it is
    replaced. Anything else at the path is left alone.

    Args:
        path: where; at most 107 bytes.
        backlog: connections that may wait.

    Raises:
        ResourceError: the path exists, is in use, is too long, or cannot be created.
    """

    def __init__(self, path: str, backlog: int = 16) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._bind()
            made = os.stat(path)
            self._identity = made.st_dev, made.st_ino
            self.socket.listen(backlog)
        except OSError as error:
            self.socket.close()
            raise ResourceError(f"{path}: {error.strerror or error}") from None
        except ResourceError:
            self.socket.close()
            raise

    def close(self) -> None:
        """Stop listening and remove the socket, unless another has taken its place. Safe twice."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        with suppress(OSError):
            there = os.stat(self.path)
            if (there.st_dev, there.st_ino) == self._identity:
                os.unlink(self.path)

    def _bind(self) -> None:
        try:
            self.socket.bind(self.path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(self.path)
            self.socket.bind(self.path)


def _remove_stale(path: str) -> None:
    """Raises ResourceError unless ``path`` is a socket that refuses connections."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ResourceError(f"{path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        answer = probe.connect_ex(path)
    if answer != errno.ECONNREFUSED:
        why = (
            "another process listens on it" if answer in (0, errno.EAGAIN) else os.strerror(answer)
        )
        raise ResourceError(f"{path}: exists, {why}")
    os.unlink(path)
