"""One guest, one device, and every layout of registers between them."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import pytest

from tests.support.leaks import held
from tests.support.pump import pump_turn
from tests.support.waiting import turns, until
from vring import GuestMemory, Region
from vring_serial.chardev.pipe import PipeChardev, PipeOptions
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.events import EmergencyWrite
from vring_serial.device.console.port import Port
from vring_serial.device.testing import MmioDriver, PciDriver
from vring_serial.proto.console import ConsoleFeature
from vring_serial.proto.virtio import Feature, Status

KINDS = ["pci", "pci-legacy", "mmio", "mmio-legacy"]
#: For what depends on the rings as well.
WITH_PACKED = [*KINDS, "pci+packed", "mmio+packed"]


class Pipes:
    """A port's host end with a real pipe for each direction."""

    def __init__(self, directory) -> None:
        path = directory / "end"
        for way in ("in", "out"):
            os.mkfifo(f"{path}.{way}")
        self.chardev = PipeChardev("pipes", PipeOptions(path=str(path)))
        self.to_guest = os.open(f"{path}.in", os.O_RDWR | os.O_NONBLOCK)
        self.from_guest = os.open(f"{path}.out", os.O_RDWR | os.O_NONBLOCK)

    def close(self) -> None:
        os.close(self.to_guest)
        os.close(self.from_guest)

    def read(self) -> bytes:
        try:
            return os.read(self.from_guest, 1 << 16)
        except BlockingIOError:
            return b""


@pytest.fixture
def pipes(tmp_path):
    pipes = Pipes(tmp_path)
    yield pipes
    pipes.close()


@pytest.fixture
async def controller(make_controller, pipes):
    controller = make_controller(max_ports=3)
    controller.add_port(Port(1, "org.test.pipes", pipes.chardev))
    await controller.start()
    return controller


async def exchange(
    guest, pipes, seed: int, size: int = 60_000, meanwhile: Iterator[None] | None = None
) -> None:
    """Bytes both ways at once, compared at the end; ``meanwhile`` goes on between steps."""
    data = random.Random(seed).randbytes(size)
    arrived = b""
    sent = written = 0
    start = len(guest.read(1))

    def step() -> bool:
        nonlocal arrived, sent, written
        if meanwhile is not None:
            next(meanwhile, None)
        if sent < size and guest.completed(1):
            guest.write(1, data[sent : sent + 2000])
            sent += 2000
        if written < size:
            with contextlib.suppress(BlockingIOError):
                written += os.write(pipes.to_guest, data[written : written + 4096])
        arrived += pipes.read()
        return len(arrived) >= size and len(guest.read(1)) - start >= size

    await guest.until(step)
    assert arrived == data
    assert guest.read(1)[start:] == data


@pytest.mark.parametrize("kind", WITH_PACKED)
async def test_a_guest_boots_and_exchanges_bytes(controller, make_register_guest, pipes, kind):
    guest = make_register_guest(controller, kind)
    guest.boot()
    await guest.ready(1)
    assert [m.payload for m in guest.messages if m.payload] == [b"org.test.pipes"]
    guest.open(1)
    await exchange(guest, pipes, 1)
    assert controller.driver_features & Feature.VERSION_1 == (
        0 if kind.endswith("legacy") else Feature.VERSION_1
    )


@pytest.mark.parametrize("kind", WITH_PACKED)
async def test_the_driver_is_unbound_and_bound_again(controller, make_register_guest, pipes, kind):
    guest = make_register_guest(controller, kind)
    for turn in range(3):
        guest.boot()
        await guest.ready(1)
        guest.open(1)
        await exchange(guest, pipes, turn, 10_000)
        guest.forget()
        assert guest.registers.status == 0
        assert not controller.ports[1].guest_ready


@pytest.mark.parametrize("kind", WITH_PACKED)
async def test_memory_maps_change_under_traffic_without_losing_a_byte(
    controller, make_register_guest, pipes, kind
):
    guest = make_register_guest(controller, kind)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    ram, base = guest.ram, guest.memory.regions[0].guest_addr
    other = bytearray(4096)

    def change() -> Iterator[None]:
        for turn in range(60):
            regions = [Region(base, ram)]
            if turn % 2:
                regions.append(Region(0, other))
            if turn % 3 == 0:
                guest.machine.model.set_memory(None)
                yield
            if turn % 3 == 1:  # no ring is in it
                guest.machine.model.set_memory(GuestMemory([Region(0, other)]))
                yield
            guest.machine.model.set_memory(GuestMemory(regions))
            yield

    changing = change()
    await exchange(guest, pipes, 5, meanwhile=changing)
    await exchange(guest, pipes, 6, meanwhile=changing)
    for _ in changing:
        await turns(1)
    assert not guest.registers.status & Status.DEVICE_NEEDS_RESET


@pytest.mark.parametrize("kind", WITH_PACKED)
async def test_interrupts_alone_are_enough_to_know_of_used_buffers(
    controller, make_register_guest, pipes, kind
):
    guest = make_register_guest(controller, kind)
    machine = guest.machine
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await guest.settle()
    guest.registers.take_events()
    for ring in guest.rings.values():
        ring.driver.enable_notifications()
    machine.levels.clear()
    os.write(pipes.to_guest, b"hello")
    await until(lambda: machine.levels == [True])
    assert guest.registers.take_events() == 1
    assert machine.levels == [True, False]
    assert guest.registers.take_events() == 0
    assert guest.read(1) == b"hello"


@pytest.mark.parametrize("kind", ["pci", "mmio"])
async def test_a_ring_that_cannot_be_asks_for_a_reset(make_controller, make_register_guest, kind):
    guest = make_register_guest(make_controller(max_ports=1), kind)
    guest.registers.accept(guest.features)
    guest.registers.start_queue(0, 64, (0x7777_0000, 0x10, 0x20))
    assert guest.registers.status == 11, "nothing is wrong before DRIVER_OK"
    guest.registers.status = 15
    assert guest.registers.status & Status.DEVICE_NEEDS_RESET
    assert guest.machine.levels == [True]
    assert guest.registers.take_events() == 2
    guest.registers.status = 0
    assert guest.registers.status == 0


@pytest.mark.parametrize("kind", WITH_PACKED)
async def test_a_broken_ring_asks_for_a_reset_and_comes_back(
    controller, make_register_guest, pipes, kind
):
    guest = make_register_guest(controller, kind)
    guest.boot()
    await guest.ready(1)
    guest.rings[3].driver.add([(0xDEAD_0000_0000, 8)], [])
    guest.publish(3)
    await guest.until(lambda: guest.registers.status & Status.DEVICE_NEEDS_RESET)
    assert guest.registers.take_events() & 2
    guest.forget()
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await exchange(guest, pipes, 3, 10_000)


@pytest.mark.parametrize("kind", ["pci", "mmio", "pci+packed"])
async def test_one_queue_is_reset_and_the_ports_stay(controller, make_register_guest, pipes, kind):
    features = DEFAULT_FEATURES | Feature.RING_RESET
    guest = make_register_guest(controller, kind, features=features)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await exchange(guest, pipes, 1, 10_000)
    receiveq = 4
    guest.registers.reset_queue(receiveq)
    os.close(guest.rings[receiveq].kick_fd)
    os.close(guest.rings.pop(receiveq).call_fd)
    guest.write(1, b"the other queues go on")
    await guest.until(lambda: guest.completed(1))
    await guest.until(lambda: pipes.read() == b"the other queues go on")
    guest.size = 32  # another one than before
    guest.start_queue(receiveq)
    guest.give_buffers(receiveq)
    assert controller.ports[1].guest_open
    await exchange(guest, pipes, 2, 10_000)


WITH_DATA = pytest.mark.parametrize("kind", ["pci", "mmio", "pci+packed", "mmio+packed"])
TRANSMITQ = 5  # of port 1


@WITH_DATA
async def test_notifications_carry_data(controller, make_register_guest, pipes, kind):
    features = DEFAULT_FEATURES | Feature.NOTIFICATION_DATA
    guest = make_register_guest(controller, kind, features=features)
    model = guest.machine.model
    guest.boot()
    assert guest.features & Feature.NOTIFICATION_DATA
    assert model.notification_data(TRANSMITQ) is None
    await guest.ready(1)
    guest.open(1)
    await exchange(guest, pipes, 1, 20_000)
    driver = guest.rings[TRANSMITQ].driver
    guest.registers.notify(TRANSMITQ, driver.notification_data(TRANSMITQ))
    told = model.notification_data(TRANSMITQ)
    assert (told.queue, told.avail_index) == (TRANSMITQ, driver.avail_index)
    guest.forget()
    assert model.notification_data(TRANSMITQ) is None


@WITH_DATA
async def test_notification_data_is_the_drivers_word_alone(
    controller, make_register_guest, pipes, kind
):
    features = DEFAULT_FEATURES | Feature.NOTIFICATION_DATA
    guest = make_register_guest(controller, kind, features=features)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    source = random.Random(7)
    for turn in range(20):
        for index in range(4, 6):
            wrong = source.getrandbits(16) << 16
            guest.registers.notify(index, wrong | index)
            guest.registers.notify(index, wrong | 0xFFFF)  # another queue, or none
        await exchange(guest, pipes, turn, 3000)
    assert not guest.registers.status & Status.DEVICE_NEEDS_RESET
    if "pci" in kind:
        assert guest.machine.model.notification_data(TRANSMITQ).queue in (TRANSMITQ, 0xFFFF)


@pytest.mark.parametrize("kind", KINDS)
async def test_notification_data_is_not_negotiated(controller, make_register_guest, kind):
    guest = make_register_guest(controller, kind)
    guest.boot()
    assert not guest.features & Feature.NOTIFICATION_DATA
    guest.registers.notify(TRANSMITQ)
    assert guest.machine.model.notification_data(TRANSMITQ) is None


async def test_notification_data_need_not_be_offered(make_controller, make_machine):
    machine = make_machine(make_controller(), "mmio", notification_data=False)
    assert not machine.driver().offered() & Feature.NOTIFICATION_DATA


@pytest.mark.parametrize("kind", WITH_PACKED)
@pytest.mark.parametrize("by", ["driver", "machine"])
async def test_nothing_is_heard_of_a_device_after_its_reset(
    controller, make_register_guest, pipes, kind, by
):
    guest = make_register_guest(controller, kind)
    guest.boot()
    await guest.ready(1)
    guest.open(1)
    await guest.settle()
    guest.registers.take_events()
    for ring in guest.rings.values():
        ring.driver.enable_notifications()
    guest.say(0xFFFFFFFF, 0)  # is served when the loop turns, which it has not yet
    if by == "machine":  # what DEVICE_RESET of vfio-user and emulators do
        guest.machine.model.reset()
        guest.registers.take_events()
    else:
        guest.registers.status = 0
    guest.machine.levels.clear()
    ram = bytes(guest.ram)
    # Neither memory that is mapped anew nor a driver that says nothing of queues starts any.
    guest.machine.model.set_memory(None)
    guest.machine.model.set_memory(guest.memory)
    guest.registers.accept(guest.features)
    guest.registers.status |= Status.DRIVER_OK
    os.write(pipes.to_guest, b"for nobody")
    controller.ports[1].end_resized(80, 25)
    pump_turn(controller.pump)
    await turns()
    assert guest.machine.levels == []
    assert guest.registers.take_events() == 0
    assert bytes(guest.ram) == ram


class Willing:
    """A driver that accepts what it likes: ``bits``."""

    bits = 0

    def offered(self) -> int:
        return self.bits


class WillingPciDriver(Willing, PciDriver):
    pass


class WillingMmioDriver(Willing, MmioDriver):
    pass


@pytest.mark.parametrize("kind", ["pci", "mmio"])
async def test_features_are_refused_without_version_1_and_what_is_not_offered(
    make_controller, make_machine, kind
):
    machine = make_machine(make_controller(), kind)
    offered = machine.driver().offered()
    driver = machine.driver(WillingPciDriver, WillingMmioDriver)
    for bits in (ConsoleFeature.MULTIPORT, offered | Feature.NOTIF_CONFIG_DATA):
        driver.status = 0
        driver.status = 3
        driver.bits = bits
        with pytest.raises(Exception, match="does not take"):
            driver.accept(bits)
        driver.status = 15
        assert driver.status & (Status.FEATURES_OK | Status.DRIVER_OK) == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_no_descriptor_stays_open(make_controller, make_register_guest, kind):
    controller = make_controller(max_ports=2)
    await controller.start()
    before = held()
    guest = make_register_guest(controller, kind)
    guest.boot()
    await guest.settle(3)
    guest.forget()
    guest.boot()
    await guest.settle(3)
    guest.close()
    assert held() == before


@pytest.mark.parametrize("kind", KINDS)
async def test_the_configuration_and_its_generation(make_controller, make_register_guest, kind):
    port = Port(0, "", PipeChardev("unused", PipeOptions(path="/nonexistent")), console=True)
    controller = make_controller(max_ports=7)
    controller.add_port(port)
    guest = make_register_guest(controller, kind)
    registers = guest.registers
    assert registers.read_config(4, 4) == 7
    assert registers.read_config(0, 2) == 0
    guest.start()
    guest.registers.take_events()
    generations = {generation(guest)}
    for cols in range(80, 90):
        port.end_resized(cols, 25)
        assert registers.take_events() & 2
        assert registers.read_config(0, 2) == cols
        assert registers.read_config(2, 2) == 25
        assert registers.read_config(0, 4) == 25 << 16 | cols
        generations.add(generation(guest))
    if not kind.endswith("legacy"):
        assert len(generations) == 11
    await controller.remove_port(0)
    assert registers.read_config(0, 4) == 0


def generation(guest) -> int:
    """None in the legacy interface, which has no such register."""
    if guest.machine.kind == "pci":
        return guest.registers.read_common(21, 1)
    return guest.machine.mmio.read(0xFC, 4) if guest.machine.kind == "mmio" else 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_interface_takes_an_emergency_write(make_controller, make_machine, kind):
    controller = make_controller(max_ports=1)
    events = []
    controller.on_event = events.append
    driver = make_machine(controller, kind).driver()
    driver.write_config(8, ord("!"), 4)  # even before features
    assert [event.char for event in events if isinstance(event, EmergencyWrite)] == [ord("!")]


@pytest.mark.parametrize("kind", ["pci", "mmio"])
@pytest.mark.parametrize("base", [1 << 32, 5 << 32])
async def test_rings_may_be_above_4_gib(make_controller, make_machine, kind, base):
    """All 64 bits of each address count; nothing is mapped where their lower halves point to."""
    machine = make_machine(make_controller(max_ports=1), kind)
    machine.model.set_memory(GuestMemory([Region(base, bytearray(1 << 16))]))
    driver = machine.driver()
    driver.accept(DEFAULT_FEATURES)
    areas = (base, base + 0x1000, base + 0x2000)
    driver.start_queue(0, 16, areas)
    driver.status = driver.status | Status.DRIVER_OK
    assert not driver.status & Status.DEVICE_NEEDS_RESET
    for at in range(3):  # each of them is needed
        driver.status = 0
        driver.accept(DEFAULT_FEATURES)
        low = [address & 0xFFFFFFFF if at == i else address for i, address in enumerate(areas)]
        driver.start_queue(0, 16, tuple(low))
        driver.status = driver.status | Status.DRIVER_OK
        assert driver.status & Status.DEVICE_NEEDS_RESET
