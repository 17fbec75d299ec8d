"""An operator's day: one service, two VMs, and only commands that the documents show.

QEMU has its device over vfio-user, User-Mode Linux over vhost-user. What is changed is changed by
`vring ctl` and by stock qmp-shell; every byte of every stream is compared with what was sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.bench import receive_digest
from tests.support.commands import run_command, run_vring
from tests.support.keeper import SERVING
from tests.support.processes import running
from tests.support.qemu_machine import QemuMachine
from tests.support.qemu_ways import vfio_user_device
from tests.support.streams import Stream, all_go_on
from tests.support.terminals import Terminal, on_terminal
from tests.support.waiting import DEADLINE, until, until_file_says
from vring_serial.guest.uml import UmlGuest

pytestmark = [
    pytest.mark.peer("linux.uml", "busybox", "virtio_console.ko", "qemu-root", "curl"),
    pytest.mark.timeout(400),
]

#: The service's file. Both VMs have the same names of ports.
CONFIG = """\
qmp = "unix:qmp,server=on,wait=off"
metrics = "unix:metrics"
pid-file = "pid"
log-file = "service.log"

[vm.desktop]
vfio-user = "desktop.sock"
reach = ["."]

[vm.server]
vhost-user = "server.sock"
reach = ["."]
"""
PORTS = """\
[vm.{vm}.chardev.con]
backend = "console"
path = "{vm}-con.sock"
logfile = "{vm}-con.log"
logsize = "512"
logbackups = 20

[vm.{vm}.chardev.data]
backend = "socket"
path = "{vm}-data.sock"
server = true
wait = false
logfile = "{vm}-data.log"

[vm.{vm}.chardev.echo]
backend = "socket"
path = "{vm}-echo.sock"
server = true
wait = false

[[vm.{vm}.console]]
chardev = "con"

[[vm.{vm}.port]]
chardev = "data"
nr = 1
name = "org.example.data"

[[vm.{vm}.port]]
chardev = "echo"
nr = 2
name = "org.example.echo"
"""
VMS = ("desktop", "server")
#: How much may be on its way through an echo: less than sockets and rings hold, or both ends wait.
AHEAD = 16 << 10
LEAVE = b"\x1d."


def numbers(first: int, last: int, end: str = "\n") -> bytes:
    """What ``seq first last`` prints."""
    return "".join(f"{n}{end}" for n in range(first, last + 1)).encode()


class Machine:
    """One of the two guests, with what is asked of both.

    Args:
        name: of the VM.
        guest: how it is run.
    """

    def __init__(self, name: str, guest: QemuMachine | UmlGuest) -> None:
        self.name = name
        self.guest = guest

    async def run(self, script: str, timeout: float = DEADLINE) -> str:
        """Run a script in the guest, which succeeds; return what it printed."""
        if isinstance(self.guest, QemuMachine):
            return (await self.guest.run(script, timeout)).strip()
        result = await self.guest.run(script, timeout)
        assert result.status == 0, (script, result.output)
        return result.output.strip()

    async def ports(self, *names: str) -> None:
        """Wait until the guest has ports of these names, and no others."""
        wanted = " ".join(sorted(names))
        await self.run(
            "names() { cat /sys/class/virtio-ports/vport0p*/name 2>/dev/null | sort | xargs; }\n"
            f'until [ "$(names)" = "{wanted}" ]; do sleep 0.05; done'
        )

    async def begin(self) -> None:
        """Have what every boot starts: a shell on the console, and an echo."""
        await self.ports("org.example.data", "org.example.echo")
        await self.run(
            "until true </dev/hvc0; do sleep 0.05; done 2>/dev/null\n"
            # One that says nothing of its own, as interactive ones do.
            "shell='stty -echo; while read -r line; do eval \"$line\"; done'\n"
            'setsid sh -c "$shell" </dev/hvc0 >/dev/hvc0 2>&1 &\n'
            "until stty </dev/hvc0 | grep -q -e -echo; do sleep 0.05; done\n"
            # It keeps the port open: what is unread at a close is dropped. While nobody is
            # connected, reads return the end of file.
            "setsid sh -c 'exec 3<>/dev/vport0p2; while :; do cat <&3 >&3; sleep 0.05; done' "
            ">/dev/null 2>&1 &"
        )


@asynccontextmanager
async def at_work(machine: Machine, script: str) -> AsyncIterator[asyncio.Task[str]]:
    """Have a script run in a guest beside the block, which waits for it."""
    task = asyncio.create_task(machine.run(script, 120))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


class Day:
    """The service, its guests, and who is there; made by :func:`begun`."""

    def __init__(self, directory: Path, process: asyncio.subprocess.Process) -> None:
        self.directory = directory
        self.process = process
        self.machines: dict[str, Machine] = {}
        self._env = {**os.environ, "VRING_QMP": "qmp", "HOME": str(directory), "COLUMNS": "80"}

    async def end_guests(self) -> None:
        """End the guests that there are now: one was started again."""
        for machine in self.machines.values():
            await machine.guest.aclose()

    async def ctl(self, *arguments: str) -> str:
        """A command of `vring ctl` that succeeds; what it printed."""
        status, out, err = await run_vring("ctl", *arguments, env=self._env, cwd=self.directory)
        assert (status, err) == (0, ""), arguments
        return out

    async def qmp_shell(self, *lines: str) -> list[Any]:
        """Type lines to stock qmp-shell; what each returned."""
        shell = Path(sys.executable).with_name("qmp-shell")
        typed = "".join(f"{line}\n" for line in lines)
        status, out, err = await run_command(
            shell, "qmp", given=typed, env=self._env, cwd=self.directory
        )
        assert status == 0, err
        said = [line.removeprefix("(QEMU) ") for line in out.splitlines()]
        answers = [json.loads(line) for line in said if line.startswith("{")]
        assert len(answers) == len(lines), out
        for answer in answers:
            assert "return" in answer, answer
        return [answer["return"] for answer in answers]

    async def status(self) -> dict[str, Any]:
        """Each VM, by name."""
        return {vm["name"]: vm for vm in json.loads(await self.ctl("--json", "status"))}

    async def scrape(self) -> dict[tuple[str, ...], float]:
        """All samples, by name and the labels that matter here."""
        _, out, err = await run_command(
            *("curl", "-sS", "--unix-socket", "metrics", "http://localhost/metrics"),
            cwd=self.directory,
        )
        assert err == ""
        labels = ("vm", "port", "direction")
        return {
            (sample.name, *(sample.labels[name] for name in labels if name in sample.labels)): (
                sample.value
            )
            for family in text_string_to_metric_families(out)
            for sample in family.samples
        }

    async def connect(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to a socket of the service."""
        return await asyncio.open_unix_connection(self.directory / path)

    async def attach(self, stack: AsyncExitStack, *arguments: str) -> Terminal:
        """Somebody's terminal, attached to a console."""
        terminal = await on_terminal(self.directory, "attach", *arguments)
        stack.push_async_callback(terminal.aclose)
        await terminal.said("attached to .*\n")
        return terminal

    @asynccontextmanager
    async def echoing(self, vm: str) -> AsyncIterator[Stream]:
        """Have numbered bytes go to a guest and back while the block runs; then all came back."""
        reader, writer = await self.connect(f"{vm}-echo.sock")
        stream = Stream(f"echo of {vm}", reader, writer, AHEAD)
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(stream.send(enough, random.Random(vm)))
            receiving = group.create_task(stream.receive())
            await all_go_on([stream])
            yield stream
            enough.set()
            await sending
            await until(lambda: stream.received == stream.sent, f"the echo of {vm}")
            receiving.cancel()
        stream.close()

    async def both_ways(self, vm: str, nr: int, path: str) -> None:
        """Move a file's worth to the guest and back, and compare the checksums of both."""
        data = random.Random(path).randbytes(300_000)
        digest = hashlib.sha256(data).hexdigest()
        reader, writer = await self.connect(path)
        script = (
            f"exec 3<>/dev/vport0p{nr}\n"
            ": >/tmp/came\n"
            f"left() {{ echo $(({len(data)} - $(stat -c %s /tmp/came))); }}\n"
            "while [ $(left) != 0 ]; do head -c $(left) <&3 >>/tmp/came; done\n"
            "cat /tmp/came >&3\n"
            "sha256sum </tmp/came"
        )
        async with asyncio.timeout(DEADLINE), at_work(self.machines[vm], script) as moving:
            writer.write(data)
            assert await receive_digest(reader, len(data)) == digest
            assert (await moving).split()[0] == digest
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def begun(directory: Path) -> AsyncIterator[Day]:
    """The service serves, and both guests have booted."""
    config = CONFIG + "".join(PORTS.format(vm=vm) for vm in VMS)
    (directory / "day.toml").write_text(config)
    with (directory / "stderr").open("wb") as stderr:
        async with AsyncExitStack() as stack:
            process = await stack.enter_async_context(
                running(
                    *(sys.executable, "-m", "vring_serial", "serve", "--config", "day.toml"),
                    cwd=directory,
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                )
            )
            log = directory / "service.log"
            await until_file_says(log, SERVING, len(VMS))
            day = Day(directory, process)
            qemu = QemuMachine(
                directory,
                vfio_user_device(directory / "desktop.sock", addr="05.0"),
                append="reboot=t",
            )
            stack.push_async_callback(qemu.aclose)
            uml = UmlGuest([directory / "server.sock"])
            stack.push_async_callback(uml.aclose)
            await asyncio.gather(qemu.start(), uml.start())
            day.machines = {"desktop": Machine("desktop", qemu), "server": Machine("server", uml)}
            stack.push_async_callback(day.end_guests)
            await asyncio.gather(*(machine.begin() for machine in day.machines.values()))
            yield day


@asynccontextmanager
async def watched(day: Day) -> AsyncIterator[list[dict[str, Any]]]:
    """Somebody follows `vring ctl events --json`; the list grows."""
    events: list[dict[str, Any]] = []

    async def read(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            events.append(json.loads(line))

    async with running(
        *(sys.executable, "-m", "vring_serial", "ctl", "--qmp", "qmp", "events", "--json"),
        cwd=day.directory,
        stdout=asyncio.subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        reading = asyncio.create_task(read(process.stdout))
        try:
            # It says nothing when it listens: something happens until it is told.
            while not events:
                await day.machines["server"].run("true </dev/vport0p1")
            yield events
            await until(lambda: events[-1]["event"] == "SHUTDOWN", lambda: str(events[-5:]))
            assert await process.wait() == 0
            await reading
        finally:
            reading.cancel()
            await asyncio.wait([reading])


async def people_watch_a_console(day: Day, first: Terminal, second: Terminal, vm: str) -> None:
    """One types; both see what the guest prints, and nothing else."""
    begin = [len(terminal.data) for terminal in (first, second)]
    # Linux hands over a console's bytes by sixteen, and waits for each of them.
    first.press(b"seq 1 400\r")
    wanted = numbers(1, 400, "\r\n")
    for terminal, at in zip((first, second), begin, strict=True):
        await terminal.shown(at + len(wanted))
        assert bytes(terminal.data[at:]) == wanted
    # Logs that are full were renamed; joined, they are what the guest printed.
    joined = b"".join(
        path.read_bytes()
        for path in sorted(
            day.directory.glob(f"{vm}-con.log.*"), key=lambda path: -int(path.suffix[1:])
        )
    )
    assert len(joined) > len(wanted) // 2
    log = day.directory / f"{vm}-con.log"
    await until(lambda: (joined + log.read_bytes()).endswith(wanted), f"{vm}'s log")


async def a_host_end_is_changed_under_traffic(day: Day, vm: str) -> None:
    """From a socket to another one, to a file, and back: each byte comes out of one of them."""
    last = 200_000
    reader, writer = await day.connect(f"{vm}-data.sock")
    async with at_work(day.machines[vm], f"seq 1 {last} >/dev/vport0p1") as printing:
        parts = [await reader.readexactly(100_000)]
        # Nobody reads any more: the guest waits in the midst, with more than sockets hold.
        id = f"id={vm}/data"
        await day.ctl("chardev", "change", f"socket,{id},path={vm}-other.sock,server=on,wait=off")
        parts.append(await reader.read())
        writer.close()
        reader, writer = await day.connect(f"{vm}-other.sock")
        parts.append(await reader.readexactly(100_000))
        await day.ctl("chardev", "change", f"file,{id},path={vm}-data.out")
        parts.append(await reader.read())
        writer.close()
        await printing
    out = day.directory / f"{vm}-data.out"
    wanted = numbers(1, last)
    before = b"".join(parts)
    await until(lambda: len(before) + out.stat().st_size >= len(wanted), lambda: str(out.stat()))
    assert before + out.read_bytes() == wanted
    again = f"socket,{id},path={vm}-data.sock,server=on,wait=off,logfile={vm}-data.log"
    await day.ctl("chardev", "change", f"{again},logappend=on")
    await day.both_ways(vm, 1, f"{vm}-data.sock")


async def ports_come_and_go(day: Day, vm: str, *, by_qmp_shell: bool) -> None:
    """A host end and a port are added while the guest runs, used, and removed."""
    id, name, path = f"{vm}/late", "org.example.late", f"{vm}-late.sock"
    usual = ("org.example.data", "org.example.echo")
    if by_qmp_shell:
        address = {"type": "unix", "data": {"path": path}}
        backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
        words = json.dumps(backend, separators=(",", ":"))
        await day.qmp_shell(
            f"chardev-add id={id} backend={words}",
            f"device_add driver=virtserialport chardev={id} id={id} nr=5 name={name}",
        )
    else:
        await day.ctl("chardev", "add", f"socket,id={id},path={path},server=on,wait=off")
        await day.ctl("port", "add", f"chardev={id},nr=5,name={name}")
    await day.machines[vm].ports(*usual, name)
    await day.both_ways(vm, 5, path)
    if by_qmp_shell:
        await day.qmp_shell(f"device_del id={id}", f"chardev-remove id={id}")
    else:
        await day.ctl("port", "remove", id)
        await day.ctl("chardev", "remove", id)
    await day.machines[vm].ports(*usual)
    assert not (day.directory / path).exists()


async def logs_are_rotated(day: Day, vm: str) -> None:
    """As logrotate does it: rename, and SIGHUP. Joined, they have what the guest wrote."""
    last = 100_000
    log, old = day.directory / f"{vm}-data.log", day.directory / f"{vm}-data.log.old"
    service, service_old = day.directory / "service.log", day.directory / "service.log.old"
    began = log.stat().st_size
    reader, writer = await day.connect(f"{vm}-data.sock")
    wanted = numbers(1, last)
    async with at_work(day.machines[vm], f"seq 1 {last} >/dev/vport0p1") as printing:
        came = await reader.readexactly(50_000)
        log.rename(old)
        service.rename(service_old)
        pid = int((day.directory / "pid").read_text())
        os.kill(pid, signal.SIGHUP)
        await until(lambda: log.exists() and service.exists(), "logs are opened anew")
        came += await reader.readexactly(len(wanted) - len(came))
        await printing
    writer.close()
    assert came == wanted
    await until(
        lambda: (old.read_bytes()[began:] + log.read_bytes()) == wanted,
        lambda: f"{old.stat().st_size - began} + {log.stat().st_size} of {len(wanted)}",
    )
    assert log.stat().st_size
    await until_file_says(service, "files were opened anew", len(VMS))


async def metrics_tell_what_moved(day: Day, vm: str) -> None:
    """Two scrapes around so many bytes; and all agree: `vring ctl`, QMP, Prometheus."""
    moved = ("vring_port_bytes_total", vm, "1")
    before = await day.scrape()
    await day.both_ways(vm, 1, f"{vm}-data.sock")
    after = await day.scrape()
    for direction in ("in", "out"):
        assert after[*moved, direction] - before[*moved, direction] == 300_000
    for name in VMS:
        assert after["vring_worker_up", name] == 1
        assert after["vring_frontend_connected", name] == 1
        assert after["vring_port_guest_open", name, "2"] == 1
    (told,) = await day.qmp_shell("x-vring-status")
    (port,) = [
        port
        for found in told
        for controller in found["controllers"]
        for port in controller["ports"]
        if (found["name"], port["nr"]) == (vm, 1)
    ]
    assert port["out"]["bytes"] == after[*moved, "out"]


async def a_worker_is_replaced(day: Day, vm: str, echo: Stream) -> None:
    """By `vring ctl restart`, under traffic, which goes on."""
    await day.ctl("restart", vm)
    assert (await day.status())[vm]["restarts"] == 1
    await all_go_on([echo])


async def a_guest_reboots(day: Day, stack: AsyncExitStack, others: Sequence[Stream]) -> None:
    """QEMU's, while somebody is attached, who goes on watching the next boot."""
    desktop = day.machines["desktop"]
    terminal = await day.attach(stack, "--read-only", "./desktop-con.sock")
    assert isinstance(desktop.guest, QemuMachine)
    await desktop.guest.reboot(timeout=120)
    await desktop.begin()
    begin = len(terminal.data)
    await desktop.run("echo up again >/dev/hvc0")
    await terminal.shown(begin + len("up again\r\n"))
    assert bytes(terminal.data[begin:]) == b"up again\r\n"
    terminal.press(LEAVE)
    assert await terminal.status() == 0
    await all_go_on(others)
    async with day.echoing("desktop") as echo:
        await all_go_on([echo])
        await day.both_ways("desktop", 1, "desktop-data.sock")


async def a_guest_is_killed_and_started_again(day: Day, others: Sequence[Stream]) -> None:
    """User-Mode Linux, in the midst of a stream: what came is the beginning of it."""
    server = day.machines["server"]
    assert isinstance(server.guest, UmlGuest)
    reader, writer = await day.connect("server-data.sock")
    async with at_work(server, "seq 1 400000 >/dev/vport0p1"):
        came = bytearray(await reader.readexactly(100_000))
        await server.guest.aclose()
    async with asyncio.timeout(DEADLINE):
        while (await day.status())["server"]["controllers"][0]["frontend"]:
            pass
    writer.write_eof()
    while data := await reader.read(1 << 18):
        came += data
    writer.close()
    assert numbers(1, 400_000).startswith(came)
    await all_go_on(others)
    server.guest = UmlGuest([day.directory / "server.sock"])
    await server.guest.start()
    await server.begin()
    async with day.echoing("server") as echo:
        await all_go_on([echo])
        await day.both_ways("server", 1, "server-data.sock")


async def test_an_operators_day(tmp_path: Path) -> None:
    async with begun(tmp_path) as day, AsyncExitStack() as stack:
        events = await stack.enter_async_context(watched(day))
        assert set(await day.status()) == set(VMS)

        first = await day.attach(stack, "--qmp", "qmp", "desktop/con")
        second = await day.attach(stack, "--read-only", "./desktop-con.sock")
        await people_watch_a_console(day, first, second, "desktop")
        async with day.echoing("desktop") as desktop, day.echoing("server") as server:
            for vm in VMS:
                await a_host_end_is_changed_under_traffic(day, vm)
                await ports_come_and_go(day, vm, by_qmp_shell=vm == "server")
                await logs_are_rotated(day, vm)
                await metrics_tell_what_moved(day, vm)
            await a_worker_is_replaced(day, "desktop", desktop)
            await all_go_on([desktop, server])
        for terminal in (first, second):
            terminal.press(LEAVE)
            assert await terminal.status() == 0
            assert terminal.left == terminal.found
        async with day.echoing("server") as server:
            await a_guest_reboots(day, stack, [server])
        async with day.echoing("desktop") as desktop:
            await a_guest_is_killed_and_started_again(day, [desktop])

        day.process.send_signal(signal.SIGTERM)
        assert await day.process.wait() == 0
        told = {(event["event"], *map(str, event["data"].values())) for event in events}
        for name in VMS:
            assert ("DEVICE_DELETED", f"{name}/late", f"/machine/peripheral/{name}/late") in told
        assert ("X_VRING_WORKER", "desktop", "1", "replaced") in told
        for state in ("gone", "connected"):
            assert ("X_VRING_FRONTEND", "server/virtio-serial0", state) in told
    left = {path.name for path in tmp_path.iterdir() if path.is_socket()}
    assert left == {"qmp.sock"}
    log = (tmp_path / "service.log").read_text()
    assert "Traceback" not in log
    assert (tmp_path / "stderr").read_bytes() == b""
