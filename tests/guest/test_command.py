"""``vring guest`` as a process, against ``vring serve`` as another."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

PORTS = {1: "one", 2: "two", 3: "com.redhat.spice.0", 4: "desktop"}


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
        if self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()


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


@pytest.fixture
async def served(commands: type[Command], tmp_path: Path) -> Command:
    """``vring serve`` with its ports on unix sockets that have the ports' names."""
    arguments = ["serve", "--vhost-user", f"{tmp_path}/vu"]
    for nr, name in PORTS.items():
        socket = f"socket,id={name},path={tmp_path}/{name},server=on,wait=off"
        arguments += ["--chardev", socket, "--port", f"chardev={name},nr={nr},name={name}"]
    command = await commands.start(*arguments)
    await command.log_line("waiting for a frontend")
    return command


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(path, limit=1 << 20)


async def test_echo_and_bulk_in_three_processes(
    served: Command, commands: type[Command], tmp_path: Path
) -> None:
    guest = await commands.start(
        *("guest", "--vhost-user", f"{tmp_path}/vu", "--echo", "one", "--bulk", "2")
    )
    await guest.log_line("port 1 is called one")
    reader, writer = await connect(tmp_path / "one")
    bulk_reader, bulk_writer = await connect(tmp_path / "two")
    bulk_writer.write(b"send 8000000\n")
    data = os.urandom(8_000_000)
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    bulk = await bulk_reader.readexactly(8_000_000)
    answer = await bulk_reader.readline()
    assert answer == f"sha256 {hashlib.sha256(bulk).hexdigest()}\n".encode()
    writer.close()
    await guest.log_line("port 1 closed by the host")
    reader, writer = await connect(tmp_path / "one")  # the service goes on with the next host
    writer.write(b"again")
    assert await reader.readexactly(5) == b"again"
    assert (await guest.end(send=signal.SIGTERM))[0] == 0
    writer.close()
    bulk_writer.close()
    await served.log_line("frontend gone")


async def test_list(served: Command, commands: type[Command], tmp_path: Path) -> None:
    guest = await commands.start("guest", "--vhost-user", f"{tmp_path}/vu", "--list")
    status, out = await guest.end()
    assert status == 0
    for nr, name in PORTS.items():
        assert any(
            str(nr) in line and name in line and "closed" in line for line in out.split("\n")
        )


async def test_open_is_the_standard_streams(
    served: Command, commands: type[Command], tmp_path: Path
) -> None:
    reader, writer = await connect(tmp_path / "one")
    guest = await commands.start(
        *("guest", "--vhost-user", f"{tmp_path}/vu", "--open", "one"), stdin=asyncio.subprocess.PIPE
    )
    writer.write(b"from the host\n")
    assert guest.process.stdout is not None
    assert await guest.process.stdout.readline() == b"from the host\n"
    data = os.urandom(3_000_000)
    ending = asyncio.create_task(guest.end(stdin=data))
    assert await reader.readexactly(len(data)) == data
    assert await ending == (0, "")
    writer.close()


async def test_open_ends_with_the_host(
    served: Command, commands: type[Command], tmp_path: Path
) -> None:
    _, writer = await connect(tmp_path / "one")
    writer.write(b"all there is")
    writer.close()
    guest = await commands.start(
        *("guest", "--vhost-user", f"{tmp_path}/vu", "--open", "1", "--no-input")
    )
    assert await guest.end() == (0, "all there is")


async def test_the_agent_and_its_desktop(
    served: Command, commands: type[Command], tmp_path: Path
) -> None:
    guest = await commands.start(
        *("guest", "--vhost-user", f"{tmp_path}/vu", "--agent", "--desktop", "desktop")
    )
    reader, writer = await connect(tmp_path / "desktop")

    async def ask(request: bytes) -> dict[str, object]:
        writer.write(request + b"\n")
        answer: dict[str, object] = json.loads(await reader.readline())
        return answer

    assert await ask(b'{"do": "resolution"}') == {"result": None}
    assert await ask(b'{"do": "copy", "text": "%s"}' % (b"x" * 200_000)) == {"result": None}
    for nonsense in (b"", b"[", b'{"do": "dance"}', b'{"do": "copy", "text": 1}', b"\xff"):
        assert "error" in await ask(nonsense)
    agent_reader, agent_writer = await connect(tmp_path / "com.redhat.spice.0")
    assert (await agent_reader.readexactly(4)) == b"\1\0\0\0"  # a chunk for the client
    agent_writer.close()
    writer.close()
    assert (await guest.end(send=signal.SIGINT))[0] == 0


async def test_the_backend_is_killed(
    served: Command, commands: type[Command], tmp_path: Path
) -> None:
    guest = await commands.start("guest", "--vhost-user", f"{tmp_path}/vu", "--echo", "one")
    await guest.log_line("port 1 is called one")
    served.process.kill()
    status, _ = await guest.end()
    assert status == 1
    assert guest.err.strip().endswith("vu: the backend closed the connection")
    assert "Traceback" not in guest.err


async def test_the_guest_is_killed(
    served: Command, commands: type[Command], tmp_path: Path
) -> None:
    for _ in range(2):
        guest = await commands.start("guest", "--vhost-user", f"{tmp_path}/vu", "--echo", "one")
        await guest.log_line("port 1 is called one")
        reader, writer = await connect(tmp_path / "one")
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        await guest.kill()
        await served.log_line("frontend gone")
        writer.close()


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["--list", "--echo", "one"], 2, "exclude one another"),
        (["--desktop", "one"], 2, "--desktop needs --agent"),
        (["--queue-size", "3"], 2, "queue size 3"),
        (["--timeout", "0"], 2, "timeout"),
        (
            ["--open", "three", "--wait", "0.1"],
            1,
            "no port 'three' in 0.1 s; the device's ports: 1",
        ),
        (["--echo", "9", "--wait", "0.1"], 1, "no port 9 in 0.1 s"),
    ],
)
async def test_what_cannot_be(
    served: Command,
    commands: type[Command],
    tmp_path: Path,
    arguments: list[str],
    status: int,
    why: str,
) -> None:
    guest = await commands.start("guest", "--vhost-user", f"{tmp_path}/vu", *arguments)
    assert await guest.end() == (status, "")
    assert why in guest.err.splitlines()[-1]
    assert "Traceback" not in guest.err


async def test_no_backend(commands: type[Command], tmp_path: Path) -> None:
    guest = await commands.start("guest", "--vhost-user", f"{tmp_path}/none", "--list")
    assert await guest.end() == (1, "")
    assert guest.err == (
        f"vring: {tmp_path}/none: cannot connect to the backend: No such file or directory\n"
    )
