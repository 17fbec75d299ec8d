"""A served PCI function, and clients of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.vfio_client import Client, Server
from vring_serial.device.base import VirtioDevice


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Lines of warning and above."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers, which are closed at the end."""
    made: list[Server] = []

    def make(device: VirtioDevice, **options: Any) -> Server:
        made.append(Server(device, tmp_path / f"vfio{len(made)}.sock", **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(device: Any, make_server: Callable[..., Server]) -> Server:
    return make_server(device)


@pytest.fixture
def new_client() -> Iterator[Callable[[Server], Client]]:
    """Makes clients of any server, which are closed at the end."""
    made: list[Client] = []

    def make(server: Server) -> Client:
        made.append(Client(server.path))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def connect(server: Server, new_client: Callable[[Server], Client]) -> Callable[[], Client]:
    """Makes clients."""
    return lambda: new_client(server)


@pytest.fixture
def client(connect: Callable[[], Client]) -> Client:
    return connect()
