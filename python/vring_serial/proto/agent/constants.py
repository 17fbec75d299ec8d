"""Numbers of the SPICE agent protocol (spice-protocol's vd_agent.h), and the limits that we add.

The protocol gives almost every length 32 bits and states hardly any bound; the limits below say how
much of an announced length is believed. They are generous against every peer that exists.
"""

from __future__ import annotations

import enum
from typing import Final

PROTOCOL: Final = 1
"""The only protocol number of an agent message."""

CHUNK_DATA_MAX: Final = 2048
"""Bytes of data that a chunk to the guest may carry; agents drop the channel over a longer one."""

CHUNK_HEADER_BYTES: Final = 8
MESSAGE_HEADER_BYTES: Final = 20

CHUNK_FROM_AGENT_MAX: Final = 1 << 31
"""Bytes of data in one chunk from the guest. A Linux agent puts a whole message into one chunk, a
clipboard of any size included; nothing is allocated for it, so this only refuses what cannot be."""

STREAM_ABOVE: Final = 128 << 10
"""Longer bodies of clipboard, file data and unknown types are handed on in pieces (bytes)."""

PIECE_MAX: Final = 256 << 10
"""Longest piece of a streamed body (bytes)."""

UNREAD_MAX: Final = 64 << 20
"""Input that may wait in a connection whose events nobody takes (bytes)."""

MONITORS_MAX: Final = 256
CAPABILITY_WORDS_MAX: Final = 64
CLIPBOARD_TYPES_MAX: Final = 256
FILE_INFO_MAX: Final = 64 << 10
"""Bytes of the text in FILE_XFER_START."""
FILE_DATA_MAX: Final = 64 << 10
"""Bytes of file data that we put into one FILE_XFER_DATA, as spice-gtk does."""
STATUS_DETAIL_MAX: Final = 1024
DISPLAY_INFO_MAX: Final = 64 << 10
"""Bytes of a whole GRAPHICS_DEVICE_INFO."""
AUDIO_CHANNELS_MAX: Final = 255


class ChunkPort(enum.IntEnum):
    """Who a chunk is from or for, on the other end of the VDI port (VDP_*_PORT)."""

    CLIENT = 1
    SERVER = 2


class MessageType(enum.IntEnum):
    """VD_AGENT_*: types of agent messages."""

    MOUSE_STATE = 1
    MONITORS_CONFIG = 2
    REPLY = 3
    CLIPBOARD = 4
    DISPLAY_CONFIG = 5
    ANNOUNCE_CAPABILITIES = 6
    CLIPBOARD_GRAB = 7
    CLIPBOARD_REQUEST = 8
    CLIPBOARD_RELEASE = 9
    FILE_XFER_START = 10
    FILE_XFER_STATUS = 11
    FILE_XFER_DATA = 12
    CLIENT_DISCONNECTED = 13
    MAX_CLIPBOARD = 14
    AUDIO_VOLUME_SYNC = 15
    GRAPHICS_DEVICE_INFO = 16


class Capability(enum.IntEnum):
    """VD_AGENT_CAP_*: bit numbers in the words of ANNOUNCE_CAPABILITIES."""

    MOUSE_STATE = 0
    MONITORS_CONFIG = 1
    REPLY = 2
    CLIPBOARD = 3
    DISPLAY_CONFIG = 4
    CLIPBOARD_BY_DEMAND = 5
    CLIPBOARD_SELECTION = 6
    SPARSE_MONITORS_CONFIG = 7
    GUEST_LINEEND_LF = 8
    GUEST_LINEEND_CRLF = 9
    MAX_CLIPBOARD = 10
    AUDIO_VOLUME_SYNC = 11
    MONITORS_CONFIG_POSITION = 12
    FILE_XFER_DISABLED = 13
    FILE_XFER_DETAILED_ERRORS = 14
    GRAPHICS_DEVICE_INFO = 15
    CLIPBOARD_NO_RELEASE_ON_REGRAB = 16
    CLIPBOARD_GRAB_SERIAL = 17


FILES_FROM_GUEST: Final = 63
"""A capability of ours, with a number far from those of vd_agent.h. Where both ends have it, the
agent follows its answer to a request for FILE_LIST with a transfer of each file to the host."""

AGENT_AWAY: Final = 62
"""Another of ours, from who shares an agent: there is none at the moment, but the channel stays."""

AGENT_FULL: Final = 61
"""With AGENT_AWAY: who shares an agent takes no more clients, and closes the channel."""


class Selection(enum.IntEnum):
    """VD_AGENT_CLIPBOARD_SELECTION_*: which of X11's clipboards."""

    CLIPBOARD = 0
    PRIMARY = 1
    SECONDARY = 2


class ClipboardType(enum.IntEnum):
    """VD_AGENT_CLIPBOARD_*: what clipboard data are."""

    NONE = 0
    UTF8_TEXT = 1
    IMAGE_PNG = 2
    IMAGE_BMP = 3
    IMAGE_TIFF = 4
    IMAGE_JPG = 5
    FILE_LIST = 6


def clipboard_type_name(number: int) -> str:
    """Return the name of a clipboard type without its prefix, or ``TYPE_n``."""
    try:
        return ClipboardType(number).name
    except ValueError:
        return f"TYPE_{number}"


class ReplyError(enum.IntEnum):
    """``error`` of REPLY."""

    SUCCESS = 1
    ERROR = 2


class FileXferResult(enum.IntEnum):
    """VD_AGENT_FILE_XFER_STATUS_*."""

    CAN_SEND_DATA = 0
    CANCELLED = 1
    ERROR = 2
    SUCCESS = 3
    NOT_ENOUGH_SPACE = 4
    SESSION_LOCKED = 5
    VDAGENT_NOT_CONNECTED = 6
    DISABLED = 7


class MonitorsFlag(enum.IntFlag):
    """VD_AGENT_CONFIG_MONITORS_FLAG_*."""

    USE_POS = 1 << 0
    PHYSICAL_SIZE = 1 << 1


class DisplayFlag(enum.IntFlag):
    """VD_AGENT_DISPLAY_CONFIG_FLAG_*."""

    DISABLE_WALLPAPER = 1 << 0
    DISABLE_FONT_SMOOTH = 1 << 1
    DISABLE_ANIMATION = 1 << 2
    SET_COLOR_DEPTH = 1 << 3


class MouseButton(enum.IntFlag):
    """VD_AGENT_*BUTTON_MASK."""

    LEFT = 1 << 1
    MIDDLE = 1 << 2
    RIGHT = 1 << 3
    UP = 1 << 4
    DOWN = 1 << 5
    SIDE = 1 << 6
    EXTRA = 1 << 7
