"""Files from the clients of a router to the agent, which knows them by the router's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.agent.channel.files import FROM_GUEST
from vring_serial.agent.channel.link import AgentLink
from vring_serial.agent.router.client import RouterClient
from vring_serial.proto.agent import FileXferData, FileXferResult, FileXferStart, FileXferStatus

CLIENT_TRANSFERS_MAX = 128
"""Transfers of one client at once, as many as a Linux agent takes."""


@dataclass(slots=True)
class Transfer:
    """A file on its way from a client to the agent.

    Attributes:
        client: whose it is.
        number: the client's number for it.
        is_offered: its START has left for the agent.
        is_admitted: the agent asked for its data.
    """

    client: RouterClient
    number: int
    is_offered: bool = False
    is_admitted: bool = False


class ClientTransfers:
    """All transfers that the clients of one router have begun.

    Args:
        to_agent: sends a status to the agent.

    Attributes:
        open: those that have not ended, by the router's number.
    """

    def __init__(self, to_agent: Callable[[FileXferStatus], None]) -> None:
        self.open: dict[int, Transfer] = {}
        self._to_agent = to_agent
        self._last_number = 0

    async def start(self, link: AgentLink, client: RouterClient, message: FileXferStart) -> None:
        """Offer a client's file to the agent. Raises AgentGoneError."""
        if message.id in client.transfers or len(client.transfers) >= CLIENT_TRANSFERS_MAX:
            client.link.post(FileXferStatus(message.id, FileXferResult.ERROR))
            return
        self._last_number = number = self._last_number % (FROM_GUEST - 1) + 1
        client.transfers[message.id] = number
        self.open[number] = transfer = Transfer(client, message.id)
        try:
            await link.send(FileXferStart(number, message.info))
        except BaseException:
            if self.open.get(number) is transfer:
                self._end(number)
            raise
        transfer.is_offered = True

    def renumber(
        self, client: RouterClient, message: FileXferData | FileXferStatus
    ) -> FileXferData | FileXferStatus | None:
        """Return the message with the router's number of the transfer; None if there is none."""
        number = client.transfers.get(message.id)
        if number is None:
            return None
        if isinstance(message, FileXferData):
            return FileXferData(number, message.data)
        self._end(number)
        return FileXferStatus(number, message.result, message.detail)

    def receive_status(self, status: FileXferStatus) -> None:
        """Pass a status of the agent's on. That a transfer is admitted is told once."""
        transfer = self.open.get(status.id)
        if transfer is None:
            return
        if status.result != FileXferResult.CAN_SEND_DATA:
            self._end(status.id)
        elif transfer.is_admitted:
            return
        transfer.is_admitted = True
        transfer.client.status(FileXferStatus(transfer.number, status.result, status.detail))

    def client_left(self, client: RouterClient) -> None:
        """Cancel the client's transfers; the agent is told of those that it knows."""
        for number, transfer in list(self.open.items()):
            if transfer.client is client:
                self._end(number)
                if transfer.is_offered:
                    self._to_agent(FileXferStatus(number, FileXferResult.CANCELLED))

    def agent_left(self) -> None:
        """Tell all clients that the agent knows no transfer any more."""
        for number, transfer in list(self.open.items()):
            self._end(number)
            cancelled = FileXferStatus(transfer.number, FileXferResult.CANCELLED)
            transfer.client.link.post(cancelled)

    def _end(self, number: int) -> None:
        transfer = self.open.pop(number)
        del transfer.client.transfers[transfer.number]
