"""The host's peer of a SPICE agent: what a SPICE client does over the agent channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from pathlib import Path

from vring_serial.agent.channel.arrivals import Arrivals
from vring_serial.agent.channel.body import users_sink
from vring_serial.agent.channel.clipboard import (
    ClipboardChannel,
    Offer,
    as_offer,
    need_clipboard,
)
from vring_serial.agent.channel.files import Progress
from vring_serial.agent.channel.handshake import Handshake
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.receiver import FileReceiver
from vring_serial.agent.channel.replies import ReplyCall, ReplyCalls
from vring_serial.agent.channel.transfers import FileTransfers
from vring_serial.agent.errors import (
    AgentGoneError,
    AgentRefusedError,
    AgentTimeoutError,
    AgentUnsupportedError,
    ClipboardEmptyError,
)
from vring_serial.agent.events import (
    AgentEvent,
    AgentGone,
    AgentReady,
    AgentTrouble,
    ClipboardGrabbed,
    ClipboardReleased,
    EventStream,
    OtherMessage,
)
from vring_serial.agent.host_capabilities import HOST_CAPABILITIES
from vring_serial.callbacks import Listener, tell
from vring_serial.lifetime import Ending
from vring_serial.proto.agent import (
    AGENT_AWAY,
    AGENT_FULL,
    FILES_FROM_GUEST,
    AgentProtocolError,
    AnnounceCapabilities,
    Buffer,
    Capabilities,
    Capability,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    ClipboardType,
    FileList,
    FileXferData,
    FileXferStart,
    FileXferStatus,
    Message,
    Monitor,
    MonitorsConfig,
    MonitorsFlag,
    Reply,
    ReplyError,
    Selection,
    Side,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
    capability_name,
    message_name,
)
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

CLIPBOARD_MAX = 100 << 20
"""Bytes of clipboard data that a HostAgent takes unless told otherwise, as spice-gtk does."""

EMPTY_ANSWERS_TRIED = 3
"""spice-vdagent 0.23.0 often loses a clipboard that X11 moves in increments (of 1 MiB or more) and
answers with nothing: ask again."""
ASK_AGAIN_WAIT = 2.0
"""Seconds for the answer to that: the application that owns the data may be left waiting for the
rest of the first one, and then never gives another."""

PHYSICAL_SIZE_WAIT = 2.0
"""Seconds before monitors with physical sizes are sent again without: spice-vdagentd 0.22.1 neither
understands nor answers the former."""


class HostAgent(Ending):
    """One agent seen from the host, over any number of connections one after another.

    Connect it to a port with ``ProtocolEnd(agent.protocol_factory)``, or to a socket that carries
    an agent channel with ``loop.create_unix_connection(agent.protocol_factory, path)`` or
    ``loop.create_unix_server``. A new connection replaces the one before.

    Args:
        capabilities: what we announce.
        max_clipboard: bytes of clipboard data to take from the guest, or -1 for any size.
        timeout: seconds to wait for an answer, where a method is not given its own.
        on_event: called with every event, in the event loop's thread.
        on_body: called with the head of a message of an unknown type that is too long to be an
            event, and with the bytes of its payload; returns what takes these, or None. Without it
            such messages are discarded.

    Attributes:
        on_event: the same function, or None. One listener at a time: setting another one raises
            LocalProtocolError, None removes it.

    A channel that several clients share may be open and have no agent at its end (AGENT_AWAY).
    """

    on_event = Listener[Callable[[AgentEvent], None]]()

    def __init__(
        self,
        *,
        capabilities: Capabilities = HOST_CAPABILITIES,
        max_clipboard: int = CLIPBOARD_MAX,
        timeout: float = 10.0,
        on_event: Callable[[AgentEvent], None] | None = None,
        on_body: Callable[[UnknownMessage, int], BodySink | None] | None = None,
    ) -> None:
        self._on_body = on_body
        self._timeout = timeout
        self.on_event = on_event
        self._log = RateLimitedLog(log)
        self._listening: set[EventStream] = set()
        self._handshake = Handshake(capabilities)
        self._is_away = False
        self._is_turned_away = False
        self._last_end: str | None = None
        self._is_closed = False
        self._changed = asyncio.Event()
        self._replies = ReplyCalls()
        self._transfers = FileTransfers(Side.HOST)
        self._arrivals: Arrivals | None = None
        self._fetching = asyncio.Lock()
        self._clipboard = ClipboardChannel(
            Side.HOST,
            on_grab=self._clipboard_grabbed,
            on_release=lambda selection: self._emit(ClipboardReleased(selection)),
            on_trouble=lambda error: self._emit(AgentTrouble(error)),
            most=max_clipboard,
        )

    @property
    def capabilities(self) -> Capabilities | None:
        """What the agent announced, or None while there is none."""
        return self._handshake.remote

    @property
    def link(self) -> AgentLink | None:
        """The connection to the agent, if there is one: its reading may be held, or it be ended."""
        return self._handshake.link

    def protocol_factory(self) -> asyncio.Protocol:
        """Return a protocol for one connection of the channel."""
        return AgentLink(Side.HOST, self)

    async def aclose(self) -> None:
        """Close the channel for good, and end all that waits for something on it.

        Methods that wait raise AgentGoneError, and iterations over events end.
        """
        self._is_closed = True
        link = self._handshake.link
        if link is not None:
            self._handshake.link_down(link)
            link.close()
            self._end_session("the agent went away")
            self._emit(AgentGone())
        for stream in self._listening:
            stream.end()
        self._notify()
        await self._clipboard.aclose()

    # --- what one can do

    def events(self) -> EventStream:
        """Events from now on, to iterate over inside ``with``; any number at once.

        An iterator that lags EVENTS_MAX events or EVENTS_BYTES behind loses the oldest. It ends
        when the agent is closed.
        """
        stream = EventStream(self._listening)
        if self._is_closed:
            stream.end()
        return stream

    async def wait_ready(self, timeout: float | None = None) -> Capabilities:
        """Wait until an agent has announced itself, and return its capabilities.

        Raises AgentTimeoutError, which says how far it got, and AgentGoneError if the agent is
        closed or who shares it takes no more clients.
        """
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                while self.capabilities is None:
                    self._check_open()
                    await self._changed.wait()
                return self.capabilities
        except TimeoutError:
            raise AgentTimeoutError(
                f"no SPICE agent within {seconds:g} s: {self._how_far()}"
            ) from None

    def _how_far(self) -> str:
        if self._is_away:
            return "who shares the channel has none at the moment"
        if self._handshake.link is not None:
            return "it is open but silent: no agent runs, or another client has the channel"
        if self._last_end is None:
            return "nobody opened the channel"
        return f"the channel was closed at its other end{self._last_end}"

    def _check_open(self) -> None:
        if self._is_closed:
            raise AgentGoneError("the agent was closed")
        if self._is_turned_away:
            raise AgentGoneError("who shares the agent takes no more clients")

    async def set_monitors(
        self, monitors: Sequence[Monitor], *, timeout: float | None = None
    ) -> None:
        """Ask the guest for these monitors, and wait for its REPLY.

        Positions count unless all of several monitors have none. While the agent has not answered
        the monitors before, these wait for up to REPLY_WAIT seconds more. Raises AgentRefusedError
        if the agent could not, AgentUnsupportedError, AgentTimeoutError, AgentGoneError.
        """
        link = self._need(Capability.MONITORS_CONFIG)
        flags = MonitorsFlag.USE_POS
        if len(monitors) > 1 and not any(m.x or m.y for m in monitors):
            flags = MonitorsFlag(0)
        seconds = self._timeout if timeout is None else timeout
        config = MonitorsConfig(tuple(monitors), flags)
        call = ReplyCall()
        if any(m.width_mm or m.height_mm for m in monitors):
            sized = MonitorsConfig(config.monitors, flags | MonitorsFlag.PHYSICAL_SIZE)
            with contextlib.suppress(AgentTimeoutError):
                return await self._ask(link, call, sized, min(seconds, PHYSICAL_SIZE_WAIT))
        return await self._ask(link, call, config, seconds)

    async def set_clipboard(
        self, content: str | bytes | Offer, selection: int = Selection.CLIPBOARD
    ) -> None:
        """Own a clipboard of the guest with this content, until something in the guest takes it.

        ``content`` is text, text in UTF-8, or a mapping of ClipboardType to bytes or StreamSource;
        the guest fetches it when somebody pastes. An agent that comes back is offered it again.
        Raises AgentUnsupportedError if the agent has no such clipboard, AgentGoneError.
        """
        self._need_clipboard(selection)
        crlf = self._has(Capability.GUEST_LINEEND_CRLF)
        self._clipboard.offer(selection, as_offer(content, crlf=crlf))

    async def clear_clipboard(self, selection: int = Selection.CLIPBOARD) -> None:
        """Give up a clipboard that ``set_clipboard`` took. Does nothing if it is not ours."""
        self._clipboard.release(selection)

    async def get_clipboard(
        self, selection: int = Selection.CLIPBOARD, *, timeout: float | None = None
    ) -> str:
        """Return the text on a clipboard of the guest; lines end in ``\\n``.

        Raises as :meth:`get_clipboard_data` does.
        """
        data = await self.get_clipboard_data(ClipboardType.UTF8_TEXT, selection, timeout=timeout)
        if self._has(Capability.GUEST_LINEEND_CRLF):
            data = data.replace(b"\r\n", b"\n")
        return data.rstrip(b"\0").decode("utf-8", "replace")

    async def get_clipboard_data(
        self, kind: int, selection: int = Selection.CLIPBOARD, *, timeout: float | None = None
    ) -> bytes:
        """Return the guest's clipboard in one ClipboardType, as it came.

        Raises ClipboardEmptyError if the guest has nothing of that type, ClipboardTooLargeError,
        AgentUnsupportedError, AgentTimeoutError if nothing comes for ``timeout`` seconds,
        AgentGoneError.
        """
        self._need_clipboard(selection)
        seconds = self._timeout if timeout is None else timeout
        empty: ClipboardEmptyError | None = None
        for _ in range(EMPTY_ANSWERS_TRIED):
            try:
                return await self._clipboard.fetch(selection, kind, seconds)
            except ClipboardEmptyError as error:
                empty = error
                if kind not in self._clipboard.remote_types.get(selection, ()):
                    break
            except AgentTimeoutError:
                if empty is None:
                    raise
                break
            seconds = min(seconds, ASK_AGAIN_WAIT)
        assert empty is not None
        raise empty

    def stream_clipboard(
        self, kind: int, selection: int = Selection.CLIPBOARD, *, timeout: float | None = None
    ) -> AsyncGenerator[Buffer]:
        """As ``get_clipboard_data``, in pieces and bounded memory: iterate, then ``aclose``."""
        self._need_clipboard(selection)
        seconds = self._timeout if timeout is None else timeout
        return self._clipboard.open(selection, kind, seconds)

    def clipboard_types(self, selection: int = Selection.CLIPBOARD) -> tuple[int, ...]:
        """Return the types that the guest has on a clipboard; empty if it does not own it."""
        return self._clipboard.remote_types.get(selection, ())

    async def wait_clipboard(
        self, selection: int = Selection.CLIPBOARD, *, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Wait until the guest owns a clipboard, and return its types.

        Raises AgentTimeoutError, and AgentGoneError as :meth:`wait_ready`.
        """
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                while not self.clipboard_types(selection):
                    self._check_open()
                    await self._changed.wait()
        except TimeoutError:
            raise AgentTimeoutError(
                f"nothing in the guest took the clipboard within {seconds:g} s"
            ) from None
        return self.clipboard_types(selection)

    async def send_file(
        self,
        path: Path,
        *,
        name: str | None = None,
        on_progress: Progress | None = None,
        timeout: float | None = None,
    ) -> None:
        """Put a file into the guest's download directory, under its own or another name.

        Returns when the guest has confirmed it. Any number may run at once; cancelling the task
        cancels the transfer in the guest, and no other. ``on_progress`` is called with the bytes
        sent and the bytes in all; ``timeout`` counts from the last progress.
        Raises FileRefusedError with the guest's reason, FileTransferError if the file cannot be
        read to its end, AgentUnsupportedError, AgentTimeoutError, AgentGoneError.
        """
        self._need()
        if self._has(Capability.FILE_XFER_DISABLED):
            raise AgentUnsupportedError("the agent takes no files (FILE_XFER_DISABLED)")
        seconds = self._timeout if timeout is None else timeout
        await self._transfers.sender.send(path, name=name, on_progress=on_progress, timeout=seconds)

    async def get_files(
        self,
        directory: Path,
        selection: int = Selection.CLIPBOARD,
        *,
        timeout: float | None = None,
    ) -> list[Path]:
        """Copy the files on a clipboard of the guest into a directory, and return where they are.

        Only agents that announce FILES_FROM_GUEST send files, among them the embedded guest's.
        Names are made safe, and no file that exists is overwritten; ``timeout`` is for each file.
        Raises FileTransferError if not all of them came, besides what get_clipboard_data raises;
        then, and if it is cancelled, those that came are removed again.
        """
        self._need()
        if not (self._has(FILES_FROM_GUEST) and FILES_FROM_GUEST in self._handshake.local):
            raise AgentUnsupportedError(
                "files come from the guest only if both ends have announced FILES_FROM_GUEST"
            )
        seconds = self._timeout if timeout is None else timeout
        async with self._fetching:
            self._arrivals = arrivals = Arrivals()
            receiver = FileReceiver(directory, self._transfers.post_status, arrivals.ended)
            receiver.detailed = True
            self._transfers.receiver = receiver
            try:
                data = await self.get_clipboard_data(
                    ClipboardType.FILE_LIST, selection, timeout=timeout
                )
                return await arrivals.all(len(FileList.unpack(data).paths), seconds)
            except BaseException:
                arrivals.remove()
                raise
            finally:
                receiver.cancel_all()
                self._transfers.receiver = self._arrivals = None

    async def send(self, message: Message) -> None:
        """Send any message as it is. Raises AgentGoneError."""
        await self._need_link().send(message)

    async def send_body(
        self, head: StreamedMessage, size: int, source: AsyncIterable[Buffer]
    ) -> None:
        """Send a message whose payload of ``size`` bytes comes piece by piece.

        Raises AgentGoneError, AgentError if it has other than ``size`` bytes, and what the source
        raises; the agent's session then begins anew.
        """
        await self._need_link().send_body(head, size, source)

    # --- how it is done

    def _has(self, capability: int) -> bool:
        return self._handshake.has(capability)

    def _need_link(self) -> AgentLink:
        if self._handshake.link is None:
            raise AgentGoneError("no agent is connected")
        return self._handshake.link

    def _need(self, *needed: Capability) -> AgentLink:
        link = self._need_link()
        if self.capabilities is None:
            raise AgentGoneError("no agent is connected")
        for capability in needed:
            if capability not in self.capabilities:
                name = capability_name(capability)
                raise AgentUnsupportedError(f"the agent has not announced {name}")
        return link

    def _need_clipboard(self, selection: int) -> None:
        self._need()
        assert self.capabilities is not None
        need_clipboard(self.capabilities, selection)

    async def _ask(
        self, link: AgentLink, call: ReplyCall, message: Message, timeout: float
    ) -> None:
        """Send a message that the agent answers with REPLY, and wait for that if it sends any."""
        if not self._has(Capability.REPLY):
            await link.send(message)
            return
        error = await self._replies.ask(link, call, message, timeout)
        if error != ReplyError.SUCCESS:
            name = message_name(message.type_number)
            raise AgentRefusedError(f"the agent failed to do {name} (error {error})")

    def _emit(self, event: AgentEvent) -> None:
        for stream in self._listening:
            stream.put(event)
        tell(self._log, "on_event", self.on_event, event)

    def _begin_session(self, link: AgentLink) -> None:
        """Start anew on both sides, and ask the agent for its capabilities."""
        self._end_arrivals()
        self._clipboard.begin_session(link)
        self._transfers.begin_session(link)
        self._replies.fail("the agent started anew")
        self._handshake.ask()

    def _end_session(self, why: str) -> None:
        self._end_arrivals()
        self._clipboard.end_session()
        self._transfers.end_session(why)
        self._replies.fail(why)

    def _end_arrivals(self) -> None:
        if self._arrivals is not None:
            self._arrivals.agent_left()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- LinkOwner

    def link_up(self, link: AgentLink) -> None:
        """Begin a session on the link; once closed, close the link instead."""
        if self._is_closed:
            link.close()
            return
        if self._handshake.link_up(link):
            self._is_away = self._is_turned_away = False
        self._begin_session(link)

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        """End the session, and fail whatever waits for the agent. An older link changes nothing."""
        if self._handshake.link_down(link):
            self._last_end = f": {reason}" if reason else ""
            self._end_session("the agent went away")
            self._emit(AgentGone(str(reason) if reason else ""))

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        """Act on a message of the agent; one of an older link is ignored."""
        if link is not self._handshake.link:
            return
        match message:
            case AnnounceCapabilities():
                self._receive_capabilities(link, message)
            case ClipboardGrab() | ClipboardRelease() | ClipboardRequest() | Clipboard():
                self._clipboard.receive(message)
            case FileXferStart() | FileXferData() | FileXferStatus():
                if (error := self._transfers.receive(message)) is not None:
                    self._emit(AgentTrouble(error))
            case Reply() if self._replies.receive(message):
                pass
            case _:
                self._emit(OtherMessage(message))

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        """Return what takes the payload of a clipboard, of a file, or for ``on_body``.

        None, which discards it, for an older link and for whatever nobody takes.
        """
        if link is not self._handshake.link:
            return None
        match head:
            case Clipboard():
                return self._clipboard.begin_data(head, size)
            case FileXferData():
                return self._transfers.body(head)
            case UnknownMessage() if self._on_body is not None:
                return users_sink(self._log, self._on_body, head, size)
        return None

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        """Pass a wrong message of the agent to ``on_event``."""
        self._emit(AgentTrouble(error))

    def _receive_capabilities(self, link: AgentLink, message: AnnounceCapabilities) -> None:
        if AGENT_AWAY in message.capabilities:
            self._receive_away(link, is_full=AGENT_FULL in message.capabilities)
            return
        self._is_away = False
        before = self.capabilities
        if self._handshake.receive(message):
            self._begin_session(link)
        self._notify()
        if not self._clipboard.has_told or before != message.capabilities:
            self._emit(AgentReady(message.capabilities))
        self._clipboard.tell_owned()

    def _receive_away(self, link: AgentLink, *, is_full: bool) -> None:
        was_there = self.capabilities is not None
        self._handshake.refuse()
        self._is_away = True
        self._is_turned_away = is_full
        self._end_session("the agent went away")
        if is_full:
            link.close()
        self._notify()
        if was_there:
            self._emit(AgentGone("", closed=False))

    def _clipboard_grabbed(self, selection: int, types: tuple[int, ...]) -> None:
        self._notify()
        self._emit(ClipboardGrabbed(selection, types))
