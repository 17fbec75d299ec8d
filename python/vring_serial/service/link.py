"""Calls between two processes of the service, each of which may die and be followed by another.

A link is a pair of packet sockets that the keeper holds. Neither process sees the other's end
close: what was asked of one that has died is answered by the one after it. Neither trusts the
other: messages are bounded, and nobody waits for a process that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import json
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vring_serial.errors import VringSerialError
from vring_serial.lifetime import Closing
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger(__name__)

#: One end of a link.
LinkEnd = socket.socket

#: Bytes of a packet, without its header: several fit into the socket's buffer.
PACKET_BYTES = 32 << 10
#: Most bytes of one message, and of all that wait for the other process to read.
MESSAGE_MAX = 8 << 20
WAITING_MAX = 16 << 20
#: Seconds until a call is given up.
CALL_SECONDS = 10.0
#: Packets that are read in one turn of the event loop.
TURN_PACKETS = 64

# number of the message, number of the packet in it, packets of the message
_HEADER = struct.Struct("<QII")


class CallError(VringSerialError):
    """The other process refused a call.

    Attributes:
        error_class: a name that programs look at.
        desc: the reason.
    """

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(desc)
        self.error_class = error_class
        self.desc = desc


class CallTimeoutError(VringSerialError, TimeoutError):
    """The other process did not answer in time."""


def make_link() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new link, non-blocking."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    return ends[0], ends[1]


def _go_on(numbers: tuple[int, int]) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a link, by the numbers of their descriptors, which are taken over."""
    first, second = (socket.socket(fileno=number) for number in numbers)
    for end in (first, second):
        end.setblocking(False)  # else dup makes them blocking, for all processes
    return first, second


class Link(Closing):
    """One end of a link, in the running event loop.

    Args:
        sock: the end; closed with this.
        on_message: called with each message, a JSON object.
        name: for log lines.
    """

    def __init__(
        self, sock: socket.socket, on_message: Callable[[dict[str, Any]], None], name: str
    ) -> None:
        self._sock = sock
        self._on_message = on_message
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._numbers = itertools.count(int.from_bytes(os.urandom(4), "little") << 24)
        self._incoming = -1  # number of the message whose packets are gathered
        self._parts: list[bytes] = []
        self._log = RateLimitedLog(log, burst=5, seconds=60)
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
        self._waiting.clear()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message in the background; False: it is too large, or too much waits already."""
        text = json.dumps(message).encode()
        if len(text) > MESSAGE_MAX or self._waiting_bytes + len(text) > WAITING_MAX:
            return False
        number = next(self._numbers) & (1 << 64) - 1
        pieces = [text[at : at + PACKET_BYTES] for at in range(0, len(text), PACKET_BYTES)]
        for index, piece in enumerate(pieces):
            self._waiting.append(_HEADER.pack(number, index, len(pieces)) + piece)
        self._waiting_bytes += len(text)
        self._flush()
        return True

    def _flush(self) -> None:
        if self._sock.fileno() < 0:
            return
        while self._waiting:
            try:
                self._sock.send(self._waiting[0])
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._flush)
                return
            except OSError as error:
                self._log.warning("%s: %s", self._name, error.strerror)
                self._waiting.clear()
                self._waiting_bytes = 0
                break
            self._waiting_bytes -= len(self._waiting.popleft()) - _HEADER.size
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(TURN_PACKETS):
            try:
                packet = self._sock.recv(PACKET_BYTES + _HEADER.size)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._log.warning("%s: %s", self._name, error.strerror)
                return
            if not packet:  # nobody holds the other end any more
                self._loop.remove_reader(self._sock)
                return
            if (message := self._gather(packet)) is not None:
                self._on_message(message)
                if self._sock.fileno() < 0:
                    return

    def _gather(self, packet: bytes) -> dict[str, Any] | None:
        """Return the message that the packet completes. A message whose sender died is dropped."""
        if len(packet) < _HEADER.size:
            return None
        number, index, count = _HEADER.unpack_from(packet)
        if index == 0:
            self._incoming = number
            self._parts = []
        if number != self._incoming or index != len(self._parts):
            return None
        if index >= count or count * PACKET_BYTES > MESSAGE_MAX + PACKET_BYTES:
            return None
        self._parts.append(packet[_HEADER.size :])
        if len(self._parts) < count:
            return None
        text, self._parts, self._incoming = b"".join(self._parts), [], -1
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(message := json.loads(text), dict):
                return message
        self._log.warning("%s: a message that is no JSON object was dropped", self._name)
        return None


class Caller(Closing):
    """The end that calls.

    Args:
        sock: the end of the link; closed with this.
        on_event: called with an event's name and data.
        name: of the other process, for errors and logs.
    """

    def __init__(
        self, sock: socket.socket, on_event: Callable[[str, dict[str, Any]], None], name: str
    ) -> None:
        self._name = name
        self._on_event = on_event
        self._link = Link(sock, self._message, name)
        # Answers to a process of before are not for us.
        self._ids = itertools.count(int.from_bytes(os.urandom(5), "little") << 16)
        self._calls: dict[int, asyncio.Future[Any]] = {}

    def close(self) -> None:
        self._link.close()
        for call in self._calls.values():
            call.cancel()

    async def call(self, name: str, /, *, seconds: float = CALL_SECONDS, **arguments: Any) -> Any:
        """Return what the other process answers.

        Raises:
            CallError: it refuses.
            CallTimeoutError: it does not answer in ``seconds``, or has not read what was asked
                before.
        """
        number = next(self._ids)
        if not self._link.send({"call": name, "id": number, "arguments": arguments}):
            raise CallTimeoutError(f"{self._name} does not answer: it reads nothing")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            raise CallTimeoutError(f"{self._name} did not answer in {seconds:g} s") from None
        finally:
            del self._calls[number]

    def _message(self, message: dict[str, Any]) -> None:
        if isinstance(name := message.get("event"), str):
            data = message.get("data")
            self._on_event(name, data if isinstance(data, dict) else {})
            return
        number = message.get("id")
        future = self._calls.get(number) if isinstance(number, int) else None
        if future is None or future.done():
            return
        if isinstance(error := message.get("error"), dict):
            future.set_exception(CallError(str(error.get("class")), str(error.get("desc"))))
        else:
            future.set_result(message.get("return"))


#: Carries out a call with its arguments; returns, or awaits, what is answered.
Handler = Callable[..., Any]


class Answerer(Closing):
    """The end that is called.

    Args:
        sock: the end of the link; closed with this.
        handlers: by the names of calls. One may raise CallError; what else a VringSerialError says
            is answered as a ``GenericError``.
        name: of the other process, for logs.
    """

    def __init__(self, sock: socket.socket, handlers: Mapping[str, Handler], name: str) -> None:
        self._handlers = handlers
        self._name = name
        self._link = Link(sock, self._message, name)
        self._tasks: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        self._link.close()
        for task in self._tasks:
            task.cancel()

    def tell(self, event: str, data: Mapping[str, Any]) -> None:
        """Tell the caller of an event; it is lost if the caller does not read."""
        self._link.send({"event": event, "data": data})

    def _message(self, message: dict[str, Any]) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": message.get("id")}
        name, arguments = message.get("call"), message.get("arguments")
        try:
            handler = self._handlers.get(name) if isinstance(name, str) else None
            if handler is None or not isinstance(arguments, dict):
                raise CallError("CommandNotFound", f"there is no call {name}")
            inspect.signature(handler).bind(**arguments)
            result = handler(**arguments)
            answer["return"] = await result if inspect.isawaitable(result) else result
        except CallError as error:
            answer["error"] = {"class": error.error_class, "desc": error.desc}
        except Exception as error:
            if not isinstance(error, (VringSerialError, TypeError)):
                log.exception("%s asked for %s, which failed", self._name, name)
            answer["error"] = {"class": "GenericError", "desc": str(error)}
        if not self._link.send(answer):
            text = "the answer is too large, or earlier ones were not read"
            self._link.send({"id": answer["id"], "error": {"class": "GenericError", "desc": text}})


class Links(Closing):
    """A link from the monitor to each VM's worker, made before any of them is forked.

    Args:
        names: of the VMs.
        made: what the code before an upgrade had as :attr:`descriptors`; taken over.
    """

    def __init__(
        self, names: Iterable[str], made: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        given = made or {}
        self._ends = {name: _go_on(given[name]) if name in given else make_link() for name in names}

    def add(self, name: str) -> None:
        """Make the link of one VM more. Raises OSError."""
        self._ends[name] = make_link()

    def remove(self, name: str) -> None:
        """Close the link of a VM that has gone, if there is one."""
        for end in self._ends.pop(name, ()):
            end.close()

    def monitor_end(self, name: str) -> int:
        """Return the descriptor of the monitor's end, which stays this object's."""
        return self._ends[name][0].fileno()

    @property
    def descriptors(self) -> dict[str, tuple[int, int]]:
        """The ends by the workers' names: the monitor's and the worker's."""
        return {name: (ends[0].fileno(), ends[1].fileno()) for name, ends in self._ends.items()}

    def close(self) -> None:
        for ends in self._ends.values():
            for end in ends:
                end.close()

    def for_worker(self, names: Iterable[str]) -> dict[str, socket.socket]:
        """Return a worker's ends by name, in its process; all others are closed there."""
        taken = {name: self._ends[name][1].dup() for name in names if name in self._ends}
        self.close()
        return taken

    def for_monitor(self) -> dict[str, socket.socket]:
        """Return the monitor's ends by name, in its process; all others are closed there."""
        taken = {name: ends[0].dup() for name, ends in self._ends.items()}
        self.close()
        return taken
