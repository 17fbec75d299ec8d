"""A guest is moved from one backend to another while bytes go both ways through four ports."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.support.migration import Migration
from tests.support.processes import running
from tests.support.traffic import PORTS, Host, Stream, Traffic
from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.guest.errors import BackendRefusedError
from vring_serial.guest.frontend import Frontend

PROGRAM = Path(__file__).with_name("given_sockets.py")
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Machine:
    """A backend with host ends of its own.

    Args:
        path: of its socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hosts = [Host(*socket.socketpair(), slow=nr == 0) for nr in range(PORTS)]
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def serving(self, *, packed: bool) -> AsyncIterator[None]:
        fds = [host.theirs.fileno() for host in self.hosts if host.theirs is not None]
        layout = "packed" if packed else "split"
        command = (sys.executable, str(PROGRAM), str(self.path), layout, *map(str, fds))
        try:
            async with running(*command, pass_fds=fds):
                await until(self.path.with_name(f"{self.path.name}.ready").exists)
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
