"""A PCI function and a driver of its registers."""

from __future__ import annotations

import pytest

from vring_serial.device.testing import PciDriver


@pytest.fixture
def machine(make_controller, make_machine):
    return make_machine(make_controller(max_ports=3))


@pytest.fixture
def driver(machine) -> PciDriver:
    return machine.driver()


@pytest.fixture(scope="session")
def enable_msix():
    """A function that writes message control as a driver that wants MSI-X."""

    def enable(machine, driver, *, function_mask: bool = False) -> None:
        control = 0x8000 | 0x4000 * function_mask
        machine.pci.config_write(driver.msix_capability + 2, control, 2)

    return enable
