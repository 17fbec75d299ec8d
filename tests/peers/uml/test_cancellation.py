"""Whoever stops waiting for a script, or for the kernel, leaves the rest as it was."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.uml import boot_uml
from tests.support.waiting import until
from vring_serial.guest.errors import GuestTimeoutError

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_script_that_nobody_waits_for_gives_its_answer_to_nobody(bench):
    bench.add_port(1, "data")
    await bench.serve()
    guest = await boot_uml(bench)
    first = asyncio.ensure_future(
        guest.run("echo its own; touch /mnt/begun; until [ -e /mnt/go ]; do :; done; exit 3")
    )
    await until((guest.share / "begun").exists)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(guest.run("echo the next one"))
    (guest.share / "go").touch()
    result = await second
    assert (result.status, result.output) == (0, "the next one")


async def test_a_guest_that_talks_to_nobody_ends_at_once(bench):
    """asyncio tells of a process's end only after its output was read, and it stopped reading."""
    bench.add_port(1, "data")
    await bench.serve()
    guest = await boot_uml(bench)
    turns = guest.share / "turns"
    talk = "n=0; while :; do n=$((n+1)); echo $n >/mnt/turns; head -c 9999 /dev/zero; echo; done"
    with pytest.raises(GuestTimeoutError):
        await guest.run(talk, timeout=1)
    async with asyncio.timeout(60):  # asyncio takes 128 KiB, the pipe the rest
        while (before := turns.read_text()) == "" or await later(turns) != before:
            pass
    async with asyncio.timeout(30):
        await guest.aclose()


async def later(file):
    # That a kernel has no turn any more shows nowhere. Looking too early makes the test easier,
    # not wrong.
    await asyncio.sleep(0.3)
    return file.read_text()
