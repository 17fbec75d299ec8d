"""What ``vring serve`` puts behind a spicevmc port: a host's end of the agent that only listens.

It announces capabilities, answers what an agent asks, and logs what it learns. A session that wants
more of the agent uses :class:`vring_serial.agent.HostAgent` itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vring_serial.agent.events import (
    AgentEvent,
    AgentGone,
    AgentReady,
    AgentTrouble,
    ClipboardGrabbed,
    ClipboardReleased,
)
from vring_serial.agent.host import HostAgent
from vring_serial.cli.logs import emit
from vring_serial.config.build import ProtocolFactory
from vring_serial.config.topology import PortConfig
from vring_serial.device.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)


class AgentEnds:
    """The agent ends of one server; each lives as long as the server, across connections."""

    def __init__(self) -> None:
        self._agents: list[HostAgent] = []

    def factory(self, port: PortConfig) -> ProtocolFactory:
        """The end of one spicevmc port."""
        agent = HostAgent(on_event=_logger_of(port))
        self._agents.append(agent)
        return agent.protocol_factory

    async def close(self) -> None:
        """Close all."""
        for agent in self._agents:
            await agent.close()


def _logger_of(port: PortConfig) -> Callable[[AgentEvent], None]:
    name = f"agent of port {port.nr}"
    trouble = RateLimitedLog(log)

    def on_event(event: AgentEvent) -> None:
        match event:
            case AgentReady(capabilities):
                names = capabilities.names()
                text = f"{name}: ready, with {' '.join(names) or 'no capabilities'}"
                emit(logging.INFO, "agent_ready", text, nr=port.nr, capabilities=names)
            case AgentGone(reason):
                text = f"{name}: gone{f': {reason}' if reason else ''}"
                emit(logging.INFO, "agent_gone", text, nr=port.nr, reason=reason)
            case ClipboardGrabbed(selection, types):
                text = f"{name}: the guest owns clipboard {selection}, types {types}"
                emit(logging.DEBUG, "clipboard_grabbed", text, nr=port.nr, selection=selection)
            case ClipboardReleased(selection):
                text = f"{name}: the guest released clipboard {selection}"
                emit(logging.DEBUG, "clipboard_released", text, nr=port.nr, selection=selection)
            case AgentTrouble(error):
                trouble.warning("%s: %s", name, error)
            case _:
                pass

    return on_event
