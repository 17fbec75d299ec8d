"""A connection on which a successor of this process can go on, losing and doubling nothing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from vring_serial import unix_fds
from vring_serial.transport.connection import Connection

#: Seconds until a message of which only a part is there is looked at again.
REST_SECONDS = 0.005


@dataclass(slots=True)
class Handled:
    """A message that has been handled, and may still be in the socket.

    Attributes:
        message: its bytes; empty: none.
        answer: the bytes that were sent for it, or are to be.
    """

    message: bytes = b""
    answer: bytes = b""


class RepeatableConnection(Connection):
    """Takes a message off the socket only after it was handled and answered.

    The steps are: look at one message (MSG_PEEK), handle it, have that written down, answer, take
    it off. A successor that finds the message again knows from what was written down that it was
    handled, and does the rest: so no message is lost, none is handled twice, and an answer is
    repeated only if this process died between sending it and taking its message off.

    Args:
        size_of: returns the size in bytes of the message that begins with these; of what is no
            beginning, as many as there are.
        header_size: bytes from which on ``size_of`` knows.
        record: writes down what was handled, with all that it led to.
        handled: what a predecessor wrote down.
        arguments: see Connection.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        size_of: Callable[[bytes], int],
        header_size: int,
        record: Callable[[Handled], None],
        handled: Handled,
        **arguments: Any,
    ) -> None:
        self._size_of = size_of
        self._header_size = header_size
        self._record = record
        self._handled = handled
        self._message = b""  # what is being handled, or waits to be taken off
        super().__init__(sock, **arguments)

    def close(self) -> None:
        """See Connection."""
        self._message = b""
        super().close()

    def _readable(self) -> None:
        try:
            head = self._sock.recv(self._header_size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            if not head:
                self._fail(None)
                return
            size = self._size_of(head) if len(head) == self._header_size else self._header_size
            received = unix_fds.receive(self._sock, size, self._max_fds, peek=True)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if len(received.data) < size:
            self._closer.close(received.fds)
            self._wait_for_rest()
            return
        self._message = received.data
        if received.data == self._handled.message:
            # Of a predecessor, which died before it took the message off.
            self._closer.close(received.fds)
            self.send(self._handled.answer)
            self._flush()
        else:
            self._handled = Handled()
            self._handle(partial(self._received, received))

    def _wait_for_rest(self) -> None:
        """Look again in a while: the socket is readable all the time."""
        self._loop.remove_reader(self._sock)
        self._reads = False
        self._rest = self._loop.call_later(REST_SECONDS, self._listen)

    def _before_answer(self) -> None:
        answer = b"".join(bytes(data) for data, _ in self._unsent)
        self._record(Handled(self._message, answer))

    def _may_read(self) -> bool:
        return not self._message

    def _listen(self) -> None:
        if self.closed:
            return
        if self._message and not self._unsent:
            self._take_off()
        super()._listen()

    def _take_off(self) -> None:
        """Take the message off the socket, with its descriptors, which nobody wants twice."""
        left = len(self._message)
        while left:
            left -= len(self._sock.recv(left, socket.MSG_DONTWAIT))
        self._message = b""
        self._handled = Handled()
        self._record(self._handled)
