"""What a domain XML asks of its controllers, as a frontend sees it."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from tests.support.served import Serve
from tests.support.waiting import DEADLINE
from vring_serial.proto import vfio_user
from vring_serial.proto.vfio_user_regions import RegionIndex, RegionRead
from vring_serial.proto.vfio_user_version import Version
from vring_serial.proto.vfio_user_wire import IrqIndex, IrqInfo

CHANNEL = "<channel type='null'><target type='virtio' name='org.example'/></channel>"
_GET_FEATURES = struct.pack("<III", 1, 1, 0)
_RING_PACKED = 34


def write_domain(directory: Path, controller: str) -> str:
    path = directory / "domain.xml"
    path.write_text(f"<domain><devices>{controller}{CHANNEL}</devices></domain>")
    return str(path)


@pytest.mark.parametrize(
    ("model", "option", "identifiers"),
    [
        ("model='virtio-transitional'", (), "f41a0310"),
        ("", ("--transitional",), "f41a0310"),
        ("model='virtio-non-transitional'", ("--transitional",), "f41a4310"),
        ("model='virtio'", (), "f41a4310"),
    ],
)
async def test_model_and_vectors_over_vfio_user(
    serve: Serve, tmp_path: Path, model: str, option: tuple[str, ...], identifiers: str
) -> None:
    domain = write_domain(tmp_path, f"<controller type='virtio-serial' {model} vectors='3'/>")
    arguments = ("--vfio-user", "v", "--domain", domain, "--vectors", "5", *option)
    async with serve(*arguments) as server:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(vfio_user.request(vfio_user.Command.VERSION, 1, Version()))
        read = RegionRead(0, RegionIndex.CONFIG, 4)
        writer.write(vfio_user.request(vfio_user.Command.REGION_READ, 2, read))
        asked = vfio_user.request(vfio_user.Command.DEVICE_GET_IRQ_INFO, 3, IrqInfo(IrqIndex.MSIX))
        writer.write(asked)
        async with asyncio.timeout(DEADLINE):
            await reader.readexactly(16 + 4 + 16 + 16)
            assert await reader.readexactly(4) == bytes.fromhex(identifiers)
            vectors = (await reader.readexactly(16 + 16))[-4:]
        assert int.from_bytes(vectors, "little") == 3
        assert await server.stop() == 0
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("driver", "option", "offered"),
    [
        ("<driver packed='on'/>", (), True),
        ("<driver packed='off'/>", ("--packed",), False),
        ("", ("--packed",), True),
        ("", (), False),
    ],
)
async def test_packed_over_vhost_user(
    serve: Serve, tmp_path: Path, driver: str, option: tuple[str, ...], offered: bool
) -> None:
    domain = write_domain(tmp_path, f"<controller type='virtio-serial'>{driver}</controller>")
    async with serve("--vhost-user", "v", "--domain", domain, *option) as server:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "v")
        writer.write(_GET_FEATURES)
        async with asyncio.timeout(DEADLINE):
            answer = await reader.readexactly(12 + 8)
        features = int.from_bytes(answer[-8:], "little")
        assert bool(features >> _RING_PACKED & 1) is offered
        assert await server.stop() == 0
        writer.close()
        await writer.wait_closed()


async def test_what_is_the_frontends_over_vhost_user_is_said(serve: Serve, tmp_path: Path) -> None:
    controller = "<controller type='virtio-serial' model='virtio-transitional' vectors='3'/>"
    domain = write_domain(tmp_path, controller)
    async with serve("--vhost-user", "v", "--domain", domain) as server:
        await server.logged(
            "model= and vectors= are the frontend's to know over vhost-user: virtio-serial0"
        )
        assert await server.stop() == 0
