"""Logs of host ends that come and go while the service runs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.service.test_changes import (
    backend,
    close,
    connected,
    plug,
    service,
    unix,
)
from tests.support.qmp import why_refused
from tests.support.waiting import until
from vring_serial import EmbeddedGuest


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


async def change(client, id, end):
    await client.execute("chardev-change", {"id": id, "backend": end})


async def write(guest, host, text):
    guest[1].write(text)
    assert await host[0].readexactly(len(text)) == text


async def logged(path, text):
    await until(lambda: Path(path).read_bytes() == text, lambda: Path(path).read_bytes())


async def test_a_log_goes_on_over_workers_and_the_next_host_end(tmp_path):
    async with service(tmp_path) as (keeper, client), EmbeddedGuest("v", memory=32 << 20) as guest:
        Path("log1").write_bytes(b"emptied")
        Path("log2").write_bytes(b"kept;")
        await plug(client, "new", 5, unix("n", logfile="log1"))
        host, inside = await connected(guest, 5, "n")
        await write(inside, host, b"one;")
        await logged("log1", b"one;")
        await keeper.kill_until_served()
        await write(inside, host, b"two;")
        await client.execute("x-vring-restart")
        await write(inside, host, b"three;")
        await logged("log1", b"one;two;three;")
        # Another log, to whose end is written; the old one is complete.
        await change(client, "new", unix("m", logfile="log2", logappend=True))
        close(host)
        host = await asyncio.open_unix_connection("m")
        await write(inside, host, b"four;")
        await logged("log2", b"kept;four;")  # at the moment of a death it may be missing there
        await keeper.kill_until_served()
        await write(inside, host, b"five;")
        await logged("log2", b"kept;four;five;")
        assert Path("log1").read_bytes() == b"one;two;three;"
        close(host, inside)


async def test_a_log_that_cannot_be_opened_changes_nothing(tmp_path):
    async with service(tmp_path) as (_, client), EmbeddedGuest("v", memory=32 << 20) as guest:
        await plug(client, "new", 5, unix("n", logfile="log1"))
        host, inside = await connected(guest, 5, "n")
        before = await client.execute("query-chardev")
        for path in ("no/where", str(tmp_path)):
            why = await why_refused(
                client, "chardev-change", id="new", backend=unix("m", logfile=path)
            )
            assert why.startswith("Failed to change chardev 'new': cannot log to ")
            assert "cannot log to" in await why_refused(
                client, "chardev-add", id="x", backend=backend("null", logfile=path)
            )
        assert "log1 is in use already (the log of new)" in await why_refused(
            client, "chardev-add", id="x", backend=backend("null", logfile="log1")
        )
        assert await client.execute("query-chardev") == before
        assert not os.path.exists("m")
        await write(inside, host, b"one;")
        await logged("log1", b"one;")
        close(host, inside)


async def test_two_host_ends_one_after_the_other_log_to_one_file(tmp_path):
    """The log of the one that goes is written while the next one begins: no byte is lost."""
    async with service(tmp_path) as (keeper, client), EmbeddedGuest("v", memory=32 << 20) as guest:
        end = backend("null", logfile="log1", logappend=True)
        await plug(client, "new", 5, end)
        port = await guest.wait_port(nr=5)
        await port.wait_host()
        _, back = await port.open()
        piece = bytes(range(256)) * 256
        for _ in range(20):
            back.write(piece)
            await back.drain()
            await change(client, "new", end)
        back.close()
        await back.wait_closed()
        await until(lambda: Path("log1").stat().st_size == 20 * len(piece))
        assert Path("log1").read_bytes() == 20 * piece
        threads = f"/proc/{keeper.worker}/task"
        names = [Path(threads, task, "comm").read_text() for task in os.listdir(threads)]
        assert len([name for name in names if name.startswith("log-")]) <= 1


async def test_a_log_made_later_is_rotated_in_the_sandbox(tmp_path):
    async with service(tmp_path) as (keeper, client), EmbeddedGuest("v", memory=32 << 20) as guest:
        worker = keeper.worker
        await plug(client, "new", 5, unix("n", logfile="log1", logsize=1000, logbackups=2))
        host, inside = await connected(guest, 5, "n")
        for number in range(4):
            await write(inside, host, bytes([number]) * 1000)
            await until(lambda n=number: bytes([n]) in Path("log1").read_bytes())
        assert Path("log1").read_bytes() == b"\3" * 1000
        assert Path("log1.0").read_bytes() == b"\2" * 1000
        assert Path("log1.1").read_bytes() == b"\1" * 1000
        assert keeper.worker == worker
        close(host, inside)
