"""A device behind a vhost-user backend, and frontends of it."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.support.echo_device import EchoDevice, PumpedDevice
from tests.support.scripted_frontend import (
    ScriptedFrontend,
    connect_to,
)
from vring_serial.transport.vhost_user.backend import VhostUserBackend


@pytest.fixture
def device() -> EchoDevice:
    return EchoDevice()


@pytest.fixture
def pumped() -> Iterator[PumpedDevice]:
    device = PumpedDevice()
    yield device
    device.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vhost.sock"


@pytest.fixture
def backend_options() -> dict[str, bool]:
    """Further arguments of the backend, for modules and classes to override."""
    return {}


@pytest.fixture
async def backend(
    device: EchoDevice, path: Path, backend_options: dict[str, bool]
) -> AsyncIterator[VhostUserBackend]:
    served = VhostUserBackend(device, str(path), **backend_options)
    await served.start()
    yield served
    await served.aclose()


@pytest.fixture
async def connect(path: Path) -> AsyncIterator[Callable[[], ScriptedFrontend]]:
    """Makes frontends, which are closed at the end."""
    made: list[ScriptedFrontend] = []

    def make() -> ScriptedFrontend:
        made.append(connect_to(path))
        return made[-1]

    yield make
    for frontend in made:
        frontend.close()


@pytest.fixture
async def frontend(
    backend: VhostUserBackend, connect: Callable[[], ScriptedFrontend]
) -> ScriptedFrontend:
    return connect()


@pytest.fixture
def lingering() -> Iterator[Callable[[], int]]:
    """Makes TCP connections whose last close takes ten minutes; the caller closes them."""
    peers: list[socket.socket] = []

    def make() -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sock = socket.create_connection(listener.getsockname())
            peers.append(listener.accept()[0])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(1 << 16))
        except BlockingIOError:
            return sock.detach()

    yield make
    for peer in peers:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()  # with a reset, which ends the lingering
