"""User-Mode Linux on ``vring serve``: workers are killed while it boots and works."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.bench import MIB, receive_digest
from tests.support.exchange import connections
from tests.support.keeper import Kept, kept, socket_ports
from tests.support.uml import UmlPayload
from tests.support.waiting import until
from vring_serial.guest.uml import UmlGuest

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Bytes each way; in band, every notification is a message and an acknowledgement.
SIZES = {"eventfds": 24 * MIB, "inband": 4 * MIB}


class KeptUml:
    """A served device with two ports, and a guest on it."""

    def __init__(self, server: Kept, guest: UmlGuest, size: int) -> None:
        self.server = server
        self.guest = guest
        self.size = size
        self.chance = random.Random(7)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=SIZES)
async def uml(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[KeptUml]:
    directory: Path = tmp_path_factory.mktemp("kept")
    options = ["--inband-notifications"] if request.param == "inband" else []
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(kept(directory, *socket_ports((1, 2)), *options))
        guest = UmlGuest([server.path])
        stack.push_async_callback(guest.aclose)
        uml = KeptUml(server, guest, SIZES[request.param])
        booting = asyncio.create_task(guest.start())
        for _ in range(4):
            said = len(server.log)
            await until(lambda said=said: len(server.log) > said or booting.done())
            await asyncio.sleep(uml.chance.random() * 0.05)  # any moment of the start
            await server.kill()
        await booting
        yield uml
        assert "warning" not in server.log.lower()
        assert server.log.count("another one goes on") == server.kills
        assert "frontend gone" not in server.log


async def test_streams_go_on(uml: KeptUml) -> None:
    payload = UmlPayload(uml.guest, uml.size)
    before = uml.server.kills
    async with connections(lambda nr: uml.server.connect(int(nr)), "1", "2") as streams:
        (reader, _), (_, writer) = streams
        async with asyncio.timeout(55), uml.server.dying(uml.chance):
            while uml.server.kills < before + 2:
                taking = asyncio.create_task(
                    uml.guest.run(
                        f"cat {payload.guest_path} >/dev/vport0p1 &"
                        f"head -c {payload.size} /dev/vport0p2 | sha256sum; wait",
                        timeout=50,
                    )
                )
                writer.write(payload.data)
                assert await receive_digest(reader, payload.size) == payload.sha256
                assert (await taking).output.split()[0] == payload.sha256


async def test_ports_are_opened_and_closed(uml: KeptUml) -> None:
    async with connections(lambda nr: uml.server.connect(int(nr)), "1") as [(reader, writer)]:
        for number in range(6):
            loop = "for i in 1 2 3 4; do exec 3<>/dev/vport0p1; exec 3>&-; done"
            turning = asyncio.create_task(uml.guest.run(loop))
            await asyncio.sleep(uml.chance.random() * 0.02)  # any moment of the loop
            await uml.server.kill()
            await turning
            await uml.guest.run(f"echo out {number} >/dev/vport0p1")
            assert await asyncio.wait_for(reader.readline(), 30) == f"out {number}\n".encode()
            writer.write(b"in\n")
            assert (await uml.guest.run("head -n 1 /dev/vport0p1")).output == "in"
