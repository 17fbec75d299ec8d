"""Whoever stops waiting for a script, or for the kernel, leaves the rest as it was."""

from __future__ import annotations

import asyncio

import pytest


async def test_a_script_that_nobody_waits_for_gives_its_answer_to_nobody(bench):
    bench.add_port(1, "data")
    await bench.serve()
    guest = await bench.boot()
    first = asyncio.ensure_future(
        guest.run("echo its own; touch /mnt/begun; until [ -e /mnt/go ]; do :; done; exit 3")
    )
    async with asyncio.timeout(60):
        while not (guest.share / "begun").exists():
            await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(guest.run("echo the next one"))
    (guest.share / "go").touch()
    result = await second
    assert (result.status, result.output) == (0, "the next one")
