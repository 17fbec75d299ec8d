"""Frames of consoles: every cut, and what cannot be."""

from __future__ import annotations

import pytest

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.attach import (
    DATA_MAX,
    INPUT_MAX,
    Frame,
    FrameParser,
    Hello,
    Kind,
    Lost,
    Resize,
    Welcome,
    pack_frame,
)
from vring_serial.proto.framing import FramingError

FROM_CLIENT = [
    Frame(Kind.HELLO, Hello(True, 80, 24, (1 << 63, 5)).pack()),
    Frame(Kind.INPUT, b"ls\n"),
    Frame(Kind.RESIZE, Resize(132, 43).pack()),
    Frame(Kind.INPUT, bytes(INPUT_MAX)),
]
FROM_SERVER = [
    Frame(Kind.WELCOME, Welcome(7, 8, 9).pack()),
    Frame(Kind.DATA, b"$ "),
    Frame(Kind.LOST, Lost((1 << 64) - 1).pack()),
    Frame(Kind.DATA, b""),
    Frame(Kind.BYE, "zu spät".encode()),
]


def parse(parser: FrameParser, data: bytes) -> list[Frame]:
    parser.receive_data(data)
    found = []
    while (frame := parser.next_message()) is not None:
        found.append(frame)
    return found


@pytest.mark.parametrize("from_server", [False, True])
def test_frames_come_whole_however_they_are_cut(from_server: bool) -> None:
    frames = FROM_SERVER if from_server else FROM_CLIENT
    stream = b"".join(pack_frame(frame.kind, frame.payload) for frame in frames)
    for cut in range(len(stream) + 1):
        parser = FrameParser(from_server=from_server)
        assert parse(parser, stream[:cut]) + parse(parser, stream[cut:]) == frames
    parser = FrameParser(from_server=from_server)
    assert [f for i in range(len(stream)) for f in parse(parser, stream[i : i + 1])] == frames


@pytest.mark.parametrize("hello", [Hello(), Hello(True, 1, 2), Hello(False, 0, 0, (3, 4), 2)])
def test_a_hello_says_all_of_it(hello: Hello) -> None:
    assert Hello.unpack(hello.pack()) == hello


def test_others_say_all_of_it() -> None:
    for value in (Resize(1, 65535), Welcome(1, 2, 3, 4), Lost(5)):
        assert type(value).unpack(value.pack()) == value


@pytest.mark.parametrize(
    ("header", "from_server", "cause"),
    [
        (b"\x00\0\0\0\0\0\0\0", False, "frame 0: unknown here"),
        (b"\x11\0\0\0\0\0\0\0", False, "DATA: unknown here"),
        (b"\x02\0\0\0\0\0\0\0", True, "INPUT: unknown here"),
        (b"\x02\0\1\0\0\0\0\0", False, "INPUT: its reserved bytes are not zero"),
        (b"\x02\0\0\0\1\x10\0\0", False, "INPUT: 4097 bytes, at most 4096"),
        (b"\x11\0\0\0\1\0\1\0", True, f"DATA: {DATA_MAX + 1} bytes, at most {DATA_MAX}"),
        (b"\x01\0\0\0\xff\xff\xff\xff", False, "HELLO: 4294967295 bytes"),
    ],
)
def test_what_cannot_be_is_refused_at_its_header(
    header: bytes, from_server: bool, cause: str
) -> None:
    with pytest.raises(FramingError, match=cause):
        parse(FrameParser(from_server=from_server), header)


@pytest.mark.parametrize(
    ("kind", "data", "cause"),
    [
        (Hello, b"GET / HTTP/1.1\r\nHost: vring\r\n"[:24].ljust(32), "not a client"),
        (Hello, b"", "0 bytes instead of"),
        (Welcome, bytes(36), "not a console"),
        (Resize, bytes(5), "5 bytes instead of 4"),
        (Lost, bytes(7), "7 bytes instead of 8"),
    ],
)
def test_payloads_that_cannot_be(kind: type[Hello], data: bytes, cause: str) -> None:
    with pytest.raises(RemoteProtocolError, match=cause):
        kind.unpack(data)
