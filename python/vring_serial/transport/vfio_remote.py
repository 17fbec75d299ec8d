"""Guest memory that only the client can access: DMA_READ and DMA_WRITE."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from vring_serial.errors import ProtocolError
from vring_serial.proto.payload import Payload
from vring_serial.proto.vfio_user import Message, VfioUserError, request
from vring_serial.proto.vfio_user_wire import Command, DmaAccess

#: Bytes asked for in one message, if the client takes as many.
PIECE = 256 * 1024

#: What is asked: command, address, bytes, and who waits for it.
_Asked = tuple[Command, int, int, "asyncio.Future[bytes]"]


class RemoteMemory:
    """The client's memory, byte by byte over the socket.

    Accesses are done in the order in which they are asked for.

    Args:
        send: takes whole messages.
        piece: most bytes of one access.
    """

    def __init__(self, send: Callable[[bytes], None], piece: int) -> None:
        self._send = send
        self._piece = max(1, min(piece, PIECE))
        self._last_id = 0
        self._asked: dict[int, _Asked] = {}
        self._closed = False

    async def read(self, address: int, length: int) -> bytes:
        """Raises VfioUserError if the client cannot, ConnectionError if it has gone."""
        pieces = [
            self._ask(Command.DMA_READ, at, size, b"") for at, size in self._pieces(address, length)
        ]
        return b"".join(await asyncio.gather(*pieces))

    def write(self, address: int, data: bytes) -> asyncio.Future[bytes]:
        """Write; done when the client says so, or failed as :meth:`read` fails.

        Who does not wait for it need not: later accesses come after it all the same.
        """
        done = _done()
        for at, size in self._pieces(address, len(data)):
            start = at - address
            done = self._ask(Command.DMA_WRITE, at, size, data[start : start + size])
        return done

    def handle_reply(self, message: Message) -> None:
        """Raises ProtocolError if nobody asked for this reply."""
        asked = self._asked.pop(message.message_id, None)
        if asked is None or asked[0] != message.command:
            raise ProtocolError("a reply that nobody asked for")
        _, address, length, future = asked
        if future.done():
            return
        try:
            future.set_result(_data_of(message, address, length))
        except VfioUserError as error:
            _fail(future, error)

    def close(self) -> None:
        """The client has gone: all that was asked for fails. Safe to call twice."""
        self._closed = True
        for *_, future in self._asked.values():
            if not future.done():
                _fail(future, ConnectionError("the client has gone"))
        self._asked.clear()

    def _pieces(self, address: int, length: int) -> Iterable[tuple[int, int]]:
        for at in range(address, address + length, self._piece):
            yield at, min(self._piece, address + length - at)

    def _ask(
        self, command: Command, address: int, length: int, data: bytes
    ) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self._closed or len(self._asked) > 0xFFFF:
            _fail(future, ConnectionError("the client does not answer"))
            return future
        while self._last_id in self._asked:
            self._last_id = self._last_id + 1 & 0xFFFF
        self._asked[self._last_id] = command, address, length, future
        payload: Payload = DmaAccess(address, length, data)
        self._send(request(command, self._last_id, payload))
        self._last_id = self._last_id + 1 & 0xFFFF
        return future


def _data_of(message: Message, address: int, length: int) -> bytes:
    """What a reply brings; a write's need not bring anything."""
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


def _done() -> asyncio.Future[bytes]:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    future.set_result(b"")
    return future


def _fail(future: asyncio.Future[bytes], error: Exception) -> None:
    future.set_exception(error)
    # Whoever does not wait for a write is told by those who wait for what comes after it.
    future.exception()
