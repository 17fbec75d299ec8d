"""A frontend keeps a region for the next backend while a keeper keeps it for the next worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.keeper import Kept, kept, socket_ports
from tests.support.waiting import until
from vring_serial import EmbeddedGuest

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def exchange(one: Streams, other: Streams, text: bytes) -> None:
    """Bytes both ways."""
    for (_, writer), (reader, _) in ((one, other), (other, one)):
        writer.write(text)
        assert await reader.readexactly(len(text)) == text


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_both_the_next_worker_and_the_next_service_go_on(
    tmp_path: Path, packed: bool
) -> None:
    options = [*socket_ports((1, 2)), *(["--packed"] if packed else [])]
    guest = EmbeddedGuest(str(tmp_path / "v"), reconnect=True, packed=packed)
    try:
        async with kept(tmp_path, *options) as service:
            await guest.start()
            port, other = [await guest.wait_port(nr=nr) for nr in (1, 2)]
            used = await port.open()
            host = await service.connect(1)
            await exchange(host, used, b"before")
            await goes_on_after_kills(service, host, used)
            assert service.log.count("frontend connected") == 1
        host[1].close()
        async with kept(tmp_path, *options) as service:
            assert await used[0].read() == b""
            used = await port.open()
            host = await service.connect(1)
            await exchange(host, used, b"again")
            await goes_on_after_kills(service, host, used)
            # Nobody had this one open, which the next service knows from the region.
            idle = await service.connect(2)
            idle[1].write(b"waits")
            await until(lambda: other.host_connected)
            opened = await other.open()
            assert await opened[0].readexactly(5) == b"waits"
            for _, writer in (host, idle, used, opened):
                writer.close()
        assert guest.lost is None
    finally:
        await guest.aclose()


async def goes_on_after_kills(service: Kept, host: Streams, used: Streams) -> None:
    for number in range(2):
        await service.kill_until_served()
        await exchange(host, used, b"%d" % number * 50_000)
    assert "cannot be gone on with" not in service.log
