"""virtio-mmio: what virtio 1.3, 4.2 demands, in both versions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.controller import Controller
from vring_serial.device.registers.mmio import MmioDevice
from vring_serial.errors import ConfigError
from vring_serial.proto.virtio import Feature, Status


@pytest.fixture(params=["mmio", "mmio-legacy"])
def machine(request, make_controller, make_machine):
    return make_machine(make_controller(max_ports=3), request.param)


def select(mmio, index: int) -> None:
    mmio.write(0x30, index, 4)


def test_the_identity(machine):
    read = machine.mmio.read
    assert read(0, 4).to_bytes(4, "little") == b"virt"
    assert read(4, 4) == (2 if machine.kind == "mmio" else 1)
    assert read(8, 4) == 3
    assert machine.mmio.size == 0x200


def test_features_by_word(machine):
    driver = machine.driver()
    modern = DEFAULT_FEATURES | Feature.RING_RESET | Feature.NOTIFICATION_DATA
    legacy = DEFAULT_FEATURES & 0xFFFFFFFF | Feature.ANY_LAYOUT
    assert driver.offered() == (modern if machine.kind == "mmio" else legacy)
    for word in (2, 3, 0xFFFFFFFF):
        machine.mmio.write(0x14, word, 4)
        assert machine.mmio.read(0x10, 4) == 0
        machine.mmio.write(0x24, word, 4)
        machine.mmio.write(0x20, 0xFFFFFFFF, 4)
    accepted = driver.accept(DEFAULT_FEATURES)
    assert machine.mmio.device.driver_features == accepted & DEFAULT_FEATURES


def test_write_only_registers_read_as_zero(machine):
    machine.driver().accept(DEFAULT_FEATURES)
    select(machine.mmio, 1)
    writable = (0x14, 0x20, 0x24, 0x28, 0x30, 0x38, 0x3C, 0x50, 0x64, 0x80, 0x84, 0x90, 0x94, 0xA0)
    assert [machine.mmio.read(at, 4) for at in writable] == [0] * len(writable)


def test_the_size_of_a_queue(machine):
    mmio = machine.mmio
    for index, size_max in ((0, 256), (7, 256), (8, 0), (0xFFFFFFFF, 0)):
        select(mmio, index)
        assert mmio.read(0x34, 4) == size_max
        mmio.write(0x38, 64, 4)
        assert mmio.read(0x34, 4) == size_max, "the largest possible, not the chosen one"


async def test_registers_of_the_other_version_are_not_there(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1), "mmio")
    guest.start()
    for at in (0x28, 0x3C, 0x40):
        guest.machine.mmio.write(at, 0x1000, 4)
        assert guest.machine.mmio.read(at, 4) == 0
    select(guest.machine.mmio, 1)
    assert guest.machine.mmio.read(0x44, 4) == 1


async def test_legacy_registers_of_version_2_are_not_there(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1), "mmio-legacy")
    guest.start()
    select(guest.machine.mmio, 1)
    for at in (0x44, 0x80, 0xC0, 0xFC, 0xB0):
        guest.machine.mmio.write(at, 1, 4)
        assert guest.machine.mmio.read(at, 4) == 0


async def test_a_queue_is_stopped_and_starts_anew(make_controller, make_register_guest):
    controller = make_controller(max_ports=1)
    guest = make_register_guest(controller, "mmio")
    mmio = guest.machine.mmio
    guest.boot()
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
    select(mmio, 3)
    assert mmio.read(0x44, 4) == 1
    mmio.write(0x44, 0, 4)
    assert mmio.read(0x44, 4) == 0
    assert controller.stop_queue(3) == 0, "the device has left it"
    mmio.write(0x44, 1, 4)
    assert mmio.read(0x44, 4) == 1
    assert controller.stop_queue(3) == 0, "from its start"


async def test_a_reset_disables_all_queues(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1), "mmio")
    guest.start()
    guest.forget()
    for index in range(4):
        select(guest.machine.mmio, index)
        assert guest.machine.mmio.read(0x44, 4) == 0


async def test_queue_reset_needs_the_feature(make_controller, make_register_guest):
    for feature in (Feature(0), Feature.RING_RESET):
        controller = make_controller(max_ports=1)
        guest = make_register_guest(controller, "mmio", features=DEFAULT_FEATURES | feature)
        guest.start()
        select(guest.machine.mmio, 1)
        guest.machine.mmio.write(0xC0, 1, 4)
        assert guest.machine.mmio.read(0x44, 4) == (0 if feature else 1)
        assert guest.machine.mmio.read(0xC0, 4) == 0


async def test_a_legacy_queue_is_a_page_number(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1), "mmio-legacy")
    mmio = guest.machine.mmio
    guest.boot()
    select(mmio, 2)
    assert mmio.read(0x40, 4) == guest.rings[2].parts[0] // 4096
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)
    mmio.write(0x40, 0, 4)
    assert mmio.read(0x40, 4) == 0
    select(mmio, 3)
    mmio.write(0x70, 0, 4)
    assert mmio.read(0x40, 4) == 0, "a reset ends all queues"


@pytest.mark.parametrize("alignment", [0, 3, 4097, 0xFFFFFFFF])
async def test_an_alignment_that_cannot_be_is_ignored(
    make_controller, make_register_guest, alignment
):
    guest = make_register_guest(make_controller(max_ports=1), "mmio-legacy")
    mmio = guest.machine.mmio
    guest.features = guest.registers.accept(guest.features)
    ring = guest.make_ring(3)
    select(mmio, 3)
    mmio.write(0x38, guest.size, 4)
    mmio.write(0x3C, 4096, 4)
    mmio.write(0x3C, alignment, 4)
    mmio.write(0x40, ring.parts[0] // 4096, 4)
    guest.say(0xFFFFFFFF, 0)
    await guest.until(lambda: guest.collect(3) is not None and not guest.rings[3].buffers)


async def test_interrupts_stay_until_acknowledged(make_controller, make_register_guest):
    guest = make_register_guest(make_controller(max_ports=1), "mmio")
    mmio, levels = guest.machine.mmio, guest.machine.levels
    guest.boot()
    await guest.until(lambda: mmio.read(0x60, 4) == 1)
    assert levels == [True]
    assert mmio.interrupt_level
    guest.rings[3].driver.add([(0xDEAD_0000_0000, 8)], [])
    guest.publish(3)
    await guest.until(lambda: mmio.read(0x60, 4) == 3)
    mmio.write(0x64, 1, 4)
    assert mmio.read(0x60, 4) == 2
    assert levels == [True]
    mmio.write(0x64, 0xFFFFFFFF, 4)
    assert mmio.read(0x60, 4) == 0
    assert levels == [True, False]
    assert mmio.read(0x70, 4) & Status.DEVICE_NEEDS_RESET
    mmio.write(0x70, 0, 4)
    assert (mmio.read(0x70, 4), mmio.read(0x60, 4)) == (0, 0)


def test_shared_memory_is_none(make_controller, make_machine):
    mmio = make_machine(make_controller(), "mmio").mmio
    mmio.write(0xAC, 5, 4)
    assert [mmio.read(at, 4) for at in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFFFFFF] * 4


def test_the_configuration_is_read_in_any_width(machine):
    whole = machine.mmio.device.read_config(0, 12)
    for size in (1, 2, 3, 4, 8, 12):
        for offset in range(13 - size):
            value = machine.mmio.read(0x100 + offset, size)
            assert value.to_bytes(size, "little") == whole[offset : offset + size]
    assert machine.mmio.read(0x10C, 4) == 0
    assert machine.mmio.read(0x10A, 4) == 0


@pytest.mark.parametrize("version", [1, 2])
@given(data=st.data())
@settings(max_examples=100)
def test_any_access_has_an_answer(version, data):
    mmio = MmioDevice(Controller(max_ports=1), version=version)
    for _ in range(data.draw(st.integers(1, 20))):
        offset, size = data.draw(st.integers(0, 0x220)), data.draw(st.integers(1, 16))
        if data.draw(st.booleans()):
            assert 0 <= mmio.read(offset, size) < 1 << 8 * size
        elif not offset <= 0x70 < offset + size and not offset <= 0x50 < offset + size:
            # Status and notifications start queues, which needs a loop: the fuzz target has one.
            mmio.write(offset, data.draw(st.integers(0, 2**64)), size)
    mmio.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"version": 3}, "versions 1 and 2, not 3"),
        ({"version": 1, "packed": True}, "no packed rings"),
        ({"queue_size": 7}, "queue size 7"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, why):
    with pytest.raises(ConfigError, match=why):
        MmioDevice(Controller(), **options)
