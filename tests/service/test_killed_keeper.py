"""The keeper is killed under traffic: its worker serves on, says so, and stops when it is told."""

from __future__ import annotations

import os
import random
import signal

import pytest

from tests.support.keeper import kept, socket_ports
from tests.support.streams import all_go_on, flowing
from tests.support.vfio_guest import VfioGuest
from tests.support.waiting import until
from vring_serial import EmbeddedGuest

PORTS = range(1, 5)


@pytest.mark.parametrize("protocol", ["vhost-user", "vfio-user"])
async def test_a_worker_without_its_keeper(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    guest_of = EmbeddedGuest if protocol == "vhost-user" else lambda path: VfioGuest(path, 5)
    arguments = socket_ports([*PORTS, 5])
    async with kept(tmp_path, *arguments, protocol=protocol) as keeper, guest_of("v") as guest:
        async with flowing(keeper, guest, PORTS, random.Random(1)) as streams:
            await keeper.kill()  # this worker is a successor
            await all_go_on(streams)
            worker = keeper.worker
            keeper.process.kill()
            await keeper.process.wait()
            await keeper.logged("the keeper has ended; this process serves on")
            for _ in range(5):
                await all_go_on(streams)
            for number_of_client in (1, 2):  # who comes is not kept any more, and served
                reader, writer = await keeper.connect(5)
                port = await guest.wait_port(name="org.example.data5")
                await port.wait_host()
                guest_reader, guest_writer = await port.open()
                guest_writer.write(b"out")
                assert await reader.readexactly(3) == b"out"
                writer.write(b"in")
                assert await guest_reader.readexactly(2) == b"in"
                writer.close()
                assert await guest_reader.read() == b""
                guest_writer.close()
                await keeper.logged("(org.example.data5): closed by the guest", number_of_client)
        os.kill(worker, signal.SIGTERM)
        await keeper.logged("stopped")
        await until(lambda: sorted(os.listdir()) == ["log"])
        await until(lambda: not os.path.exists(f"/proc/{worker}/exe"))
    assert keeper.log.count("the keeper has ended") == 1
    assert "Traceback" not in keeper.log
