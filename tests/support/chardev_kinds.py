"""A user of chardevs that records what it is told, and for each kind the peer on its other side."""

from __future__ import annotations

import abc
import asyncio
import os
import pty
import socket
from collections.abc import Callable
from pathlib import Path

from tests.support.attached import Client
from tests.support.descriptors import read_exactly, write_all
from tests.support.waiting import DEADLINE, turns, until
from vring_serial.chardev.base import Chardev, DescriptorEnd, End, ProtocolEnd
from vring_serial.chardev.console import ConsoleChardev, ConsoleOptions
from vring_serial.chardev.file import FileChardev, FileOptions
from vring_serial.chardev.log import OutputLog
from vring_serial.chardev.mux import Mux
from vring_serial.chardev.null import NullChardev
from vring_serial.chardev.pipe import PipeChardev, PipeOptions
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.chardev.pty import PtyChardev
from vring_serial.chardev.ringbuf import RingbufChardev, RingbufOptions
from vring_serial.chardev.serial import SerialChardev, SerialOptions
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.chardev.stdio import StdioChardev
from vring_serial.chardev.terminal import set_raw
from vring_serial.chardev.udp import UdpChardev, UdpOptions


class GuestTransport(asyncio.Transport):
    """What a port is to a ProtocolEnd, cut down to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.received = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.received += data


class Guest:
    """A ChardevUser that moves bytes when a test says so, and checks what it is promised."""

    def __init__(self, chardev: Chardev) -> None:
        self.chardev = chardev
        self.events: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.end: End | None = None
        self.protocol: asyncio.Protocol | None = None
        self.transport: GuestTransport | None = None
        chardev.attach(self)
        chardev.guest_opened(True)

    def end_opened(self, end: End) -> None:
        assert self.end is None, "an end was opened on top of another"
        assert self.chardev.end is end
        self.end = end
        self.events.append("opened")
        if isinstance(end, ProtocolEnd):
            self.transport = GuestTransport()
            self.protocol = end.factory()
            self.protocol.connection_made(self.transport)

    def end_replaced(self, end: DescriptorEnd, between: Callable[[], None]) -> None:
        assert isinstance(self.end, DescriptorEnd)
        for fd in (self.end.read_fd, self.end.write_fd):
            if fd >= 0:
                os.fstat(fd)  # still open, as promised
        between()
        assert self.chardev.end is end
        self.end = end
        self.events.append("replaced")

    def end_closed(self) -> None:
        assert self.end is not None, "an end was closed that was not open"
        assert self.chardev.end is self.end
        if isinstance(self.end, DescriptorEnd):
            for fd in (self.end.read_fd, self.end.write_fd):
                if fd >= 0:
                    os.fstat(fd)  # still open, as promised
        elif self.protocol is not None:
            self.protocol.connection_lost(None)
            self.protocol = None
        self.end = None
        self.events.append("closed")

    def end_resized(self, cols: int, rows: int) -> None:
        assert self.end is not None
        self.sizes.append((cols, rows))
        self.events.append(f"resized {cols}x{rows}")

    async def opened(self) -> None:
        await until(lambda: self.end is not None)

    async def closed(self) -> None:
        await until(lambda: self.end is None)

    @property
    def read_fd(self) -> int:
        assert isinstance(self.end, DescriptorEnd)
        return self.end.read_fd

    @property
    def write_fd(self) -> int:
        assert isinstance(self.end, DescriptorEnd)
        return self.end.write_fd

    async def write(self, data: bytes) -> None:
        """What the data plane does with the guest's output."""
        if self.protocol is not None:
            self.protocol.data_received(data)
        elif self.write_fd >= 0:
            async with asyncio.timeout(DEADLINE):
                await write_all(self.write_fd, data)

    async def read(self, size: int) -> bytes:
        """What the data plane does for the guest's input."""
        if self.transport is not None:
            data = bytes(self.transport.received[:size])
            del self.transport.received[:size]
            return data
        async with asyncio.timeout(DEADLINE):
            return await read_exactly(self.read_fd, size)


class Peer(abc.ABC):
    """One kind of chardev and whoever is on its other side."""

    sends = True  # the peer can send to the guest
    receives = True  # what the guest writes can be got back
    leaves = True  # the end closes when the peer goes
    returns = True  # and opens when the next comes
    in_memory = False  # the end is Python code, so nothing waits in a descriptor
    last_words = True  # what a peer sent before it left waits in the end's descriptor
    chardev: Chardev

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def log_to(self, log: OutputLog) -> None:
        """Have the guest's output logged."""
        self.chardev.log = log

    async def connect(self) -> None:  # noqa: B027 - some are always there
        """Come; the end opens then, if it was not open."""

    async def send(self, data: bytes) -> None:
        raise NotImplementedError

    async def receive(self, size: int) -> bytes:
        raise NotImplementedError

    async def disconnect(self) -> None:  # noqa: B027
        """Go away, as a process that is killed."""

    async def aclose(self) -> None:
        await self.disconnect()


class SocketPeer(Peer):
    sock: socket.socket | None = None

    async def send(self, data: bytes) -> None:
        assert self.sock is not None
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self, size: int) -> bytes:
        assert self.sock is not None
        return await read_exactly(self.sock.fileno(), size)

    async def disconnect(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class UnixServerKind(SocketPeer):
    """The chardev is the server, the peer a client."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.address = str(directory / "sock")
        self.chardev = SocketChardev(
            "dut", SocketOptions(path=self.address, server=True, wait=False)
        )

    async def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.sock, self.address)


class AbstractServerKind(UnixServerKind):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        name = f"vring-test-{os.getpid()}"
        self.address = f"\0{name}"
        self.chardev = SocketChardev(
            "dut", SocketOptions(path=name, abstract=True, server=True, wait=False)
        )


class TcpServerKind(SocketPeer):
    chardev: SocketChardev

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.chardev = SocketChardev(
            "dut", SocketOptions(host="127.0.0.1", port=0, server=True, wait=False)
        )

    async def connect(self) -> None:
        self.sock = socket.socket()
        self.sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.sock, ("127.0.0.1", self.chardev.port))


class UnixClientKind(SocketPeer):
    """The chardev is a client that connects again, the peer the server."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        path = str(directory / "sock")
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(path)
        self.chardev = SocketChardev("dut", SocketOptions(path=path, reconnect_ms=20))
        self.server.setblocking(False)

    async def connect(self) -> None:
        self.server.listen(1)
        self.sock, _ = await asyncio.get_running_loop().sock_accept(self.server)

    async def aclose(self) -> None:
        await super().aclose()
        self.server.close()


class MuxKind(UnixServerKind):
    """A port's part of a server that ports share; what its peer sent is read ahead."""

    last_words = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.mux = Mux(self.chardev)
        self.mux.front("other")
        self.chardev = self.mux.front("this")

    def log_to(self, log: OutputLog) -> None:
        super().log_to(log)
        self.mux.base.log = log

    async def send(self, data: bytes) -> None:
        await super().send(data.replace(b"\1", b"\1\1"))


class TcpClientKind(UnixClientKind):
    def __init__(self, directory: Path) -> None:
        SocketPeer.__init__(self, directory)
        self.server = socket.socket()
        self.server.bind(("127.0.0.1", 0))
        self.server.setblocking(False)
        options = SocketOptions(
            host="127.0.0.1", port=self.server.getsockname()[1], reconnect_ms=20
        )
        self.chardev = SocketChardev("dut", options)


class PtyKind(Peer):
    chardev: PtyChardev
    slave = -1

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.chardev = PtyChardev("dut")

    async def connect(self) -> None:
        flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK
        self.slave = os.open(self.chardev.path, flags)

    async def send(self, data: bytes) -> None:
        await write_all(self.slave, data)

    async def receive(self, size: int) -> bytes:
        return await read_exactly(self.slave, size)

    async def disconnect(self) -> None:
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1


class SerialKind(Peer):
    """The peer is at the other end of the line: the master of a terminal that has a path."""

    last_words = False  # the system drops them when the line hangs up
    master = -1

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = directory / "line"

        class Quick(SerialChardev):
            retry_seconds = 0.02

        self.chardev = Quick("dut", SerialOptions(path=str(self.path)))
        self.plug()

    def plug(self) -> None:
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        set_raw(slave)
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(os.ttyname(slave))
        os.close(slave)

    async def connect(self) -> None:
        if self.master < 0:
            self.plug()

    async def send(self, data: bytes) -> None:
        await write_all(self.master, data)

    async def receive(self, size: int) -> bytes:
        return await read_exactly(self.master, size)

    async def disconnect(self) -> None:
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


class UdpKind(Peer):
    """The peer is a socket that is always there; how bytes fare is in test_udp.py."""

    sends = receives = leaves = returns = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.chardev = UdpChardev("dut", UdpOptions(host="127.0.0.1", port=9))


class FileKind(Peer):
    sends = leaves = returns = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = directory / "out"
        self.chardev = FileChardev("dut", FileOptions(path=str(self.path)))
        self.offset = 0

    async def receive(self, size: int) -> bytes:
        data = self.path.read_bytes()[self.offset : self.offset + size]
        self.offset += len(data)
        return data


class FileWithInputKind(FileKind):
    sends = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.input = directory / "in"
        self.input.write_bytes(b"")
        options = FileOptions(path=str(self.path), input_path=str(self.input))
        self.chardev = FileChardev("dut", options)

    async def send(self, data: bytes) -> None:
        with self.input.open("ab") as file:
            file.write(data)


class PipeKind(Peer):
    leaves = returns = False
    fds: tuple[int, ...] = ()

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = str(directory / "pipe")
        os.mkfifo(f"{self.path}.in")
        os.mkfifo(f"{self.path}.out")
        self.chardev = PipeChardev("dut", PipeOptions(path=self.path))

    async def connect(self) -> None:
        self.fds = (
            os.open(f"{self.path}.out", os.O_RDONLY | os.O_NONBLOCK),
            os.open(f"{self.path}.in", os.O_WRONLY | os.O_NONBLOCK),
        )

    async def send(self, data: bytes) -> None:
        await write_all(self.fds[1], data)

    async def receive(self, size: int) -> bytes:
        return await read_exactly(self.fds[0], size)

    async def disconnect(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = ()


class StdioKind(Peer):
    """Descriptors 0 and 1 are pipes from the first start on: pytest changes them before that."""

    returns = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.saved = os.dup(0), os.dup(1)
        self.stdin, self.write_fd = os.pipe()
        self.read_fd, self.stdout = os.pipe()
        os.set_blocking(self.read_fd, False)
        os.set_blocking(self.write_fd, False)
        peer = self

        class Redirected(StdioChardev):
            async def start(self) -> None:
                peer.redirect()
                await super().start()

        self.chardev = Redirected("dut")

    def redirect(self) -> None:
        if self.stdin >= 0:
            os.dup2(self.stdin, 0)
            os.dup2(self.stdout, 1)
            self.close_ours()

    def close_ours(self) -> None:
        for fd in (self.stdin, self.stdout):
            if fd >= 0:
                os.close(fd)
        self.stdin = self.stdout = -1

    async def send(self, data: bytes) -> None:
        await write_all(self.write_fd, data)

    async def receive(self, size: int) -> bytes:
        return await read_exactly(self.read_fd, size)

    async def disconnect(self) -> None:
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)
        self.read_fd = self.write_fd = -1

    async def aclose(self) -> None:
        await super().aclose()
        self.close_ours()
        for number, fd in enumerate(self.saved):
            os.dup2(fd, number)
            os.close(fd)


class NullKind(Peer):
    sends = receives = leaves = returns = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.chardev = NullChardev("dut")


class RingbufKind(Peer):
    sends = leaves = returns = False
    in_memory = True
    chardev: RingbufChardev

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.chardev = RingbufChardev("dut", RingbufOptions(size=1 << 20))

    async def receive(self, size: int) -> bytes:
        return self.chardev.read(size)


class ConsoleKind(Peer):
    """The peer is a client that is attached; the end is always open."""

    leaves = returns = False
    client: Client | None = None

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.path = str(directory / "console")
        self.chardev = ConsoleChardev("dut", ConsoleOptions(path=self.path))

    async def connect(self) -> None:
        self.client = await Client.come(self.path)

    async def send(self, data: bytes) -> None:
        assert self.client is not None
        self.client.type(data)
        await turns(20)

    async def receive(self, size: int) -> bytes:
        assert self.client is not None
        while len(self.client.shown) < size:
            assert await self.client.take()
        data = bytes(self.client.shown[:size])
        del self.client.shown[:size]
        return data

    async def disconnect(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
            await turns(5)


class ProtocolKind(Peer):
    """The peer is a protocol in this process; it leaves by closing the end, and comes back so."""

    in_memory = True
    chardev: ProtocolChardev

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.received = bytearray()
        self.transport: asyncio.Transport | None = None
        self.connected = asyncio.Event()
        peer = self

        class Handler(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                peer.transport = transport
                peer.connected.set()

            def connection_lost(self, error: Exception | None) -> None:
                peer.connected.clear()

            def data_received(self, data: bytes) -> None:
                peer.received += data

        self.chardev = ProtocolChardev("dut", Handler)

    async def connect(self) -> None:
        self.chardev.connect()

    async def send(self, data: bytes) -> None:
        await self.connected.wait()
        assert self.transport is not None
        self.transport.write(data)

    async def receive(self, size: int) -> bytes:
        data = bytes(self.received[:size])
        del self.received[:size]
        return data

    async def disconnect(self) -> None:
        self.chardev.disconnect()


KINDS: dict[str, type[Peer]] = {
    "unix-server": UnixServerKind,
    "unix-abstract-server": AbstractServerKind,
    "tcp-server": TcpServerKind,
    "unix-client": UnixClientKind,
    "tcp-client": TcpClientKind,
    "mux": MuxKind,
    "pty": PtyKind,
    "serial": SerialKind,
    "udp": UdpKind,
    "file": FileKind,
    "file-with-input": FileWithInputKind,
    "pipe": PipeKind,
    "stdio": StdioKind,
    "null": NullKind,
    "ringbuf": RingbufKind,
    "console": ConsoleKind,
    "protocol": ProtocolKind,
}

SENDING = [name for name, kind in KINDS.items() if kind.sends]
RECEIVING = [name for name, kind in KINDS.items() if kind.receives]
LEAVING = [name for name, kind in KINDS.items() if kind.leaves]
COMING_BACK = [name for name in LEAVING if KINDS[name].returns]
SOCKETS = [name for name, kind in KINDS.items() if issubclass(kind, SocketPeer)]
#: A peer may have left while its bytes still wait.
WITH_LAST_WORDS = [
    name
    for name in LEAVING
    if KINDS[name].sends and not KINDS[name].in_memory and KINDS[name].last_words
]
