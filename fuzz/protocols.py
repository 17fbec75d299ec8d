"""Bytes and text from outside, into everything of vring_serial that parses them.

The first byte of an input chooses the parser. What holds for each stands in its function's first
lines, in one sentence.

    python fuzz/protocols.py --seconds 60

tests/proto/test_fuzz_protocols.py plays the same with Hypothesis.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from lxml import etree

from vring_serial.config import domain_xml, qemu_options
from vring_serial.errors import ConfigError, RemoteProtocolError
from vring_serial.proto import vfio_user, vhost_user
from vring_serial.proto.agent import AgentConnection, AgentProtocolError, ChunkError
from vring_serial.proto.agent.connection import (
    BodyReceived,
    MessageReceived,
    Side,
)
from vring_serial.proto.control import ControlDevice, ControlDriver, events
from vring_serial.proto.control.outbox import Outbox

PORTS = 4
_RECORD = struct.Struct("<BBH")


def records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Two small numbers and up to 255 bytes, one after the other."""
    at = 0
    while at + _RECORD.size <= len(data):
        one, two, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        body = data[at : at + length % 256]
        at += len(body)
        yield one, two, body


def pieces(data: bytes, size: int) -> Iterable[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


# --- the SPICE agent


def agent_events(side: Side, parts: Iterable[bytes]) -> dict[int, list[Any]]:
    """What a connection says of each port, streamed bodies put together again; errors at 0.

    Ports interleave as their pieces arrive.
    """
    connection = AgentConnection(side, stream_above=64)
    said: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for part in parts:
        connection.receive_data(part)
        while True:
            try:
                event: Any = connection.next_event()
            except AgentProtocolError as error:
                said[0].append(str(error))
                if isinstance(error, ChunkError):
                    return said
                continue
            if event is None:
                break
            of_port = said[event.port]
            if isinstance(event, MessageReceived):
                of_port.append(_plain(event))
            elif not isinstance(event, BodyReceived):
                of_port.append(repr(event))
            elif isinstance(of_port[-1], bytes):
                of_port[-1] += bytes(event.data)
            else:
                of_port.append(bytes(event.data))
    return said


def _plain(event: MessageReceived) -> object:
    """A message without the views in it, which are of input that will be gone."""
    return event.port, type(event.message), event.message.pack()


def agent(data: bytes) -> None:
    """Whatever comes becomes events or AgentProtocolErrors, the same however the bytes are cut, and
    every message that is understood can be packed."""
    side = Side.GUEST if data[:1] > b"\x7f" else Side.HOST
    stream = data[1:]
    if data[:1] < b"\xc0":  # framed as it should be, but for what is inside
        framed = bytearray()
        for kind, port, body in records(stream):
            head = struct.pack("<IIQI", 1, kind % 20, 0, len(body) + (port >> 6))
            framed += struct.pack("<II", 1 + port % 2, len(head) + len(body)) + head + body
        stream = bytes(framed)
    whole = agent_events(side, [stream])
    assert agent_events(side, pieces(stream, 1)) == whole
    assert agent_events(side, pieces(stream, 7)) == whole


# --- control queues


def control(data: bytes) -> None:
    """A message of either side has an answer and raises nothing, ports stay within their number,
    and what waits to be sent stays bounded."""
    device, driver = ControlDevice(PORTS), ControlDriver(PORTS)
    for nr in range(0, PORTS, 2):
        device.add_port(nr, b"port %d" % nr, console=nr == 0)
    for event, nr, body in records(data):
        message = struct.pack("<IHH", nr % 8 if nr < 250 else 2**32 - 1, event % 10, len(body) & 1)
        if event & 0x80:
            message = body
        for side in (device, driver):
            for answer in side.receive_message(message + body):
                if isinstance(answer, events.PortAdded):
                    driver.port_ready(answer.nr, not nr & 16)
            assert len(side.outbox) <= Outbox.MAX_PER_ID * (PORTS + 1)
            while event & 0x40 and side.outbox.peek() is not None:
                side.outbox.sent()
        assert set(driver.ports) <= set(range(PORTS))
        assert device.ports == set(range(0, PORTS, 2))


# --- vhost-user and vfio-user


def messages(parser: Any, parts: Iterable[bytes], fds: Iterator[int]) -> tuple[list[object], int]:
    """What a parser hands out, and how many descriptors came out of it in the end."""
    said: list[object] = []
    given = 0
    for part in parts:
        parser.receive_data(part, (next(fds),))
        with suppress(RemoteProtocolError):
            while (message := parser.next_message()) is not None:
                given += len(message.fds)
                said.append((message.name, message.flags, message.payload))
                _decode(message)
    return said, given + len(parser.take_fds())


def _decode(message: Any) -> None:
    """A payload that is understood says the same again when it is packed."""
    with suppress(RemoteProtocolError):
        payload = message.decode()
        assert type(payload).unpack(payload.pack()) == payload, payload


def socket_messages(parser: Callable[[], Any], stream: bytes) -> None:
    whole, held = messages(parser(), [stream] if stream else [], iter(range(9)))
    assert held == bool(stream)
    cut, held = messages(parser(), pieces(stream, 64), iter(range(len(stream))))
    assert held == (len(stream) + 63) // 64, "a descriptor is lost"
    assert cut == whole


def vhost(data: bytes) -> None:
    """Messages are the same however the stream is cut, decode or raise VhostUserError, and every
    descriptor comes out once."""
    kinds = vhost_user.BackendRequest if data[:1] > b"\x7f" else vhost_user.Request
    stream = data[1:]
    if data[:1] < b"\xf0":
        stream = b"".join(
            struct.pack("<III", kind % 48, 1 | flags & 8, len(body)) + body
            for kind, flags, body in records(stream)
        )
    socket_messages(lambda: vhost_user.VhostUserParser(kinds), stream)


def vfio(data: bytes) -> None:
    """Messages are the same however the stream is cut, decode or raise VfioUserError, and every
    descriptor comes out once."""
    stream = data[1:]
    if data[:1] < b"\xf0":
        stream = b"".join(
            struct.pack("<HHIII", nr, kind % 20, 16 + len(body), nr & 0x31, 0) + body
            for kind, nr, body in records(stream)
        )
    socket_messages(vfio_user.VfioUserParser, stream)


# --- what a user writes


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TAGS = _words(
    """
    devices channel console controller source target address graphics name os type log
    protocol reconnect clipboard filetransfer mouse alias listen domain interface video rng
    sound disk driver seclabel hostdev memballoon
    """
)
ATTRIBUTES = _words(
    """
    type mode path name port index model ports vectors bus slot domain function controller
    host service state append tls enabled timeout passwd autoport tlsPort listen socket
    address arch machine bus dev packed iommu defaultMode passwdValidTo
    """
)
VALUES = _words(
    """
    virtio virtio-serial unix tcp pty file pipe null stdio spicevmc spiceport bind connect
    client server raw telnet yes no on off pci virtio-mmio 0 1 2 31 511 0x8000 -1
    99999999999999999999 com.redhat.spice.0 org.qemu.guest_agent.0 q35 serial spice /x none
    any virtio-transitional pcie-root-port pcie-to-pci-bridge pci-bridge usb scsi sata ich9
    ich9-ehci1 qemu-xhci pseries virt aarch64 ccw drive sdz network secure insecure
    2030-01-01T00:00:00 i440fx
    """
)
MACHINES = _words("pc q35 virt pseries versatilepb isapc")
OPTIONS = _words(
    """
    socket, file, pty, pipe, null, stdio, ringbuf, spicevmc, spiceport, id= path= host=
    port= server=on wait=off reconnect=1 size=4096 chardev= name= nr= controller= mux=on
    logfile= append=on telnet=on fd=1 abstract=on delay= input-path= a b c0 0 1 31 0x10 , ,,
    = on off
    """
)


def domain(data: bytes) -> None:
    """A domain becomes a topology or a ConfigError that begins with the name of its file."""
    text = data[1:]
    if data[:1] < b"\xc0":
        text = etree.tostring(_tree(text))
    try:
        domain_xml.parse(text, file="d.xml", channel_directory="/run/x")
    except ConfigError as error:
        said = str(error)
    else:
        return
    assert said.startswith("d.xml"), said


def _tree(data: bytes) -> Any:
    """A domain whose elements and attributes libvirt knows, in any order."""
    root = etree.Element("domain")
    if data:
        machine = MACHINES[data[0] % len(MACHINES)]
        etree.SubElement(etree.SubElement(root, "os"), "type", machine=machine)
    here = etree.SubElement(root, "devices")
    for what, which, value in zip(*[iter(data)] * 3, strict=False):
        if what % 4 == 0:
            here = etree.SubElement(here, TAGS[which % len(TAGS)])
        elif what % 4 == 1:
            parent = here.getparent()
            here = here if parent is None else parent
        elif what % 8 == 2:
            here.text = VALUES[value % len(VALUES)]
        else:
            here.set(ATTRIBUTES[which % len(ATTRIBUTES)], VALUES[value % len(VALUES)])
    return root


def options(data: bytes) -> None:
    """Options become a topology or a ConfigError that says something of them."""
    text = "".join(OPTIONS[b - 128] if b - 128 in range(len(OPTIONS)) else chr(b) for b in data[1:])
    lists: tuple[list[str], ...] = ([], [], [])
    for line in text.split("\n"):
        lists[len(line) % 3 if data[0] & 1 else line.find("=") % 3].append(line)
    chardevs, ports, consoles = lists
    spice = chardevs.pop() if data[0] & 2 and chardevs else None
    try:
        qemu_options.parse(chardevs, ports, consoles, data[0] if data[0] & 4 else None, spice)
    except ConfigError as error:
        said = error.why
    else:
        return
    assert said


TARGETS = (agent, control, vhost, vfio, domain, options)


def one_input(data: bytes) -> None:
    """Play one input."""
    if len(data) > 1:
        TARGETS[data[0] % len(TARGETS)](data[1:])


if __name__ == "__main__":
    from runner import run

    sys.exit(run(one_input, "protocols"))
