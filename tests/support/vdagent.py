"""The real spice-vdagentd and spice-vdagent on an X server of their own, without a VM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from pathlib import Path
from types import TracebackType

from tests.support.processes import end, running
from tests.support.waiting import turns, until, until_gives

SCREEN = "2560x1600x24"
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


#: Where `make peers-vdagent` keeps the agent of Debian testing, with its own C library.
NEWER_ROOT = Path(os.environ.get("VDAGENT_ROOT", "/var/cache/vring/vdagent-root"))


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    assert found is not None, f"{name} not installed: `make peers` brings it"
    return found


def of_root(root: Path, name: str) -> list[str]:
    """The command for a program of another Debian, which brings its own loader and libraries."""
    libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
    (found,) = root.glob(f"usr/*bin/{name}")
    loader = libraries / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(libraries), str(found)]


class VdAgentSession:
    """Xvfb, and the two halves of the agent, which connect to ``port`` once they are started.

    Attributes:
        port: path of the unix socket on which the test serves the host's side of the channel.
        downloads: where the agent puts files that it receives.
        display: the X display, such as ``:3``.
        is_newer: the agent is that of Debian testing.

    Args:
        directory: for sockets, logs and downloads.
        root: a Debian whose agent it is, or None for this machine's.
    """

    def __init__(self, directory: Path, root: Path | None = None) -> None:
        self.port = directory / "port.sock"
        self.downloads = directory / "downloads"
        self.display = ""
        self._directory = directory
        self.is_newer = root is not None
        self._root = root
        self._x: asyncio.subprocess.Process | None = None
        self._agents: list[asyncio.subprocess.Process] = []
        self._helpers: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> VdAgentSession:
        self.downloads.mkdir()
        await self._start_x()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.end_helpers()
        await self.aclose()
        if self._x is not None:
            await self._end([self._x])

    async def _start_x(self) -> None:
        """Let the server choose a free display and tell it on a descriptor."""
        read_fd, write_fd = os.pipe()
        try:
            self._x = await self._spawn(
                "Xvfb", "-displayfd", str(write_fd), "-screen", "0", SCREEN, "-nolisten", "tcp",
                pass_fds=(write_fd,),
            )  # fmt: skip
        finally:
            os.close(write_fd)
        reader = asyncio.StreamReader()
        with os.fdopen(read_fd, "rb", buffering=0) as pipe:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                async with asyncio.timeout(20):
                    number = (await reader.readline()).decode().strip()
            finally:
                transport.close()
                await turns(1)
        assert number.isdigit(), "Xvfb did not start"
        self.display = f":{number}"

    async def start(self) -> None:
        """Start both halves of the agent."""
        session = self._directory / "session.sock"
        uinput = self._directory / "uinput"
        uinput.write_bytes(b"")
        common = ("-s", str(self.port), "-S", str(session))
        daemon = await self._spawn(
            "spice-vdagentd", "-x", "-d", "-d", "-X", "-f", "-u", str(uinput), *common
        )
        self._agents.append(daemon)
        await until(session.exists)
        agent = await self._spawn(
            "spice-vdagent", "-x", "-d", *common, "-f", str(self.downloads), "-o", "0"
        )
        self._agents.append(agent)

    async def aclose(self) -> None:
        """End both halves; their exit status means nothing, spice-vdagent may crash then."""
        await self._end(self._agents)
        (self._directory / "session.sock").unlink(missing_ok=True)

    async def _spawn(
        self, name: str, *args: str, pass_fds: tuple[int, ...] = ()
    ) -> asyncio.subprocess.Process:
        environment = {**os.environ, "DISPLAY": self.display, "NO_AT_BRIDGE": "1", "PATH": PATH}
        command = [program(name)]
        if self._root is not None and name.startswith("spice-"):
            command = of_root(self._root, name)
        with (self._directory / f"{name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command, *args, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment, pass_fds=pass_fds,
            )  # fmt: skip

    async def _end(self, processes: list[asyncio.subprocess.Process]) -> None:
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                await end(process)
        processes.clear()

    async def run(self, name: str, *args: str, stdin: bytes = b"") -> bytes:
        """What a program writes that runs on the display; it must succeed."""
        async with running(
            *(program(name), *args),
            env={**os.environ, "DISPLAY": self.display},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        ) as process:
            async with asyncio.timeout(20):
                output, _ = await process.communicate(stdin)
        assert process.returncode == 0, f"{name} {args} failed"
        return output

    async def until_resolution(self, width: int, height: int) -> None:
        """Wait until the X screen has this size."""
        await until_gives(self._resolution_if_settled, (width, height))

    async def end_helpers(self) -> None:
        """End the applications that own selections."""
        await self._end(self._helpers)

    async def until_paste(
        self, expected: bytes, selection: str = "clipboard", target: str = "UTF8_STRING"
    ) -> None:
        """Wait until pasting gives this; the agent takes a selection a moment after our grab."""

        async def paste() -> bytes | None:
            try:
                return await self.paste(selection, target)
            except AssertionError:  # there is nothing yet
                return None

        await until_gives(paste, expected)

    async def _resolution_if_settled(self) -> tuple[int, int] | None:
        try:
            return await self.resolution()
        except AssertionError:  # xrandr fails when the mode changes under it
            return None

    async def resolution(self) -> tuple[int, int]:
        """The X screen's size in pixels."""
        found = re.search(rb"current (\d+) x (\d+)", await self.run("xrandr"))
        assert found is not None
        return int(found[1]), int(found[2])

    async def copy(self, text: bytes, selection: str = "clipboard", target: str = "") -> None:
        """Own an X selection, as an application does in which somebody copies."""
        source = self._directory / "copied"
        source.write_bytes(text)
        kind = ("-t", target) if target else ()
        self._helpers.append(
            await self._spawn("xclip", "-quiet", "-i", "-selection", selection, *kind, str(source))
        )

    async def paste(self, selection: str = "clipboard", target: str = "UTF8_STRING") -> bytes:
        """What an application gets in which somebody pastes."""
        return await self.run("xclip", "-o", "-selection", selection, "-t", target)

    def log(self) -> str:
        """What the processes wrote, for a failed test."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}"
            for path in sorted(self._directory.glob("*.log"))
        )
