"""The embedded guest's own SPICE agent: the guest's side of the agent channel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vring_serial.agent.channel.clipboard import (
    ANY_SIZE,
    ClipboardChannel,
    Offer,
    StreamSource,
    as_offer,
)
from vring_serial.agent.channel.handshake import Handshake
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.receiver import FileReceiver
from vring_serial.agent.channel.streams import run_on_streams
from vring_serial.agent.channel.transfers import FileTransfers
from vring_serial.agent.errors import (
    AgentError,
    AgentGoneError,
    AgentTimeoutError,
    FileRefusedError,
    FileTransferError,
)
from vring_serial.agent.events import AgentTrouble, ClipboardGrabbed, ClipboardReleased
from vring_serial.callbacks import Listener, tell
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
    """The host set the guest's monitors, and the embedded guest has them now.

    Attributes:
        monitors: all monitors, in the host's order; sizes and positions in pixels.
    """

    monitors: tuple[Monitor, ...]


@dataclass(frozen=True, slots=True)
class HostAnnounced:
    """The host announced its capabilities: a client connected, or connected again.

    Attributes:
        capabilities: the host's capabilities.
    """

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
        on_event: the same function, or None. One listener at a time: setting another one raises
            LocalProtocolError, None removes it.
    """

    on_event = Listener[Callable[[GuestAgentEvent], None]]()

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
        self._timeout = timeout
        self.on_event = on_event
        self._log = RateLimitedLog(log)
        self._handshake = Handshake(capabilities)
        self._transfers = FileTransfers(Side.GUEST)
        self._receiver = FileReceiver(downloads, self._transfers.post_status)
        self._transfers.receiver = self._receiver
        self._sending: set[asyncio.Task[None]] = set()
        self._clipboard = ClipboardChannel(
            Side.GUEST,
            on_grab=lambda selection, types: self._emit(ClipboardGrabbed(selection, types)),
            on_release=lambda selection: self._emit(ClipboardReleased(selection)),
            on_trouble=lambda error: self._emit(AgentTrouble(error)),
            most=max_clipboard,
        )

    @property
    def host(self) -> Capabilities | None:
        """What the host announced, or None while it has no client."""
        return self._handshake.remote

    @property
    def link(self) -> AgentLink | None:
        """The connection to the host, if there is one: any message can be sent on it."""
        return self._handshake.link

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
        """Return a protocol for one connection of the channel."""
        return AgentLink(Side.GUEST, self)

    def set_clipboard(
        self, content: str | bytes | Offer, selection: int = Selection.CLIPBOARD
    ) -> None:
        """Own a clipboard, as an application does in which somebody copies."""
        self._clipboard.offer(selection, as_offer(content))

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
        if self._handshake.has(FILES_FROM_GUEST):
            task = asyncio.ensure_future(self._send_files(paths))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send_files(self, paths: list[Path]) -> None:
        sender = self._transfers.sender
        for path in paths:
            try:
                await sender.send(path, name=None, on_progress=None, timeout=self._timeout)
            except FileRefusedError as error:
                log.warning("agent: %s", error)
            except FileTransferError as error:
                log.warning("agent: %s", error)
                sender.refuse(path)
            except (AgentTimeoutError, AgentGoneError) as error:
                log.warning("agent: %s", error)
                return

    def clear_clipboard(self, selection: int = Selection.CLIPBOARD) -> None:
        """Give up a clipboard."""
        self._clipboard.release(selection)

    def clipboard_types(self, selection: int = Selection.CLIPBOARD) -> tuple[int, ...]:
        """Return the types that the host has on a clipboard; empty if it does not own it."""
        return self._clipboard.remote_types.get(selection, ())

    async def get_clipboard(
        self, selection: int = Selection.CLIPBOARD, kind: int = ClipboardType.UTF8_TEXT
    ) -> bytes:
        """Return what an application in the guest pastes: of the host, or what was copied here.

        Raises as HostAgent.get_clipboard_data.
        """
        copied = self._clipboard.owned(selection).get(kind)
        if isinstance(copied, bytes):
            return copied
        return await self._clipboard.fetch(selection, kind, self._timeout)

    # --- LinkOwner

    def link_up(self, link: AgentLink) -> None:
        """Begin a session on the link and ask the client for its capabilities."""
        self._handshake.link_up(link)
        self._begin_session(link)
        self._handshake.ask()

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        """Forget the link, log ``reason`` if there is one, and end what the client began."""
        if self._handshake.link_down(link):
            if reason is not None:
                log.warning("agent channel: %s", reason)
            self._client_left()

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        """Act on a message of the client."""
        match message:
            case AnnounceCapabilities():
                self._receive_capabilities(link, message)
            case MonitorsConfig():
                self._set_monitors(link, ChunkPort(port), message)
            case ClipboardGrab() | ClipboardRelease() | ClipboardRequest() | Clipboard():
                self._clipboard.receive(message)
            case MaxClipboard():
                self._clipboard.remote_most = max(message.max, ANY_SIZE)
            case FileXferStart() | FileXferData() | FileXferStatus():
                if (error := self._transfers.receive(message)) is not None:
                    self.link_trouble(link, error)
            case ClientDisconnected():
                self._client_left()
            case _:
                self._keep(link, message)

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        """Return what takes the clipboard's or a file's data; None discards any other payload."""
        match head:
            case Clipboard():
                return self._clipboard.begin_data(head, size)
            case FileXferData():
                return self._transfers.body(head)
        return None

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        """Log a wrong message of the client and pass it to ``on_event``."""
        log.warning("agent channel: %s", error)
        self._emit(AgentTrouble(error))

    # --- how it is done

    def _emit(self, event: GuestAgentEvent) -> None:
        tell(self._log, "on_event", self.on_event, event)

    def _begin_session(self, link: AgentLink) -> None:
        self._clipboard.begin_session(link)
        self._transfers.begin_session(link)

    def _receive_capabilities(self, link: AgentLink, message: AnnounceCapabilities) -> None:
        if message.request:
            self._begin_session(link)  # with a new client
        if self._handshake.receive(message):
            self._handshake.answer()
        self._receiver.detailed = self._handshake.has(Capability.FILE_XFER_DETAILED_ERRORS)
        self._clipboard.tell_owned()
        self._emit(HostAnnounced(message.capabilities))

    def _set_monitors(self, link: AgentLink, port: ChunkPort, message: MonitorsConfig) -> None:
        sizes = [(m.width, m.height) for m in message.monitors if m.width or m.height]
        possible = bool(sizes) and all(width and height for width, height in sizes)
        error = ReplyError.SUCCESS if possible else ReplyError.ERROR
        if possible:
            self.monitors = message.monitors
            self._emit(MonitorsSet(message.monitors))
        link.post(Reply(MessageType.MONITORS_CONFIG, error), port)

    def _client_left(self) -> None:
        self._clipboard.end_session()
        self._transfers.end_session("the host's client left")
        if self._handshake.link is not None:
            self._begin_session(self._handshake.link)
        self._handshake.remote = None
        self._emit(HostLeft())

    def _keep(self, link: AgentLink, message: TypedMessage | UnknownMessage) -> None:
        match message:
            case MouseState():
                self.mouse = message
            case DisplayConfig():
                self.display = message
                link.post(Reply(MessageType.DISPLAY_CONFIG, ReplyError.SUCCESS))
            case AudioVolumeSync():
                self.volume[message.is_playback] = message
            case GraphicsDeviceInfo():
                self.graphics = message


async def serve_agent(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, downloads: Path | None = None
) -> None:
    """Run a guest agent with somebody at its desk, until the host end goes away.

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
