"""What a client may not say: each refused or ended in one line, and no descriptor left behind."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.waiting import wait_until
from vring_serial.proto.framing import MAX_FDS, Payload
from vring_serial.proto.vfio_user import request
from vring_serial.proto.vfio_user_dma import DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_regions import RegionAccess, RegionInfo, RegionIoFds, RegionRead
from vring_serial.proto.vfio_user_wire import (
    Command,
    DeviceInfo,
    Header,
    HeaderFlag,
    IrqIndex,
    IrqInfo,
    IrqSet,
    IrqSetFlag,
)

EVENTFD = IrqSetFlag.DATA_EVENTFD
NONE = IrqSetFlag.DATA_NONE
BOOL = IrqSetFlag.DATA_BOOL
MASK = IrqSetFlag.ACTION_MASK
UNMASK = IrqSetFlag.ACTION_UNMASK
TRIGGER = IrqSetFlag.ACTION_TRIGGER
MSIX, INTX = IrqIndex.MSIX, IrqIndex.INTX
SIZE = 1 << 20


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Descriptors that are, or are not, what a message asks for."""
    flags = os.EFD_NONBLOCK
    made = {
        "event": os.eventfd(0, flags),
        "file": os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT),
        "directory": os.open(tmp_path, os.O_RDONLY),
        "memory": os.memfd_create("memory"),
    }
    made["read-only"] = os.open(f"/proc/self/fd/{made['memory']}", os.O_RDONLY)
    os.ftruncate(made["memory"], SIZE)
    yield made
    for fd in made.values():
        os.close(fd)


def words(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}I", *numbers)


#: name, message, descriptors, and the error of the reply.
REFUSED: list[tuple[str, Command, Payload, tuple[str, ...], int]] = [
    # DMA_MAP
    ("map without access", Command.DMA_MAP, DmaMap(0, 0, 0, 4096), ("memory",), errno.EINVAL),
    ("map of unknown flags", Command.DMA_MAP, DmaMap(4, 0, 0, 4096), ("memory",), errno.EINVAL),
    ("map of nothing", Command.DMA_MAP, DmaMap(3, 0, 0, 0), ("memory",), errno.EINVAL),
    (
        "map that wraps around",
        Command.DMA_MAP,
        DmaMap(3, 0, 0xFFFFFFFFFFFFF000, 0x2000),
        ("memory",),
        errno.EINVAL,
    ),
    (
        "map outside any file",
        Command.DMA_MAP,
        DmaMap(3, (1 << 63) - 4096, 0, 8192),
        ("memory",),
        errno.EINVAL,
    ),
    ("map past the end", Command.DMA_MAP, DmaMap(3, 4096, 0, SIZE), ("memory",), errno.EINVAL),
    ("map of an empty file", Command.DMA_MAP, DmaMap(3, 0, 0, 4096), ("file",), errno.EINVAL),
    ("map of a directory", Command.DMA_MAP, DmaMap(3, 0, 0, 1), ("directory",), errno.EINVAL),
    ("map of an event", Command.DMA_MAP, DmaMap(3, 0, 0, 1), ("event",), errno.EINVAL),
    ("map of what is read-only", Command.DMA_MAP, DmaMap(3, 0, 0, 1), ("read-only",), errno.EINVAL),
    ("map of two", Command.DMA_MAP, DmaMap(3, 0, 0, 1), ("memory", "memory"), errno.EINVAL),
    # DMA_UNMAP
    ("unmap of nothing", Command.DMA_UNMAP, DmaUnmap(0, 4096), (), errno.ENOENT),
    ("unmap with a descriptor", Command.DMA_UNMAP, DmaUnmap(0, 4096), ("memory",), errno.EINVAL),
    ("unmap with dirty pages", Command.DMA_UNMAP, DmaUnmap(0, 4096, 1), (), errno.EINVAL),
    ("unmap of unknown flags", Command.DMA_UNMAP, DmaUnmap(0, 4096, 4), (), errno.EINVAL),
    ("unmap of all and one", Command.DMA_UNMAP, DmaUnmap(0, 4096, 2), (), errno.EINVAL),
    # information
    ("little room", Command.DEVICE_GET_INFO, DeviceInfo(argsz=15), (), errno.EINVAL),
    ("no region", Command.DEVICE_GET_REGION_INFO, RegionInfo(9), (), errno.EINVAL),
    ("little room", Command.DEVICE_GET_REGION_INFO, RegionInfo(0, argsz=31), (), errno.EINVAL),
    ("no irq", Command.DEVICE_GET_IRQ_INFO, IrqInfo(5), (), errno.EINVAL),
    ("little room", Command.DEVICE_GET_IRQ_INFO, IrqInfo(0, argsz=8), (), errno.EINVAL),
    ("io of no region", Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(9), (), errno.EINVAL),
    ("io of an empty region", Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(0), (), errno.EINVAL),
    # interrupts
    ("no type", Command.DEVICE_SET_IRQS, IrqSet(NONE | TRIGGER, 5, 0, 0), (), errno.EINVAL),
    ("no flags", Command.DEVICE_SET_IRQS, IrqSet(0, MSIX, 0, 0), (), errno.EINVAL),
    ("no action", Command.DEVICE_SET_IRQS, IrqSet(NONE, MSIX, 0, 0), (), errno.EINVAL),
    (
        "two actions",
        Command.DEVICE_SET_IRQS,
        IrqSet(NONE | TRIGGER | MASK, MSIX, 0, 0),
        (),
        errno.EINVAL,
    ),
    (
        "two kinds of data",
        Command.DEVICE_SET_IRQS,
        IrqSet(NONE | EVENTFD | TRIGGER, MSIX, 0, 0),
        (),
        errno.EINVAL,
    ),
    (
        "unknown flags",
        Command.DEVICE_SET_IRQS,
        IrqSet(NONE | TRIGGER | 64, MSIX, 0, 0),
        (),
        errno.EINVAL,
    ),
    (
        "vectors past the end",
        Command.DEVICE_SET_IRQS,
        IrqSet(EVENTFD | TRIGGER, MSIX, 4, 2),
        ("event", "event"),
        errno.EINVAL,
    ),
    (
        "vectors that wrap around",
        Command.DEVICE_SET_IRQS,
        IrqSet(EVENTFD | TRIGGER, MSIX, 0xFFFFFFFF, 0xFFFFFFFF),
        (),
        errno.EINVAL,
    ),
    (
        "too few descriptors",
        Command.DEVICE_SET_IRQS,
        IrqSet(EVENTFD | TRIGGER, MSIX, 0, 2),
        ("event",),
        errno.EINVAL,
    ),
    (
        "an event that is none",
        Command.DEVICE_SET_IRQS,
        IrqSet(EVENTFD | TRIGGER, MSIX, 0, 2),
        ("event", "file"),
        errno.EINVAL,
    ),
    (
        "descriptors without use",
        Command.DEVICE_SET_IRQS,
        IrqSet(NONE | TRIGGER, MSIX, 0, 1),
        ("event",),
        errno.EINVAL,
    ),
    (
        "too few booleans",
        Command.DEVICE_SET_IRQS,
        IrqSet(BOOL | TRIGGER, MSIX, 0, 3, b"\1\1"),
        (),
        errno.EINVAL,
    ),
    ("masked vectors", Command.DEVICE_SET_IRQS, IrqSet(NONE | MASK, MSIX, 0, 1), (), errno.EINVAL),
    (
        "event to mask",
        Command.DEVICE_SET_IRQS,
        IrqSet(EVENTFD | MASK, INTX, 0, 1),
        ("event",),
        errno.EINVAL,
    ),
    (
        "two events to unmask",
        Command.DEVICE_SET_IRQS,
        IrqSet(EVENTFD | UNMASK, INTX, 0, 1),
        ("event", "event"),
        errno.EINVAL,
    ),
    (
        "event to unmask that is none",
        Command.DEVICE_SET_IRQS,
        IrqSet(EVENTFD | UNMASK, INTX, 0, 1),
        ("memory",),
        errno.EINVAL,
    ),
    # regions
    ("read of no region", Command.REGION_READ, RegionRead(0, 9, 4), (), errno.EINVAL),
    ("read of an empty region", Command.REGION_READ, RegionRead(0, 0, 4), (), errno.EINVAL),
    ("read past the end", Command.REGION_READ, RegionRead(253, 7, 4), (), errno.EINVAL),
    ("read of nothing", Command.REGION_READ, RegionRead(0, 7, 0), (), errno.EINVAL),
    (
        "read that wraps around",
        Command.REGION_READ,
        RegionRead((1 << 64) - 1, 7, 4),
        (),
        errno.EINVAL,
    ),
    ("huge read", Command.REGION_READ, RegionRead(0, 4, 0xFFFFFFFF), (), errno.EINVAL),
    (
        "write past the end",
        Command.REGION_WRITE,
        RegionAccess(255, 7, 2, b"ab"),
        (),
        errno.EINVAL,
    ),
    ("too little data", Command.REGION_WRITE, RegionAccess(0, 7, 4, b"abc"), (), errno.EINVAL),
    ("too much data", Command.REGION_WRITE, RegionAccess(0, 7, 1, b"abc"), (), errno.EINVAL),
    # the other way round
    ("DMA to the server", Command.DMA_READ, RegionRead(0, 0, 0), (), errno.EOPNOTSUPP),
]


@pytest.mark.parametrize(
    ("command", "payload", "names", "error"),
    [case[1:] for case in REFUSED],
    ids=[f"{command.name}: {name}" for name, command, *_ in REFUSED],
)
def test_refused_with_an_error(
    client: Any,
    fds: dict[str, int],
    log: Callable[[], list[str]],
    command: Command,
    payload: Payload,
    names: tuple[str, ...],
    error: int,
) -> None:
    client.negotiate()
    before = held()
    assert client.refused(command, payload, tuple(fds[name] for name in names)) == error
    wait_until(lambda: held() == before, "descriptors are closed in a thread")
    (line,) = log()
    assert f": refused {command.name}: " in line
    # The next request finds everything as it was.
    client.map_memory()
    assert client.read(7, 0, 2) == 0x1AF4


#: name, command, payload that no dataclass makes, and the error of the reply.
RAW: list[tuple[str, int, bytes, int]] = [
    ("map too short", Command.DMA_MAP, bytes(31), errno.EINVAL),
    ("map too long", Command.DMA_MAP, bytes(33), errno.EINVAL),
    ("map with little argsz", Command.DMA_MAP, struct.pack("=IIQQQ", 8, 3, 0, 0, 1), errno.EINVAL),
    ("unmap too short", Command.DMA_UNMAP, bytes(23), errno.EINVAL),
    ("unmap too long", Command.DMA_UNMAP, struct.pack("=IIQQQ", 24, 0, 0, 1, 0), errno.EINVAL),
    ("info too short", Command.DEVICE_GET_INFO, bytes(15), errno.EINVAL),
    ("region info too short", Command.DEVICE_GET_REGION_INFO, bytes(31), errno.EINVAL),
    ("region info too long", Command.DEVICE_GET_REGION_INFO, bytes(33), errno.EINVAL),
    ("irq info too short", Command.DEVICE_GET_IRQ_INFO, words(16, 0, 0), errno.EINVAL),
    ("io fds too short", Command.DEVICE_GET_REGION_IO_FDS, words(16, 0, 4), errno.EINVAL),
    ("io fds of flags", Command.DEVICE_GET_REGION_IO_FDS, words(16, 1, 4, 0), errno.EINVAL),
    ("io fds that lie", Command.DEVICE_GET_REGION_IO_FDS, words(16, 0, 4, 1 << 31), errno.EINVAL),
    (
        "io fds that answer",
        Command.DEVICE_GET_REGION_IO_FDS,
        words(56, 0, 4, 1) + bytes(40),
        errno.EINVAL,
    ),
    (
        "io fds of another type",
        Command.DEVICE_GET_REGION_IO_FDS,
        words(56, 0, 4, 1) + struct.pack("=QQIIIIQ", 0, 0, 0, 1, 0, 0, 0),
        errno.EINVAL,
    ),
    ("irqs too short", Command.DEVICE_SET_IRQS, words(20, 33, 2, 0), errno.EINVAL),
    ("irqs with little argsz", Command.DEVICE_SET_IRQS, words(19, 33, 2, 0, 0), errno.EINVAL),
    ("booleans that lie", Command.DEVICE_SET_IRQS, words(20, 34, 2, 0, 1 << 31), errno.EINVAL),
    ("read too short", Command.REGION_READ, bytes(15), errno.EINVAL),
    ("read with data", Command.REGION_READ, bytes(17), errno.EINVAL),
    ("write too short", Command.REGION_WRITE, bytes(15), errno.EINVAL),
    ("multi too short", Command.REGION_WRITE_MULTI, bytes(7), errno.EINVAL),
    ("multi that lies", Command.REGION_WRITE_MULTI, struct.pack("=Q", 1 << 63), errno.EINVAL),
    ("multi without writes", Command.REGION_WRITE_MULTI, struct.pack("=Q", 1), errno.EINVAL),
    (
        "multi of a large write",
        Command.REGION_WRITE_MULTI,
        struct.pack("=QQIIQ", 1, 0, 4, 9, 0),
        errno.EINVAL,
    ),
    (
        "multi of which one is bad",
        Command.REGION_WRITE_MULTI,
        struct.pack("=QQIIQQIIQ", 2, 4, 7, 2, 6, 256, 7, 1, 0),
        errno.EINVAL,
    ),
    ("reset with a payload", Command.DEVICE_RESET, b"x", errno.EINVAL),
    ("version twice", Command.VERSION, bytes(4), errno.EINVAL),
    ("dirty pages", Command.DIRTY_PAGES, bytes(8), errno.EOPNOTSUPP),
    ("a feature with descriptors", Command.DEVICE_FEATURE, words(8, 1), errno.EINVAL),
    ("migration with descriptors", Command.MIG_DATA_READ, words(8, 1), errno.EINVAL),
    ("command 0", 0, b"", errno.ENOSYS),
    ("command 19", 19, b"", errno.ENOSYS),
    ("command 65535", 65535, bytes(100), errno.ENOSYS),
]


@pytest.mark.parametrize(
    ("command", "data", "error"), [case[1:] for case in RAW], ids=[case[0] for case in RAW]
)
def test_refused_as_it_is_on_the_wire(
    client: Any, fds: dict[str, int], command: int, data: bytes, error: int
) -> None:
    client.negotiate()
    before = held()
    with_fds = tuple(fds[name] for name in ("memory", "event"))
    # The descriptors make no request right, and none of them stays.
    assert client.error_of(client.send_raw(command, data, with_fds)) == error
    assert client.error_of(client.send_raw(command, data)) == error
    wait_until(lambda: held() == before, "descriptors are closed in a thread")
    # Nothing was done in part: the command register is as it was.
    assert client.read(7, 4, 2) == 0


@pytest.mark.parametrize("reply", [False, True], ids=["posted", "asked"])
def test_a_second_map_over_the_first_is_refused(client: Any, reply: bool) -> None:
    client.negotiate()
    client.map_memory()
    asked = DmaMap(3, 0, SIZE - 4096, 8192)
    if reply:
        assert client.refused(Command.DMA_MAP, asked, (client.memfd,)) == errno.EEXIST
    else:
        client.send(Command.DMA_MAP, asked, (client.memfd,), no_reply=True)
    # Of what was refused nothing is left.
    assert client.refused(Command.DMA_UNMAP, DmaUnmap(SIZE, 4096)) == errno.ENOENT


@pytest.mark.parametrize(
    ("at", "size"),
    [(0, 4096), (SIZE - 4096, 4096), (SIZE - 4096, 8192), (4096, SIZE - 8192)],
    ids=["its begin", "its end", "past its end", "inside it"],
)
def test_a_part_of_a_mapping_is_not_unmapped(client: Any, at: int, size: int) -> None:
    client.negotiate()
    client.map_memory()
    assert client.refused(Command.DMA_UNMAP, DmaUnmap(at, size)) == errno.EINVAL
    client.ask(Command.DMA_UNMAP, DmaUnmap(0, SIZE), DmaUnmap)  # all of it is there


def test_a_range_with_a_part_of_a_mapping_keeps_the_others(client: Any) -> None:
    client.negotiate()
    for at in range(0, SIZE, SIZE // 4):
        client.do(Command.DMA_MAP, DmaMap(3, at, at, SIZE // 4), (client.memfd,))
    assert client.refused(Command.DMA_UNMAP, DmaUnmap(0, SIZE - 4096)) == errno.EINVAL
    assert client.refused(Command.DMA_UNMAP, DmaUnmap(4096, SIZE)) == errno.EINVAL
    for at in range(0, SIZE, SIZE // 4):
        asked = DmaMap(3, at, at, SIZE // 4)
        assert client.refused(Command.DMA_MAP, asked, (client.memfd,)) == errno.EEXIST


def test_no_more_maps_than_were_agreed(
    client: Any, monkeypatch: pytest.MonkeyPatch, connect: Callable[[], Any], server: Any
) -> None:
    client.close()
    monkeypatch.setattr("vring_serial.transport.vfio_user.session.MAX_DMA_MAPS", 3)
    client = connect()
    client.negotiate()
    for nr in range(3):
        client.do(Command.DMA_MAP, DmaMap(3, 0, nr << 12, 4096), (client.memfd,))
    asked = DmaMap(3, 0, 1 << 20, 4096)
    assert client.refused(Command.DMA_MAP, asked, (client.memfd,)) == errno.ENOSPC


# --- what ends the connection


def json(text: bytes) -> bytes:
    return bytes(4) + text + b"\0"


ENDS = [
    ("another version", Command.VERSION, struct.pack("=HH", 1, 0), 0, "version 1.0 instead of 0.0"),
    (
        "small pages",
        Command.VERSION,
        json(b'{"capabilities":{"pgsizes":2048}}'),
        0,
        "page sizes 0x800, below 4096",
    ),
    ("no version", Command.DEVICE_RESET, b"", 0, "it came before VERSION"),
    ("a reply", Command.DMA_READ, b"", 1, "a reply that nobody asked for"),
    ("another type", Command.VERSION, b"", 2, "type 2, no command and no reply"),
]


@pytest.mark.parametrize(
    ("command", "data", "flags", "why"), [case[1:] for case in ENDS], ids=[c[0] for c in ENDS]
)
def test_ends_the_connection(
    client: Any,
    server: Any,
    fds: dict[str, int],
    log: Callable[[], list[str]],
    command: Command,
    data: bytes,
    flags: int,
    why: str,
) -> None:
    server.wait_for("connected")
    before = len(held().descriptors)
    client.send_raw(command, data, (fds["event"],) * (flags == 2), flags)
    assert client.is_sent_away()
    server.wait_for("connected", "gone")
    assert why in log()[0]
    assert log()[0].endswith("; connection closed")
    wait_until(lambda: len(held().descriptors) == before - 1, "not closed")


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b'{"capabilities":1}',
        b'{"capabilities":{"max_msg_fds":"1"}}',
        b'{"capabilities":{"max_msg_fds":true}}',
        b'{"capabilities":{"max_msg_fds":-1}}',
        b'{"capabilities":{"max_msg_fds":1e999}}',
        b'{"capabilities":{"max_data_xfer_size":18446744073709551616}}',
        b'{"capabilities":{"write_multiple":1}}',
        b'{"capabilities":{"twin_socket":true}}',
        b"[" * 4000,
        b" " * 5000,
    ],
    ids=range(14),
)
def test_a_version_that_cannot_be_read_is_refused_and_may_be_said_again(
    client: Any, text: bytes
) -> None:
    assert client.error_of(client.send_raw(Command.VERSION, json(text))) == errno.EINVAL
    assert client.negotiate().capabilities is not None


def test_a_version_without_a_terminating_nul(client: Any) -> None:
    assert client.error_of(client.send_raw(Command.VERSION, bytes(4) + b"{}")) == errno.EINVAL


@pytest.mark.parametrize("size", [0, 15, 16 + (1 << 20) + 65, 0xFFFFFFFF])
def test_a_size_that_cannot_be_ends_the_connection(client: Any, server: Any, size: int) -> None:
    client.negotiate()
    client.send_bytes(Header(1, Command.REGION_WRITE, size, 0).pack())
    assert client.is_sent_away()


@pytest.mark.parametrize("at", [1, 15])
def test_too_many_descriptors_end_the_connection(
    client: Any, server: Any, fds: dict[str, int], log: Callable[[], list[str]], at: int
) -> None:
    client.negotiate()
    before = len(held().descriptors)
    # The kernel passes no more than that at once.
    message = request(Command.DEVICE_RESET, 1)
    client.send_bytes(message[:at], (fds["event"],) * MAX_FDS)
    client.send_bytes(message[at:], (fds["event"],))
    assert client.is_sent_away()
    server.wait_for("connected", "gone")
    assert len(held().descriptors) < before
    assert f"{MAX_FDS + 1} descriptors, at most {MAX_FDS}; connection closed" in log()[0]


def test_descriptors_that_trickle_in_end_the_connection(
    client: Any, server: Any, fds: dict[str, int]
) -> None:
    """Each read brings a few, and the message has them all."""
    client.negotiate()
    before = len(held().descriptors)
    for byte in Header(1, Command.DMA_MAP, 48, 0).pack() + bytes(31):
        try:
            client.send_bytes(bytes([byte]), (fds["event"],) * 10)
        except (BrokenPipeError, ConnectionResetError):
            break
        server.settle()
    assert client.is_sent_away()
    server.wait_for("connected", "gone")
    assert len(held().descriptors) < before


def test_an_error_flag_in_a_request_means_nothing(client: Any) -> None:
    client.negotiate()
    message_id = client.send_raw(Command.DEVICE_RESET, b"", flags=HeaderFlag.ERROR)
    assert not client.answer(message_id).failed
