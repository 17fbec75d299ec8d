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
    need_clipboard,
)
from vring_serial.agent.channel.files import FROM_GUEST, FileSender, Progress
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.receiver import FileReceiver
from vring_serial.agent.channel.replies import Replies, ReplyCall
from vring_serial.agent.errors import (
    AgentError,
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
from vring_serial.callbacks import tell
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
    FileXferResult,
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
        capabilities: what the agent announced, or None while there is none.
    """

    def __init__(
        self,
        *,
        capabilities: Capabilities = HOST_CAPABILITIES,
        max_clipboard: int = CLIPBOARD_MAX,
        timeout: float = 10.0,
        on_event: Callable[[AgentEvent], None] | None = None,
        on_body: Callable[[UnknownMessage, int], BodySink | None] | None = None,
    ) -> None:
        self.capabilities: Capabilities | None = None
        self._on_body = on_body
        self._announced = capabilities
        self._timeout = timeout
        self._on_event = on_event
        self._said = RateLimitedLog(log)
        self._streams: set[EventStream] = set()
        self._link: AgentLink | None = None
        self._asked = False
        self._away = False
        self._turned_away = False
        self._last_end: str | None = None
        self._closed = False
        self._changed = asyncio.Event()
        self._replies: dict[int, Replies[ReplyCall]] = {}
        self._files = FileSender()
        self._receiver: FileReceiver | None = None
        self._arrivals: Arrivals | None = None
        self._fetching = asyncio.Lock()
        self._clipboard = ClipboardChannel(
            Side.HOST,
            on_grab=self._took_grab,
            on_release=lambda selection: self._emit(ClipboardReleased(selection)),
            on_trouble=lambda error: self._emit(AgentTrouble(error)),
            most=max_clipboard,
        )

    def protocol_factory(self) -> asyncio.Protocol:
        """A protocol for one connection of the channel."""
        return AgentLink(Side.HOST, self)

    async def aclose(self) -> None:
        """Close the channel for good, and end all that waits for something on it.

        Methods that wait raise AgentGoneError, and iterations over events end.
        """
        self._closed = True
        link, self._link = self._link, None
        if link is not None:
            link.close()
            self._agent_left()
            self._emit(AgentGone())
        for stream in self._streams:
            stream.end()
        self._notify()
        await self._clipboard.aclose()

    # --- what one can do

    def events(self) -> EventStream:
        """Events from now on, to iterate over inside ``with``; any number at once.

        An iterator that lags EVENTS_MAX events or EVENTS_BYTES behind loses the oldest. It ends
        when the agent is closed.
        """
        stream = EventStream(self._streams)
        if self._closed:
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
        if self._away:
            return "who shares the channel has none at the moment"
        if self._link is not None:
            return "it is open but silent"
        if self._last_end is None:
            return "nobody opened the channel"
        return f"the channel was closed at its other end{self._last_end}"

    def _check_open(self) -> None:
        if self._closed:
            raise AgentGoneError("the agent was closed")
        if self._turned_away:
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
        if isinstance(content, str):
            content = content.encode("utf-8", "replace")
        if isinstance(content, bytes):
            content = {ClipboardType.UTF8_TEXT: self._line_ends_for_guest(content)}
        self._clipboard.offer(selection, content)

    async def clear_clipboard(self, selection: int = Selection.CLIPBOARD) -> None:
        """Give up a clipboard that ``set_clipboard`` took. Does nothing if it is not ours."""
        self._clipboard.release(selection)

    async def get_clipboard(
        self, selection: int = Selection.CLIPBOARD, *, timeout: float | None = None
    ) -> str:
        """The text on a clipboard of the guest; lines end in ``\\n``.

        Raises as :meth:`get_clipboard_data` does.
        """
        data = await self.get_clipboard_data(ClipboardType.UTF8_TEXT, selection, timeout=timeout)
        if self._has(Capability.GUEST_LINEEND_CRLF):
            data = data.replace(b"\r\n", b"\n")
        return data.rstrip(b"\0").decode("utf-8", "replace")

    async def get_clipboard_data(
        self, kind: int, selection: int = Selection.CLIPBOARD, *, timeout: float | None = None
    ) -> bytes:
        """The guest's clipboard in one ClipboardType, as it came.

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
        """The types that the guest has on a clipboard; empty if it does not own it."""
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
        await self._files.send(path, name=name, on_progress=on_progress, timeout=seconds)

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
        link = self._need()
        if not (self._has(FILES_FROM_GUEST) and FILES_FROM_GUEST in self._announced):
            raise AgentUnsupportedError(
                "files come from the guest only if both ends have announced FILES_FROM_GUEST"
            )
        seconds = self._timeout if timeout is None else timeout
        async with self._fetching:
            self._arrivals = arrivals = Arrivals()
            self._receiver = FileReceiver(directory, link.post, arrivals.ended)
            self._receiver.detailed = True
            try:
                data = await self.get_clipboard_data(
                    ClipboardType.FILE_LIST, selection, timeout=timeout
                )
                return await arrivals.all(len(FileList.unpack(data).paths), seconds)
            except BaseException:
                arrivals.remove()
                raise
            finally:
                self._receiver.cancel_all()
                self._receiver = self._arrivals = None

    async def send(self, message: Message) -> None:
        """Send any message as it is. Raises AgentGoneError."""
        if self._link is None:
            raise AgentGoneError("no agent is connected")
        await self._link.send(message)

    async def send_body(
        self, head: StreamedMessage, size: int, source: AsyncIterable[Buffer]
    ) -> None:
        """Send a message whose payload of ``size`` bytes comes piece by piece.

        Raises AgentGoneError, AgentError if it has other than ``size`` bytes, and what the source
        raises; the agent's session then begins anew.
        """
        if self._link is None:
            raise AgentGoneError("no agent is connected")
        await self._link.send_body(head, size, source)

    # --- how it is done

    def _has(self, capability: int) -> bool:
        return self.capabilities is not None and capability in self.capabilities

    def _line_ends_for_guest(self, text: bytes) -> bytes:
        if self._has(Capability.GUEST_LINEEND_CRLF):
            return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        return text

    def _need(self, *needed: Capability) -> AgentLink:
        if self._link is None or self.capabilities is None:
            raise AgentGoneError("no agent is connected")
        for capability in needed:
            if capability not in self.capabilities:
                name = capability_name(capability)
                raise AgentUnsupportedError(f"the agent has not announced {name}")
        return self._link

    def _need_clipboard(self, selection: int) -> None:
        self._need()
        assert self.capabilities is not None
        need_clipboard(self.capabilities, selection)

    async def _ask(
        self, link: AgentLink, call: ReplyCall, message: Message, timeout: float
    ) -> None:
        """Send a message that the agent answers with REPLY, and wait for that if it sends any.

        An answer to an earlier message of the same call counts for this one as well.
        """
        if not self._has(Capability.REPLY):
            await link.send(message)
            return
        kind = message.type_number

        async def send() -> None:
            async with asyncio.timeout(timeout):
                await link.send(message)

        try:
            await self._replies.setdefault(kind, Replies()).ask(call, send)
            async with asyncio.timeout(timeout):
                error = await asyncio.shield(call.reply)
        except TimeoutError:
            raise AgentTimeoutError(
                f"the agent did not answer {message_name(kind)} within {timeout:g} s"
            ) from None
        if error != ReplyError.SUCCESS:
            raise AgentRefusedError(f"the agent failed to do {message_name(kind)} (error {error})")

    def _emit(self, event: AgentEvent) -> None:
        for stream in self._streams:
            stream.put(event)
        tell(self._said, "on_event", self._on_event, event)

    def _begin_session(self, link: AgentLink) -> None:
        """Both sides start anew, because we ask the agent for its capabilities."""
        self._clipboard.begin_session(link)
        self._files.begin_session(link)
        self._fail_replies("the agent started anew")
        self._asked = True
        link.post(AnnounceCapabilities(True, self._announced))

    def _fail_replies(self, why: str) -> None:
        for replies in self._replies.values():
            for call in replies.clear():
                call.fail(AgentGoneError(f"{why} before it answered"))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- LinkOwner

    def link_up(self, link: AgentLink) -> None:
        if self._closed:
            link.close()
            return
        if self._link is not link:
            if self._link is not None:
                self._link.fail(AgentError("another connection took over the agent channel"))
            self._link = link
            self._away = self._turned_away = False
            self.capabilities = None
        self._begin_session(link)

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        if link is not self._link:
            return
        self._link = None
        self._last_end = f": {reason}" if reason else ""
        self._agent_left()
        self._emit(AgentGone(str(reason) if reason else ""))

    def _agent_left(self) -> None:
        self.capabilities = None
        self._clipboard.end_session()
        self._files.end_session("the agent went away")
        if self._receiver is not None and self._arrivals is not None:
            self._arrivals.agent_left()
            self._receiver.cancel_all()
        self._fail_replies("the agent went away")

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        if link is not self._link:
            return
        if isinstance(message, AnnounceCapabilities):
            self._took_capabilities(link, message)
        elif isinstance(message, ClipboardGrab | ClipboardRelease | ClipboardRequest | Clipboard):
            self._clipboard.took(message)
        elif isinstance(message, FileXferStatus):
            self._took_status(message)
        elif isinstance(message, FileXferStart):
            if self._receiver is not None:
                self._receiver.start(message)
            else:
                link.post(FileXferStatus(message.id, FileXferResult.CANCELLED))
        elif isinstance(message, FileXferData):
            if self._receiver is not None:
                self._receiver.data(message.id, message.data)
        elif isinstance(message, Reply):
            self._took_reply(message)
        else:
            self._emit(OtherMessage(message))

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        if link is self._link and isinstance(head, Clipboard):
            return self._clipboard.took_head(head, size)
        if link is self._link and isinstance(head, FileXferData) and self._receiver is not None:
            return self._receiver.body(head.id)
        if link is self._link and isinstance(head, UnknownMessage) and self._on_body is not None:
            return users_sink(self._said, self._on_body, head, size)
        return None

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        self._emit(AgentTrouble(error))

    def _took_capabilities(self, link: AgentLink, message: AnnounceCapabilities) -> None:
        if AGENT_AWAY in message.capabilities:
            was_there = self.capabilities is not None
            self._asked = False
            self._away = True
            self._turned_away = AGENT_FULL in message.capabilities
            self._agent_left()
            if self._turned_away:
                link.close()
            self._notify()
            if was_there:
                self._emit(AgentGone("", closed=False))
            return
        self._away = False
        before, self.capabilities = self.capabilities, message.capabilities
        if message.request and not self._asked:
            # An agent that asks after it had answered us has started anew on the same channel.
            self._begin_session(link)
        elif message.request:
            link.post(AnnounceCapabilities(False, self._announced))
        else:
            self._asked = False
        self._notify()
        if not self._clipboard.announced or before != message.capabilities:
            self._emit(AgentReady(message.capabilities))
        self._clipboard.announce()

    def _took_grab(self, selection: int, types: tuple[int, ...]) -> None:
        self._notify()
        self._emit(ClipboardGrabbed(selection, types))

    def _took_status(self, status: FileXferStatus) -> None:
        if status.id < FROM_GUEST:
            error = self._files.took_status(status)
        elif self._receiver is not None:
            error = self._receiver.status(status)
        else:
            return  # of a transfer that nobody waits for any more
        if error is not None:
            self._emit(AgentTrouble(error))

    def _took_reply(self, message: Reply) -> None:
        replies = self._replies.get(message.to)
        call = replies.answered() if replies is not None else None
        if call is None:
            self._emit(OtherMessage(message))
        elif not call.reply.done():
            call.reply.set_result(message.error)
