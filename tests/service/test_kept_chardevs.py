"""What becomes of each kind of chardev when the worker that serves it is killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import pty
import random
import re
import signal
import socket
import termios
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from tests.support.attached import Client
from tests.support.keeper import kept
from tests.support.waiting import DEADLINE, until, until_file_says
from vring_serial import EmbeddedGuest
from vring_serial.proto.attach import Hello


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Port:
    """A guest's port that is open."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def hears(self, data):
        async with asyncio.timeout(DEADLINE):
            assert await self.reader.readexactly(len(data)) == data

    def says(self, data):
        self.writer.write(data)


@asynccontextmanager
async def port_of(guest, keeper):
    """Port 1, open for the block; after it, the device knows that it is closed."""
    port = await guest.wait_port(nr=1)
    await port.wait_host()
    reader, writer = await port.open()
    try:
        yield Port(reader, writer)
    finally:
        closed = keeper.log.count("closed by the guest")
        writer.close()
    # Else what the host sends from now on may go to the guest that closes.
    await keeper.logged("closed by the guest", closed + 1)


@asynccontextmanager
async def serving(chardev, **options):
    """A keeper with a guest that has that chardev at port 1."""
    arguments = ("--chardev", chardev, "--port", "chardev=c,nr=1")
    async with kept(Path.cwd(), *arguments, **options) as keeper:
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            yield keeper, guest
        assert await keeper.stop() == 0


async def exchange(port, reader, writer, text):
    writer.write(b"to the guest " + text)
    await port.hears(b"to the guest " + text)
    port.says(b"to the host " + text)
    assert await reader.readexactly(12 + len(text)) == b"to the host " + text


ADDRESSES = {
    "unix": ("path=c", lambda log: asyncio.open_unix_connection("c")),
    "abstract": (
        "path=vring-test-{pid},abstract=on",
        lambda log: asyncio.open_unix_connection(f"\0vring-test-{os.getpid()}"),
    ),
    "tcp": (
        "host=127.0.0.1,port=0",
        lambda log: asyncio.open_connection(
            "127.0.0.1", int(re.search(r"tcp:127\.0\.0\.1:([1-9]\d*)", log)[1])
        ),
    ),
}


@pytest.mark.parametrize("kind", ADDRESSES)
async def test_clients_of_a_server_notice_nothing_nor_do_those_that_wait(kind):
    address, connect = ADDRESSES[kind]
    address = address.format(pid=os.getpid())
    async with serving(f"socket,id=c,server=on,wait=off,{address}") as (keeper, guest):
        ends = [await connect(keeper.log) for _ in range(3)]
        for i in range(4):
            async with port_of(guest, keeper) as port:
                await exchange(port, *ends[i], b"before")
                await keeper.kill_until_served()
                await exchange(port, *ends[i], b"after")
                if not i:
                    ends.append(await connect(keeper.log))
                ends[i][1].close()
                # Its end is heard of before the next one is awaited.
                assert await port.reader.read() == b""


@pytest.mark.parametrize("reconnect", ["", ",reconnect-ms=10"])
async def test_the_server_of_a_client_notices_nothing(reconnect):
    came = asyncio.Queue()
    server = await asyncio.start_unix_server(lambda *ends: came.put_nowait(ends), "s")
    async with server, serving(f"socket,id=c,path=s{reconnect}") as (keeper, guest):
        reader, writer = await came.get()
        async with port_of(guest, keeper) as port:
            await exchange(port, reader, writer, b"before")
            await keeper.kill_until_served()
            await exchange(port, reader, writer, b"after")
        assert came.empty()
        writer.close()
        if reconnect:
            reader, writer = await came.get()
            async with port_of(guest, keeper) as port:
                await exchange(port, reader, writer, b"again")
                await keeper.kill_until_served()
                await exchange(port, reader, writer, b"still")
            assert came.empty()
            writer.close()
            server.close()


@pytest.mark.parametrize("append", ["on", "off"])
async def test_a_file_is_emptied_once_and_its_input_read_once(append):
    Path("out").write_text("old\n")
    Path("in").write_text("from the file")
    async with serving(f"file,id=c,path=out,append={append},input-path=in") as (keeper, guest):
        async with port_of(guest, keeper) as port:
            await port.hears(b"from the file")
            for text in ("one\n", "two\n", "three\n"):
                port.says(text.encode())
                await until_file_says(Path("out"), text)
                await keeper.kill_until_served()
            with open("in", "a") as more:
                more.write("and more")
            port.says(b"four\n")
            await until_file_says(Path("out"), "four\n")
        await keeper.kill_until_anew()
    old = "old\n" if append == "on" else ""
    assert Path("out").read_text() == f"{old}one\ntwo\nthree\nfour\n"
    assert "when a worker dies" not in keeper.log


async def test_a_log_goes_on_where_it_was():
    """Emptied once; bytes between two system calls may be missing, none comes twice."""
    Path("out").write_text("old\n")
    chance = random.Random(5)
    async with serving("null,id=c,logfile=out") as (keeper, guest):
        async with port_of(guest, keeper) as port:
            for text in ("one\n", "two\n", "three\n"):
                port.says(text.encode())
                await until_file_says(Path("out"), text)
                await keeper.kill_until_served()
            count = 0
            async with keeper.dying(chance):
                while keeper.kills < 12:
                    for _ in range(200):
                        port.says(b"%09d\n" % count)
                        count += 1
                    await port.writer.drain()
            port.says(b"end\n")
            await until_file_says(Path("out"), "end\n")
        await keeper.kill_until_anew()
    lines = Path("out").read_bytes().split(b"\n")
    assert lines[:3] == [b"one", b"two", b"three"]
    numbers = [int(line) for line in lines[3:-2] if len(line) == 9]
    assert all(before < after for before, after in itertools.pairwise(numbers))
    assert len(numbers) > 0.9 * count


async def test_pipes_are_held_open_with_what_is_in_them():
    for name in ("p.in", "p.out"):
        os.mkfifo(name)
    async with serving("pipe,id=c,path=p") as (keeper, guest), port_of(guest, keeper) as port:
        port.says(b"unread")
        with open("p.in", "wb", buffering=0) as writer:
            writer.write(b"before")
            await port.hears(b"before")
            await keeper.kill_until_served()
            writer.write(b"after")
            await port.hears(b"after")
        await keeper.kill_until_served()
        fd = os.open("p.out", os.O_RDONLY | os.O_NONBLOCK)
        await until(lambda: os.read(fd, 6) == b"unread")
        os.close(fd)
    assert "when a worker dies" not in keeper.log


async def test_a_pty_is_the_same_and_so_is_its_link():
    async with serving("pty,id=c,path=link") as (keeper, guest):
        target = os.readlink("link")
        fd = os.open("link", os.O_RDWR | os.O_NOCTTY)
        os.set_blocking(fd, False)
        settings = termios.tcgetattr(fd)
        async with port_of(guest, keeper) as port:
            for text in (b"one", b"two"):
                os.write(fd, text)
                await port.hears(text)
                port.says(text)
                await until(lambda: _read(fd))
                await keeper.kill_until_served()
                assert os.readlink("link") == target
            assert termios.tcgetattr(fd) == settings
        os.close(fd)
        fd = os.open("link", os.O_RDWR | os.O_NOCTTY)
        async with port_of(guest, keeper) as port:
            os.write(fd, b"the next program")
            await port.hears(b"the next program")
        os.close(fd)
    assert not os.path.lexists("link")
    assert "when a worker dies" not in keeper.log


def _read(fd):
    try:
        return os.read(fd, 99)
    except BlockingIOError:
        return b""


async def test_a_serial_line_stays_open_and_takes_a_break():
    """Also while it is unplugged when the worker dies."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    os.symlink(os.ttyname(slave), "line")
    arguments = ("--chardev", "serial,id=c,path=line", "--port", "chardev=c,nr=1")
    qmp = ("--qmp", "unix:qmp,server=on,wait=off")
    async with kept(Path.cwd(), *arguments, *qmp) as keeper:
        client = QMPClient("test")
        await client.connect("qmp")
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            async with port_of(guest, keeper) as port:
                for text in (b"one", b"two"):
                    os.write(master, text)
                    await port.hears(text)
                    port.says(text)
                    await until(lambda text=text: _read(master) == text)
                    assert await client.execute("chardev-send-break", {"id": "c"}) == {}
                    await keeper.kill_until_served()
            os.close(slave)
            os.close(master)
            await keeper.logged("Input/output error")
            await keeper.kill_until_served()
        await client.disconnect()
        assert await keeper.stop() == 0
    assert "when a worker dies" not in keeper.log
    assert "is not allowed" not in keeper.log


@pytest.mark.parametrize("end", ["stop", "keeper dies", "kill"])
async def test_a_terminal_is_put_back_as_the_keeper_found_it(end):
    master, slave = pty.openpty()
    found = termios.tcgetattr(slave)
    try:
        arguments = ("--chardev", "stdio,id=c", "--port", "chardev=c,nr=1")
        async with kept(Path.cwd(), *arguments, stdin=slave, stdout=slave) as keeper:
            assert termios.tcgetattr(slave) != found
            for _ in range(2):
                await keeper.kill_until_served()
                assert termios.tcgetattr(slave) != found
            async with EmbeddedGuest("v", memory=32 << 20) as guest, port_of(guest, keeper) as port:
                os.write(master, b"typed")
                await port.hears(b"typed")
                port.says(b"shown")
                os.set_blocking(master, False)
                await until(lambda: _read(master) == b"shown")
            if end == "stop":
                assert await keeper.stop() == 0
            elif end == "kill":
                os.kill(keeper.worker, signal.SIGSTOP)
                keeper.process.send_signal(signal.SIGTERM)
                assert await keeper.stop(signal.SIGINT) == 1
            else:
                worker = keeper.worker
                keeper.process.kill()
                await keeper.logged("the keeper has ended")
                os.kill(worker, signal.SIGTERM)
                await keeper.logged("stopped")
            assert termios.tcgetattr(slave) == found
    finally:
        os.close(master)
        os.close(slave)
    assert "when a worker dies" not in keeper.log


async def test_standard_streams_that_are_sockets_block_again():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = ("--chardev", "stdio,id=c", "--port", "chardev=c,nr=1")
        fd = theirs.fileno()
        async with kept(Path.cwd(), *arguments, stdin=fd, stdout=fd) as keeper:
            assert not os.get_blocking(fd)
            await keeper.kill_until_served()
            assert await keeper.stop() == 0
        assert os.get_blocking(fd)


async def test_datagrams_go_on_from_the_same_port():
    """In the sandbox, and also those that came while no worker lived."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        where = f"host=127.0.0.1,port={peer.getsockname()[1]}"
        async with serving(f"udp,id=c,{where}") as (keeper, guest), port_of(guest, keeper) as port:
            port.says(b"first")
            data, source = await loop.sock_recvfrom(peer, 99)
            assert data == b"first"
            for text in (b"one", b"two"):
                os.kill(keeper.worker, signal.SIGSTOP)
                peer.sendto(text, source)
                await keeper.kill_until_served()
                await port.hears(text)
                port.says(text)
                assert await loop.sock_recvfrom(peer, 99) == (text, source)
    assert "bytes on their way may be lost: c (udp)" in keeper.log
    assert "is not allowed" not in keeper.log


@pytest.mark.parametrize("kind", ["null", "ringbuf"])
async def test_ends_that_nobody_has_go_on(kind):
    async with serving(f"{kind},id=c") as (keeper, guest), port_of(guest, keeper) as port:
        for _ in range(2):
            port.says(b"x" * 100_000)
            await port.writer.drain()
            await keeper.kill_until_served()
    assert ("bytes on their way may be lost: c (ringbuf)" in keeper.log) == (kind == "ringbuf")


async def come_again(hello):
    """A client of the console at con, which may go while it is greeted."""
    async with asyncio.timeout(DEADLINE):
        while True:
            with suppress(ConnectionError):
                return await Client.come("con", hello)


async def follow(client, wanted, deaths):
    """What a client of a console was shown up to a position, over as many connections as it took.

    Everything that it has is in ``deaths``, in order, so that the next one knows where it was.
    """
    while client.position < wanted():
        if not await client.take():
            deaths.append(client)
            resume = (client.welcome.stream, client.position)
            client.close()
            client = await come_again(Hello(resume=resume))
            assert client.position == resume[1]
    deaths.append(client)


@pytest.mark.parametrize("end", ["port", "console"])
async def test_who_is_attached_to_a_console_goes_on_without_a_gap(end):
    """Workers die at random moments under output, and no byte is lost or doubled."""
    chance = random.Random(7)
    arguments = ("--chardev", "console,id=c,path=con,scrollback=4M", f"--{end}", "chardev=c,nr=1")
    async with kept(Path.cwd(), *arguments) as keeper:
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            port = Port(*await port.open())
            sent, lives, wanted = bytearray(), [], 1 << 40
            client = await Client.come("con")
            following = asyncio.create_task(follow(client, lambda: wanted, lives))
            async with keeper.dying(chance):
                while keeper.kills < 12:
                    first = len(sent) // 10
                    lines = b"".join(b"%09d\n" % n for n in range(first, first + 500))
                    port.says(lines)
                    sent += lines
                    await port.writer.drain()
                    await asyncio.sleep(0.001)
            port.says(b"end\n")
            sent += b"end\n"
            wanted = len(sent)
            await following
            assert b"".join(life.shown for life in lives) == sent
            assert all(life.lost == [] for life in lives)
            assert len(lives) > 4
            lives[-1].type(b"typed")
            await port.hears(b"typed")
            lives[-1].close()
            port.writer.close()
        assert await keeper.stop() == 0
    assert "lost or doubled when a worker dies" not in keeper.log


async def test_an_agents_clients_meet_a_new_connection():
    """The agent's channel belongs to the router, which is in the worker."""
    arguments = ("--chardev", "spicevmc,id=c", "--port", "chardev=c,nr=1")
    async with kept(Path.cwd(), *arguments, "--agent-socket", "a") as keeper:
        reader, writer = await asyncio.open_unix_connection("a")
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            await keeper.kill_until_served()
            await reader.read()  # to its end
            await until(lambda: os.path.exists("a"))
            _, other = await asyncio.open_unix_connection("a")
            async with port_of(guest, keeper):
                pass
            other.close()
        writer.close()
        assert await keeper.stop() == 0
    assert "its connection ends, and a new one begins: c (spicevmc)" in keeper.log
    assert not os.path.exists("a")


async def test_what_waits_for_a_consoles_reader_goes_on_waiting():
    """Also when the guest has stopped, and from one death to the next."""
    os.mkfifo("p.in")
    os.mkfifo("p.out")
    arguments = ("--chardev", "pipe,id=c,path=p", "--console", "chardev=c,nr=1,name=con")
    data = random.Random(1).randbytes(500_000)
    async with kept(Path.cwd(), *arguments) as keeper:
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            writer.write(data)
            await writer.drain()  # a console does not wait
            await keeper.kill_until_served()
            writer.write(b"the end")
            await writer.drain()
            writer.close()
        for _ in range(2):
            await keeper.kill_until_served()
        heard = b""
        fd = os.open("p.out", os.O_RDONLY | os.O_NONBLOCK)

        def hear():
            nonlocal heard
            heard += _read(fd)
            return len(heard) >= len(data) + 7

        await until(hear, lambda: f"{len(heard)} bytes")
        os.close(fd)
        assert heard == data + b"the end"
        assert await keeper.stop() == 0
    assert "when a worker dies" not in keeper.log


SHARED = ("--port", "chardev=m,nr=1,name=a", "--port", "chardev=m,nr=2,name=b")


@asynccontextmanager
async def shared_ports(guest, *numbers):
    """Ports that share a host end, open for the block."""
    ports = []
    for nr in numbers:
        port = await guest.wait_port(nr=nr)
        await port.wait_host()
        ports.append(Port(*await port.open()))
    try:
        yield ports
    finally:
        for port in ports:
            port.writer.close()


async def test_ports_that_share_an_end_keep_their_focus_and_every_byte():
    """Workers die at random moments while both ports write and one, now and then, is typed to."""
    chance = random.Random(11)
    end = ("--chardev", "socket,id=m,path=m,server=on,wait=off,mux=on")
    async with kept(Path.cwd(), *end, *SHARED) as keeper:
        reader, writer = await asyncio.open_unix_connection("m")
        async with (
            EmbeddedGuest("v", memory=32 << 20) as guest,
            shared_ports(guest, 1, 2) as ports,
        ):
            said = [bytearray(), bytearray()]
            typed = [bytearray(), bytearray()]
            shown, focus = bytearray(), 1

            async def show():
                while piece := await reader.read(65536):
                    shown.extend(piece)

            showing = asyncio.create_task(show())
            async with keeper.dying(chance):
                count = 0
                while keeper.kills < 12:
                    for letter, port, bytes_said in zip("ab", ports, said, strict=True):
                        text = f"{letter}{count:08d}\n".encode() * 50
                        port.says(text)
                        bytes_said += text
                        await port.writer.drain()
                    text = f"{count:09d}".encode()
                    typed[focus] += text + b"\x01"
                    writer.write(text + b"\x01\x01" + b"\x01c")
                    await writer.drain()
                    focus = 1 - focus
                    count += 1
                    await asyncio.sleep(0.001)
            for port, wanted in zip(ports, typed, strict=True):
                await port.hears(wanted)
            writer.write(b"still")
            await ports[focus].hears(b"still")
            size = sum(map(len, said))
            await until(lambda: len(shown) >= size)
            assert sorted(shown) == sorted(said[0] + said[1])
            writer.close()
            await showing
        assert await keeper.stop() == 0
    assert "when a worker dies" not in keeper.log


async def test_ports_on_one_terminal_keep_their_focus_and_its_key_ends_the_service():
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    try:
        end = ("--chardev", "stdio,id=m,mux=on,signal=off")
        async with (
            kept(Path.cwd(), *end, *SHARED, stdin=slave, stdout=slave) as keeper,
            EmbeddedGuest("v", memory=32 << 20) as guest,
            shared_ports(guest, 1, 2) as (a, b),
        ):
            os.write(master, b"to b\x01cto a")
            await b.hears(b"to b")
            await a.hears(b"to a")
            os.write(master, b"\x01")
            await keeper.kill_until_served()
            os.write(master, b"cto b")
            await b.hears(b"to b")
            await keeper.kill_until_served()
            for port, text in ((a, b"a says"), (b, b"b says")):
                port.says(text)
                await until(lambda text=text: _read(master) == text)
            os.write(master, b"\x01x")
            await until(lambda: b"terminated" in _read(master))
            assert await keeper.process.wait() == 0
    finally:
        os.close(master)
        os.close(slave)
    assert "when a worker dies" not in keeper.log


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_typed_on_a_pipe_is_neither_lost_nor_doubled(seed):
    """Few deaths each: input alone changes nothing of what the keeper compares."""
    chance = random.Random(seed)
    os.mkfifo("p.in")
    os.mkfifo("p.out")
    end = ("--chardev", "pipe,id=m,path=p,mux=on")
    async with kept(Path.cwd(), *end, *SHARED) as keeper:
        fd = os.open("p.in", os.O_WRONLY | os.O_NONBLOCK)
        async with (
            EmbeddedGuest("v", memory=32 << 20) as guest,
            shared_ports(guest, 1, 2) as ports,
        ):
            typed, heard = [bytearray(), bytearray()], [bytearray(), bytearray()]

            async def hear(port, heard):
                while piece := await port.reader.read(65536):
                    heard += piece

            count = 0
            # Both at once: who reads nothing holds up what is typed to the other.
            hearing = [asyncio.create_task(hear(*each)) for each in zip(ports, heard, strict=True)]
            async with keeper.dying(chance):
                while keeper.kills < 4:
                    text = f"{count:09d}".encode()
                    with suppress(BlockingIOError):
                        os.write(fd, text + b"\x01c")
                        typed[1 - count % 2] += text
                        count += 1
                    await asyncio.sleep(0)
            await until(lambda: sum(map(len, heard)) >= sum(map(len, typed)))
            assert heard == typed
            for task in hearing:
                task.cancel()
        os.close(fd)
        assert await keeper.stop() == 0
    assert "when a worker dies" not in keeper.log
