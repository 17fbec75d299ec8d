"""The peer's process, which is connected to the host ends of the ports."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Iterable, Mapping, Sequence

from vring_serial.bench.plain import BUFFER, PlainEnd, receive_bytes, send_messages


class PeerSide:
    """The peer's process."""

    def __init__(self) -> None:
        self._ports: dict[int, socket.socket] = {}
        self._buffer = memoryview(bytearray(2 * BUFFER))
        self.plain = PlainEnd()

    def connect(self, paths: Mapping[int, str]) -> None:
        """Connect to the sockets of these ports."""
        for nr, path in paths.items():
            self._ports[nr] = end = socket.socket(socket.AF_UNIX)
            end.connect(path)

    def listen_plain(self, path: str) -> None:
        """Listen for the yardstick's socket."""
        self.plain.listen(path)

    def send(self, ports: Sequence[int], length: int, count: int) -> None:
        """Send messages, ``count`` on each port."""
        if len(ports) == 1:
            send_messages(self._ports[ports[0]], self._buffer, length, count)
        else:
            self._send_all(ports, length, count)

    def _send_all(self, ports: Sequence[int], length: int, count: int) -> None:
        left = {self._ports[nr]: length * count for nr in ports}
        with _nonblocking(left, selectors.EVENT_WRITE) as selector:
            while left:
                for key, _ in selector.select():
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    left[end] -= end.send(self._buffer[: min(left[end], length)])
                    if not left[end]:
                        selector.unregister(end)
                        del left[end]
        for nr in ports:
            self._ports[nr].setblocking(True)

    def receive(self, ports: Sequence[int], total: int) -> None:
        """Receive ``total`` bytes on these ports together."""
        ends = [self._ports[nr] for nr in ports]
        if len(ends) == 1:
            receive_bytes(ends[0], self._buffer, total)
            return
        with _nonblocking(ends, selectors.EVENT_READ) as selector:
            while total > 0:
                for key, _ in selector.select():
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    total -= end.recv_into(self._buffer, BUFFER)
        for end in ends:
            end.setblocking(True)

    def echo(self, nr: int, size: int, count: int) -> None:
        """Send back the messages that arrive on a port."""
        end = self._ports[nr]
        for _ in range(count):
            data = end.recv(size, socket.MSG_WAITALL)
            end.sendall(data)

    def echo_eventfd(self, count: int) -> None:
        """Answer ``count`` eventfd notifications, the yardstick of round trips."""
        there, back = self.plain.receive_fds(2)
        for _ in range(count):
            os.eventfd_read(there)
            os.eventfd_write(back, 1)
        os.close(there)
        os.close(back)

    def plain_send(self, length: int, count: int) -> None:
        """Send ``count`` messages of ``length`` bytes on the yardstick."""
        self.plain.send(length, count)

    def plain_receive(self, total: int) -> None:
        """Receive ``total`` bytes on the yardstick."""
        self.plain.receive(total)

    def close(self) -> None:
        """Close all connections."""
        self.plain.close()
        for end in self._ports.values():
            end.close()


def _nonblocking(ends: Iterable[socket.socket], events: int) -> selectors.BaseSelector:
    """Make these connections non-blocking, and return a selector for them."""
    selector = selectors.DefaultSelector()
    for end in ends:
        end.setblocking(False)
        selector.register(end, events)
    return selector
