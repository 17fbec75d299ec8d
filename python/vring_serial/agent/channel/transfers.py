"""The files of one end of a channel, in both directions."""

from __future__ import annotations

from typing import TypeAlias

from vring_serial.agent.channel.files import FROM_GUEST, FileSender
from vring_serial.agent.channel.link import AgentLink, BodySink
from vring_serial.agent.channel.receiver import FileReceiver
from vring_serial.proto.agent import (
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MessageError,
    Side,
)

FileMessage: TypeAlias = FileXferStart | FileXferData | FileXferStatus


class FileTransfers:
    """Whatever is on its way to the other end or from it.

    Args:
        side: which end we are; it decides the numbers of the transfers that begin here.

    Attributes:
        sender: sends files to the other end.
        receiver: takes the other end's files; None while it may send none.
    """

    def __init__(self, side: Side) -> None:
        self.sender = FileSender(FROM_GUEST if side is Side.GUEST else 1)
        self.receiver: FileReceiver | None = None
        self._side = side
        self._link: AgentLink | None = None

    def begin_session(self, link: AgentLink) -> None:
        """Start anew with an end that knows of no transfer."""
        self._link = link
        self._cancel_received()
        self.sender.begin_session(link)

    def end_session(self, why: str) -> None:
        """End all transfers, because the other end is gone; ``why`` says so in errors."""
        self._link = None
        self._cancel_received()
        self.sender.end_session(why)

    def _cancel_received(self) -> None:
        if self.receiver is not None:
            self.receiver.cancel_all()

    def post_status(self, status: FileXferStatus) -> None:
        """Send a status; nothing happens without a session."""
        if self._link is not None:
            self._link.post(status)

    def receive(self, message: FileMessage) -> MessageError | None:
        """Take a message of a transfer; return an error if no transfer can have it."""
        receiver = self.receiver
        if isinstance(message, FileXferStatus) and self._is_ours(message.id):
            return self.sender.receive_status(message)
        if receiver is None:
            if isinstance(message, FileXferStart):
                self.post_status(FileXferStatus(message.id, FileXferResult.CANCELLED))
            return None  # else of a transfer that nobody waits for any more
        match message:
            case FileXferStart():
                receiver.start(message)
            case FileXferData():
                receiver.data(message.id, message.data)
            case FileXferStatus():
                return receiver.status(message)
        return None

    def body(self, head: FileXferData) -> BodySink | None:
        """Return the sink of a DATA message that comes in pieces; None discards it."""
        return self.receiver.body(head.id) if self.receiver is not None else None

    def _is_ours(self, number: int) -> bool:
        return (number >= FROM_GUEST) == (self._side is Side.GUEST)
