"""One client of an AgentRouter, to which the router is the agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from vring_serial.agent.channel.clipboard import ANY_SIZE, ClipboardChannel
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.errors import AgentError
from vring_serial.agent.events import AgentEvent, AgentTrouble
from vring_serial.agent.router.clipboards import ANSWER_TIMEOUT, SharedClipboards
from vring_serial.agent.router.relay import DataPieces, Passing, Relay
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
    ClientDisconnected,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    DisplayConfig,
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MaxClipboard,
    MonitorsConfig,
    Reply,
    ReplyError,
    Side,
    StreamedMessage,
    TypedMessage,
    UnknownMessage,
)

CLIENT_STALL = 30.0
"""Seconds for which a client may leave what it is sent unread, as in the SPICE server."""
TURNED_AWAY_WAIT = 1.0
"""Seconds for which a client that finds no room may read that it is so."""


class ClientsRouter(Protocol):
    """What a client needs of its router.

    Attributes:
        filter: what is allowed.
        clients: those that are connected.
        clipboards: what all ends share.
    """

    filter: AgentFilter
    clients: list[RouterClient]
    clipboards: SharedClipboards

    @property
    def agent_link(self) -> AgentLink | None:
        """The connection to the agent, if there is one."""

    def emit(self, event: AgentEvent) -> None:
        """Pass an event to whoever listens."""

    def client_came(self, client: RouterClient) -> bool:
        """Admit a client, and tell it of the agent if there is one; return whether it may stay."""

    def may_linger(self, client: RouterClient) -> bool:
        """Return whether a client that found no room may stay until it has read that."""

    def client_left(self, client: RouterClient) -> None:
        """Forget the client; what it had begun is ended, what others do is not touched."""

    def end_work_of(self, client: RouterClient) -> None:
        """End what the client had begun."""

    def introduce(self, client: RouterClient, *, request: bool) -> None:
        """Tell a client what the agent can do, or that there is none."""

    async def to_agent(self, client: RouterClient, passing: Passing) -> None:
        """Send a client's message to the agent, when the agent takes it."""

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


class RouterClient:
    """One client of a router.

    Args:
        router: whose.
        is_server: it is a SPICE server, which has a client of its own and gets what the agent says
            to a server.

    Attributes:
        link: the connection, on which we are the agent.
        capabilities: what the client announced, or None.
        transfers: the client's numbers of transfers, and the router's for each.
        has_spoken: a whole message came from it.
        relay: messages from the agent that may be many or long.
        forwarding: messages to the agent.
        gone: set when the connection has ended.
    """

    def __init__(self, router: ClientsRouter, *, is_server: bool = False) -> None:
        # A SPICE server looks after slow clients itself.
        self.link = AgentLink(Side.GUEST, self, stall_timeout=None if is_server else CLIENT_STALL)
        self.is_server = is_server
        self.capabilities: Capabilities | None = None
        self.transfers: dict[int, int] = {}
        self.has_spoken = False
        self.gone = asyncio.Event()
        self._router = router
        self._admitted = False
        self._last_told = Capabilities()

        def trouble(error: BaseException) -> None:
            router.emit(AgentTrouble(error))

        self.relay = Relay(
            lambda passing: passing.send(self.link),
            trouble,
            taker=self.link,
            is_shared=lambda: len(router.clients) > 1,
        )
        self.forwarding = Relay(lambda passing: router.to_agent(self, passing), trouble)
        self.clipboard = ClipboardChannel(
            Side.GUEST,
            on_grab=lambda selection, types: router.clipboards.offer_to_others(
                self.clipboard, selection, types
            ),
            on_release=lambda selection: router.clipboards.release_to_others(
                self.clipboard, selection
            ),
            on_trouble=trouble,
            most=ANY_SIZE,
        )

    async def aclose(self) -> None:
        """End what runs for this client."""
        async with contextlib.AsyncExitStack() as stack:  # each, also if this is cancelled
            stack.push_async_callback(self.relay.aclose)
            stack.push_async_callback(self.forwarding.aclose)
            stack.push_async_callback(self.clipboard.aclose)

    # --- what the router tells it

    def announce(self, capabilities: Capabilities, *, request: bool) -> None:
        """Tell the client what the agent can do; to ask it for the same begins its session anew.

        Only the last of many announcements is sent.
        """
        if request:
            self.clipboard.begin_session(self.link)
        self._last_told = capabilities
        self.link.post_latest(
            ("announce", request), lambda: AnnounceCapabilities(request, self._last_told)
        )

    def status(self, status: FileXferStatus) -> None:
        """Tell how a transfer goes on, in the words that the client knows."""
        if not self._has(Capability.FILE_XFER_DETAILED_ERRORS):
            newer = status.result > FileXferResult.SUCCESS
            status = FileXferStatus(status.id, FileXferResult.ERROR if newer else status.result)
        self.link.post(status)

    def refuse(self, message: TypedMessage | UnknownMessage, port: ChunkPort) -> None:
        """Answer for an agent that is not there or cannot take more."""
        match message:
            case FileXferStart():
                self.status(FileXferStatus(message.id, FileXferResult.VDAGENT_NOT_CONNECTED))
            case MonitorsConfig() | DisplayConfig():
                self.link.post(Reply(message.type_number, ReplyError.ERROR), port)

    @property
    def takes_files(self) -> bool:
        """Return whether the client has announced FILES_FROM_GUEST."""
        return self._has(FILES_FROM_GUEST)

    def file_from_guest(self, message: FileXferStart | FileXferData | FileXferStatus) -> None:
        """Queue a message of a transfer from the guest for the client; drop it without an agent."""
        if (source := self._router.agent_link) is not None:
            self.relay.put(source, Passing(message))

    def _has(self, capability: int) -> bool:
        return self.capabilities is not None and capability in self.capabilities

    # --- LinkOwner

    def link_up(self, link: AgentLink) -> None:
        """Ask the router to admit the client; one that it refuses is told so and disconnected."""
        self.clipboard.begin_session(link)
        self._admitted = self._router.client_came(self)
        if not self._admitted:
            self._turn_away()

    def _turn_away(self) -> None:
        """Say why, and leave the client a moment to read it: what it writes to a socket that is
        closed would take that from it.
        """
        self.link.post(AnnounceCapabilities(False, Capabilities.of(AGENT_AWAY, AGENT_FULL)))
        wait = TURNED_AWAY_WAIT if self._router.may_linger(self) else 0
        asyncio.get_running_loop().call_later(wait, self.link.close)

    def link_down(self, link: AgentLink, reason: Exception | None) -> None:
        """End what the client began, drop what waits for it, and take it out of the router."""
        self.clipboard.end_session()
        self.clipboard.stop_answering()
        # They may wait for an end that does not read, and clients come and go meanwhile.
        self.forwarding.stop()
        self.relay.stop()
        if self._admitted and reason is not None:
            self._router.emit(AgentTrouble(AgentError(f"a client was lost: {reason}")))
        self._router.client_left(self)
        self.gone.set()

    def link_message(
        self, link: AgentLink, port: int, message: TypedMessage | UnknownMessage
    ) -> None:
        """Pass a message of the client on, unless it was not admitted or the filter stops it."""
        if not self._admitted:
            return
        self.has_spoken = True
        if self._router.filter.passes(message.type_number):
            self._receive(port, message)
        agent = self._router.agent_link
        if agent is not None:
            agent.hold_while_crowded(link)

    def _receive(self, port: int, message: TypedMessage | UnknownMessage) -> None:
        if isinstance(message, ClientDisconnected):
            self._servers_client_left()
            return
        if port == ChunkPort.SERVER:
            self._forward(message, ChunkPort.SERVER)
            return
        match message:
            case AnnounceCapabilities():
                self._receive_capabilities(message)
            case ClipboardGrab() | ClipboardRelease() | ClipboardRequest() | Clipboard():
                self.clipboard.receive(message)
            case MaxClipboard():
                self.clipboard.remote_most = max(message.max, ANY_SIZE)
            case _:
                self._forward(message)

    def link_body(
        self, link: AgentLink, port: int, head: StreamedMessage, size: int
    ) -> BodySink | None:
        """Return what takes the payload of a long message; None discards it.

        None for a client that was not admitted, and for a type that the filter stops.
        """
        if not self._admitted or not self._router.filter.passes(head.type_number):
            return None
        self.has_spoken = True
        if isinstance(head, UnknownMessage):
            return self._router.spool(
                head, size, ChunkPort(port), self._take_long, idle=ANSWER_TIMEOUT
            )
        if isinstance(head, Clipboard):
            return self.clipboard.begin_data(head, size)
        return DataPieces(head.id, self._forward)

    def _take_long(self, passing: Passing) -> None:
        self.forwarding.put(self.link, passing)

    def link_trouble(self, link: AgentLink, error: AgentProtocolError) -> None:
        """Pass a wrong message of the client to ``on_event``."""
        self._router.emit(AgentTrouble(error))

    def _receive_capabilities(self, message: AnnounceCapabilities) -> None:
        self.capabilities = message.capabilities
        if message.request:
            self.clipboard.begin_session(self.link)
            self._router.introduce(self, request=False)
        if not self.clipboard.has_told:
            self._router.clipboards.offer_all_to(self)
            self.clipboard.tell_owned()

    def _servers_client_left(self) -> None:
        """End what the client behind a SPICE server began: it left, and another may come."""
        self.forwarding.clear()
        self._router.end_work_of(self)
        self.capabilities = None
        self.clipboard.begin_session(self.link)

    def _forward(
        self, message: TypedMessage | UnknownMessage, port: ChunkPort = ChunkPort.CLIENT
    ) -> None:
        self.forwarding.put(self.link, Passing(message, port))
