"""``vring vhost-user`` as a management layer finds, asks and starts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import TIMEOUT, Server, close, connect, guest_of
from vring_serial.cli.vhost_user import PROGRAM
from vring_serial.guest.guest import EmbeddedGuest

#: VHostUserBackendType of QEMU's docs/interop/vhost-user.json.
TYPES = (
    *("9p", "balloon", "block", "caif", "console", "crypto", "gpu", "input", "net", "rng"),
    *("rpmsg", "rproc-serial", "scsi", "vsock", "fs"),
)
PORT = ("--chardev", "socket,id=c,path=c,server=on,wait=off", "--port", "chardev=c,name=p")


def vring_vhost_user(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program that management layers start, to its end."""
    return subprocess.run(
        [binary(), *arguments], capture_output=True, text=True, timeout=TIMEOUT, **options
    )


def binary() -> str:
    """What the installation says in its scripts."""
    import sysconfig

    return os.path.join(sysconfig.get_path("scripts"), PROGRAM)


@pytest.fixture
def description(tmp_path: Path) -> dict[str, Any]:
    """What a management layer reads: the file that an administrator made."""
    file = tmp_path / "50-vring.json"
    with file.open("w") as output:
        subprocess.run([binary(), "--print-description"], stdout=output, check=True)
    described = json.loads(file.read_text())
    file.unlink()
    assert isinstance(described, dict)
    return described


@contextlib.asynccontextmanager
async def started(
    description: dict[str, Any], directory: Path, *arguments: str, fd: int | None = None
) -> AsyncIterator[Server]:
    process = await asyncio.create_subprocess_exec(
        *(description["binary"], *arguments),
        cwd=directory,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=() if fd is None else (fd,),
        start_new_session=True,
    )
    server = Server(process)
    try:
        yield server
    finally:
        await server.kill()


async def both_ways(guest: EmbeddedGuest, end: Path) -> None:
    reader, writer = await connect(end)
    port = await guest.wait_port(name="p")
    await port.wait_host()
    from_host, to_host = await port.open()
    to_host.write(b"from the guest")
    assert await reader.readexactly(14) == b"from the guest"
    writer.write(b"from the host")
    assert await from_host.readexactly(13) == b"from the host"
    to_host.close()
    await close(writer)


def test_the_description_fits_the_schema(description: dict[str, Any]) -> None:
    assert set(description) == {"description", "type", "binary", "tags"}
    assert description["type"] in TYPES
    assert isinstance(description["description"], str)
    assert all(isinstance(tag, str) for tag in description["tags"])
    program = Path(description["binary"])
    assert program.is_absolute()
    assert program.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("others", [(), ("--fd", "x", "--no-such-option", "word")])
def test_capabilities_are_printed_and_nothing_is_done(
    description: dict[str, Any], tmp_path: Path, others: tuple[str, ...]
) -> None:
    arguments = ("--socket-path=v", *others, "--print-capabilities")
    result = vring_vhost_user(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {"type": description["type"]}
    assert os.listdir(tmp_path) == []


async def test_it_serves_at_a_path(description: dict[str, Any], tmp_path: Path) -> None:
    async with started(description, tmp_path, "--socket-path=v", *PORT) as server:
        await server.logged("serving;")
        for _ in range(2):
            async with guest_of(tmp_path / "v") as guest, asyncio.timeout(TIMEOUT):
                await both_ways(guest, tmp_path / "c")
        assert await server.stop() == 0
    assert os.listdir(tmp_path) == []


async def test_it_serves_on_a_descriptor_that_listens(
    description: dict[str, Any], tmp_path: Path
) -> None:
    """The path belongs to who made it; one frontend follows another."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "given"))
        listener.listen()
        arguments = (f"--fd={listener.fileno()}", *PORT)
        async with started(description, tmp_path, *arguments, fd=listener.fileno()) as server:
            for _ in range(2):
                async with guest_of(tmp_path / "given") as guest, asyncio.timeout(TIMEOUT):
                    await both_ways(guest, tmp_path / "c")
            assert await server.stop() == 0
    assert os.listdir(tmp_path) == ["given"]


@pytest.mark.parametrize("how", ["the frontend leaves", "SIGTERM"])
async def test_it_serves_on_a_connection(
    description: dict[str, Any], tmp_path: Path, how: str
) -> None:
    """Its end is the end of the program, which no other frontend could reach."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "frontend"))
        listener.listen()
        listener.setblocking(False)
        guest = guest_of(tmp_path / "frontend")
        starting = asyncio.create_task(guest.start())
        async with asyncio.timeout(TIMEOUT):
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    (tmp_path / "frontend").unlink()
    with connection:
        fd = connection.fileno()
        async with started(description, tmp_path, f"--fd={fd}", *PORT, fd=fd) as server:
            connection.close()
            async with asyncio.timeout(TIMEOUT):
                await starting
                try:
                    await both_ways(guest, tmp_path / "c")
                    if how == "SIGTERM":
                        assert await server.stop() == 0
                finally:
                    await guest.aclose()
            assert await server.exit_status() == 0
    assert os.listdir(tmp_path) == []


async def test_a_frontend_that_left_before_it_was_served(
    description: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        arguments = (f"--fd={theirs.fileno()}", *PORT)
        async with started(description, tmp_path, *arguments, fd=theirs.fileno()) as server:
            assert await server.exit_status() == 0
    assert "Traceback" not in "\n".join(server.lines)


async def test_without_ports_there_is_a_console(
    description: dict[str, Any], tmp_path: Path
) -> None:
    async with started(description, tmp_path, "--socket-path=v") as server:
        terminal = (await server.logged("console 0")).rpartition("pty:")[2]
        await server.logged("serving;")
        async with guest_of(tmp_path / "v") as guest, asyncio.timeout(TIMEOUT):
            descriptor = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
            try:
                console = await guest.wait_port(nr=0)
                await server.logged("port 0: opened by the host")
                _, to_host = await console.open()
                to_host.write(b"login: ")
                assert await asyncio.to_thread(os.read, descriptor, 100) == b"login: "
                to_host.close()
            finally:
                os.close(descriptor)
        assert await server.stop() == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "Missing option '--socket-path' or '--fd'"),
        (("--socket-path=v", "--fd=3"), "either --socket-path or --fd, and not both"),
        (("--fd=-1",), "'--fd': -1 is not in the range x>=0"),
        (("--fd=three",), "'--fd': 'three' is not a valid integer"),
        (("--fd=77",), "--fd 77: it is no open socket: Bad file descriptor"),
        ((f"--fd={10**30}",), "there is no such descriptor"),
        (("--fd=0",), "--fd 0: it is no open socket: Socket operation on non-socket"),
        (("--socket-path=",), "'--socket-path': it is empty"),
        (("--socket-path=v", "--max-ports=0"), "--max-ports"),
        (("--socket-path=v", "--connect"), "No such option '--connect'"),
        (("--socket-path=v", "--metrics=1"), "No such option '--metrics'"),
        (("--socket-path=" + 108 * "v",), "a unix socket's has 1 to 107"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], error: str, tmp_path: Path) -> None:
    result = vring_vhost_user(*arguments, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert (result.returncode, result.stdout) == (2, "")
    assert error in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("family", "kind", "error"),
    [
        (socket.AF_UNIX, socket.SOCK_DGRAM, "it is no unix stream socket"),
        (socket.AF_INET, socket.SOCK_STREAM, "it is no unix stream socket"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "it neither listens nor is connected"),
    ],
)
def test_sockets_that_serve_nobody(
    family: socket.AddressFamily, kind: socket.SocketKind, error: str, tmp_path: Path
) -> None:
    with socket.socket(family, kind) as given:
        fd = given.fileno()
        result = vring_vhost_user(f"--fd={fd}", cwd=tmp_path, pass_fds=(fd,))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"--fd {fd}: {error}" in result.stderr


def test_a_domain_with_two_controllers_needs_a_program_for_each(tmp_path: Path) -> None:
    domain = Path(__file__).parents[2] / "examples/two-controllers.xml"
    result = vring_vhost_user("--socket-path=v", "--domain", str(domain), cwd=tmp_path)
    assert result.returncode == 2
    assert "--socket-path: 1 given, 2 needed" in result.stderr
