"""socket: a unix or TCP stream socket, as a server or as a client that may reconnect."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import socket
from dataclasses import dataclass

from vring_serial import accept
from vring_serial.accept import Acceptor
from vring_serial.callbacks import tell
from vring_serial.chardev import hangup
from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.chardev.endpoint import Address, Listener, TcpAddress, UnixAddress, connect
from vring_serial.chardev.hangup import HangupWatch, is_leaving, unread
from vring_serial.chardev.kept import KeptSockets
from vring_serial.chardev.options import Options, check_path, check_range
from vring_serial.errors import ConfigError
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.unix_socket import SocketPathError

log = logging.getLogger(__name__)

# Clients that wait while another is served; more stay in the system's backlog.
MOST_WAITING = 16

_TCP_ONLY = ("to", "ipv4", "ipv6", "nodelay")


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions(Options):
    """Options of socket; either ``path`` (unix) or ``port`` (TCP) is needed.

    Attributes:
        path: path of the unix socket; with ``abstract``, its name in the abstract namespace.
        abstract: the address is a name in the abstract namespace; it vanishes with its socket.
        tight: an abstract name has its own length; otherwise NULs fill it up to 107 bytes.
        host: name or address; "" for every local address (server) or this machine (client).
        port: TCP port; 0 lets the system choose (server).
        to: last port to try if ``port`` and those after it are in use (server).
        ipv4, ipv6: whether to use this family; both are used if neither is given.
        nodelay: send small segments at once.
        server: listen; otherwise connect.
        wait: ``start`` waits for the first client (server); None means on, as in QEMU.
        reconnect, reconnect_ms: delay before reconnecting after the connection failed or ended, in
            seconds or milliseconds (client); 0: do not reconnect.
    """

    path: str = ""
    abstract: bool = False
    tight: bool = True
    host: str = ""
    port: int | None = None
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    nodelay: bool = False
    server: bool = False
    wait: bool | None = None
    reconnect: int = 0
    reconnect_ms: int = 0

    def __post_init__(self) -> None:
        if self.path:
            self._check_unix()
        else:
            self._check_tcp()
        self._check_role()

    def _check_unix(self) -> None:
        if not self.abstract:
            check_path("path", self.path)
        if self.host or self.port is not None:
            raise ConfigError("a socket has a path or a host and a port, not both", "path")
        for name in _TCP_ONLY:
            if getattr(self, name) not in (None, False):
                raise ConfigError("goes with TCP sockets only, and this one has a path", name)

    def _check_tcp(self) -> None:
        if self.port is None:
            raise ConfigError("a socket needs a path (unix) or a port (TCP)", "path")
        if "\0" in self.host:
            raise ConfigError(f"{self.host!r} contains a NUL character", "host")
        if self.abstract:
            raise ConfigError("goes with a path only", "abstract")
        check_range("port", self.port, 0 if self.server else 1, 65535)
        if self.to is not None:
            if not self.server:
                raise ConfigError("goes with server=on only", "to")
            check_range("to", self.to, self.port, 65535)
        if self.ipv4 is False and self.ipv6 is False:
            raise ConfigError("ipv4 and ipv6 cannot both be off", "ipv6")

    def _check_role(self) -> None:
        if self.reconnect and self.reconnect_ms:
            raise ConfigError("give reconnect or reconnect-ms, not both", "reconnect-ms")
        for key, value in (("reconnect", self.reconnect), ("reconnect-ms", self.reconnect_ms)):
            check_range(key, value, 0, 2**31 - 1)
            if value and self.server:
                raise ConfigError("goes with clients only, and this is a server", key)
        if self.wait and not self.server:
            raise ConfigError("goes with server=on only", "wait")

    @property
    def waits(self) -> bool:
        """Whether ``start`` waits for the first client."""
        return self.server and self.wait is not False

    @property
    def reconnect_delay(self) -> float:
        """Seconds between attempts to connect; 0: only one attempt."""
        return float(self.reconnect) or self.reconnect_ms / 1000

    @property
    def address(self) -> Address:
        """Address to listen on or to connect to."""
        if self.path:
            return UnixAddress(self.path, self.abstract, self.tight)
        assert self.port is not None  # __post_init__ saw to it
        last = self.port if self.to is None else self.to
        return TcpAddress(self.host, self.port, last, self._family)

    @property
    def _family(self) -> socket.AddressFamily:
        if self.ipv6 is False or (self.ipv4 and not self.ipv6):
            return socket.AF_INET
        if self.ipv4 is False or (self.ipv6 and not self.ipv4):
            return socket.AF_INET6
        return socket.AF_UNSPEC


class SocketChardev(Chardev):
    """A stream socket; its end is open while a peer is connected.

    It serves one peer at a time; others wait. End of file from the peer is a disconnection, even if
    the peer only shut down its sending side, and so is a reset.

    A peer that hung up entirely does not occupy the port. While the guest has the port closed, the
    peer's unread bytes are dropped at once; while it is open, the guest has ``LAST_WORDS_SECONDS``
    after the hang-up to read them. The same applies to waiting peers. A peer that only shut down
    its sending side stays, with its bytes. TCP cannot tell the two apart: there the bytes stay
    until another client arrives, or not at all if this client reconnects.
    """

    def __init__(self, id: str, options: SocketOptions) -> None:
        super().__init__(id)
        self.options = options
        self._address = options.address
        self._started = False
        # A peer can come and go in a loop.
        self._log = RateLimitedLog(log, burst=20, seconds=10)
        self._listener = Listener()
        self._acceptor: Acceptor | None = None
        self._first_peer: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._peer: socket.socket | None = None
        self._why_gone: OSError | None = None  # of a peer that is read from and not written to
        self._waiting: dict[int, socket.socket] = {}  # by descriptor, as they came
        self._watch: HangupWatch | None = None
        self._guest_is_open = False
        self._kept = KeptSockets(None)

    @property
    def port(self) -> int:
        """TCP port on which a started server listens; 0 if there is none."""
        return self._listener.port

    @property
    def description(self) -> str:
        address = self._address
        where = address.at(self.port) if isinstance(address, TcpAddress) and self.port else address
        return f"{where} ({'server' if self.options.server else 'client'})"

    @property
    def filename(self) -> str:
        address = self._address
        role = ",server=on" if self.options.server else ""
        if isinstance(address, TcpAddress):
            where = address.at(self.port or address.port)
        else:
            kind = ",abstract=on" if address.abstract else ""
            where = f"unix:{address.path}{kind}{',tight=on' if kind and address.tight else ''}"
        if self._peer is None:
            return f"disconnected:{where}{role}"
        if isinstance(address, TcpAddress):
            with contextlib.suppress(OSError):  # it may have left
                host, port = self._peer.getpeername()[:2]
                peer = TcpAddress(host, port, port)
                return f"{where}{role} <-> {str(peer).removeprefix('tcp:')}"
        return f"{where}{role}"

    async def start(self) -> None:
        """Listen, or connect.

        A server with ``wait`` returns when the first client is connected. A client that reconnects
        returns at once and connects in the background; any other returns when it is connected.
        """
        if self._started:
            return
        self._started = True
        try:
            self._watch = self._make_watch()
            self._kept = KeptSockets(self.keeping, f"chardev {self.id}")
            clients = self._kept.take_clients()
            for sock in clients:
                self._arrived(sock)
            if clients and not self.options.server:
                pass  # a predecessor had connected
            elif self.options.reconnect_delay:
                self._task = asyncio.create_task(self._keep_connecting(0))
            else:
                self._task = asyncio.create_task(self._bring_up())
                await self._task
            self._kept.started()
        except BaseException as error:
            stopped = not self._started
            await self.aclose()
            if stopped and isinstance(error, asyncio.CancelledError):
                raise self._error(self._doing, "it was stopped meanwhile") from None
            raise

    async def aclose(self) -> None:
        self._started = False
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        self._disconnect()
        for fd in list(self._waiting):
            self._dismiss(fd)
        self._listener.close()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        # Last: a cancellation here leaves nothing open.
        if task is not None and not task.done():
            await asyncio.wait([task])

    def peer_gone(self, reason: OSError | None = None) -> None:
        if self._peer is None or self._watch is None:
            return
        if reason is not None:
            fd = self._peer.fileno()
            if reason.errno == errno.EPIPE and not is_leaving(fd):
                return  # it shut down its receiving side, and may send as long as it likes
            self._why_gone = reason
            if self._watch.condemn(fd):
                return
        self._let_go()

    def send_away(self) -> bool:
        if self._peer is None:
            return False
        self._let_go()
        return True

    def guest_opened(self, is_open: bool) -> None:
        self._guest_is_open = is_open
        if self._watch is not None:
            self._watch.look_again()

    @property
    def _doing(self) -> str:
        return f"{'listen on' if self.options.server else 'connect to'} {self._address}"

    def _make_watch(self) -> HangupWatch:
        try:
            return HangupWatch(self._hung_up, self._patience, self._unread)
        except OSError as error:
            raise self._error(self._doing, error) from error

    async def _bring_up(self) -> None:
        try:
            if not self.options.server:
                if not self._kept.started_before:  # then its peer has left
                    self._arrived(await connect(self._address))
                return
            if listening := self._kept.take_listeners():
                self._listener.adopt(self._address, listening)
            else:
                await self._listener.listen(self._address)
                self._kept.keep_listeners(self._listener.sockets)
        except (OSError, SocketPathError) as error:
            raise self._error(self._doing, _why(error)) from error
        self._acceptor = Acceptor(
            self._arrived, name=f"chardev {self.id} at {self.description}", peer="client"
        )
        self._acceptor.open(self._listener.sockets)
        if self.options.waits and self._peer is None and not self._kept.started_before:
            log.info("chardev %s: waiting for a client at %s", self.id, self.description)
            self._first_peer = asyncio.get_running_loop().create_future()
            await self._first_peer

    async def _keep_connecting(self, delay: float) -> None:
        told = ""
        while True:
            await asyncio.sleep(delay)
            try:
                self._arrived(await connect(self._address))
            except (OSError, SocketPathError) as error:
                delay = self.options.reconnect_delay
                message = str(self._error(self._doing, _why(error)))
                if message != told:
                    self._log.warning("%s; trying again every %g s", message, delay)
                told = message
            else:
                return

    def _arrived(self, sock: socket.socket) -> None:
        """Serve a new peer, or let it wait."""
        assert self._watch is not None  # there from start to stop
        try:
            sock.setblocking(False)
            if self.options.nodelay:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._watch.watch(sock.fileno())
            self._kept.keep_client(sock)
        except BaseException:
            sock.close()
            raise
        if self._peer is None and not self._waiting:
            self._connected(sock)
            return
        self._waiting[sock.fileno()] = sock
        if self._acceptor is not None and len(self._waiting) >= MOST_WAITING:
            self._acceptor.pause()
        self._watch.look_again()

    def _connected(self, sock: socket.socket) -> None:
        self._peer = sock
        try:
            text = "chardev %s: peer connected to %s"
            self._log.log(logging.INFO, text, self.id, self.description)
            self._open_end(DescriptorEnd(read_fd=sock.fileno(), write_fd=sock.fileno()))
        except BaseException:
            self._disconnect()
            raise
        if self._first_peer is not None and not self._first_peer.done():
            self._first_peer.set_result(None)

    # --- peers that leave

    def _unread(self, fd: int) -> int:
        served = self._peer is not None and self._peer.fileno() == fd
        return unread(fd) + (self.taken() if served else 0)

    def _patience(self, fd: int, entirely: bool) -> float:
        """Return for how many seconds unread bytes keep a peer, served or waiting."""
        if not entirely:
            others = bool(self._waiting) and next(reversed(self._waiting)) != fd
            if not isinstance(self._address, TcpAddress):
                others = False  # the system tells those who are gone from those who are not
            elif self.options.reconnect_delay:
                others = True
            if not others:
                return math.inf
        return hangup.LAST_WORDS_SECONDS if self._guest_is_open else 0.0

    def _hung_up(self, fd: int) -> None:
        if fd in self._waiting:
            self._dismiss(fd)
        else:
            self._let_go()

    def _let_go(self) -> None:
        """Close the end of a peer that left, and serve the next."""
        assert self._peer is not None
        why = f": {self._why_gone.strerror}" if self._why_gone else ""
        cut_off = _cut_off(self._unread(self._peer.fileno()))
        self._log.log(logging.INFO, "chardev %s: peer left%s%s", self.id, why, cut_off)
        self._disconnect()
        if not self._started:
            return
        if self._acceptor is not None:
            asyncio.get_running_loop().call_soon(self._serve_next)
        elif self.options.reconnect_delay:
            self._task = asyncio.create_task(self._keep_connecting(self.options.reconnect_delay))

    def _serve_next(self) -> None:
        while self._peer is None and self._waiting:
            sock = self._take_waiting(next(iter(self._waiting)))
            what = f"chardev {self.id}: serving a client that waited"
            tell(self._log, what, self._connected, sock)

    def _dismiss(self, fd: int) -> None:
        """Close the connection of a waiting peer."""
        sock = self._take_waiting(fd)
        if cut_off := _cut_off(unread(sock.fileno())):
            text = "chardev %s: a peer left before its turn%s"
            self._log.log(logging.INFO, text, self.id, cut_off)
        self._close(sock)

    def _take_waiting(self, fd: int) -> socket.socket:
        sock = self._waiting.pop(fd)
        if self._acceptor is not None and len(self._waiting) == MOST_WAITING - 1:
            self._acceptor.resume()
        return sock

    def _disconnect(self) -> None:
        peer, self._peer = self._peer, None
        if peer is None:
            return
        self._why_gone = None
        try:
            self._close_end()
        finally:
            self._close(peer)

    def _close(self, sock: socket.socket) -> None:
        assert self._watch is not None
        self._watch.unwatch(sock.fileno())
        self._kept.drop_client(sock)
        sock.close()
        accept.descriptor_freed()


def _cut_off(count: int) -> str:
    """Return a log text about unread bytes; empty if there are none."""
    return f"; {count} bytes that it had sent were not read" if count else ""


def _why(error: OSError | SocketPathError) -> OSError | str:
    return error.why if isinstance(error, SocketPathError) else error
