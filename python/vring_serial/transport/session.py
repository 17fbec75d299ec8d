"""The base of both protocols' sessions: one peer, from its connection to its end."""

from __future__ import annotations

import abc
import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from vring import MemoryWatch
from vring.errors import VringError
from vring_serial.errors import RemoteProtocolError
from vring_serial.keeping import Keeping
from vring_serial.proto.framing import MAX_FDS, BadMessageError, MessageParser, Payload
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.closer import Closer
from vring_serial.transport.connection import MAX_UNREAD, Connection
from vring_serial.transport.pieces import Pieces
from vring_serial.transport.repeatable import (
    AREA_SIZE,
    Handled,
    RepeatableConnection,
    long_room,
)
from vring_serial.turns import Turn
from vring_serial.unix_fds import Received

#: Handles one kind of request: gets the payload and the descriptors, and returns the answer.
#: Descriptors that it leaves in the list are closed.
Handler = Callable[[Any, list[int]], Payload | None]


class FatalError(RemoteProtocolError):
    """The protocol has no answer to this: the connection is closed."""


class PeerMessage(Protocol):
    """What sessions need of a message.

    Attributes:
        name: its type's name, for errors and logs.
        fds: the descriptors that came with it; the session takes them over.
    """

    @property
    def name(self) -> str: ...
    @property
    def fds(self) -> tuple[int, ...]: ...


#: Section of a session's state (see Keeping).
SESSION = "session"
#: What stands there once a session ends, and until the next peer comes.
ENDED = b"ended"

MessageT = TypeVar("MessageT", bound=PeerMessage)


@dataclass(frozen=True, slots=True)
class SessionContext:
    """What a server lends each of its sessions, one after another.

    Attributes:
        name: for log lines.
        log: gets what sessions log; shared, because a peer can come as often as it likes.
        watch: reports lost memory; used by one session at a time.
        closer: closes the peer's descriptors.
        greeted: the session calls it when the peer has begun the protocol, perhaps repeatedly.
        ending: the session calls it before it lets go of anything that is kept; not in ``close``.
        ended: the session calls it once, when the peer has gone or was sent away; not in ``close``.
        keeping: where what a successor needs of the session is kept, or None.
        resumed: the peer is a predecessor's, which has left its session there.
    """

    name: str
    log: RateLimitedLog
    watch: MemoryWatch
    closer: Closer
    greeted: Callable[[], None]
    ending: Callable[[], None]
    ended: Callable[[], None]
    keeping: Keeping | None = None
    resumed: bool = False


class Session(abc.ABC, Generic[MessageT]):
    """Serves a device to one peer over a connected socket.

    Subclasses set up what their handlers use, and then call this constructor: from there on the
    event loop may bring messages.

    Args:
        sock: connected and non-blocking; taken over.
        parser: splits the peer's stream.
        context: of the server.
        read_size: bytes read in one turn of the loop.
        max_unread: bytes that the peer has not read from which on it is not listened to.
        handled: what a predecessor had handled last.
        handled_fds: descriptors that go with the answer to it; taken over.
        longest: bytes of the peer's longest message, if that may be more than its socket holds.
    """

    def __init__(
        self,
        sock: socket.socket,
        parser: MessageParser[Any, MessageT],
        context: SessionContext,
        *,
        read_size: int,
        max_unread: int = MAX_UNREAD,
        handled: Handled | None = None,
        handled_fds: Sequence[int] = (),
        longest: int = 0,
    ) -> None:
        self._name = context.name
        self._log = context.log
        self._watch = context.watch
        self._closer = context.closer
        self._greeted = context.greeted
        self._ending = context.ending
        self._ended = context.ended
        self._parser = parser
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._watch, self._memory_lost)
        arguments: dict[str, Any] = {
            "read_size": read_size,
            "max_fds": MAX_FDS,
            "closer": self._closer,
            "received": self._received,
            "go_on": self._handle_messages,
            "lost": self._lost,
            "max_unread": max_unread,
        }
        if context.keeping is None:
            self._connection = Connection(sock, **arguments)
        else:
            handled = handled or Handled()
            pieces = Pieces(context.keeping, self._closer, handled.number)
            self._connection = RepeatableConnection(
                sock,
                size_of=parser.size_of,
                header_size=parser.header_size,
                fds_of=parser.fds_of,
                pieces=pieces,
                record=self._record,
                handled=handled,
                area=context.keeping.area("connection", AREA_SIZE),
                handled_fds=handled_fds,
                room=long_room(context.keeping, longest) if longest else None,
                **arguments,
            )
            if pieces.damage is not None:  # in the loop's next turn: the server knows it then
                self._loop.call_soon(self._send_away_damaged, pieces.damage)

    def close(self) -> None:
        """Stop all queues, unmap the guest's memory, close every descriptor. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._watch)
        self._connection.close()
        try:
            self._release()
        finally:
            del self._watch  # open as long as it is referred to
            self._closer.close(self._parser.take_fds())

    def send_away(self, why: str) -> None:
        """End the session, for the reason given."""
        self._log.warning("%s: %s; connection closed", self._name, why)
        self._end()

    def _send_away_damaged(self, why: str) -> None:
        if not self._closed:
            self.send_away(f"what the process before left cannot be gone on with: {why}")

    # --- what a protocol adds

    @abc.abstractmethod
    def _release(self) -> None:
        """Leave the device, and let go of all that is the peer's: memory and descriptors."""

    @abc.abstractmethod
    def _loss(self) -> str | None:
        """Return which memory that the peer shares is lost, for log lines; None if none is."""

    @abc.abstractmethod
    def _answer(self, message: MessageT, fds: list[int]) -> Payload | None:
        """Do what the message asks for and return the answer's payload, None for an empty one.

        Descriptors that are kept are taken out of ``fds``.

        Raises:
            FatalError: the connection must be closed.
            RemoteProtocolError, VringError, OSError, MemoryError: the message is refused.
        """

    @abc.abstractmethod
    def _reply(self, message: MessageT, answer: Payload | None) -> None:
        """Send the answer, if one is wanted."""

    @abc.abstractmethod
    def _refusal(self, message: MessageT, error: Exception) -> BadMessageError:
        """Return the protocol's own error for what :meth:`_answer` raised."""

    @abc.abstractmethod
    def _refuse(self, message: MessageT, error: BadMessageError) -> None:
        """Log and send a refusal. Raises ``error`` if the message has no answer to carry it."""

    def _settle(self) -> None:
        """Do what all messages of one turn have in common; called after the last of them."""

    def _record(self, handled: Handled) -> None:
        """Write down what a successor needs; called only if there may be one."""

    # --- the connection

    def _lost(self, error: OSError | None) -> None:
        if (loss := self._loss()) is not None:
            self._log.warning("%s: %s", self._name, loss)
        elif error is not None:
            why = error.strerror or error
            self._log.log(logging.INFO, "%s: connection lost: %s", self._name, why)
        self._end()

    def _memory_lost(self) -> None:
        self._watch.clear()
        why = self._loss()
        # The peer may have taken back meanwhile what it cut off.
        if why is not None:
            self.send_away(why)

    def _end(self) -> None:
        self._ending()
        try:
            self.close()
        finally:  # whatever the device raises, the next peer may come
            self._ended()

    def _received(self, received: Received) -> bool:
        self._parser.receive_data(received.data, received.fds)
        if received.truncated:
            self.send_away("there is no room for the descriptors that it sent")
            return False
        return self._handle_messages()

    def _handle_messages(self) -> bool:
        return self._take_turn(self._parser, self._handle)

    def _take_turn(
        self, parser: MessageParser[Any, MessageT], handle: Callable[[MessageT], None]
    ) -> bool:
        """Handle messages for one turn of the loop; return whether there may be more."""
        turn = Turn()
        more = True
        try:
            while turn.another():
                if (message := parser.next_message()) is None:
                    more = False
                    break
                handle(message)
                if self._closed:
                    return False
                if self._closer.full:
                    raise FatalError("the descriptors that it sent cannot be closed")
            self._settle()
        except (FatalError, BadMessageError) as error:
            self.send_away(str(error))
            return False
        return more

    def _handle(self, message: MessageT) -> None:
        fds = list(message.fds)
        try:
            answer = self._answer(message, fds)
        except FatalError as error:
            raise FatalError(f"{message.name}: {error}") from None
        except (RemoteProtocolError, VringError, OSError, MemoryError) as error:
            self._refuse(message, self._refusal(message, error))
        else:
            self._reply(message, answer)
        finally:
            self._closer.close(fds)
