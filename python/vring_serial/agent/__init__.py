"""The host's side of the SPICE agent channel.

:class:`HostAgent` is one client of an agent: monitors, clipboards, files. :class:`AgentRouter` lets
several of them share one agent.
"""

from __future__ import annotations

from vring_serial.agent.channel.clipboard import ANY_SIZE, StreamSource
from vring_serial.agent.errors import (
    AgentError,
    AgentGoneError,
    AgentRefusedError,
    AgentTimeoutError,
    AgentUnsupportedError,
    ClipboardEmptyError,
    ClipboardTooLargeError,
    FileRefusedError,
    FileTransferError,
)
from vring_serial.agent.events import (
    AgentEvent,
    AgentGone,
    AgentReady,
    AgentTrouble,
    ClipboardGrabbed,
    ClipboardReleased,
    OtherMessage,
)
from vring_serial.agent.host import HostAgent
from vring_serial.agent.host_capabilities import HOST_CAPABILITIES
from vring_serial.agent.router.router import AgentRouter

__all__ = [
    "HostAgent",
    "HOST_CAPABILITIES",
    "AgentRouter",
    "StreamSource",
    "ANY_SIZE",
    "AgentEvent",
    "AgentReady",
    "AgentGone",
    "AgentTrouble",
    "ClipboardGrabbed",
    "ClipboardReleased",
    "OtherMessage",
    "AgentError",
    "AgentGoneError",
    "AgentRefusedError",
    "AgentTimeoutError",
    "AgentUnsupportedError",
    "ClipboardEmptyError",
    "ClipboardTooLargeError",
    "FileTransferError",
    "FileRefusedError",
]
