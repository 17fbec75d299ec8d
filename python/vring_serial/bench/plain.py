"""The yardstick: a unix socket directly between two processes, with a copy loop in Python."""

from __future__ import annotations

import socket
from collections.abc import Sequence

#: Bytes per read, and size of the buffer to send from.
BUFFER = 1 << 20


class PlainEnd:
    """One end of the connection."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._buffer = memoryview(bytearray(2 * BUFFER))

    def listen(self, path: str) -> None:
        """Listen for the other end's :meth:`connect`."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()

    def connect(self, path: str) -> None:
        """Connect to the other end."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    @property
    def end(self) -> socket.socket:
        """Connected socket; if this end listens, the first access accepts the connection."""
        if self._socket is None:
            assert self._listener is not None
            self._socket, _ = self._listener.accept()
        return self._socket

    def send(self, length: int, count: int) -> None:
        """Send messages that are adjacent in memory, one call each."""
        send_messages(self.end, self._buffer, length, count)

    def receive(self, total: int) -> None:
        """Receive ``total`` bytes."""
        receive_bytes(self.end, self._buffer, total)

    def send_fds(self, fds: Sequence[int]) -> None:
        """Pass descriptors."""
        socket.send_fds(self.end, [b"."], fds)

    def receive_fds(self, count: int) -> list[int]:
        """Return the ``count`` descriptors that the other end passes."""
        return socket.recv_fds(self.end, 1, count)[1]

    def close(self) -> None:
        """Close all sockets."""
        for end in (self._socket, self._listener):
            if end is not None:
                end.close()


def send_messages(end: socket.socket, buffer: memoryview, length: int, count: int) -> None:
    """Send ``count`` messages from successive places of a buffer."""
    stride = -(-length // 64) * 64
    views = [buffer[at : at + length] for at in range(0, len(buffer) - length + 1, stride)]
    places = len(views)
    for i in range(count):
        end.sendall(views[i % places])


def receive_bytes(end: socket.socket, buffer: memoryview, total: int) -> None:
    """Receive repeatedly into the start of a buffer. Raises EOFError."""
    while total > 0:
        n = end.recv_into(buffer, min(total, BUFFER))
        if not n:
            raise EOFError("the connection was closed")
        total -= n
