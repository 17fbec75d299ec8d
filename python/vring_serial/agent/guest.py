"""The embedded guest's own SPICE agent: the guest's side of the agent channel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vring_serial.agent.channel.clipboard import ANY_SIZE, ClipboardChannel, Offer, StreamSource
from vring_serial.agent.channel.files import FROM_GUEST, FileSender
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.receiver import FileReceiver
from vring_serial.agent.channel.streams import run_on_streams
from vring_serial.agent.errors import (
    AgentError,
    AgentGoneError,
    AgentTimeoutError,
    FileRefusedError,
    FileTransferError,
)
from vring_serial.agent.events import AgentTrouble, ClipboardGrabbed, ClipboardReleased
from vring_serial.callbacks import tell
from vring_serial.lifetime import Ending
from vring_serial.proto.agent import (
    FILES_FROM_GUEST,
    AgentProtocolError,
    AnnounceCapabilities,
    AudioVolumeSync,
    Buffer,
    Capabilities,
    Capability,
    ChunkPort,
    ClientDisconnected,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    ClipboardType,
    DisplayConfig,
    FileList,
    FileXferData,
    FileXferStart,
    FileXferStatus,
    GraphicsDeviceInfo,
    MaxClipboard,
    MessageType,
    Monitor,
    MonitorsConfig,
    MouseState,
    Reply,
    ReplyError,
    Selection,
    Side,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
)
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: The port that the agent channel has by convention.
AGENT_PORT = "com.redhat.spice.0"

GUEST_CAPABILITIES = Capabilities.of(
    Capability.MOUSE_STATE,
    Capability.MONITORS_CONFIG,
    Capability.REPLY,
    Capability.DISPLAY_CONFIG,
    Capability.CLIPBOARD_BY_DEMAND,
    Capability.CLIPBOARD_SELECTION,
    Capability.SPARSE_MONITORS_CONFIG,
    Capability.GUEST_LINEEND_LF,
    Capability.MAX_CLIPBOARD,
    Capability.AUDIO_VOLUME_SYNC,
    Capability.MONITORS_CONFIG_POSITION,
    Capability.GRAPHICS_DEVICE_INFO,
    Capability.CLIPBOARD_NO_RELEASE_ON_REGRAB,
    Capability.CLIPBOARD_GRAB_SERIAL,
    FILES_FROM_GUEST,
)


@dataclass(frozen=True, slots=True)
class MonitorsSet:
    """The host asked for these monitors, and they are what the guest has now."""

    monitors: tuple[Monitor, ...]


@dataclass(frozen=True, slots=True)
class HostAnnounced:
    """The host told what it can do: a client has come, or has come again."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class HostLeft:
    """The host's client disconnected, or the channel closed."""


GuestAgentEvent: TypeAlias = (
    MonitorsSet | HostAnnounced | HostLeft | ClipboardGrabbed | ClipboardReleased | AgentTrouble
)


class GuestAgent(Ending):
    """A guest agent without a desktop: it keeps what a desktop would show.

    Args:
        capabilities: what it announces.
        downloads: directory for files from the host; None refuses them.
        max_clipboard: bytes of clipboard data to take from the host, or -1 for any size.
        timeout: seconds to wait for clipboard data.
        on_event: called with every event, in the event loop's thread.

    Attributes:
        monitors: the last configuration that was accepted.
        mouse, display, volume, graphics: the last message of its kind, or None. ``volume`` has one
            for playback (True) and one for recording (False).
        host: what the host announced last, or None.
    """

    def __init__(
        self,
        *,
        capabilities: Capabilities = GUEST_CAPABILITIES,
        downloads: Path | None = None,
        max_clipboard: int = ANY_SIZE,
        timeout: float = 10.0,
        on_event: Callable[[GuestAgentEvent], None] | None = None,
    ) -> None:
        if downloads is None:
            capabilities = capabilities.with_(Capability.FILE_XFER_DISABLED)
        self.monitors: tuple[Monitor, ...] = ()
        self.mouse: MouseState | None = None
        self.display: DisplayConfig | None = None
        self.graphics: GraphicsDeviceInfo | None = None
        self.volume: dict[bool, AudioVolumeSync] = {}
        self.host: Capabilities | None = None
        self._announced = capabilities
        self._timeout = timeout
        self._on_event = on_event
        self._said = RateLimitedLog(log)
        self._link: AgentLink | None = None
        self._files = FileReceiver(downloads, self._send_status)
        self._sender = FileSender(FROM_GUEST)
        self._sending: set[asyncio.Task[None]] = set()
        self._clipboard = ClipboardChannel(
            Side.GUEST,
            on_grab=lambda selection, types: self._emit(ClipboardGrabbed(selection, types)),
            on_release=lambda selection: self._emit(ClipboardReleased(selection)),
            on_trouble=lambda error: self._emit(AgentTrouble(error)),
            most=max_clipboard,
        )

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the channel until the host end goes away or breaks the protocol (logged)."""
        try:
            await run_on_streams(AgentLink(Side.GUEST, self), reader, writer)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End what still runs for a channel that is closed."""
        sending = list(self._sending)
        for task in sending:
            task.cancel()
        await self._clipboard.aclose()
        await asyncio.gather(*sending, return_exceptions=True)

    def protocol_factory(self) -> asyncio.Protocol:
        """A protocol for one connection of the channel."""
        return AgentLink(Side.GUEST, self)

    def set_clipboard(
        self, content: str | bytes | Offer, selection: int = Selection.CLIPBOARD
    ) -> None:
        """Own a clipboard, as an application does in which somebody copies."""
        if isinstance(content, str):
            content = content.encode("utf-8", "replace")
        if isinstance(content, bytes):
            content = {ClipboardType.UTF8_TEXT: content}
        self._clipboard.offer(selection, content)

    def copy_files(
        self, paths: Sequence[Path], selection: int = Selection.CLIPBOARD, *, cut: bool = False
    ) -> None:
        """Own a clipboard with files, as a file manager does in which somebody copies.

        A host that can take them (FILES_FROM_GUEST) is sent them when it asks for the list.
        """
        names = [str(path.absolute()) for path in paths]
        packed = FileList(tuple(names), cut).pack()
        self.set_clipboard(
            {
                ClipboardType.FILE_LIST: StreamSource(
                    len(packed), lambda: self._list_and_send(packed, list(paths))
                ),
                ClipboardType.UTF8_TEXT: "\n".join(names).encode("utf-8", "replace"),
            },
            selection,
        )

    async def _list_and_send(self, packed: bytes, paths: list[Path]) -> AsyncIterator[Buffer]:
        yield packed
        if self.host is not None and FILES_FROM_GUEST in self.host:
            task = asyncio.ensure_future(self._send_files(paths))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send_files(self, paths: list[Path]) -> None:
        for path in paths:
            try:
                await self._sender.send(path, name=None, on_progress=None, timeout=self._timeout)
            except FileRefusedError as error:
                log.warning("agent: %s", error)
            except FileTransferError as error:
                log.warning("agent: %s", error)
                self._sender.refuse(path)
            except (AgentTimeoutError, AgentGoneError) as error:
                log.warning("agent: %s", error)
                return

    def clear_clipboard(self, selection: int = Selection.CLIPBOARD) -> None:
        """Give up a clipboard."""
        self._clipboard.release(selection)

    async def get_clipboard(
        self, selection: int = Selection.CLIPBOARD, kind: int = ClipboardType.UTF8_TEXT
    ) -> bytes:
        """What somebody in the guest pastes: the host's clipboard, or what was copied here.

        Raises as HostAgent.get_clipboard_data.
        """
        copied = self._clipboard.owned(selection).get(kind)
        if isinstance(copied, bytes):
            return copied
        return await self._clipboard.fetch(selection, kind, self._timeout)

    # --- LinkOwner

    def link_up(self, link: AgentLink) -> None:
        self._link = link
        self._clipboard.begin_session(link)
        self._sender.begin_session(link)
        link.post(AnnounceCapabilities(True, self._announced))

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        if link is self._link:
            if reason is not None:
                log.warning("agent channel: %s", reason)
            self._link = None
            self._client_left()

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        match message:
            case AnnounceCapabilities():
                self._took_capabilities(link, message)
            case MonitorsConfig():
                self._took_monitors(link, ChunkPort(port), message)
            case ClipboardGrab() | ClipboardRelease() | ClipboardRequest() | Clipboard():
                self._clipboard.took(message)
            case MaxClipboard():
                self._clipboard.remote_most = max(message.max, ANY_SIZE)
            case FileXferStart():
                self._files.start(message)
            case FileXferData():
                self._files.data(message.id, message.data)
            case FileXferStatus():
                self._took_status(message)
            case ClientDisconnected():
                self._client_left()
            case _:
                self._keep(message)

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        if isinstance(head, Clipboard):
            return self._clipboard.took_head(head, size)
        if isinstance(head, FileXferData):
            return self._files.body(head.id)
        return None

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        log.warning("agent channel: %s", error)
        self._emit(AgentTrouble(error))

    # --- how it is done

    def _emit(self, event: GuestAgentEvent) -> None:
        tell(self._said, "on_event", self._on_event, event)

    def _took_capabilities(self, link: AgentLink, message: AnnounceCapabilities) -> None:
        if message.request:
            # A client that asks is a new one: serials begin anew, and it owns nothing.
            self._files.cancel_all()
            self._clipboard.begin_session(link)
            self._sender.begin_session(link)
            link.post(AnnounceCapabilities(False, self._announced))
        self.host = message.capabilities
        self._files.detailed = Capability.FILE_XFER_DETAILED_ERRORS in message.capabilities
        self._clipboard.announce()
        self._emit(HostAnnounced(message.capabilities))

    def _took_monitors(self, link: AgentLink, port: ChunkPort, message: MonitorsConfig) -> None:
        sizes = [(m.width, m.height) for m in message.monitors if m.width or m.height]
        possible = bool(sizes) and all(width and height for width, height in sizes)
        error = ReplyError.SUCCESS if possible else ReplyError.ERROR
        if possible:
            self.monitors = message.monitors
            self._emit(MonitorsSet(message.monitors))
        link.post(Reply(MessageType.MONITORS_CONFIG, error), port)

    def _took_status(self, message: FileXferStatus) -> None:
        mine = message.id >= FROM_GUEST
        error = self._sender.took_status(message) if mine else self._files.status(message)
        if error is not None:
            log.warning("agent channel: %s", error)
            self._emit(AgentTrouble(error))

    def _send_status(self, status: FileXferStatus) -> None:
        if self._link is not None:
            self._link.post(status)

    def _client_left(self) -> None:
        self._files.cancel_all()
        self._clipboard.end_session()
        self._sender.end_session("the host's client left")
        if self._link is not None:
            self._clipboard.begin_session(self._link)
            self._sender.begin_session(self._link)
        self.host = None
        self._emit(HostLeft())

    def _keep(self, message: TypedMessage | UnknownMessage) -> None:
        match message:
            case MouseState():
                self.mouse = message
            case DisplayConfig():
                self.display = message
                if self._link is not None:
                    self._link.post(Reply(MessageType.DISPLAY_CONFIG, ReplyError.SUCCESS))
            case AudioVolumeSync():
                self.volume[message.is_playback] = message
            case GraphicsDeviceInfo():
                self.graphics = message


async def serve_agent(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, downloads: Path | None = None
) -> None:
    """A guest agent with somebody at its desk, until the host end goes away.

    Text that the host puts on the clipboard is pasted, and then selected: what comes back as the
    PRIMARY selection is what really arrived.
    """
    pasting: set[asyncio.Task[None]] = set()

    def on_event(event: GuestAgentEvent) -> None:
        log.info("agent: %s", event)
        if (
            isinstance(event, ClipboardGrabbed)
            and event.selection == Selection.CLIPBOARD
            and ClipboardType.UTF8_TEXT in event.types
        ):
            task = asyncio.ensure_future(paste_and_select())
            pasting.add(task)
            task.add_done_callback(pasting.discard)

    async def paste_and_select() -> None:
        try:
            text = await agent.get_clipboard()
        except AgentError as error:
            log.warning("agent: could not paste: %s", error)
        else:
            agent.set_clipboard(text, Selection.PRIMARY)

    agent = GuestAgent(downloads=downloads, on_event=on_event)
    try:
        await agent.run(reader, writer)
    finally:
        for task in pasting:
            task.cancel()
        await asyncio.gather(*pasting, return_exceptions=True)
