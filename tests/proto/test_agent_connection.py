"""The agent channel as a whole: chunks, messages over chunks over reads, recovery and bounds."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vring_serial.errors import LocalProtocolError
from vring_serial.proto.agent import (
    AgentConnection,
    AgentProtocolError,
    AnnounceCapabilities,
    BodyEnded,
    BodyReceived,
    BodyStarted,
    Capabilities,
    Capability,
    ChunkDecoder,
    ChunkEncoder,
    ChunkError,
    ChunkPort,
    ClientDisconnected,
    Clipboard,
    ClipboardGrab,
    FileXferData,
    Layout,
    MessageError,
    MessageReceived,
    Monitor,
    MonitorsConfig,
    MouseState,
    Reply,
    Side,
    UnknownMessage,
)

# The first bytes of spice-vdagentd 0.22.1 after a session agent has registered.
VDAGENTD_HELLO = bytes.fromhex(
    "010000001c000000 0100000006000000 0000000000000000 08000000 01000000 e78d0300"
)
CAPS = Capabilities.of(Capability.CLIPBOARD_SELECTION, Capability.CLIPBOARD_GRAB_SERIAL)


def header(kind, size, protocol=1, opaque=0):
    return struct.pack("<IIQI", protocol, kind, opaque, size)


def chunk(data, port=1):
    return struct.pack("<II", port, len(data)) + data


def events(connection, data=b"", found=None):
    """All events of ``data``; MessageErrors stand among them, payloads are made bytes."""
    connection.receive_data(data)
    found = [] if found is None else found
    while True:
        try:
            event = connection.next_event()
        except MessageError as error:
            found.append(error)
            continue
        if event is None:
            return found
        found.append(settle(event))


def feed_in_steps(connection, data, step):
    """As ``events``, with ``step`` bytes at a time."""
    found = []
    for position in range(0, len(data), step):
        events(connection, data[position : position + step], found)
    return found


def settle(event):
    if isinstance(event, BodyReceived):
        return BodyReceived(event.port, bytes(event.data))
    if isinstance(event, MessageReceived):
        message = event.message
        if isinstance(message, Clipboard):
            message = Clipboard(message.selection, message.type, bytes(message.data))
        elif isinstance(message, FileXferData):
            message = FileXferData(message.id, bytes(message.data))
        elif isinstance(message, UnknownMessage):
            message = UnknownMessage(message.type, bytes(message.data), message.opaque)
        return MessageReceived(event.port, message)
    return event


def join_bodies(found):
    """The same events with the pieces of each body joined."""
    joined = []
    for event in found:
        if isinstance(event, BodyReceived) and joined and isinstance(joined[-1], BodyReceived):
            joined[-1] = BodyReceived(event.port, joined[-1].data + event.data)
        else:
            joined.append(event)
    return joined


def test_the_hello_of_vdagentd():
    host = AgentConnection(Side.HOST)
    expected = AnnounceCapabilities(True, Capabilities((0x38DE7,)))
    assert events(host, VDAGENTD_HELLO) == [MessageReceived(1, expected)]
    assert host.remote == Capabilities((0x38DE7,))
    assert AgentConnection(Side.GUEST).send(expected) == VDAGENTD_HELLO


def stream_of_everything():
    """Wire bytes towards the guest with whole, split, streamed, unknown and wrong messages."""
    host = AgentConnection(Side.HOST)
    config = MonitorsConfig(tuple(Monitor(100 + i, 100) for i in range(102)))  # two chunks
    wire = [
        host.send(config),
        host.send(MouseState(1, 2, 0), ChunkPort.SERVER),
        chunk(header(2, 8) + struct.pack("<II", 10**9, 0)),
        host.send(UnknownMessage(99, b"kept as it is", 7)),
        host.send(Clipboard(0, 1, b"x" * 2100)),
        host.send(FileXferData(3, b"y" * 300)),
        host.send(Reply(2, 1)),
    ]
    return b"".join(wire), config


def test_input_split_at_every_byte():
    wire, config = stream_of_everything()
    whole = join_bodies(events(AgentConnection(Side.GUEST, stream_above=1000), wire))
    printed = [repr(event) for event in whole]
    assert whole[0] == MessageReceived(1, config)
    assert isinstance(whole[2], MessageError)
    assert whole[3] == MessageReceived(1, UnknownMessage(99, b"kept as it is", 7))
    assert whole[4] == BodyStarted(1, Clipboard(0, 1), 2100)
    assert whole[5] == BodyReceived(1, b"x" * 2100)
    assert whole[-1] == MessageReceived(1, Reply(2, 1))
    for split in range(len(wire) + 1):
        guest = AgentConnection(Side.GUEST, stream_above=1000)
        found = join_bodies(events(guest, wire[:split]) + events(guest, wire[split:]))
        assert [repr(e) for e in found] == printed, split
    guest = AgentConnection(Side.GUEST, stream_above=1000)
    single = feed_in_steps(guest, wire, 1)
    assert [repr(e) for e in join_bodies(single)] == printed


def test_ports_interleave_by_chunks():
    body = bytes(range(200))
    message = header(99, 200) + body
    wire = chunk(message[:100]) + chunk(header(3, 8) + bytes(8), port=2) + chunk(message[100:])
    assert events(AgentConnection(Side.HOST), wire) == [
        MessageReceived(2, Reply(0, 0)),
        MessageReceived(1, UnknownMessage(99, body)),
    ]


FATAL = [
    (struct.pack("<II", 3, 4), "VDIChunkHeader.port", 0),
    (struct.pack("<II", 0, 4), "VDIChunkHeader.port", 0),
    (struct.pack("<II", 1, 0xFFFFFFFF), "VDIChunkHeader.size", 4),
    (chunk(header(6, 8)[:12]), "VDIChunkHeader.size", 4),
    (chunk(b""), "VDIChunkHeader.size", 4),
    (chunk(header(6, 8, protocol=2)), "VDAgentMessage.protocol", 8),
    (chunk(header(3, 8) + bytes(9)), "VDAgentMessage.size", 24),
    (chunk(header(3, 8)) + chunk(bytes(9)), "VDIChunkHeader.size", 32),
]


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(("wire", "field", "offset"), FATAL)
@pytest.mark.parametrize("step", [1, 1000])
def test_framing_errors_are_final_until_reset(side, wire, field, offset, step):
    connection = AgentConnection(side)
    before = connection.send(Reply(2, 1)) if side is Side.HOST else b""
    stream = before + wire
    with pytest.raises(ChunkError) as caught:
        feed_in_steps(connection, stream, step)
    assert caught.value.field == field
    assert caught.value.offset == len(before) + offset
    with pytest.raises(ChunkError):
        connection.next_event()
    connection.reset()
    assert events(connection, VDAGENTD_HELLO)


def test_chunk_sizes_by_direction():
    wire = chunk(header(99, 2029) + bytes(2029))
    assert len(events(AgentConnection(Side.HOST), wire)) == 1
    with pytest.raises(ChunkError, match="2049 bytes, at most 2048"):
        events(AgentConnection(Side.GUEST), wire)
    sent = AgentConnection(Side.HOST).send(UnknownMessage(99, bytes(5000)))
    assert [struct.unpack_from("<II", sent, at) for at in (0, 2056, 4112)] == [
        (1, 2048),
        (1, 2048),
        (1, 924),
    ]
    assert len(AgentConnection(Side.GUEST).send(UnknownMessage(99, bytes(5000)))) == 5028


@pytest.mark.parametrize(("kind", "size"), [(2, 200_000), (6, 4_000_004), (3, 9), (10, 1 << 20)])
def test_impossible_sizes_cost_one_message(kind, size):
    guest, host = AgentConnection(Side.GUEST), AgentConnection(Side.HOST)
    wrong = ChunkEncoder().encode(1, b"", header(kind, size) + bytes(size))
    found = events(guest, wrong + host.send(Reply(1, 1)))
    assert isinstance(found[0], MessageError)
    assert found[0].field.endswith(".size")
    assert found[1:] == [MessageReceived(1, Reply(1, 1))]


@pytest.mark.parametrize("words", [0, 65, 1_000_000])
def test_capabilities_of_no_word_or_a_million(words):
    body = struct.pack("<I", 1) + bytes(4 * words)
    wire = ChunkEncoder(0).encode(1, b"", header(6, len(body)) + body)
    host = AgentConnection(Side.HOST)
    found = events(host, wire + AgentConnection(Side.GUEST).send(Reply(1, 1)))
    assert isinstance(found[0], MessageError)
    assert found[1:] == [MessageReceived(1, Reply(1, 1))]
    assert host.remote is None


def test_layout_follows_the_announcements():
    host, guest = AgentConnection(Side.HOST), AgentConnection(Side.GUEST)
    grab = ClipboardGrab(1, (1,), 5)
    assert host.send(grab)[28:] == bytes.fromhex("01000000")
    events(guest, host.send(AnnounceCapabilities(True, CAPS)))
    assert guest.layout == Layout()
    events(host, guest.send(AnnounceCapabilities(False, CAPS)))
    assert host.layout == guest.layout == Layout(selections=True, serials=True)
    assert events(guest, host.send(grab)) == [MessageReceived(1, grab)]


def test_streamed_bodies_travel_in_pieces():
    host, guest = AgentConnection(Side.HOST), AgentConnection(Side.GUEST, stream_above=100)
    wire = host.start_body(Clipboard(0, 1), 10_000)
    with pytest.raises(LocalProtocolError):
        host.send(Reply(1, 1))
    data = bytes(i % 251 for i in range(10_000))
    for start in range(0, 10_000, 1300):
        wire += host.send_body(data[start : start + 1300])
        wire += host.send(MouseState(1, 1, 0), ChunkPort.SERVER)
    assert host.body_left() == 0
    with pytest.raises(LocalProtocolError):
        host.send_body(b"x")
    found = events(guest, wire)
    body = [e.data for e in found if isinstance(e, BodyReceived)]
    assert b"".join(body) == data
    assert found.index(BodyEnded(1)) > 0
    assert sum(isinstance(e, MessageReceived) for e in found) == 8


def test_streamed_file_data_and_unknown_types():
    for message in (FileXferData(9), UnknownMessage(77)):
        host, guest = AgentConnection(Side.HOST), AgentConnection(Side.GUEST, stream_above=100)
        wire = host.start_body(message, 400) + host.send_body(b"z" * 400)
        for step in (1, 7, 1000):
            assert join_bodies(feed_in_steps(guest, wire, step)) == [
                BodyStarted(1, message, 400),
                BodyReceived(1, b"z" * 400),
                BodyEnded(1),
            ]


def test_streamed_lies_are_skipped():
    guest = AgentConnection(Side.GUEST, stream_above=100)
    lying = chunk(header(12, 212) + struct.pack("<IQ", 1, 201) + bytes(200))
    found = events(guest, lying + AgentConnection(Side.HOST).send(Reply(1, 1)))
    assert found[0].field == "VDAgentFileXferDataMessage.size"
    assert found[1:] == [MessageReceived(1, Reply(1, 1))]


def test_streamed_bodies_whose_head_and_lies_end_in_a_later_chunk():
    """Whole chunks that follow are taken at once, but only for a payload that somebody takes."""
    guest = AgentConnection(Side.GUEST, stream_above=100)
    start = header(12, 212) + struct.pack("<I", 1)
    wire = chunk(start) + chunk(struct.pack("<Q", 200) + bytes(100)) + chunk(bytes(100))
    assert join_bodies(events(guest, wire)) == [
        BodyStarted(1, FileXferData(1), 200),
        BodyReceived(1, bytes(200)),
        BodyEnded(1),
    ]
    lying = chunk(start + struct.pack("<Q", 201) + bytes(100)) + chunk(bytes(100))
    found = events(guest, lying + AgentConnection(Side.HOST).send(Reply(1, 1)))
    assert found[0].field == "VDAgentFileXferDataMessage.size"
    assert found[1:] == [MessageReceived(1, Reply(1, 1))]


def test_client_disconnected_ends_what_was_under_way():
    host, guest = AgentConnection(Side.HOST), AgentConnection(Side.GUEST, stream_above=100)
    wire = host.start_body(Clipboard(0, 1), 1000) + host.send_body(b"half")
    wire += host.send(ClientDisconnected(), ChunkPort.SERVER) + host.send(Reply(1, 1))
    assert events(guest, wire) == [
        BodyStarted(1, Clipboard(0, 1), 1000),
        BodyReceived(1, b"half"),
        BodyEnded(1, complete=False),
        MessageReceived(2, ClientDisconnected()),
        MessageReceived(1, Reply(1, 1)),
    ]


def test_end_in_the_middle_is_visible():
    connection = AgentConnection(Side.HOST)
    assert not connection.inside_message
    for end in range(1, len(VDAGENTD_HELLO)):
        connection.reset()
        events(connection, VDAGENTD_HELLO[:end])
        assert connection.inside_message, end
    connection.reset()
    events(connection, VDAGENTD_HELLO)
    assert not connection.inside_message


def test_a_body_too_long_for_the_protocol_is_our_mistake():
    with pytest.raises(LocalProtocolError):
        AgentConnection(Side.HOST).start_body(Clipboard(0, 1), 1 << 32)


def test_unread_input_is_bounded():
    connection = AgentConnection(Side.HOST)
    connection.receive_data(bytes(63 << 20))
    connection.receive_data(bytes(1 << 20))
    with pytest.raises(LocalProtocolError):
        connection.receive_data(b"x")


@pytest.mark.parametrize("step", [777, 65536])
@pytest.mark.parametrize("kind", [4, 12, 99, 10])
def test_memory_is_bounded_whatever_the_size(kind, step):
    size = 8 << 20
    connection = AgentConnection(Side.HOST)
    body = struct.pack("<IQ", 1, size) if kind == 12 else bytes(4)
    total = len(body) + size
    connection.receive_data(struct.pack("<II", 1, 20 + total) + header(kind, total) + body)
    read = bytes(step)
    tracemalloc.start()
    try:
        for start in range(0, size, step):
            connection.receive_data(read[: size - start])
            while True:
                try:
                    if connection.next_event() is None:
                        break
                except MessageError:
                    continue
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert not connection.inside_message


@given(st.binary(max_size=9000), st.integers(0, 30), st.integers(1, 3000))
def test_encoder_and_decoder_are_inverse(payload, head_size, most):
    encoder, decoder = ChunkEncoder(max(most, head_size)), ChunkDecoder()
    head = payload[:head_size]
    decoder.receive_data(encoder.encode(2, head, payload[head_size:]))
    taken = b""
    while (piece := decoder.next_piece()) is not None:
        port, data, _, _ = piece
        assert port == 2
        taken += data
    assert taken == payload
    assert not decoder.inside


sized_garbage = st.builds(
    lambda port, kind, body, lie: chunk(header(kind, max(0, len(body) + lie)) + body, port),
    st.integers(1, 2),
    st.integers(0, 20),
    st.binary(max_size=300),
    st.sampled_from([0, 0, 0, 0, 1, 50]),
)


@settings(max_examples=200)
@given(
    st.lists(st.one_of(sized_garbage, st.binary(max_size=20)), max_size=8).map(b"".join),
    st.lists(st.integers(1, 400), min_size=1, max_size=5),
    st.sampled_from(list(Side)),
)
def test_any_bytes_in_any_split_give_the_same_events(wire, steps, side):
    def run(cut):
        connection = AgentConnection(side, stream_above=64)
        found = []
        try:
            for part in cut:
                events(connection, part, found)
        except AgentProtocolError as error:
            found.append(str(error))
        return [repr(e) for e in join_bodies(found)]

    parts = []
    at = turn = 0
    while at < len(wire):
        step = steps[turn % len(steps)]
        parts.append(wire[at : at + step])
        at += step
        turn += 1
    assert run(parts) == run([wire])


def test_gathering_begins_between_chunks_only():
    """What is left of a chunk, or of its header, is never taken for the header of the next."""
    inner = chunk(b"inner")
    decoder, into = ChunkDecoder(), bytearray()
    decoder.receive_data(chunk(b"first" + inner)[:13])
    assert bytes(decoder.next_piece()[1]) == b"first"
    decoder.receive_data(inner)
    assert decoder.gather(1, into, 100) == 0
    assert bytes(decoder.next_piece()[1]) == inner

    decoder.receive_data(chunk(b"")[:4])
    assert decoder.next_piece() is None
    decoder.receive_data(struct.pack("<I", len(inner)) + inner)
    assert decoder.gather(1, into, 100) == 0
    assert bytes(decoder.next_piece()[1]) == inner
    decoder.receive_data(inner)
    assert decoder.gather(1, into, 100) == 5
    assert into == b"inner"
