"""Backends that are killed under full traffic; the frontend keeps the region for inflight I/O."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from pathlib import Path

import pytest

from tests.support.processes import running
from tests.support.waiting import until
from vring_serial import EmbeddedGuest

PROGRAM = Path(__file__).with_name("given_sockets.py")
KILLS = 8
PORTS = 2
#: A prime length: no lost or doubled power of two of bytes goes unnoticed.
PRIME = 65_521
PATTERN = random.Random(5).randbytes(PRIME) * 3


class Stream:
    """A sequence of bytes from one end of a port to the other, checked as it comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sent = self.received = 0
        self._reader, self._writer = reader, writer

    async def send(self, enough: asyncio.Event, chance: random.Random) -> None:
        while not enough.is_set():
            start, length = self.sent % PRIME, chance.randrange(1, 60_000)
            self._writer.write(PATTERN[start : start + length])
            self.sent += length
            await self._writer.drain()
            await asyncio.sleep(0)

    async def receive(self) -> None:
        while data := await self._reader.read(1 << 16):
            start = self.received % PRIME
            assert data == PATTERN[start : start + len(data)], f"wrong after {self.received}"
            self.received += len(data)
        raise AssertionError(f"it ended after byte {self.received}")


async def all_go_on(streams: list[Stream]) -> None:
    before = [stream.received for stream in streams]
    await until(lambda: all(s.received > b for s, b in zip(streams, before, strict=True)))


@pytest.mark.parametrize("layout", ["split", "packed"])
async def test_every_byte_comes_once_whatever_is_killed(tmp_path: Path, layout: str) -> None:
    chance = random.Random(KILLS)
    pairs = [socket.socketpair() for _ in range(PORTS)]
    fds = [theirs.fileno() for _, theirs in pairs]
    path = str(tmp_path / "v")
    command = (sys.executable, str(PROGRAM), path, layout, *map(str, fds))
    guest = EmbeddedGuest(path, memory=64 << 20, packed=layout == "packed", reconnect=True)
    writers: list[asyncio.StreamWriter] = []
    try:
        async with running(*command, pass_fds=fds) as process:
            await until(lambda: (tmp_path / "v.ready").exists())
            await guest.start()
            streams = []
            for nr, (ours, _) in enumerate(pairs, start=1):
                host_reader, host_writer = await asyncio.open_unix_connection(sock=ours)
                port = await guest.wait_port(nr=nr)
                guest_reader, guest_writer = await port.open()
                writers += [host_writer, guest_writer]
                streams += [Stream(host_reader, guest_writer), Stream(guest_reader, host_writer)]
            enough = asyncio.Event()
            sending = [asyncio.create_task(s.send(enough, chance)) for s in streams]
            receiving = [asyncio.create_task(s.receive()) for s in streams]
            await all_go_on(streams)
            process.kill()
            await process.wait()
        for kill in range(KILLS):
            async with running(*command, pass_fds=fds) as process:
                await all_go_on(streams)
                await asyncio.sleep(chance.random() * 0.2)  # any moment of the traffic
                if kill == KILLS - 1:
                    enough.set()
                    await asyncio.gather(*sending)
                    await until(lambda: all(s.received == s.sent for s in streams))
                process.kill()
                await process.wait()
        assert not any(task.done() for task in receiving)
        for task in receiving:
            task.cancel()
        await asyncio.gather(*receiving, return_exceptions=True)
    finally:
        for writer in writers:
            writer.close()
        await guest.aclose()
        for _, theirs in pairs:
            theirs.close()
