"""An asyncio transport over a port's two queues, for host ends that are Python code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from vring import Batch, RingError
from vring_serial.device.served import BATCH_BYTES, BATCH_CHAINS, TURN_BATCHES, ServedQueue
from vring_serial.device.virtqueue import RunningQueue

#: Bytes that a console's protocol may leave waiting while it does not read; more are dropped.
BACKLOG_MAX = 1 << 20
#: Default limits of the write buffer in bytes, as asyncio's.
HIGH_WATER = 64 * 1024


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
    ) -> None:
        super().__init__(extra)
        self._loop = asyncio.get_running_loop()
        self._protocol = protocol
        self._lossy = lossy
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._on_dropped = on_dropped
        self._transmit: ServedQueue | None = None
        self._receive: ServedQueue | None = None
        self._connected = False
        self._closing = False
        self._lost = False
        self._paused = False
        self._last_chains: int | None = None  # of a guest that closed; None while it has not
        self._large: Batch | None = None  # one chain, delivered in pieces
        self._delivered = 0  # bytes of it
        self._backlog = bytearray()
        self._dropping = False
        self.dropped = 0
        self._output = bytearray()
        self._writing_paused = False
        self.set_write_buffer_limits()
        self._loop.call_soon(self._connect)

    # --- for the port

    def start_transmitq(self, running: RunningQueue, delivered: int = 0) -> None:
        """Take the guest's bytes from here; ``delivered`` is what stop_transmitq returned."""
        self._delivered = delivered
        self._transmit = ServedQueue(
            running, self._serve_transmit, lambda error: self._on_broken(True, error)
        )

    def stop_transmitq(self) -> int:
        """Leave the queue alone, with nothing in flight.

        Returns how many bytes of the next chain have been delivered already.
        """
        if self._transmit is not None:
            self._transmit.stop()
            if self._large is not None:
                self._transmit.queue.unpop(self._large)
                self._large = None
            self._transmit = None
        delivered, self._delivered = self._delivered, 0
        return delivered

    def start_receiveq(self, running: RunningQueue) -> None:
        """Give the guest its bytes here."""
        self._receive = ServedQueue(
            running, self._serve_receive, lambda error: self._on_broken(False, error)
        )

    def stop_receiveq(self) -> None:
        """Leave the queue alone. What was written stays in the write buffer."""
        if self._receive is not None:
            self._receive.stop()
            self._receive = None

    def guest_closed(self) -> None:
        """The guest closed its side: the connection ends once what it wrote before is delivered."""
        if self._closing:
            self._finish(None, by_protocol=True)
        elif self._transmit is None:
            self._finish(None)
        else:
            self._last_chains = self._transmit.queue.available() + (self._large is not None)
            if self._last_chains == 0:
                self._finish(None, eof=True)

    @property
    def ending(self) -> bool:
        """The guest closed its side, and not all that it wrote before is delivered."""
        return self._last_chains is not None

    def disconnect(self) -> None:
        """The connection is over now."""
        self._finish(None)

    def emergency(self, data: bytes) -> None:
        """Bytes for the protocol that did not come through the queue."""
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
        if self._connected and self._backlog and not self._paused:
            data = bytes(self._backlog)
            self._backlog.clear()
            self._dropping = False
            self._deliver(data)
        if self._transmit is not None:
            self._transmit.run()

    # --- asyncio.Transport, writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data must be bytes-like, not {type(data).__name__}")
        if self._closing or not data:
            return
        self._output += data
        if self._receive is not None:
            self._receive.run()
        if len(self._output) > self._high_water and not self._writing_paused:
            self._writing_paused = True
            self._call(self._protocol.pause_writing)

    def get_write_buffer_size(self) -> int:
        return len(self._output)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low_water, self._high_water

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not 0 <= low <= high:
            raise ValueError(f"high ({high}) must be >= low ({low}) must be >= 0")
        self._high_water = high
        self._low_water = low

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
            if not self._output:
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
        """The one end of every connection."""
        if self._lost:
            return
        self._lost = self._closing = True
        self._last_chains = None
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

    def _serve_transmit(self) -> bool:
        served = self._transmit
        assert served is not None
        queue = served.queue
        for _ in range(TURN_BATCHES):
            if not self._lossy and (self._paused or self._closing or not self._connected):
                queue.disable_notifications()
                return False
            if self._large is not None:
                self._serve_large(served, self._large)
            else:
                limit = BATCH_CHAINS if self._last_chains is None else self._last_chains
                batch = queue.pop_many(min(limit, BATCH_CHAINS), BATCH_BYTES)
                if not batch:
                    if queue.enable_notifications():
                        continue
                    return False
                if self._delivered or (len(batch) == 1 and batch[0].readable_bytes > BATCH_BYTES):
                    # After a delivered part only its own chain may come.
                    if len(batch) > 1:
                        queue.unpop(batch)
                        batch = queue.pop_many(1)
                    self._large = batch
                    continue
                self._serve_batch(served, batch)
            if self._transmit is not served:
                return False
        return True

    def _serve_batch(self, served: ServedQueue, batch: Batch) -> None:
        count = len(batch)
        data = batch.gather()
        # Completed first: what the protocol does in answer may stop the queue.
        if served.queue.push_many(batch):
            served.running.call()
        self._received(data)
        self._count_last(count)

    def _serve_large(self, served: ServedQueue, batch: Batch) -> None:
        """Deliver the next piece of a chain too large to be copied at once."""
        piece = bytearray()
        passed = 0
        for view in batch[0].readable:
            start = max(0, self._delivered - passed)
            passed += len(view)
            if start < len(view):
                piece += view[start : start + BATCH_BYTES - len(piece)]
            if len(piece) == BATCH_BYTES:
                break
        if served.queue.memory.lost:
            served.queue.pop_many()  # raises: the piece may be zeros that the guest did not send
        self._delivered += len(piece)
        done = self._delivered >= batch[0].readable_bytes
        if done:
            self._large = None
            self._delivered = 0
            if served.queue.push_many(batch):
                served.running.call()
        self._received(bytes(piece))
        if done:
            self._count_last(1)

    def _count_last(self, count: int) -> None:
        if self._last_chains is not None:
            self._last_chains -= count
            if self._last_chains <= 0:
                self._finish(None, eof=True)

    def _received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._connected and not self._paused:
            self._deliver(data)
            return
        room = BACKLOG_MAX - len(self._backlog)
        self._backlog += data[:room]
        if len(data) > room:
            self.dropped += len(data) - room
            if not self._dropping:
                self._dropping = True
                self._on_dropped(self.dropped)

    def _deliver(self, data: bytes) -> None:
        if data and not self._lost and isinstance(self._protocol, asyncio.Protocol):
            self._call(self._protocol.data_received, data)

    # --- host to guest

    def _serve_receive(self) -> bool:
        served = self._receive
        assert served is not None
        queue = served.queue
        for _ in range(TURN_BATCHES):
            if not self._output:
                queue.disable_notifications()
                return False
            batch = queue.pop_many(BATCH_CHAINS)
            if not batch:
                if queue.enable_notifications():
                    continue
                return False
            with memoryview(self._output) as output, output[:BATCH_BYTES] as head:
                used, written = batch.scatter(head)
            notify = queue.push_many(batch, written, used)
            if batch:
                queue.unpop(batch)
            if notify:
                served.running.call()
            del self._output[: int(written.sum())]
            self._written()
            if self._receive is not served:
                return False
        return True

    def _written(self) -> None:
        if self._closing and not self._output:
            self._loop.call_soon(self._finish, None, True)
        elif self._writing_paused and len(self._output) <= self._low_water:
            self._writing_paused = False
            self._call(self._protocol.resume_writing)
