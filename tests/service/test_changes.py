"""Ports and host ends that come and go while a service runs."""

from __future__ import annotations

import asyncio
import os
import pty
from contextlib import asynccontextmanager

import pytest

from tests.support.keeper import kept, socket_ports
from tests.support.qmp import qmp_client, why_refused
from vring import Backlog
from vring_serial import Controller, EmbeddedGuest, NullChardev, Port, PortRemovedError
from vring_serial.config.qemu_options import parse_chardev
from vring_serial.config.qmp_backend import backend_of, option_of
from vring_serial.errors import ConfigError

QMP = ("--qmp", "unix:qmp,server=on,wait=off")


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def unix(path, **more):
    address = {"type": "unix", "data": {"path": path}}
    return {"type": "socket", "data": {"addr": address, "server": True, "wait": False, **more}}


def backend(kind, **data):
    return {"type": kind, "data": data}


@asynccontextmanager
async def service(tmp_path, *arguments):
    reach = ("--reach", str(tmp_path))
    async with kept(tmp_path, *socket_ports([1]), *QMP, *reach, *arguments) as keeper:
        await keeper.logged("QMP at")
        async with qmp_client() as client:
            yield keeper, client


async def plug(client, id, nr, end, **more):
    await client.execute("chardev-add", {"id": id, "backend": end})
    properties = {"driver": "virtserialport", "chardev": id, "id": f"p{nr}", "nr": nr, **more}
    await client.execute("device_add", properties)


async def connected(guest, nr, path):
    """Both ends of a port, once each knows of the other."""
    port = await guest.wait_port(nr=nr)
    reader, writer = await asyncio.open_unix_connection(path)
    await port.wait_host()
    guest_reader, guest_writer = await port.open()
    return (reader, writer), (guest_reader, guest_writer)


async def echo(host, guest, text=b"hello"):
    host[1].write(text)
    assert await guest[0].readexactly(len(text)) == text
    guest[1].write(text)
    assert await host[0].readexactly(len(text)) == text


def close(*ends):
    for _, writer in ends:
        writer.close()


async def test_a_port_is_plugged_and_unplugged_under_a_guest(tmp_path):
    async with service(tmp_path) as (_, client), EmbeddedGuest("v", memory=32 << 20) as guest:
        await guest.wait_port(nr=1)
        await plug(client, "new", 5, unix("n"), name="org.example.new")
        host, inside = await connected(guest, 5, "n")
        assert (await guest.wait_port(name="org.example.new")).nr == 5
        await echo(host, inside)
        await client.execute("device_del", {"id": "p5"})
        while (event := await client.events.get())["event"] != "DEVICE_DELETED":
            pass
        assert event["data"] == {"device": "p5", "path": "/machine/peripheral/p5"}
        with pytest.raises(PortRemovedError):
            await inside[0].read()
        assert await why_refused(client, "device_del", id="p5") == "Device 'p5' not found"
        await client.execute("chardev-remove", {"id": "new"})
        assert await host[0].read() == b""
        assert not os.path.exists("n")
        close(host, inside)


async def test_a_client_that_waited_before_the_port_was_there_is_served(tmp_path):
    async with service(tmp_path) as (_, client), EmbeddedGuest("v", memory=32 << 20) as guest:
        await guest.wait_port(nr=1)
        await client.execute("chardev-add", {"id": "new", "backend": unix("n")})
        reader, writer = await asyncio.open_unix_connection("n")
        writer.write(b"early")
        await client.execute("device_add", {"driver": "virtserialport", "chardev": "new", "nr": 7})
        port = await guest.wait_port(nr=7)
        await port.wait_host()
        inside = await port.open()
        assert await inside[0].readexactly(5) == b"early"
        close((reader, writer), inside)


async def test_what_changed_outlives_the_worker(tmp_path):
    """Plugged ports go on where they were, unplugged ones stay away, spare ends stay."""
    async with service(tmp_path) as (keeper, client):
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            await guest.wait_port(nr=1)
            await plug(client, "new", 5, unix("n"))
            host, inside = await connected(guest, 5, "n")
            await client.execute("device_del", {"id": "c1"})
            await client.execute("chardev-add", {"id": "spare", "backend": unix("s")})
            for _ in range(3):
                await keeper.kill_until_served()
                await echo(host, inside)
            labels = {c["label"] for c in await client.execute("query-chardev")}
            assert labels == {"c1", "new", "spare"}
            (vm,) = await client.execute("x-vring-status")
            (controller,) = vm["controllers"]
            assert [port["nr"] for port in controller["ports"]] == [5]
            assert {end["chardev"] for end in vm["spare"]} == {"c1", "spare"}
            await client.execute(
                "device_add", {"driver": "virtserialport", "chardev": "c1", "id": "c1", "nr": 1}
            )
            host1, inside1 = await connected(guest, 1, "c1")
            await echo(host1, inside1)
            close(host, inside, host1, inside1)
        assert await keeper.stop() == 0
    assert sorted(os.listdir()) == ["log"]


async def test_a_host_end_is_exchanged_under_traffic_and_no_byte_is_lost(tmp_path):
    total = 4 << 20
    sent = os.urandom(1 << 16)
    async with service(tmp_path) as (_, client), EmbeddedGuest("v", memory=32 << 20) as guest:
        host, inside = await connected(guest, 1, "c1")

        async def send():
            for _ in range(total // len(sent)):
                inside[1].write(sent)
                await inside[1].drain()

        sending = asyncio.create_task(send())
        received = bytearray(await host[0].read(100_000))
        for number in range(3):
            change = {"id": "c1", "backend": unix(f"x{number}")}
            await client.execute("chardev-change", change)
            received += await host[0].read()  # all that the old end was given
            close(host)
            host = await asyncio.open_unix_connection(f"x{number}")
            received += await host[0].read(100_000)
        while len(received) < total:
            received += await host[0].read(1 << 20)
        await sending
        assert received == sent * (total // len(sent))
        assert not os.path.exists("c1")
        close(host, inside)


async def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path):
    async with service(tmp_path) as (_, client):
        before = await client.execute("x-vring-status")
        assert "exists" in await why_refused(client, "chardev-add", id="a", backend=unix("qmp"))
        assert "No such file" in await why_refused(
            client, "chardev-add", id="a", backend=backend("file", out="no/where")
        )
        assert "power of two" in await why_refused(
            client, "chardev-add", id="a", backend=backend("ringbuf", size=1000)
        )
        assert "is no id" in await why_refused(
            client, "chardev-add", id="1 a", backend=backend("null")
        )
        assert "logtimestamp is not served" in await why_refused(
            client, "chardev-add", id="a", backend=backend("null", logfile="x", logtimestamp=True)
        )
        assert "goes with logfile only" in await why_refused(
            client, "chardev-add", id="a", backend=backend("null", logsize=9)
        )
        assert "exists" in await why_refused(client, "chardev-change", id="c1", backend=unix("c1"))
        assert "Maximum port limit" not in await why_refused(client, "device_add", driver="foo")
        assert "reserved for virtconsole" in await why_refused(
            client, "device_add", driver="virtserialport", nr=0
        )
        assert "expected: integer" in await why_refused(
            client, "device_add", driver="virtserialport", nr="x"
        )
        assert await client.execute("x-vring-status") == before


async def test_ports_without_a_host_end_and_numbers_of_their_own(tmp_path):
    async with service(tmp_path, "--max-ports", "4") as (_, client):
        for _ in range(2):
            await client.execute("device_add", {"driver": "virtserialport"})
        assert "Maximum port limit" in await why_refused(
            client, "device_add", driver="virtserialport"
        )
        await client.execute("device_add", {"driver": "virtconsole", "id": "hvc"})
        (vm,) = await client.execute("x-vring-status")
        assert [p["nr"] for p in vm["controllers"][0]["ports"]] == [1, 2, 3, 0]


async def test_coming_and_going_leaves_nothing_behind(tmp_path):
    line = pty.openpty()
    serial = backend("serial", device=os.ttyname(line[1]))
    kinds = (unix("n"), backend("pty"), backend("ringbuf"), backend("file", out="f"), serial)
    async with service(tmp_path) as (keeper, client):
        for kind in kinds:
            await plug(client, "new", 5, kind)
            await client.execute("device_del", {"id": "p5"})
            await client.execute("chardev-remove", {"id": "new"})
        await keeper.kill_until_served()
        before = keeper.held
        for kind in kinds:
            await plug(client, "new", 5, kind)
            await client.execute("device_del", {"id": "p5"})
            await client.execute("chardev-remove", {"id": "new"})
        await keeper.kill_until_served()
        assert keeper.held == before
    for fd in line:
        os.close(fd)


@pytest.mark.parametrize(
    ("end", "option"),
    [
        (backend("null"), "null,id=x"),
        (backend("file", out="a,b", append=True), "file,id=x,path=a,,b,append=on"),
        (backend("file", out="a", **{"in": "b"}), "file,id=x,path=a,input-path=b"),
        (backend("pipe", device="p"), "pipe,id=x,path=p"),
        (
            backend(
                "udp",
                remote={"type": "inet", "data": {"host": "h", "port": "9", "ipv4": True}},
                local={"type": "inet", "data": {"host": "", "port": "8"}},
            ),
            "udp,id=x,host=h,port=9,ipv4=on,localaddr=,localport=8",
        ),
        (backend("serial", device="/dev/ttyS0"), "serial,id=x,path=/dev/ttyS0"),
        (unix("s"), "socket,id=x,path=s,server=on,wait=off"),
        (
            backend(
                "socket",
                addr={"type": "inet", "data": {"host": "::1", "port": "5", "ipv4": False}},
                server=False,
                **{"reconnect-ms": 100},
            ),
            "socket,id=x,host=::1,port=5,ipv4=off,server=off,reconnect-ms=100",
        ),
        (backend("memory", size=4096), "ringbuf,id=x,size=4096"),
        (
            backend("null", logfile="a,b", logappend=True, logsize=9, logbackups=2),
            "null,id=x,logfile=a,,b,logappend=on,logsize=9,logbackups=2",
        ),
    ],
)
def test_qmps_words_become_those_of_options(end, option):
    assert option_of("x", end) == option
    config = parse_chardev(option)
    again = parse_chardev(option_of("x", backend_of(config)))
    assert (again.options, again.log) == (config.options, config.log)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (unix("s", wait=True), "wait is not served"),
        (unix("s", telnet=True), "telnet is not served"),
        (backend("spicevmc", type="vdagent"), "cannot be made while"),
        (
            backend("socket", addr={"type": "fd", "data": {"str": "3"}}),
            "sockets of type fd are not served",
        ),
    ],
)
def test_what_is_not_served_is_said(end, why):
    with pytest.raises(ConfigError, match=why):
        option_of("x", end)


async def test_ports_of_a_shared_end_come_and_go(tmp_path):
    """Also the last of them, and through the death of a worker."""
    shared = (
        "--chardev",
        "socket,id=m,path=m,server=on,wait=off,mux=on",
        "--port",
        "chardev=m,nr=2",
    )

    def add(nr):
        return {"driver": "virtserialport", "chardev": "m", "id": f"m{nr}", "nr": nr}

    async with service(tmp_path, *shared) as (keeper, client):
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            reader, writer = await asyncio.open_unix_connection("m")

            async def has_the_focus(nr):
                port = await guest.wait_port(nr=nr)
                await port.wait_host()
                inside = await port.open()
                await echo((reader, writer), inside)
                return inside

            first = await has_the_focus(2)
            for nr in (3, 4, 5):
                await client.execute("device_add", add(nr))
            inside = await has_the_focus(5)
            why = await why_refused(client, "device_add", **add(6))
            assert "too many uses of multiplexed chardev 'm' (maximum is 4)" in why
            await client.execute("device_del", {"id": "m5"})
            await echo((reader, writer), first)  # the next one in the circle
            for id in ("m3", "m4", "m"):
                await client.execute("device_del", {"id": id})
            labels = {c["label"]: c["filename"] for c in await client.execute("query-chardev")}
            assert labels["m"] == "mux"
            assert labels["m-base"].startswith("unix:")
            await keeper.kill_until_served()
            await client.execute("device_add", add(7))
            last = await has_the_focus(7)
            await client.execute("device_del", {"id": "m7"})
            await client.execute("chardev-remove", {"id": "m"})
            assert await reader.read() == b""
            writer.close()
            close(first, inside, last)
        await client.execute("device_add", {**add(8), "chardev": ""})


async def test_what_waits_for_an_unplugged_console_is_nobody_elses():
    """A successor that finds the memory of the host end finds nothing in it."""
    backlog = Backlog(memoryview(bytearray(4096)))
    port = Port(0, "", NullChardev("c"), console=True, backlog=backlog)
    controller = Controller(max_ports=2)
    controller.add_port(port)
    assert backlog.replace(b"of old")
    await controller.remove_port(0)
    assert backlog.data == b""
