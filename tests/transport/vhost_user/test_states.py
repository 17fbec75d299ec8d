"""Any order of messages: what runs is what a simple model says, and nothing leaks."""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.leaks import held
from tests.support.scripted_frontend import connect_to
from vring_serial.proto.vhost_user import (
    U64,
    MemoryTable,
    Request,
    VringDescriptor,
    VringState,
)
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend

OFFERED = int(PROTOCOL_FEATURES)


@dataclass
class ModelRing:
    """What the specification's "Ring states" come to."""

    size: bool = False
    placed: bool = False
    started: bool = False
    enabled: bool = False

    @property
    def running(self) -> bool:
        return self.size and self.placed and self.started and self.enabled


#: Methods of Play; "up" is there so that many queues come to run.
NAMES = ["up", "num", "base", "addr", "kick", "nofd", "call", "enable", "disable", "get"]
NAMES += ["table", "status", "reset", "echo", "config", "bad"]
STEPS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2)), max_size=30)


class Play:
    """Applies steps to a frontend and to the model."""

    def __init__(self, frontend: Any, device: Any) -> None:
        self.frontend = frontend
        self.device = device
        self.model = [ModelRing() for _ in range(device.num_queues)]
        self.bases = [0] * device.num_queues

    async def acked(self, right: bool, *message: Any) -> None:
        assert (await self.frontend.acked(*message) == 0) == right

    async def step(self, name: str, index: int) -> None:
        await getattr(self, name)(index, self.model[index])
        running = {i for i, ring in enumerate(self.model) if ring.running}
        assert set(self.device.running) == running

    async def up(self, index: int, ring: ModelRing) -> None:
        if not ring.size:
            await self.num(index, ring)
        for part in (self.addr, self.kick, self.enable, self.echo):
            await part(index, ring)

    async def num(self, index: int, ring: ModelRing) -> None:
        await self.acked(not ring.running, Request.SET_VRING_NUM, VringState(index, 64))
        ring.size = True

    async def base(self, index: int, ring: ModelRing) -> None:
        state = VringState(index, self.bases[index])
        await self.acked(not ring.running, Request.SET_VRING_BASE, state)

    async def addr(self, index: int, ring: ModelRing) -> None:
        if not ring.placed:
            there = index in self.frontend.drivers
            address = self.frontend.places[index] if there else self.frontend.ring(index)
            await self.acked(True, Request.SET_VRING_ADDR, address)
            ring.placed = True

    async def kick(self, index: int, ring: ModelRing) -> None:
        kick = os.eventfd(0, os.EFD_NONBLOCK)
        if index in self.frontend.kicks:
            os.close(self.frontend.kicks[index])
        self.frontend.kicks[index] = kick
        await self.acked(True, Request.SET_VRING_KICK, VringDescriptor(index), (kick,))
        ring.started = True

    async def nofd(self, index: int, ring: ModelRing) -> None:
        await self.acked(True, Request.SET_VRING_KICK, VringDescriptor(index, no_fd=True))
        ring.started = True

    async def call(self, index: int, ring: ModelRing) -> None:
        call = os.eventfd(0, os.EFD_NONBLOCK)
        await self.acked(True, Request.SET_VRING_CALL, VringDescriptor(index), (call,))
        os.close(call)

    async def enable(self, index: int, ring: ModelRing) -> None:
        await self.acked(True, Request.SET_VRING_ENABLE, VringState(index, 1))
        ring.enabled = True

    async def disable(self, index: int, ring: ModelRing) -> None:
        await self.acked(True, Request.SET_VRING_ENABLE, VringState(index, 0))
        ring.enabled = False

    async def get(self, index: int, ring: ModelRing) -> None:
        assert await self.frontend.base(index) == self.bases[index]
        ring.started = False

    async def table(self, index: int, ring: ModelRing) -> None:
        table = MemoryTable((self.frontend.region,))
        await self.acked(True, Request.SET_MEM_TABLE, table, (self.frontend.memfd,))

    async def status(self, index: int, ring: ModelRing) -> None:
        """Queues are ended; where they stand stays, as GET_VRING_BASE and "up" find."""
        await self.acked(True, Request.SET_STATUS, U64(0))
        self.model[:] = [ModelRing() for _ in self.model]

    async def reset(self, index: int, ring: ModelRing) -> None:
        await self.acked(True, Request.RESET_DEVICE)
        self.model[:] = [ModelRing() for _ in self.model]
        self.bases[:] = [0] * len(self.bases)
        self.frontend.drivers.clear()

    async def echo(self, index: int, ring: ModelRing) -> None:
        if index in self.frontend.drivers and ring.running:
            self.frontend.put(index, b"data", index)
            if index in self.frontend.kicks:
                self.frontend.kick(index)
            assert await self.frontend.used(index) == [4]
            self.bases[index] += 1

    async def config(self, index: int, ring: ModelRing) -> None:
        self.device.on_config_change()

    async def bad(self, index: int, ring: ModelRing) -> None:
        fd = (self.frontend.memfd,)
        bad = [
            (Request.SET_VRING_NUM, VringState(index, 3)),
            (Request.SET_VRING_KICK, VringDescriptor(index), fd),
            (Request.SET_LOG_BASE, U64(0), fd),
        ]
        await self.acked(False, *bad[index])


def in_a_loop(device: Any, play: Callable[[Any], Awaitable[None]]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "s"
            backend = VhostUserBackend(device, str(path))
            await backend.start()
            frontend = connect_to(path)
            try:
                await frontend.negotiate(OFFERED)
                await play(frontend)
            finally:
                frontend.close()
                await backend.aclose()
            assert not device.running

    asyncio.run(run())


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_any_order_of_messages(steps: list[tuple[str, int]], device: Any) -> None:
    device.__init__()
    before = held()

    async def play(frontend: Any) -> None:
        game = Play(frontend, device)
        for name, index in itertools.chain(steps, [("echo", 0)]):
            await game.step(name, index)

    in_a_loop(device, play)
    assert held() == before
