from __future__ import annotations

import pytest

from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.console import (
    MAX_PORTS,
    ConsoleConfig,
    ConsoleFeature,
    ControlEvent,
    ControlMessage,
    Size,
    port_of_queue,
    queue_count,
    queues_of_port,
)
from vring_serial.proto.virtio import Feature, feature_names


def test_configuration_space_is_the_specifications_twelve_bytes():
    config = ConsoleConfig(cols=80, rows=25, max_nr_ports=31)
    wire = bytes.fromhex("5000 1900 1f000000 00000000")
    assert config.pack() == wire
    assert ConsoleConfig.unpack(wire) == config
    assert wire[ConsoleConfig.EMERG_WR :] == bytes(4)


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (ControlMessage(0xFFFFFFFF, ControlEvent.DEVICE_READY, 1), "ffffffff 0000 0100"),
        (ControlMessage(1, ControlEvent.PORT_ADD, 1), "01000000 0100 0100"),
        (ControlMessage(0, ControlEvent.CONSOLE_PORT, 1), "00000000 0400 0100"),
        (
            ControlMessage(0, ControlEvent.RESIZE, 0, Size(132, 43).pack()),
            "00000000 0500 0000 8400 2b00",
        ),
        (ControlMessage(2, ControlEvent.PORT_NAME, 1, b"org.x"), "02000000 0700 0100 6f72672e78"),
    ],
)
def test_control_messages_on_the_wire(message, wire):
    data = bytes.fromhex(wire)
    assert message.pack() == data
    assert ControlMessage.unpack(data) == message


def test_every_cut_of_a_header_is_an_error_that_counts_its_bytes():
    wire = ControlMessage(1, ControlEvent.PORT_OPEN, 1).pack()
    for cut in range(len(wire)):
        with pytest.raises(RemoteProtocolError, match=f"control message: {cut} bytes"):
            ControlMessage.unpack(wire[:cut])
    for cut in range(4):
        with pytest.raises(RemoteProtocolError, match=f"console size: {cut} bytes"):
            Size.unpack(bytes(cut))
    for cut in range(12):
        with pytest.raises(RemoteProtocolError, match=f"console configuration: {cut} bytes"):
            ConsoleConfig.unpack(bytes(cut))


def test_messages_in_words():
    assert str(ControlMessage(1, ControlEvent.PORT_OPEN, 1)) == "PORT_OPEN(id 0x1, value 1)"
    assert str(ControlMessage(1, 77, 0, b"?")) == "event 77(id 0x1, value 0 b'?')"
    bits = Feature.VERSION_1 | ConsoleFeature.SIZE | 1 << 30 | 1 << 60
    assert feature_names(bits, ConsoleFeature) == "SIZE bit 30 VERSION_1 bit 60"
    assert feature_names(0) == "none"


def test_queues_of_ports_are_those_of_the_specification():
    assert queues_of_port(0) == (0, 1)
    assert queues_of_port(1) == (4, 5)
    assert queues_of_port(2) == (6, 7)
    assert port_of_queue(2) == (None, False)
    assert port_of_queue(3) == (None, True)
    assert queue_count(1) == 4
    assert queue_count(31) == 64
    assert queue_count(1, multiport=False) == 2


def test_port_of_queue_is_the_inverse_of_queues_of_port():
    for nr in (0, 1, 2, 30, 510, MAX_PORTS - 1):
        receiveq, transmitq = queues_of_port(nr)
        assert port_of_queue(receiveq) == (nr, False)
        assert port_of_queue(transmitq) == (nr, True)
        assert transmitq < queue_count(nr + 1)
    for nr in (-1, MAX_PORTS):
        with pytest.raises(ValueError, match="port"):
            queues_of_port(nr)
    for index in (-1, 2 * MAX_PORTS + 2):
        with pytest.raises(ValueError, match="queue"):
            port_of_queue(index)
