"""The SPICE agent protocol (vd_agent.h) without input or output.

:class:`AgentConnection` is what most callers want: bytes in, typed events out; messages in, bytes
out.
"""

from __future__ import annotations

from ._base import Message
from .capabilities import Capabilities, Layout, capability_name
from .chunks import Buffer, ChunkDecoder, ChunkEncoder
from .clipboard import Clipboard, ClipboardGrab, ClipboardRelease, ClipboardRequest
from .connection import (
    AgentConnection,
    BodyEnded,
    BodyReceived,
    BodyStarted,
    Event,
    MessageReceived,
    Side,
)
from .constants import (
    AGENT_AWAY,
    AGENT_FULL,
    FILES_FROM_GUEST,
    Capability,
    ChunkPort,
    ClipboardType,
    DisplayFlag,
    FileXferResult,
    MessageType,
    MonitorsFlag,
    MouseButton,
    ReplyError,
    Selection,
    clipboard_type_name,
)
from .errors import AgentProtocolError, ChunkError, MessageError
from .file_xfer import FileXferData, FileXferStart, FileXferStatus
from .fileinfo import FileInfo
from .filelist import FileList
from .filter import AgentFilter
from .messages import (
    AnnounceCapabilities,
    AudioVolumeSync,
    ClientDisconnected,
    DisplayConfig,
    DisplayInfo,
    GraphicsDeviceInfo,
    MaxClipboard,
    Monitor,
    MonitorsConfig,
    MouseState,
    Reply,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
    message_name,
)

__all__ = [
    "AgentConnection",
    "Side",
    "Event",
    "MessageReceived",
    "BodyStarted",
    "BodyReceived",
    "BodyEnded",
    "AgentProtocolError",
    "ChunkError",
    "MessageError",
    "ChunkDecoder",
    "ChunkEncoder",
    "Buffer",
    "ChunkPort",
    "Capabilities",
    "Capability",
    "AGENT_AWAY",
    "AGENT_FULL",
    "FILES_FROM_GUEST",
    "Layout",
    "capability_name",
    "MessageType",
    "message_name",
    "Message",
    "TypedMessage",
    "StreamedMessage",
    "UnknownMessage",
    "MouseState",
    "MouseButton",
    "Monitor",
    "MonitorsConfig",
    "MonitorsFlag",
    "Reply",
    "ReplyError",
    "Clipboard",
    "ClipboardGrab",
    "ClipboardRequest",
    "ClipboardRelease",
    "ClipboardType",
    "clipboard_type_name",
    "Selection",
    "DisplayConfig",
    "DisplayFlag",
    "AnnounceCapabilities",
    "FileXferStart",
    "FileXferStatus",
    "FileXferResult",
    "FileXferData",
    "FileInfo",
    "FileList",
    "AgentFilter",
    "ClientDisconnected",
    "MaxClipboard",
    "AudioVolumeSync",
    "GraphicsDeviceInfo",
    "DisplayInfo",
]
