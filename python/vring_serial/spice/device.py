"""Ports as char devices of libspice-server (SpiceCharDeviceInterface), without losing a byte.

The server *writes* what a client sent and *reads* what the guest sent. Both are pulled by whoever
can go on: a write that the port has no room for is taken back by returning less, and taken up again
by a wake-up when the port has room; what the server does not read at once stays here, and the port
stops popping the guest's buffers until it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.errors import ResourceError
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.spice.library import Library, callback_failed

log = logging.getLogger("vring_serial.spice")

_NOTIFY_WRITABLE = 1 << 0
_PORT_EVENT_OPENED = 0
_PORT_EVENT_CLOSED = 1


class CharDeviceServer(Protocol):
    """The server that char devices attach to.

    Attributes:
        library: libspice-server.
        handle: the library's server while it runs, else None.
        devices: the char devices that are attached; each adds and removes itself.
    """

    library: Library
    handle: Any
    devices: set[CharDevice]


class CharDevice(asyncio.Protocol):
    """One port of the device as one char device of the server, over all of its connections.

    Args:
        server: the server, which has been started when a connection is made.
        subtype: ``vdagent`` or ``port``.
        name: the channel's name, for a port.

    Attributes:
        closed: set when a connection has been lost.
    """

    def __init__(self, server: CharDeviceServer, subtype: str, name: str = "") -> None:
        self.closed = asyncio.Event()
        self._server = server
        self._library = server.library
        self._transport: asyncio.Transport | None = None
        self._attached = False
        self._writable = False
        self._input = b""  # the guest's bytes that the server has not read
        self._taken = 0  # of them it has read this many
        self._when_read: Callable[[], None] | None = None
        self._waking = False
        self._log = RateLimitedLog(log)  # a guest can open and break its port in a loop
        self._make_structs(subtype, name)

    def _make_structs(self, subtype: str, name: str) -> None:
        """Make what the server holds pointers to: it lives as long as this object."""
        ffi = self._library.ffi
        self._interface = ffi.new("SpiceCharDeviceInterface *")
        texts = (b"char_device", b"vring port", subtype.encode(), name.encode())
        self._strings = [ffi.new("char[]", text) for text in texts]
        base = self._interface.base
        base.type, base.description, subtype_text, name_text = self._strings
        base.major_version = 1
        base.minor_version = 3
        fields = dict(ffi.typeof("SpiceCharDeviceInterface").fields)
        self._callbacks = {
            field: ffi.callback(
                fields[field].type,
                getattr(self, f"_{field}"),
                error=error,
                onerror=callback_failed,
            )
            for field, error in (("state", None), ("write", 0), ("read", 0))
        }
        for field, callback in self._callbacks.items():
            setattr(self._interface, field, callback)
        self._interface.flags = _NOTIFY_WRITABLE
        self._instance = ffi.new("SpiceCharDeviceInstance *")
        self._instance.base.sif = ffi.addressof(base)
        self._instance.subtype = subtype_text
        self._instance.portname = name_text if name else ffi.NULL

    def attach(self) -> None:
        """Become a char device of the server. Raises ResourceError if it refuses."""
        handle = self._server.handle
        if handle is None or self._attached:
            return
        self._attached = True
        base = self._library.ffi.addressof(self._instance, "base")
        if self._library.lib.spice_server_add_interface(handle, base) != 0 or (
            self._instance.st == self._library.ffi.NULL
        ):
            self._attached = False
            raise ResourceError(f"the SPICE server refused: {self._library.last_warning[0]}")
        self._server.devices.add(self)

    def detach(self) -> None:
        """Stop being one; what it has not read is dropped. Does nothing if it is none."""
        self._when_read = None
        self._drop_input()
        if self._attached:
            self._attached = False
            self._server.devices.discard(self)
            base = self._library.ffi.addressof(self._instance, "base")
            self._library.lib.spice_server_remove_interface(base)

    def _wake(self) -> None:
        """Let the server write and read what it can.

        Of a port it reads one buffer each time that it is woken, so it is woken until it stops.
        """
        self._waking = True
        left = -1
        while self._attached and left != len(self._input) - self._taken:
            left = len(self._input) - self._taken
            self._library.lib.spice_server_char_device_wakeup(self._instance)
            if not self._input:
                break
        self._waking = False

    # --- asyncio.Protocol: the guest's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._finish_reading()
        self._transport = transport
        self._writable = True
        try:
            self._opened()
        except ResourceError as error:
            self._log.warning("%s", error)
            transport.abort()
            return
        self._wake()

    def data_received(self, data: bytes) -> None:
        self._input = self._input[self._taken :] + data
        self._taken = 0
        self._wake()
        if self._input and self._transport is not None:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        # The server may be in the middle of a write, which is where this can come from.
        asyncio.get_running_loop().call_soon(self._wake)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._writable = False
        self._when_read = self._closed
        if not self._input or not self._attached:
            self._finish_reading()
        self.closed.set()

    def _finish_reading(self) -> None:
        """End a connection whose guest's side is closed, when all was read or never will be."""
        closed, self._when_read = self._when_read, None
        if closed is not None:
            self._drop_input()
            closed()

    def _drop_input(self) -> None:
        self._input = b""
        self._taken = 0

    def _opened(self) -> None:
        raise NotImplementedError

    def _closed(self) -> None:
        raise NotImplementedError

    # --- SpiceCharDeviceInterface: the server's side

    def _state(self, instance: Any, connected: int) -> None:
        raise NotImplementedError

    def _write(self, instance: Any, buffer: Any, length: int) -> int:
        if self._transport is None or not self._writable:
            return 0
        self._transport.write(bytes(self._library.ffi.buffer(buffer, length)))
        return length

    def _read(self, instance: Any, buffer: Any, length: int) -> int:
        count = min(length, len(self._input) - self._taken)
        if count > 0:
            with memoryview(self._input) as view:
                self._library.ffi.memmove(buffer, view[self._taken : self._taken + count], count)
            self._taken += count
            if self._taken == len(self._input):
                self._all_read()
            elif not self._waking:
                self._waking = True
                asyncio.get_running_loop().call_soon(self._wake)
        return count

    def _all_read(self) -> None:
        self._drop_input()
        if self._transport is not None:
            self._transport.resume_reading()
        elif self._when_read is not None:
            # Not from within the server's read.
            asyncio.get_running_loop().call_soon(self._finish_reading)


class AgentDevice(CharDevice):
    """The agent channel: the server has an agent while the guest has the port open."""

    def __init__(self, server: CharDeviceServer) -> None:
        super().__init__(server, "vdagent")

    def _opened(self) -> None:
        self.attach()

    def _closed(self) -> None:
        self.detach()

    def _state(self, instance: Any, connected: int) -> None:
        """Close an agent that the server dropped for its protocol; the guest may open it anew."""
        if not connected and self._attached:
            self._log.warning("the SPICE server dropped the agent, which broke its protocol")
            self._attached = False
            self._server.devices.discard(self)
            self._when_read = None
            self._drop_input()
            if self._transport is not None:
                self._transport.abort()


class PortDevice(CharDevice):
    """A port channel: there for clients all the time, connected while one of them has it open."""

    def __init__(self, server: CharDeviceServer, name: str, chardev: PortChardev) -> None:
        super().__init__(server, "port", name)
        self._chardev = chardev

    def _opened(self) -> None:
        self._event(_PORT_EVENT_OPENED)

    def _closed(self) -> None:
        self._event(_PORT_EVENT_CLOSED)

    def _event(self, event: int) -> None:
        if self._attached:
            self._library.lib.spice_server_port_event(self._instance, event)

    def _state(self, instance: Any, connected: int) -> None:
        if connected:
            self._chardev.connect()
        else:
            self._drop_input()  # it was for the client that left
            self._finish_reading()
            self._chardev.disconnect()


class AgentChardev(ProtocolChardev):
    """The host end of ``com.redhat.spice.0``: the SPICE server."""

    def __init__(self, id: str, server: CharDeviceServer) -> None:
        self._device = AgentDevice(server)
        super().__init__(id, lambda: self._device, description="the SPICE server")

    async def aclose(self) -> None:
        await super().aclose()
        self._device.detach()


class PortChardev(ProtocolChardev):
    """The host end of a port channel, open while a client is connected to the channel.

    Args:
        id: the chardev's name.
        server: the server, which has to be started before this.
        name: the channel's name for clients, such as ``org.spice-space.webdav.0``.
    """

    def __init__(self, id: str, server: CharDeviceServer, name: str) -> None:
        self._device = PortDevice(server, name, self)
        super().__init__(
            id, lambda: self._device, connected=False, description=f"SPICE port {name}"
        )

    async def start(self) -> None:
        await super().start()
        self._device.attach()

    async def aclose(self) -> None:
        await super().aclose()
        self._device.detach()
