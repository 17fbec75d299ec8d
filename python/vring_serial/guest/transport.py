"""A port's rings as an asyncio transport: asyncio's protocols and streams work on a port."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Protocol, cast


class TransportPort(Protocol):
    """What a transport needs of its port."""

    @property
    def can_write(self) -> bool:
        """Writers may use the ring."""

    @property
    def host_gone(self) -> bool:
        """Nobody is there to take what is written."""

    def transmit(self, data: memoryview) -> int:
        """Put as much into the ring as there is room for; returns bytes."""

    def wait_room(self) -> bool:
        """Return whether there is room already; if not, the transport is flushed when there is."""

    def wait_idle(self) -> bool:
        """Return whether the device has buffers; the transport is flushed when it has fewer."""

    def schedule_receive(self) -> None:
        """Give the transport bytes again, soon."""

    def transport_closed(self) -> None:
        """Close the port: the transport is done with it."""


class PortTransport(asyncio.Transport):
    """One opening of a port (or the part of it up to an end of file) as an asyncio transport.

    Its write buffer holds what did not fit into the ring. The high-water mark is 0 by default, so
    that ``drain()`` returns when Linux's ``write()`` would: when all bytes are in the ring.
    """

    def __init__(self, port: TransportPort, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"port": port})
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self.backlog: deque[memoryview] = deque()
        self._size = 0
        self._high = self._low = 0
        self._writing_paused = False
        self._reading_paused = False
        self._closing = False
        self._lost = False
        #: End of file was delivered; the protocol may not be given bytes any more.
        self.at_eof = False

    # --- reading

    @property
    def wants_data(self) -> bool:
        """Whether the protocol may be given bytes now."""
        return not (self._reading_paused or self._closing or self.at_eof)

    def is_reading(self) -> bool:
        return self.wants_data

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._port.schedule_receive()

    def deliver(self, data: bytes) -> None:
        """Give the protocol bytes that the host end sent."""
        cast(asyncio.Protocol, self._protocol).data_received(data)

    def deliver_eof(self) -> None:
        """Tell the protocol that the host end closed; close the port unless it goes on writing."""
        self.at_eof = True
        if not cast(asyncio.Protocol, self._protocol).eof_received():
            self.close()

    # --- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data must be bytes-like, not {type(data).__name__}")
        if self._closing or not data:
            return
        view = memoryview(data).cast("B")
        sent = 0
        if not self.backlog and self._port.can_write:
            sent = self._port.transmit(view)
        if sent < len(view):
            rest = view[sent:]
            self._enqueue(rest if isinstance(data, bytes) else memoryview(bytes(rest)))
            self.flush()

    def _enqueue(self, data: memoryview) -> None:
        self.backlog.append(data)
        self._size += len(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def inherit(self, backlog: deque[memoryview]) -> None:
        """Take over what an earlier transport of the same opening could not write."""
        for data in backlog:
            self._enqueue(data)
        self.flush()

    def flush(self) -> None:
        """Move the backlog into the ring as far as it goes, then settle flow control or closing."""
        port = self._port
        while self.backlog and port.can_write:
            sent = port.transmit(self.backlog[0])
            self._size -= sent
            if sent == len(self.backlog[0]):
                self.backlog.popleft()
                continue
            self.backlog[0] = self.backlog[0][sent:]
            if not port.wait_room():
                break
        self._settle()

    def _settle(self) -> None:
        if self._closing:
            if not self._lost and (self._port.host_gone or self._drained()):
                self._finish(None)
            return
        blocked = not self._port.can_write
        if not self._writing_paused and (blocked or self._size > self._high):
            self._writing_paused = True
            self._protocol.pause_writing()
        elif self._writing_paused and not blocked and self._size <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()

    def _drained(self) -> bool:
        """Whether the device has used everything; if not, :meth:`flush` is called when it has."""
        return not self.backlog and not self._port.wait_idle()

    def can_write_eof(self) -> bool:
        return False

    def write_eof(self) -> None:
        raise NotImplementedError("a port has no half-close")

    def get_write_buffer_size(self) -> int:
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = 0 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low
        self._settle()

    # --- the end

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Close the port once the device has used all that was written.

        While the host end is closed nobody would, so then what is not in the ring yet is dropped
        and the port closes at once, as a killed writer's does.
        """
        if not self._closing:
            self._closing = True
            self.flush()

    def abort(self) -> None:
        """Close the port now; what is not in the ring yet is dropped."""
        self._closing = True
        if not self._lost:
            self._finish(None)

    def lose(self, error: Exception) -> None:
        """End the connection: the port is gone."""
        self._closing = True
        if not self._lost:
            self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        self.retire(error)
        self._port.transport_closed()

    def retire(self, error: Exception | None = None) -> None:
        """End this transport and leave the port open."""
        self._closing = self._lost = True
        self.backlog = deque()
        self._size = 0
        self._loop.call_soon(self._protocol.connection_lost, error)
