"""What a frontend may not do: named in one line, answered or ended, and never at another's cost."""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.waiting import turns, until
from vring_serial.proto.vhost_user import (
    U64,
    ConfigAccess,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddress,
    VringDescriptor,
    VringState,
    request,
)
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend

FEATURES = 1 << 32 | 1 << 29 | 1 << 28
BIT_30 = 1 << 30
USER = 0x7F12_3456_0000
MEMORY_SIZE = 1 << 20
QUEUE_SIZE = 64
OFFERED = int(PROTOCOL_FEATURES)
WITHOUT_REPLY_ACK = int(PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Lines of warning and above."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def odd_fds(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Descriptors that are not what a message asks for."""
    empty = os.open(tmp_path / "empty", os.O_RDWR | os.O_CREAT)
    read_only = os.open(tmp_path / "read-only", os.O_RDONLY | os.O_CREAT)
    os.truncate(tmp_path / "read-only", 1 << 20)
    pipe_read, pipe_write = os.pipe()
    directory = os.open(tmp_path, os.O_RDONLY)
    fds = {
        "empty": empty,
        "read-only": read_only,
        "pipe-read": pipe_read,
        "pipe-write": pipe_write,
        "directory": directory,
        "epoll": os.open("/dev/null", os.O_RDWR),
    }
    yield fds
    for fd in fds.values():
        os.close(fd)


async def ready(connect: Callable[[], Any], protocol_features: int = OFFERED) -> Any:
    """A frontend whose queue 0 has run and been stopped with ENABLE 0."""
    frontend = connect()
    await frontend.negotiate(protocol_features | ProtocolFeature.REPLY_ACK)
    await frontend.set_up(0)
    await frontend.enable(0, 0)
    if not protocol_features & ProtocolFeature.REPLY_ACK:
        frontend.send(Request.SET_PROTOCOL_FEATURES, U64(protocol_features))
    return frontend


REGION = MemoryRegion(0, MEMORY_SIZE, USER, 0)


def region(**changes: int) -> MemoryRegion:
    values = {"guest_address": 4 << 20, "size": 4096, "user_address": 4 << 20, "mmap_offset": 0}
    return MemoryRegion(**(values | changes))


def address(**changes: int) -> VringAddress:
    values = {"index": 1, "flags": 0, "descriptor": USER, "used": USER + 4096}
    return VringAddress(**({"available": USER + 8192} | values | changes))


#: name: (request, payload, descriptors by name, what the log says after the message's name)
REFUSED: dict[str, tuple[Request, Payload | None, list[str], str]] = {
    "features-not-offered": (Request.SET_FEATURES, U64(1), [], "features 0x1 were not offered"),
    "queue-out-of-range-num": (Request.SET_VRING_NUM, VringState(4, 64), [], "queue 4 of 4"),
    "queue-out-of-range-base": (Request.SET_VRING_BASE, VringState(1 << 31), [], "of 4"),
    "queue-out-of-range-addr": (Request.SET_VRING_ADDR, address(index=77), [], "queue 77 of 4"),
    "queue-out-of-range-enable": (Request.SET_VRING_ENABLE, VringState(4, 1), [], "queue 4 of 4"),
    "queue-out-of-range-kick": (
        Request.SET_VRING_KICK,
        VringDescriptor(255),
        ["pipe-read"],
        "queue 255 of 4",
    ),
    "queue-out-of-range-call": (
        Request.SET_VRING_CALL,
        VringDescriptor(4),
        ["pipe-write"],
        "queue 4 of 4",
    ),
    "queue-out-of-range-err": (
        Request.SET_VRING_ERR,
        VringDescriptor(4),
        ["pipe-write"],
        "queue 4 of 4",
    ),
    "size-0": (Request.SET_VRING_NUM, VringState(1, 0), [], "size 0 is not a power of two"),
    "size-3": (Request.SET_VRING_NUM, VringState(1, 3), [], "queue 1: size 3 is not a power of"),
    "size-2048": (Request.SET_VRING_NUM, VringState(1, 2048), [], "size 2048 .* up to 1024"),
    "base-17-bits": (Request.SET_VRING_BASE, VringState(1, 65536), [], "index 65536 has more than"),
    "enable-2": (Request.SET_VRING_ENABLE, VringState(1, 2), [], "enable is 2 instead of 0 or 1"),
    "kick-without-descriptor": (
        Request.SET_VRING_KICK,
        VringDescriptor(1),
        [],
        "0 descriptors instead of 1",
    ),
    "kick-with-two": (
        Request.SET_VRING_KICK,
        VringDescriptor(1),
        ["pipe-read", "pipe-read"],
        "2 descriptors instead of 1",
    ),
    "kick-with-and-without": (
        Request.SET_VRING_KICK,
        VringDescriptor(1, no_fd=True),
        ["pipe-read"],
        "1 descriptors instead of 0",
    ),
    "kick-is-a-file": (
        Request.SET_VRING_KICK,
        VringDescriptor(1),
        ["empty"],
        "its descriptor is not an eventfd",
    ),
    "kick-is-a-directory": (
        Request.SET_VRING_KICK,
        VringDescriptor(1),
        ["directory"],
        "its descriptor is not an eventfd",
    ),
    "kick-is-a-pipe": (
        Request.SET_VRING_KICK,
        VringDescriptor(1),
        ["pipe-read"],
        "its descriptor is not an eventfd",
    ),
    "call-is-a-pipe": (
        Request.SET_VRING_CALL,
        VringDescriptor(1),
        ["pipe-write"],
        "its descriptor is not an eventfd or a unix socket",
    ),
    "call-is-a-file": (
        Request.SET_VRING_CALL,
        VringDescriptor(1),
        ["empty"],
        "not an eventfd or a unix socket",
    ),
    "err-is-a-file": (
        Request.SET_VRING_ERR,
        VringDescriptor(1),
        ["empty"],
        "not an eventfd or a unix socket",
    ),
    "channel-without-descriptor": (
        Request.SET_BACKEND_REQ_FD,
        None,
        [],
        "0 descriptors instead of 1",
    ),
    "channel-is-a-pipe": (
        Request.SET_BACKEND_REQ_FD,
        None,
        ["pipe-write"],
        "its descriptor is not a socket",
    ),
    "table-without-descriptors": (
        Request.SET_MEM_TABLE,
        MemoryTable((REGION,)),
        [],
        "0 descriptors instead of 1",
    ),
    "table-with-too-many-descriptors": (
        Request.SET_MEM_TABLE,
        MemoryTable((REGION,)),
        ["empty", "empty"],
        "2 descriptors instead of 1",
    ),
    "table-of-an-empty-file": (
        Request.SET_MEM_TABLE,
        MemoryTable((REGION,)),
        ["empty"],
        "region at 0x0: its file has 0x0 bytes",
    ),
    "table-of-a-pipe": (
        Request.SET_MEM_TABLE,
        MemoryTable((REGION,)),
        ["pipe-read"],
        "region at 0x0: its file has 0x0 bytes",
    ),
    "table-of-a-read-only-file": (
        Request.SET_MEM_TABLE,
        MemoryTable((REGION,)),
        ["read-only"],
        "Permission denied",
    ),
    "table-with-an-overlap": (
        Request.SET_MEM_TABLE,
        MemoryTable((REGION, region(guest_address=MEMORY_SIZE - 4096))),
        ["memory", "memory"],
        "overlap",
    ),
    "region-with-an-overlap": (
        Request.ADD_MEM_REG,
        SingleRegion(region(guest_address=4096)),
        ["memory"],
        "overlap",
    ),
    "region-of-no-bytes": (
        Request.ADD_MEM_REG,
        SingleRegion(region(size=0)),
        ["memory"],
        "cannot map 0x0 bytes",
    ),
    "region-of-2**64-bytes": (
        Request.ADD_MEM_REG,
        SingleRegion(region(size=2**64 - 1)),
        ["memory"],
        "cannot map",
    ),
    "region-that-wraps": (
        Request.ADD_MEM_REG,
        SingleRegion(region(guest_address=2**64 - 4096, size=8192)),
        ["memory"],
        "wraps around",
    ),
    "region-past-the-end-of-its-file": (
        Request.ADD_MEM_REG,
        SingleRegion(region(mmap_offset=MEMORY_SIZE + 4096)),
        ["memory"],
        "its file has 0x101000 bytes",
    ),
    "region-at-a-huge-offset": (
        Request.ADD_MEM_REG,
        SingleRegion(region(mmap_offset=2**64 - 4096)),
        ["memory"],
        "cannot map",
    ),
    "region-without-descriptor": (
        Request.ADD_MEM_REG,
        SingleRegion(region()),
        [],
        "0 descriptors instead of 1",
    ),
    "region-to-remove-that-is-none": (
        Request.REM_MEM_REG,
        SingleRegion(region()),
        [],
        "0x400000",
    ),
    "migration-log-of-one-number": (Request.SET_LOG_BASE, U64(0), ["memory"], "8 bytes instead"),
    "migration-log-read-only": (Request.SET_LOG_BASE, LogArea(4096), ["read-only"], "cannot map"),
    "migration-log-descriptor": (Request.SET_LOG_FD, None, ["memory"], "not an eventfd"),
    "packets-of-networks": (Request.SEND_RARP, U64(0), [], "not supported"),
    "big-endian-queues": (Request.SET_VRING_ENDIAN, VringState(0, 1), [], "not supported"),
    "address-translation": (Request.IOTLB_MSG, U64(0), [], "not supported"),
    "kick-in-band-not-negotiated": (
        Request.VRING_KICK,
        VringState(0),
        [],
        "INBAND_NOTIFICATIONS was not negotiated",
    ),
    "status-of-9-bits": (Request.SET_STATUS, U64(0x100), [], "status 0x100 has more than 8 bits"),
    "config-flags": (Request.SET_CONFIG, ConfigAccess(0, b"x", 4), [], "unknown flags 0x4"),
    "config-too-large": (Request.SET_CONFIG, ConfigAccess(0, bytes(257)), [], "at most 256"),
}


@pytest.mark.parametrize("acks", [True, False], ids=["reply-ack", "no-reply-ack"])
@pytest.mark.parametrize("name", REFUSED)
async def test_refused(
    name: str,
    acks: bool,
    backend: VhostUserBackend,
    connect: Callable[[], Any],
    device: Any,
    odd_fds: dict[str, int],
    log: Callable[[], list[str]],
) -> None:
    kind, payload, fd_names, why = REFUSED[name]
    before = held().descriptors
    frontend = await ready(connect, OFFERED if acks else WITHOUT_REPLY_ACK)
    fds = tuple((odd_fds | {"memory": frontend.memfd})[fd] for fd in fd_names)
    if acks:
        await frontend.ask(Request.GET_FEATURES)
        inside = held().descriptors
        assert await frontend.acked(kind, payload, fds) != 0
        await until(lambda: held().descriptors == inside)  # some are closed in a thread
        # The same frontend goes on.
        await frontend.enable(0)
        assert await frontend.echo(0, b"goes on")
    else:
        # Without REPLY_ACK the flag means nothing.
        frontend.send(kind, payload, fds, need_reply=True)
        assert await frontend.is_sent_away()
        assert not device.running
    assert len(log()) == 1
    pattern = rf"vhost-user .*/vhost.sock: (refused )?{kind.name}: .*{why}"
    assert re.search(pattern, log()[0]), log()[0]
    assert log()[0].endswith("; connection closed") != acks
    frontend.close()
    following = await ready(connect)
    await following.enable(0)
    assert await following.echo(0, b"the next")
    following.close()
    await until(lambda: not device.running and held().descriptors == before)


ENDED: dict[str, tuple[bytes, int, str]] = {
    "version-0": (struct.pack("=III", 1, 0, 0), 0, "GET_FEATURES: version 0 instead of 1"),
    "a-reply": (struct.pack("=III", 1, 5, 0), 0, "GET_FEATURES: a reply nobody asked for"),
    "4-GiB": (struct.pack("=III", 5, 9, 0xFFFFFFFF), 0, "SET_MEM_TABLE: payload of 4294967295"),
    "5000-bytes": (struct.pack("=III", 5, 9, 5000), 1, "SET_MEM_TABLE: payload of 5000 bytes"),
    "garbage": (b"GET / HTTP/1.1\r\n\r\n" * 10, 3, "message 542393671: version 3"),
    "9-descriptors": (
        request(Request.SET_MEM_TABLE, MemoryTable(())),
        9,
        "SET_MEM_TABLE: 9 descriptors instead of 0",
    ),
    "253-descriptors": (
        request(Request.SET_MEM_TABLE, MemoryTable(())),
        253,
        "SET_MEM_TABLE: 253 descriptors instead of 0",
    ),
    "query-of-wrong-size": (
        struct.pack("=IIIQ", 1, 9, 8, 0),
        1,
        "GET_FEATURES: payload of 8 bytes instead of none",
    ),
    "unknown-without-need-reply": (struct.pack("=III", 99, 1, 0), 2, "message 99: not supported"),
    "base-of-no-queue": (
        request(Request.GET_VRING_BASE, VringState(9), need_reply=True),
        0,
        "GET_VRING_BASE: queue 9 of 4",
    ),
    "protocol-features-not-offered": (
        request(Request.SET_PROTOCOL_FEATURES, U64(1 << 4 | 1 << 3), need_reply=True),
        0,
        "SET_PROTOCOL_FEATURES: .*MTU.* not offered",
    ),
    "protocol-features-unknown": (
        request(Request.SET_PROTOCOL_FEATURES, U64(1 << 40 | 1 << 3), need_reply=True),
        0,
        "SET_PROTOCOL_FEATURES: .*1099511627776.* not offered",
    ),
}


@pytest.mark.parametrize("name", ENDED)
async def test_ended(
    name: str,
    backend: VhostUserBackend,
    connect: Callable[[], Any],
    device: Any,
    log: Callable[[], list[str]],
) -> None:
    """What leaves nothing to answer, REPLY_ACK or not."""
    data, count, why = ENDED[name]
    before = held().descriptors
    frontend = await ready(connect)
    await frontend.enable(0)
    frontend.send_bytes(data, (frontend.memfd,) * count)
    assert await frontend.is_sent_away()
    assert len(log()) == 1
    assert re.search(rf"vhost-user .*: {why}.*; connection closed", log()[0]), log()[0]
    assert not device.running
    frontend.close()
    following = await ready(connect)
    await following.enable(0)
    assert await following.echo(0, b"the next")
    following.close()
    await until(lambda: not device.running and held().descriptors == before)


async def test_get_config_is_refused_with_a_reply_without_payload(frontend: Any) -> None:
    frontend.send_bytes(struct.pack("=IIIIII", 24, 1, 12, 0, 8, 0))
    assert await frontend.receive_bytes(12) == struct.pack("=III", 24, 5, 0)


async def test_unknown_messages_are_refused_and_the_connection_goes_on(
    frontend: Any, log: Callable[[], list[str]]
) -> None:
    await frontend.negotiate(OFFERED)
    frontend.send_bytes(struct.pack("=III", 99, 9, 4000) + bytes(4000), (frontend.memfd,))
    answer = await frontend.receive()
    assert answer.decode_reply(U64).value != 0
    assert log()[0].endswith("refused message 99: not supported")
    await frontend.ask(Request.GET_FEATURES)


async def test_a_stream_cut_at_every_byte(frontend: Any) -> None:
    frontend.send(Request.SET_PROTOCOL_FEATURES, U64(OFFERED))
    data = request(Request.SET_MEM_TABLE, MemoryTable((frontend.region,)), need_reply=True)
    for cut in range(1, len(data)):
        frontend.send_bytes(data[:cut], (frontend.memfd,))
        await turns(1)
        frontend.send_bytes(data[cut:])
        assert (await frontend.receive()).decode_reply(U64).value == 0


async def test_other_features_are_refused_while_a_queue_runs(
    frontend: Any, device: Any, log: Callable[[], list[str]]
) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(2)
    assert await frontend.acked(Request.SET_FEATURES, U64(FEATURES | BIT_30)) == 0
    assert await frontend.acked(Request.SET_FEATURES, U64(1 << 32 | BIT_30)) != 0
    assert log()[0].endswith("SET_FEATURES: other features while queue 2 runs")
    assert await frontend.echo(2, b"unharmed")
    assert device.told.count(("features", FEATURES)) == 1


# --- status, configuration, reset -----------------------------------------------------------------


async def test_the_status_is_the_frontends_if_it_speaks_of_it(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    assert await frontend.number(Request.GET_STATUS) == 0
    for status in (1, 3, 0xB, 0xF):
        assert await frontend.acked(Request.SET_STATUS, U64(status)) == 0
        assert await frontend.number(Request.GET_STATUS) == status
    await frontend.set_up(0)
    assert device.status == 0xF
    # A paused VM looks like this: the queues stop, the device keeps what it knows.
    assert await frontend.acked(Request.SET_STATUS, U64(0)) == 0
    assert await frontend.number(Request.GET_STATUS) == 0
    assert not device.running
    assert device.status == 0xF
    assert ("reset",) not in device.told


async def test_without_the_feature_the_status_follows_the_queues(
    frontend: Any, device: Any
) -> None:
    await frontend.negotiate(OFFERED & ~ProtocolFeature.STATUS)
    assert device.status == 0xB
    await frontend.set_up(0)
    assert device.status == 0xF


async def test_a_driver_that_broke_a_ring_starts_anew(
    frontend: Any, device: Any, log: Callable[[], list[str]]
) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.open_channel()
    await frontend.set_up(0)
    error = os.eventfd(0, os.EFD_NONBLOCK)
    assert await frontend.acked(Request.SET_VRING_ERR, VringDescriptor(0), (error,)) == 0
    # The available index moves by more than the queue has.
    frontend.memory.write(0x10000 + 16 * 64 + 2, struct.pack("<H", 65))
    frontend.kick(0)
    message = await frontend.asked()
    assert message.name == "CONFIG_CHANGE_MSG"
    assert os.eventfd_read(error) == 1
    os.close(error)
    assert "the guest's driver broke queue 0: index 65" in log()[0]
    assert await frontend.number(Request.GET_STATUS) & 64
    assert await frontend.acked(Request.SET_STATUS, U64(0)) == 0
    assert device.told[-1] == ("reset",)
    assert await frontend.base(0) == 0
    assert await frontend.acked(Request.SET_FEATURES, U64(FEATURES | BIT_30)) == 0
    await frontend.set_up(0)
    assert await frontend.echo(0, b"works again")


#: What a frontend goes on with after a reset, for the next driver or for another device's memory.
AFTER_A_RESET: dict[str, tuple[Request, Payload | None, bool]] = {
    "table": (Request.SET_MEM_TABLE, MemoryTable((replace(REGION, mmap_offset=4096),)), True),
    "features": (Request.SET_FEATURES, U64(FEATURES | BIT_30), False),
    "features-without-bit-30": (Request.SET_FEATURES, U64(FEATURES), False),
    "region": (Request.ADD_MEM_REG, SingleRegion(region()), True),
    "no-region": (Request.REM_MEM_REG, SingleRegion(region()), False),
    "enable": (Request.SET_VRING_ENABLE, VringState(0, 1), False),
    "status": (Request.SET_STATUS, U64(0xF), False),
}


@pytest.mark.parametrize("reset", ["status 0", "RESET_DEVICE"])
@pytest.mark.parametrize("name", AFTER_A_RESET)
async def test_nothing_but_a_new_set_up_runs_a_ring_after_a_reset(
    frontend: Any, device: Any, reset: str, name: str
) -> None:
    await frontend.negotiate(OFFERED)
    assert await frontend.acked(Request.ADD_MEM_REG, SingleRegion(region()), (frontend.memfd,)) == 0
    await frontend.set_up(0)
    assert await frontend.echo(0, b"before")
    message = (Request.SET_STATUS, U64(0)) if reset == "status 0" else (Request.RESET_DEVICE,)
    assert await frontend.acked(*message) == 0
    # Memory that is the guest's now; by chance it looks like a buffer that waits.
    frontend.put(0, b"the guest's own", 1)
    if name == "region":
        gone = SingleRegion(region())
        assert await frontend.acked(Request.REM_MEM_REG, gone) == 0
    before = frontend.memory.read(0, MEMORY_SIZE)
    kind, payload, with_memory = AFTER_A_RESET[name]
    assert await frontend.acked(kind, payload, (frontend.memfd,) if with_memory else ()) == 0
    frontend.kick(0)
    await turns()
    assert not device.running
    assert frontend.memory.read(0, MEMORY_SIZE) == before
    # The next driver's queue has another size.
    assert await frontend.acked(Request.SET_VRING_NUM, VringState(0, 2 * QUEUE_SIZE)) == 0
    await frontend.set_up(0)
    assert await frontend.echo(0, b"anew")


async def test_a_paused_guest_goes_on_where_it_stood(frontend: Any, device: Any) -> None:
    """Pausing writes status 0 as well, and positions may be asked for before or after it."""
    await frontend.negotiate(OFFERED)
    for index in (0, 1):
        await frontend.set_up(index)
        assert await frontend.echo(index, b"before")
    assert await frontend.base(0) == 1
    assert await frontend.acked(Request.SET_STATUS, U64(0)) == 0
    assert await frontend.base(1) == 1
    for index in (0, 1):
        await frontend.resume(index, 1)
        assert await frontend.echo(index, b"after")
    assert ("reset",) not in device.told


async def test_status_0_leaves_the_descriptor_for_errors(frontend: Any, device: Any) -> None:
    """Frontends give it once, when they come."""
    await frontend.negotiate(OFFERED)
    error = os.eventfd(0, os.EFD_NONBLOCK)
    assert await frontend.acked(Request.SET_VRING_ERR, VringDescriptor(0), (error,)) == 0
    assert await frontend.acked(Request.SET_STATUS, U64(0)) == 0
    await frontend.set_up(0)
    frontend.memory.write(0x10000 + 16 * 64 + 2, struct.pack("<H", 65))
    frontend.kick(0)
    await until(lambda: device.status & 64)
    assert os.eventfd_read(error) == 1
    os.close(error)


async def test_writes_to_the_configuration_space(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    write = ConfigAccess(8, b"!\0\0\0")
    assert await frontend.acked(Request.SET_CONFIG, write) == 0
    # What a migration brings along is no write of the driver's.
    moved = ConfigAccess(8, b"?\0\0\0", ConfigAccess.FOR_MIGRATION)
    assert await frontend.acked(Request.SET_CONFIG, moved) == 0
    assert [what for what in device.told if what[0] == "config"] == [("config", 8, b"!\0\0\0")]


async def test_resetting_the_device(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.acked(Request.RESET_DEVICE) == 0
    assert device.told[-2:] == [("stop", 0, 0), ("reset",)]
    # The queue has to be set up from the beginning, and enabled.
    await frontend.enable(0)
    assert not device.running
    await frontend.set_up(0)
    assert await frontend.echo(0, b"anew")


async def test_the_owner_may_be_reset_which_means_nothing(frontend: Any, device: Any) -> None:
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.acked(Request.RESET_OWNER) == 0
    assert await frontend.acked(Request.SET_OWNER) == 0
    assert await frontend.echo(0, b"still")
