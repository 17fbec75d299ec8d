"""An asyncio transport over a port's two queues, for host ends that are Python code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from vring import RingError
from vring_serial.chardev.log import OutputLog
from vring_serial.device.console.delivery import Delivery
from vring_serial.device.console.state import BACKLOG_MAX, ChainState, SessionState
from vring_serial.device.console.traffic import Traffic
from vring_serial.device.console.write_buffer import WriteBuffer
from vring_serial.device.virtqueue import RunningQueue


class PortTransport(asyncio.Transport):
    """One connection between a port and an :class:`asyncio.Protocol`.

    Flow control towards the guest is by not popping: while the protocol has paused reading, the
    guest's buffers stay the guest's. A ``lossy`` transport (a console's) pops all the same, keeps
    up to BACKLOG_MAX bytes, and drops what comes after.

    The port attaches and detaches the queues as they run; a connection outlives a paused VM.

    Args:
        protocol: what is connected; ``connection_made`` is called in the next turn of the loop.
        lossy: never throttle the guest.
        extra: for ``get_extra_info``.
        on_lost: called when the connection is over, with whether the protocol ended it.
        on_broken: called with whether it was the transmitq that the driver broke, and how.
        on_dropped: called once whenever a lossy transport begins to drop.
        state: to go on from; kept up to date here.
        log: gets all that is taken from the guest.
    """

    def __init__(
        self,
        protocol: asyncio.BaseProtocol,
        *,
        lossy: bool,
        extra: Mapping[str, Any],
        on_lost: Callable[[bool], None],
        on_broken: Callable[[bool, RingError], None],
        on_dropped: Callable[[int], None],
        state: SessionState | None = None,
        log: OutputLog | None = None,
    ) -> None:
        super().__init__(extra)
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._lossy = lossy
        self._on_lost = on_lost
        self._on_dropped = on_dropped
        self._delivery = Delivery(
            self._wants_data,
            self._received if log is None else self._received_and_logged,
            self._all_received,
            lambda error: on_broken(True, error),
        )
        self._log = log
        self._state = state or SessionState()
        self._output = WriteBuffer(
            self._written, lambda error: on_broken(False, error), self._state.unread
        )
        self._connected = False
        self._closing = False
        self._lost = False
        self._paused = False
        self._dropping = False
        self._loop.call_soon(self._connect)

    # --- for the port

    def start_transmitq(self, running: RunningQueue, chain: ChainState) -> None:
        """Take the guest's bytes from here, but for those delivered of ``chain``.

        ``chain`` is kept up to date until :meth:`stop_transmitq`. Raises OSError if its kick cannot
        be watched.
        """
        self._delivery.start(running, chain)

    def stop_transmitq(self) -> None:
        """Leave the queue alone, with nothing in flight."""
        self._delivery.stop()

    def start_receiveq(self, running: RunningQueue) -> None:
        """Give the guest its bytes here. Raises OSError if its kick cannot be watched."""
        self._output.start(running)

    def stop_receiveq(self) -> None:
        """Leave the queue alone. What was written stays in the write buffer."""
        self._output.stop()

    def traffic(self, is_transmit: bool) -> Traffic:
        """Return what this connection moved in one direction."""
        if not is_transmit:
            return self._output.traffic
        return self._delivery.traffic + Traffic(dropped=self._state.dropped)

    def guest_closed(self) -> None:
        """End the connection once everything that the guest wrote before it closed is delivered."""
        if self._closing:
            self._finish(None, by_protocol=True)
        elif not self._delivery.has_queue:
            self._finish(None)
        elif not self._delivery.end_here():
            self._finish(None, eof=True)

    @property
    def ending(self) -> bool:
        """Return whether the guest closed, and not all that it wrote before is delivered."""
        return self._delivery.ending

    def disconnect(self) -> None:
        """End the connection now."""
        self._finish(None)

    def emergency(self, data: bytes) -> None:
        """Deliver bytes that did not come through the queue."""
        self._received(data)

    # --- asyncio.Transport, reading

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            # Not from within the caller, who may be the protocol's data_received.
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        if self._connected and self._state.backlog and not self._paused:
            data = bytes(self._state.backlog)
            self._state.backlog.clear()
            self._dropping = False
            self._deliver(data)
        self._delivery.run()

    # --- asyncio.Transport, writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data must be bytes-like, not {type(data).__name__}")
        if self._closing or not data:
            return
        if self._output.write(data):
            self._call(self._protocol.pause_writing)

    def get_write_buffer_size(self) -> int:
        return len(self._output.data)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._output.low, self._output.high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._output.set_limits(high, low)

    def can_write_eof(self) -> bool:
        return False

    # --- asyncio.Transport, the connection

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._output.data:
                self._loop.call_soon(self._finish, None, True)

    def abort(self) -> None:
        self._closing = True
        self._output.clear()
        self._loop.call_soon(self._finish, None, True)

    def _connect(self) -> None:
        if self._lost:
            return
        self._connected = True
        self._call(self._protocol.connection_made, self)
        self._resume()

    def _finish(
        self, error: Exception | None, by_protocol: bool = False, *, eof: bool = False
    ) -> None:
        """End the connection; every connection ends here."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._delivery.forget_end()
        self._output.clear()
        if self._connected:
            self._loop.call_soon(self._tell_lost, error, eof)
        self._on_lost(by_protocol)

    def _tell_lost(self, error: Exception | None, eof: bool) -> None:
        if eof and isinstance(self._protocol, asyncio.Protocol):
            self._call(self._protocol.eof_received)
        self._call(self._protocol.connection_lost, error)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        """Call the protocol; what it raises ends its connection, and nothing else."""
        try:
            function(*args)
        except Exception as error:
            self._loop.call_exception_handler(
                {
                    "message": "the protocol of a port failed",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
            self._closing = True
            self._finish(error, True)

    # --- guest to host

    def _wants_data(self) -> bool:
        return self._lossy or not (self._paused or self._closing or not self._connected)

    def _all_received(self) -> None:
        self._finish(None, eof=True)

    def _received_and_logged(self, data: bytes) -> None:
        assert self._log is not None
        self._log.write(data)
        self._received(data)

    def _received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._connected and not self._paused:
            self._deliver(data)
            return
        room = BACKLOG_MAX - len(self._state.backlog)
        self._state.backlog += data[:room]
        if len(data) > room:
            self._state.dropped += len(data) - room
            if not self._dropping:
                self._dropping = True
                self._on_dropped(self._state.dropped)

    def _deliver(self, data: bytes) -> None:
        if data and not self._lost and isinstance(self._protocol, asyncio.Protocol):
            self._call(self._protocol.data_received, data)

    # --- host to guest

    def _written(self) -> None:
        if self._closing and not self._output.data:
            self._loop.call_soon(self._finish, None, True)
        elif self._output.take_room():
            self._call(self._protocol.resume_writing)
