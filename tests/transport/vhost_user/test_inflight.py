"""The region for inflight I/O: made, handed over, hostile."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import select
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.waiting import until
from vring_serial import unix_fds
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.vhost_user import Inflight, Request, request
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend
from vring_serial.transport.vhost_user.inflight import HALF_SIZE, InflightRegion, make_region

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
DEVICE = {"device_id": 42, "queues": 4, "largest": 1024}
STRIDE = 32 + 32 * 64
RING_PACKED = 1 << 34


async def get_region(frontend: Any, wanted: Inflight) -> tuple[int, Inflight]:
    frontend.send(Request.GET_INFLIGHT_FD, wanted)
    await until(lambda: select.select([frontend.sock], [], [], 0)[0])
    received = unix_fds.receive(frontend.sock, 4096, 8)
    (fd,) = received.fds
    return fd, Inflight.unpack(received.data[12:])


@pytest.fixture
async def frontend(backend: VhostUserBackend, connect: Callable[[], Any]) -> Any:
    made = connect()
    await made.negotiate(int(PROTOCOL_FEATURES))
    return made


@pytest.fixture
def region() -> Iterator[tuple[int, Inflight]]:
    fd, given = make_region(Inflight(0, 0, 4, 64), **DEVICE)
    yield fd, given
    os.close(fd)


@pytest.mark.parametrize("padded", [False, True])
async def test_the_backend_makes_a_region_and_answers_in_the_size_of_the_request(
    frontend: Any, padded: bool
) -> None:
    fd, given = await get_region(frontend, Inflight(0, 0, 4, 64, padded))
    try:
        assert (given.num_queues, given.queue_size, given.mmap_offset) == (4, 64, 0)
        assert given.padded == padded
        assert os.fstat(fd).st_size == given.mmap_size >= 4 * STRIDE
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    finally:
        os.close(fd)


async def test_the_specifications_part_says_where_a_ring_is(frontend: Any) -> None:
    fd, given = await get_region(frontend, Inflight(0, 0, 4, 64))
    try:
        assert await frontend.acked(Request.SET_INFLIGHT_FD, given, (fd,)) == 0
        await frontend.set_up(1)
        head = struct.Struct("<QHHHH")
        at = -(-STRIDE // 64) * 64
        assert head.unpack(os.pread(fd, 16, at)) == (0, 1, 64, 0, 0)
        assert os.pread(fd, 16, 0) == bytes(16), "this ring was never set up"
        assert await frontend.echo(1, b"text")
        assert await frontend.acked(Request.SET_INFLIGHT_FD, given, (fd,)) != 0, "a ring runs"
        await frontend.base(1)
        # Nothing is in flight: no entry is marked.
        assert not any(os.pread(fd, 16 * 64, at + 16)[::16])
    finally:
        os.close(fd)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_backend_that_leaves_says_where_the_ring_is(
    device: Any, path: Any, connect: Callable[[], Any], packed: bool
) -> None:
    features = 1 << 32 | 1 << 29 | 1 << 28 | RING_PACKED * packed
    server = VhostUserBackend(device, str(path), packed=True)
    await server.start()
    frontend = connect()
    frontend.packed = packed
    await frontend.negotiate(int(PROTOCOL_FEATURES), features)
    fd, given = await get_region(frontend, Inflight(0, 0, 4, 64))
    try:
        assert await frontend.acked(Request.SET_INFLIGHT_FD, given, (fd,)) == 0
        await frontend.set_up(0, base=0x8000_8000 if packed else 0)
        for slot in range(3):
            assert await frontend.echo(0, b"text", slot)
        await server.aclose()
        again = InflightRegion(fd, given, **DEVICE)
        assert again.known
        assert again.size_of(0) == 64
        assert again.size_of(1) == 0
        used = struct.unpack_from("<H", os.pread(fd, 32, 0), 18 if packed else 14)[0]
        assert used == (6 if packed else 3)
        again.close()
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (Inflight(0, 0, 0, 64), "0 queues of 4"),
        (Inflight(0, 0, 5, 64), "5 queues of 4"),
        (Inflight(0, 0, 0xFFFF, 0xFFFF), "65535 queues of 4"),
        (Inflight(0, 0, 4, 0), "queue size 0 is not 1 to 1024"),
        (Inflight(0, 0, 4, 1025), "queue size 1025 is not 1 to 1024"),
    ],
)
def test_a_region_for_another_device_is_refused(wanted: Inflight, why: str) -> None:
    before = held()
    with pytest.raises(RemoteProtocolError, match=why):
        make_region(wanted, **DEVICE)
    assert held() == before


def test_a_region_of_another_size_is_refused(region: tuple[int, Inflight]) -> None:
    fd, given = region
    for size, offset in ((given.mmap_size - 1, 0), (1 << 63, 0), (given.mmap_size, 4096)):
        with pytest.raises(RemoteProtocolError, match="a region of"):
            InflightRegion(fd, Inflight(size, offset, 4, 64), **DEVICE)


@pytest.mark.parametrize("how", ["unsealed", "too short", "no memfd"])
def test_a_file_that_may_be_cut_off_is_refused(region: tuple[int, Inflight], how: str) -> None:
    _, given = region
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    if how == "no memfd":
        os.close(fd)
        fd, other = os.pipe()
        os.close(other)
    try:
        if how == "unsealed":
            os.ftruncate(fd, given.mmap_size)
        elif how == "too short":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        with pytest.raises(RemoteProtocolError, match="cannot shrink"):
            InflightRegion(fd, given, **DEVICE)
    finally:
        os.close(fd)


@pytest.mark.parametrize("device_id", [42, 3])
def test_what_another_kind_of_device_left_is_forgotten(
    region: tuple[int, Inflight], device_id: int
) -> None:
    fd, given = region
    first = InflightRegion(fd, given, **DEVICE)
    first.note(2, 64, 5, packed=False)
    first.write(b"state")
    first.close()
    again = InflightRegion(fd, given, device_id=device_id, queues=4, largest=1024)
    same = device_id == 42
    assert again.known == same
    assert (again.read(), again.size_of(2)) == ((b"state", 64) if same else (None, 0))
    again.close()


def test_the_state_is_the_one_before_or_the_new_one(region: tuple[int, Inflight]) -> None:
    fd, given = region
    made = InflightRegion(fd, given, **DEVICE)
    assert made.read() is None
    for number in range(5):
        made.write(b"%d" % number)
        assert made.read() == b"%d" % number
    made.write(bytes(HALF_SIZE))  # too long: there is none
    assert made.read() == b""
    made.close()


def test_whatever_a_frontend_writes_stays_within_the_region(region: tuple[int, Inflight]) -> None:
    fd, given = region
    made = InflightRegion(fd, given, **DEVICE)
    chance = random.Random(8)
    start = given.mmap_size - 2 * HALF_SIZE
    for _ in range(200):
        for half in range(2):
            words = [chance.choice([0, 1, HALF_SIZE, 1 << 63, (1 << 64) - 1]) for _ in range(2)]
            os.pwrite(fd, struct.pack("<QQ", *words), start + half * HALF_SIZE)
        state = made.read()
        assert state is None or len(state) < HALF_SIZE
        made.write(b"new")
    for index in range(4):
        os.pwrite(fd, os.urandom(32), index * -(-STRIDE // 64) * 64)
        made.size_of(index)
    made.close()


def test_the_kernels_addresses_are_not_in_the_region(region: tuple[int, Inflight]) -> None:
    """Who could write to them would read and write this process's memory."""
    fd, given = region
    made = InflightRegion(fd, given, **DEVICE)
    for index in range(4):
        record = made.record(index)
        record[:56] = b"\xa5" * 56
        record[56:] = b"\x5a" * (len(record) - 56)
    with mmap.mmap(fd, given.mmap_size) as shared:
        assert shared.find(b"\xa5") < 0
        assert shared.find(b"\x5a" * 72) >= 0
    del record
    made.close()


async def test_without_the_feature_there_is_no_region(
    backend: VhostUserBackend, connect: Callable[[], Any]
) -> None:
    frontend = connect()
    await frontend.negotiate(int(PROTOCOL_FEATURES) & ~(1 << 12))
    frontend.send_bytes(request(Request.GET_INFLIGHT_FD, Inflight(0, 0, 4, 64)))
    assert await frontend.is_sent_away()
