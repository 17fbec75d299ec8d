"""Python code as the host end of a port: the SPICE agent's, and handlers of users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.chardev.base import Chardev, ProtocolEnd
from vring_serial.chardev.options import Options
from vring_serial.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SpicevmcOptions(Options):
    """Options of spicevmc.

    Attributes:
        name: the SPICE subtype of the channel; only the agent's is supported.
    """

    name: str = "vdagent"

    def __post_init__(self) -> None:
        if self.name != "vdagent":
            raise ConfigError(f"{self.name!r} is not served; only vdagent is", "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpiceportOptions(Options):
    """Options of spiceport.

    Attributes:
        name: the channel's name for SPICE clients, such as ``org.spice-space.webdav.0``.
    """

    name: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or len(self.name.encode()) > 255:
            raise ConfigError("a name of 1 to 255 printable characters is needed", "name")
        if self.name == "org.spice-space.stream.0":
            raise ConfigError(f"{self.name} is a display, and none is served", "name")


class ProtocolChardev(Chardev):
    """An :class:`asyncio.Protocol` as the host end.

    The end opens at ``start``. When the protocol closes its transport, the port's host end is
    closed until the program calls :meth:`connect` or the guest closes its side: the next open in
    the guest is a new session with a new protocol.

    Args:
        id: the chardev's name.
        factory: makes the protocol for one connection.
        connected: whether the end opens at ``start``; if not, :meth:`connect` opens it.
        description: text for logs; default: the factory's name.
    """

    def __init__(
        self,
        id: str,
        factory: Callable[[], asyncio.Protocol],
        *,
        connected: bool = True,
        description: str = "",
    ) -> None:
        super().__init__(id)
        self._factory = factory
        self._wanted = connected
        self._started = False
        self._description = description or f"python:{getattr(factory, '__qualname__', factory)}"

    async def start(self) -> None:
        self._started = True
        if self._wanted:
            self.connect()

    async def aclose(self) -> None:
        self._started = False
        self._close_end()

    def connect(self) -> None:
        """Connect the end, at ``start`` if called before. Does nothing if it is connected."""
        self._wanted = True
        if self._started and self.end is None:
            self._open_end(ProtocolEnd(self._factory))

    def disconnect(self) -> None:
        """Disconnect the end until :meth:`connect`. Does nothing if it is not connected."""
        self._wanted = False
        self._close_end()

    def peer_gone(self, reason: OSError | None = None) -> None:
        self._close_end()

    def guest_opened(self, is_open: bool) -> None:
        if not is_open and self._wanted:
            self.connect()

    @property
    def description(self) -> str:
        return self._description
