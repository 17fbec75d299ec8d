from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.config.topology import ControllerConfig, PciAddress


def test_address_as_libvirt_writes_it() -> None:
    assert str(PciAddress(0, 0, 5, 0)) == "0000:00:05.0"
    assert str(PciAddress(1, 0xAB, 0x1F, 7)) == "0001:ab:1f.7"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:00:05.0", PciAddress(slot=5)),
        ("00:05.0", PciAddress(slot=5)),
        ("10000:FF:1f.7", PciAddress(0x10000, 0xFF, 0x1F, 7)),
    ],
)
def test_parse(text: str, address: PciAddress) -> None:
    assert PciAddress.parse(text) == address


@pytest.mark.parametrize("text", ["", "5", "00:05", "00:20.0", "00:05.8", "0:0:5.0", "00:05.0 "])
def test_not_an_address(text: str) -> None:
    with pytest.raises(ValueError):
        PciAddress.parse(text)


@given(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7))
def test_parse_reads_what_str_writes(domain: int, bus: int, slot: int, function: int) -> None:
    address = PciAddress(domain, bus, slot, function)
    assert PciAddress.parse(str(address)) == address


@pytest.mark.parametrize("part", ["domain", "bus", "slot", "function"])
def test_out_of_range(part: str) -> None:
    with pytest.raises(ValueError, match=part):
        PciAddress(**{part: 1 << 32})
    with pytest.raises(ValueError, match=part):
        PciAddress(**{part: -1})


def test_name_of_a_controller_is_that_of_qemu() -> None:
    assert ControllerConfig(2, 31, None, ()).name == "virtio-serial2"


def test_summary_of_a_controller() -> None:
    assert ControllerConfig(0, 31, None, ()).summary == "0 of 31 ports"
    assert (
        ControllerConfig(0, 4, PciAddress(slot=5), ()).summary
        == "0 of 4 ports, 0000:00:05.0 asked for"
    )
