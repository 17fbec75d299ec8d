"""How clients get in, or do not; what is kept back; port channels; a stop under a client."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import socket
import struct
import subprocess

import pytest

from tests.support.waiting import until
from vring_serial import EmbeddedGuest, SpiceOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.proto.agent import Capability
from vring_serial.spice.server import SpiceServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend


@pytest.mark.parametrize("password", ["wrong", "", "hush "])
async def test_a_wrong_password_is_refused_and_the_next_client_is_not(bench_with, caplog, password):
    async with bench_with() as bench:
        with caplog.at_level(logging.WARNING, "vring_serial.spice"):
            stranger = await bench.connect(password=password)
            await stranger.wait("channel-event", "MainChannel", "error-auth")
        assert "Invalid password" in caplog.text
        friend = await bench.connect()
        await friend.wait_agent()


async def test_no_password_is_needed_where_ticketing_is_disabled(bench_with):
    async with bench_with(disable_ticketing=True) as bench:
        client = await bench.connect(password="")
        await client.wait_agent()


@pytest.mark.parametrize(
    "options", [{"password": ""}, {"password_valid_to": 1}], ids=["empty", "expired"]
)
@pytest.mark.parametrize("offered", ["", "hush"])
async def test_nobody_gets_in_past_a_password_that_is_empty_or_has_expired(
    bench_with, options, offered
):
    async with bench_with(**options) as bench:
        stranger = await bench.connect(password=offered)
        event = await stranger.wait("channel-event", "MainChannel")
        assert event[0].startswith("error")


async def test_a_password_from_a_file(bench_with, tmp_path):
    (tmp_path / "password").write_text("x" * 59 + "\n")
    async with bench_with(password=None, password_file=str(tmp_path / "password")) as bench:
        client = await bench.connect(password="x" * 59)
        await client.wait_agent()


async def test_clipboards_may_be_kept_back(bench_with, tmp_path):
    async with bench_with(disable_copy_paste=True) as bench:
        client = await bench.connect()
        capabilities = await client.wait_agent()
        assert not capabilities >> Capability.CLIPBOARD_SELECTION & 1
        assert not capabilities >> Capability.CLIPBOARD_BY_DEMAND & 1
        await bench.guest.copy("secret", "clipboard")
        client.do("grab", 0, "secret")
        # A file comes after them, and arrives.
        (tmp_path / "file").write_bytes(b"content")
        client.do("send", "file", str(tmp_path / "file"))
        await client.wait("sent", "file")
        assert await bench.guest.file("file") == b"content"
        assert not [event for event in client.events if event[0] in ("grabbed", "requested")]
        await bench.guest.pasted("secret", "clipboard")  # the guest's own


async def test_files_may_be_kept_back(bench_with, tmp_path):
    async with bench_with(disable_agent_file_xfer=True) as bench:
        client = await bench.connect()
        capabilities = await client.wait_agent()
        assert capabilities >> Capability.FILE_XFER_DISABLED & 1
        (tmp_path / "file").write_bytes(b"content")
        client.do("send", "file", str(tmp_path / "file"))
        await client.wait("not-sent", "file")
        assert await bench.guest.file("file") is None
        client.do("grab", 0, "text")
        await bench.guest.pasted("text", "clipboard")


async def test_a_unix_socket(bench_with, tmp_path):
    path = tmp_path / "spice.sock"
    async with bench_with(autoport=False, unix=True, addr=str(path)) as bench:
        client = await bench.connect(**{"unix-path": str(path), "host": "", "port": None})
        await client.wait_agent()
    assert not path.exists()


def make_certificates(directory):
    """A certificate for localhost that signs itself, under the names that the server looks for."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", "server-key.pem", "-out", "server-cert.pem"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    (directory / "ca-cert.pem").write_bytes((directory / "server-cert.pem").read_bytes())


async def test_tls(bench_with, tmp_path, unused_port):
    make_certificates(tmp_path)
    async with bench_with(
        autoport=False, addr="localhost", ipv4=True, tls_port=unused_port, x509_dir=str(tmp_path),
        tls_channel=("default",),
    ) as bench:  # fmt: skip
        tls = {"host": "localhost", "port": None, "tls-port": str(unused_port)}
        client = await bench.connect(**tls, **{"ca-file": str(tmp_path / "ca-cert.pem")})
        await client.wait_agent()
        stranger = await bench.connect(**tls)
        await stranger.wait("channel-event", "MainChannel", "error-tls")


async def test_tls_on_a_port_that_is_chosen(bench_with, tmp_path):
    make_certificates(tmp_path)
    async with bench_with(
        autoport=False, addr="localhost", ipv4=True, tls_autoport=True, x509_dir=str(tmp_path),
        tls_channel=("default",),
    ) as bench:  # fmt: skip
        (address,) = bench.server.addresses
        port = address.removeprefix("localhost:").removesuffix(" (TLS)")
        ca_file = {"ca-file": str(tmp_path / "ca-cert.pem")}
        client = await bench.connect(host="localhost", port=None, **{"tls-port": port}, **ca_file)
        await client.wait_agent()


async def test_certificates_and_ports_that_do_not_do(tmp_path, unused_port):
    make_certificates(tmp_path)
    common = {"addr": "127.0.0.1", "disable_ticketing": True, "x509_dir": str(tmp_path)}
    with socket.create_server(("127.0.0.1", unused_port)):
        server = SpiceServer(SpiceOptions(tls_port=unused_port, **common))
        with pytest.raises(ResourceError, match=f"127.0.0.1:{unused_port}: Address already in"):
            await server.start()
    for options, message in [
        ({"tls_ciphers": "NONE-SUCH"}, "'NONE-SUCH' names no cipher"),
        ({"x509_key_file": str(tmp_path / "ca-cert.pem")}, r"ca-cert\.pem: "),
    ]:
        server = SpiceServer(SpiceOptions(tls_port=unused_port, **common, **options))
        with pytest.raises(ConfigError, match=message):
            await server.start()
    server = SpiceServer(SpiceOptions(tls_port=unused_port, **common))
    await server.start()
    await server.aclose()


async def test_plain_clients_are_refused_where_channels_have_to_use_tls(
    bench_with, tmp_path, unused_port
):
    make_certificates(tmp_path)
    async with bench_with(
        tls_port=unused_port, x509_dir=str(tmp_path), tls_channel=("main",)
    ) as bench:
        client = await bench.connect()
        event = await client.wait("channel-event", "MainChannel")
        assert event[0].startswith("error") or event == ["closed"]


@pytest.mark.parametrize("times", [1, 5])
async def test_the_server_stops_under_a_client_and_starts_again(bench_with, times):
    async with bench_with() as bench:
        for _ in range(times):
            client = await bench.connect()
            await client.wait_agent()
            await bench.server.aclose()
            await client.wait("channel-event", "MainChannel")
            await client.kill()
            # The agent is where it was; it opens its port anew for the server that comes.
            await bench.guest.stop_agent()
            await bench.server.start()
            await bench.guest.start_agent()
        client = await bench.connect()
        await client.wait_agent()


async def test_an_agent_that_breaks_its_protocol_is_dropped_and_may_come_back(bench_with):
    async with bench_with() as bench:
        client = await bench.connect()
        await client.wait_agent()
        await bench.guest.stop_agent()
        await client.wait("agent", False)
        port = await bench.guest.wait_port()
        reader, writer = await port.open()
        await client.wait("agent", True)
        writer.write(b"\x07\0\0\0" + b"\x04\0\0\0" + b"junk")  # there is no chunk port 7
        await client.wait("agent", False)
        async with asyncio.timeout(10):
            await reader.read()  # up to the end, which the server's side made
        writer.close()
        client.events.clear()
        await bench.guest.start_agent()
        await client.wait_agent()


class PortBench:
    """A server with one port channel, the device, and the embedded guest's end of the port."""

    def __init__(self, directory, name):
        self.server = SpiceServer(
            SpiceOptions(autoport=True, addr="127.0.0.1", disable_ticketing=True)
        )
        self.controller = Controller()
        self.controller.add_port(Port(3, name, self.server.port_chardev("port", name)))
        self.backend = VhostUserBackend(self.controller, str(directory / "vring.sock"))
        self.guest = EmbeddedGuest(str(directory / "vring.sock"))

    async def __aenter__(self):
        await self.server.start()
        await self.controller.start()
        await self.backend.start()
        await self.guest.start()
        self.port = await self.guest.wait_port(nr=3)
        return self

    async def __aexit__(self, *_):
        await self.guest.aclose()
        await self.backend.aclose()
        await self.controller.aclose()
        await self.server.aclose()

    async def until_host(self, connected):
        await until(lambda: self.port.host_connected == connected)

    @property
    def properties(self):
        return {"host": "127.0.0.1", "port": self.server.addresses[0].rpartition(":")[2]}


async def test_a_port_channel_loses_nothing_either_way(tmp_path, client_process):
    data = os.urandom(3 << 20)
    async with asyncio.timeout(50), PortBench(tmp_path, "org.example.0") as bench:
        client_process.do("connect", bench.properties)
        await bench.until_host(True)
        reader, writer = await bench.port.open()
        await client_process.wait("port-opened", "org.example.0", True)
        client_process.do("write_port", base64.b64encode(data).decode())
        assert await reader.readexactly(len(data)) == data
        writer.write(data)
        await writer.drain()
        writer.close()  # what was written before comes first
        received = bytearray()
        while len(received) < len(data):
            received += await client_process.wait_data("port-data")
        assert received == data
        await client_process.wait("port-opened", "org.example.0", False)


async def test_a_port_is_open_for_the_guest_while_a_client_is_there(tmp_path, client_process):
    async with asyncio.timeout(50), PortBench(tmp_path, "org.example.0") as bench:
        for _ in range(2):
            _, writer = await bench.port.open()
            client_process.do("connect", bench.properties)
            await client_process.wait("port-opened", "org.example.0", True)
            assert bench.port.host_connected
            client_process.do("disconnect")
            await bench.until_host(False)
            writer.close()
            await writer.wait_closed()


async def test_webdav_has_a_channel_of_its_own(tmp_path, client_process):
    """The client serves a folder over it, in frames of a connection's number, a size and data."""
    shared = tmp_path / "shared"
    shared.mkdir()
    data = os.urandom(300_000)
    (shared / "file").write_bytes(data)
    async with asyncio.timeout(50), PortBench(tmp_path, "org.spice-space.webdav.0") as bench:
        client_process.do("connect", {**bench.properties, "shared-dir": str(shared)})
        await client_process.wait("channel-event", "WebdavChannel", "opened")
        await bench.until_host(True)
        reader, writer = await bench.port.open()
        request = b"GET /file HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        writer.write(struct.pack("<qH", 7, len(request)) + request)
        answer = bytearray()
        while True:
            number, size = struct.unpack("<qH", await reader.readexactly(10))
            assert number == 7
            if not size:
                break
            answer += await reader.readexactly(size)
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert body == data
        writer.close()
        await writer.wait_closed()
