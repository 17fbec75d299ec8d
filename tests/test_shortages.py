"""Whatever lives long survives that no descriptor is left: it says so, and goes on afterwards.

Listeners are in test_accept.py, the router's task for a SPICE server in test_router_server.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.chardevs import User
from tests.support.console import guest_on
from tests.support.waiting import LoopClock, until, until_logged
from vring_serial.chardev.base import DescriptorEnd
from vring_serial.chardev.file import FileChardev, FileOptions
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.cli import logs
from vring_serial.device.console import port as port_module
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.errors import ResourceError
from vring_serial.transport import door as door_module
from vring_serial.transport.door import Door
from vring_serial.unix_socket import UnixListener

DEADLINE = 20.0
Limited = Callable[[], AbstractContextManager[None]]


async def test_a_port_that_the_guest_opens(
    tmp_path: Path,
    out_of_descriptors: Limited,
    caplog: pytest.LogCaptureFixture,
    clock: LoopClock,
) -> None:
    controller = Controller()
    options = SocketOptions(path=str(tmp_path / "a"), server=True, wait=False)
    controller.add_port(Port(1, "x", SocketChardev("a", options)))
    async with guest_on(controller, tmp_path / "v") as guest:
        port = await guest.wait_port(nr=1)
        host_reader, host_writer = await asyncio.open_unix_connection(tmp_path / "a")
        await port.wait_host()
        with out_of_descriptors():
            reader, writer = await port.open()
            await until_logged(caplog, "port 1 (x): it has to wait: Too many open files")
            for number in range(3):  # attempts
                await clock.forward(port_module.RETRY_SECONDS * 2**number)
        await clock.forward(port_module.RETRY_MOST)
        assert caplog.text.count("it has to wait") == 1
        writer.write(b"to the host")
        assert await host_reader.readexactly(11) == b"to the host"
        host_writer.write(b"to the guest")
        assert await reader.readexactly(12) == b"to the guest"
        writer.close()
        host_writer.close()
        await host_writer.wait_closed()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_client_that_connects_again(
    tmp_path: Path, out_of_descriptors: Limited, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(str(tmp_path / "s") if kind == "unix" else ("127.0.0.1", 0))
        listener.listen()
        if kind == "unix":
            options = SocketOptions(path=str(tmp_path / "s"), reconnect_ms=10)
        else:
            port = listener.getsockname()[1]
            options = SocketOptions(host="127.0.0.1", port=port, reconnect_ms=10)
        chardev = SocketChardev("a", options)
        user = User()
        chardev.attach(user)
        await asyncio.get_running_loop().run_in_executor(None, os.getpid)  # its threads are there
        await chardev.start()
        with out_of_descriptors():
            await until_logged(caplog, "Too many open files; trying again")
            assert not user.opened.is_set()
        async with asyncio.timeout(DEADLINE):
            await user.opened.wait()
        await chardev.aclose()


async def test_a_door_that_connects(
    tmp_path: Path,
    out_of_descriptors: Limited,
    caplog: pytest.LogCaptureFixture,
    clock: LoopClock,
) -> None:
    caplog.set_level("INFO")
    came: list[socket.socket] = []
    listener = UnixListener(str(tmp_path / "d"))
    door = Door(
        str(tmp_path / "d"),
        name="test",
        peer="frontend",
        listen=False,
        on_silent=lambda: None,
        on_connected=came.append,
    )
    with out_of_descriptors():
        door.open()
        await until_logged(caplog, "no frontend yet: Too many open files")
        for _ in range(3):  # attempts
            await clock.forward(door_module.RETRY_INTERVAL)
    await clock.forward(door_module.RETRY_INTERVAL)
    await until(lambda: came)
    assert caplog.text.count("Too many open files") == 1
    door.close()
    listener.close()
    came[0].close()


async def test_files_that_are_to_be_opened_anew(
    tmp_path: Path, out_of_descriptors: Limited
) -> None:
    chardev = FileChardev("f", FileOptions(path=str(tmp_path / "out")))
    await chardev.start()
    logs.configure("info", as_json=False, path=str(tmp_path / "log"))
    with out_of_descriptors():
        for reopen in (chardev.reopen, logs.reopen):
            with pytest.raises(ResourceError, match="Too many open files"):
                reopen()
    assert isinstance(chardev.end, DescriptorEnd)
    os.write(chardev.end.write_fd, b"goes on")
    logs.emit(20, "test", "goes on as well")
    logging.getLogger().handlers[0].flush()
    assert (tmp_path / "out").read_bytes() == b"goes on"
    assert "goes on as well" in (tmp_path / "log").read_text()
    await chardev.aclose()
