"""vhost-user on the wire: layouts, framing at every split, and what is refused."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.errors import LocalProtocolError
from vring_serial.proto.vhost_user import (
    BACKEND_SHAPES,
    MAX_PAYLOAD,
    SHAPES,
    U64,
    BackendRequest,
    ConfigAccess,
    Empty,
    FramingError,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    SingleRegion,
    VhostUserError,
    VhostUserParser,
    VringAddress,
    VringDescriptor,
    VringState,
    reply,
    request,
)

REGION = MemoryRegion(0x1000, 0x2000, 0x7F0000001000, 0x3000)

EXAMPLES = [
    (Empty(), b""),
    (U64(0x0123456789ABCDEF), struct.pack("=Q", 0x0123456789ABCDEF)),
    (VringState(3, 256), struct.pack("=II", 3, 256)),
    (VringAddress(1, 0, 0x10, 0x20, 0x30, 0x40), struct.pack("=IIQQQQ", 1, 0, 16, 32, 48, 64)),
    (LogArea(5, 6), struct.pack("=QQ", 5, 6)),
    (VringDescriptor(5), struct.pack("=Q", 5)),
    (VringDescriptor(5, no_fd=True), struct.pack("=Q", 0x105)),
    (
        MemoryTable((REGION,)),
        struct.pack("=IIQQQQ", 1, 0, 0x1000, 0x2000, 0x7F0000001000, 0x3000),
    ),
    (MemoryTable(()), struct.pack("=II", 0, 0)),
    (
        SingleRegion(REGION),
        struct.pack("=QQQQQ", 0, 0x1000, 0x2000, 0x7F0000001000, 0x3000),
    ),
    (ConfigAccess(4, b"abc", 1), struct.pack("=III", 4, 3, 1) + b"abc"),
]


@pytest.mark.parametrize(("payload", "wire"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_payloads_are_laid_out_as_specified(payload: Payload, wire: bytes) -> None:
    assert payload.pack() == wire
    assert type(payload).unpack(wire) == payload


def test_requests_and_replies_as_they_are_seen_from_user_mode_linux() -> None:
    # SET_PROTOCOL_FEATURES carries NEED_REPLY; the reply's flags are exactly 5, its size exactly 8.
    features = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
    assert request(Request.SET_PROTOCOL_FEATURES, U64(features), need_reply=True).hex() == (
        "1000000009000000080000000902000000000000"
    )
    assert reply(Request.SET_PROTOCOL_FEATURES, U64(0)).hex() == (
        "1000000005000000080000000000000000000000"
    )
    assert request(Request.GET_FEATURES).hex() == "010000000100000000000000"
    assert request(BackendRequest.VRING_CALL, VringState(3), need_reply=True).hex() == (
        "0400000009000000080000000300000000000000"
    )
    config = ConfigAccess(0, bytes(8))
    assert request(Request.GET_CONFIG, config).hex() == (
        "180000000100000014000000" + "000000000800000000000000" + "00" * 8
    )


def test_the_numbers_of_both_directions_overlap_and_are_kept_apart() -> None:
    assert Message(Request.SET_MEM_TABLE, 1, b"").shape is SHAPES[Request.SET_MEM_TABLE]
    assert (
        Message(BackendRequest.VRING_ERR, 1, b"").shape is BACKEND_SHAPES[BackendRequest.VRING_ERR]
    )


STREAM = [
    (request(Request.GET_FEATURES), ()),
    (request(Request.SET_MEM_TABLE, MemoryTable((REGION, REGION)), need_reply=True), (7, 8)),
    (request(Request.SET_VRING_CALL, VringDescriptor(1)), (9,)),
    (request(Request.SET_VRING_NUM, VringState(0, 128)), ()),
]


def parse_all(chunks: list[tuple[bytes, tuple[int, ...]]]) -> list[Message]:
    parser = VhostUserParser()
    found = []
    for data, fds in chunks:
        parser.receive_data(data, fds)
        while (message := parser.next_message()) is not None:
            found.append(message)
    assert parser.take_fds() == ()
    return found


def check_stream(messages: list[Message]) -> None:
    assert [message.kind for message in messages] == [1, 5, 13, 8]
    assert [message.fds for message in messages] == [fds for _, fds in STREAM]
    assert messages[1].decode() == MemoryTable((REGION, REGION))
    assert messages[1].need_reply
    assert not messages[2].need_reply
    assert messages[3].decode() == VringState(0, 128)


def test_a_stream_cut_at_every_byte() -> None:
    whole = b"".join(data for data, _ in STREAM)
    for cut in range(1, len(whole)):
        chunks: list[tuple[bytes, tuple[int, ...]]] = []
        position = 0
        # Reads end where the kernel ends them: at the end of a piece with descriptors, here cut.
        for data, fds in STREAM:
            at = cut - position
            if 0 < at < len(data):
                chunks += [(data[:at], fds), (data[at:], ())]
            else:
                chunks.append((data, fds))
            position += len(data)
        check_stream(parse_all(chunks))


def test_a_stream_byte_by_byte_and_with_exact_reads() -> None:
    check_stream(
        parse_all([(data[i : i + 1], fds if i == 0 else ()) for data, fds in STREAM
                   for i in range(len(data))])
    )  # fmt: skip
    parser = VhostUserParser()
    found = []
    for data, fds in STREAM:
        rest, beside = data, fds
        while rest:
            step = parser.wanted
            assert 0 < step <= len(rest)
            parser.receive_data(rest[:step], beside)
            rest, beside = rest[step:], ()
            if (message := parser.next_message()) is not None:
                found.append(message)
    check_stream(found)


def test_reads_that_glue_messages_end_with_the_one_that_has_descriptors() -> None:
    check_stream(
        parse_all([
            (STREAM[0][0] + STREAM[1][0], (7, 8)),
            (STREAM[2][0], (9,)),
            (STREAM[3][0], ()),
        ])
    )  # fmt: skip


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (struct.pack("=III", 1, 0, 0), "GET_FEATURES: version 0 instead of 1"),
        (struct.pack("=III", 1, 2, 0), "version 2"),
        (struct.pack("=III", 1, 5, 0), "a reply nobody asked for"),
        (struct.pack("=III", 5, 1, MAX_PAYLOAD + 1), "SET_MEM_TABLE: payload of 4097 bytes"),
        (struct.pack("=III", 77, 1, 0xFFFFFFFF), "message 77: payload of 4294967295 bytes"),
    ],
)
def test_headers_that_cannot_be_believed(header: bytes, why: str) -> None:
    parser = VhostUserParser()
    parser.receive_data(header[:11])
    assert parser.next_message() is None
    parser.receive_data(header[11:])
    with pytest.raises(FramingError, match=why):
        parser.next_message()
    with pytest.raises(FramingError, match=why):
        parser.next_message()


def test_a_request_where_a_reply_belongs() -> None:
    parser = VhostUserParser(replies=True)
    parser.receive_data(request(Request.GET_FEATURES))
    with pytest.raises(FramingError, match="a request"):
        parser.next_message()


def test_too_many_descriptors_are_held_until_they_are_taken_back() -> None:
    parser = VhostUserParser()
    data = request(Request.SET_MEM_TABLE, MemoryTable((REGION,)))
    parser.receive_data(data[:12], range(253))
    assert parser.next_message() is None
    parser.receive_data(data[12:13], (253,))
    with pytest.raises(FramingError, match="254 descriptors, at most 253"):
        parser.next_message()
    assert parser.take_fds() == tuple(range(254))
    assert parser.take_fds() == ()


def test_descriptors_need_a_byte_to_belong_to() -> None:
    with pytest.raises(LocalProtocolError):
        VhostUserParser().receive_data(b"", (3,))


def message(kind: Request | int, payload: bytes, fds: tuple[int, ...] = ()) -> Message:
    return Message(kind, 1, payload, fds)


TABLE_OF_ONE = MemoryTable((REGION,)).pack()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (message(Request.GET_FEATURES, b"x"), "payload of 1 bytes instead of none"),
        (message(Request.GET_FEATURES, b"", (3,)), "1 descriptors instead of 0"),
        (message(Request.SET_FEATURES, b""), "SET_FEATURES: payload of 0 bytes instead of 8"),
        (message(Request.SET_VRING_NUM, bytes(9)), "payload of 9 bytes instead of 8"),
        (message(Request.SET_VRING_ADDR, bytes(39)), "payload of 39 bytes instead of 40"),
        (message(Request.SET_VRING_KICK, bytes(8)), "0 descriptors instead of 1"),
        (message(Request.SET_VRING_KICK, bytes(8), (1, 2)), "2 descriptors instead of 1"),
        (message(Request.SET_VRING_KICK, struct.pack("=Q", 0x100), (1,)), "instead of 0"),
        (message(Request.SET_VRING_KICK, struct.pack("=Q", 0x200), (1,)), "unknown bits in 0x200"),
        (message(Request.SET_BACKEND_REQ_FD, b""), "0 descriptors instead of 1"),
        (message(Request.SET_MEM_TABLE, bytes(7)), "at least 8"),
        (message(Request.SET_MEM_TABLE, struct.pack("=II", 9, 0)), "9 regions, at most 8"),
        (message(Request.SET_MEM_TABLE, TABLE_OF_ONE[:-1], (1,)), "39 bytes instead of 40"),
        (message(Request.SET_MEM_TABLE, TABLE_OF_ONE + bytes(8 * 32), (1,)), "296 bytes instead"),
        (message(Request.SET_MEM_TABLE, TABLE_OF_ONE), "0 descriptors instead of 1"),
        (message(Request.SET_MEM_TABLE, TABLE_OF_ONE, (1, 2)), "2 descriptors instead of 1"),
        (message(Request.ADD_MEM_REG, bytes(39), (1,)), "39 bytes instead of 40"),
        (message(Request.ADD_MEM_REG, bytes(40)), "0 descriptors"),
        (message(Request.GET_CONFIG, bytes(11)), "at least 12"),
        (message(Request.GET_CONFIG, struct.pack("=III", 0, 257, 0)), "257 bytes, at most 256"),
        (message(Request.GET_CONFIG, struct.pack("=III", 0, 8, 0)), "12 bytes instead of 20"),
        (
            message(Request.SET_CONFIG, struct.pack("=III", 0xFFFFFFFF, 2, 0) + b"ab"),
            "wraps around",
        ),
        (message(Request.SET_LOG_BASE, bytes(15), (1,)), "15 bytes instead of 16"),
        (message(99, b""), "message 99: not supported"),
    ],
)
def test_malformed_requests_name_message_and_cause(bad: Message, why: str) -> None:
    with pytest.raises(VhostUserError, match=why) as caught:
        bad.decode()
    assert caught.value.message == bad.name


def test_a_table_may_have_room_for_more_regions_than_it_has() -> None:
    # User-Mode Linux always sends room for two.
    padded = message(Request.SET_MEM_TABLE, TABLE_OF_ONE + bytes(32), (4,))
    assert padded.decode() == MemoryTable((REGION,))


def test_a_region_to_remove_may_come_with_a_descriptor() -> None:
    for fds in ((), (3,)):
        got = message(Request.REM_MEM_REG, SingleRegion(REGION).pack(), fds).decode()
        assert got == SingleRegion(REGION)


def test_replies_are_unpacked_as_what_was_asked() -> None:
    parser = VhostUserParser(replies=True)
    parser.receive_data(reply(Request.GET_VRING_BASE, VringState(2, 77)))
    parser.receive_data(reply(Request.GET_VRING_BASE, VringState(2, 77)), (3,))
    answer = parser.next_message()
    assert answer is not None
    assert answer.decode_reply(VringState) == VringState(2, 77)
    with pytest.raises(VhostUserError, match="reply to GET_VRING_BASE: payload of 8 bytes"):
        answer.decode_reply(ConfigAccess)
    with_fd = parser.next_message()
    assert with_fd is not None
    with pytest.raises(VhostUserError, match="1 descriptors"):
        with_fd.decode_reply(VringState)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_any_bytes_give_messages_or_a_protocol_error_and_no_descriptor_is_lost(
    data: bytes, cuts: list[int]
) -> None:
    parser = VhostUserParser()
    given_fds = iter(range(1000))
    sent: list[int] = []
    got: list[int] = []
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    try:
        for start, end in itertools.pairwise(edges):
            fds = (next(given_fds),)
            sent += fds
            parser.receive_data(data[start:end], fds)
            while (found := parser.next_message()) is not None:
                got += found.fds
                try:
                    found.decode()
                except VhostUserError:
                    continue
    except FramingError:
        pass
    assert got + list(parser.take_fds()) == sent
