"""Socket addresses: listening and connecting, with errors for users.

Everything here raises OSError or SocketPathError with a text for users; the caller adds the
context.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass
from typing import Any

from vring_serial import activation
from vring_serial.unix_socket import MAX_PATH, UnixListener, encode_path, refuse_descriptors

BACKLOG = 128  # clients that the system lets wait to be accepted
RETRY_SECONDS = 0.05  # while a unix server's backlog is full
PORT_ATTEMPTS = 8  # to find one port, chosen by the system, that is free on every address

_NONBLOCKING = socket.SOCK_STREAM | socket.SOCK_NONBLOCK


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The address of a unix socket.

    Attributes:
        path: path, or name in the abstract namespace.
        abstract: whether `path` is a name in the abstract namespace.
        tight: an abstract name has its own length; otherwise NULs fill it up to the longest.
    """

    path: str
    abstract: bool = False
    tight: bool = True

    def __str__(self) -> str:
        return f"unix:{'@' if self.abstract else ''}{self.path}"

    def encode(self) -> bytes:
        """Return the address for bind and connect. Raises SocketPathError if it is too long."""
        name = encode_path(self.path)
        if not self.abstract:
            return name
        return b"\0" + (name if self.tight else name.ljust(MAX_PATH, b"\0"))


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """The address of a TCP socket.

    Attributes:
        host: name or address; "" for every local address (listening) or this machine (connecting).
        port: TCP port; 0 lets the system choose (listening).
        last_port: last port to try if `port` and those after it are in use (listening).
        family: the only address family to use; AF_UNSPEC for all.
    """

    host: str
    port: int
    last_port: int
    family: socket.AddressFamily = socket.AF_UNSPEC

    def __str__(self) -> str:
        return self.at(self.port)

    def at(self, port: int) -> str:
        """Return the address with another port, for messages."""
        return f"tcp:{f'[{self.host}]' if ':' in self.host else self.host}:{port}"

    async def resolve(self, *, passive: bool) -> list[tuple[int, tuple[Any, ...]]]:
        """Return families and socket addresses in order of preference, without duplicates."""
        return await resolve(self.host, self.port, self.family, passive=passive)


async def resolve(
    host: str,
    port: int,
    family: socket.AddressFamily,
    kind: socket.SocketKind = socket.SOCK_STREAM,
    *,
    passive: bool = False,
) -> list[tuple[int, tuple[Any, ...]]]:
    """Return families and socket addresses of a host, in order of preference, without duplicates.

    Args:
        host: name or address; "" for every local address (``passive``) or this machine.
        port: its port.
        family: the only address family to use; AF_UNSPEC for all.
        kind: of the socket.
        passive: the addresses are to bind to.
    """
    loop = asyncio.get_running_loop()
    flags = socket.AI_PASSIVE if passive else 0
    try:
        found = await loop.getaddrinfo(host or None, port, family=family, type=kind, flags=flags)
    except socket.gaierror as error:
        why = f"{host} does not resolve: {error.strerror}"
        raise OSError(errno.EADDRNOTAVAIL, why) from error
    except UnicodeError as error:  # a label that no name can have
        why = f"{host} does not resolve: {error}"
        raise OSError(errno.EADDRNOTAVAIL, why) from error
    return list(dict.fromkeys((info[0], info[4]) for info in found))


Address = UnixAddress | TcpAddress


class Listener:
    """The listening sockets of one address.

    Attributes:
        sockets: non-blocking and listening.
        port: the TCP port in use; 0 for unix sockets.
    """

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.port = 0
        self._file: UnixListener | None = None

    async def listen(self, address: Address) -> None:
        """Bind and listen. After an error everything is closed and removed again."""
        try:
            if isinstance(address, UnixAddress):
                self._listen_unix(address)
            else:
                self._listen_tcp(address, await address.resolve(passive=True))
        except BaseException:
            self.close()
            raise

    def adopt(self, address: Address, sockets: list[socket.socket]) -> None:
        """Continue with the sockets that a predecessor process made for ``address``."""
        if isinstance(address, UnixAddress) and not address.abstract:
            self._file = UnixListener(address.path, inherited=sockets[0].detach())
            self.sockets.append(self._file.socket)
        else:
            self.sockets += sockets
            if isinstance(address, TcpAddress):
                self.port = sockets[0].getsockname()[1]
        for sock in self.sockets:
            sock.setblocking(False)

    def close(self) -> None:
        """Stop listening, and remove the path if one was made."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()
        self.port = 0

    def _listen_unix(self, address: UnixAddress) -> None:
        if address.abstract:
            self.sockets.append(_listening(socket.AF_UNIX, address.encode()))
        else:
            self._file = UnixListener(address.path, BACKLOG)
            self.sockets.append(self._file.socket)

    def _listen_tcp(self, address: TcpAddress, found: list[tuple[int, tuple[Any, ...]]]) -> None:
        """Listen on all addresses of the host, on the first port that is free on every address."""
        ports = list(range(address.port, address.last_port + 1))
        if address.port == 0:
            ports = [0] * PORT_ATTEMPTS
        for remaining in reversed(range(len(ports))):
            try:
                self._listen_everywhere(found, ports[-1 - remaining])
            except OSError as error:
                self.close()
                if error.errno != errno.EADDRINUSE or not remaining:
                    raise
            else:
                return

    def _listen_everywhere(self, found: list[tuple[int, tuple[Any, ...]]], port: int) -> None:
        unusable: OSError | None = None
        for family, (host, _, *rest) in found:
            try:
                sock = _listening(family, (host, self.port or port, *rest))
            except OSError as error:
                # A name may have addresses of a family that this machine does not support.
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                unusable = error
                continue
            self.sockets.append(sock)
            self.port = sock.getsockname()[1]
        if unusable is not None and not self.sockets:
            raise unusable


async def connect(address: Address) -> socket.socket:
    """Connect, and return a non-blocking socket."""
    if isinstance(address, UnixAddress):
        return await _connect_unix(address)
    failure: OSError | None = None
    for family, where in await address.resolve(passive=False):
        try:
            return await _connect_tcp(family, where)
        except OSError as error:
            failure = error
    raise failure or OSError(errno.EADDRNOTAVAIL, f"{address.host} has no address")


async def _connect_unix(address: UnixAddress) -> socket.socket:
    name = address.encode()
    sock = socket.socket(socket.AF_UNIX, _NONBLOCKING)
    refuse_descriptors(sock)
    try:
        # A full backlog gives EAGAIN at once instead of EINPROGRESS.
        while (error := sock.connect_ex(name)) == errno.EAGAIN:  # noqa: ASYNC110
            await asyncio.sleep(RETRY_SECONDS)
        if error:
            raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tcp(family: int, where: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, _NONBLOCKING)
    try:
        await asyncio.get_running_loop().sock_connect(sock, where)
        # Repeated attempts at a free port of the own machine eventually connect to themselves.
        if sock.getsockname() == sock.getpeername():
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError) and error.errno:
            # asyncio's texts name the failed call; ours name the cause.
            raise OSError(error.errno, os.strerror(error.errno)) from error
        raise
    return sock


def _listening(family: int, where: tuple[Any, ...] | bytes) -> socket.socket:
    if (provided := activation.take(where)) is not None:
        sock = socket.socket(fileno=provided)
        sock.setblocking(False)
        if family == socket.AF_UNIX:
            refuse_descriptors(sock)
        return sock
    sock = socket.socket(family, _NONBLOCKING)
    try:
        if family == socket.AF_UNIX:
            refuse_descriptors(sock)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
