"""socket: a unix or TCP stream socket, as a server or as a client that may connect again."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.options import Options, check_path, check_range
from vring_serial.errors import ConfigError

_TCP_ONLY = ("to", "ipv4", "ipv6", "nodelay")


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions(Options):
    """Options of socket; either ``path`` (unix) or ``port`` (TCP) is needed.

    Attributes:
        path: of the unix socket; with ``abstract``, its name in the abstract namespace.
        abstract: the address is a name that no file system knows; it goes with its socket.
        tight: an abstract name is as long as it is; otherwise NULs fill it up to 107 bytes.
        host: name or address; "" for every local address (server) or this machine (client).
        port: TCP port; 0 lets the system choose (server).
        to: the last port to try if ``port`` and those after it are in use (server).
        ipv4, ipv6: use this family, or do not; if neither is given both are used.
        nodelay: send small segments at once.
        server: listen; otherwise connect.
        wait: ``start`` returns when the first client is there (server); None means on, as with QEMU.
        reconnect, reconnect_ms: connect again that long after the connection failed or ended, in
            seconds or milliseconds (client); 0 for never.
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
        """Seconds between attempts to connect; 0 for no further attempt."""
        return float(self.reconnect) or self.reconnect_ms / 1000
