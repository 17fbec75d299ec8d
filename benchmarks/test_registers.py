"""What one register access costs an emulator in process: the goal is a microsecond."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vring import GuestMemory, Region
from vring_serial.device.console.controller import Controller
from vring_serial.device.testing import ANY_FEATURE, MmioDriver, PciDriver, RegisterDriver
from vring_serial.transport.inprocess.fronts import InProcessMmio, InProcessPci, PolledHost

COMMON, ISR, DEVICE, NOTIFY = 0, 0x1000, 0x2000, 0x3000

Access = Callable[[InProcessPci, InProcessMmio], Callable[[], object]]

ACCESSES: dict[str, Access] = {
    "status": lambda pci, _: lambda: pci.bars[4].read(COMMON + 20, 1),
    "isr": lambda pci, _: lambda: pci.bars[4].read(ISR, 1),
    "queue_select": lambda pci, _: lambda: pci.bars[4].write(COMMON + 22, 1, 2),
    "queue_size": lambda pci, _: lambda: pci.bars[4].read(COMMON + 24, 2),
    "max_nr_ports": lambda pci, _: lambda: pci.bars[4].read(DEVICE + 4, 4),
    "notify": lambda pci, _: lambda: pci.bars[4].write(NOTIFY, 0, 2),
    "msix_table": lambda pci, _: lambda: pci.bars[1].read(0x10, 4),
    "config_space": lambda pci, _: lambda: pci.config.read(0x10, 4),
    "an odd access": lambda pci, _: lambda: pci.bars[4].read(COMMON + 21, 3),
    "mmio InterruptStatus": lambda _, mmio: lambda: mmio.read(0x60, 4),
    "mmio InterruptACK": lambda _, mmio: lambda: mmio.write(0x64, 1, 4),
    "mmio QueueNotify": lambda _, mmio: lambda: mmio.write(0x50, 0, 4),
}


def bind(driver: RegisterDriver) -> None:
    """Negotiation, eight queues and DRIVER_OK."""
    driver.accept(ANY_FEATURE)
    for index in range(8):
        base = 0x4000 * index
        driver.start_queue(index, 128, (base, base + 0x1000, base + 0x2000))
    driver.status = 15


def pci_driver(pci: InProcessPci) -> PciDriver:
    bars = {index: (bar.read, bar.write) for index, bar in pci.bars.items()}
    return PciDriver(pci.config.read, pci.config.write, bars.__getitem__)


@pytest.fixture
def fronts():
    host = PolledHost(synchronous=False)
    devices = [Controller(max_ports=3), Controller(max_ports=3)]
    for device in devices:
        host.complete(device.start())
    memory = GuestMemory([Region(0, bytearray(1 << 20))])
    pci = InProcessPci(host, devices[0], memory, msi=lambda *_: None, intx=lambda _: None)
    mmio = InProcessMmio(host, devices[1], memory, interrupt=lambda _: None)
    bind(pci_driver(pci))
    bind(MmioDriver(mmio.read, mmio.write))
    yield host, pci, mmio
    pci.close()
    mmio.close()
    for device in devices:
        host.complete(device.aclose())
    host.close()


@pytest.mark.parametrize("name", ACCESSES)
def test_access(benchmark, fronts, name):
    _, pci, mmio = fronts
    # Many in a row: looking at the clock takes as long as an access.
    benchmark.pedantic(ACCESSES[name](pci, mmio), rounds=100, iterations=1000, warmup_rounds=1)


def test_poll_with_nothing_to_do(benchmark, fronts):
    benchmark(fronts[0].poll)


def test_a_driver_is_bound_and_unbound(benchmark, fronts):
    driver = pci_driver(fronts[1])

    def once() -> None:
        bind(driver)
        driver.status = 0

    benchmark(once)
