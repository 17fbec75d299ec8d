"""A peer's connection: bytes and descriptors both ways, and no more of them than it reads."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from vring_serial import unix_fds
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.closer import Closer
from vring_serial.unix_fds import Received

# Shared by all connections: a peer can come as often as it likes.
_log = RateLimitedLog(logging.getLogger(__name__))

#: Bytes of unread answers from which on the peer is not listened to.
MAX_UNREAD = 64 * 1024
#: Bytes given to the socket at once.
_SEND_SIZE = 64 * 1024


class Connection:
    """A connected unix stream socket on the running loop.

    What is sent while the peer's words are handled goes out when they are, in one piece. Nothing is
    read, and nothing more is handled, while there is more to handle or the peer does not read.

    Args:
        sock: connected and non-blocking; taken over.
        read_size: bytes read in one turn of the loop.
        max_fds: descriptors taken with one read.
        closer: closes the socket, and what came to it unasked.
        received: takes what was read, and owns its descriptors; may close the connection. Must
            return whether it left messages for another turn.
        go_on: called in that turn to handle the next ones; must return the same.
        lost: called once when the peer has gone (None) or the socket failed; not by :meth:`close`.
        max_unread: bytes that the peer has not read from which on it is not listened to.
    """

    _merges = True  # small messages go out together

    def __init__(
        self,
        sock: socket.socket,
        *,
        read_size: int,
        max_fds: int,
        closer: Closer,
        received: Callable[[Received], bool],
        go_on: Callable[[], bool],
        lost: Callable[[OSError | None], None],
        max_unread: int = MAX_UNREAD,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._read_size = read_size
        self._max_fds = max_fds
        self._closer = closer
        self._received = received
        self._go_on = go_on
        self._more = False  # is to be handled
        self._turn: asyncio.Handle | None = None
        self._reads = True
        self._lost = lost
        self._max_unread = max_unread
        # Bytes, and descriptors (owned by us) that go with the first of them.
        self._unsent: deque[tuple[bytearray, list[int]]] = deque()
        self._unsent_bytes = 0
        self._handling = False
        self._waits_to_send = False
        self._loop.add_reader(sock, self._readable)

    @property
    def closed(self) -> bool:
        """Return whether the connection has ended, by either side; its socket is closed."""
        return self._sock.fileno() < 0

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send after all that was sent before; ``fds`` are taken over. Nothing if it is closed."""
        if self.closed:
            unix_fds.close_all(fds)
            return
        if fds or not self._merges or not self._unsent or len(self._unsent[-1][0]) >= _SEND_SIZE:
            self._unsent.append((bytearray(data), list(fds)))
        else:
            self._unsent[-1][0].extend(data)
        self._unsent_bytes += len(data)
        if not self._handling:
            self._flush()

    def ask(self, data: bytes) -> None:
        """Send a whole message that answers nothing, after all of that kind before it."""
        self.send(data)

    def close(self) -> None:
        """Close; what the peer has not read is lost. Safe to call twice."""
        if self.closed:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if self._turn is not None:
            self._turn.cancel()
        self._closer.close_socket(self._sock)
        for _, fds in self._unsent:
            unix_fds.close_all(fds)
        self._unsent.clear()

    def _readable(self) -> None:
        try:
            received = unix_fds.receive(self._sock, self._read_size, self._max_fds)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if not received.data:
            self._closer.close(received.fds)
            self._fail(None)
            return
        self._handle(partial(self._received, received))

    def _another_turn(self) -> None:
        self._turn = None
        self._handle(self._go_on)

    def _handle(self, handle: Callable[[], bool]) -> None:
        self._handling = True
        try:
            self._more = handle()
        except Exception as error:
            # Of ours, or of the system's: the peer would wait for an answer for ever.
            text = "a message could not be handled; its connection is closed"
            _log.log(logging.ERROR, text, exc_info=error)
            if not self.closed:
                self._fail(None)
            return
        finally:
            self._handling = False
        if not self.closed:
            self._before_answer()
            self._flush()

    def _before_answer(self) -> None:
        """Do what must be done between handling what was read and sending the answers to it."""

    def _flush(self) -> None:
        try:
            self._send_unsent()
        except BlockingIOError:
            if not self._waits_to_send:
                self._waits_to_send = True
                self._loop.add_writer(self._sock, self._flush)
        except OSError as error:
            self._fail(error)
            return
        else:
            if self._waits_to_send:
                self._waits_to_send = False
                self._loop.remove_writer(self._sock)
        self._listen()

    def _send_unsent(self) -> None:
        """Send all that waits. Raises BlockingIOError if the peer does not read, and OSError."""
        while self._unsent:
            data, fds = self._unsent[0]
            sent = self._send_some(bytes(data[:_SEND_SIZE]), fds)
            unix_fds.close_all(fds)
            fds.clear()
            self._unsent_bytes -= sent
            del data[:sent]
            if not data:
                self._unsent.popleft()

    def _send_some(self, data: bytes, fds: Sequence[int]) -> int:
        """Send as much as fits, and return how much. Raises as unix_fds.send does."""
        return unix_fds.send(self._sock, data, fds)

    def _listen(self) -> None:
        """Read, or handle what was read, as long as the peer reads its answers."""
        reads_answers = self._unsent_bytes <= self._max_unread
        if self._more and reads_answers and self._turn is None:
            self._turn = self._loop.call_soon(self._another_turn)
        reads = reads_answers and not self._more and self._may_read()
        if reads != self._reads:
            self._reads = reads
            if reads:
                self._loop.add_reader(self._sock, self._readable)
            else:
                self._loop.remove_reader(self._sock)

    def _may_read(self) -> bool:
        return True

    def _fail(self, error: OSError | None) -> None:
        self.close()
        self._lost(error)
