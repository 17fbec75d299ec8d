"""Clients that come and go as fast as they can fill no disk."""

from __future__ import annotations

import socket
from typing import Any, cast

from vring_serial.device.console.controller import Controller
from vring_serial.device.pci import PciDevice
from vring_serial.proto.vfio_user import VfioUserError
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.shadow import ShadowRing


def test_one_limit_for_all_clients(server: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    for count in range(1, 101):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server.path))
            sock.sendall(bytes(16))
            assert sock.recv(1) == b""
        server.wait_for(*["connected", "gone"] * count)
    assert len(caplog.records) <= 70


def test_rings_that_fail_in_a_loop(caplog: Any) -> None:
    """A client maps rings that only it can access, and answers nothing, or nonsense."""
    rings = RemoteRings(Controller())
    pci = PciDevice(rings)
    rings._shadows[0] = cast(ShadowRing, None)
    for _ in range(1000):
        rings._failed(0, VfioUserError("reply to DMA_READ", "3 bytes"))
    assert len(caplog.records) == 10
    pci.close()
