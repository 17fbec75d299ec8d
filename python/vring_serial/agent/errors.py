"""What can go wrong between us and an agent."""

from __future__ import annotations

from vring_serial.errors import VringSerialError


class AgentError(VringSerialError):
    """Base of what a peer of the agent channel can fail with."""


class AgentGoneError(AgentError, ConnectionError):
    """The channel closed, or was never open, while something was to be done over it."""


class AgentTimeoutError(AgentError, TimeoutError):
    """The other end did not answer in time."""


class AgentUnsupportedError(AgentError):
    """The other end has not announced the capability that this needs."""


class AgentRefusedError(AgentError):
    """The other end answered, and the answer is no."""


class ClipboardEmptyError(AgentError):
    """There is nothing on that clipboard, or nothing of that type."""


class ClipboardTooLargeError(AgentError):
    """The clipboard's data exceed what the receiver takes."""


class FileTransferError(AgentError):
    """A file did not get across; the message says why."""


class FileRefusedError(FileTransferError):
    """The other end did not take a file, or stopped taking it; the message says why."""
