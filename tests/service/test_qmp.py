"""The monitor of a running service, as QMP's clients meet it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from tests.support.keeper import kept, socket_ports
from tests.support.qmp import qmp_client, refused
from tests.support.waiting import turns, until
from vring_serial import EmbeddedGuest
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.qmp.monitor import Monitor
from vring_serial.service.qmp.server import QmpServer
from vring_serial.service.roster import Changed
from vring_serial.service.vms import Vms

QMP = ("--qmp", "unix:qmp,server=on,wait=off")
CONSOLE = ("--chardev", "ringbuf,id=r0,size=4096", "--console", "chardev=r0")


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@asynccontextmanager
async def monitored(tmp_path, *arguments):
    async with kept(tmp_path, *socket_ports([1, 2]), *CONSOLE, *QMP, *arguments) as keeper:
        await keeper.logged("QMP at unix:qmp")
        async with qmp_client() as client:
            yield keeper, client


async def test_it_shows_ports_peers_and_what_moved(tmp_path):
    async with monitored(tmp_path) as (keeper, client):
        assert (await client.execute("query-status"))["status"] == "prelaunch"
        found = {c["label"]: c for c in await client.execute("query-chardev")}
        assert found["c1"] == {
            "label": "c1",
            "filename": "disconnected:unix:c1,server=on",
            "frontend-open": False,
        }
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            port = await guest.wait_port(nr=1)
            reader, writer = await asyncio.open_unix_connection("c1")
            await port.wait_host()
            _, back = await port.open()
            back.write(b"x" * 1000)
            assert await reader.readexactly(1000) == b"x" * 1000
            assert (await client.execute("query-status"))["status"] == "running"
            found = {c["label"]: c for c in await client.execute("query-chardev")}
            assert found["c1"]["filename"] == "unix:c1,server=on"
            assert found["c1"]["frontend-open"]
            (vm,) = await client.execute("x-vring-status")
            (controller,) = vm["controllers"]
            ports = {p["nr"]: p for p in controller["ports"]}
            assert controller["frontend"]
            assert ports[1]["out"]["bytes"] == 1000
            assert ports[2]["out"]["bytes"] == 0
            back.close()
            writer.close()
        assert await keeper.stop() == 0
    assert sorted(os.listdir()) == ["log"]


async def test_events_tell_of_the_guests_side(tmp_path):
    async with monitored(tmp_path) as (_, client):
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            port = await guest.wait_port(nr=1)
            _, writer = await asyncio.open_unix_connection("c1")
            await port.wait_host()
            _, back = await port.open()
            back.close()
            writer.close()
            await back.wait_closed()
        told = []
        while ("VSERPORT_CHANGE", {"id": "c1", "open": False}) not in told:
            event = await client.events.get()
            told.append((event["event"], event["data"]))
        assert ("X_VRING_FRONTEND", {"controller": "virtio-serial0", "state": "connected"}) in told
        assert ("VSERPORT_CHANGE", {"id": "c1", "open": True}) in told


async def test_a_ring_buffer_is_read_and_written(tmp_path):
    async with monitored(tmp_path) as (_, client):
        await client.execute("ringbuf-write", {"device": "r0", "data": "aGVs", "format": "base64"})
        await client.execute("ringbuf-write", {"device": "r0", "data": "lö"})
        assert await client.execute("ringbuf-read", {"device": "r0", "size": 3}) == "hel"
        assert await client.execute("ringbuf-read", {"device": "r0", "size": 10}) == "lö"
        assert await refused(client, "ringbuf-read", device="r0", size=0) == (
            "GenericError",
            "size must be greater than zero",
        )
        assert (await refused(client, "ringbuf-read", device="c1", size=1))[1] == (
            "c1 is not a ringbuf device"
        )
        assert (await refused(client, "ringbuf-read", device="no", size=1))[1] == (
            "Device 'no' not found"
        )


def no_vm(name, link):
    raise AssertionError(name)


async def test_nothing_is_read_before_the_process_is_confined():
    """Nor by one of several sockets while the next one is begun."""
    confined = asyncio.Event()
    ours, keeper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with (
        keeper_end,
        closing(Notifier(ours)) as notifier,
        Vms((), Changed(), notifier, no_vm) as vms,
        socket.socket(socket.AF_UNIX) as listening,
    ):
        listening.bind("m")
        listening.listen(1)
        listening.setblocking(False)
        monitor = Monitor("service", "package", vms, "")
        async with QmpServer(monitor, listening, "QMP", "package", confined) as server:
            await server.start()
            reader, writer = await asyncio.open_unix_connection("m")
            writer.write(b'nonsense\n{"execute":"qmp_capabilities"}\n')
            answered = asyncio.create_task(reader.readline())
            await turns(20)
            assert not answered.done()
            confined.set()
            assert b"QMP" in await answered
            assert b"error" in await reader.readline()
            assert b"return" in await reader.readline()
            writer.close()


async def test_bad_arguments_and_unknown_names_are_refused_as_qemu_does(tmp_path):
    async with monitored(tmp_path) as (_, client):
        assert await refused(client, "query-vnc") == (
            "CommandNotFound",
            "The command query-vnc has not been found",
        )
        assert await refused(client, "query-status", x=1) == (
            "GenericError",
            "Parameter 'x' is unexpected",
        )
        assert await refused(client, "ringbuf-read", device=5, size=1) == (
            "GenericError",
            "Invalid parameter type for 'device', expected: string",
        )
        assert await refused(client, "ringbuf-read", device="r0") == (
            "GenericError",
            "Parameter 'size' is missing",
        )
        assert (await refused(client, "x-query-virtio-status", path="/nope"))[1] == (
            "Path /nope is not a realized VirtIODevice"
        )
        assert (await refused(client, "device-list-properties", typename="nope"))[0] == (
            "DeviceNotFound"
        )
        assert (await refused(client, "x-vring-disconnect"))[1].startswith("Parameters")


async def test_a_peer_and_a_frontend_are_sent_away(tmp_path):
    async with monitored(tmp_path) as (_, client):
        assert "nobody" in (await refused(client, "x-vring-disconnect", chardev="c1"))[1]
        reader, writer = await asyncio.open_unix_connection("c1")
        while (await client.execute("query-chardev"))[1]["filename"].startswith("disconnected"):
            pass
        await client.execute("x-vring-disconnect", {"chardev": "c1"})
        assert await reader.read() == b""
        writer.close()
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            await guest.wait_port(nr=1)
            await client.execute("x-vring-disconnect", {"controller": "virtio-serial0"})
            await until(lambda: "an operator asked for it" in Path("log").read_text())


async def test_the_schema_has_every_command_and_every_type(tmp_path):
    async with monitored(tmp_path) as (_, client):
        schema = {entry["name"]: entry for entry in await client.execute("query-qmp-schema")}
        names = {c["name"] for c in await client.execute("query-commands")}
        assert names == {n for n, e in schema.items() if e["meta-type"] == "command"}
        for entry in schema.values():
            for key in ("arg-type", "ret-type", "element-type"):
                assert entry.get(key, "str") in schema
            for member in [*entry.get("members", []), *entry.get("variants", [])]:
                assert member.get("type", "str") in schema


async def test_a_killed_worker_is_asked_again_and_a_killed_monitor_harms_nobody(tmp_path):
    async with monitored(tmp_path) as (keeper, client):
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            port = await guest.wait_port(nr=1)
            reader, writer = await asyncio.open_unix_connection("c1")
            await port.wait_host()
            _, back = await port.open()
            worker, monitor = keeper.worker, keeper.monitor
            os.kill(worker, signal.SIGKILL)
            (vm,) = await client.execute("x-vring-status")
            assert vm["restarts"] == 1
            os.kill(monitor, signal.SIGKILL)
            back.write(b"still here")
            assert await reader.readexactly(10) == b"still here"
            await until(lambda: Path("log").read_text().count("QMP at unix:qmp") == 2)
            async with qmp_client() as second:
                (vm,) = await second.execute("x-vring-status")
                assert vm["restarts"] == 1
                assert vm["controllers"][0]["frontend"]
            back.close()
            writer.close()
        assert await keeper.stop() == 0


async def test_the_monitor_is_in_a_sandbox_too(tmp_path):
    """Its clients are as little to be trusted as guests."""
    async with kept(tmp_path, *socket_ports([1]), *QMP) as keeper:
        await keeper.logged("sandbox: no-new-privileges", 2)
        keeper_pid = keeper.process.pid
        children = Path(f"/proc/{keeper_pid}/task/{keeper_pid}/children").read_text().split()
        assert len(children) == 2
        for pid in children:
            assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
        assert await keeper.stop() == 0
    assert os.listdir() == ["log"]


async def test_hostile_clients_are_bounded_and_others_are_served(tmp_path):
    async with monitored(tmp_path) as (_, client):
        silent = [await asyncio.open_unix_connection("qmp") for _ in range(10)]
        for _, writer in silent:
            writer.write(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-commands"}' * 2000)
        reader, writer = await asyncio.open_unix_connection("qmp")
        await reader.readline()
        writer.write(b"[" * 100_000 + b"\n" + b'{"execute":"qmp_capabilities","id":1}\n')
        while True:
            line = json.loads(await reader.readline())
            if line.get("id") == 1:
                break
            assert "JSON parse error" in line["error"]["desc"]
        assert await client.execute("query-name") == {"name": "vring"}
        for _, other in [*silent, (reader, writer)]:
            other.transport.abort()


async def test_log_levels_change_while_it_runs(tmp_path):
    async with monitored(tmp_path) as (_, client):
        await client.execute("x-vring-log-level", {"level": "error"})
        lines = len(Path("log").read_text().splitlines())
        _, writer = await asyncio.open_unix_connection("c1")
        while (await client.execute("query-chardev"))[1]["filename"].startswith("disconnected"):
            pass
        assert len(Path("log").read_text().splitlines()) == lines
        writer.close()


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("unix:qmp", "needs server=on"),
        ("unix:qmp,server=on,wait=on", "wait=on is not served"),
        ("unix:qmp,server=on,mode=readline", "there is no 'mode'"),
        ("tcp:0.0.0.0:5000,server=on", "is not this machine"),
        ("tcp:localhost:x,server=on", "port: 'x' is not a number"),
        ("stdio", "begins with"),
    ],
)
async def test_bad_options_are_usage_errors(tmp_path, option, why):
    async with kept(tmp_path, *socket_ports([1]), "--qmp", option, ready="") as keeper:
        assert await keeper.process.wait() == 2
        assert why in keeper.log


async def test_a_socket_in_use_ends_the_service_at_once(tmp_path):
    server = await asyncio.start_unix_server(lambda *_: None, "qmp")
    async with server, kept(tmp_path, *socket_ports([1]), *QMP, ready="") as keeper:
        assert await keeper.process.wait() == 1
        assert "--qmp: qmp: exists, another process listens on it" in keeper.log
        assert "Traceback" not in keeper.log
