"""The end of a spicevmc port in ``vring serve``: one agent, shared by all clients.

It announces capabilities, answers the agent's requests, and logs its events. Clients (``vring
agent``, any number at once) reach the agent over a unix socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from vring_serial.accept import Acceptor
from vring_serial.agent.events import (
    AgentEvent,
    AgentGone,
    AgentReady,
    AgentTrouble,
    ClipboardGrabbed,
    ClipboardReleased,
)
from vring_serial.agent.router.router import AgentRouter
from vring_serial.cli.logs import emit
from vring_serial.config.build import ProtocolFactory
from vring_serial.config.topology import PortConfig
from vring_serial.errors import ConfigError
from vring_serial.proto.agent import clipboard_type_name
from vring_serial.ratelimit import RateLimitedLog, cut
from vring_serial.unix_socket import UnixListener

if TYPE_CHECKING:
    from vring_serial.spice.device import AgentDevice

log = logging.getLogger(__name__)


class AgentEnds:
    """The agent ends of one server; each lives as long as the server, across connections.

    Args:
        path: unix socket for clients of the only spicevmc port, or None.

    Attributes:
        routers: one router for each spicevmc port.
    """

    def __init__(self, path: str | None = None) -> None:
        self.routers: list[AgentRouter] = []
        self._path = path
        self._listener: UnixListener | None = None
        self._acceptor: Acceptor | None = None
        self._connecting: set[asyncio.Future[None]] = set()

    def factory(self, port: PortConfig) -> ProtocolFactory:
        """Return the factory for the end of a spicevmc port."""
        router = AgentRouter(on_event=logger_of(port))
        self.routers.append(router)
        return router.protocol_factory

    def share_with_server(self, device: AgentDevice) -> None:
        """Make the SPICE server a client of the only spicevmc port. Raises as ``start``."""
        self._the_router().connect_server(device, device.closed)

    def start(self) -> None:
        """Accept clients. Raises ConfigError unless there is one agent, ResourceError on errors."""
        if self._path is None:
            return
        router = self._the_router()
        self._listener = UnixListener(self._path)
        self._acceptor = Acceptor(
            lambda client: self._accepted(client, router),
            name=f"--agent-socket {self._path}",
            peer="client",
            yields=True,
        )
        self._acceptor.open([self._listener.socket])

    def _the_router(self) -> AgentRouter:
        if len(self.routers) != 1:
            raise ConfigError(
                f"it is for one spicevmc port, and there are {len(self.routers)}",
                f"--agent-socket {self._path}",
            )
        return self.routers[0]

    def _accepted(self, client: socket.socket, router: AgentRouter) -> None:
        connecting = asyncio.ensure_future(self._connect(client, router))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    async def _connect(self, client: socket.socket, router: AgentRouter) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(router.client_factory, client)
        except OSError as error:
            log.warning("--agent-socket %s: %s", self._path, error.strerror)

    async def aclose(self) -> None:
        """Close all, and remove the socket."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        for connecting in self._connecting:
            connecting.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for router in self.routers:
            await router.aclose()


def logger_of(port: PortConfig) -> Callable[[AgentEvent], None]:
    """Return a listener that logs the events of a port's agent."""
    name = f"agent of port {port.nr}"
    trouble = RateLimitedLog(log)
    # A guest can open and close its port in a loop, and announce capabilities each time.
    life = RateLimitedLog(log, burst=20, seconds=10)

    def tell(event: str, text: str, **fields: object) -> None:
        extra = {"event": event, "fields": {"nr": port.nr, **fields}}
        life.log(logging.INFO, "%s: %s", name, text, extra=extra)

    def on_event(event: AgentEvent) -> None:
        match event:
            case AgentReady(capabilities):
                names = cut(capabilities.names())  # a guest may have 2048 of its own
                text = f"ready, with {' '.join(names) or 'no capabilities'}"
                tell("agent_ready", text, capabilities=names)
            case AgentGone(reason):
                tell("agent_gone", f"gone{f': {reason}' if reason else ''}", reason=reason)
            case ClipboardGrabbed(selection, types):
                shown = " ".join(cut([clipboard_type_name(kind) for kind in types]))
                text = f"{name}: the guest owns clipboard {selection}, types {shown}"
                emit(logging.DEBUG, "clipboard_grabbed", text, nr=port.nr, selection=selection)
            case ClipboardReleased(selection):
                text = f"{name}: the guest released clipboard {selection}"
                emit(logging.DEBUG, "clipboard_released", text, nr=port.nr, selection=selection)
            case AgentTrouble(error):
                trouble.warning("%s: %s", name, error)
            case _:
                pass

    return on_event
