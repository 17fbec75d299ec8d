"""``vring demo``: the whole path of the SPICE agent channel at work, checked at every step."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from vring_serial.agent.host import HostAgent
from vring_serial.cli.demo_guests import BulkStreams, DemoGuest, EmbeddedDemoGuest, UmlDemoGuest
from vring_serial.cli.signals import run_until_signal
from vring_serial.cli.tables import show
from vring_serial.config.build import make_controller
from vring_serial.config.load import load_topology
from vring_serial.config.topology import Topology
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.events import DeviceEvent, PortReady
from vring_serial.errors import ResourceError, VringSerialError
from vring_serial.guest.bulk import stamped_blocks
from vring_serial.proto.agent import Monitor, capability_name
from vring_serial.transport.vhost_user.backend import VhostUserBackend

MIB = 1 << 20
AGENT_PORT = 1
BULK_PORT = 2
RESOLUTION = (1920, 1080)
HOST_TEXT = "From the host: naïve café, 日本語, 🖥\nand a second line"

#: Time limit of a step, in seconds.
STEP_TIMEOUT = 60.0
#: Bytes per second below which a transfer counts as stuck.
SLOWEST = 4 * MIB

DOMAIN = """\
<domain type='qemu'>
  <name>demo</name>
  <devices>
    <controller type='virtio-serial' index='0' ports='16'>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x05' function='0x0'/>
    </controller>
    <channel type='spicevmc'>
      <target type='virtio' name='com.redhat.spice.0'/>
      <address type='virtio-serial' controller='0' bus='0' port='{agent}'/>
    </channel>
    <channel type='unix'>
      <source mode='bind' path='{bulk_path}'/>
      <target type='virtio' name='org.vring.bulk.0'/>
      <address type='virtio-serial' controller='0' bus='0' port='{bulk}'/>
    </channel>
  </devices>
</domain>
"""

Result = TypeVar("Result")


@dataclass
class Report:
    """The steps of the demonstration so far, with their results.

    Attributes:
        console: where each step is printed when it ends.
        rows: for each step: what was tried, the result, and whether it succeeded.
    """

    console: Console
    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    @property
    def all_held(self) -> bool:
        """Whether every step succeeded."""
        return all(ok for _, _, ok in self.rows)

    def add(self, what: str, detail: str, ok: bool = True) -> None:
        """Record and print a step and its result."""
        self.rows.append((what, detail, ok))
        mark = "[green]✓[/]" if ok else "[red]✗[/]"
        self.console.print(mark, f"{what}: {detail}", highlight=False)

    async def step(
        self, what: str, work: Awaitable[Result], timeout: float = STEP_TIMEOUT
    ) -> Result | None:
        """Await ``work``, whose result describes what happened; a failure is a row, not the end."""
        try:
            async with asyncio.timeout(timeout):
                result = await work
        except (VringSerialError, OSError, asyncio.IncompleteReadError) as error:
            why = " ".join(str(error).split()) or f"nothing happened for {timeout:g} s"
            self.add(what, why, ok=False)
            return None
        self.add(what, str(result))
        return result

    def table(self, title: str) -> Table:
        """Return a table of all steps."""
        table = Table("step", "what happened", "", title=title)
        for what, detail, ok in self.rows:
            table.add_row(what, detail, "[green]ok[/]" if ok else "[red]failed[/]")
        return table


class Demo:
    """One run: our device in this process, the guest in another, and a report."""

    def __init__(self, directory: Path, guest: DemoGuest, size: int, report: Report) -> None:
        self._directory = directory
        self._guest = guest
        self._size = size
        self._report = report
        self._agent = HostAgent(timeout=STEP_TIMEOUT / 2)
        self._ready: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def run(self) -> None:
        """Run all steps."""
        topology = self._topology()
        config = topology.controllers[0]
        controller = make_controller(
            config, protocol_factories={"spicevmc": lambda _: self._agent.protocol_factory}
        )
        controller.on_event = self._device_event
        socket = self._directory / "vring.sock"
        async with self._served(controller, socket):
            self._report.add("controller", f"virtio-serial at {config.address}")
            self._report.add("guest", await self._boot(socket))
            for port in config.ports:
                end = controller.ports[port.nr].chardev.description
                await self._report.step(
                    f"port {port.nr}", self._port_ready(port.nr, port.name, end)
                )
            await self._report.step("agent", self._handshake())
            await self._report.step("resolution", self._resize())
            await self._report.step("clipboard to the guest", self._host_to_guest_clipboard())
            await self._report.step("clipboard from the guest", self._guest_to_host_clipboard())
            await self._bulk()

    def _topology(self) -> Topology:
        domain = self._directory / "demo.xml"
        domain.write_text(
            DOMAIN.format(
                agent=AGENT_PORT,
                bulk=BULK_PORT,
                bulk_path=self._directory / "bulk.sock",
            )
        )
        return load_topology(str(domain))

    @contextlib.asynccontextmanager
    async def _served(self, controller: Controller, socket: Path) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(controller.aclose)
            await controller.start()
            backend = VhostUserBackend(controller, str(socket))
            stack.push_async_callback(backend.aclose)
            await backend.start()
            stack.push_async_callback(self._guest.aclose)
            stack.push_async_callback(self._agent.aclose)
            yield

    async def _boot(self, socket: Path) -> str:
        start = time.perf_counter()
        with self._report.console.status(f"starting {self._guest.title}"):
            await self._guest.start(socket)
        return f"{self._guest.title}, up in {time.perf_counter() - start:.1f} s"

    async def _port_ready(self, nr: int, name: str, end: str) -> str:
        await self._ready[nr].wait()
        return f"{name} at {end}"

    def _device_event(self, event: DeviceEvent) -> None:
        if isinstance(event, PortReady) and event.ok:
            self._ready[event.nr].set()

    async def _handshake(self) -> str:
        capabilities = await self._agent.wait_ready()
        names = ", ".join(capability_name(capability) for capability in capabilities)
        return f"announced {names}"

    async def _resize(self) -> str:
        width, height = RESOLUTION
        await self._agent.set_monitors([Monitor(width, height)])
        await self._guest.wait_resolution(width, height)
        return f"{width}x{height}, confirmed by {self._guest.resolution_witness}"

    async def _host_to_guest_clipboard(self) -> str:
        await self._agent.set_clipboard(HOST_TEXT)
        await self._guest.wait_paste(self._agent, HOST_TEXT)
        return _shown(HOST_TEXT)

    async def _guest_to_host_clipboard(self) -> str:
        text, selection = await self._guest.copy()
        await self._agent.wait_clipboard(selection)
        got = await self._agent.get_clipboard(selection)
        if got != text:
            raise ResourceError(f"the texts differ: {text!r} became {got!r}")
        return f"{_shown(text)} ({selection.name})"

    async def _bulk(self) -> None:
        if not self._size:
            return
        timeout = STEP_TIMEOUT + self._size / SLOWEST
        reader, writer = await asyncio.open_unix_connection(
            self._directory / "bulk.sock", limit=MIB
        )
        streams = BulkStreams(reader, writer)
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
        )
        try:
            with Progress(*columns, console=self._report.console, transient=True) as progress:
                for title, transfer in (
                    ("guest to host", self._guest_to_host),
                    ("host to guest", self._host_to_guest),
                ):
                    task = progress.add_task(title, total=self._size)

                    def advance(count: int, task: object = task) -> None:
                        progress.advance(task, count)  # type: ignore[arg-type]

                    await self._report.step(title, transfer(streams, advance), timeout)
        finally:
            # A guest that is gone or stuck does not take what was sent.
            writer.transport.abort()

    async def _guest_to_host(self, streams: BulkStreams, advance: Callable[[int], None]) -> str:
        start = time.perf_counter()
        sent = await self._guest.begin_send(streams, self._size)
        digest = hashlib.sha256()
        left = self._size
        while left:
            data = await streams.reader.read(min(left, MIB))
            if not data:
                raise ResourceError(f"the port closed with {left} bytes missing")
            digest.update(data)
            left -= len(data)
            advance(len(data))
        seconds = time.perf_counter() - start
        return self._transferred(seconds, digest.hexdigest(), await sent())

    async def _host_to_guest(self, streams: BulkStreams, advance: Callable[[int], None]) -> str:
        start = time.perf_counter()
        received = await self._guest.begin_receive(streams, self._size)
        digest = hashlib.sha256()
        for block in stamped_blocks(self._size):
            streams.writer.write(block)
            digest.update(block)
            await streams.writer.drain()
            advance(len(block))
        got = await received()
        return self._transferred(time.perf_counter() - start, got, digest.hexdigest())

    def _transferred(self, seconds: float, got: str, sent: str) -> str:
        if got != sent:
            raise ResourceError(f"the checksums differ: sent {sent}, arrived {got}")
        rate = self._size / seconds / 1e6
        return f"{self._size / MIB:g} MiB at {rate:.0f} MB/s, SHA-256 {got[:16]}… on both sides"


def _shown(text: str) -> str:
    return f"{len(text)} characters, {text.splitlines()[0]}"


@click.command("demo")
@click.option(
    "--guest",
    type=click.Choice(["embedded", "uml"]),
    default="embedded",
    show_default=True,
    help="The embedded guest, or a real Linux kernel (User-Mode Linux) with the real agent.",
)
@click.option(
    "--size",
    type=click.IntRange(0, 1 << 20),
    default=256,
    show_default=True,
    metavar="MIB",
    help="Bulk data in each direction.",
)
@click.option("--verbose", is_flag=True, help="Log what the device does.")
def demo_command(guest: str, size: int, verbose: bool) -> None:
    """Show the whole path of the SPICE agent channel at work, and check it.

    A controller at 0000:00:05.0 from a libvirt domain XML, a guest in a separate process, the
    agent's handshake, a new resolution, clipboard text both ways, and bulk data through a second
    port. The exit status is 0 only if every step succeeded.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s"
    )
    report = Report(Console(soft_wrap=True))
    run_until_signal(lambda: _run(report, guest, size * MIB))
    show(report.console, report.table("vring demo"), wraps=True)
    raise SystemExit(0 if report.all_held else 1)


async def _run(report: Report, guest: str, size: int) -> None:
    demo_guest: DemoGuest = UmlDemoGuest() if guest == "uml" else EmbeddedDemoGuest()
    with tempfile.TemporaryDirectory(prefix="vring-demo-") as directory:
        await Demo(Path(directory), demo_guest, size, report).run()
