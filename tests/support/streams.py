"""Numbered bytes both ways through every port: what gets lost or doubled is noticed."""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from tests.support.keeper import Kept
from tests.support.waiting import until
from vring_serial.guest.port import GuestPort

#: A prime length: no lost or doubled power of two of bytes goes unnoticed.
PRIME = 65_521
_PATTERN = random.Random(3).randbytes(PRIME) * 6


class Guest(Protocol):
    """What streams need of a guest."""

    async def wait_port(self, *, name: str) -> GuestPort:
        """Return the port of this name as soon as it is there."""
        ...


class Reader(Protocol):
    """What a stream needs of an asyncio.StreamReader."""

    async def read(self, n: int) -> bytes:
        """Return 1 to ``n`` bytes; none at the end."""
        ...


class Writer(Protocol):
    """What a stream needs of an asyncio.StreamWriter."""

    def write(self, data: bytes) -> None:
        """Write bytes."""

    async def drain(self) -> None:
        """Wait until more may be written."""

    def close(self) -> None:
        """Close the end."""


class OpenFile:
    """A file that grows, a pipe or a terminal, as Reader or Writer.

    Args:
        file: a path, or a descriptor, which is taken over.
        flags: to open a path with.
    """

    def __init__(self, file: str | int, flags: int = 0) -> None:
        flags |= os.O_NONBLOCK | os.O_NOCTTY
        self._fd = file if isinstance(file, int) else os.open(file, flags)
        os.set_blocking(self._fd, False)
        self._unwritten = memoryview(b"")

    async def read(self, n: int) -> bytes:
        """Return 1 to ``n`` bytes, as soon as there are some."""
        found = b""

        def look() -> bytes:
            nonlocal found
            with suppress(BlockingIOError):
                found = os.read(self._fd, n)
            return found

        await until(look)
        return found

    def write(self, data: bytes) -> None:
        """Have bytes written by :meth:`drain`."""
        self._unwritten = memoryview(data)

    async def drain(self) -> None:
        """Write them."""

        def go_on() -> bool:
            with suppress(BlockingIOError):
                self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
            return not self._unwritten

        await until(go_on)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class Stream:
    """A sequence of bytes from one end of a port to the other.

    Args:
        ahead: bytes that may be sent and not received, at most.

    Attributes:
        name: for errors.
        sent, received: bytes.
        longest_pause: between two reads that gave bytes, in seconds.
    """

    def __init__(self, name: str, reader: Reader, writer: Writer, ahead: float = math.inf) -> None:
        self.name = name
        self._ahead = ahead
        self.sent = self.received = 0
        self.longest_pause = 0.0
        self._reader, self._writer = reader, writer

    async def send(self, enough: asyncio.Event, chance: random.Random) -> None:
        """Send until it is enough."""
        while not enough.is_set():
            data = pattern(self.sent, chance.randrange(1, 60_000))
            self._writer.write(data)
            self.sent += len(data)
            await self._writer.drain()
            await asyncio.sleep(0)
            if self.sent - self.received > self._ahead:
                await until(lambda: self.sent - self.received <= self._ahead)

    async def receive(self) -> None:
        """Receive until cancelled. Raises AssertionError at the first wrong byte, and at an end."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while data := await self._reader.read(1 << 18):
            expected = pattern(self.received, len(data))
            assert data == expected, f"{self.name}: wrong after byte {self.received}"
            self.received += len(data)
            now = loop.time()
            self.longest_pause, last = max(self.longest_pause, now - last), now
        raise AssertionError(f"{self.name} ended after byte {self.received}")

    def close(self) -> None:
        """Close the sending end."""
        self._writer.close()


def pattern(at: int, length: int) -> bytes:
    """Return the bytes that every stream has from this place on."""
    start = at % PRIME
    return _PATTERN[start : start + length]


@asynccontextmanager
async def flowing(
    keeper: Kept,
    guest: Guest,
    ports: Iterable[int],
    chance: random.Random,
    connect: Callable[[int], Awaitable[tuple[Reader, Writer]]] | None = None,
    ahead: float = math.inf,
) -> AsyncIterator[list[Stream]]:
    """Have bytes flow both ways through ports while the block runs; then all of them arrive.

    Args:
        keeper: has ``socket_ports`` of these numbers, unless there is ``connect``.
        guest: opens them.
        ports: their numbers.
        chance: how many bytes are sent at once.
        connect: return the host's end of a port.
        ahead: bytes that the guest may send and the host has not received, at most.
    """
    streams = []
    for nr in ports:
        host_reader, host_writer = await (connect or keeper.connect)(nr)
        port = await guest.wait_port(name=f"org.example.data{nr}")
        await port.wait_host()  # what a console says before that is for nobody
        guest_reader, guest_writer = await port.open()
        streams.append(Stream(f"{nr} out", host_reader, guest_writer, ahead))
        streams.append(Stream(f"{nr} in", guest_reader, host_writer))
    enough = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        sending = [group.create_task(s.send(enough, chance)) for s in streams]
        receiving = [group.create_task(s.receive()) for s in streams]
        await all_go_on(streams)
        yield streams
        enough.set()
        await asyncio.gather(*sending)
        await until(lambda: all(s.received == s.sent for s in streams), "bytes are missing")
        for task in receiving:
            task.cancel()
    for stream in streams:
        stream.close()


async def all_go_on(streams: Sequence[Stream]) -> None:
    """Wait until every stream has moved."""
    before = [stream.received for stream in streams]
    await until(
        lambda: all(s.received > b for s, b in zip(streams, before, strict=True)),
        lambda: f"{before} {[stream.received for stream in streams]}",
    )
