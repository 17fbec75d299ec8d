"""Services go on with a port whatever their peers and they themselves do."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.guest.services import keep_serving
from vring_serial.transport.vhost_user.backend import VhostUserBackend


async def moody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"ready\n")
    match await reader.readline():
        case b"bad\n":
            raise ValueError("this request is bad")
        case b"cut\n":
            await reader.readexactly(1000)
        case b"quit\n":
            writer.write(b"bye\n")


async def test_failed_finished_and_cut_short(tmp_path: Path, caplog) -> None:
    controller = Controller(max_ports=2)
    options = SocketOptions(path=str(tmp_path / "port"), server=True, wait=False)
    controller.add_port(Port(1, "port", SocketChardev("port", options)))
    backend = VhostUserBackend(controller, str(tmp_path / "vu"))
    await controller.start()
    await backend.start()
    async with EmbeddedGuest(str(tmp_path / "vu")) as guest:
        port = await guest.wait_port(1)
        serving = asyncio.ensure_future(keep_serving(port, moody))
        host_reader, host_writer = await asyncio.open_unix_connection(tmp_path / "port")
        for request, answer in ((b"bad\n", b""), (b"quit\n", b"bye\n"), (b"fine\n", b"")):
            assert await host_reader.readline() == b"ready\n"
            host_writer.write(request)
            if answer:
                assert await host_reader.readline() == answer
        assert await host_reader.readline() == b"ready\n"
        host_writer.write(b"cut\nshort")
        host_writer.close()
        await until(lambda: "0 bytes read" in caplog.text or "5 bytes read" in caplog.text)
        host_reader, host_writer = await asyncio.open_unix_connection(tmp_path / "port")
        assert await host_reader.readline() == b"ready\n"
        assert "port 1: this request is bad" in caplog.text
        host_writer.close()
    await asyncio.wait_for(serving, 5)
    await backend.aclose()
    await controller.aclose()
