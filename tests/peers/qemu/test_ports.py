"""Stock QEMU and an unmodified Linux guest on our device, in every way that QEMU can have it."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
import pytest_asyncio

from tests.support.bench import MIB
from tests.support.exchange import Exchange, check, connections
from tests.support.qemu_ways import DATA_PORTS, OWN_PORT, PORT_NAMES
from tests.support.waiting import until, until_gives
from vring_serial.device.console.events import DeviceReset, PortClosed, PortOpened
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.virtio import Feature
from vring_serial.transport.vfio_user.server import VfioUserServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMES = 16  # the payload, mostly of 16 MiB
#: For what depends on the transport, and not on rings and register layouts.
each_transport = pytest.mark.parametrize(
    "each_way", ["vhost-user", "vfio-user"], indirect=True, scope="module"
)
DEVICE = "/sys/bus/pci/devices/0000:00:05.0"


@pytest_asyncio.fixture(loop_scope="module")
async def shared(each_way, failed):
    """The device and its guest, booted, with nobody connected to the ports."""
    async with each_way.turn(failed) as shared:
        yield shared


@pytest.fixture
def guest(shared):
    return shared.guest


def ports(bench, *numbers):
    """Streams to the host ends of ports."""
    return connections(bench.connect, *(f"org.example.data{nr}" for nr in numbers))


async def test_device_on_the_bus(shared, guest):
    way = shared.way
    ids = await guest.run(
        f"cd {DEVICE} && cat vendor device class subsystem_vendor subsystem_device"
        " && basename $(readlink driver)"
    )
    assert ids.split() == [
        *("0x1af4", f"{way.device_id:#x}", "0x078000", "0x1af4", f"{way.subsystem_id:#06x}"),
        "virtio-pci",
    ]
    interrupts = await guest.run("grep virtio0 /proc/interrupts")
    if way.msix:
        # One vector for changes of the configuration, one per queue but control-o, whose driver
        # wants no calls.
        found = re.findall(r"PCI-MSIX-0000:00:05.0 +\d+-edge +virtio0-(\S+)", interrupts)
        assert set(found) == {"config", "control-i", "input", "output"}
        assert len(found) == shared.bench.controller.num_queues
    else:
        # All queues share one level-triggered interrupt.
        assert re.search(r"IO-APIC +\d+-fasteoi +virtio0", interrupts)
        assert "MSI" not in interrupts


async def test_features_that_were_agreed(shared, guest):
    bits = (await guest.run(f"cat {DEVICE}/virtio0/features")).strip()
    agreed = {1 << bit for bit, is_set in enumerate(bits) if is_set == "1"}
    legacy = "force_legacy" in shared.way.append
    assert {ConsoleFeature.MULTIPORT, Feature.EVENT_IDX, Feature.INDIRECT_DESC} <= agreed
    assert (Feature.VERSION_1 in agreed) == (not legacy)
    assert (Feature.ACCESS_PLATFORM in agreed) == (
        shared.way.transport is VfioUserServer and not legacy
    )
    assert (Feature.RING_PACKED in agreed) == shared.way.served.get("packed", False)


async def test_names_of_ports(guest):
    names = await guest.run("cd /sys/class/virtio-ports && grep . vport0p*/name")
    assert names.split() == [f"vport0p{nr}/name:org.example.data{nr}" for nr in DATA_PORTS]


async def test_bytes_each_way_on_four_ports_at_once(shared, guest):
    writers = ["dd bs=4k", "dd bs=64k", "cat", "cat"]  # cat uses splice
    async with ports(shared.bench, *DATA_PORTS) as streams:
        exchanges = [
            Exchange(stream, f"/dev/vport0p{nr}", shared.payload, TIMES, writer)
            for stream, nr, writer in zip(streams, DATA_PORTS, writers, strict=True)
        ]
        await check(guest, *exchanges, expected=shared.payload.sha256(TIMES))


@each_transport
async def test_qemus_own_device_beside_ours(shared, guest, record_property):
    times = 2
    found = await guest.run(f"grep -l {OWN_PORT} /sys/class/virtio-ports/*/name")
    nodes = {OWN_PORT: found.split("/")[4], "org.example.data1": "vport0p1"}
    for name, node in nodes.items():
        async with connections(shared.bench.connect, name) as [stream]:
            # QEMU's own loses what the guest has not read when its host end hangs up.
            exchange = Exchange(stream, f"/dev/{node}", shared.payload, times, hangs_up=False)
            begun = time.perf_counter()
            await check(guest, exchange, expected=shared.payload.sha256(times))
            took = time.perf_counter() - begun
        record_property(f"{name} MiB/s each way", times * shared.payload.size // MIB / took)


async def test_port_hot_added_and_removed(shared, guest):
    before = await guest.run(PORT_NAMES)
    for number in range(2):
        port = shared.bench.make_port(6, "org.example.hot")
        await shared.bench.controller.plug_port(port)
        async with asyncio.timeout(20):
            await until_gives(lambda: guest.run(PORT_NAMES), before + "org.example.hot\n")
            reader, writer = await shared.bench.connect("org.example.hot")
            await guest.run(f"echo hot {number} >/dev/vport0p6")
            assert await reader.readline() == f"hot {number}\n".encode()
            writer.close()
            await writer.wait_closed()
            await shared.bench.controller.remove_port(6)
            await until_gives(lambda: guest.run(PORT_NAMES), before)


async def test_paused_and_continued_under_traffic(shared, guest):
    times = 8
    async with ports(shared.bench, 1) as [stream]:
        exchange = Exchange(stream, "/dev/vport0p1", shared.payload, times)
        expected = shared.payload.sha256(times)
        moving = asyncio.create_task(check(guest, exchange, expected=expected, timeout=120))
        for number in range(12):
            more = exchange.moved + shared.payload.size // 16
            await until(lambda more=more: exchange.moved >= more, "bytes move")
            await guest.qmp("stop")
            assert shared.bench.controller.ports[1].guest_open
            if number % 4 == 0:
                # A pause in which the host's side comes to rest; the others are over at once.
                await asyncio.sleep(0.2)
            assert not moving.done(), "the traffic was over before the last pause"
            await guest.qmp("cont")
        await moving
    happened = [event for event in shared.events if isinstance(event, (DeviceReset, PortOpened))]
    assert len(happened) == 2, happened  # both ends, once


@each_transport
async def test_guest_reboots_and_is_reset(shared, guest):
    async with ports(shared.bench, 1) as [(reader, writer)], asyncio.timeout(180):
        for number, boot_again in enumerate([guest.reboot, guest.reset]):
            # What is under way when it happens is not part of what comes after it.
            # Rings fill meanwhile; fewer bytes make the test easier, not wrong.
            await guest.run("cat /dev/zero >/dev/vport0p2 & exec 3</dev/vport0p1; sleep 0.2")
            async with ports(shared.bench, 2):
                await boot_again()
            await shared.ports_are_there()
            await guest.run(f"echo boot {number} >/dev/vport0p1")
            assert await reader.readline() == f"boot {number}\n".encode()
            writer.write(b"welcome\n")
            assert await guest.run("head -n 1 /dev/vport0p1") == "welcome\n"
    closed = [event.nr for event in shared.events if isinstance(event, PortClosed)]
    assert closed.count(1) >= 2


@each_transport
async def test_qemu_killed_and_started_again(shared, guest):
    async with ports(shared.bench, 1, 2) as [(reader, writer), _], asyncio.timeout(180):
        # Rings fill meanwhile; fewer bytes make the test easier, not wrong.
        await guest.run("cat /dev/zero >/dev/vport0p2 & exec 3</dev/vport0p1; sleep 0.2")
        await guest.aclose()
        await shared.boot()
        await shared.guest.run("echo again >/dev/vport0p1")
        assert await reader.readline() == b"again\n"
        writer.write(b"welcome\n")
        assert await shared.guest.run("head -n 1 /dev/vport0p1") == "welcome\n"


async def test_driver_unbound_and_bound_again(shared, guest):
    async with ports(shared.bench, 1) as [(reader, writer)], asyncio.timeout(60):
        for number in range(3):
            await guest.run("echo 0000:00:05.0 >/sys/bus/pci/drivers/virtio-pci/unbind")
            left = await guest.run("ls /sys/class/virtio-ports")
            assert len(left.split()) == 1, "but QEMU's own"
            await guest.run("echo 0000:00:05.0 >/sys/bus/pci/drivers/virtio-pci/bind")
            # Found by its name, for the number of the device is a new one.
            # The driver has bound before the device has told the names of its ports.
            found = "grep -l data1 /sys/class/virtio-ports/*/name 2>/dev/null"
            path = await guest.run(f"until {found}; do sleep 0.1; done | cut -d/ -f5")
            await guest.run(f"ln -sf /dev/{path.strip()} /tmp/port && echo {number} >/tmp/port")
            assert await reader.readline() == f"{number}\n".encode()
            writer.write(b"back\n")
            assert await guest.run("head -n 1 /tmp/port") == "back\n"
    shared.renumbered = True
