"""Bytes both ways through a guest's ports, checked as they come, on whatever machine it is."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import suppress
from typing import Protocol

from tests.support.waiting import until
from vring_serial import EmbeddedGuest

PORTS = 4
#: A prime length: no lost or doubled power of two of bytes goes unnoticed.
PRIME = 65_521
PATTERN = random.Random(7).randbytes(PRIME) * 3
#: Most bytes received at once.
PIECE = 1 << 16


def pattern(at: int, length: int) -> bytes:
    start = at % PRIME
    return PATTERN[start : start + length]


class Stream:
    """A sequence of bytes from one end of a port to the other, checked as it comes."""

    def __init__(self) -> None:
        self.sent = self.received = 0

    def take(self, data: bytes) -> None:
        assert data, f"it ended after byte {self.received}"
        if data != pattern(self.received, len(data)):
            ahead = (PATTERN.find(data[:30]) - self.received) % PRIME
            raise AssertionError(f"wrong after byte {self.received}: it is {ahead} bytes ahead")
        self.received += len(data)


class Host:
    """The host end of one port on one machine.

    Args:
        ours: a connected socket; taken over.
        theirs: the other end of it, if that is not the device's alone.
        slow: it reads little, so that its socket is full most of the time.
    """

    def __init__(
        self, ours: socket.socket, theirs: socket.socket | None = None, *, slow: bool
    ) -> None:
        self.ours, self.theirs = ours, theirs
        for sock in (ours, theirs):
            if sock is not None:
                sock.setblocking(False)
        self._slow = slow

    async def receive(self, stream: Stream) -> None:
        while True:
            await ready(self.ours, write=False)
            stream.take(self.ours.recv(3000 if self._slow else PIECE))
            if self._slow:
                await asyncio.sleep(0.01)

    async def send(self, stream: Stream, chance: random.Random) -> None:
        while True:
            await ready(self.ours, write=True)
            with suppress(BlockingIOError):
                stream.sent += self.ours.send(pattern(stream.sent, chance.randrange(1, 30_000)))

    def leave(self, out: Stream, back: Stream) -> None:
        """Read what the device has written, and take back what it has not read."""
        while data := _received(self.ours):
            out.take(data)
        while self.theirs is not None and (data := _received(self.theirs)):
            back.sent -= len(data)

    def close(self) -> None:
        self.ours.close()
        if self.theirs is not None:
            self.theirs.close()


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(PIECE)
    except BlockingIOError:
        return b""


async def ready(sock: socket.socket, *, write: bool) -> None:
    """Wait until there is something to read, or room.

    Unlike the loop's own methods this leaves nothing half done when it is cancelled.
    """
    loop = asyncio.get_running_loop()
    found = asyncio.Event()
    (loop.add_writer if write else loop.add_reader)(sock, found.set)
    try:
        await found.wait()
    finally:
        (loop.remove_writer if write else loop.remove_reader)(sock)


class HostEnds(Protocol):
    """The host ends of one machine, which may run."""

    async def stop(self) -> None:
        """Have them do nothing more. Raises what was wrong with what they received."""


class Traffic:
    """What the guest's programs do: they read and write all the time, through every port."""

    def __init__(self, guest: EmbeddedGuest) -> None:
        self.streams = [(Stream(), Stream()) for _ in range(PORTS)]  # out, back
        self._guest = guest
        self._tasks: list[asyncio.Task[None]] = []
        self._enough = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        for nr, (out, back) in enumerate(self.streams, start=1):
            port = await self._guest.wait_port(nr=nr)
            reader, writer = await port.open()
            self._writers.append(writer)  # which closes the port when it goes
            self._tasks.append(asyncio.create_task(self._send(out, writer)))
            self._tasks.append(asyncio.create_task(self._receive(back, reader)))

    async def goes_on(self) -> None:
        """Wait until every stream has moved."""
        streams = [stream for pair in self.streams for stream in pair]
        before = [stream.received for stream in streams]
        await until(
            lambda: all(s.received > b for s, b in zip(streams, before, strict=True)),
            lambda: f"{before} {[stream.received for stream in streams]}",
            unless=self._failed,
        )

    async def finish(self, machine: HostEnds) -> None:
        """Send no more, and wait until all has come that was sent."""
        self._enough.set()
        await asyncio.gather(*self._tasks[::2])
        await until(lambda: all(out.received == out.sent for out, _ in self.streams))
        await machine.stop()
        await until(
            lambda: all(back.received == back.sent for _, back in self.streams),
            lambda: f"{[(back.sent, back.received) for _, back in self.streams]}",
            unless=self._failed,
        )

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()

    def _failed(self) -> list[BaseException]:
        """What programs that have ended met."""
        done = [task for task in self._tasks if task.done() and not task.cancelled()]
        return [error for task in done if (error := task.exception()) is not None]

    async def _send(self, out: Stream, writer: asyncio.StreamWriter) -> None:
        chance = random.Random(3)
        while not self._enough.is_set():
            data = pattern(out.sent, chance.randrange(1, 60_000))
            writer.write(data)
            out.sent += len(data)
            await writer.drain()
            await asyncio.sleep(0)

    async def _receive(self, back: Stream, reader: asyncio.StreamReader) -> None:
        while True:
            back.take(await reader.read(PIECE))
