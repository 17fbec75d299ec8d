"""The base of devices that are not consoles, and the entropy device of the examples on it."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys

import pytest

from tests.support.examples import EXAMPLES, names_of
from tests.support.waiting import wait_until
from vring import GuestMemory, Region
from vring.testing import GuestQueue
from vring_serial.device.base import VirtioDevice
from vring_serial.device.pci.device import PciDevice
from vring_serial.device.queue_device import QueueDevice, QueueDeviceState
from vring_serial.device.registers.mmio import MmioDevice
from vring_serial.device.testing import ANY_FEATURE, MmioDriver
from vring_serial.errors import ConfigError, LocalProtocolError, RemoteProtocolError, StateError
from vring_serial.proto.virtio import Status
from vring_serial.saving import StateFormat
from vring_serial.transport.inprocess.fronts import InProcessMmio, PolledHost

EXAMPLE = EXAMPLES / "custom_device.py"


@pytest.fixture
def host():
    host = PolledHost()
    yield host
    host.close()


class Driven:
    """A device behind MMIO registers, with a driver for its queue 0."""

    def __init__(self, host: PolledHost, device: VirtioDevice) -> None:
        self.queue = GuestQueue(
            bytearray(GuestQueue.bytes_needed(16, 4096)), 16, 4096, writable=True, event_idx=True
        )
        self.levels: list[bool] = []
        self.mmio_memory = GuestMemory([*self.queue.memory.regions, Region(0, bytearray(4096))])
        self.mmio = InProcessMmio(host, device, self.mmio_memory, interrupt=self.levels.append)
        self.driver = MmioDriver(self.mmio.read, self.mmio.write)

    def boot(self) -> None:
        self.driver.accept(ANY_FEATURE)
        self.driver.start_queue(0, 16, self.queue.rings)
        self.driver.status = self.driver.status | Status.DRIVER_OK


def test_the_entropy_device_fills_buffers(host):
    driven = Driven(host, names_of("custom_device.py")["Entropy"]())
    assert driven.mmio.read(8, 4) == 4
    driven.boot()
    driven.queue.offer(3)
    driven.driver.notify(0)
    assert driven.levels == [True]
    data = driven.queue.receive()
    assert len(data) == 3 * 4096
    assert len(set(data)) == 256, "random bytes have every value"
    driven.mmio.close()


def test_a_driver_that_breaks_its_ring_meets_a_device_that_needs_a_reset(host):
    driven = Driven(host, names_of("custom_device.py")["Entropy"]())
    driven.boot()
    driven.queue.driver.add([], [(0xDEAD_0000, 16)])
    driven.queue.driver.publish()
    driven.driver.notify(0)
    assert driven.driver.status & Status.DEVICE_NEEDS_RESET
    driven.driver.status = 0
    assert driven.driver.status == 0
    driven.mmio.close()


class Plain(QueueDevice):
    def serve(self, index, running):
        return False


def test_the_configuration_changes_and_the_driver_is_told(host):
    device = Plain("plain", 42, 1, config=b"abcd")
    driven = Driven(host, device)
    driven.boot()
    assert driven.driver.read_config(0, 4) == int.from_bytes(b"abcd", "little")
    device.set_config(b"abcd")
    assert driven.driver.take_events() == 0
    device.set_config(b"efgh")
    assert driven.driver.take_events() == 2
    assert driven.driver.read_config(0, 4) == int.from_bytes(b"efgh", "little")
    assert device.read_config(3, 4) == b"h\0\0\0"
    driven.driver.write_config(0, 0, 4)
    assert driven.driver.read_config(0, 1) == ord("e")
    with pytest.raises(LocalProtocolError, match="5 bytes"):
        device.set_config(b"12345")
    driven.mmio.close()


def test_a_device_too_large_for_its_registers_is_refused():
    largest = MmioDevice(Plain("plain", 42, 0xFFFF))
    largest.close()
    with pytest.raises(ConfigError, match="65536 queues, at most 65535"):
        MmioDevice(Plain("plain", 42, 0x10000))
    function = PciDevice(Plain("plain", 42, 1, config=bytes(0x1000)))
    function.close()
    with pytest.raises(ConfigError, match="configuration of 4097 bytes"):
        PciDevice(Plain("plain", 42, 1, config=bytes(0x1001)))
    with pytest.raises(ConfigError, match="no transitional device of virtio type 42"):
        PciDevice(Plain("plain", 42, 1), transitional=True)


def test_misuse_has_a_name():
    device = Plain("plain", 42, 1)
    with pytest.raises(RemoteProtocolError, match="plain"):
        device.set_driver_features(1 << 50)
    with pytest.raises(LocalProtocolError, match="queue 1"):
        device.start_queue(1, None)
    assert device.stop_queue(0) == 0


@pytest.mark.parametrize("way", ["--vhost-user", "--vfio-user"])
def test_the_example_runs_and_ends(tmp_path, way):
    path = tmp_path / "rng.sock"
    process = subprocess.Popen([sys.executable, EXAMPLE, way, path], stderr=subprocess.DEVNULL)
    try:
        wait_until(path.exists, "the example listens", unless=lambda: process.poll() is not None)
        second = subprocess.run(
            [sys.executable, EXAMPLE, way, path], stderr=subprocess.PIPE, timeout=20, check=False
        )
        assert second.returncode == 1
        assert os.fsencode(path) in second.stderr
        assert b"Traceback" not in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def test_a_device_goes_on_from_the_state_of_another():
    first = Plain("plain", 42, 1, config=b"abcd")
    first.set_driver_features(int(first.device_features))
    first.set_status(15)
    first.set_config(b"efgh")
    second = Plain("plain", 42, 1, config=b"abcd", state=copy.deepcopy(first.state))
    assert second.status == 15
    assert second.driver_features == first.driver_features
    assert second.read_config(0, 4) == b"efgh"
    assert second.config_generation == 1
    with pytest.raises(LocalProtocolError, match="4 bytes"):
        Plain("plain", 42, 1, config=b"abc", state=copy.deepcopy(first.state))


# --- snapshots


@dataclasses.dataclass(slots=True)
class CountingState(QueueDeviceState):
    """Of a device that remembers more than every device does."""

    served: int = 0

    def __post_init__(self) -> None:
        if self.served < 0:
            raise ValueError("fewer than no buffers")


class Counting(QueueDevice):
    """Writes into each buffer how many it has served."""

    state_format = StateFormat("counting device", 1, CountingState)
    state: CountingState

    def __init__(self, config: bytes = b"1234") -> None:
        super().__init__("counter", 42, num_queues=1, config=config, state=CountingState())

    def serve(self, index, running):
        chain = running.queue.pop()
        if chain is None:
            return running.queue.enable_notifications()
        self.state.served += 1
        chain.write(bytes([self.state.served]))
        if running.queue.push(chain):
            running.call()
        return True


def restored(host: PolledHost, driven: Driven, saved: bytes, device: QueueDevice) -> None:
    """Exchange the device behind the driver for one that goes on from a state."""
    driven.mmio = host.complete(
        InProcessMmio.restore(
            saved, host, device, driven.mmio_memory, interrupt=driven.levels.append
        )
    )
    driven.driver = MmioDriver(driven.mmio.read, driven.mmio.write)


def test_a_device_that_says_what_its_state_is_goes_on_elsewhere(host):
    first = Counting()
    driven = Driven(host, first)
    driven.boot()
    driven.queue.offer(2)
    driven.driver.notify(0)
    assert driven.queue.receive() == b"\1\2"
    first.set_config(b"5678")
    saved = driven.mmio.save()
    driven.mmio.close()
    restored(host, driven, saved, Counting())
    assert driven.driver.read_config(0, 4) == int.from_bytes(b"5678", "little")
    driven.queue.offer(3)
    driven.driver.notify(0)
    assert driven.queue.receive() == b"\3\4\5"
    driven.mmio.close()


def test_the_entropy_device_goes_on_elsewhere(host):
    entropy = names_of("custom_device.py")["Entropy"]
    driven = Driven(host, entropy())
    driven.boot()
    saved = driven.mmio.save()
    driven.mmio.close()
    restored(host, driven, saved, entropy())
    driven.queue.offer(3)
    driven.driver.notify(0)
    assert len(driven.queue.receive()) == 3 * 4096
    driven.mmio.close()


def test_a_state_of_another_device_is_refused_before_it_is_taken(host):
    driven = Driven(host, Counting())
    saved = driven.mmio.save()
    driven.mmio.close()
    other = Counting(b"another size")
    with pytest.raises(StateError, match="size of the configuration space is 4 in the state"):
        restored(host, driven, saved, other)
    with pytest.raises(StateError, match="virtio device type is 42 in the state, 4 here"):
        restored(host, driven, saved, names_of("custom_device.py")["Entropy"]())
    state = CountingState(served=3, driver_features=1 << 40)
    with pytest.raises(StateError, match="features 0x10000000000, which are not offered"):
        other.check_state(Counting.state_format.pack(state))
    state = CountingState()
    state.served = -1
    with pytest.raises(StateError, match="fewer than no buffers"):
        other.check_state(Counting.state_format.pack(state))
    assert other.state == CountingState()


def test_a_device_that_does_not_say_what_its_state_is_cannot_be_saved(host):
    class Silent(Counting):
        state_format = None

    driven = Driven(host, Silent())
    with pytest.raises(LocalProtocolError, match="counter does not say what its state is"):
        driven.mmio.save()
    driven.boot()
    driven.queue.offer(1)
    driven.driver.notify(0)  # it goes on
    assert driven.queue.receive() == b"\1"
    driven.mmio.close()
