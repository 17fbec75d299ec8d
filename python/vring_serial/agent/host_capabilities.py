"""What the host's end of an agent channel announces."""

from __future__ import annotations

from vring_serial.proto.agent import Capabilities, Capability

HOST_CAPABILITIES = Capabilities.of(
    Capability.MOUSE_STATE,
    Capability.MONITORS_CONFIG,
    Capability.REPLY,
    Capability.DISPLAY_CONFIG,
    Capability.CLIPBOARD_BY_DEMAND,
    Capability.CLIPBOARD_SELECTION,
    Capability.MONITORS_CONFIG_POSITION,
    Capability.FILE_XFER_DETAILED_ERRORS,
    Capability.CLIPBOARD_NO_RELEASE_ON_REGRAB,
    Capability.CLIPBOARD_GRAB_SERIAL,
)
