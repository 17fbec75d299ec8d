"""The host peer of the SPICE agent: capabilities, clipboard, monitors."""

from __future__ import annotations

from vring_serial.agent.clipboard import ANY_SIZE, StreamSource
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
from vring_serial.agent.host import HOST_CAPABILITIES, HostAgent

__all__ = [
    "HostAgent",
    "HOST_CAPABILITIES",
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
