"""A guest is moved from one backend to another while bytes go both ways through four ports."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.migration import Migration
from tests.support.processes import running
from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.guest.errors import BackendRefusedError
from vring_serial.guest.frontend import Frontend

PROGRAM = Path(__file__).with_name("given_sockets.py")
PORTS = 4
#: A prime length: no lost or doubled power of two of bytes goes unnoticed.
PRIME = 65_521
PATTERN = random.Random(7).randbytes(PRIME) * 3
#: Most bytes received at once.
PIECE = 1 << 16
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def pattern(at: int, length: int) -> bytes:
    start = at % PRIME
    return PATTERN[start : start + length]


class Host:
    """The host end of one port on one machine: what it has sent and received in all, elsewhere too.

    Args:
        slow: it reads little, so that its socket is full most of the time.
    """

    def __init__(self, *, slow: bool) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
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
        while data := _received(self.theirs):
            back.sent -= len(data)

    def close(self) -> None:
        self.ours.close()
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


class Machine:
    """A backend with host ends of its own.

    Args:
        path: of its socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hosts = [Host(slow=nr == 0) for nr in range(PORTS)]
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def serving(self, *, packed: bool) -> AsyncIterator[None]:
        fds = [host.theirs.fileno() for host in self.hosts]
        layout = "packed" if packed else "split"
        command = (sys.executable, str(PROGRAM), str(self.path), layout, *map(str, fds))
        try:
            async with running(*command, pass_fds=fds):
                await until(self.path.exists)
                yield
        finally:
            await self.stop()
            for host in self.hosts:
                host.close()

    def run(self, streams: list[tuple[Stream, Stream]]) -> None:
        """Have the host ends send and receive."""
        chance = random.Random(len(streams))
        loop = asyncio.get_running_loop()
        for host, (out, back) in zip(self.hosts, streams, strict=True):
            self._tasks.append(loop.create_task(host.receive(out)))
            self._tasks.append(loop.create_task(host.send(back, chance)))

    async def stop(self) -> None:
        """Until :meth:`run`. Raises what was wrong with what was received."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError | None):
                raise result

    async def leave(self, streams: list[tuple[Stream, Stream]]) -> None:
        """As :meth:`stop`, for a guest that has left."""
        await self.stop()
        for host, (out, back) in zip(self.hosts, streams, strict=True):
            host.leave(out, back)


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

    async def finish(self, machine: Machine) -> None:
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


@asynccontextmanager
async def moving(directory: Path, count: int, *, packed: bool) -> AsyncIterator[Moving]:
    """A guest with traffic on the first of several machines."""
    async with AsyncExitStack() as stack:
        machines = [Machine(directory / f"v{number}") for number in range(count)]
        for machine in machines:
            await stack.enter_async_context(machine.serving(packed=packed))
        guest = EmbeddedGuest(str(machines[0].path), memory=32 << 20, packed=packed)
        await stack.enter_async_context(guest)
        traffic = Traffic(guest)
        stack.push_async_callback(traffic.stop)
        await traffic.start()
        machines[0].run(traffic.streams)
        await traffic.goes_on()
        yield Moving(guest, machines, traffic)


class Moving:
    """A guest, and the machines that it may be on."""

    def __init__(self, guest: EmbeddedGuest, machines: list[Machine], traffic: Traffic) -> None:
        self.guest = guest
        self.machines = machines
        self.traffic = traffic

    async def copy(self) -> Migration:
        """Copy memory in rounds, while bytes move."""
        migration = Migration(self.guest)
        await migration.begin()
        for _ in range(3):
            await self.traffic.goes_on()
            await migration.round()
        assert migration.copied
        return migration

    async def connect(self, machine: Machine) -> Frontend:
        frontend = Frontend(str(machine.path))
        await frontend.connect()
        await frontend.negotiate_protocol()
        return frontend

    async def move(self, source: Machine, target: Machine) -> None:
        migration = await self.copy()
        bases = await migration.stop()
        # Until then the device goes on writing what it owes its host ends.
        state = await self.guest.frontend.save_state()
        await source.leave(self.traffic.streams)
        migration.finish()
        frontend = await self.connect(target)
        await frontend.load_state(state)
        await self.guest.go_on(frontend, bases)
        migration.close()
        target.run(self.traffic.streams)


@LAYOUTS
async def test_a_guest_moves_and_no_byte_is_lost_or_doubled(tmp_path: Path, packed: bool) -> None:
    async with moving(tmp_path, 3, packed=packed) as moved:
        for source, target in zip(moved.machines, moved.machines[1:], strict=False):
            await moved.move(source, target)
            await moved.traffic.goes_on()
        await moved.traffic.finish(moved.machines[-1])


@pytest.mark.parametrize(
    ("packed", "when"),
    [(False, "copied"), (True, "stopped"), (False, "saved"), (False, "loaded"), (True, "loaded")],
)
async def test_a_cancelled_move_goes_on_where_it_was(
    tmp_path: Path, packed: bool, when: str
) -> None:
    async with moving(tmp_path, 2, packed=packed) as moved:
        first, second = moved.machines
        migration = await moved.copy()
        if when != "copied":
            bases = await migration.stop()
            state = await moved.guest.frontend.save_state() if when != "stopped" else b""
            if when == "loaded":
                frontend = await moved.connect(second)
                await frontend.load_state(state)
                frontend.close()
            await moved.guest.go_on(moved.guest.frontend, bases)
        await migration.cancel()
        await moved.traffic.goes_on()
        # The other one has forgotten that it was to have the guest.
        await moved.move(first, second)
        await moved.traffic.goes_on()
        await moved.traffic.finish(second)


@pytest.mark.parametrize("what", ["torn", "too large"])
async def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path, what: str) -> None:
    async with moving(tmp_path, 2, packed=False) as moved:
        first, second = moved.machines
        migration = await moved.copy()
        bases = await migration.stop()
        state = await moved.guest.frontend.save_state()
        bad = state[: len(state) // 2] if what == "torn" else state + bytes(17 << 20)
        frontend = await moved.connect(second)
        with pytest.raises(BackendRefusedError):
            await frontend.load_state(bad)
        frontend.close()
        await moved.guest.go_on(moved.guest.frontend, bases)
        await migration.cancel()
        await moved.traffic.goes_on()
        await moved.move(first, second)
        await moved.traffic.goes_on()
        await moved.traffic.finish(second)
        assert os.path.exists(first.path)
