"""README's examples run as they stand, with guests."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import textwrap
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.processes import running
from tests.support.terminals import Terminal, on_terminal
from tests.support.vfio_guest import VfioGuest
from tests.support.waiting import DEADLINE, until, until_file_says
from vring_serial import BackendClosedError, EmbeddedGuest, GuestAgent, Monitor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROMPT = "reader$ "


def listens(path: Path) -> bool:
    """Return whether somebody accepts at a unix socket's path, without connecting to it."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if fields[-1] == str(path) and int(fields[3], 16) & 0x10000:  # __SO_ACCEPTCON
            return True
    return False


async def test_the_example_with_a_guest(tmp_path: Path) -> None:
    path = tmp_path / "vring.sock"
    example = EXAMPLE.replace("/tmp/vring.sock", str(path))
    command = (sys.executable, "-W", "error", "-c", example)
    async with running(*command, stderr=asyncio.subprocess.PIPE) as process:
        await until(lambda: listens(path), "the example does not listen")
        agent = GuestAgent()
        async with EmbeddedGuest(str(path), memory=32 << 20) as guest:
            port = await guest.wait_port(name="com.redhat.spice.0")
            with pytest.raises(BackendClosedError):  # the example ends, and its device with it
                await agent.run(*await port.open())
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert agent.monitors == (Monitor(1920, 1080),)


class Reader:
    """Somebody who types what README says, in a shell on a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self._typed_at = 0

    @property
    def said(self) -> str:
        """What was printed since the last line was typed, without its echo."""
        return self.terminal.text[self._typed_at :].replace("\r", "").partition("\n")[2]

    def type(self, line: str) -> None:
        """Type a line."""
        self._typed_at = len(self.terminal.text)
        self.terminal.press(f"{line}\n".encode())

    async def sees(self, text: str, count: int = 1) -> None:
        """Wait until that is printed."""
        await until(lambda: self.said.count(text) >= count, lambda: f"{text!r} in {self.said!r}")

    async def runs(self, line: str) -> str:
        """Type a line; return what it printed when it is done."""
        self.type(line)
        await self.sees(PROMPT)
        return self.said.partition(PROMPT)[0]


def operators_day(run: Path, port: int) -> list[str]:
    """The lines of the section, with the files and the TCP port of a test."""
    section = re.search(r"^## An operator's day\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    assert section is not None
    block = re.search(r"(?:^    .*\n)+", section[1], re.MULTILINE)
    assert block is not None
    text = textwrap.dedent(block[0]).replace("/run/vring", str(run)).replace("9500", str(port))
    return text.splitlines()


@pytest.mark.peer("curl")
async def test_an_operators_day_in_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)  # short paths of sockets, for the guests
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        tcp = free.getsockname()[1]
    lines = operators_day(run, tcp)
    assert len(lines) == 10
    serve, export, status, add, plug, change, attach, rotate, scrape, shell = lines
    example = (ROOT / "examples" / "two-vms.toml").read_text()
    (tmp_path / "examples").mkdir()
    example = example.replace("/run/vring", str(run)).replace("9500", str(tcp))
    (tmp_path / "examples" / "two-vms.toml").write_text(example)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PS1": PROMPT,
    }
    environment.pop("VRING_QMP", None)
    bash = ("bash", "--norc", "--noprofile", "--noediting", "-i")
    async with AsyncExitStack() as stack:
        terminal = await on_terminal(tmp_path, program=bash, environment=environment)
        stack.push_async_callback(terminal.aclose)
        await terminal.said(re.escape(PROMPT))
        reader = Reader(terminal)
        await reader.runs(serve)
        await until_file_says(run / "log", "serving;", 2)
        await until_file_says(run / "log", f"metrics at http://127.0.0.1:{tcp}/metrics")
        await reader.runs(export)

        desktop = await stack.enter_async_context(VfioGuest("run/desktop", 30, memory=32 << 20))
        server = await stack.enter_async_context(EmbeddedGuest("run/server", memory=32 << 20))
        console = await desktop.wait_port(name="")
        await console.wait_host()
        typed, screen = await console.open()
        assert (await reader.runs(status)).count("connected") == 2

        assert await reader.runs(add) == ""
        assert await reader.runs(plug) == ""
        port = await desktop.wait_port(name="org.example.data")
        host, client = await asyncio.open_unix_connection("run/data")
        await port.wait_host()
        _, data = await port.open()
        sent = b"".join(b"%07d\n" % n for n in range(200_000))
        data.write(sent)
        before = await host.readexactly(100_000)
        assert await reader.runs(change) == ""
        before += await host.read()
        client.close()
        await until(lambda: len(before) + (run / "data.out").stat().st_size >= len(sent))
        assert before + (run / "data.out").read_bytes() == sent

        screen.write(b"booted\r\nlogin: ")
        reader.type(attach)
        await reader.sees("booted\nlogin: ")
        terminal.press(b"root")
        async with asyncio.timeout(DEADLINE):
            assert await typed.readexactly(4) == b"root"
        terminal.press(b"\x1d.")
        await reader.sees(PROMPT)

        await reader.runs(rotate)
        await until(lambda: (run / "desktop-console.log").exists())
        screen.write(b"welcome\r\n")
        await until_file_says(run / "desktop-console.log", "welcome\r\n")
        assert (run / "desktop-console.old").read_bytes() == b"booted\r\nlogin: "

        found = re.findall(
            r'direction="out",port="1",vm="desktop"} (\S+)', await reader.runs(scrape)
        )
        assert [float(value) for value in found] == [len(sent)]
        assert '{"return": {}}' in await reader.runs(shell)
        assert server.config is not None  # its frontend noticed nothing
        port = await server.wait_port(nr=0)
        await port.wait_host()
        await reader.runs(f"kill $(cat {run}/pid); wait")
    assert sorted(path.name for path in run.iterdir()) == [
        "data.out",
        "desktop-console.log",
        "desktop-console.old",
        "log",
    ]


def picture_text(path: Path) -> list[str]:
    """The text of a picture of a terminal, line by line, without figures and room between words."""
    lines: dict[float, str] = {}
    for y, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>(.*?)</text>', path.read_text(), re.S):
        lines[float(y)] = lines.get(float(y), "") + text
    words = [re.sub(r"&#160;|\s", " ", line).split() for _, line in sorted(lines.items())]
    figure = re.compile(r"[\d.]+[KMG%]?")
    return [" ".join("#" if figure.fullmatch(word) else word for word in line) for line in words]


def test_the_picture_is_what_the_command_prints(tmp_path: Path) -> None:
    """If not: make picture-top."""
    script = ROOT / "scripts" / "picture-top"
    subprocess.run([sys.executable, script, tmp_path / "top.svg"], check=True, timeout=90)
    committed = ROOT / "docs" / "ctl-top.svg"
    drawn = picture_text(tmp_path / "top.svg")
    assert drawn == picture_text(committed)
    assert "server # org.example.backup both # # # # #" in drawn
    assert committed.stat().st_size < 16 << 10
    assert set(re.findall(r"https?://[^\"' ]+", committed.read_text())) == {
        "http://www.w3.org/2000/svg"
    }
