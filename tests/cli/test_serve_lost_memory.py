"""``vring serve`` under guests that cut off their own RAM in the middle of everything."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.examples import EXAMPLES
from tests.support.processes import end
from tests.support.waiting import until, until_file_says
from vring_serial.guest import memory
from vring_serial.guest.guest import EmbeddedGuest

TIMEOUT = 20
DOMAIN = EXAMPLES / "spice-agent.xml"


@pytest.fixture(autouse=True)
def unsealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests whose RAM can be cut off, which the embedded guest's cannot."""
    seals = SimpleNamespace(F_ADD_SEALS=0, F_SEAL_SHRINK=0, F_SEAL_GROW=0, fcntl=lambda *_: 0)
    monkeypatch.setattr(memory, "fcntl", seals)


class Server:
    """A running ``vring serve`` with a socket port, 2, and the agent's, which is Python code."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self.directory = directory
        self.process = process
        self.log = directory / "log"

    async def logged(self, text: str, count: int = 1) -> None:
        await until_file_says(
            self.log, text, count, unless=lambda: self.process.returncode is not None
        )

    async def guest(self) -> EmbeddedGuest:
        guest = EmbeddedGuest(str(self.directory / "v"), memory=32 << 20)
        async with asyncio.timeout(TIMEOUT):
            await guest.start()
            await guest.wait_port(nr=1)
            await guest.wait_port(nr=2)
        return guest

    async def host(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(str(self.directory / "a"))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    arguments = (
        *("--vhost-user", "v", "--domain", str(DOMAIN)),
        *("--chardev", "socket,id=a,path=a,server=on,wait=off"),
        *("--port", "chardev=a,nr=2,name=org.example.data"),
    )
    with open(tmp_path / "log", "wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vring_serial", "serve", *arguments), cwd=tmp_path, stderr=log
        )
    server = Server(process, tmp_path)
    try:
        await server.logged("serving;")
        yield server
        assert process.returncode is None, "the server died"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT):
            assert await process.wait() == 0
    finally:
        await end(process)


def cut_off(guest: EmbeddedGuest) -> None:
    """And kick: a server that has nothing to do there does not miss the memory."""
    assert guest.ram is not None
    os.ftruncate(guest.ram.fd, 0)
    for queue in guest.queues.values():
        os.eventfd_write(queue.kick_fd, 1)


class Traffic:
    """What goes through the server at once, until it is ended."""

    #: Bytes of one direction that no socket's buffers hold: some are in the server, or beyond.
    ROLLING = 1 << 18

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._sent: list[int] = []

    def flood(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        number = len(self._sent)
        self._sent.append(0)

        async def write() -> None:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while True:
                    writer.write(data)
                    await writer.drain()
                    self._sent[number] += len(data)

        self._tasks.append(asyncio.create_task(write()))

    def swallow(self, reader: asyncio.StreamReader) -> None:
        async def read() -> None:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while await reader.read(1 << 16):
                    pass

        self._tasks.append(asyncio.create_task(read()))

    async def rolls(self) -> None:
        """Wait until all that floods is in full flow."""
        await until(lambda: min(self._sent) >= self.ROLLING)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def drain(server: Server) -> None:
    """What a host sent before it left is for the next guest."""
    guest = await server.guest()
    reader, _ = await (await guest.wait_port(nr=2)).open()
    async with asyncio.timeout(TIMEOUT):
        while await reader.read(1 << 16):
            pass
    await guest.aclose()


async def all_bytes_right(server: Server) -> None:
    """8 MiB each way at once with the next guest."""
    data = os.urandom(1 << 20) * 8
    guest = await server.guest()
    host = await server.host()
    try:
        async with asyncio.timeout(TIMEOUT):
            port = await guest.wait_port(nr=2)
            await port.wait_host()
            ends = await port.open()

            async def send(writer: asyncio.StreamWriter) -> None:
                for at in range(0, len(data), 65536):
                    writer.write(data[at : at + 65536])
                    await writer.drain()

            results = await asyncio.gather(
                ends[0].readexactly(len(data)),
                host[0].readexactly(len(data)),
                send(ends[1]),
                send(host[1]),
            )
        wanted = hashlib.sha256(data).digest()
        assert [hashlib.sha256(each).digest() for each in results[:2]] == [wanted, wanted]
    finally:
        host[1].close()
        await guest.aclose()


async def open_port(
    guest: EmbeddedGuest, nr: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(TIMEOUT):
        port = await guest.wait_port(nr=nr)
        await port.wait_host()
        return await port.open()


@pytest.mark.parametrize("direction", ["out", "in", "both"])
@pytest.mark.parametrize("size", [100, 32768])
async def test_under_traffic_of_the_pump(server: Server, direction: str, size: int) -> None:
    gone = 0
    for _ in range(4):
        guest = await server.guest()
        host = await server.host()
        reader, writer = await open_port(guest, 2)
        traffic = Traffic()
        for each in (reader, host[0]):
            traffic.swallow(each)
        if direction != "in":
            traffic.flood(writer, b"g" * size)
        if direction != "out":
            traffic.flood(host[1], b"h" * size)
        await traffic.rolls()
        cut_off(guest)
        gone += 1
        await server.logged("frontend gone", gone)
        await traffic.end()
        await guest.aclose()
        host[1].close()
        if direction != "out":
            await drain(server)
            gone += 1
    # Not each time: the guest's own driver may see zeros and give up before the server does.
    await server.logged("is gone: the file was cut off")
    await all_bytes_right(server)


async def test_under_traffic_of_a_protocol(server: Server) -> None:
    """The agent's messages are copied by Python code."""
    for count in range(1, 6):
        guest = await server.guest()
        reader, writer = await open_port(guest, 1)
        # An empty message for the server's port, again and again.
        message = bytes.fromhex("0200000014000000 0100000005000000 0000000000000000 00000000")
        traffic = Traffic()
        traffic.swallow(reader)
        traffic.flood(writer, message * 100)
        await traffic.rolls()
        cut_off(guest)
        await server.logged("frontend gone", count)
        await traffic.end()
        await guest.aclose()
    await server.logged("is gone: the file was cut off")
    await all_bytes_right(server)


async def test_on_the_control_queue(server: Server) -> None:
    guest = await server.guest()
    await guest.settle()
    # Only the control queues have buffers; that the host's end opens is a control message.
    assert guest.ram is not None
    os.ftruncate(guest.ram.fd, 0)
    host = await server.host()
    await server.logged("is gone: the file was cut off")
    await server.logged("frontend gone")
    host[1].close()
    await guest.aclose()
    await all_bytes_right(server)
