"""The guests of ``vring demo``: the embedded one, and a real Linux kernel with the real agent."""

from __future__ import annotations

import asyncio
import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from vring_serial.agent.host import HostAgent
from vring_serial.errors import ResourceError
from vring_serial.guest.bulk import stamped_blocks
from vring_serial.guest.uml import UmlGuest, find_parts
from vring_serial.guest.uml_desktop import MEMORY_MIB, UmlDesktop, require_programs
from vring_serial.proto.agent import Selection

#: Time limit for a guest to end after it was told to, in seconds.
STOP_TIMEOUT = 10.0

#: Waits for a checksum. Nothing is left running if it is never called.
Digest = Callable[[], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class BulkStreams:
    """The host end of the bulk port, as a pair of asyncio streams.

    Attributes:
        reader: bytes from the guest.
        writer: bytes to the guest.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class DemoGuest(ABC):
    """The interface of the demonstration's guests.

    Attributes:
        title: description of the guest, for the report.
        resolution_witness: the program that reports the guest's resolution.
    """

    title: str
    resolution_witness: str

    @abstractmethod
    async def start(self, socket: Path) -> None:
        """Start on the backend's socket."""

    @abstractmethod
    async def aclose(self) -> None:
        """End the guest, in whatever state it is."""

    @abstractmethod
    async def wait_resolution(self, width: int, height: int) -> None:
        """Wait until the guest's screen has this size. Raises ResourceError if it does not."""

    @abstractmethod
    async def wait_paste(self, agent: HostAgent, text: str) -> None:
        """Paste in the guest until this text appears. Raises ResourceError if it does not."""

    @abstractmethod
    async def copy(self) -> tuple[str, Selection]:
        """Copy a text in the guest; return the text and its selection."""

    @abstractmethod
    async def begin_send(self, streams: BulkStreams, total: int) -> Digest:
        """Make the guest write to the bulk port; the result waits for the SHA-256 it sent."""

    @abstractmethod
    async def begin_receive(self, streams: BulkStreams, total: int) -> Digest:
        """Make the guest read the bulk port; the result waits for the SHA-256 it received."""


class EmbeddedDemoGuest(DemoGuest):
    """``vring guest`` in a separate process.

    Its agent pastes what the host copies and then selects it, so the PRIMARY selection holds the
    text that arrived, which then returns to the host.
    """

    title = "embedded guest (its own process, over vhost-user)"
    resolution_witness = "the guest's REPLY"

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._pasted = ""

    async def start(self, socket: Path) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vring_serial", "guest", "--vhost-user", str(socket)),
            *("--agent", "--bulk", "org.vring.bulk.0", "--log-level", "error"),
            stdin=asyncio.subprocess.DEVNULL,
        )

    async def aclose(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def wait_resolution(self, width: int, height: int) -> None:
        """Return at once: its agent answers only when it has the new resolution."""

    async def wait_paste(self, agent: HostAgent, text: str) -> None:
        await agent.wait_clipboard(Selection.PRIMARY)
        self._pasted = await agent.get_clipboard(Selection.PRIMARY)
        if self._pasted != text:
            raise ResourceError(f"the guest pasted {self._pasted!r}")

    async def copy(self) -> tuple[str, Selection]:
        return self._pasted, Selection.PRIMARY

    async def begin_send(self, streams: BulkStreams, total: int) -> Digest:
        streams.writer.write(f"send {total}\n".encode())
        return functools.partial(self._digest, streams.reader)

    async def begin_receive(self, streams: BulkStreams, total: int) -> Digest:
        streams.writer.write(f"receive {total}\n".encode())
        return functools.partial(self._digest, streams.reader)

    @staticmethod
    async def _digest(reader: asyncio.StreamReader) -> str:
        line = (await reader.readline()).decode(errors="replace")
        word, _, digest = line.strip().partition(" ")
        if word != "sha256":
            raise ResourceError(f"the guest answered {line!r} on the bulk port")
        return digest


class UmlDemoGuest(DemoGuest):
    """User-Mode Linux that runs the real spice-vdagentd, spice-vdagent and an X server."""

    title = "User-Mode Linux with spice-vdagent"
    resolution_witness = "xrandr in the guest"
    #: The text that is copied in the guest.
    TEXT = "From the guest: Grüße, Ελλάδα, 📋\nand a second line"

    def __init__(self) -> None:
        find_parts()
        require_programs()
        self._guest: UmlGuest | None = None
        self._desktop: UmlDesktop | None = None
        self._scripts: set[asyncio.Task[str]] = set()

    async def start(self, socket: Path) -> None:
        self._guest = UmlGuest([socket], memory_mib=MEMORY_MIB)
        await self._guest.start()
        self._desktop = UmlDesktop(self._guest)
        await self._desktop.start()
        self.title = f"Linux {(await self._guest.run('uname -r')).output} (User-Mode Linux)"

    async def aclose(self) -> None:
        for script in self._scripts:
            script.cancel()
        await asyncio.gather(*self._scripts, return_exceptions=True)
        if self._guest is not None:
            await self._guest.aclose()

    async def wait_resolution(self, width: int, height: int) -> None:
        assert self._desktop is not None
        await self._desktop.wait_resolution(width, height)

    async def wait_paste(self, agent: HostAgent, text: str) -> None:
        assert self._desktop is not None
        await self._desktop.wait_paste(text)

    async def copy(self) -> tuple[str, Selection]:
        assert self._desktop is not None
        await self._desktop.copy(self.TEXT)
        return self.TEXT, Selection.CLIPBOARD

    async def begin_send(self, streams: BulkStreams, total: int) -> Digest:
        await asyncio.to_thread(self._write_payload, total)
        return self._in_guest("cat /mnt/bulk >/dev/vport0p2; sha256sum /mnt/bulk")

    async def begin_receive(self, streams: BulkStreams, total: int) -> Digest:
        return self._in_guest(f"head -c {total} /dev/vport0p2 | sha256sum")

    def _write_payload(self, total: int) -> None:
        assert self._guest is not None
        with open(self._guest.share / "bulk", "wb") as file:
            file.writelines(stamped_blocks(total))

    def _in_guest(self, script: str) -> Digest:
        """Run it now, beside what the host does; its output begins with a checksum."""
        assert self._guest is not None
        guest = self._guest

        async def run() -> str:
            result = await guest.run(script, timeout=600)
            if result.status:
                raise ResourceError(f"in the guest: {result.output}")
            return result.output.split()[0]

        running = asyncio.create_task(run())
        self._scripts.add(running)

        async def digest() -> str:
            return await running

        return digest
