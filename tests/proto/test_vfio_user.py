"""vfio-user on the wire: layouts, framing at every split, and what is refused."""

from __future__ import annotations

import errno
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.errors import LocalProtocolError, RemoteProtocolError
from vring_serial.proto.framing import MAX_FDS, Empty, Payload
from vring_serial.proto.vfio_user import (
    MAX_PAYLOAD,
    SHAPES,
    FramingError,
    Message,
    VfioUserError,
    VfioUserParser,
    error_reply,
    reply,
    request,
)
from vring_serial.proto.vfio_user_dma import DmaAccess, DmaMap, DmaUnmap
from vring_serial.proto.vfio_user_regions import (
    IoEventFd,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionWrite,
    WriteMulti,
    WriteMultiDone,
)
from vring_serial.proto.vfio_user_version import Capabilities, Version
from vring_serial.proto.vfio_user_wire import (
    Command,
    DeviceInfo,
    Header,
    HeaderFlag,
    IrqInfo,
    IrqSet,
    IrqSetFlag,
)

TRIGGER = IrqSetFlag.ACTION_TRIGGER

EXAMPLES: list[tuple[Payload, bytes]] = [
    (Empty(), b""),
    (Version(0, 1), struct.pack("=HH", 0, 1)),
    (
        DmaMap(3, 0x1000, 0x100000, 0x2000),
        struct.pack("=IIQQQ", 32, 3, 0x1000, 0x100000, 0x2000),
    ),
    (DmaUnmap(0x100000, 0x2000), struct.pack("=IIQQ", 24, 0, 0x100000, 0x2000)),
    (DmaUnmap(0, 0, 2), struct.pack("=IIQQ", 24, 2, 0, 0)),
    (DeviceInfo(3, 9, 5), struct.pack("=IIII", 16, 3, 9, 5)),
    (RegionInfo(4, 3, 0x4000), struct.pack("=IIIIQQ", 32, 3, 4, 0, 0x4000, 0)),
    (
        RegionIoFds(4, (IoEventFd(0x3000, 2, 0, 1, 7),), 56),
        struct.pack("=IIII", 56, 0, 4, 1) + struct.pack("=QQIIIIQ", 0x3000, 2, 0, 0, 1, 0, 7),
    ),
    (IrqInfo(2, 1, 65), struct.pack("=IIII", 16, 1, 2, 65)),
    (
        IrqSet(IrqSetFlag.DATA_EVENTFD | TRIGGER, 2, 16, 16),
        struct.pack("=IIIII", 20, 36, 2, 16, 16),
    ),
    (
        IrqSet(IrqSetFlag.DATA_BOOL | TRIGGER, 2, 0, 3, b"\1\0\1"),
        struct.pack("=IIIII", 23, 34, 2, 0, 3) + b"\1\0\1",
    ),
    (RegionRead(0x34, 7, 4), struct.pack("=QII", 0x34, 7, 4)),
    (RegionWrite(0x3000, 4, 2, b"\5\0"), struct.pack("=QII", 0x3000, 4, 2) + b"\5\0"),
    (
        WriteMulti((RegionWrite(1, 4, 2, b"ab"), RegionWrite(2, 5, 8, b"12345678"))),
        struct.pack("=QQII8sQII8s", 2, 1, 4, 2, b"ab", 2, 5, 8, b"12345678"),
    ),
    (WriteMultiDone(200), struct.pack("=Q", 200)),
    (DmaAccess(0x1000, 3, b"abc"), struct.pack("=QQ", 0x1000, 3) + b"abc"),
]


@pytest.mark.parametrize(("payload", "wire"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_layout(payload: Payload, wire: bytes) -> None:
    assert payload.pack() == wire
    assert type(payload).unpack(wire) == payload


@pytest.mark.parametrize(
    "payload", [payload for payload, _ in EXAMPLES], ids=lambda value: type(value).__name__
)
def test_any_other_length_is_refused(payload: Payload) -> None:
    wire = payload.pack()
    kind = type(payload)
    # What follows these is data, of any length, or JSON.
    if isinstance(payload, (DmaAccess, Version)):
        wire = wire[: kind.STRUCT.size]
    else:
        with pytest.raises(RemoteProtocolError, match=r"payload of|unknown|no region"):
            kind.unpack(wire + b"\0")
    for length in range(len(wire)):
        with pytest.raises(RemoteProtocolError, match="payload of"):
            kind.unpack(wire[:length])


def test_header() -> None:
    data = request(Command.DMA_MAP, 0x1234, DmaMap(3, 0, 0, 4096))
    assert data[:16] == struct.pack("=HHIII", 0x1234, 2, 48, 0, 0)
    posted = request(Command.REGION_WRITE, 1, RegionAccess(0, 4, 1, b"x"), no_reply=True)
    assert Header.unpack(posted[: Header.SIZE]).flags == HeaderFlag.NO_REPLY
    assert reply(Command.DEVICE_RESET, 9) == struct.pack("=HHIII", 9, 13, 16, 1, 0)
    failed = error_reply(Command.DMA_MAP, 9, errno.EEXIST)
    assert failed == struct.pack("=HHIII", 9, 2, 16, 0x21, errno.EEXIST)


# --- version


def test_version_as_qemu_says_it() -> None:
    wire = (
        b"\0\0\0\0"
        b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"max_dma_maps":65535,'
        b'"pgsizes":4096,"write_multiple":true,"migration":{"pgsize":4096}}}\0'
    )
    version = Version.unpack(wire)
    assert version.capabilities is not None
    assert version.capabilities.max_msg_fds == 16
    assert version.capabilities.write_multiple
    assert "migration" in version.capabilities.named


def test_defaults_of_what_is_not_said() -> None:
    found = Capabilities.from_json(b"{}\0")
    assert (found.max_msg_fds, found.max_data_xfer_size, found.max_dma_maps) == (1, 1 << 20, 65535)
    assert found.pgsizes == 4096
    assert not found.write_multiple
    assert not found.twin_socket


def test_twin_socket() -> None:
    asked = Capabilities.from_json(b'{"capabilities":{"twin_socket":{"supported":true}}}\0')
    assert asked.twin_socket
    assert asked.twin_fd_index is None
    answer = Capabilities(twin_socket=True, twin_fd_index=0, named=frozenset({"twin_socket"}))
    assert answer.to_json() == b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}\0'
    assert Capabilities.from_json(answer.to_json()) == answer


NUMBERS = ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes")


@given(st.dictionaries(st.sampled_from(NUMBERS), st.integers(0, (1 << 64) - 1)))
def test_what_is_common_is_a_subset_and_no_longer(numbers: dict[str, int]) -> None:
    ours = Capabilities(16, 1 << 20, 4096, (1 << 64) - 4096, True, False, named=frozenset(NUMBERS))
    theirs = Capabilities(**numbers, named=frozenset(numbers))
    common = ours.common(theirs)
    assert common.named == theirs.named
    assert len(common.to_json()) <= len(theirs.to_json())
    for name in ("max_msg_fds", "max_data_xfer_size", "max_dma_maps"):
        assert getattr(common, name) == min(getattr(ours, name), getattr(theirs, name))


@given(st.binary(max_size=200))
def test_any_bytes_as_version_are_decoded_or_refused(data: bytes) -> None:
    with suppress(RemoteProtocolError):
        assert isinstance(Version.unpack(data), Version)


# --- framing

STREAM = [
    (request(Command.VERSION, 1, Version(0, 0, Capabilities(named=frozenset(NUMBERS)))), ()),
    (request(Command.DMA_MAP, 2, DmaMap(3, 0, 0, 4096)), (10,)),
    (request(Command.DMA_MAP, 3, DmaMap(3, 0, 4096, 4096)), ()),
    (request(Command.DEVICE_SET_IRQS, 4, IrqSet(36, 2, 0, 3)), (11, 12, 13)),
    (reply(Command.DMA_READ, 5, DmaAccess(0, 4, b"data")), ()),
    (request(Command.DEVICE_RESET, 6), ()),
]


def messages_of(parser: VfioUserParser) -> list[Message]:
    found = []
    while (message := parser.next_message()) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize("step", [1, 2, 15, 16, 17, 1000])
def test_split_anywhere(step: int) -> None:
    """A read ends with the first piece that has descriptors; they come with its last byte."""
    parser = VfioUserParser()
    found = []
    for data, fds in STREAM:
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            # sendmsg attaches them to the first byte that it sends.
            parser.receive_data(piece, fds if at == 0 else ())
            found += messages_of(parser)
    assert [message.message_id for message in found] == [1, 2, 3, 4, 5, 6]
    assert [message.fds for message in found] == [fds for _, fds in STREAM]
    assert [message.payload for message in found] == [data[16:] for data, _ in STREAM]
    assert parser.take_fds() == ()


def test_all_at_once_between_descriptors() -> None:
    parser = VfioUserParser()
    head = b"".join(data for data, _ in STREAM[:1])
    parser.receive_data(head + STREAM[1][0][:5], (10,))
    parser.receive_data(STREAM[1][0][5:] + STREAM[2][0] + STREAM[3][0][:1], (11, 12, 13))
    parser.receive_data(STREAM[3][0][1:] + STREAM[4][0] + STREAM[5][0])
    assert [message.fds for message in messages_of(parser)] == [fds for _, fds in STREAM]


def test_descriptors_of_a_stream_that_ends_early_come_back() -> None:
    parser = VfioUserParser()
    parser.receive_data(STREAM[3][0][:20], (11, 12, 13))
    assert parser.next_message() is None
    assert parser.take_fds() == (11, 12, 13)
    assert parser.take_fds() == ()


def test_descriptors_without_a_byte() -> None:
    with pytest.raises(LocalProtocolError):
        VfioUserParser().receive_data(b"", (3,))


@pytest.mark.parametrize(
    ("header", "fds", "cause"),
    [
        (Header(1, 13, 16, 2), (), "type 2, no command and no reply"),
        (Header(1, 13, 16, 15), (), "type 15"),
        (Header(1, 13, 15, 0), (), "15 bytes, and a header alone has 16"),
        (Header(1, 13, 0, 0), (), "0 bytes"),
        (Header(1, 10, 16 + MAX_PAYLOAD + 1, 0), (), f"at most {MAX_PAYLOAD}"),
        (Header(1, 10, 0xFFFFFFFF, 0), (), f"at most {MAX_PAYLOAD}"),
        (Header(1, 8, 36, 0), tuple(range(MAX_FDS + 1)), f"{MAX_FDS + 1} descriptors"),
    ],
)
def test_a_header_that_cannot_be_believed(header: Header, fds: tuple[int, ...], cause: str) -> None:
    parser = VfioUserParser()
    parser.receive_data(header.pack(), fds)
    for _ in range(2):
        with pytest.raises(FramingError, match=cause):
            parser.next_message()
    assert parser.take_fds() == fds


def test_the_largest_message_is_taken() -> None:
    parser = VfioUserParser()
    data = request(Command.DMA_WRITE, 1, DmaAccess(0, 1 << 20, bytes(1 << 20)))
    parser.receive_data(data)
    (message,) = messages_of(parser)
    assert len(message.payload) == 16 + (1 << 20)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_messages_or_an_error(data: bytes, step: int) -> None:
    """Whole and in pieces, with the same outcome."""

    def outcome(step: int) -> tuple[list[Message], str]:
        parser = VfioUserParser()
        found: list[Message] = []
        try:
            for at in range(0, len(data), step):
                parser.receive_data(data[at : at + step])
                found += messages_of(parser)
        except FramingError as error:
            return found, str(error)
        return found, ""

    assert outcome(step)[1] == outcome(max(1, len(data)))[1]
    whole = outcome(step)[0]
    assert whole == outcome(1)[0]


@given(st.sampled_from(sorted(SHAPES)), st.binary(max_size=100), st.integers(0, 3))
def test_any_payload_is_decoded_or_refused(command: Command, data: bytes, fds: int) -> None:
    message = Message(command, 1, 0, data, tuple(range(fds)))
    refusal = None
    try:
        payload = message.decode()
    except VfioUserError as error:
        refusal = error
    if refusal is None:
        assert isinstance(payload, SHAPES[command].payload)
    else:
        assert (refusal.message, refusal.errno) == (command.name, errno.EINVAL)


def test_unknown_commands_have_names_and_errors() -> None:
    unknown = Message(99, 1, 0, b"")
    with pytest.raises(VfioUserError, match="command 99: not supported") as caught:
        unknown.decode()
    assert caught.value.errno == errno.ENOSYS
    with pytest.raises(VfioUserError, match="DIRTY_PAGES: not supported") as caught:
        Message(Command.DIRTY_PAGES, 1, 0, b"").decode()
    assert caught.value.errno == errno.EOPNOTSUPP


def test_replies() -> None:
    good = Message(Command.DMA_READ, 1, 1, DmaAccess(0, 1, b"x").pack())
    assert good.is_reply
    assert good.decode_reply(DmaAccess) == DmaAccess(0, 1, b"x")
    with pytest.raises(VfioUserError, match="DMA_READ: refused with error 14") as caught:
        Message(Command.DMA_READ, 1, 0x21, b"", (), errno.EFAULT).decode_reply(DmaAccess)
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(VfioUserError, match="reply to DMA_READ: payload of 3 bytes"):
        Message(Command.DMA_READ, 1, 1, b"abc").decode_reply(DmaAccess)
