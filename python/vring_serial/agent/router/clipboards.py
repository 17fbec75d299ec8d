"""Clipboards that several ends share: whoever grabbed last owns one, the others paste from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from vring_serial.agent.channel.clipboard import ANY_SIZE, ClipboardChannel, ForwardedSource, Offer
from vring_serial.agent.channel.spool import SpoolRoom
from vring_serial.agent.events import (
    AgentEvent,
    AgentTrouble,
    ClipboardGrabbed,
    ClipboardReleased,
)
from vring_serial.agent.router.guest_files import FilesClient, GuestFileList, GuestFiles
from vring_serial.proto.agent import ClipboardType, Side

ANSWER_TIMEOUT = 30.0
"""Seconds for the owner of a clipboard to answer another end's request, and for the next part of a
long message."""


class ClipboardClient(FilesClient, Protocol):
    """A client that shares clipboards.

    Attributes:
        clipboard: the channel to it.
    """

    clipboard: ClipboardChannel


class SharedClipboards:
    """Offers what one end owns to all others on its behalf.

    Args:
        clients: those that are connected, as they are whenever something happens.
        files: the files that the guest sends, for lists of files.
        room: where long clipboards are kept until they are whole.
        emit: takes events of the agent's clipboards.

    Attributes:
        agent: the channel to the agent.
    """

    def __init__(
        self,
        clients: Sequence[ClipboardClient],
        files: GuestFiles,
        room: SpoolRoom,
        emit: Callable[[AgentEvent], None],
    ) -> None:
        self._clients = clients
        self._files = files
        self._room = room
        self._emit = emit
        self.agent = ClipboardChannel(
            Side.HOST,
            on_grab=lambda selection, types: self.offer_to_others(self.agent, selection, types),
            on_release=lambda selection: self.release_to_others(self.agent, selection),
            on_trouble=lambda error: emit(AgentTrouble(error)),
            most=ANY_SIZE,
        )

    def offer_to_others(
        self, owner: ClipboardChannel, selection: int, types: tuple[int, ...]
    ) -> None:
        """Offer a clipboard, which this end owns now in these types, to all others."""
        if owner is not self.agent:
            self.agent.offer(selection, self._offer(owner, selection, types, None))
        for client in self._clients:
            if client.clipboard is not owner:
                client.clipboard.offer(selection, self._offer(owner, selection, types, client))
        if owner is self.agent:
            self._emit(ClipboardGrabbed(selection, types))

    def release_to_others(self, owner: ClipboardChannel, selection: int) -> None:
        """Tell all others that this end gave up a clipboard, or left with it."""
        for channel in self._channels():
            if channel is not owner:
                channel.release(selection)
        if owner is self.agent:
            self._emit(ClipboardReleased(selection))

    def offer_all_to(self, client: ClipboardClient) -> None:
        """Offer a newcomer whatever the others own."""
        for owner in self._channels():
            if owner is not client.clipboard:
                for selection, types in owner.remote_types.items():
                    client.clipboard.offer(selection, self._offer(owner, selection, types, client))

    def _channels(self) -> Iterable[ClipboardChannel]:
        return [self.agent, *(client.clipboard for client in self._clients)]

    def _offer(
        self,
        owner: ClipboardChannel,
        selection: int,
        types: tuple[int, ...],
        client: ClipboardClient | None,
    ) -> Offer:
        """Return what one end owns, for another, which is the agent if it is no client."""
        offer: dict[int, ForwardedSource] = {
            kind: ForwardedSource(owner, selection, kind, ANSWER_TIMEOUT, self._room)
            for kind in types
        }
        if owner is self.agent and client is not None and ClipboardType.FILE_LIST in offer:
            offer[ClipboardType.FILE_LIST] = GuestFileList(
                owner,
                selection,
                ClipboardType.FILE_LIST,
                ANSWER_TIMEOUT,
                self._room,
                self._files,
                client,
            )
        return offer
