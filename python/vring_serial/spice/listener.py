"""Listening sockets for clients without TLS: bound here, so that errors say what they are."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from contextlib import ExitStack

from vring_serial.errors import ResourceError
from vring_serial.spice.options import SpiceOptions
from vring_serial.unix_socket import UnixListener

#: Where a port that is to be chosen begins, and how many are tried.
FIRST_PORT = 5900
PORTS_TRIED = 1000


class Listener:
    """The sockets of one server, non-blocking.

    Args:
        options: where to listen; nothing is bound if only TLS is asked for.

    Attributes:
        sockets: the listening sockets.
        addresses: the same, as text.

    Raises:
        ResourceError: an address cannot be had.
    """

    def __init__(self, options: SpiceOptions) -> None:
        self.sockets: list[socket.socket] = []
        self.addresses: list[str] = []
        self._stack = ExitStack()
        try:
            if options.unix:
                listener = UnixListener(options.addr)
                self._stack.callback(listener.close)
                self.sockets.append(listener.socket)
                self.addresses.append(f"unix:{options.addr}")
            elif options.autoport:
                self._keep(bind_first_free(options, options.port, but=options.tls_port))
            elif options.port:
                self._keep(bind(options, options.port))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop listening. Safe twice."""
        self._stack.close()
        self.sockets.clear()

    def _keep(self, bound: list[socket.socket]) -> None:
        for sock in bound:
            self._stack.enter_context(sock)
            self.sockets.append(sock)
            self.addresses.append(_address_text(sock))


def bind_first_free(options: SpiceOptions, first: int, *, but: int = 0) -> list[socket.socket]:
    """As :func:`bind`, on the first port that is free.

    Args:
        first: where to begin; 0 for FIRST_PORT.
        but: a port that is not taken, free or not.
    """
    first = first or FIRST_PORT
    last = min(first + PORTS_TRIED - 1, 65535)
    for port in range(first, last + 1):
        if port == but:
            continue
        try:
            return bind(options, port)
        except _InUseError:
            continue
    raise ResourceError(f"SPICE: no TCP port from {first} to {last} is free")


def bind(options: SpiceOptions, port: int) -> list[socket.socket]:
    """Sockets that listen on every address that the name stands for. Raises ResourceError."""
    bound: list[socket.socket] = []
    failed: OSError | None = None
    try:
        for family, type_, protocol, _, address in _resolve(options, port):
            try:
                bound.append(_listen(family, type_, protocol, address))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                failed = error  # of another family there may be one
        if not bound and failed is not None:
            raise failed
    except OSError as error:
        for sock in bound:
            sock.close()
        kind = _InUseError if error.errno == errno.EADDRINUSE else ResourceError
        why = os.strerror(error.errno) if error.errno else str(error)
        raise kind(f"SPICE: cannot listen on {options.addr or '*'}:{port}: {why}") from None
    return bound


class _InUseError(ResourceError):
    """Somebody else has the port."""


def _resolve(
    options: SpiceOptions, port: int
) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[object, ...]]]:
    """Return the addresses to listen on. Raises ResourceError if the name stands for none."""
    family = socket.AF_UNSPEC
    if options.ipv4 or options.ipv6:
        family = socket.AF_INET if options.ipv4 else socket.AF_INET6
    try:
        return list(
            dict.fromkeys(
                socket.getaddrinfo(
                    options.addr or None,
                    port,
                    family=family,
                    type=socket.SOCK_STREAM,
                    flags=socket.AI_PASSIVE,
                )
            )
        )
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no host's name"
        raise ResourceError(f"SPICE: address {options.addr}: {why}") from None


def _listen(
    family: socket.AddressFamily, type_: int, protocol: int, address: tuple[object, ...]
) -> socket.socket:
    sock = socket.socket(family, type_ | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(16)
    except BaseException:
        sock.close()
        raise
    return sock


def is_local(sock: socket.socket) -> bool:
    """Whether this machine alone can reach a listening socket: a unix socket, or on loopback."""
    if sock.family == socket.AF_UNIX:
        return True
    address = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _address_text(sock: socket.socket) -> str:
    host, port, *_ = sock.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
