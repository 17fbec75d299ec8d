"""Ports whose host ends are descriptors: the pump, both sides' opening and closing, residues."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import socket

import pytest

from tests.support.pump import pump_turn
from tests.support.waiting import turns, until
from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.chardev.file import FileChardev, FileOptions
from vring_serial.chardev.null import NullChardev
from vring_serial.device.console import events as ev
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.events import Side
from vring_serial.device.console.port import Port
from vring_serial.errors import LocalProtocolError, ResourceError
from vring_serial.proto.console import CONTROL_TRANSMITQ, ControlEvent, ControlMessage
from vring_serial.proto.virtio import Feature, Status


class PairChardev(Chardev):
    """A socket pair as the host end; the test has the other one, ``peer``."""

    def __init__(self, id: str = "pair", *, connected: bool = True) -> None:
        super().__init__(id)
        self.connected = connected
        self.peer: socket.socket | None = None
        self._ours: socket.socket | None = None
        self.stays = False
        self.gone: list[OSError | None] = []
        self.guest: list[bool] = []

    async def start(self) -> None:
        if self.connected:
            self.connect()

    def connect(self) -> socket.socket:
        self._ours, self.peer = socket.socketpair()
        self._ours.setblocking(False)
        self.peer.setblocking(False)
        self._open_end(DescriptorEnd(self._ours.fileno(), self._ours.fileno()))
        return self.peer

    def replace(self) -> socket.socket:
        """Other descriptors and another ``peer``, in silence. Returns the end that was ours."""
        old, (self._ours, self.peer) = self._ours, socket.socketpair()
        self._ours.setblocking(False)
        self.peer.setblocking(False)
        end = DescriptorEnd(self._ours.fileno(), self._ours.fileno())
        self._replace_end(end, lambda: None)
        return old

    def disconnect(self) -> socket.socket:
        """The end closes; what the peer has not read it can still read."""
        self._close_end()
        self._ours.close()
        return self.peer

    def peer_gone(self, reason: OSError | None = None) -> None:
        self.gone.append(reason)
        if not self.stays:
            self.disconnect()

    def guest_opened(self, is_open: bool) -> None:
        self.guest.append(is_open)

    async def aclose(self) -> None:
        self._close_end()
        for end in (self._ours, self.peer):
            if end is not None:
                end.close()


def received(peer: socket.socket, limit: int = 1 << 20) -> bytes:
    """What a peer can read now."""
    data = bytearray()
    while len(data) < limit:
        try:
            more = peer.recv(min(65536, limit - len(data)))
        except BlockingIOError:
            break
        if not more:
            break
        data += more
    return bytes(data)


def pattern(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.fixture
async def rig(make_controller, make_guest):
    """A booted guest with one port to a socket pair: ``await rig(console=..., open=...)``."""

    async def build(*, console=False, connected=True, is_open=True, **options):
        controller = make_controller(max_ports=3)
        chardev = PairChardev(connected=connected)
        nr = 0 if console else 1
        controller.add_port(Port(nr, "" if console else "org.test", chardev, console=console))
        await controller.start()
        guest = make_guest(controller, **options)
        guest.boot()
        await guest.ready(nr)
        if is_open and not console:
            guest.open(nr)
            await guest.until(lambda: controller.ports[nr].guest_open)
        await guest.settle(3)
        return controller, guest, chardev

    return build


async def read_all(peer: socket.socket, length: int) -> bytes:
    """As :func:`gather`, while the guest does nothing."""
    data = bytearray()
    await until(lambda: (data.extend(received(peer)), len(data) >= length)[1])
    return bytes(data)


async def gather(guest, peer: socket.socket, length: int) -> bytes:
    """Read from a peer until there are ``length`` bytes."""
    data = bytearray()

    def complete() -> bool:
        data.extend(received(peer))
        return len(data) >= length

    await guest.until(complete)
    return bytes(data)


async def write_all(guest, nr: int, data: bytes, peer: socket.socket, chunk: int = 32768) -> bytes:
    """Write as a program in the guest does, while a peer reads."""
    got = bytearray()
    for at in range(0, len(data), chunk):

        def room() -> bool:
            got.extend(received(peer))
            return guest.completed(nr) or guest.rings[2 * nr + 3].driver.num_free > 16

        await guest.until(room)
        guest.write(nr, data[at : at + chunk])
    return bytes(got) + await gather(guest, peer, len(data) - len(got))


@pytest.mark.parametrize("index", [0, 65500])
@pytest.mark.parametrize("events", [True, False])
async def test_bytes_go_both_ways(rig, index, events):
    features = DEFAULT_FEATURES if events else DEFAULT_FEATURES & ~Feature.EVENT_IDX
    _, guest, chardev = await rig(index=index, features=features, memory=16 << 20)
    data = pattern(3 << 20)
    assert await write_all(guest, 1, data, chardev.peer) == data
    chardev.peer.setblocking(False)
    sent = 0
    back = data[: 1 << 20]

    def all_there() -> bool:
        nonlocal sent
        if sent < len(back):
            with contextlib.suppress(BlockingIOError):
                sent += chardev.peer.send(back[sent : sent + 65536])
        return len(guest.read(1)) == len(back)

    await guest.until(all_there)
    assert guest.received[1] == back


async def test_nothing_is_read_from_the_host_while_the_guest_has_the_port_closed(rig):
    _, guest, chardev = await rig(is_open=False)
    chardev.peer.send(b"early")
    await guest.settle()
    assert guest.read(1) == b""
    guest.open(1)
    await guest.until(lambda: guest.read(1) == b"early")
    guest.close_port(1)
    await guest.until(lambda: chardev.guest == [True, False])
    chardev.peer.send(b"later")
    await guest.settle()
    assert guest.read(1) == b"early"
    guest.open(1)
    await guest.until(lambda: guest.read(1) == b"earlylater")


async def test_once_the_guest_has_closed_its_buffers_are_left_alone(rig):
    """Windows takes its receive buffers back as soon as PORT_OPEN(0) is completed."""
    controller, guest, chardev = await rig()
    for _ in range(20):
        guest.say(1, ControlEvent.PORT_OPEN, 1)
        await guest.until(lambda: controller.ports[1].guest_open)
        guest.say(1, ControlEvent.PORT_OPEN, 0)
        chardev.peer.send(b"x" * 1000)
        await guest.until(lambda: not guest.rings[CONTROL_TRANSMITQ].buffers)
        before = guest.rings[4].driver.used_index, guest.collect(4)
        await guest.settle(2)
        assert guest.collect(4) == [], before
        received(chardev.peer)


async def test_what_the_host_does_not_take_stays_the_guests(rig):
    _, guest, chardev = await rig(memory=32 << 20)
    data = pattern(40 * 32768)
    for at in range(0, len(data), 32768):
        if guest.rings[5].driver.num_free < 8:
            break
        guest.write(1, data[at : at + 32768])
    sent = at
    await guest.settle()
    held = len(guest.rings[5].buffers)
    assert held > 0, "the socket's buffer cannot hold all that"
    await guest.settle()
    assert len(guest.rings[5].buffers) == held
    assert await gather(guest, chardev.peer, sent) == data[:sent]
    await guest.until(lambda: guest.completed(1))


async def test_a_port_that_is_not_read_does_not_hold_up_another(make_controller, make_guest):
    controller = make_controller(max_ports=3)
    blocked, free = PairChardev("blocked"), PairChardev("free")
    controller.add_port(Port(1, "org.test.blocked", blocked))
    controller.add_port(Port(2, "org.test.free", free))
    await controller.start()
    guest = make_guest(controller, memory=32 << 20)
    guest.boot()
    for nr in (1, 2):
        await guest.ready(nr)
        guest.open(nr)
    for _ in range(7):
        guest.write(1, bytes(32768))
    data = pattern(4 << 20)
    assert await write_all(guest, 2, data, free.peer) == data
    assert guest.rings[5].buffers


async def test_what_is_written_before_the_port_was_ever_open_is_discarded(rig):
    controller, guest, chardev = await rig(is_open=False)
    guest.write(1, b"for nobody")
    await guest.until(lambda: guest.completed(1))
    guest.open(1)
    await guest.until(lambda: controller.ports[1].guest_open)
    guest.write(1, b"for somebody")
    assert await gather(guest, chardev.peer, 12) == b"for somebody"


@pytest.mark.parametrize("waits", [True, False])
async def test_control_and_data_race_and_what_was_written_while_open_arrives(rig, waits):
    """Opened, written and closed in one breath: the queues are looked at in no order."""
    controller, guest, chardev = await rig(is_open=False)
    for round in range(10):
        chardev.peer.setblocking(False)
        open_, close = (ControlMessage(1, ControlEvent.PORT_OPEN, value).pack() for value in (1, 0))
        # all of it is there before the device's loop has a turn
        guest.send(CONTROL_TRANSMITQ, open_)
        guest.write(1, b"round %d" % round)
        if waits:
            await guest.until(lambda: controller.ports[1].guest_open)
        guest.send(CONTROL_TRANSMITQ, close)
        assert await gather(guest, chardev.peer, 7) == b"round %d" % round
        await guest.until(lambda: not guest.rings[CONTROL_TRANSMITQ].buffers)


async def test_bytes_whose_kick_overtakes_the_opening_are_not_discarded(rig):
    controller, guest, chardev = await rig(is_open=False)
    opening = ControlMessage(1, ControlEvent.PORT_OPEN, 1).pack()
    address = guest.allocate(len(opening))
    guest.memory.write(address, opening)
    guest.rings[CONTROL_TRANSMITQ].driver.add([(address, len(opening))], [])
    guest.rings[CONTROL_TRANSMITQ].driver.publish()  # its kick is still on the way
    for part in (b"first ", b"second ", b"third"):
        guest.write(1, part)
    got = await read_all(chardev.peer, 18)
    assert got == b"first second third"
    assert controller.ports[1].guest_open


async def test_what_was_written_before_the_close_arrives_however_late_the_host_reads(rig):
    controller, guest, chardev = await rig(memory=32 << 20)
    data = pattern(7 * 32768)
    for at in range(0, len(data), 32768):
        guest.write(1, data[at : at + 32768])
    guest.close_port(1)
    await guest.until(lambda: not controller.ports[1].guest_open)
    await guest.settle()
    assert await gather(guest, chardev.peer, len(data)) == data


async def test_without_a_host_end_a_ports_bytes_are_kept_by_the_guest(rig):
    controller, guest, chardev = await rig(connected=False)
    guest.write(1, b"is anybody there?")
    await guest.settle()
    assert not guest.completed(1)
    assert not guest.control.ports[1].host_open
    peer = chardev.connect()
    assert await gather(guest, peer, 17) == b"is anybody there?"
    await guest.until(lambda: guest.control.ports[1].host_open)
    assert controller.ports[1].host_open


async def test_a_peer_that_leaves_is_told_to_the_guest_and_a_new_one_goes_on(rig):
    controller, guest, chardev = await rig()
    events = []
    controller.on_event = events.append
    chardev.peer.send(b"last words")
    chardev.peer.close()
    await guest.until(lambda: guest.read(1) == b"last words")
    await guest.until(lambda: not guest.control.ports[1].host_open)
    assert chardev.gone == [None]
    guest.write(1, b"hello?")
    await guest.settle()
    assert not guest.completed(1)
    peer = chardev.connect()
    assert await gather(guest, peer, 6) == b"hello?"
    await guest.until(lambda: guest.control.ports[1].host_open)
    assert events == [ev.PortClosed(Side.HOST, 1), ev.PortOpened(Side.HOST, 1)]


async def test_a_chain_taken_in_part_is_finished_with_the_next_peer(rig):
    _, guest, chardev = await rig(memory=16 << 20)
    data = pattern(2 << 20)
    guest.send(5, data, split=1 << 20)
    await guest.settle()
    first = chardev.disconnect()
    await guest.until(lambda: guest.completed(1))  # it was begun, so it is completed
    head = received(first, len(data))
    first.close()
    assert 0 < len(head) < len(data)
    peer = chardev.connect()
    assert head + await gather(guest, peer, len(data) - len(head)) == data


async def test_a_chain_taken_in_part_is_finished_while_the_vm_is_paused(rig):
    controller, guest, chardev = await rig(memory=16 << 20)
    data = pattern(2 << 20)
    guest.send(5, data, split=1 << 20)
    await guest.settle()
    guest.pause()
    assert await read_all(chardev.peer, len(data)) == data
    guest.resume()
    guest.write(1, b"and on")
    assert await gather(guest, chardev.peer, 6) == b"and on"
    assert controller.ports[1].guest_open


async def test_the_rest_of_a_chain_goes_to_the_descriptors_that_replaced_the_first(rig):
    _, guest, chardev = await rig(memory=16 << 20)
    data = pattern(2 << 20)
    guest.send(5, data, split=1 << 20)
    await guest.settle()
    guest.pause()
    got = bytearray(received(chardev.peer, 100_000))
    await turns(1)  # the rest is being written
    old, ours = chardev.peer, chardev.replace()
    got += received(old, len(data))
    got += await read_all(chardev.peer, len(data) - len(got))
    assert got == data
    old.close()
    ours.close()


async def test_an_end_that_failed_and_stays_is_written_to_no_more(rig):
    """The guest may still read what its peer sent before it left."""
    controller, guest, chardev = await rig(connected=False)
    chardev.stays = True
    chardev.connect().shutdown(socket.SHUT_RD)
    guest.write(1, b"nobody takes this")
    await guest.until(lambda: chardev.gone)
    for _ in range(3):
        guest.pause()
        guest.resume()
        await guest.settle(3)
    assert len(chardev.gone) == 1
    chardev.peer.send(b"last words")
    await guest.until(lambda: guest.read(1) == b"last words")
    assert controller.ports[1].host_open


async def test_a_peer_that_leaves_before_it_took_the_rest_of_a_chain_is_noticed(rig):
    """While the VM is paused, no queue runs whose flow would see it."""
    controller, guest, chardev = await rig(memory=16 << 20)
    guest.send(5, bytes(4 << 20), split=1 << 20)
    await guest.settle()
    guest.pause()
    chardev.peer.close()
    await until(lambda: chardev.gone)
    (reason,) = chardev.gone
    assert reason is not None
    assert reason.errno in (errno.EPIPE, errno.ECONNRESET)
    assert not controller.ports[1].host_open


@pytest.mark.parametrize("seed", range(4))
async def test_no_byte_is_lost_or_doubled_whatever_stops_and_starts(rig, seed):
    """The guest writes without end; the VM stops, the host end comes and goes, the guest closes."""
    controller, guest, chardev = await rig(memory=64 << 20, index=65000, size=16)
    rng = random.Random(seed)
    sent = bytearray()
    got = bytearray()
    for _ in range(120):
        match rng.randrange(8):
            case 0:
                guest.pause()
                await turns(1)
                guest.resume()
            case 1 if chardev.end is not None:
                # a peer that reads to the end: what the socket holds is not the device's to lose
                peer = chardev.disconnect()
                got += received(peer, 1 << 30)
                peer.close()
            case 2 if chardev.end is None:
                chardev.connect()
            case 3 if controller.ports[1].guest_open:
                guest.say(1, ControlEvent.PORT_OPEN, 0)
            case 4:
                guest.say(1, ControlEvent.PORT_OPEN, 1)
            case 5 if chardev.end is not None:
                got += received(chardev.peer, rng.randrange(1, 300_000))
            case _:
                data = rng.randbytes(rng.randrange(1, 120_000))
                guest.collect(5)
                if guest.rings[5].driver.num_free > len(data) // 32768 + 1:
                    guest.send(5, data, split=32768)
                    sent += data
        guest.step()
        if rng.randrange(2):
            pump_turn(controller.pump)
            await turns(2)
    if chardev.end is None:
        chardev.connect()
    got += await gather(guest, chardev.peer, len(sent) - len(got))
    assert got == sent
    await guest.until(lambda: guest.completed(1))


async def test_a_device_that_stops_tells_of_bytes_that_nobody_took(rig):
    controller, guest, _ = await rig(memory=8 << 20)
    events = []
    controller.on_event = events.append
    guest.send(5, bytes(4 << 20), split=65536)  # of one chain the socket takes a part
    await guest.settle()
    await controller.aclose()
    (lost,) = [event for event in events if isinstance(event, ev.OutputDropped)]
    assert lost.nr == 1
    assert 0 < lost.count < 4 << 20


async def test_a_port_whose_peer_breaks_in_a_loop_fills_no_log(rig, caplog):
    caplog.set_level(logging.INFO)
    _, guest, chardev = await rig()
    for count in range(1, 16):
        guest.write(1, b"unread")
        await guest.until(lambda: guest.completed(1))
        chardev.peer.close()  # a socket that had bytes unread resets its connection
        await guest.until(lambda count=count: len(chardev.gone) == count)
        assert chardev.gone[-1] is not None
        chardev.connect()
    lines = [record for record in caplog.records if "PairChardev" in record.getMessage()]
    assert len(lines) == 10


# --- consoles -------------------------------------------------------------------------------------


async def test_a_console_never_waits_for_its_host_end(rig):
    controller, guest, chardev = await rig(console=True, connected=False, memory=64 << 20)
    events = []
    controller.on_event = events.append
    for _ in range(50):
        guest.write(0, b"kernel: message\n")
        await guest.until(lambda: guest.completed(0))
    peer = chardev.connect()
    guest.write(0, b"login: ")
    assert await gather(guest, peer, 7) == b"login: "
    # nobody reads: more than socket and backlog hold
    for _ in range(100):
        guest.write(0, bytes(32768))
        await guest.until(lambda: guest.completed(0))
    await guest.until(lambda: any(isinstance(event, ev.OutputDropped) for event in events))


async def test_a_console_takes_input_from_the_moment_it_is_ready(rig):
    _, guest, chardev = await rig(console=True)
    chardev.peer.send(b"root\n")
    await guest.until(lambda: guest.read(0) == b"root\n")
    # also if the guest says that it closed it: hvc has no such notion
    guest.say(0, ControlEvent.PORT_OPEN, 0)
    await guest.settle(3)
    chardev.peer.send(b"ls\n")
    await guest.until(lambda: guest.read(0) == b"root\nls\n")


async def test_emergency_writes_go_to_a_consoles_descriptor(rig):
    controller, guest, chardev = await rig(console=True)
    controller.write_config(8, b"!\0\0\0")
    assert await gather(guest, chardev.peer, 1) == b"!"


# --- other chardevs -------------------------------------------------------------------------------


async def test_an_end_that_fails_for_good_holds_its_port_and_no_other(make_controller, make_guest):
    controller = make_controller(max_ports=3)
    controller.add_port(Port(1, "org.full", FileChardev("full", FileOptions(path="/dev/full"))))
    controller.add_port(Port(2, "org.null", NullChardev("null")))
    await controller.start()
    guest = make_guest(controller)
    guest.boot()
    for nr in (1, 2):
        await guest.ready(nr)
        guest.open(nr)
    guest.write(1, b"no room")
    guest.write(2, b"no matter")
    await guest.until(lambda: guest.completed(2))
    await guest.settle()
    guest.write(1, b"no room")
    await guest.settle()
    assert not guest.completed(1)


async def test_a_port_goes_while_it_is_busy(rig):
    controller, guest, chardev = await rig(memory=16 << 20)
    for _ in range(6):
        guest.write(1, bytes(32768))
    chardev.peer.send(bytes(10000))
    await controller.remove_port(1)
    await guest.until(lambda: 1 not in guest.control.ports)
    again = PairChardev("again")
    await controller.plug_port(Port(1, "org.again", again))
    await guest.until(lambda: 1 in guest.control.ports and guest.control.ports[1].host_open)


@pytest.mark.parametrize("queue", [4, 5])
async def test_a_ring_that_breaks_under_the_pump_stops_one_direction(rig, queue):
    controller, guest, chardev = await rig()
    told = []
    controller.on_needs_reset = told.append
    ring = guest.rings[queue]
    ahead = (ring.driver.avail_index + 1000) & 0xFFFF
    guest.memory.write(ring.parts[1] + 2, ahead.to_bytes(2, "little"))
    os.eventfd_write(ring.kick_fd, 1)
    chardev.peer.send(b"for the guest")
    await guest.until(lambda: told)
    assert told[0].queue == f"queue {queue}"
    assert controller.status & Status.DEVICE_NEEDS_RESET
    if queue == 4:
        guest.write(1, b"goes on")
        assert await gather(guest, chardev.peer, 7) == b"goes on"
    else:
        await guest.until(lambda: guest.read(1) == b"for the guest")
    # nor is it served again because the host end is another
    chardev.disconnect().close()
    chardev.connect()
    await guest.settle()
    assert len(told) == 1
    assert chardev.gone == []


async def test_a_full_table_of_host_ends_is_stopped_when_one_cannot_start(
    make_controller, tmp_path
):
    controller = make_controller(max_ports=4)
    first, last = PairChardev("first"), PairChardev("last")
    missing = FileChardev("missing", FileOptions(path=str(tmp_path / "no" / "file")))
    for nr, chardev in enumerate([first, missing, last], start=1):
        controller.add_port(Port(nr, f"org.test.{nr}", chardev))
    with pytest.raises(ResourceError, match="no/file"):
        await controller.start()
    assert first.end is None
    assert last.peer is None
    with pytest.raises(LocalProtocolError, match="no pump"):
        _ = controller.pump
    controller = make_controller()
    missing = FileChardev("missing", FileOptions(path=str(tmp_path / "no" / "file")))
    with pytest.raises(ResourceError, match="no/file"):
        await controller.plug_port(Port(1, "org.test", missing))
    assert dict(controller.ports) == {}
