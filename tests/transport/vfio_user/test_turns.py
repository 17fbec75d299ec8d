"""A client that sends many small messages leaves others their turns of the loop."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import waiting
from tests.support.leaks import held
from vring_serial import turns
from vring_serial.proto.vfio_user import request
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_regions import RegionIndex, RegionRead, RegionWrite
from vring_serial.proto.vfio_user_wire import Command, Header

READ = RegionRead(0, RegionIndex.CONFIG, 4)


def test_a_flood_is_handled_in_many_turns(
    client: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "SECONDS", 100)
    client.negotiate()
    count = 1000

    async def others() -> int:
        """Sends, and counts the turns of the loop until everything is answered."""
        client.sock.setblocking(False)
        client.send_bytes(b"".join(request(Command.REGION_READ, nr, READ) for nr in range(count)))
        seen = taken = 0
        length = count * (Header.SIZE + len(RegionWrite(0, 7, 4, bytes(4)).pack()))
        while seen < length:
            await waiting.turns(1)
            taken += 1
            try:
                seen += len(client.sock.recv(1 << 16))
            except BlockingIOError:
                continue
        return taken

    assert server.run(others()) >= count / turns.MESSAGES


def test_memory_is_let_go_of_before_the_turn_ends(
    client: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has its answer may use what it unmapped for something else."""
    monkeypatch.setattr(turns, "MESSAGES", 1)
    driver = client.boot(0)
    assert client.echo(driver, 0, b"there")
    mapped = held().mapped("memfd")
    extra = DmaMap(DmaFlag.READ | DmaFlag.WRITE, 0, 1 << 32, 4096)
    data = request(Command.DMA_UNMAP, 1, DmaUnmap(0, 1 << 20, 0))
    client.send_bytes(data + request(Command.DMA_UNMAP, 2, DmaUnmap(0, 1 << 20, 0)))
    assert not client.answer(1).failed
    assert held().mapped("memfd") == mapped - 1
    assert client.answer(2).failed
    client.do(Command.DMA_MAP, extra, (client.memfd,))
    client.map_memory()
    assert client.echo(driver, 0, b"goes on")


def test_maps_that_come_together_stop_the_queues_once(client: Any, device: Any) -> None:
    driver = client.boot(0)
    assert client.echo(driver, 0, b"before")
    told = len(device.told)
    maps = [DmaMap(DmaFlag.READ, 0, (1 << 32) + 4096 * nr, 4096) for nr in range(8)]
    client.send_bytes(b"".join(request(Command.DMA_MAP, nr, each) for nr, each in enumerate(maps)))
    for nr in range(8):
        assert not client.answer(nr).failed
    assert [what[0] for what in device.told[told:]] == ["stop", "start"]
    assert client.echo(driver, 0, b"after")
