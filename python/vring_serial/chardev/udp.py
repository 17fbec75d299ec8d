"""udp: datagrams to one address and from it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.chardev.base import Chardev, ProtocolEnd
from vring_serial.chardev.endpoint import resolve
from vring_serial.chardev.kept import Kept
from vring_serial.chardev.options import Options, check_range
from vring_serial.errors import ConfigError
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: Most bytes of the guest's in one datagram: what an Ethernet's frame has room for.
DATAGRAM_BYTES = 1400
#: Datagrams that are received before other things of the event loop.
_TURN = 16
_LARGEST = 65536
_SOCKET = "socket"


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpOptions(Options):
    """Options of udp.

    Attributes:
        host: name or address to send to and receive from; "" is this machine.
        port: its port.
        localaddr: name or address to bind to; "" for any.
        localport: port to bind to; 0 lets the system choose.
        ipv4, ipv6: whether to use this family; both are used if neither is given.
    """

    host: str = ""
    port: int | None = None
    localaddr: str = ""
    localport: int = 0
    ipv4: bool | None = None
    ipv6: bool | None = None

    def __post_init__(self) -> None:
        if self.port is None:
            raise ConfigError("a port is needed", "port")
        check_range("port", self.port, 1, 65535)
        check_range("localport", self.localport, 0, 65535)
        for key in ("host", "localaddr"):
            if "\0" in getattr(self, key):
                raise ConfigError(f"{getattr(self, key)!r} contains a NUL character", key)
        if self.ipv4 is False and self.ipv6 is False:
            raise ConfigError("ipv4 and ipv6 cannot both be off", "ipv6")

    @property
    def family(self) -> socket.AddressFamily:
        """The only address family to use; AF_UNSPEC for all."""
        if self.ipv6 is False or (self.ipv4 and not self.ipv6):
            return socket.AF_INET
        if self.ipv4 is False or (self.ipv6 and not self.ipv4):
            return socket.AF_INET6
        return socket.AF_UNSPEC


class UdpChardev(Chardev):
    """A datagram socket, connected to one address: what others send is not received.

    The end is open from start to close. The guest's bytes are sent in datagrams of at most
    DATAGRAM_BYTES, and what comes in datagrams is bytes to the guest. Datagrams may be lost,
    doubled or overtaken on their way, and those that the guest does not read in time are dropped by
    the system.

    A successor of a process that was killed has the same socket, with what is in it.
    """

    def __init__(self, id: str, options: UdpOptions) -> None:
        super().__init__(id)
        self.options = options
        self._sock: socket.socket | None = None
        self._starting: asyncio.Task[None] | None = None
        self._kept = Kept(None)
        self._log = RateLimitedLog(log, burst=3, seconds=60)  # each datagram may fail

    @property
    def port(self) -> int:
        """Port that it is bound to while started; 0 if it is not."""
        return 0 if self._sock is None else self._sock.getsockname()[1]

    @property
    def description(self) -> str:
        return f"udp:{_shown(self.options.host or 'localhost', self.options.port or 0)}"

    async def start(self) -> None:
        if self._sock is not None:
            return
        self._kept = Kept(self.keeping)
        self._starting = asyncio.create_task(self._open())
        try:
            await self._starting
        except OSError as error:
            raise self._error(f"send to {self.description}", error) from error
        except asyncio.CancelledError:
            if not self._starting.cancelled():
                self._starting.cancel()
                raise
            raise self._error(f"send to {self.description}", "it was stopped meanwhile") from None
        finally:
            self._starting = None
        sock = self._sock
        assert sock is not None
        self._kept.started()
        self._open_end(ProtocolEnd(lambda: _Datagrams(sock, self._failed)))

    async def aclose(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        self._close_end()
        if self._sock is not None:
            self._kept.keep(_SOCKET, -1)
            self._sock.close()
            self._sock = None

    async def _open(self) -> None:
        if (fd := self._kept.take(_SOCKET)) >= 0:
            left = socket.socket(fileno=fd)
            if left.type == socket.SOCK_DGRAM:
                self._sock = left
                return
            left.close()
        options = self.options
        assert options.port is not None  # __post_init__ saw to it
        kind = socket.SOCK_DGRAM
        family, where = (
            await resolve(options.host or "localhost", options.port, options.family, kind)
        )[0]
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            if options.localaddr or options.localport:
                found = await resolve(
                    options.localaddr,
                    options.localport,
                    socket.AddressFamily(family),
                    kind,
                    passive=True,
                )
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(found[0][1])
            sock.connect(where)
            self._kept.keep(_SOCKET, sock.fileno())
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    def _failed(self, error: OSError) -> None:
        text = "chardev %s: %s: a datagram was lost: %s"
        self._log.warning(text, self.id, self.description, os.strerror(error.errno or 0))


class _Datagrams(asyncio.Protocol):
    """Sends what the guest writes, and gives it what comes."""

    def __init__(self, sock: socket.socket, failed: Callable[[OSError], None]) -> None:
        self._sock = sock
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unsent: deque[memoryview] = deque()
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())

    def data_received(self, data: bytes) -> None:
        view = memoryview(data)
        self._unsent += (view[i : i + DATAGRAM_BYTES] for i in range(0, len(view), DATAGRAM_BYTES))
        self._send()

    def pause_writing(self) -> None:
        self._paused = True
        self._loop.remove_reader(self._sock.fileno())

    def resume_writing(self) -> None:
        self._paused = False
        self._loop.add_reader(self._sock.fileno(), self._receive)

    def _send(self) -> None:
        while self._unsent:
            try:
                self._sock.send(self._unsent[0])
            except BlockingIOError:
                if self._transport is not None:
                    self._transport.pause_reading()
                    self._loop.add_writer(self._sock.fileno(), self._room)
                return
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    # Nobody was there for one before; this one has not been sent.
                    self._failed(error)
                    continue
                self._failed(error)
            self._unsent.popleft()

    def _room(self) -> None:
        self._loop.remove_writer(self._sock.fileno())
        self._send()
        if not self._unsent and self._transport is not None:
            self._transport.resume_reading()

    def _receive(self) -> None:
        for _ in range(_TURN):
            if self._transport is None or self._paused:
                return
            try:
                data = self._sock.recv(_LARGEST)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error)
                return
            self._transport.write(data)


def _shown(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port}"
