"""Every agent message of vd_agent.h as a frozen dataclass that packs and unpacks its body.

``pack(layout)`` gives the body, without the message header. ``unpack(body, layout)`` is the reverse
and raises MessageError for whatever the structure does not allow. ``head(layout)`` is the part of
the body before ``payload``, which lets big payloads travel without being copied into a body first.
All integers are little-endian; offsets in errors count from the beginning of the body.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TypeAlias

from . import constants as c
from ._base import PLAIN, U32, U32_PAIR, Message, at_least, check_size, exactly, words
from .capabilities import Capabilities, Layout
from .chunks import Buffer
from .clipboard import Clipboard, ClipboardGrab, ClipboardRelease, ClipboardRequest
from .constants import MessageType
from .errors import MessageError
from .file_xfer import FileXferData, FileXferStart, FileXferStatus

_I32 = struct.Struct("<i")
_MOUSE = struct.Struct("<IIIB")
_MONITOR = struct.Struct("<IIIii")
_MONITOR_MM = struct.Struct("<HH")
_AUDIO = struct.Struct("<BBB")
_DISPLAY_INFO = struct.Struct("<IIII")


@dataclass(frozen=True, slots=True)
class MouseState(Message):
    """Pointer position and buttons held (VDAgentMouseState); the server tells the agent.

    Attributes:
        x, y: pixels of the display.
        buttons: those that are held.
        display_id: which display.
    """

    TYPE = MessageType.MOUSE_STATE
    BODY_MAX = _MOUSE.size
    x: int
    y: int
    buttons: c.MouseButton
    display_id: int = 0

    def head(self, layout: Layout) -> bytes:
        return _MOUSE.pack(self.x, self.y, self.buttons, self.display_id)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> MouseState:
        """Parse a body. Raises MessageError."""
        x, y, buttons, display_id = exactly(_MOUSE, body, "VDAgentMouseState")
        return cls(x, y, c.MouseButton(buttons), display_id)


@dataclass(frozen=True, slots=True)
class Monitor:
    """One monitor of MONITORS_CONFIG (VDAgentMonConfig and VDAgentMonitorMM).

    Attributes:
        width, height: pixels; 0 and 0 switch the monitor off (SPARSE_MONITORS_CONFIG).
        x, y: position of its top left corner in pixels, where the message says USE_POS.
        depth: bits of colour.
        width_mm, height_mm: physical size, 0 if unknown.
    """

    width: int
    height: int
    x: int = 0
    y: int = 0
    depth: int = 32
    width_mm: int = 0
    height_mm: int = 0


@dataclass(frozen=True, slots=True)
class MonitorsConfig(Message):
    """What monitors the guest should have (VDAgentMonitorsConfig); the client asks the agent.

    Attributes:
        monitors: MONITORS_MAX at most.
        flags: what the message says of each monitor beside its size.
    """

    TYPE = MessageType.MONITORS_CONFIG
    BODY_MAX = 8 + c.MONITORS_MAX * (_MONITOR.size + _MONITOR_MM.size)
    monitors: tuple[Monitor, ...]
    flags: c.MonitorsFlag = c.MonitorsFlag.USE_POS

    def head(self, layout: Layout) -> bytes:
        parts = [U32_PAIR.pack(len(self.monitors), self.flags)]
        parts += [_MONITOR.pack(m.height, m.width, m.depth, m.x, m.y) for m in self.monitors]
        if c.MonitorsFlag.PHYSICAL_SIZE & self.flags:
            parts += [_MONITOR_MM.pack(m.height_mm, m.width_mm) for m in self.monitors]
        return b"".join(parts)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> MonitorsConfig:
        """Parse a body.

        Raises:
            MessageError: more than MONITORS_MAX, or another number of bytes than they need.
        """
        count, flags = at_least(U32_PAIR, body, "VDAgentMonitorsConfig")
        if count > c.MONITORS_MAX:
            raise MessageError(
                "VDAgentMonitorsConfig.num_of_monitors", 0, f"{count}, at most {c.MONITORS_MAX}"
            )
        physical = bool(flags & c.MonitorsFlag.PHYSICAL_SIZE)
        sizes_at = 8 + count * _MONITOR.size
        end = sizes_at + count * _MONITOR_MM.size if physical else sizes_at
        check_size(end, body, "VDAgentMonitorsConfig")
        monitors = []
        for index in range(count):
            height, width, depth, x, y = _MONITOR.unpack_from(body, 8 + index * _MONITOR.size)
            height_mm = width_mm = 0
            if physical:
                height_mm, width_mm = _MONITOR_MM.unpack_from(body, sizes_at + index * 4)
            monitors.append(Monitor(width, height, x, y, depth, width_mm, height_mm))
        return cls(tuple(monitors), c.MonitorsFlag(flags))


@dataclass(frozen=True, slots=True)
class Reply(Message):
    """The agent's answer to a message of the client's (VDAgentReply).

    Attributes:
        to: type of the message that is answered.
        error: of :class:`ReplyError`.
    """

    TYPE = MessageType.REPLY
    BODY_MAX = 8
    to: int
    error: int = c.ReplyError.SUCCESS

    def head(self, layout: Layout) -> bytes:
        return U32_PAIR.pack(self.to, self.error)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> Reply:
        """Parse a body. Raises MessageError."""
        return cls(*exactly(U32_PAIR, body, "VDAgentReply"))


@dataclass(frozen=True, slots=True)
class DisplayConfig(Message):
    """What the guest's desktop should leave out to save bandwidth (VDAgentDisplayConfig).

    The client asks the agent.

    Attributes:
        flags: what to leave out, and whether ``depth`` counts.
        depth: bits of colour.
    """

    TYPE = MessageType.DISPLAY_CONFIG
    BODY_MAX = 8
    flags: c.DisplayFlag
    depth: int = 0

    def head(self, layout: Layout) -> bytes:
        return U32_PAIR.pack(self.flags, self.depth)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> DisplayConfig:
        """Parse a body. Raises MessageError."""
        flags, depth = exactly(U32_PAIR, body, "VDAgentDisplayConfig")
        return cls(c.DisplayFlag(flags), depth)


@dataclass(frozen=True, slots=True)
class AnnounceCapabilities(Message):
    """What the sender can do (VDAgentAnnounceCapabilities); both sides send it.

    Attributes:
        request: asks for the other side's in return.
        capabilities: CAPABILITY_WORDS_MAX words at most.
    """

    TYPE = MessageType.ANNOUNCE_CAPABILITIES
    BODY_MAX = 4 + 4 * c.CAPABILITY_WORDS_MAX
    request: bool
    capabilities: Capabilities

    def head(self, layout: Layout) -> bytes:
        words = self.capabilities.words
        return struct.pack(f"<{1 + len(words)}I", self.request, *words)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> AnnounceCapabilities:
        """Parse a body.

        Raises:
            MessageError: no word of capabilities, more than CAPABILITY_WORDS_MAX, or half a word.
        """
        name = "VDAgentAnnounceCapabilities"
        (request,) = at_least(U32, body, name)
        caps = words(body, 4, c.CAPABILITY_WORDS_MAX, f"{name}.caps")
        if not caps:
            raise MessageError(f"{name}.caps", 4, "no word of capabilities, at least 1 needed")
        return cls(bool(request), Capabilities(caps))


@dataclass(frozen=True, slots=True)
class ClientDisconnected(Message):
    """The server tells the agent that its client is gone. It has no body."""

    TYPE = MessageType.CLIENT_DISCONNECTED
    BODY_MAX = 0

    def head(self, layout: Layout) -> bytes:
        return b""

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> ClientDisconnected:
        """Check that the body is empty. Raises MessageError if it is not."""
        check_size(0, body, "VD_AGENT_CLIENT_DISCONNECTED")
        return cls()


@dataclass(frozen=True, slots=True)
class MaxClipboard(Message):
    """The most clipboard data that the sender takes (VDAgentMaxClipboard).

    Attributes:
        max: bytes; -1 for any number.
    """

    TYPE = MessageType.MAX_CLIPBOARD
    BODY_MAX = 4
    max: int

    def head(self, layout: Layout) -> bytes:
        return _I32.pack(self.max)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> MaxClipboard:
        """Parse a body. Raises MessageError."""
        return cls(*exactly(_I32, body, "VDAgentMaxClipboard"))


@dataclass(frozen=True, slots=True)
class AudioVolumeSync(Message):
    """Volume of the client's playback or record stream (VDAgentAudioVolumeSync).

    The client tells the agent.

    Attributes:
        is_playback: the playback stream, or else the record stream.
        mute: whether the stream is muted.
        volume: one value of 0 to 65535 per channel.
    """

    TYPE = MessageType.AUDIO_VOLUME_SYNC
    BODY_MAX = 3 + 2 * c.AUDIO_CHANNELS_MAX
    is_playback: bool
    mute: bool
    volume: tuple[int, ...]

    def head(self, layout: Layout) -> bytes:
        count = len(self.volume)
        return _AUDIO.pack(self.is_playback, self.mute, count) + struct.pack(
            f"<{count}H", *self.volume
        )

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> AudioVolumeSync:
        """Parse a body.

        Raises:
            MessageError: another number of bytes than the number of channels needs.
        """
        playback, mute, count = at_least(_AUDIO, body, "VDAgentAudioVolumeSync")
        check_size(3 + 2 * count, body, "VDAgentAudioVolumeSync")
        return cls(bool(playback), bool(mute), struct.unpack_from(f"<{count}H", body, 3))


@dataclass(frozen=True, slots=True)
class DisplayInfo:
    """Which device and output of the guest a SPICE monitor is (VDAgentDeviceDisplayInfo).

    Attributes:
        channel_id, monitor_id: SPICE's display channel, and the monitor on it.
        device_display_id: the output of the guest's device.
        device_address: such as ``b"pci/0000/02.0"``, without the NUL that ends it on the wire.
    """

    channel_id: int
    monitor_id: int
    device_display_id: int
    device_address: bytes


@dataclass(frozen=True, slots=True)
class GraphicsDeviceInfo(Message):
    """The server tells the agent which monitor is which (VDAgentGraphicsDeviceInfo).

    Attributes:
        displays: in the order of the wire.
    """

    TYPE = MessageType.GRAPHICS_DEVICE_INFO
    BODY_MAX = c.DISPLAY_INFO_MAX
    displays: tuple[DisplayInfo, ...] = field(default=())

    def head(self, layout: Layout) -> bytes:
        parts = [U32.pack(len(self.displays))]
        for d in self.displays:
            address = d.device_address + b"\0"
            parts.append(
                _DISPLAY_INFO.pack(d.channel_id, d.monitor_id, d.device_display_id, len(address))
            )
            parts.append(address)
        return b"".join(parts)

    @classmethod
    def unpack(cls, body: Buffer, layout: Layout = PLAIN) -> GraphicsDeviceInfo:
        """Parse a body.

        Raises:
            MessageError: displays or addresses that do not fit in the body, or bytes that are left.
        """
        name = "VDAgentGraphicsDeviceInfo"
        (count,) = at_least(U32, body, name)
        offset = U32.size
        if count > (len(body) - offset) // _DISPLAY_INFO.size:
            raise MessageError(
                f"{name}.count", 0, f"{count} displays do not fit in {len(body)} bytes"
            )
        displays = []
        for _ in range(count):
            channel, monitor, display, length = at_least(_DISPLAY_INFO, body, name, offset)
            offset += _DISPLAY_INFO.size
            if length > len(body) - offset:
                raise MessageError(
                    f"{name}.device_address_len",
                    offset - 4,
                    f"{length} bytes, but {len(body) - offset} follow",
                )
            address = bytes(body[offset : offset + length]).removesuffix(b"\0")
            offset += length
            displays.append(DisplayInfo(channel, monitor, display, address))
        check_size(offset, body, name)
        return cls(tuple(displays))


@dataclass(frozen=True, slots=True)
class UnknownMessage(Message):
    """A message of a type that vd_agent.h does not name, as it came.

    Attributes:
        type: number of the type.
        data: the whole body, not copied.
        opaque: the header's ``opaque``, which is passed on.
    """

    BODY_MAX = 0xFFFFFFFF
    type: int
    data: Buffer = b""
    opaque: int = 0

    @property
    def type_number(self) -> int:
        return self.type

    @property
    def payload(self) -> Buffer:
        return self.data

    def head(self, layout: Layout) -> bytes:
        return b""

    def stream_head(self, layout: Layout, size: int) -> bytes:
        """Return the same as ``head``, for ``size`` bytes that follow in pieces."""
        return b""

    @classmethod
    def head_size(cls, layout: Layout) -> int:
        """Return how many bytes of the body come before the payload."""
        return 0


TypedMessage: TypeAlias = (
    MouseState
    | MonitorsConfig
    | Reply
    | Clipboard
    | DisplayConfig
    | AnnounceCapabilities
    | ClipboardGrab
    | ClipboardRequest
    | ClipboardRelease
    | FileXferStart
    | FileXferStatus
    | FileXferData
    | ClientDisconnected
    | MaxClipboard
    | AudioVolumeSync
    | GraphicsDeviceInfo
)

StreamedMessage: TypeAlias = Clipboard | FileXferData | UnknownMessage

MESSAGE_CLASSES: dict[int, type[TypedMessage]] = {
    cls.TYPE: cls
    for cls in (
        MouseState,
        MonitorsConfig,
        Reply,
        Clipboard,
        DisplayConfig,
        AnnounceCapabilities,
        ClipboardGrab,
        ClipboardRequest,
        ClipboardRelease,
        FileXferStart,
        FileXferStatus,
        FileXferData,
        ClientDisconnected,
        MaxClipboard,
        AudioVolumeSync,
        GraphicsDeviceInfo,
    )
}


def message_name(number: int) -> str:
    """Return the name of a message type without its prefix, or ``TYPE_n``."""
    try:
        return MessageType(number).name
    except ValueError:
        return f"TYPE_{number}"
