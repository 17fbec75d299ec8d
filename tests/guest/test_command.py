"""``vring guest`` as a process, against ``vring serve`` as another."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.processes import end, end_now, running
from tests.support.waiting import DEADLINE, until, until_file_says, wait_until
from vring_serial.cli import vring

PORTS = {1: "one", 2: "two", 3: "com.redhat.spice.0"}


class Command:
    """A ``vring`` process; killed with its test."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, *arguments: str, stdin: int | None = None) -> Command:
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "vring_serial", *arguments),
                stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        )

    async def log_line(self, part: str) -> str:
        """The next line on standard error that has ``part`` in it."""
        assert self.process.stderr is not None
        seen = []
        while line := (await self.process.stderr.readline()).decode():
            seen.append(line)
            if part in line:
                return line
        raise AssertionError(f"no {part!r} in {seen}")

    async def end(self, *, send: int | None = None, stdin: bytes | None = None) -> tuple[int, str]:
        """Exit status and what is left of standard output."""
        if send is not None:
            self.process.send_signal(send)
        out, err = await self.process.communicate(stdin)
        self.err = err.decode()
        return await self.process.wait(), out.decode()

    async def kill(self) -> None:
        await end(self.process)


@pytest.fixture
async def commands() -> AsyncIterator[type[Command]]:
    """Starts commands and kills what is left of them."""
    started: list[Command] = []

    class Tracked(Command):
        @classmethod
        async def start(cls, *arguments: str, stdin: int | None = None) -> Command:
            started.append(await super().start(*arguments, stdin=stdin))
            return started[-1]

    yield Tracked
    for command in started:
        await command.kill()


def serve_arguments(directory: Path) -> list[str]:
    """``vring serve`` with its ports on unix sockets that have the ports' names."""
    arguments = ["serve", "--vhost-user", f"{directory}/vu"]
    for nr, name in PORTS.items():
        socket = f"socket,id={name},path={directory}/{name},server=on,wait=off"
        arguments += ["--chardev", socket, "--port", f"chardev={name},nr={nr},name={name}"]
    return arguments


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with ``vring serve``'s sockets; one process for all tests."""
    directory = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "vring_serial", *serve_arguments(directory)]
    with open(directory / "log", "wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            wait_until(lambda: b"waiting for a frontend" in (directory / "log").read_bytes())
            yield directory
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            end_now(process)


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(path, limit=1 << 20)


async def test_echo_and_bulk_in_three_processes(served: Path, commands: type[Command]) -> None:
    guest = await commands.start(
        *("guest", "--vhost-user", f"{served}/vu", "--echo", "one", "--bulk", "2")
    )
    await guest.log_line("port 1 is called one")
    reader, writer = await connect(served / "one")
    bulk_reader, bulk_writer = await connect(served / "two")
    bulk_writer.write(b"send 8000000\n")
    data = os.urandom(8_000_000)
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    bulk = await bulk_reader.readexactly(8_000_000)
    answer = await bulk_reader.readline()
    assert answer == f"sha256 {hashlib.sha256(bulk).hexdigest()}\n".encode()
    writer.close()
    await guest.log_line("port 1 closed by the host")
    reader, writer = await connect(served / "one")  # the service goes on with the next host
    writer.write(b"again")
    assert await reader.readexactly(5) == b"again"
    assert (await guest.end(send=signal.SIGTERM))[0] == 0
    writer.close()
    bulk_writer.close()


async def test_list(served: Path, commands: type[Command]) -> None:
    guest = await commands.start("guest", "--vhost-user", f"{served}/vu", "--list")
    status, out = await guest.end()
    assert status == 0
    for nr, name in PORTS.items():
        assert any(
            str(nr) in line and name in line and "closed" in line for line in out.split("\n")
        )


async def test_open_is_the_standard_streams(served: Path, commands: type[Command]) -> None:
    reader, writer = await connect(served / "one")
    guest = await commands.start(
        *("guest", "--vhost-user", f"{served}/vu", "--open", "one"), stdin=asyncio.subprocess.PIPE
    )
    writer.write(b"from the host\n")
    assert guest.process.stdout is not None
    assert await guest.process.stdout.readline() == b"from the host\n"
    data = os.urandom(3_000_000)
    ending = asyncio.create_task(guest.end(stdin=data))
    assert await reader.readexactly(len(data)) == data
    assert await ending == (0, "")
    writer.close()


async def test_open_ends_with_the_host(served: Path, commands: type[Command]) -> None:
    _, writer = await connect(served / "one")
    guest = await commands.start(
        *("guest", "--vhost-user", f"{served}/vu", "--open", "1", "--no-input")
    )
    writer.write(b"all ")
    assert guest.process.stdout is not None
    # A host that leaves before the guest has the port open is let go at once (decision 8).
    assert await guest.process.stdout.readexactly(4) == b"all "
    writer.write(b"there is")
    writer.close()
    assert await guest.end() == (0, "there is")


async def test_open_waits_for_a_host_that_stays(served: Path, commands: type[Command]) -> None:
    _, left = await connect(served / "one")
    left.write(b"from one that left")
    left.close()
    await until_file_says(served / "log", "peer left; 18 bytes that it had sent were not read")
    guest = await commands.start(
        *("guest", "--vhost-user", f"{served}/vu", "--open", "1", "--no-input")
    )
    _, writer = await connect(served / "one")
    writer.write(b"from one that stays\n")
    assert guest.process.stdout is not None
    assert await guest.process.stdout.readline() == b"from one that stays\n"
    writer.close()
    assert await guest.end() == (0, "")


async def test_open_tells_of_what_the_host_did_not_take(
    commands: type[Command], tmp_path: Path
) -> None:
    server = await commands.start(*serve_arguments(tmp_path))
    await server.log_line("waiting for a frontend")
    with socket.socket(socket.AF_UNIX) as host:  # no stream, whose reader takes megabytes by itself
        host.connect(f"{tmp_path}/two")
        host.setblocking(False)
        guest = await commands.start(
            *("guest", "--vhost-user", f"{tmp_path}/vu", "--open", "two"),
            stdin=asyncio.subprocess.PIPE,
        )
        stdin = guest.process.stdin
        assert stdin is not None
        stdin.write(bytes(8 << 20))
        received = await asyncio.get_running_loop().sock_recv(host, 100)
        assert received == bytes(len(received))
        # Of a MiB that the guest took, the socket and the guest's standard input hold less than
        # three quarters: the rest is in the port.
        await until(lambda: stdin.transport.get_write_buffer_size() <= 7 << 20)
    status, _ = await guest.end()
    assert status == 1
    assert "port 2 (two): the host end closed before it took all that was sent to it" in guest.err


async def test_open_with_the_standard_input_closed_or_unreadable(
    served: Path, commands: type[Command]
) -> None:
    for redirect, status, said in (("<&-", 0, ""), ("0>/dev/null", 1, "vring: standard input: ")):
        arguments = [sys.executable, "-m", "vring_serial", "guest"]
        arguments += ["--vhost-user", f"{served}/vu", "--open", "one"]
        async with running(
            *("sh", "-c", f'exec "$@" {redirect}', "sh", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        ) as process:
            async with asyncio.timeout(DEADLINE):
                _, err = await process.communicate()
        assert (process.returncode, said in err.decode()) == (status, True), err.decode()
        assert "Traceback" not in err.decode()


async def test_the_agent_announces_itself(served: Path, commands: type[Command]) -> None:
    guest = await commands.start("guest", "--vhost-user", f"{served}/vu", "--agent")
    reader, writer = await connect(served / "com.redhat.spice.0")
    chunk = await reader.readexactly(28)
    assert chunk[:4] == b"\1\0\0\0"  # for the client
    assert chunk[8:16] == b"\1\0\0\0\6\0\0\0"  # ANNOUNCE_CAPABILITIES
    writer.close()
    assert (await guest.end(send=signal.SIGINT))[0] == 0


async def test_the_backend_is_killed(commands: type[Command], tmp_path: Path) -> None:
    backend = await commands.start(*serve_arguments(tmp_path), "--no-keeper")
    await backend.log_line("waiting for a frontend")
    guest = await commands.start("guest", "--vhost-user", f"{tmp_path}/vu", "--echo", "one")
    await guest.log_line("port 1 is called one")
    backend.process.kill()
    status, _ = await guest.end()
    assert status == 1
    assert guest.err.strip().endswith("vu: the backend closed the connection")
    assert "Traceback" not in guest.err


async def test_the_guest_is_killed(served: Path, commands: type[Command]) -> None:
    for _ in range(2):
        guest = await commands.start("guest", "--vhost-user", f"{served}/vu", "--echo", "one")
        await guest.log_line("port 1 is called one")
        reader, writer = await connect(served / "one")
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        await guest.kill()
        writer.close()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--open", "three", "--wait", "0.1"], "no port 'three' in 0.1 s; the device's ports: 1"),
        (["--echo", "9", "--wait", "0.1"], "no port 9 in 0.1 s"),
    ],
)
async def test_a_port_that_is_not_there(
    served: Path, commands: type[Command], arguments: list[str], why: str
) -> None:
    guest = await commands.start("guest", "--vhost-user", f"{served}/vu", *arguments)
    assert await guest.end() == (1, "")
    assert why in guest.err.splitlines()[-1]
    assert "Traceback" not in guest.err


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["--list", "--echo", "one"], 2, "exclude one another"),
        (["--queue-size", "3"], 2, "queue size 3 is not a power of two up to 32768"),
        (["--timeout", "0"], 2, "timeout"),
        (["--memory", "-1"], 2, "bytes of RAM are less than 1 MiB"),
        (["--list"], 1, "none: cannot connect to the backend: No such file or directory"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    why: str,
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with pytest.raises(SystemExit) as exit_:
        vring.main(["guest", "--vhost-user", f"{tmp_path}/none", *arguments])
    assert exit_.value.code == status
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err
    assert len(err.splitlines()) == 1
