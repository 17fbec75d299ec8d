"""Workers are killed at random moments under full traffic, and nobody but the keeper notices.

``VRING_CHAOS_KILLS`` says how often; `make chaos` a thousand times.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from tests.support.keeper import DEATHS, kept, socket_ports
from tests.support.streams import PRIME, OpenFile, all_go_on, flowing, pattern
from tests.support.vfio_guest import VfioGuest
from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.device.console.state import BACKLOG_MAX
from vring_serial.proto.vfio_user_wire import Command

KILLS = int(os.environ.get("VRING_CHAOS_KILLS", "20"))
#: Messages of a start from one kill to the next.
STEP = 3 if KILLS <= 20 else 1
PORTS = 4


def vhost_user(packed):
    return EmbeddedGuest("v", memory=64 << 20, packed=packed)


def vfio_user(packed):
    return VfioGuest("v", PORTS, packed=packed)


def vfio_user_by_messages(packed):
    return VfioGuest("v", PORTS, packed=packed, messages=True, intx=True, twin=True)


def vfio_user_not_shared(packed):
    return VfioGuest("v", PORTS, packed=packed, shared=False)


def vfio_user_not_shared_twin(packed):
    return VfioGuest("v", PORTS, packed=packed, shared=False, twin=True, messages=True)


#: What makes a guest, and whether its rings are packed.
GUESTS = [
    *itertools.product((vhost_user, vfio_user, vfio_user_by_messages), (False, True)),
    (vfio_user_not_shared, False),
    (vfio_user_not_shared_twin, False),
]


@pytest.mark.parametrize(
    ("make_guest", "packed"),
    GUESTS,
    ids=[f"{make.__name__}-{'packed' if packed else 'split'}" for make, packed in GUESTS],
)
async def test_no_kill_is_noticed(tmp_path, monkeypatch, make_guest, packed):
    monkeypatch.chdir(tmp_path)  # short socket paths
    # By messages, bytes are slow.
    kills = KILLS // 4 if make_guest in (vfio_user_not_shared, vfio_user_not_shared_twin) else KILLS
    await endure(make_guest, packed, socket_ports(range(1, PORTS + 1)), kills=kills)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    ("make_guest", "kind"), [(vhost_user, "port"), (vhost_user, "console"), (vfio_user, "port")]
)
async def test_no_kill_is_noticed_at_terminals_pipes_and_files(
    tmp_path, monkeypatch, make_guest, packed, kind
):
    """A console's guest never waits: what the other end has not read waits in the device."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipe.in", "pipe.out", "file.in"):
        os.mkfifo(name)
    chardevs = (
        "pty,id=c1,path=pty",
        "pipe,id=c2,path=pipe",
        "file,id=c3,path=file,input-path=file.in",
        "stdio,id=c4",
    )
    arguments = []
    for nr, chardev in enumerate(chardevs, 1):
        port = f"chardev=c{nr},nr={nr},name=org.example.data{nr}"
        arguments += ["--chardev", chardev, f"--{kind}", port]
    (stdin, to_stdin), (from_stdout, stdout) = os.pipe(), os.pipe()
    ends = {
        1: ("pty", "pty"),
        2: ("pipe.out", "pipe.in"),
        3: ("file", "file.in"),
        4: (from_stdout, to_stdin),
    }

    async def connect(nr):
        out, into = ends[nr]
        opened = OpenFile(out, os.O_RDONLY), OpenFile(into, os.O_WRONLY)
        stack.callback(opened[0].close)
        return opened

    with ExitStack() as stack:
        stack.callback(os.close, stdin)
        stack.callback(os.close, stdout)
        how = {"stdin": stdin, "stdout": stdout}
        if kind == "console":
            how["ahead"] = BACKLOG_MAX - 200_000
        await endure(make_guest, packed, arguments, connect, **how)


async def endure(
    make_guest,
    packed,
    arguments,
    connect=None,
    *,
    kills=KILLS,
    ahead=math.inf,
    **how,
):
    """Kill workers while bytes flow through the ports, and have nobody notice."""
    protocol = "vhost-user" if make_guest is vhost_user else "vfio-user"
    chance = random.Random(KILLS)
    arguments = [*arguments, *(["--packed"] if packed else [])]
    async with AsyncExitStack() as stack:
        keeper = await stack.enter_async_context(
            kept(Path.cwd(), *arguments, protocol=protocol, **how)
        )
        guest = await stack.enter_async_context(make_guest(packed))
        ports = range(1, PORTS + 1)
        async with flowing(keeper, guest, ports, chance, connect, ahead) as streams:
            for number in range(kills):
                await keeper.kill(chance.choice(DEATHS))
                await all_go_on(streams)
                if not number:  # by now the keeper has taken all that the first worker told it
                    held = keeper.held
                await asyncio.sleep(chance.random() * 0.3)  # any moment of the traffic
            assert keeper.held == held
        assert await keeper.stop() == 0
    log = keeper.log
    assert log.count("another one goes on") == kills
    peer = "frontend" if make_guest is vhost_user else "client"
    # A worker that is killed may take its last lines with it.
    assert log.count(f"{peer} connected") == 1
    assert log.partition("stopping")[0].count(f"{peer} gone") == 0
    assert log.count("opened by the guest") == PORTS
    assert "warning" not in log


async def carries(guest, host):
    """Wait until a byte has come from the guest to the client of its port, and one back."""
    host_reader, host_writer = host
    port = await guest.wait_port(name="org.example.data1")
    reader, writer = await port.open()
    writer.write(b"a")
    assert await host_reader.readexactly(1) == b"a"
    host_writer.write(b"b")
    assert await reader.readexactly(1) == b"b"
    writer.close()


@pytest.mark.parametrize(
    "options",
    [{"twin": True}, {"messages": True, "intx": True, "packed": True}, {"shared": False}],
    ids=["msix", "intx", "not shared"],
)
async def test_a_vfio_user_client_may_be_at_any_message_of_its_start(
    tmp_path, monkeypatch, options
):
    monkeypatch.chdir(tmp_path)
    arguments = [*socket_ports([1]), *(["--packed"] if "packed" in options else [])]
    async with kept(tmp_path, *arguments, protocol="vfio-user") as keeper:
        host = await keeper.connect(1)
        deadly, victim = 0, 0
        while victim is not None:  # the last guest had fewer messages than that
            victim, messages = None, 0

            def kill_at(command, deadly=deadly):
                nonlocal victim, messages
                if command != Command.REGION_READ:
                    if messages == deadly:
                        victim = keeper.kill_now()
                    messages += 1

            async with VfioGuest("v", 1, before=kill_at, **options) as guest:
                await carries(guest, host)
            if victim is not None:
                await keeper.replaced(victim)
            deadly += STEP
        assert deadly > 50
        host[1].close()
    assert "cannot be gone on with" not in keeper.log


async def test_many_maps_of_one_file_cost_a_keeper_one_descriptor(tmp_path, monkeypatch):
    """A guest behind an IOMMU maps its memory page by page."""
    monkeypatch.chdir(tmp_path)
    async with kept(tmp_path, *socket_ports([1]), protocol="vfio-user") as keeper:
        host = await keeper.connect(1)
        async with VfioGuest("v", 1, pieces=512) as guest:
            await carries(guest, host)
            await keeper.kill_until_served()
            await carries(guest, host)
            assert all(held["/memfd"] < 8 for held in keeper.held)
        host[1].close()
    assert "cannot be gone on with" not in keeper.log


async def test_what_a_guest_was_to_be_given_when_the_worker_died_is_given(tmp_path, monkeypatch):
    """In memory that is not shared: it is used in the copy, and on its way to the guest, or not."""
    monkeypatch.chdir(tmp_path)
    async with kept(tmp_path, *socket_ports([1]), protocol="vfio-user") as keeper:
        _, writer = await keeper.connect(1)
        async with VfioGuest("v", 1, shared=False) as guest:
            port = await guest.wait_port(name="org.example.data1")
            reader, guest_writer = await port.open()
            data = pattern(1, 2 * PRIME)
            for _turn in range(2):
                writer.write(data)
                assert await reader.readexactly(len(data)) == data
                guest.leave_unread()
                writer.write(data)
                # The socket is full, of less than the device took: a queue's bound is 256 KiB.
                writer.write(data)
                await until(lambda: guest.unread > 80_000, lambda: f"{guest.unread}")
                await keeper.kill()
                guest.read_again()
                assert await reader.readexactly(2 * len(data)) == 2 * data
            guest_writer.close()
        writer.close()
