"""Ctrl-C at every stage of every command: one is enough, and nothing but the command's own is said.

A stage begins with an event: a line of output, a socket that is there, a client that connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import end
from tests.support.waiting import until

TIMEOUT = 40.0
#: Seconds for a command to end, far below the time-outs of what it may have waited for.
SOON = 8.0
#: Processes at once.
AT_ONCE = 4
INTERRUPTED = {130, -signal.SIGINT}
Stage = Callable[["Command"], Awaitable[None]]


def processes_of(directory: Path) -> set[int]:
    """All that were started with this directory for temporary files, children's children too."""
    word = f"TMPDIR={directory}".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found - {os.getpid()}


class Command:
    """A command with its children in a process group of its own, as a shell's job is.

    Attributes:
        left: processes that were there after the command had ended.
    """

    server: Command | None = None

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, start: Any) -> None:
        self.process = process
        self.directory = directory
        self.peer = socket.socket(socket.AF_UNIX)
        self.start = functools.partial(start, directory=directory)
        self.text = ""
        self.left: set[int] = set()
        self._more = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(1 << 16):
            async with self._more:
                self.text += data.decode(errors="replace")
                self._more.notify_all()

    def ended(self) -> str:
        status = self.process.returncode
        return "" if status is None else f"it ended with {status}"

    async def said(self, text: str) -> None:
        async with asyncio.timeout(TIMEOUT), self._more:
            await self._more.wait_for(
                lambda: text in self.text or self.process.returncode is not None
            )
        assert text in self.text, self.text

    async def interrupt(self) -> int:
        """Send SIGINT to all of it, as a terminal does, and wait for the end."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            async with asyncio.timeout(SOON):
                status = await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"one SIGINT was not enough: {self.text}") from None
        self.left = processes_of(self.directory)
        await self.end()
        return status

    async def end(self) -> None:
        # What it started is in sessions of its own.
        for pid in processes_of(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.peer.close()
        await end(self.process, self._reading, session=True)


def said(text: str) -> Stage:
    return lambda command: command.said(text)


def server_said(text: str) -> Stage:
    """The server beside it logs this."""

    async def wait(command: Command) -> None:
        assert command.server is not None
        await command.server.said(text)

    return wait


async def driven(command: Command) -> None:
    """A guest drives the device that it serves."""
    await command.said("serving;")
    await command.start(*DRIVEN)
    await command.said("(data): ready")


async def between(command: Command) -> None:
    """A client is connected that says and reads nothing."""
    await there("m")(command)

    def listens() -> bool:
        """It does a moment after the file is there."""
        with contextlib.suppress(ConnectionRefusedError):
            command.peer.connect(str(command.directory / "m"))
            return True
        return False

    await until(listens)


def there(pattern: str) -> Stage:
    """A file is there."""

    async def wait(command: Command) -> None:
        await until(
            lambda: any(command.directory.glob(pattern)),
            lambda: f"{pattern} is not there; {command.text}",
            unless=command.ended,
        )

    return wait


def children(count: int) -> Stage:
    """So many processes are at work for it."""

    async def wait(command: Command) -> None:
        path = Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children")
        await until(
            lambda: len(path.read_text().split()) >= count,
            lambda: command.text,
            unless=command.ended,
        )

    return wait


#: Makes a process stop where it imports a module, as for a module that takes long to load, and one
#: that makes of a KeyboardInterrupt an error of its own.
STOPS = """\
import os, signal, sys
class Stops:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("STOPS_AT"):
            try:
                open("importing", "w").close()
                signal.pause()
            except KeyboardInterrupt:
                raise ImportError(name) from None
sys.meta_path.insert(0, Stops())
"""


@dataclass(frozen=True)
class Importing:
    """It imports this module."""

    module: str

    async def __call__(self, command: Command) -> None:
        await there("importing")(command)


class Stuck:
    """A listener at ``name`` that accepts, and says nothing."""

    def __init__(self, directory: Path, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(directory / name))
        self._socket.listen(16)
        self._socket.setblocking(False)
        self._clients: list[socket.socket] = []

    async def came(self, _: Command) -> None:
        client, _address = await asyncio.get_running_loop().sock_accept(self._socket)
        self._clients.append(client)
        await asyncio.get_running_loop().sock_recv(client, 1)

    def close(self) -> None:
        for each in (self._socket, *self._clients):
            each.close()


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Command]]]:
    started: list[Command] = []

    (tmp_path / "sitecustomize.py").write_text(STOPS)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONWARNINGS": "default", "PYTHONPATH": path}

    async def run(*arguments: str, directory: Path | None = None, stops_at: str = "") -> Command:
        directory = directory or tmp_path
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vring_serial", *arguments),
            cwd=directory,
            env={**environment, "TMPDIR": str(directory), "STOPS_AT": stops_at},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(Command(process, directory, run))
        return started[-1]

    yield run
    for command in started:
        await command.end()


STUCK = "stuck"
SERVE = ("serve", "--vhost-user", "v")
DRIVEN = ("guest", "--vhost-user", "v")
SHARED = ("agent", "--socket", "a")
DATA = ("--chardev", "socket,id=d,path=d,server=on,wait=off", "--port", "chardev=d,nr=2,name=data")
NULL = ("--chardev", "null,id=n", "--port", "chardev=n")
WAITS = ("--chardev", "socket,id=n,path=c,server=on", "--port", "chardev=n")
CALLS = ("--chardev", "socket,id=n,path=none,reconnect=1", "--port", "chardev=n")
AGENT = ("--chardev", "spicevmc,id=a", "--port", "chardev=a", "--agent-socket", "a")
BUSY_GUEST = ("guest", "--vhost-user", STUCK)
BUSY_CLIENT = ("agent", "--socket", STUCK, "--timeout", "30")
DEMO = ("demo", "--size", "512")
BENCH = ("bench", "transfer", "--rounds", "1000")

#: Command, stage, and what it may end with beside being interrupted.
CASES: dict[str, tuple[tuple[str, ...], Stage | str, set[int]]] = {
    **{
        f"{arguments[0]} imports {module}": (arguments, Importing(module), set())
        for arguments in ((*SERVE, *NULL), BUSY_GUEST, (*BUSY_CLIENT, "caps"), DEMO, BENCH)
        for module in ("vring_serial.cli", "click", f"vring_serial.cli.{arguments[0]}", "asyncio")
    },
    "serve waits for a client": ((*SERVE, *WAITS), there("c"), {0}),
    "serve calls": ((*SERVE, *CALLS), said("waiting for a frontend"), {0}),
    "serve waits for a frontend": ((*SERVE, *NULL), said("serving;"), {0}),
    "serve vfio-user": (("serve", "--vfio-user", "v", *NULL), said("serving;"), {0}),
    "serve connects": ((*SERVE, *NULL, "--connect"), said("serving;"), {0}),
    "serve has a terminal": (
        (*SERVE, "--chardev", "pty,id=n,path=pty", "--console", "chardev=n"),
        there("pty"),
        {0},
    ),
    "serve has a pid file": ((*SERVE, *NULL, "--pid-file", "pid"), there("pid"), {0}),
    "serve has a log file": ((*SERVE, *NULL, "--log-file", "log"), there("log"), {0}),
    "serve has an agent": ((*SERVE, *AGENT), there("a"), {0}),
    "guest waits for the backend": (BUSY_GUEST, STUCK, set()),
    "guest --list waits": ((*BUSY_GUEST, "--list"), STUCK, set()),
    "guest --open waits": ((*BUSY_GUEST, "--open", "1"), STUCK, set()),
    "agent caps waits": ((*BUSY_CLIENT, "caps"), STUCK, set()),
    "agent resize waits": ((*BUSY_CLIENT, "resize", "10x10"), STUCK, set()),
    "agent clipboard get waits": ((*BUSY_CLIENT, "clipboard", "get"), STUCK, set()),
    "agent clipboard set waits": ((*BUSY_CLIENT, "clipboard", "set", "x"), STUCK, set()),
    "agent clipboard watch waits": ((*BUSY_CLIENT, "clipboard", "watch"), STUCK, set()),
    "agent send waits": ((*BUSY_CLIENT, "send", sys.executable), STUCK, set()),
    "agent --timeout": (("agent", "--timeout", "3600", *BUSY_CLIENT[1:3], "caps"), STUCK, set()),
    "agent monitor watches": ((*BUSY_CLIENT, "monitor"), STUCK, set()),
    "agent monitor listens": ((*BUSY_CLIENT, "monitor", "--listen", "m"), there("m"), set()),
    **{
        f"demo after {line}": (DEMO, said(f"✓ {line}:"), set())
        for line in (
            "controller",
            "guest",
            "port 1",
            "port 2",
            "agent",
            "resolution",
            "clipboard to the guest",
            "clipboard from the guest",
            "guest to host",
        )
    },
    "serve has a guest": ((*SERVE, *AGENT, *DATA), driven, {0}),
    "guest serves nothing": (DRIVEN, said("guest: port 2 added"), {0}),
    "guest echoes": ((*DRIVEN, "--echo", "data"), said("port 2 is called data"), {0}),
    "guest answers": ((*DRIVEN, "--bulk", "2"), said("port 2 is called data"), {0}),
    "guest has an agent": ((*DRIVEN, "--agent"), said("port 2 is called data"), {0}),
    "guest relays": ((*DRIVEN, "--open", "data"), server_said("(data): opened by the guest"), {0}),
    "guest waits for a port": ((*DRIVEN, "--echo", "none"), said("port 2 is called data"), {0}),
    "agent sends": ((*SHARED, "send", "large"), there("downloads/*"), set()),
    "agent monitors": ((*SHARED, "monitor"), said("guest: port 1"), set()),
    "agent monitors in between": ((*SHARED, "monitor", "--listen", "m"), between, set()),
    # For every one of its processes, and once more where all are there.
    **{f"bench has {n} processes": (BENCH, children(n), set()) for n in (1, 2, 3)},
    "bench latency": (("bench", "latency", "--pings", "1000000"), children(3), set()),
    "bench rings": (("bench", "rings"), Importing("vring_serial.bench.rings"), set()),
}


def check(command: Command, status: int, allowed: set[int]) -> None:
    assert status in INTERRUPTED | allowed, f"{status}: {command.text}"
    for word in ("Traceback", "never awaited", "Exception ignored", "internal error", "Warning"):
        assert word not in command.text, command.text


async def test_one_interrupt_ends_every_command_at_every_stage(
    start: Callable[..., Awaitable[Command]], tmp_path: Path
) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, name: str) -> None:
        arguments, stage, allowed = CASES[name]
        directory = tmp_path / str(number)
        directory.mkdir()
        listener: Stuck | None = None
        async with slots:
            if STUCK in arguments:
                listener = Stuck(directory, STUCK)
            server: Command | None = None
            try:
                if arguments[0] in ("guest", "agent") and STUCK not in arguments:
                    # There are a device, and for those who talk to one an agent in a guest.
                    server = await start(*SERVE, *AGENT, *DATA, directory=directory)
                    await server.said("serving;")
                if arguments[:3] == SHARED:
                    assert server is not None
                    (directory / "downloads").mkdir()
                    (directory / "large").touch()
                    # The guest wants to have room for it.
                    os.truncate(directory / "large", shutil.disk_usage(directory).free // 2)
                    downloads = ("--agent", "--downloads", "downloads")
                    await start(*DRIVEN, *downloads, directory=directory)
                    await server.said("ready, with")
                stops_at = stage.module if isinstance(stage, Importing) else ""
                command = await start(*arguments, directory=directory, stops_at=stops_at)
                command.server = server
                if stage == STUCK:
                    assert listener is not None
                    async with asyncio.timeout(TIMEOUT):
                        await listener.came(command)
                else:
                    assert callable(stage)
                    await stage(command)
                check(command, await command.interrupt(), allowed)
                if arguments[0] in ("bench", "demo"):
                    assert not command.left, "processes were left behind"
            finally:
                if listener is not None:
                    listener.close()

    tasks = (one(number, name) for number, name in enumerate(CASES))
    ended = zip(CASES, await asyncio.gather(*tasks, return_exceptions=True), strict=True)
    failed = [f"{name}: {error!r}" for name, error in ended if error is not None]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_bench_that_is_killed_leaves_no_process_behind(
    start: Callable[..., Awaitable[Command]], tmp_path: Path, count: int
) -> None:
    command = await start(*BENCH)
    await children(count)(command)
    assert len(processes_of(tmp_path)) > count
    os.kill(command.process.pid, signal.SIGKILL)
    await until(lambda: not processes_of(tmp_path))
