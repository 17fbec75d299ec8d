"""What a host may forbid on an agent channel, by the rules of the SPICE server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .capabilities import Capabilities
from .constants import Capability, MessageType

COPY_PASTE_TYPES: Final = frozenset(
    {
        MessageType.CLIPBOARD,
        MessageType.CLIPBOARD_GRAB,
        MessageType.CLIPBOARD_REQUEST,
        MessageType.CLIPBOARD_RELEASE,
    }
)
FILE_XFER_TYPES: Final = frozenset(
    {
        MessageType.FILE_XFER_START,
        MessageType.FILE_XFER_STATUS,
        MessageType.FILE_XFER_DATA,
    }
)
COPY_PASTE_CAPABILITIES: Final = (
    Capability.CLIPBOARD,
    Capability.CLIPBOARD_BY_DEMAND,
    Capability.CLIPBOARD_SELECTION,
)


@dataclass(frozen=True, slots=True)
class AgentFilter:
    """Which parts of the agent channel are allowed, in both directions.

    Attributes:
        copy_paste: the clipboard (QEMU's ``disable-copy-paste=off``).
        file_xfer: file transfers (QEMU's ``disable-agent-file-xfer=off``).
    """

    copy_paste: bool = True
    file_xfer: bool = True

    def passes(self, message_type: int) -> bool:
        """Return whether messages of this type are let through."""
        if message_type in COPY_PASTE_TYPES:
            return self.copy_paste
        if message_type in FILE_XFER_TYPES:
            return self.file_xfer
        return True

    def rewrite(self, capabilities: Capabilities) -> Capabilities:
        """Announced capabilities as the other end is to see them."""
        if not self.copy_paste:
            capabilities = capabilities.without(*COPY_PASTE_CAPABILITIES)
        if not self.file_xfer:
            capabilities = capabilities.with_(Capability.FILE_XFER_DISABLED)
        return capabilities
