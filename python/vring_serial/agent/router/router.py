"""Several clients on one agent.

The agent has one channel and believes in one client. The router is that client, and towards every
client of its own it is an agent:

    agent ══ AgentLink(HOST) ── router ──┬── AgentLink(GUEST) ══ client (a HostAgent, `vring agent`)
                                         ├── AgentLink(GUEST) ══ client
                                         └── AgentLink(GUEST) ══ SPICE server ══ its own client

Every client sees the agent's capabilities. A clipboard belongs to whoever grabbed it last, and all
others can paste from there. Transfers get numbers of the router's own, so that two clients may use
the same one, and a client that leaves ends its own transfers only. Answers go to who asked. What
the filter forbids passes in neither direction. What a client says on the server's chunk port
reaches the agent there, except that its client left: that concerns nobody else.

No end waits for the slowest of the others: what is long is received whole before it is passed on,
of states only the last is told, and a client that keeps the agent's channel from being read is
given up (decision 13).

When the agent goes, clients keep their channel and are told so: AGENT_AWAY is announced, and the
agent's capabilities again once it is back. A SPICE server is disconnected and connected instead,
which is how it knows that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.agent.channel.handshake import Handshake
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.replies import Replies
from vring_serial.agent.channel.spool import Spool, SpoolRoom
from vring_serial.agent.errors import AgentError, AgentGoneError
from vring_serial.agent.events import (
    AgentEvent,
    AgentGone,
    AgentReady,
    AgentTrouble,
    OtherMessage,
)
from vring_serial.agent.host_capabilities import HOST_CAPABILITIES
from vring_serial.agent.router.client import RouterClient
from vring_serial.agent.router.clipboards import SharedClipboards
from vring_serial.agent.router.guest_files import GuestFiles
from vring_serial.agent.router.relay import DataPieces, Passing
from vring_serial.agent.router.servers import ServerConnections
from vring_serial.agent.router.transfers import ClientTransfers
from vring_serial.callbacks import Listener, tell
from vring_serial.lifetime import Ending
from vring_serial.proto.agent import (
    AGENT_AWAY,
    AGENT_FULL,
    FILES_FROM_GUEST,
    AgentFilter,
    AgentProtocolError,
    AnnounceCapabilities,
    Capabilities,
    Capability,
    ChunkPort,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    FileXferData,
    FileXferStart,
    FileXferStatus,
    Message,
    MessageType,
    Reply,
    ReplyError,
    Side,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
)
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

CLIENTS_MAX = 64
"""Clients at once; more are turned away."""
REPLIES_MAX = 256
"""REPLYs of the agent that may be outstanding."""

_ANSWERED = (MessageType.MONITORS_CONFIG, MessageType.DISPLAY_CONFIG)
_LAYOUT = (Capability.CLIPBOARD_SELECTION, Capability.CLIPBOARD_GRAB_SERIAL)


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """What an AgentRouter is busy with at one moment; an idle one has 0 of each.

    Attributes:
        transfers: files on their way from clients to the agent.
        guest_transfers: files on their way from the guest to a client.
        spooled: bytes of long messages that are kept until they are whole and passed on.
    """

    transfers: int
    guest_transfers: int
    spooled: int


class AgentRouter(Ending):
    """Shares one agent between clients.

    Connect the agent's side with ``ProtocolEnd(router.protocol_factory)`` or any asyncio transport,
    and clients with ``loop.create_unix_server(router.client_factory, path)``, :meth:`connect` or
    :meth:`connect_server`.

    Args:
        filter: what is allowed; by default everything.
        capabilities: what the router announces to the agent, before the filter.
        on_event: called with what happens on the agent's side.

    Attributes:
        capabilities: what the agent announced, after the filter, or None while there is none.
        clients: those that are connected.
        turned_away: those that found no room, while they are told so.
        guest_files: the transfers that the guest began.
        clipboards: what all ends share.
        on_event: the same function, or None. One listener at a time: setting another one raises
            LocalProtocolError, None removes it.
    """

    on_event = Listener[Callable[[AgentEvent], None]]()

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
        self.turned_away: set[RouterClient] = set()
        self.guest_files = GuestFiles(self._post_status)
        self.on_event = on_event
        self._log = RateLimitedLog(log)
        self._handshake = Handshake(filter.rewrite(capabilities))
        self._away = Capabilities.of(AGENT_AWAY)
        self._replies: dict[tuple[int, int], Replies[RouterClient | None]] = {
            (port, kind): Replies() for port in ChunkPort for kind in _ANSWERED
        }
        self._transfers = ClientTransfers(self._post_status)
        self._room = SpoolRoom()
        self._servers = ServerConnections(self._connect_server, self._log)
        self._is_closed = False
        self.clipboards = SharedClipboards(self.clients, self.guest_files, self._room, self.emit)

    @property
    def load(self) -> RouterLoad:
        """What the router is busy with now."""
        return RouterLoad(len(self._transfers.open), self.guest_files.under_way, self._room.used)

    def protocol_factory(self) -> asyncio.Protocol:
        """Return a protocol for one connection to the agent; a new one replaces the one before."""
        return AgentLink(Side.HOST, self, is_patient=True)

    def client_factory(self) -> asyncio.Protocol:
        """Return a protocol for one connection of a client, to which the router is the agent."""
        return RouterClient(self).link

    async def connect(self, client_factory: Callable[[], asyncio.Protocol]) -> None:
        """Connect a client of this process, such as ``HostAgent().protocol_factory``."""
        await self._connect(RouterClient(self), client_factory)

    def connect_server(self, device: asyncio.Protocol, closed: asyncio.Event) -> None:
        """Have a SPICE server as a client: connected while the agent is there, and only then.

        ``device`` is its side of one connection after another, and sets ``closed`` when it has lost
        one, as SpiceServer.agent_device does.
        """
        self._servers.add(device, closed)

    async def send(self, message: Message) -> None:
        """Send a message of the server's own, such as MouseState or GraphicsDeviceInfo.

        What the agent answers is an OtherMessage event. Raises AgentGoneError.
        """
        link = self.agent_link
        if link is None:
            raise AgentGoneError("no agent is connected")
        replies = self._replies.get((ChunkPort.SERVER, message.type_number))
        if replies is None:
            await link.send(message, ChunkPort.SERVER)
        else:
            await replies.ask(None, lambda: link.send(message, ChunkPort.SERVER))

    async def aclose(self) -> None:
        """Close all connections and end what runs on them."""
        self._is_closed = True
        self._servers.stop()
        if self.agent_link is not None:
            self.agent_link.close()
        clients = list(self.clients)
        for client in (*clients, *self.turned_away):
            client.link.close()
        async with contextlib.AsyncExitStack() as stack:  # each, also if this is cancelled
            stack.push_async_callback(self.clipboards.agent.aclose)
            for client in clients:
                stack.push_async_callback(client.aclose)
            await self._servers.wait_stopped()

    async def _connect_server(self, device: asyncio.Protocol) -> RouterClient:
        client = RouterClient(self, is_server=True)
        await self._connect(client, lambda: device)
        return client

    async def _connect(self, client: RouterClient, factory: Callable[[], asyncio.Protocol]) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            await loop.create_connection(lambda: client.link, sock=ours)
            await loop.create_connection(factory, sock=theirs)
        except BaseException:
            client.link.close()
            ours.close()
            theirs.close()
            raise

    # --- for the clients

    @property
    def agent_link(self) -> AgentLink | None:
        """The connection to the agent, if there is one."""
        return self._handshake.link

    def emit(self, event: AgentEvent) -> None:
        """Pass an event to ``on_event``."""
        tell(self._log, "on_event", self.on_event, event)

    def client_came(self, client: RouterClient) -> bool:
        """Admit a client, and tell it of the agent if there is one; return whether it may stay."""
        if client.is_server and self.agent_link is None:
            return False
        if len(self.clients) >= CLIENTS_MAX and not self._make_room():
            return False
        self.clients.append(client)
        self.introduce(client, request=True)
        return True

    def may_linger(self, client: RouterClient) -> bool:
        """Return whether a client that found no room may stay until it has read that."""
        if len(self.turned_away) >= CLIENTS_MAX:
            return False
        self.turned_away.add(client)
        return True

    def _make_room(self) -> bool:
        """End the oldest client that hung up or never sent a message; return whether one did."""
        for client in self.clients:
            if client.link.has_hung_up:
                why = "it hung up"
            elif not client.has_spoken and not client.is_server:
                why = "it said nothing, and others came"
            else:
                continue
            client.link.fail(AgentError(why))
            self.client_left(client)
            return True
        return False

    def introduce(self, client: RouterClient, *, request: bool) -> None:
        """Tell a client what the agent can do, or that there is none."""
        if self.capabilities is not None:
            client.announce(self.capabilities, request=request)
        elif not client.is_server:
            client.announce(self._away, request=False)

    def client_left(self, client: RouterClient) -> None:
        """Forget the client; what it had begun is ended, what others do is not touched."""
        self.turned_away.discard(client)
        if client in self.clients:
            self.clients.remove(client)
            self.end_work_of(client)

    def end_work_of(self, client: RouterClient) -> None:
        """End what the client had begun."""
        self._transfers.client_left(client)
        self.guest_files.client_left(client)

    def _post_status(self, status: FileXferStatus) -> None:
        if self.agent_link is not None:
            self.agent_link.post(status)

    def spool(
        self,
        head: UnknownMessage,
        size: int,
        port: ChunkPort,
        take: Callable[[Passing], None],
        *,
        idle: float | None,
    ) -> BodySink | None:
        """Keep a long message that arrives; ``take`` gets it when it is whole."""

        def ended(error: AgentError | None) -> None:
            if error is None:
                take(Passing(head, port, spool))
            else:
                self.emit(AgentTrouble(error))
                spool.close()

        try:
            what = f"a message of type {head.type}"
            spool = Spool(self._room, size, what, ended, idle=idle)
        except AgentError as error:
            self.emit(AgentTrouble(error))
            return None
        return spool

    async def to_agent(self, client: RouterClient, passing: Passing) -> None:
        """Send a client's message to the agent, when the agent takes it."""
        message = passing.message
        link = self.agent_link
        if link is None or self.capabilities is None:
            client.refuse(message, passing.port)
            return
        if isinstance(message, FileXferStart):
            await self._transfers.start(link, client, message)
            return
        if isinstance(message, (FileXferData, FileXferStatus)):
            renumbered = self._transfers.renumber(client, message)
            if renumbered is None:
                if isinstance(message, FileXferStatus):
                    self.guest_files.from_client(client, message)
                return
            passing = Passing(renumbered)
        replies = self._replies.get((passing.port, message.type_number))
        if replies is None or Capability.REPLY not in self.capabilities:
            await passing.send(link)
        elif len(replies) < REPLIES_MAX:
            await replies.ask(client, lambda: passing.send(link))
        else:
            client.refuse(message, passing.port)

    # --- LinkOwner, the agent's side

    def link_up(self, link: AgentLink) -> None:
        """Begin a session with the agent; a new link takes the place of an older one."""
        if link is not self.agent_link:
            if self.agent_link is not None:
                self._agent_left()
            self._handshake.link_up(link)
            self._servers.agent_came(link)
        self._begin_session(link)

    def _begin_session(self, link: AgentLink) -> None:
        self.clipboards.agent.begin_session(link)
        self._forget()
        self._handshake.ask()

    def _forget(self) -> None:
        """Forget transfers and replies: the agent knows none any more."""
        for (port, kind), replies in self._replies.items():
            for client in replies.clear():
                if client is not None:
                    client.link.post(Reply(kind, ReplyError.ERROR), ChunkPort(port))
        self._transfers.agent_left()
        self.guest_files.guest_left()

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        """Tell the clients that the agent is gone; an older link changes nothing."""
        if self._handshake.link_down(link):
            self._servers.agent_left()
            self._agent_left()
            self.emit(AgentGone(str(reason) if reason else ""))

    def _agent_left(self) -> None:
        """Tell all clients, each in its way."""
        if self.capabilities is not None:
            # The layout of messages that are on their way stays.
            kept = [number for number in _LAYOUT if number in self.capabilities]
            self._away = Capabilities.of(AGENT_AWAY, *kept)
        self.capabilities = None
        for client in list(self.clients):
            if client.is_server or self._is_closed:
                client.link.close()
            else:
                client.announce(self._away, request=False)
        self.clipboards.agent.end_session()
        self._forget()

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        """Pass a message of the agent to the client or clients that it is for.

        One of an older link, or of a type that the filter stops, is dropped.
        """
        if link is not self.agent_link or not self.filter.passes(message.type_number):
            return
        if isinstance(message, Reply) and (port, message.to) in self._replies:
            self._receive_reply(ChunkPort(port), message)
            return
        if port == ChunkPort.SERVER:
            self._pass_to_servers(link, message)
            return
        match message:
            case AnnounceCapabilities():
                self._receive_capabilities(link, message)
            case ClipboardGrab() | ClipboardRelease() | ClipboardRequest() | Clipboard():
                self.clipboards.agent.receive(message)
            case FileXferStart() | FileXferData():
                self.guest_files.from_guest(message)
            case FileXferStatus():
                self._receive_status(message)
            case _:
                for client in self.clients:
                    client.relay.put(link, Passing(message))

    def _pass_to_clients(self, passing: Passing) -> None:
        """Pass on a long message from the agent, which is whole."""
        assert passing.body is not None
        if self.agent_link is not None:
            for client in list(self.clients):
                if client.is_server or passing.port == ChunkPort.CLIENT:
                    shared = Passing(passing.message, passing.port, passing.body.share())
                    client.relay.put(self.agent_link, shared)
        passing.close()

    def _receive_reply(self, port: ChunkPort, message: Reply) -> None:
        client = self._replies[port, message.to].answered()
        if client is not None:
            client.link.post(message, port)
        elif port == ChunkPort.SERVER:
            self.emit(OtherMessage(message))

    def _pass_to_servers(self, link: AgentLink, message: TypedMessage | UnknownMessage) -> None:
        for client in self.clients:
            if client.is_server:
                client.relay.put(link, Passing(message, ChunkPort.SERVER))
        self.emit(OtherMessage(message))

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        """Return what takes the payload of a long message of the agent; None discards it.

        None for an older link, for a type that the filter stops, and for known types that the agent
        sends to the server.
        """
        if link is not self.agent_link or not self.filter.passes(head.type_number):
            return None
        if isinstance(head, UnknownMessage):
            return self.spool(head, size, ChunkPort(port), self._pass_to_clients, idle=None)
        if port == ChunkPort.SERVER:
            return None
        if isinstance(head, Clipboard):
            return self.clipboards.agent.begin_data(head, size)
        return DataPieces(head.id, self.guest_files.from_guest)

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        """Pass a wrong message of the agent to ``on_event``."""
        self.emit(AgentTrouble(error))

    def _receive_capabilities(self, link: AgentLink, message: AnnounceCapabilities) -> None:
        if self._handshake.receive(message):
            self._begin_session(link)
        before, local = self.capabilities, self._handshake.local
        self.capabilities = self.filter.rewrite(message.capabilities).without(
            AGENT_AWAY, AGENT_FULL
        )
        if not self.filter.file_xfer:
            self.capabilities = self.capabilities.without(FILES_FROM_GUEST)
        elif FILES_FROM_GUEST in self.capabilities and FILES_FROM_GUEST not in local:
            # No other agent is told of a capability that is ours alone.
            self._handshake.local = local.with_(FILES_FROM_GUEST)
            self._handshake.answer()
        self.clipboards.agent.tell_owned()
        if self.capabilities != before or message.request:
            self.emit(AgentReady(self.capabilities))
            for client in self.clients:
                client.announce(self.capabilities, request=True)

    def _receive_status(self, status: FileXferStatus) -> None:
        if not self.guest_files.from_guest(status):
            self._transfers.receive_status(status)
