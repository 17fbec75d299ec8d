"""Stock QEMU on ``vring serve``: workers are killed all the time, and no guest notices."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.bench import MIB, Stream, hang_up
from tests.support.exchange import Exchange, Payload, check, connections
from tests.support.keeper import Kept, kept, socket_ports
from tests.support.qemu_machine import QemuMachine
from tests.support.qemu_ways import PORT_NAMES, vfio_user_device
from tests.support.waiting import PERIOD, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PORTS = (1, 2, 3)
NAMES = "".join(f"org.example.data{nr}\n" for nr in PORTS)


class KeptMachine:
    """A served device with PORTS, and a guest of QEMU's on it."""

    def __init__(self, server: Kept, guest: QemuMachine, payload: Payload) -> None:
        self.server = server
        self.guest = guest
        self.payload = payload
        self.chance = random.Random(5)

    async def ports_are_there(self) -> None:
        """A guest takes commands before it knows all ports."""
        await self.guest.run(
            f"until [ $({{ {PORT_NAMES}; }} | wc -l) = {len(PORTS)} ]; do sleep 0.05; done"
        )
        assert await self.guest.run(PORT_NAMES) == NAMES

    async def lines_go_both_ways(self, nr: int, stream: Stream, text: str) -> None:
        """Check that nothing else is in between, before or after."""
        reader, writer = stream
        await self.guest.run(f"echo {text} out >/dev/vport0p{nr}")
        assert await asyncio.wait_for(reader.readline(), 30) == f"{text} out\n".encode()
        writer.write(f"{text} in\n".encode())
        assert await self.guest.run(f"head -n 1 /dev/vport0p{nr}") == f"{text} in\n"

    async def boot_while_workers_die(self, boot: asyncio.Task[None]) -> None:
        """Kill some while nothing happens, and many while the driver sets the device up."""
        said = self.server.log.count("the driver accepted")
        while not boot.done():
            if self.server.log.count("the driver accepted") > said:
                for _ in range(3):
                    # Some die before they serve; five of them in a row would end the session.
                    for kill in (self.server.kill, self.server.kill_until_served):
                        await asyncio.sleep(self.chance.random() * 0.05)  # any moment of it
                        await kill()
                break
            await asyncio.sleep(PERIOD)
        await boot
        await self.ports_are_there()


@dataclass(frozen=True)
class KeptWay:
    """One way for QEMU to have the device.

    Attributes:
        protocol: what it is served over.
        options: further ones of ``vring serve``.
        append: words for the guest's kernel.
    """

    protocol: str
    options: tuple[str, ...] = ()
    append: str = ""

    def device(self, path: Path) -> list[str]:
        """QEMU's options for the device that is served at ``path``."""
        if self.protocol == "vfio-user":
            return vfio_user_device(path, addr="05.0")
        words = (
            "vhost-user-test-device-pci,chardev=vring,virtio-id=3,vq_size=128,config_size=12,"
            "num_vqs=64,addr=05.0"
        )
        return ["-chardev", f"socket,id=vring,path={path}", "-device", words]

    @property
    def peer(self) -> str:
        """What the log calls QEMU."""
        return "frontend" if self.protocol == "vhost-user" else "client"


WAYS = {
    "vhost-user": KeptWay("vhost-user"),
    "vhost-user-packed": KeptWay("vhost-user", ("--packed",)),
    "vfio-user": KeptWay("vfio-user"),
    "vfio-user-packed": KeptWay("vfio-user", ("--packed",)),
    "vfio-user-intx": KeptWay("vfio-user", append="pci=nomsi"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=WAYS)
async def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[KeptMachine]:
    directory: Path = tmp_path_factory.mktemp("kept")
    way = WAYS[request.param]
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            kept(directory, *socket_ports(PORTS), *way.options, protocol=way.protocol)
        )
        payload = Payload(4 * MIB)
        guest = QemuMachine(
            directory,
            way.device(server.path),
            files={"payload": payload.data},
            append=f"reboot=t {way.append}",
        )
        stack.push_async_callback(guest.aclose)
        machine = KeptMachine(server, guest, payload)
        await machine.boot_while_workers_die(asyncio.create_task(guest.start()))
        yield machine
        log = server.log
        assert "warning" not in log.lower()
        assert log.count("another one goes on") == server.kills
        assert log.count(f"{way.peer} connected") == 1
        assert f"{way.peer} gone" not in log
        console = guest.log_path.read_text()
        assert "virtio" not in console, console


async def test_streams_go_on(machine: KeptMachine) -> None:
    async with connections(lambda nr: machine.server.connect(int(nr)), "1", "2") as streams:
        for nr, stream in enumerate(streams, 1):
            await machine.lines_go_both_ways(nr, stream, "first")
        await machine.server.kill()  # the keeper has taken all that was told it until then
        for nr, stream in enumerate(streams, 1):
            await machine.lines_go_both_ways(nr, stream, "second")
        held = machine.server.held
        times = 8
        exchanges = [
            Exchange(stream, f"/dev/vport0p{nr}", machine.payload, times, hangs_up=False)
            for nr, stream in enumerate(streams, 1)
        ]
        expected = machine.payload.sha256(times)
        before = machine.server.kills
        async with machine.server.dying(machine.chance):
            await check(machine.guest, *exchanges, expected=expected, timeout=50)
        assert machine.server.kills > before + 3
        for nr, stream in enumerate(streams, 1):
            await machine.lines_go_both_ways(nr, stream, "last")
        await until(lambda: machine.server.held == held, lambda: f"{held}, {machine.server.held}")


async def test_ports_are_opened_and_closed(machine: KeptMachine) -> None:
    stream = await machine.server.connect(1)
    for number in range(6):
        loop = "for i in 1 2 3 4 5 6; do exec 3<>/dev/vport0p1; exec 3>&-; done"
        turning = asyncio.create_task(machine.guest.run(loop))
        await asyncio.sleep(machine.chance.random() * 0.02)  # any moment of the loop
        await machine.server.kill()
        await turning
        await machine.lines_go_both_ways(1, stream, f"{number}")
    await hang_up(stream[1])


async def test_a_stopped_machine_goes_on(machine: KeptMachine) -> None:
    async with connections(lambda nr: machine.server.connect(int(nr)), "1") as [stream]:
        times = 12
        exchange = Exchange(stream, "/dev/vport0p1", machine.payload, times, hangs_up=False)
        expected = machine.payload.sha256(times)
        moving = asyncio.create_task(check(machine.guest, exchange, expected=expected, timeout=50))
        for number in range(6):
            more = exchange.moved + MIB
            await until(lambda more=more: exchange.moved >= more, "bytes move")
            kill = machine.server.kill
            stopping, dying = machine.guest.qmp("stop"), kill()
            await asyncio.gather(*((stopping, dying) if number % 2 else (dying, stopping)))
            await asyncio.gather(machine.guest.qmp("cont"), kill())
        await moving


@pytest.mark.parametrize("how", ["reboot", "reset"])
async def test_a_guest_starts_anew(machine: KeptMachine, how: str) -> None:
    async with connections(lambda nr: machine.server.connect(int(nr)), "1", "3") as [stream, _]:
        # Rings fill meanwhile; fewer bytes make the test easier, not wrong.
        await machine.guest.run("cat /dev/zero >/dev/vport0p3 & exec 3</dev/vport0p1; sleep 0.2")
        again = machine.guest.reboot if how == "reboot" else machine.guest.reset
        booting = asyncio.create_task(again())
        await asyncio.sleep(machine.chance.random() * 0.05)  # any moment of the end
        await machine.server.kill()
        await machine.boot_while_workers_die(booting)
        await machine.lines_go_both_ways(1, stream, how)
