"""Guest memory that only the client can access: DMA_READ and DMA_WRITE."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.framing import Payload
from vring_serial.proto.vfio_user import Message, VfioUserError, request
from vring_serial.proto.vfio_user_dma import DmaAccess
from vring_serial.proto.vfio_user_wire import Command

#: Bytes asked for in one message, if the client takes as many.
PIECE = 256 * 1024
#: Requests, and bytes in them, that the client is asked for before it has answered the first.
WINDOW_REQUESTS = 256
WINDOW_BYTES = 1 << 20
#: Seconds without an answer to anything after which the client is taken not to answer. They are
#: counted in pieces: what freezes client and server together costs one of them.
ANSWER_SECONDS = 30.0
#: Numbers of requests that one process uses of a client that may see several: its successors have
#: others, and know from the number what a predecessor of theirs has asked for.
IDS_EACH = 4096
_ALL_IDS = 0x10000
_PIECES = 10


@dataclass(slots=True, eq=False)
class _Access:
    """One read or write, in as many requests as it takes.

    Attributes:
        data: what is written, or what was read so far.
        sent: bytes for which requests have been sent.
        unanswered: requests of this access that wait for their reply.
        done: gets what was read.
    """

    command: Command
    address: int
    data: bytearray
    done: asyncio.Future[bytes]
    sent: int = 0
    unanswered: int = 0

    @property
    def all_sent(self) -> bool:
        """Whether every request was sent, or nobody wants the rest."""
        return self.sent == len(self.data) or self.done.done()

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            # Who does not wait for a write has asked to be told otherwise, or does not care.
            self.done.exception()


class RemoteMemory:
    """The client's memory, byte by byte over the socket.

    Accesses are done in the order in which they are asked for. The client is never asked for more
    than a window at a time, whatever is wanted of it.

    Args:
        send: takes whole messages.
        piece: most bytes of one access.
        life: how many processes have asked the client before this one; None: there is one only.
    """

    def __init__(self, send: Callable[[bytes], None], piece: int, life: int | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._piece = min(piece, PIECE)
        lives = _ALL_IDS // IDS_EACH
        self._ids = range(_ALL_IDS)
        self._late: set[int] = set()  # what predecessors may still be answered
        if life is not None:
            first = life % lives * IDS_EACH
            self._ids = range(first, first + IDS_EACH)
            for before in range(max(0, life - lives + 1), life):
                start = before % lives * IDS_EACH
                self._late.update(range(start, start + IDS_EACH))
        self._last_id = self._ids.start
        self._waiting: deque[_Access] = deque()
        # By number: what a request was for, where in it, and how many bytes.
        self._asked: dict[int, tuple[_Access, int, int]] = {}
        self._asked_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._silent = 0  # pieces of the time that passed without an answer
        self._closed = False

    def read(self, address: int, length: int) -> asyncio.Future[bytes]:
        """Read; VfioUserError if the client cannot or does not, ConnectionError if it has gone."""
        return self._ask(Command.DMA_READ, address, bytearray(length))

    def write(self, address: int, data: bytes) -> asyncio.Future[bytes]:
        """Write; done when the client says so, or failed as :meth:`read` fails.

        Who does not wait for it need not: later accesses come after it all the same.
        """
        return self._ask(Command.DMA_WRITE, address, bytearray(data))

    def handle_reply(self, message: Message) -> None:
        """Take a reply. Raises RemoteProtocolError if nobody asked for it.

        What a predecessor of this process asked for is ignored, once.
        """
        if message.message_id in self._late:
            self._late.remove(message.message_id)
            return
        asked = self._asked.pop(message.message_id, None)
        if asked is None or asked[0].command != message.command:
            raise RemoteProtocolError("a reply that nobody asked for")
        access, at, size = asked
        self._asked_bytes -= size
        self._silent = 0
        access.unanswered -= 1
        try:
            data = _data_of(message, access.address + at, size)
        except VfioUserError as error:
            access.fail(error)
        else:
            if access.command == Command.DMA_READ:
                access.data[at : at + size] = data
            if access.all_sent and not access.unanswered and not access.done.done():
                access.done.set_result(bytes(access.data) if data else b"")
        self._send_waiting()

    def close(self) -> None:
        """Fail all accesses: the client has gone. Safe to call twice."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail_all(ConnectionError("the client has gone"))
        self._asked.clear()

    # --- internals

    def _ask(self, command: Command, address: int, data: bytearray) -> asyncio.Future[bytes]:
        access = _Access(command, address, data, self._loop.create_future())
        if self._closed:
            access.fail(ConnectionError("the client has gone"))
        elif not data:
            access.done.set_result(b"")
        else:
            self._waiting.append(access)
            self._send_waiting()
            if self._timer is None:
                self._silent = 0
                self._wait()
        return access.done

    def _send_waiting(self) -> None:
        """Ask for as much as the window has room for."""
        while self._waiting and not self._closed:
            access = self._waiting[0]
            if access.all_sent:
                self._waiting.popleft()
                continue
            size = min(self._piece, len(access.data) - access.sent)
            if self._asked and self._asked_bytes + size > WINDOW_BYTES:
                return
            if len(self._asked) >= WINDOW_REQUESTS:
                return
            self._request(access, size)

    def _request(self, access: _Access, size: int) -> None:
        at = access.sent
        access.sent += size
        access.unanswered += 1
        writes = access.command == Command.DMA_WRITE
        data = bytes(access.data[at : at + size]) if writes else b""
        while self._last_id in self._asked:
            self._count_id()
        self._asked[self._last_id] = access, at, size
        self._asked_bytes += size
        payload: Payload = DmaAccess(access.address + at, size, data)
        self._send(request(access.command, self._last_id, payload))
        self._count_id()

    def _count_id(self) -> None:
        following = self._last_id + 1
        self._last_id = following if following in self._ids else self._ids.start

    def _wait(self) -> None:
        self._timer = self._loop.call_later(ANSWER_SECONDS / _PIECES, self._waited)

    def _waited(self) -> None:
        self._timer = None
        self._silent += 1
        if not self._asked:
            return
        if self._silent < _PIECES:
            self._wait()
            return
        access, _, _ = next(iter(self._asked.values()))
        why = f"the client has not answered for {ANSWER_SECONDS:g} seconds"
        self._fail_all(VfioUserError(access.command.name, why))

    def _fail_all(self, error: Exception) -> None:
        """Fail all accesses; replies that still come are taken, and make room in the window."""
        for access in [*self._waiting, *(asked[0] for asked in self._asked.values())]:
            access.fail(error)
        self._waiting.clear()


def _data_of(message: Message, address: int, length: int) -> bytes:
    """Return the data of a reply, b"" for a write's."""
    if message.command == Command.DMA_WRITE:
        message.check_success()
        return b""
    answer = message.decode_reply(DmaAccess)
    if (answer.address, answer.count, len(answer.data)) != (address, length, length):
        raise VfioUserError(
            "reply to DMA_READ",
            f"{len(answer.data)} bytes at {answer.address:#x} instead of {length} at {address:#x}",
        )
    return answer.data
