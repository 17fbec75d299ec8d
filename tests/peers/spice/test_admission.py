"""Stock clients are admitted: they have no time limit once they have authenticated."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.waiting import until
from vring_serial.spice import admission


@pytest.mark.parametrize("options", [{}, {"disable_ticketing": True}], ids=["password", "none"])
async def test_all_channels_of_a_client_are_admitted(bench_with, monkeypatch, options):
    monkeypatch.setattr(admission, "UNAUTHENTICATED_MAX", 8)
    idle = []
    async with bench_with(**options) as bench:
        for _ in range(20):  # they fill what there is, and keep nobody out
            idle.append(await asyncio.open_connection("127.0.0.1", bench.port))
        client = await bench.connect()
        await client.wait_agent()
        assert 0 < bench.server.unauthenticated <= 8
        async with asyncio.timeout(10):
            for reader, _ in idle[:12]:
                assert not await reader.read()
        for _, writer in idle:
            writer.close()
        await until(lambda: not bench.server.unauthenticated)  # none of the client's is there
        await bench.guest.copy("still there", "clipboard")
        await client.wait("grabbed", 0)
