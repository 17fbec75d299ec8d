"""Ports of our device under a real Linux kernel and its own virtio_console driver."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from tests.support.bench import MIB, receive_digest
from tests.support.uml import UmlPayload, boot_uml
from tests.support.waiting import DEADLINE, until, until_gives

pytestmark = pytest.mark.asyncio(loop_scope="module")

AGENT = "com.redhat.spice.0"


async def test_name_stands_in_sysfs(uml):
    await uml.plug(1, AGENT)
    await uml.plug(5, "org.example.data")
    guest = uml.guest
    result = await guest.run("cd /sys/class/virtio-ports && grep . */name")
    assert result.output.splitlines() == [
        f"vport0p1/name:{AGENT}",
        "vport0p5/name:org.example.data",
    ]


async def test_64_mib_each_way(uml):
    await uml.plug(1, "data")
    await move_64_mib_each_way(uml.bench, uml.guest)


async def test_64_mib_each_way_with_in_band_notifications(bench):
    bench.add_port(1, "data")
    await bench.serve(inband_notifications=True)
    await move_64_mib_each_way(bench, await boot_uml(bench))


async def move_64_mib_each_way(bench, guest):
    data = UmlPayload(guest, 64 * MIB)
    reader, writer = await bench.connect("data")

    send = asyncio.create_task(guest.run(f"dd if={data.guest_path} of=/dev/vport0p1 bs=64k"))
    async with asyncio.timeout(60):
        assert await receive_digest(reader, data.size) == data.sha256
    assert (await send).status == 0

    receive = asyncio.create_task(guest.run(f"head -c {data.size} /dev/vport0p1 | sha256sum"))
    async with asyncio.timeout(60):
        writer.write(data.data)
        await writer.drain()
        assert (await receive).output.split()[0] == data.sha256
    writer.close()
    await writer.wait_closed()


async def test_guest_closes_and_opens_again(uml):
    port = await uml.plug(1, "data")
    guest = uml.guest
    reader, writer = await uml.connect("data")
    for number in range(3):
        line = f"round {number}\n".encode()
        await guest.run(f"echo round {number} > /dev/vport0p1")
        async with asyncio.timeout(DEADLINE):
            assert await reader.readline() == line
        assert not port.guest_open
        # What the host writes while the port is closed waits for the guest's next open.
        writer.write(line)
        result = await guest.run("head -n 1 /dev/vport0p1")
        assert result.output.encode() + b"\n" == line
    writer.close()
    await writer.wait_closed()


async def test_host_disconnects_and_reconnects(uml):
    port = await uml.plug(1, "data")
    guest = uml.guest
    # One descriptor stays open in the guest over all connections of the host.
    await guest.run("exec 3<>/dev/vport0p1; while :; do head -n 1 <&3; done >/tmp/got 2>&1 &")
    for number in range(3):
        _, writer = await uml.connect("data")
        await until(lambda: port.guest_open, "the guest opens its port")
        writer.write(f"line {number}\n".encode())
        await writer.drain()
        await guest.run(f"until grep -q 'line {number}' /tmp/got; do :; done")
        sent = asyncio.create_task(guest.run(f"echo answer {number} >/dev/vport0p1 || echo busy"))
        await sent
        writer.close()
        await writer.wait_closed()
        await until(lambda: not port.host_open, "the host end is closed")


async def test_guest_reads_end_of_file_and_writers_block_while_the_host_is_away(uml):
    port = await uml.plug(1, "data")
    guest = uml.guest
    assert not port.host_open
    assert (await guest.run("head -c 1 /dev/vport0p1 | wc -c")).output == "0"
    await guest.run("echo waited >/dev/vport0p1 &")
    reader, writer = await uml.connect("data")
    async with asyncio.timeout(DEADLINE):
        assert await reader.readline() == b"waited\n"
    writer.close()
    await writer.wait_closed()


async def test_port_added_and_removed_while_the_guest_runs(uml):
    await uml.plug(1, "first")
    guest = uml.guest

    async def read_names():
        return (await guest.run("cat /sys/class/virtio-ports/*/name")).output

    assert await read_names() == "first"
    for number in range(2):
        await uml.plug(2, "second")
        assert await read_names() == "first\nsecond"
        reader, writer = await uml.connect("second")
        await guest.run(f"echo hot {number} >/dev/vport0p2")
        async with asyncio.timeout(DEADLINE):
            assert await reader.readline() == f"hot {number}\n".encode()
        writer.close()
        await writer.wait_closed()
        await uml.bench.controller.remove_port(2)
        await until_gives(read_names, "first")
        assert (await guest.run("ls /dev/vport0p2")).status != 0


async def test_console_with_a_shell(uml):
    port = await uml.plug(0, "console", console=True)
    await uml.plug(1, "data")
    guest = uml.guest
    reader, writer = await uml.connect("console")
    await guest.run("setsid sh -c 'exec sh -i </dev/hvc0 >/dev/hvc0 2>&1' &")
    writer.write(b"echo sum $((40 + 2))\n")
    async with asyncio.timeout(DEADLINE):
        await reader.readuntil(b"sum 42")
    port.end_resized(132, 43)
    await guest.run("until [ \"$(stty size </dev/hvc0)\" = '43 132' ]; do :; done")
    writer.close()
    await writer.wait_closed()
    # Nobody reads the console: the guest must not spin.
    result = await guest.run("head -c 300000 /dev/zero | tr '\\0' x >/dev/hvc0; echo alive", 30)
    assert result.output == "alive"


async def test_two_ports_at_once(uml):
    await uml.plug(1, "one")
    await uml.plug(2, "two")
    guest = uml.guest
    data = UmlPayload(guest, 16 * MIB)
    readers = []
    writers = []
    for name in ("one", "two"):
        reader, writer = await uml.connect(name)
        readers.append(reader)
        writers.append(writer)
    run = asyncio.create_task(
        guest.run(
            f"cat {data.guest_path} >/dev/vport0p1 & cat {data.guest_path} >/dev/vport0p2 & wait"
        )
    )
    async with asyncio.timeout(60):
        digests = await asyncio.gather(*(receive_digest(reader, data.size) for reader in readers))
        await run
    assert digests == [data.sha256] * 2
    run = asyncio.create_task(
        guest.run(f"for n in 1 2; do head -c {data.size} /dev/vport0p$n | sha256sum & done; wait")
    )
    async with asyncio.timeout(60):
        for writer in writers:
            writer.write(data.data)
        await asyncio.gather(*(writer.drain() for writer in writers))
        lines = (await run).output.splitlines()
    assert [line.split()[0] for line in lines] == [data.sha256] * 2
    for writer in writers:
        writer.close()
        await writer.wait_closed()


async def test_driver_unloaded_and_loaded_again(uml):
    await uml.plug(1, AGENT)
    guest = uml.guest
    module = "/usr/lib/uml/modules/*/kernel/drivers/char/virtio_console.ko"
    reader, writer = await uml.connect(AGENT)
    for number in range(3):
        result = await guest.run(f"busybox rmmod virtio_console && busybox insmod {module}")
        assert result.status == 0, result.output
        await guest.run(f"echo load {number} >/dev/vport0p1")
        async with asyncio.timeout(DEADLINE):
            assert await reader.readline() == f"load {number}\n".encode()
    writer.close()
    await writer.wait_closed()


async def test_one_guest_after_another_even_killed(bench):
    bench.add_port(1, AGENT)
    await bench.serve()
    reader, writer = await bench.connect(AGENT)
    for number in range(2):
        guest = await boot_uml(bench)
        await guest.run(f"echo guest {number} >/dev/vport0p1")
        async with asyncio.timeout(DEADLINE):
            assert await reader.readline() == f"guest {number}\n".encode()
        await guest.aclose()
    writer.close()
    await writer.wait_closed()


async def test_1_gib_while_another_port_is_blocked(uml):
    await uml.plug(1, AGENT)
    await uml.plug(2, "blocked")
    guest = uml.guest
    data = UmlPayload(guest, 64 * MIB)
    reader, writer = await uml.connect(AGENT)
    _, idle = await uml.connect("blocked")
    idle.transport.pause_reading()
    await guest.run(f"cat {data.guest_path} >/dev/vport0p2 &")
    run = asyncio.create_task(
        guest.run(f"for i in $(seq 16); do cat {data.guest_path}; done >/dev/vport0p1", 180)
    )
    digest = hashlib.sha256()
    left = 16 * data.size
    async with asyncio.timeout(180):
        while left:
            piece = await reader.read(min(left, MIB))
            assert piece
            digest.update(piece)
            left -= len(piece)
        assert (await run).status == 0
    assert digest.hexdigest() == hashlib.sha256(data.data * 16).hexdigest()
    for stream in (writer, idle):
        stream.close()
        await stream.wait_closed()
