"""Several clients on one agent.

The agent has one channel and believes in one client. The router is that client, and towards every
client of its own it is an agent:

    agent ══ AgentLink(HOST) ── router ──┬── AgentLink(GUEST) ══ client (a HostAgent, `vring agent`)
                                         └── AgentLink(GUEST) ══ client

Every client sees the agent's capabilities. A clipboard belongs to whoever grabbed it last, and all
others can paste from there. Transfers get numbers of the router's own, so that two clients may use
the same one, and a client that leaves ends its own transfers only. Answers go to who asked. What
the filter forbids passes in neither direction.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from vring_serial.agent.clipboard import ANY_SIZE, ClipboardChannel, ForwardedSource
from vring_serial.agent.errors import AgentError, AgentGoneError
from vring_serial.agent.events import (
    AgentEvent,
    AgentGone,
    AgentReady,
    AgentTrouble,
    ClipboardGrabbed,
    ClipboardReleased,
    OtherMessage,
)
from vring_serial.agent.host import HOST_CAPABILITIES
from vring_serial.agent.link import AgentLink, BodySink
from vring_serial.proto.agent import (
    FILES_FROM_GUEST,
    AgentFilter,
    AgentProtocolError,
    AnnounceCapabilities,
    Buffer,
    Capabilities,
    Capability,
    ChunkPort,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MaxClipboard,
    Message,
    MessageType,
    Reply,
    ReplyError,
    Side,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
)
from vring_serial.proto.agent.constants import FILE_DATA_MAX

CLIENTS_MAX = 64
"""Clients at once; more are turned away."""
CLIENT_TRANSFERS_MAX = 128
"""Transfers of one client at once, as many as a Linux agent takes."""
CLIENT_QUEUE_BYTES = 512 << 10
"""Bytes of a client that may wait for the agent before the client is no longer read."""
CLIENT_STALL = 30.0
"""Seconds for which a client may leave what it is sent unread, as in the SPICE server."""
ANSWER_TIMEOUT = 30.0
"""Seconds for the owner of a clipboard to answer another end's request."""
REPLIES_MAX = 256
"""REPLYs of the agent that may be outstanding."""

_ID_MAX = 0xFFFFFFFF
_ANSWERED = (MessageType.MONITORS_CONFIG, MessageType.DISPLAY_CONFIG)


class AgentRouter:
    """Shares one agent between clients.

    Connect the agent's side with ``ProtocolEnd(router.protocol_factory)`` or any asyncio transport,
    and clients with ``loop.create_unix_server(router.client_factory, path)`` or :meth:`connect`.

    Args:
        filter: what is allowed; by default everything.
        capabilities: what the router announces to the agent, before the filter.
        on_event: called with what happens on the agent's side.

    Attributes:
        capabilities: what the agent announced, after the filter, or None while there is none.
        clients: those that are connected.
    """

    def __init__(
        self,
        *,
        filter: AgentFilter = AgentFilter(),  # noqa: B008 - frozen
        capabilities: Capabilities = HOST_CAPABILITIES,
        on_event: Callable[[AgentEvent], None] | None = None,
    ) -> None:
        self.filter = filter
        self.capabilities: Capabilities | None = None
        self.clients: list[RouterClient] = []
        self._announced = filter.rewrite(capabilities)
        self._on_event = on_event
        self._link: AgentLink | None = None
        self._asked = False
        self._replies: dict[int, deque[RouterClient]] = {kind: deque() for kind in _ANSWERED}
        self._transfers: dict[int, tuple[RouterClient, int]] = {}
        self._last_id = 0
        self.clipboard = ClipboardChannel(
            Side.HOST,
            on_grab=lambda selection, types: self.grabbed(self.clipboard, selection, types),
            on_release=lambda selection: self.released(self.clipboard, selection),
            on_trouble=lambda error: self.emit(AgentTrouble(error)),
            most=ANY_SIZE,
        )

    def protocol_factory(self) -> asyncio.Protocol:
        """A protocol for one connection to the agent; a new one replaces the one before."""
        return AgentLink(Side.HOST, self)

    def client_factory(self) -> asyncio.Protocol:
        """A protocol for one connection of a client, to which the router is the agent."""
        return RouterClient(self).link

    async def connect(self, client_factory: Callable[[], asyncio.Protocol]) -> None:
        """Connect a client of this process, such as ``HostAgent().protocol_factory``."""
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        await loop.create_connection(self.client_factory, sock=ours)
        await loop.create_connection(client_factory, sock=theirs)

    async def send(self, message: Message) -> None:
        """Send a message of the server's own, such as MouseState or GraphicsDeviceInfo.

        What the agent answers is an OtherMessage event. Raises AgentGoneError.
        """
        if self._link is None:
            raise AgentGoneError("no agent is connected")
        await self._link.send(message, ChunkPort.SERVER)

    async def close(self) -> None:
        """Close all connections and end what runs on them."""
        if self._link is not None:
            self._link.close()
        for client in list(self.clients):
            client.link.close()
            await client.close()
        await self.clipboard.close()

    # --- for the clients

    def emit(self, event: AgentEvent) -> None:
        """Tell an event."""
        if self._on_event is not None:
            self._on_event(event)

    def client_came(self, client: RouterClient) -> bool:
        """Whether the client is admitted; it is told of the agent if there is one."""
        if len(self.clients) >= CLIENTS_MAX:
            return False
        self.clients.append(client)
        if self.capabilities is not None:
            client.announce(self.capabilities, request=True)
        return True

    def client_left(self, client: RouterClient) -> None:
        """Forget the client; what it had begun is ended, what others do is not touched."""
        self.clients.remove(client)
        for number, (owner, _) in list(self._transfers.items()):
            if owner is client:
                del self._transfers[number]
                if self._link is not None:
                    self._link.post(FileXferStatus(number, FileXferResult.CANCELLED))

    async def to_agent(self, client: RouterClient, message: TypedMessage | UnknownMessage) -> None:
        """Send a client's message to the agent, when the agent takes it."""
        link = self._link
        if link is None or self.capabilities is None:
            return
        if isinstance(message, (FileXferStart, FileXferData, FileXferStatus)):
            renumbered = self._renumber(client, message)
            if renumbered is None:
                return
            message = renumbered
        waiting = self._replies.get(message.type_number)
        if waiting is not None and Capability.REPLY in self.capabilities:
            if len(waiting) >= REPLIES_MAX:
                client.link.post(Reply(message.type_number, ReplyError.ERROR))
                return
        else:
            waiting = None
        try:
            await link.send(message)
        except AgentGoneError:
            return
        if waiting is not None:
            # Only now, for who leaves while the message waits for its turn has asked nothing.
            waiting.append(client)

    def _renumber(
        self, client: RouterClient, message: FileXferStart | FileXferData | FileXferStatus
    ) -> FileXferStart | FileXferData | FileXferStatus | None:
        """The message with the router's number for the transfer; None if there is none."""
        number = client.transfers.get(message.id)
        if isinstance(message, FileXferStart):
            if number is not None or len(client.transfers) >= CLIENT_TRANSFERS_MAX:
                client.link.post(FileXferStatus(message.id, FileXferResult.ERROR))
                return None
            self._last_id = number = self._last_id % _ID_MAX + 1
            client.transfers[message.id] = number
            self._transfers[number] = (client, message.id)
            return FileXferStart(number, message.info)
        if number is None:
            return None
        if isinstance(message, FileXferData):
            return FileXferData(number, message.data)
        self._end_transfer(number)
        return FileXferStatus(number, message.result, message.detail)

    def _end_transfer(self, number: int) -> None:
        client, theirs = self._transfers.pop(number)
        del client.transfers[theirs]

    # --- clipboards

    def grabbed(self, owner: ClipboardChannel, selection: int, types: tuple[int, ...]) -> None:
        """One end owns a clipboard: offer it to all others on its behalf."""
        offer = {kind: ForwardedSource(owner, selection, kind, ANSWER_TIMEOUT) for kind in types}
        for channel in self._channels():
            if channel is not owner:
                channel.offer(selection, offer)
        if owner is self.clipboard:
            self.emit(ClipboardGrabbed(selection, types))

    def released(self, owner: ClipboardChannel, selection: int) -> None:
        """One end gave up a clipboard, or left with it."""
        for channel in self._channels():
            if channel is not owner:
                channel.release(selection)
        if owner is self.clipboard:
            self.emit(ClipboardReleased(selection))

    def _channels(self) -> list[ClipboardChannel]:
        return [self.clipboard, *(client.clipboard for client in self.clients)]

    def offer_all(self, channel: ClipboardChannel) -> None:
        """Tell a newcomer who owns what."""
        for owner in self._channels():
            if owner is not channel:
                for selection, types in owner.remote_types.items():
                    channel.offer(
                        selection,
                        {k: ForwardedSource(owner, selection, k, ANSWER_TIMEOUT) for k in types},
                    )

    # --- LinkOwner, the agent's side

    def link_up(self, link: AgentLink) -> None:
        if self._link is not None and self._link is not link:
            self._link.fail(AgentError("another connection took over the agent channel"))
        self._link = link
        self._begin_session(link)

    def _begin_session(self, link: AgentLink) -> None:
        self.clipboard.begin_session(link)
        self._forget()
        self._asked = True
        link.post(AnnounceCapabilities(True, self._announced))

    def _forget(self) -> None:
        """The agent knows no transfer and owes no reply any more."""
        for waiting in self._replies.values():
            waiting.clear()
        for number in list(self._transfers):
            client, theirs = self._transfers[number]
            self._end_transfer(number)
            client.link.post(FileXferStatus(theirs, FileXferResult.CANCELLED))

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        if link is not self._link:
            return
        self._link = None
        self.capabilities = None
        self.clipboard.end_session()
        self._forget()
        self.emit(AgentGone(str(reason) if reason else ""))
        for client in list(self.clients):
            client.link.close()

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        if link is not self._link or not self.filter.passes(message.type_number):
            return
        if port == ChunkPort.SERVER:
            self.emit(OtherMessage(message))  # an answer to a message of our own, not a client's
            return
        match message:
            case AnnounceCapabilities():
                self._took_capabilities(link, message)
            case ClipboardGrab() | ClipboardRelease() | ClipboardRequest() | Clipboard():
                self.clipboard.took(message)
            case FileXferStatus():
                self._took_status(message)
            case Reply() if message.to in self._replies:
                if self._replies[message.to]:
                    self._replies[message.to].popleft().link.post(message)
            case _:
                for client in self.clients:
                    client.link.post(message)

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        is_client_data = link is self._link and port == ChunkPort.CLIENT
        if is_client_data and isinstance(head, Clipboard) and self.filter.copy_paste:
            return self.clipboard.took_head(head, size)
        return None

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        self.emit(AgentTrouble(error))

    def _took_capabilities(self, link: AgentLink, message: AnnounceCapabilities) -> None:
        if message.request and not self._asked:
            self._begin_session(link)
        elif message.request:
            link.post(AnnounceCapabilities(False, self._announced))
        else:
            self._asked = False
        before = self.capabilities
        # Files from the guest would go to whoever asked, which a transfer does not say.
        self.capabilities = self.filter.rewrite(message.capabilities).without(FILES_FROM_GUEST)
        self.clipboard.announce()
        if self.capabilities != before or message.request:
            self.emit(AgentReady(self.capabilities))
            for client in self.clients:
                client.announce(self.capabilities, request=True)

    def _took_status(self, status: FileXferStatus) -> None:
        if status.id not in self._transfers:
            return
        client, theirs = self._transfers[status.id]
        if status.result != FileXferResult.CAN_SEND_DATA:
            self._end_transfer(status.id)
        client.link.post(FileXferStatus(theirs, status.result, status.detail))


class RouterClient:
    """One client of a router.

    Attributes:
        link: the connection, on which we are the agent.
        capabilities: what the client announced, or None.
        transfers: the client's numbers of transfers, and the router's for each.
    """

    def __init__(self, router: AgentRouter) -> None:
        self.link = AgentLink(Side.GUEST, self, stall_timeout=CLIENT_STALL)
        self.capabilities: Capabilities | None = None
        self.transfers: dict[int, int] = {}
        self._router = router
        self._admitted = False
        self._queue: deque[TypedMessage | UnknownMessage] = deque()
        self._queued = 0
        self._held = False
        self._forwarding: asyncio.Task[None] | None = None
        self.clipboard = ClipboardChannel(
            Side.GUEST,
            on_grab=lambda selection, types: router.grabbed(self.clipboard, selection, types),
            on_release=lambda selection: router.released(self.clipboard, selection),
            on_trouble=lambda error: router.emit(AgentTrouble(error)),
            most=ANY_SIZE,
        )

    async def close(self) -> None:
        """End what runs for this client."""
        await self.clipboard.close()
        if (forwarding := self._forwarding) is not None:
            forwarding.cancel()
            await asyncio.gather(forwarding, return_exceptions=True)
            self._forwarding = None  # a task that never ran has not said so

    def announce(self, capabilities: Capabilities, *, request: bool) -> None:
        """Tell the client what the agent can do."""
        self.link.post(AnnounceCapabilities(request, capabilities))

    # --- LinkOwner

    def link_up(self, link: AgentLink) -> None:
        self.clipboard.begin_session(link)
        self._admitted = self._router.client_came(self)
        if not self._admitted:
            link.fail(AgentError(f"the agent has {CLIENTS_MAX} clients already"))

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        self.clipboard.end_session()
        self.clipboard.stop_answering()
        self._queue.clear()
        if self._forwarding is not None:
            # It may wait for an agent that does not read, and clients come and go meanwhile.
            self._forwarding.cancel()
        if self._admitted:
            self._router.client_left(self)

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        if not self._admitted or not self._router.filter.passes(message.type_number):
            return
        match message:
            case AnnounceCapabilities():
                self._took_capabilities(message)
            case ClipboardGrab() | ClipboardRelease() | ClipboardRequest() | Clipboard():
                self.clipboard.took(message)
            case MaxClipboard():
                self.clipboard.remote_most = max(message.max, ANY_SIZE)
            case _:
                self._forward(message)

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        if not self._router.filter.passes(head.type_number):
            return None
        if isinstance(head, Clipboard):
            return self.clipboard.took_head(head, size)
        if isinstance(head, FileXferData):
            return _DataPieces(head.id, self._forward)
        return None

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        self._router.emit(AgentTrouble(error))

    def _took_capabilities(self, message: AnnounceCapabilities) -> None:
        self.capabilities = message.capabilities
        if message.request:
            self.clipboard.begin_session(self.link)
            if self._router.capabilities is not None:
                self.announce(self._router.capabilities, request=False)
        if not self.clipboard.announced:
            self._router.offer_all(self.clipboard)
            self.clipboard.announce()

    # --- on the way to the agent

    def _forward(self, message: TypedMessage | UnknownMessage) -> None:
        """Queue a message; the client is not read while too much of it waits."""
        self._queue.append(message)
        self._queued += _cost(message)
        if self._queued > CLIENT_QUEUE_BYTES and not self._held:
            self._held = True
            self.link.hold_reading()
        if self._forwarding is None:
            self._forwarding = asyncio.ensure_future(self._forward_all())

    async def _forward_all(self) -> None:
        try:
            while self._queue:
                message = self._queue.popleft()
                await self._router.to_agent(self, message)
                self._queued -= _cost(message)
                if self._held and self._queued <= CLIENT_QUEUE_BYTES // 2:
                    self._held = False
                    self.link.release_reading()
        finally:
            # Here and not in a callback of the task: a message queued between the two would wait.
            self._forwarding = None


def _cost(message: TypedMessage | UnknownMessage) -> int:
    """About how many bytes a queued message keeps."""
    text = len(message.info) if isinstance(message, FileXferStart) else 0
    return 256 + text + len(message.payload)


class _DataPieces:
    """Turns a FILE_XFER_DATA message that is too long to keep into several shorter ones."""

    def __init__(self, number: int, forward: Callable[[FileXferData], None]) -> None:
        self._number = number
        self._forward = forward

    def feed(self, data: Buffer) -> None:
        view = memoryview(data)
        for start in range(0, len(view), FILE_DATA_MAX):
            self._forward(FileXferData(self._number, view[start : start + FILE_DATA_MAX]))

    def end(self, complete: bool) -> None:
        """Every piece has been handed on already."""
