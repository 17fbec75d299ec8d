"""A guest is moved between two services whose workers are killed at every step of it."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support.keeper import Kept, kept, socket_ports
from tests.support.migration import Migration
from tests.support.traffic import PORTS, Host, Traffic
from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.guest.frontend import Frontend

T = TypeVar("T")


class Service:
    """A kept backend, and the clients of its ports."""

    def __init__(self, kept: Kept, hosts: list[Host]) -> None:
        self.kept = kept
        self.hosts = hosts
        self._tasks: list[asyncio.Task[None]] = []

    def run(self, traffic: Traffic, *, send: bool = True) -> None:
        loop = asyncio.get_running_loop()
        for host, (out, back) in zip(self.hosts, traffic.streams, strict=True):
            self._tasks.append(loop.create_task(host.receive(out)))
            if send:
                self._tasks.append(loop.create_task(host.send(back, random.Random(2))))

    async def stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError | None):
                raise result

    async def killed(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step; a worker is killed before it, and the next one meanwhile."""
        await self.kept.kill_until_served()
        doing = asyncio.ensure_future(step())
        await asyncio.sleep(0)  # its first message is sent
        await self.kept.kill_until_served()
        return await doing


async def serve(stack: AsyncExitStack, directory: Path, *, packed: bool) -> Service:
    directory.mkdir()
    options = ["--max-ports", str(PORTS + 1), *(["--packed"] if packed else [])]
    service = await stack.enter_async_context(
        kept(directory, *socket_ports(range(1, PORTS + 1)), *options)
    )
    hosts = []
    for nr in range(PORTS):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(directory / f"c{nr + 1}"))
        hosts.append(Host(sock, slow=nr == 0))
        stack.callback(hosts[-1].close)
    return Service(service, hosts)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_workers_may_die_at_every_step_of_a_move(tmp_path: Path, packed: bool) -> None:
    async with AsyncExitStack() as stack:
        source = await serve(stack, tmp_path / "a", packed=packed)
        target = await serve(stack, tmp_path / "b", packed=packed)
        guest = EmbeddedGuest(str(source.kept.path), memory=32 << 20, packed=packed)
        await stack.enter_async_context(guest)
        traffic = Traffic(guest)
        stack.push_async_callback(traffic.stop)
        await traffic.start()
        source.run(traffic)
        stack.push_async_callback(source.stop)
        stack.push_async_callback(target.stop)
        await traffic.goes_on()
        migration = Migration(guest)
        await source.killed(migration.begin)
        for _ in range(2):
            await traffic.goes_on()
            await source.killed(migration.round)
        # What was sent and is not in the guest would stay behind.
        await source.stop()
        source.run(traffic, send=False)
        await until(lambda: all(back.received == back.sent for _, back in traffic.streams))
        bases = await source.killed(migration.stop)
        state = await source.killed(guest.frontend.save_state)
        await source.stop()
        for host, streams in zip(source.hosts, traffic.streams, strict=True):
            host.leave(*streams)
        migration.finish()
        frontend = Frontend(str(target.kept.path))
        await frontend.connect()
        await frontend.negotiate_protocol()
        await target.killed(lambda: frontend.load_state(state))
        await target.killed(lambda: guest.go_on(frontend, bases))
        migration.close()
        target.run(traffic)
        await traffic.goes_on()
        await target.killed(traffic.goes_on)
        # Nothing more of this guest comes at the source.
        for host, streams in zip(source.hosts, traffic.streams, strict=True):
            host.leave(*streams)
        await traffic.finish(target)
        for service in (source, target):
            assert "cannot be gone on with" not in service.kept.log
            assert "begins anew" not in service.kept.log
