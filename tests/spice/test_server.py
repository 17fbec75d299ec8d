"""The server with no client: starts, stops and refusals; its timers and watches."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time

import pytest

from tests.support.leaks import held
from tests.support.waiting import turns, until
from vring_serial import SpiceOptions
from vring_serial.chardev.base import ProtocolEnd
from vring_serial.errors import ConfigError, LocalProtocolError, ResourceError
from vring_serial.spice.core import CoreInterface, _format_address
from vring_serial.spice.library import load
from vring_serial.spice.server import SpiceServer


def local(**values):
    usual = {"autoport": True, "addr": "127.0.0.1", "disable_ticketing": True}
    return SpiceServer(SpiceOptions(**{**usual, **values}))


async def test_it_starts_and_stops_as_often_as_one_likes():
    server = local()
    await server.start()
    await server.aclose()
    before = held()
    for _ in range(5):
        await server.start()
        assert server.addresses[0].startswith("127.0.0.1:")
        await server.aclose()
        await server.aclose()
    assert held() == before


async def test_two_servers_at_once():
    servers = [local(), local()]
    for server in servers:
        await server.start()
    assert servers[0].addresses != servers[1].addresses
    for server in servers:
        await server.aclose()


async def test_nonsense_from_a_client_ends_its_connection_only():
    server = local()
    await server.start()
    host, port = server.addresses[0].split(":")
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"REDQ" + b"\xff" * 64, b"REDQ", os.urandom(4096)):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(junk)
        if len(junk) > 4:
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    reader, writer = await asyncio.open_connection(host, int(port))
    later = await asyncio.open_connection(host, int(port))
    later[1].write(bytes(64))
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            await later[0].read()
    later[1].close()
    assert not reader.at_eof(), "the one that came before says nothing, and may"
    await server.aclose()
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_a_port_that_is_taken():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(ResourceError, match="Address already in use"):
            await local(autoport=False, port=port).start()


async def test_it_runs_once_at_a_time():
    server = local()
    await server.start()
    with pytest.raises(LocalProtocolError, match="runs already"):
        await server.start()
    await server.aclose()


async def test_files_that_are_not_there():
    server = local(tls_port=1, x509_dir="/nowhere")
    with pytest.raises(
        ResourceError, match=r"x509-cacert-file /nowhere/ca-cert\.pem: No such file"
    ):
        await server.start()
    await server.aclose()


async def test_files_that_hold_no_certificate(tmp_path):
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_text("junk")
    with pytest.raises(ConfigError, match=r"ca-cert\.pem holds no certificate"):
        await local(tls_port=1, x509_dir=str(tmp_path)).start()


async def test_an_agent_end_is_there_at_once_and_a_port_end_with_a_client():
    server = local()
    await server.start()
    agent = server.agent_chardev("agent")
    port = server.port_chardev("port", "org.example.0")
    for chardev in (agent, port):
        await chardev.start()
    assert isinstance(agent.end, ProtocolEnd)
    assert port.end is None
    assert len(server.devices) == 1
    for chardev in (agent, port):
        await chardev.aclose()
    assert not server.devices
    await server.aclose()


async def test_a_stopped_server_forgets_its_devices():
    server = local()
    await server.start()
    port = server.port_chardev("port", "org.example.0")
    await port.start()
    await server.aclose()
    assert not server.devices
    await port.aclose()


@pytest.fixture
async def core():
    core = CoreInterface(load(), lambda event: None)
    yield core
    core.close()


async def test_timers(core, clock):
    ffi = load().ffi
    fired = []
    func = ffi.callback("SpiceTimerFunc", lambda opaque: fired.append(time.monotonic()))
    timer = core.struct.timer_add(func, ffi.NULL)
    begin = time.monotonic()
    core.struct.timer_start(timer, 1000)
    core.struct.timer_start(timer, 30)  # anew
    await until(lambda: fired)
    assert fired[0] - begin >= 0.03
    await clock.forward(2)
    assert len(fired) == 1
    core.struct.timer_start(timer, 1)
    core.struct.timer_cancel(timer)
    core.struct.timer_cancel(timer)
    await clock.forward(2)
    assert len(fired) == 1
    core.struct.timer_start(timer, 1)
    core.struct.timer_remove(timer)
    core.struct.timer_remove(ffi.NULL)
    await clock.forward(2)
    assert len(fired) == 1


async def test_a_mistake_in_a_callback_is_logged(core, caplog):
    core.struct.timer_cancel(load().ffi.cast("SpiceTimer *", 4711))
    assert "a callback of the SPICE server failed" in caplog.text
    assert "KeyError: 4711" in caplog.text


async def test_watches(core):
    ffi = load().ffi
    events = []

    @ffi.callback("SpiceWatchFunc")
    def func(fd, event, opaque):
        events.append(event)
        core.struct.watch_update_mask(watch, 0)

    here, there = socket.socketpair()
    with here, there:
        watch = core.struct.watch_add(here.fileno(), 0, func, ffi.NULL)
        there.send(b"x")
        await turns()
        assert events == []
        core.struct.watch_update_mask(watch, 1)
        await turns()
        assert events == [1]
        core.struct.watch_update_mask(watch, 2)
        await turns()
        assert events == [1, 2]
        core.struct.watch_update_mask(watch, 3)
        core.struct.watch_remove(watch)
        await turns()
        assert events == [1, 2]
        core.struct.watch_remove(ffi.NULL)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (b"\x02\x00\x17\x2a\x7f\x00\x00\x01" + bytes(8), "127.0.0.1:5930"),
        (b"\x0a\x00\x17\x2a" + bytes(4) + bytes(15) + b"\x01" + bytes(4), "[::1]:5930"),
        (b"\x01\x00", "a unix socket"),
        (b"", "a unix socket"),
    ],
)
def test_addresses(address, text):
    assert _format_address(address) == text


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"addr": "0.0.0.0"}, True),
        ({"addr": ""}, True),
        ({}, False),
        ({"addr": "localhost"}, False),
        ({"addr": "0.0.0.0", "disable_ticketing": False, "password": "hush"}, False),
        ({"addr": "0.0.0.0", "disable_ticketing": False, "password": ""}, False),
        ({"addr": "spice.sock", "unix": True, "autoport": False}, False),
    ],
)
async def test_a_server_that_is_open_to_the_network_says_so(
    options, warned, caplog, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    server = local(**options)
    await server.start()
    await server.aclose()
    assert ("no password is needed at" in caplog.text) is warned
