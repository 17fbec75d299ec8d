"""Ports of our device under a real Linux kernel and its own virtio_console driver."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from tests.support.waiting import until, until_gives

MIB = 1 << 20
AGENT = "com.redhat.spice.0"


async def test_name_stands_in_sysfs(bench):
    bench.add_port(1, AGENT)
    bench.add_port(5, "org.example.data")
    await bench.serve()
    guest = await bench.boot()
    result = await guest.run("cd /sys/class/virtio-ports && grep . */name")
    assert result.output.splitlines() == [
        f"vport0p1/name:{AGENT}",
        "vport0p5/name:org.example.data",
    ]


@pytest.mark.parametrize("inband_notifications", [False, True], ids=["eventfd", "in-band"])
async def test_64_mib_each_way(bench, payload, digest_of, inband_notifications):
    bench.add_port(1, "data")
    await bench.serve(inband_notifications=inband_notifications)
    guest = await bench.boot()
    data = payload(guest, 64 * MIB)
    reader, writer = await bench.connect("data")

    send = asyncio.create_task(guest.run(f"dd if={data.guest_path} of=/dev/vport0p1 bs=64k"))
    async with asyncio.timeout(60):
        assert await digest_of(reader, data.size) == data.sha256
    assert (await send).status == 0

    receive = asyncio.create_task(guest.run(f"head -c {data.size} /dev/vport0p1 | sha256sum"))
    async with asyncio.timeout(60):
        writer.write(data.data)
        await writer.drain()
        assert (await receive).output.split()[0] == data.sha256
    writer.close()
    await writer.wait_closed()


async def test_guest_closes_and_opens_again(bench):
    port = bench.add_port(1, "data")
    await bench.serve()
    guest = await bench.boot()
    reader, writer = await bench.connect("data")
    for number in range(3):
        line = f"round {number}\n".encode()
        await guest.run(f"echo round {number} > /dev/vport0p1")
        async with asyncio.timeout(10):
            assert await reader.readline() == line
        assert not port.guest_open
        # What the host writes while the port is closed waits for the guest's next open.
        writer.write(line)
        result = await guest.run("head -n 1 /dev/vport0p1")
        assert result.output.encode() + b"\n" == line
    writer.close()
    await writer.wait_closed()


async def test_host_disconnects_and_reconnects(bench):
    port = bench.add_port(1, "data")
    await bench.serve()
    guest = await bench.boot()
    # One descriptor stays open in the guest over all connections of the host.
    await guest.run("exec 3<>/dev/vport0p1; while :; do head -n 1 <&3; done >/tmp/got 2>&1 &")
    for number in range(3):
        _, writer = await bench.connect("data")
        await until(lambda: port.guest_open, "the guest opens its port")
        writer.write(f"line {number}\n".encode())
        await writer.drain()
        await guest.run(f"until grep -q 'line {number}' /tmp/got; do :; done")
        sent = asyncio.create_task(guest.run(f"echo answer {number} >/dev/vport0p1 || echo busy"))
        await sent
        writer.close()
        await writer.wait_closed()
        await until(lambda: not port.host_open, "the host end is closed")


async def test_guest_reads_end_of_file_and_writers_block_while_the_host_is_away(bench):
    port = bench.add_port(1, "data")
    await bench.serve()
    guest = await bench.boot()
    assert not port.host_open
    assert (await guest.run("head -c 1 /dev/vport0p1 | wc -c")).output == "0"
    await guest.run("echo waited >/dev/vport0p1 &")
    reader, writer = await bench.connect("data")
    async with asyncio.timeout(10):
        assert await reader.readline() == b"waited\n"
    writer.close()
    await writer.wait_closed()


async def test_port_added_and_removed_while_the_guest_runs(bench):
    bench.add_port(1, "first")
    await bench.serve()
    guest = await bench.boot()

    async def read_names():
        return (await guest.run("cat /sys/class/virtio-ports/*/name")).output

    assert await read_names() == "first"
    for number in range(2):
        added = bench.add_port(2, "second")
        await added.chardev.start()
        await until_gives(read_names, "first\nsecond")
        reader, writer = await bench.connect("second")
        await guest.run(f"echo hot {number} >/dev/vport0p2")
        async with asyncio.timeout(10):
            assert await reader.readline() == f"hot {number}\n".encode()
        writer.close()
        await writer.wait_closed()
        await bench.controller.remove_port(2)
        await until_gives(read_names, "first")
        assert (await guest.run("ls /dev/vport0p2")).status != 0


async def test_console_with_a_shell(bench):
    port = bench.add_port(0, "console", console=True)
    bench.add_port(1, "data")
    await bench.serve()
    guest = await bench.boot()
    reader, writer = await bench.connect("console")
    await guest.run("setsid sh -c 'exec sh -i </dev/hvc0 >/dev/hvc0 2>&1' &")
    writer.write(b"echo sum $((40 + 2))\n")
    async with asyncio.timeout(10):
        await reader.readuntil(b"sum 42")
    port.end_resized(132, 43)
    await guest.run("until [ \"$(stty size </dev/hvc0)\" = '43 132' ]; do :; done")
    writer.close()
    await writer.wait_closed()
    # Nobody reads the console: the guest must not spin.
    result = await guest.run("head -c 300000 /dev/zero | tr '\\0' x >/dev/hvc0; echo alive", 30)
    assert result.output == "alive"


async def test_two_ports_at_once(bench, payload, digest_of):
    bench.add_port(1, "one")
    bench.add_port(2, "two")
    await bench.serve()
    guest = await bench.boot()
    data = payload(guest, 16 * MIB)
    readers = []
    writers = []
    for name in ("one", "two"):
        reader, writer = await bench.connect(name)
        readers.append(reader)
        writers.append(writer)
    run = asyncio.create_task(
        guest.run(
            f"cat {data.guest_path} >/dev/vport0p1 & cat {data.guest_path} >/dev/vport0p2 & wait"
        )
    )
    async with asyncio.timeout(60):
        digests = await asyncio.gather(*(digest_of(reader, data.size) for reader in readers))
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


async def test_driver_unloaded_and_loaded_again(bench):
    bench.add_port(1, AGENT)
    await bench.serve()
    guest = await bench.boot()
    module = "/usr/lib/uml/modules/*/kernel/drivers/char/virtio_console.ko"
    reader, writer = await bench.connect(AGENT)
    for number in range(3):
        result = await guest.run(f"busybox rmmod virtio_console && busybox insmod {module}")
        assert result.status == 0, result.output
        await guest.run(f"echo load {number} >/dev/vport0p1")
        async with asyncio.timeout(10):
            assert await reader.readline() == f"load {number}\n".encode()
    writer.close()
    await writer.wait_closed()


async def test_one_guest_after_another_even_killed(bench):
    bench.add_port(1, AGENT)
    await bench.serve()
    reader, writer = await bench.connect(AGENT)
    for number in range(2):
        guest = await bench.boot()
        await guest.run(f"echo guest {number} >/dev/vport0p1")
        async with asyncio.timeout(10):
            assert await reader.readline() == f"guest {number}\n".encode()
        await guest.aclose()
    writer.close()
    await writer.wait_closed()


async def test_1_gib_while_another_port_is_blocked(bench, payload):
    bench.add_port(1, AGENT)
    bench.add_port(2, "blocked")
    await bench.serve()
    guest = await bench.boot()
    data = payload(guest, 64 * MIB)
    reader, writer = await bench.connect(AGENT)
    _, idle = await bench.connect("blocked")
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
