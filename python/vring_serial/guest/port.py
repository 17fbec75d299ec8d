"""A port as the guest's programs see it: Linux's ``/dev/vport0p1`` with asyncio streams.

What carries over from Linux's virtio_console: one opener at a time; PORT_OPEN(1) and (0) go to the
device when it opens and closes; while the host end is closed writers block; when it closes, readers
get what is still in the ring and then end of file. A port that is no console discards what the
device sends while it is closed. A console is open from CONSOLE_PORT on, whether or not anything
reads it, and does not care about the host end.

What cannot carry over is that a file descriptor reads on after end of file: a StreamReader's end
is final. So a reader opened before the host end *waits* for it, and after an end of file
:meth:`GuestPort.open` continues the same opening with a new pair of streams; nothing is lost
between the two, and the device sees no PORT_OPEN.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vring_serial.guest.errors import PortBusyError, PortRemovedError
from vring_serial.guest.queue import ReceiveBuffers, TransmitBuffers
from vring_serial.guest.transport import PortTransport
from vring_serial.lifetime import Closing

#: Most bytes handed to a protocol in one call, and the limit of the StreamReaders that
#: :meth:`GuestPort.open` makes. With more, an allocator that gives large blocks back to the system
#: makes it several times slower: every piece then comes in new pages.
MAX_DELIVERY = 1 << 16
STREAM_LIMIT = 1 << 16


class PortOwner(Protocol):
    """What a port needs of its driver."""

    def port_opened(self, port: GuestPort, is_open: bool) -> bool:
        """Tell the device PORT_OPEN(is_open).

        Returns whether it has heard that; if not, :meth:`GuestPort.control_settled` follows.
        """

    def transmit_buffers(self, port: GuestPort) -> TransmitBuffers:
        """Return the port's transmit buffers, made when first wanted. Raises GuestMemoryError."""


class GuestPort(Closing):
    """A port that the device has added.

    As a context manager, it closes the port where the block is left; the port may be opened again.

    Attributes:
        nr: the port's number.
        name: what PORT_NAME gave it (first one wins), or "".
        is_console: CONSOLE_PORT was received, or there is no multiport protocol.
        host_connected: the host end is open, as PORT_OPEN said last.
        guest_connected: the guest has it open.
        size: (columns, rows) of a console's terminal, or None.
        removed: why it is no more, or None.
    """

    def __init__(self, nr: int, owner: PortOwner, receive: ReceiveBuffers) -> None:
        self.nr = nr
        self.name = ""
        self.is_console = False
        self.host_connected = False
        self.guest_connected = False
        self.size: tuple[int, int] | None = None
        self.removed: Exception | None = None
        self._owner = owner
        self._rx = receive
        self._tx: TransmitBuffers | None = None
        self._transport: PortTransport | None = None
        #: Taken from the ring but not delivered: bytes, and None for an end of file.
        self._inbox: deque[bytes | None] = deque()
        #: The buffers those came in. They go back when the inbox is empty, so that a host end which
        #: comes and goes in front of a slow reader cannot make it grow.
        self._held: list[npt.NDArray[np.int64]] = []
        self._receive_due = False
        self._rings_taken = False
        #: PORT_OPEN(1) is on its way, or waits for PORT_OPEN(0).
        self._unheard = False
        #: PORT_OPEN(0) is on its way: what the device sends is for the opener before.
        self._parting = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<GuestPort {self.nr} {self.name!r}>"

    @property
    def label(self) -> str:
        """Number and name, for messages."""
        return f"port {self.nr} ({self.name})" if self.name else f"port {self.nr}"

    @property
    def undelivered(self) -> bool:
        """Whether the device has not used all that was written since the port was opened."""
        if self._transport is not None and self._transport.backlog:
            return True
        if self._tx is not None:
            self._tx.reclaim()
        return self._tx is not None and self._tx.in_flight > 0

    # --- for the guest's programs

    async def open(
        self, *, limit: int = STREAM_LIMIT
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the port: the reader ends when the host end closes, the writer then blocks.

        After an end of file it may be called again without closing: that opening goes on.
        Raises PortBusyError, PortRemovedError (or BackendError if that is why), GuestMemoryError.
        """
        loop = self._loop
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport = self.connect(lambda: protocol)[0]
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def connect(
        self, factory: Callable[[], asyncio.Protocol]
    ) -> tuple[PortTransport, asyncio.Protocol]:
        """Open the port for a protocol of asyncio. Raises as :meth:`open`."""
        if self.removed is not None:
            raise self.removed
        previous = self._transport
        if self._rings_taken or (
            previous is not None and not (previous.at_eof and not previous.is_closing())
        ):
            raise PortBusyError(f"port {self.nr} is open already")
        self._open()
        protocol = factory()
        self._transport = transport = PortTransport(self, protocol)
        if previous is not None:
            backlog = previous.backlog
            previous.retire()
            transport.inherit(backlog)
        protocol.connection_made(transport)
        transport.flush()
        self.schedule_receive()
        return transport, protocol

    def _open(self) -> TransmitBuffers:
        """Have transmit buffers, and tell the device if it does not know of the opening yet."""
        if self._tx is None:
            self._tx = self._owner.transmit_buffers(self)
        if not self.guest_connected:
            # The device cannot have sent this opener anything yet.
            self._discard()
            self.guest_connected = True
            self._unheard = self._parting or not self._owner.port_opened(self, True)
        return self._tx

    async def take_rings(self) -> tuple[ReceiveBuffers, TransmitBuffers]:
        """Open the port for a program that works on its rings itself, from now on.

        Returns, when the device has heard of it, the receive buffers, which the device has, and
        the transmit buffers, none of which it has. Nothing listens to the rings' calls any more.
        Raises as :meth:`open`; a caller that is cancelled has not opened the port.
        """
        if self.removed is not None:
            raise self.removed
        if self._rings_taken or self._transport is not None:
            raise PortBusyError(f"port {self.nr} is open already")
        self._rings_taken = True
        transmit = self._open()
        for buffers in (self._rx, transmit):
            buffers.queue.unlisten()
        try:
            while self._unheard and self.removed is None:
                await self._changed.wait()
        except BaseException:
            self._rings_taken = False
            for buffers in (self._rx, transmit):
                buffers.queue.listen_again()
            self._leave()
            raise
        if self.removed is not None:
            raise self.removed
        return self._rx, transmit

    def close(self) -> None:
        """Close the port as its writer's ``close()`` does; nothing if it is not open."""
        if self._transport is not None:
            self._transport.close()

    async def wait_host(self, connected: bool = True) -> None:
        """Until the host end is open (or closed). Raises PortRemovedError if the port goes away."""
        while self.host_connected != connected:
            if self.removed is not None:
                raise self.removed
            await self._changed.wait()

    async def wait_removed(self) -> None:
        """Wait until the device removes the port or the guest stops."""
        while self.removed is None:
            await self._changed.wait()

    # --- for the transport

    @property
    def can_write(self) -> bool:
        """Whether writers may use the ring.

        A device discards what it finds before it has heard of the PORT_OPEN(1), which comes on
        another queue; so, as Linux does, wait until it has used that.
        """
        return not (self._unheard or self.host_gone)

    @property
    def host_gone(self) -> bool:
        """Nobody takes what is written; Linux's hvc does not ask."""
        return self.removed is not None or not (self.host_connected or self.is_console)

    def transmit(self, data: memoryview) -> int:
        """Put as much into the ring as there is room for; returns bytes."""
        return self._tx.send(data) if self._tx is not None else 0

    def wait_room(self) -> bool:
        """Return whether there is room already; if not, the transport is flushed when there is."""
        tx = self._tx
        if tx is None:
            return False
        while not tx.reclaim():
            if not tx.wait_used():
                return False
        tx.queue.disable_notifications()
        return True

    def wait_idle(self) -> bool:
        """Return whether the device has buffers; the transport is flushed when it has fewer."""
        tx = self._tx
        while tx is not None and tx.in_flight:
            if not tx.reclaim() and not tx.wait_used():
                return True
        return False

    def transport_closed(self) -> None:
        """Close the port, unless it is gone or a console: the transport is done."""
        self._transport = None
        self._leave()

    def _leave(self) -> None:
        if self.is_console or self.removed is not None:
            return
        self.guest_connected = False
        if not self._parting:
            self._parting = not self._owner.port_opened(self, False)
        self._inbox.clear()
        self._release_held()
        # What is in the ring by now was for this opener, as in Linux.
        self._discard()
        self.schedule_receive()

    def _discard(self) -> None:
        """Throw away what is in the ring, but for a console, which is open always."""
        if not self.is_console:
            slots, _ = self._rx.take()
            self._rx.give_back(slots)

    # --- for the driver

    def notified_transmit(self) -> None:
        """Take back the transmit buffers that the device has used."""
        if self._tx is not None:
            self._tx.queue.disable_notifications()
            self._tx.reclaim()
        if self._transport is not None:
            self._transport.flush()

    def schedule_receive(self) -> None:
        """Have :meth:`receive` called soon."""
        if not self._receive_due:
            self._receive_due = True
            self._loop.call_soon(self.receive)

    def receive(self) -> None:
        """Deliver a part of what has arrived if it is wanted, and give the buffers back."""
        self._receive_due = False
        if self.removed is not None or not self._deliver_inbox():
            return
        rx = self._rx
        rx.queue.disable_notifications()
        slots, data = rx.take(max(1, MAX_DELIVERY // rx.size))
        if data:
            # Linux discards what arrives while the port is closed, and so it goes here.
            wanted = self._transport is not None and not self._parting
            received = b"".join(data) if wanted else b""
            rx.give_back(slots)
            self.schedule_receive()
            if self._transport is not None and received:
                self._transport.deliver(received)
        elif rx.queue.enable_notifications():
            self.schedule_receive()

    def _deliver_inbox(self) -> bool:
        """Deliver what was put aside; True if the ring may be read on."""
        transport = self._transport
        if transport is None:
            return not self.guest_connected
        while self._inbox and transport.wants_data:
            item = self._inbox.popleft()
            if item is None:
                transport.deliver_eof()
            else:
                transport.deliver(item)
        if self._inbox:
            return False
        self._release_held()
        return self._transport is transport and transport.wants_data

    def _release_held(self) -> None:
        for slots in self._held:
            self._rx.give_back(slots)
        self._held.clear()

    def set_console(self, *, settled: bool) -> None:
        """CONSOLE_PORT, or no multiport protocol: from now on the port is open.

        The control protocol sends the PORT_OPEN(1) by itself; ``settled``: it needs none.
        """
        self._unheard = not settled
        self._parting = False
        self.is_console = self.guest_connected = True
        if self._transport is not None:
            self._transport.flush()

    def control_settled(self) -> None:
        """Go on: the device has used every control message."""
        if self._parting:
            self._parting = False
            self._discard()
            if self.guest_connected and not self._owner.port_opened(self, True):
                return
        if self._unheard:
            self._unheard = False
            if self._transport is not None:
                self._transport.flush()
            self._notify()

    def set_name(self, name: str) -> None:
        """PORT_NAME."""
        self.name = name
        self._notify()

    def set_host_connected(self, connected: bool) -> None:
        """PORT_OPEN from the device."""
        was = self.host_connected
        self.host_connected = connected
        if was and not connected and self._transport is not None and not self.is_console:
            self._put_aside()
        self._notify()
        if self._transport is not None:
            self._transport.flush()
            self.receive()

    def _put_aside(self) -> None:
        """Everything in the ring came before the end of file that is due now."""
        if self._parting:
            self._discard()
        slots, data = self._rx.take()
        if data:
            self._inbox.append(b"".join(data))
            self._held.append(slots)
        if not self._inbox or self._inbox[-1] is not None:
            self._inbox.append(None)

    def remove(self, error: Exception) -> None:
        """End the port: the device took it away, or the whole guest ends."""
        self.removed = error
        self.host_connected = self.guest_connected = False
        self._inbox.clear()
        self._release_held()
        if self._transport is not None:
            self._transport.lose(error)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def removed_error(nr: int) -> PortRemovedError:
    """Return the error for PORT_REMOVE."""
    return PortRemovedError(f"port {nr}: the device removed it")
