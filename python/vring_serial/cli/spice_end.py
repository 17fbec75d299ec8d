"""The SPICE server of ``vring serve``, for spicevmc and spiceport ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from vring_serial.chardev import Chardev
from vring_serial.chardev.protocol import ProtocolChardev, SpiceportOptions
from vring_serial.cli.logs import emit
from vring_serial.config.build import ChardevMakers
from vring_serial.config.topology import PortConfig, SpiceConfig, Topology
from vring_serial.errors import ConfigError, DependencyError, ResourceError
from vring_serial.ratelimit import RateLimitedLog

if TYPE_CHECKING:
    from vring_serial.spice.core import ClientEvent
    from vring_serial.spice.device import AgentDevice
    from vring_serial.spice.server import SpiceServer

log = logging.getLogger("vring_serial.cli")

KINDS = ("spicevmc", "spiceport")


class SpiceEnds:
    """The server of one topology, if it needs one, and the host ends that belong to it.

    If only the domain XML declares a server and the library is not installed, there is none: the
    agent's end is then the built-in one, and spiceports discard their output.

    Args:
        topology: the controllers with their ports.
        agent_shared: whether ``--agent-socket`` shares the agent; the server is then a client.

    Raises:
        DependencyError: an option declares the server, and the library is not installed.
    """

    def __init__(self, topology: Topology, *, agent_shared: bool = False) -> None:
        self._config = topology.spice
        self._server: SpiceServer | None = None
        self._agent_shared = agent_shared
        used = any(
            port.chardev.kind in KINDS
            for controller in topology.controllers
            for port in controller.ports
        )
        if self._config is not None and (used or self._config.explicit):
            self._server = self._load(self._config, topology.name)

    def _load(self, config: SpiceConfig, name: str) -> SpiceServer | None:
        from vring_serial.spice.server import SpiceServer

        try:
            return SpiceServer(config.options, name=name, on_client=_ClientLog())
        except DependencyError as error:
            if config.explicit:
                raise
            text = f"{config.where}: {error}; the agent's host end is the built-in one"
            emit(logging.WARNING, "spice_missing", text)
            return None

    @property
    def makers(self) -> ChardevMakers:
        """Chardev makers for :func:`vring_serial.config.build.make_controller`."""
        server = self._server
        if server is None:
            return {"spiceport": _nothing}
        makers: dict[str, Callable[[PortConfig], Chardev]] = {
            "spiceport": lambda port: server.port_chardev(port.chardev.id, _name_of(port))
        }
        if not self._agent_shared:
            makers["spicevmc"] = lambda port: server.agent_chardev(port.chardev.id)
        return makers

    def agent_device(self) -> AgentDevice | None:
        """Return the server's end of the shared agent; None if no agent is shared."""
        if self._server is None or not self._agent_shared:
            return None
        return self._server.agent_device()

    async def start(self) -> None:
        """Start the server, if there is one. Raises as SpiceServer.start, naming the place."""
        if self._server is None:
            return
        assert self._config is not None
        try:
            await self._server.start()
        except ConfigError as error:
            where = f"{self._config.where}: {error.where}" if error.where else self._config.where
            raise ConfigError(error.why, where) from None
        except ResourceError as error:
            raise ResourceError(f"{self._config.where}: {error}") from None
        addresses = ", ".join(self._server.addresses)
        text = f"SPICE: clients connect to {addresses}"
        emit(logging.INFO, "spice", text, addresses=self._server.addresses)

    async def aclose(self) -> None:
        """Stop the server. May be called twice."""
        if self._server is not None:
            await self._server.aclose()


def _name_of(port: PortConfig) -> str:
    assert isinstance(port.chardev.options, SpiceportOptions)
    return port.chardev.options.name


def _nothing(port: PortConfig) -> Chardev:
    return ProtocolChardev(
        port.chardev.id, asyncio.Protocol, connected=False, description="no SPICE server"
    )


class _ClientLog:
    """A rate-limited log of clients that connect and leave."""

    def __init__(self) -> None:
        self._log = RateLimitedLog(log)

    def __call__(self, event: ClientEvent) -> None:
        how = " with TLS" if event.tls else ""
        what = "connected" if event.connected else "disconnected"
        text = f"SPICE: client {event.address} {what}{how if event.connected else ''}"
        fields = {"address": event.address, "tls": event.tls}
        extra = {"event": f"spice_client_{what}", "fields": fields}
        self._log.log(logging.INFO, "%s", text, extra=extra)
