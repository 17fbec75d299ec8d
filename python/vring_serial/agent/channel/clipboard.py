"""The clipboards of one agent channel, for either of its ends.

The end that owns a clipboard says so with GRAB and the types that it has; the other asks with
REQUEST and gets a CLIPBOARD message. With serial numbers, each end counts the grabs of a selection,
and a grab is believed only if its number is the one that the receiver expects. Two grabs that cross
on the way carry the same number: the guest also takes the one before the number it expects, so that
the host wins on both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from vring_serial.agent.channel.body import BodyReader
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.replies import Replies
from vring_serial.agent.channel.spool import Spool, SpoolRoom
from vring_serial.agent.errors import (
    AgentError,
    AgentGoneError,
    AgentUnsupportedError,
    ClipboardEmptyError,
    ClipboardTooLargeError,
)
from vring_serial.proto.agent import (
    Buffer,
    Capabilities,
    Capability,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    ClipboardType,
    Message,
    Selection,
    Side,
    clipboard_type_name,
)
from vring_serial.proto.agent.constants import PIECE_MAX

ANY_SIZE = -1
REQUESTS_MAX = 64
"""Requests for one clipboard that may wait for their answer; the other end waits for each, so more
are nonsense."""
_SERIAL_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class StreamSource:
    """Clipboard data that are produced when they are asked for.

    Attributes:
        size: bytes.
        open: makes an iterator over the data; called once per request.
    """

    size: int
    open: Callable[[], AsyncIterator[Buffer]]


@dataclass(frozen=True, slots=True)
class ForwardedSource:
    """Clipboard data that the other end of another channel owns: asked for when it is asked for.

    Attributes:
        owner: the channel to that end.
        selection, type: what to ask it for.
        timeout: seconds without an answer after which there is none.
        room: where the answer is kept until it is whole.
    """

    owner: ClipboardChannel
    selection: int
    type: int
    timeout: float
    room: SpoolRoom

    def asked(self) -> contextlib.AbstractAsyncContextManager[Answer]:
        """Ask the owner; entered when its answer begins. Raises as ClipboardChannel.open."""
        return self.owner.asked(self.selection, self.type, self.timeout)


class Answer(Protocol):
    """Clipboard data that arrive; ``size`` is how many bytes."""

    size: int

    def pieces(self, timeout: float) -> AsyncGenerator[Buffer]:
        """As :meth:`BodyReader.pieces`."""


Source: TypeAlias = bytes | StreamSource | ForwardedSource
Offer: TypeAlias = Mapping[int, Source]


def as_offer(content: str | bytes | Offer, *, crlf: bool = False) -> Offer:
    """Return what to offer for text, for text in UTF-8, or for sources by ClipboardType.

    With ``crlf``, lines of text end in CR LF.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "replace")
    if not isinstance(content, bytes):
        return content
    if crlf:
        content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return {ClipboardType.UTF8_TEXT: content}


async def pieces_of(data: bytes) -> AsyncGenerator[Buffer]:
    """Iterate over data that are all there, in pieces."""
    view = memoryview(data)
    for start in range(0, len(data), PIECE_MAX):
        yield view[start : start + PIECE_MAX]


class ClipboardReader(BodyReader):
    """The answer to one request.

    Attributes:
        kind: the type that was asked for.
        size: bytes of the whole answer, once it has begun.
    """

    def __init__(self, link: AgentLink, kind: int, most: int, on_end: Callable[[], None]) -> None:
        super().__init__(link, "clipboard data", on_end)
        self.kind = kind
        self.size = 0
        self._most = most
        self._begun = False

    def begin(self, kind: int, size: int) -> None:
        """Begin the answer, which is of this type and ``size`` bytes long."""
        self.size = size
        self._begun = True
        if self._most != ANY_SIZE and size > self._most:
            self.fail(ClipboardTooLargeError(f"{size} bytes of clipboard, at most {self._most}"))
        elif kind == ClipboardType.NONE:
            self.fail(ClipboardEmptyError("the clipboard has no data of that type"))
        self._changed.set()

    async def begun(self, timeout: float) -> None:
        """Wait for the beginning of the answer. Raises the error that it came to, or a time-out."""
        while not self._begun and self._error is None:
            await self._change(timeout)
        if self._error is not None:
            raise self._error


class ClipboardChannel:
    """Clipboards over one link.

    Args:
        side: which end we are; it decides who wins when grabs cross.
        on_grab: called with (selection, types) when the other end takes a clipboard.
        on_release: called with the selection when it gives one up.
        on_trouble: called with why a request of the other end got no answer, or an empty one.
        most: bytes of clipboard data that we take, or ANY_SIZE.

    Attributes:
        remote_types: per selection, the types that the other end has, while it owns the clipboard.
        remote_most: bytes of clipboard data that the other end takes, or ANY_SIZE.
        has_told: the other end of this session has been told what we own.
    """

    def __init__(
        self,
        side: Side,
        *,
        on_grab: Callable[[int, tuple[int, ...]], None],
        on_release: Callable[[int], None],
        on_trouble: Callable[[BaseException], None],
        most: int,
    ) -> None:
        self._side = side
        self._on_grab = on_grab
        self._on_release = on_release
        self._on_trouble = on_trouble
        self._most = most
        self._link: AgentLink | None = None
        self.has_told = False
        self._offers: dict[int, Offer] = {}
        self._serials = dict.fromkeys(Selection, 0)
        self._told: set[int] = set()
        self._owed: dict[int, Replies[ClipboardReader]] = {kind: Replies() for kind in Selection}
        self._turns = {selection: asyncio.Lock() for selection in Selection}
        self._requests: dict[int, deque[ClipboardRequest]] = {kind: deque() for kind in Selection}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self.remote_types: dict[int, tuple[int, ...]] = {}
        self.remote_most = ANY_SIZE

    def begin_session(self, link: AgentLink) -> None:
        """Start anew with the other end: serials count from 0, and it owns nothing."""
        self.end_session()
        self._link = link
        self.has_told = False

    def end_session(self) -> None:
        """Forget the other end, which is gone. What we own stays ours, for :meth:`tell_owned`."""
        self._link = None
        self._serials = dict.fromkeys(Selection, 0)
        for selection in list(self.remote_types):
            self._receive_release(ClipboardRelease(selection))
        self._told.clear()
        for owed in self._owed.values():
            for reader in owed.clear():
                reader.fail(AgentGoneError("the other end went away before it sent the clipboard"))
        for requests in self._requests.values():
            requests.clear()

    async def aclose(self) -> None:
        """End the session and the tasks that answer requests."""
        self.end_session()
        answering = list(self._answering.values())
        self.stop_answering()
        await asyncio.gather(*answering, return_exceptions=True)

    def stop_answering(self) -> None:
        """Cancel the answers under way: the link is gone for good, and nobody waits for them."""
        for task in self._answering.values():
            task.cancel()
        self._answering.clear()  # a task that never ran would not say so

    # --- what we own

    def offer(self, selection: int, offer: Offer) -> None:
        """Own a clipboard; if it is too early to say so, :meth:`tell_owned` does."""
        self._offers[selection] = dict(offer)
        self.remote_types.pop(selection, None)
        waiting = self._owed[selection].next
        if waiting is not None:
            waiting.fail(ClipboardEmptyError("the clipboard has another owner now"))
        self._tell(selection)

    def tell_owned(self) -> None:
        """Tell the other end, whose capabilities are known now, what we own; once a session."""
        if self._link is not None and not self.has_told:
            self.has_told = True
            for selection in self._offers:
                self._tell(selection)

    def release(self, selection: int) -> None:
        """Give up a clipboard that we own."""
        if self._offers.pop(selection, None) is not None:
            self._tell(selection)

    def _tell(self, selection: int) -> None:
        """Tell the other end whose the clipboard is, as it is when the message's turn comes.

        Only the last of many changes is told, so a serial is counted when it is sent.
        """
        link = self._link
        if link is not None and self.has_told:
            link.post_latest(("clipboard", selection), lambda: self._state(link, selection))

    def _state(self, link: AgentLink, selection: int) -> Message | None:
        if link is not self._link or not self.has_told:
            return None
        if selection not in self._offers:
            if selection not in self._told:
                return None
            self._told.discard(selection)
            return ClipboardRelease(selection)
        if selection != Selection.CLIPBOARD and not link.connection.layout.selections:
            return None
        serial = self._serials[Selection(selection)]
        self._serials[Selection(selection)] = serial + 1 & _SERIAL_MASK
        self._told.add(selection)
        return ClipboardGrab(selection, tuple(self._offers[selection]), serial)

    def owned(self, selection: int) -> Offer:
        """Return what we have on this clipboard; empty if we do not own it."""
        return self._offers.get(selection, {})

    # --- what the other end owns

    async def fetch(self, selection: int, kind: int, timeout: float) -> bytes:
        """Return the other end's data in one type. Raises as :meth:`open` does."""
        parts = bytearray()
        async with contextlib.aclosing(self.open(selection, kind, timeout)) as pieces:
            async for piece in pieces:
                parts += piece
        return bytes(parts)

    async def open(self, selection: int, kind: int, timeout: float) -> AsyncGenerator[Buffer]:
        """Ask for the other end's data in one type, and iterate over the pieces as they come.

        Raises:
            ClipboardEmptyError: it owns nothing, has no such type, or answers with nothing.
            ClipboardTooLargeError: longer than we take; nothing of it is kept.
            AgentTimeoutError: nothing came for ``timeout`` seconds.
            AgentGoneError: the channel closed.
        """
        async with self.asked(selection, kind, timeout) as reader:
            async for piece in reader.pieces(timeout):
                yield piece

    @contextlib.asynccontextmanager
    async def asked(
        self, selection: int, kind: int, timeout: float
    ) -> AsyncGenerator[ClipboardReader]:
        """Ask, and wait until the answer begins and its size is known. Raises as ``open``."""
        await self._turns[Selection(selection)].acquire()
        with contextlib.ExitStack() as stack:
            # The turn is over as soon as all has come, however slowly it is taken from here.
            release = contextlib.ExitStack()
            release.callback(self._turns[Selection(selection)].release)
            stack.callback(release.close)
            link = self._owner_link(selection, kind)
            reader = ClipboardReader(link, kind, self._most, release.close)
            stack.callback(reader.fail, AgentError("nobody wants these clipboard data any more"))

            async def request() -> None:
                if self._owner_link(selection, kind) is not link:
                    raise AgentGoneError("the other end started anew")
                link.post(ClipboardRequest(selection, kind))

            await self._owed[selection].ask(reader, request)
            await reader.begun(timeout)
            yield reader

    def _owner_link(self, selection: int, kind: int) -> AgentLink:
        """Return the link to the other end. Raises as ``open`` unless that has this type."""
        if self._link is None:
            raise AgentGoneError("the agent channel is closed")
        types = self.remote_types.get(selection)
        if types is None:
            raise ClipboardEmptyError("the other end owns no such clipboard")
        if kind not in types:
            names = ", ".join(map(clipboard_type_name, types)) or "no data"
            raise ClipboardEmptyError(
                f"the clipboard has no {clipboard_type_name(kind)}, only {names}"
            )
        return self._link

    # --- messages from the other end

    def receive(
        self, message: ClipboardGrab | ClipboardRelease | ClipboardRequest | Clipboard
    ) -> None:
        """Take any whole message about a clipboard; outside of a session it means nothing."""
        if self._link is None:
            return
        match message:
            case ClipboardGrab():
                self._receive_grab(message)
            case ClipboardRelease():
                self._receive_release(message)
            case ClipboardRequest():
                self._receive_request(message)
            case Clipboard():
                self._receive_data(message)

    def _receive_grab(self, message: ClipboardGrab) -> None:
        """Take a GRAB; it is discarded if its serial says that ours is newer."""
        assert self._link is not None
        selection = Selection(message.selection)
        if self._link.connection.layout.serials:
            expected = self._serials[selection]
            if message.serial == expected:
                self._serials[selection] = expected + 1 & _SERIAL_MASK
            elif self._side is Side.HOST or message.serial != expected - 1 & _SERIAL_MASK:
                return
        self._offers.pop(selection, None)
        self._told.discard(selection)
        self.remote_types[selection] = message.types
        self._on_grab(selection, message.types)

    def _receive_release(self, message: ClipboardRelease) -> None:
        """Take a RELEASE."""
        if self.remote_types.pop(message.selection, None) is not None:
            self._on_release(message.selection)

    def _receive_data(self, message: Clipboard) -> None:
        """Take a whole answer."""
        sink = self.begin_data(message, len(message.data))
        if sink is not None:
            sink.feed(message.data)
            sink.end(complete=True)

    def begin_data(self, head: Clipboard, size: int) -> BodySink | None:
        """Return the sink of an answer that begins; None if nobody waits for it."""
        owed = self._owed[head.selection]
        reader = owed.next
        if reader is None or head.type not in (reader.kind, ClipboardType.NONE):
            return None
        owed.answered()
        if reader.failed:
            return None
        reader.begin(head.type, size)
        return reader

    def _receive_request(self, message: ClipboardRequest) -> None:
        """Take a REQUEST: it is answered in its turn, with type NONE if we have no such data.

        A clipboard whose owner is slow to answer does not delay the others.
        """
        selection = message.selection
        requests = self._requests[selection]
        if len(requests) >= REQUESTS_MAX:
            return
        requests.append(message)
        if selection not in self._answering:
            self._answering[selection] = asyncio.ensure_future(self._answer_all(selection))

    async def _answer_all(self, selection: int) -> None:
        requests = self._requests[selection]
        try:
            while requests and self._link is not None:
                try:
                    await self._answer(self._link, requests.popleft())
                except Exception as error:
                    self._on_trouble(error)
        finally:
            # Here and not in a callback of the task: a request that came between would wait.
            if self._answering.get(selection) is asyncio.current_task():
                del self._answering[selection]

    async def _answer(self, link: AgentLink, request: ClipboardRequest) -> None:
        source = self.owned(request.selection).get(request.type)
        try:
            if source is None:
                await link.send(Clipboard(request.selection, ClipboardType.NONE))
            elif isinstance(source, bytes):
                await self._send_data(link, request, len(source), pieces_of(source))
            elif isinstance(source, StreamSource):
                await self._send_data(link, request, source.size, source.open())
            else:
                await self._forward(link, request, source)
        except AgentGoneError:
            return

    async def _forward(
        self, link: AgentLink, request: ClipboardRequest, source: ForwardedSource
    ) -> None:
        spool: Spool | None = None
        try:
            try:
                async with source.asked() as answer:
                    spool = Spool(source.room, answer.size, "clipboard data")
                    async for piece in answer.pieces(source.timeout):
                        spool.feed(piece)
                        if spool.error is not None:
                            raise spool.error
            except AgentError as error:
                if not isinstance(error, ClipboardEmptyError):
                    what = f"clipboard {request.selection} could not be pasted"
                    self._on_trouble(AgentError(f"{what}: {error}"))
                await link.send(Clipboard(request.selection, ClipboardType.NONE))
                return
            await self._send_data(link, request, spool.size, spool.pieces())
        finally:
            if spool is not None:
                spool.close()

    async def _send_data(
        self, link: AgentLink, request: ClipboardRequest, size: int, data: AsyncIterator[Buffer]
    ) -> None:
        if self.remote_most != ANY_SIZE and size > self.remote_most:
            await link.send(Clipboard(request.selection, ClipboardType.NONE))
        else:
            await link.send_body(Clipboard(request.selection, request.type), size, data)


def need_clipboard(capabilities: Capabilities, selection: int) -> None:
    """Raise AgentUnsupportedError unless these capabilities include this clipboard."""
    if Capability.CLIPBOARD_BY_DEMAND not in capabilities:
        raise AgentUnsupportedError("the agent has not announced CLIPBOARD_BY_DEMAND")
    if selection != Selection.CLIPBOARD and Capability.CLIPBOARD_SELECTION not in capabilities:
        raise AgentUnsupportedError("the agent has one clipboard only (no CLIPBOARD_SELECTION)")
