"""A frontend's dirty log: all that the device writes is in it while that is asked for."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import until
from vring_serial.proto.vhost_user import (
    F_LOG_ALL,
    U64,
    Empty,
    LogArea,
    MemoryRegion,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddress,
)
from vring_serial.transport.vhost_user.backend import PROTOCOL_FEATURES, VhostUserBackend

PAGE = 4096
USER = 0x7F12_3456_0000
MEMORY_SIZE = 1 << 20
FEATURES = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28
PACKED = 1 << 34
LOG_ALL = 1 << F_LOG_ALL
#: A bit for each page of memory.
LOG_SIZE = MEMORY_SIZE // PAGE // 8
OFFERED = int(PROTOCOL_FEATURES)


@pytest.fixture
def backend_options() -> dict[str, bool]:
    return {"packed": True}


class Log:
    """The bitmap, in a file that the frontend made; behind it lies what must stay as it is."""

    def __init__(self, size: int = LOG_SIZE, offset: int = 8192) -> None:
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + size + 64)
        self.area = LogArea(size, offset)

    def marked(self) -> set[int]:
        bits = os.pread(self.fd, self.area.size, self.area.offset)
        os.pwrite(self.fd, bytes(len(bits)), self.area.offset)
        number = int.from_bytes(bits, "little")
        return {page for page in range(len(bits) * 8) if number >> page & 1}

    def untouched_around(self) -> bool:
        whole = os.pread(self.fd, self.area.offset + self.area.size + 64, 0)
        before, behind = whole[: self.area.offset], whole[self.area.offset + self.area.size :]
        return not any(before) and not any(behind)


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    yield made
    os.close(made.fd)


async def echo_and_compare(frontend: Any, log: Log) -> tuple[set[int], set[int]]:
    """Bring a chain through; which pages changed by the device, and which are marked."""
    log.marked()
    data = os.urandom(500)
    frontend.put(0, data)
    before = frontend.memory.read(0, MEMORY_SIZE)
    frontend.kick(0)
    assert await frontend.used(0) == [500]
    after = frontend.memory.read(0, MEMORY_SIZE)
    pages = range(MEMORY_SIZE // PAGE)
    changed = {p for p in pages if before[p * PAGE :][:PAGE] != after[p * PAGE :][:PAGE]}
    return changed, log.marked()


@pytest.mark.parametrize("packed", [False, True])
async def test_logging_begins_and_ends_as_qemu_asks_while_rings_run(
    frontend: Any, log: Log, packed: bool
) -> None:
    frontend.packed = packed
    features = FEATURES | PACKED * packed
    await frontend.negotiate(OFFERED, features)
    await frontend.set_up(0, base=0x8000_8000 * packed)
    assert await frontend.acked(Request.SET_LOG_BASE, log.area, (log.fd,)) == 0
    changed, marked = await echo_and_compare(frontend, log)
    assert changed
    assert not marked
    assert await frontend.acked(Request.SET_FEATURES, U64(features | LOG_ALL)) == 0
    plain = frontend.places[0]
    logged = dataclasses.replace(plain, flags=VringAddress.F_LOG, log=plain.used - USER)
    assert await frontend.acked(Request.SET_VRING_ADDR, logged) == 0
    for _ in range(3):
        changed, marked = await echo_and_compare(frontend, log)
        assert changed
        assert changed <= marked
    # A new log each round, as Cloud Hypervisor has it.
    newer = Log(offset=0)
    assert await frontend.acked(Request.SET_LOG_BASE, newer.area, (newer.fd,)) == 0
    log.marked()
    changed, marked = await echo_and_compare(frontend, newer)
    assert changed <= marked
    assert log.marked() == set()
    assert log.untouched_around()
    assert newer.untouched_around()
    assert await frontend.acked(Request.SET_FEATURES, U64(features)) == 0
    assert await frontend.acked(Request.SET_VRING_ADDR, plain) == 0
    assert (await echo_and_compare(frontend, newer))[1] == set()
    os.close(newer.fd)


async def test_the_ring_is_marked_at_its_log_address(frontend: Any, log: Log) -> None:
    await frontend.negotiate(OFFERED, FEATURES | LOG_ALL)
    assert await frontend.acked(Request.SET_LOG_BASE, log.area, (log.fd,)) == 0
    await frontend.set_up(0)
    plain = frontend.places[0]
    logged = dataclasses.replace(plain, flags=VringAddress.F_LOG, log=0xF0000)
    assert await frontend.acked(Request.SET_VRING_ADDR, logged) == 0
    _, marked = await echo_and_compare(frontend, log)
    assert 0xF0 in marked
    assert (plain.used - USER) // PAGE not in marked


async def test_set_log_base_is_answered_without_need_reply(frontend: Any, log: Log) -> None:
    await frontend.negotiate(OFFERED)
    frontend.send(Request.SET_LOG_BASE, log.area, (log.fd,))
    assert (await frontend.receive()).kind == Request.SET_LOG_BASE


@pytest.mark.parametrize(
    ("area", "why"),
    [
        (LogArea(LOG_SIZE - 1, 0), r"ends at guest address 0xf8000, memory at 0x100000"),
        (LogArea(0, 0), "the dirty log: cannot map 0x0 bytes"),
        (LogArea(LOG_SIZE, 1 << 20), "the dirty log: its file has"),
        (LogArea(1 << 63, 0), "cannot map"),
        (LogArea(LOG_SIZE, (1 << 64) - PAGE), "cannot map"),
    ],
)
async def test_a_log_that_cannot_be_is_refused(
    frontend: Any, log: Log, area: LogArea, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await frontend.negotiate(OFFERED)
    await frontend.set_up(0)
    assert await frontend.acked(Request.SET_LOG_BASE, area, (log.fd,)) != 0
    assert why in caplog.text
    assert await frontend.echo(0, b"all else goes on")


async def test_a_log_needs_its_feature(frontend: Any, log: Log) -> None:
    await frontend.negotiate(int(PROTOCOL_FEATURES & ~ProtocolFeature.LOG_SHMFD))
    assert await frontend.acked(Request.SET_LOG_BASE, log.area, (log.fd,)) != 0


async def test_memory_that_grows_beyond_the_log_is_left_out_of_it(frontend: Any, log: Log) -> None:
    await frontend.negotiate(OFFERED, FEATURES | LOG_ALL)
    assert await frontend.acked(Request.SET_LOG_BASE, log.area, (log.fd,)) == 0
    added = SingleRegion(MemoryRegion(1 << 30, MEMORY_SIZE, 1 << 40, PAGE))
    assert await frontend.acked(Request.ADD_MEM_REG, added, (frontend.memfd,)) == 0
    await frontend.set_up(0)
    # The same bytes at the address that has no bit: the device writes there.
    frontend.drivers[0].add([(1 << 30, 8)], [((1 << 30) + 0x90000, 8)])
    frontend.drivers[0].publish()
    frontend.kick(0)
    assert await frontend.used(0) == [8]
    assert 0x90 not in log.marked()
    assert log.untouched_around()


async def test_a_log_that_is_cut_off_ends_the_session(
    frontend: Any, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await frontend.negotiate(OFFERED, FEATURES | LOG_ALL)
    assert await frontend.acked(Request.SET_LOG_BASE, log.area, (log.fd,)) == 0
    await frontend.set_up(0)
    os.ftruncate(log.fd, 0)
    frontend.put(0, b"marked where nothing is")
    frontend.kick(0)
    assert await frontend.is_sent_away()
    assert "its dirty log, 0x20 bytes, is gone: the file was cut off" in caplog.text


async def test_who_wants_to_hear_of_the_log_does(frontend: Any, log: Log) -> None:
    await frontend.negotiate(OFFERED, FEATURES | LOG_ALL)
    assert await frontend.acked(Request.SET_LOG_BASE, log.area, (log.fd,)) == 0
    told = os.eventfd(0, os.EFD_NONBLOCK)
    assert await frontend.acked(Request.SET_LOG_FD, Empty(), (told,)) == 0

    def heard() -> bool:
        try:
            return os.eventfd_read(told) > 0
        except BlockingIOError:
            return False

    await until(heard)
    await until(heard)
    os.close(told)


async def copied_in_rounds(frontend: Any, log: Log, left_out: int | None = None) -> bytes:
    """Run echoes while memory is copied by the log, stop the ring; the copy.

    A VMM knows itself what its guest writes. What the device writes after that was copied is known
    from the log alone, of which page ``left_out`` is ignored.
    """
    image = bytearray(MEMORY_SIZE)

    def copy(pages: set[int]) -> None:
        for page in pages - {left_out}:
            image[page * PAGE : (page + 1) * PAGE] = frontend.memory.read(page * PAGE, PAGE)

    everything = set(range(MEMORY_SIZE // PAGE))
    copy(everything)
    for turn in range(40):
        data = os.urandom(100 + turn)
        before = frontend.memory.read(0, MEMORY_SIZE)
        frontend.put(0, data, slot=turn % 8)
        after = frontend.memory.read(0, MEMORY_SIZE)
        copy({p for p in everything if before[p * PAGE :][:PAGE] != after[p * PAGE :][:PAGE]})
        frontend.kick(0)
        assert await frontend.used(0) == [len(data)]
        copy(log.marked())
    return bytes(image)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("left_out", [None, 0x82])
async def test_memory_that_was_copied_by_the_log_goes_on_at_another_backend(
    frontend: Any, log: Log, device: Any, tmp_path: Path, packed: bool, left_out: int | None
) -> None:
    features = FEATURES | PACKED * packed
    frontend.packed = packed
    await frontend.negotiate(OFFERED, features | LOG_ALL)
    assert await frontend.acked(Request.SET_LOG_BASE, log.area, (log.fd,)) == 0
    await frontend.set_up(0, base=0x8000_8000 * packed)
    image = await copied_in_rounds(frontend, log, left_out)
    base = await frontend.base(0)
    whole = bytearray(image)
    for page in log.marked():
        whole[page * PAGE : (page + 1) * PAGE] = frontend.memory.read(page * PAGE, PAGE)
    exact = bytes(whole) == frontend.memory.read(0, MEMORY_SIZE)
    assert exact == (left_out is None)
    if left_out is not None:
        return
    frontend.memory.write(0, bytes(MEMORY_SIZE))
    frontend.memory.write(0, bytes(whole))
    path = tmp_path / "other"
    other = VhostUserBackend(type(device)(), str(path), packed=True)
    await other.start()
    try:
        frontend.sock.close()
        frontend.sock = socket.socket(socket.AF_UNIX)
        frontend.sock.connect(str(path))
        frontend.sock.setblocking(False)
        await frontend.negotiate(OFFERED, features)
        await frontend.resume(0, base)
        for turn in range(20):
            assert await frontend.echo(0, os.urandom(200), slot=turn % 8)
    finally:
        await other.aclose()
