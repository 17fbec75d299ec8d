"""What a predecessor, a keeper or a frontend left is not what it was: a named error, and it serves.

The tests do to a running service what a bug, or somebody who had taken a worker over, could have
done: they write into the journal that the keeper holds, and store descriptors in the worker's name.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import termios
import zlib
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.keeper import SERVING, kept
from tests.support.processes import running
from tests.support.vfio_guest import VfioGuest
from tests.support.waiting import DEADLINE, PERIOD, until, until_file_says
from vring_serial import EmbeddedGuest
from vring_serial.errors import ResourceError
from vring_serial.service.journal import Journal

PORTS = ("--chardev", "socket,id=c,path=c,server=on,wait=off", "--port", "chardev=c,nr=1,name=p")
PROTOCOLS = ("vhost-user", "vfio-user")
RAM = 32 << 20
PIDFD_GETFD = 438  # on every architecture

libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def guest_of(protocol, path="v"):
    return EmbeddedGuest(path, memory=RAM) if protocol == "vhost-user" else VfioGuest(path, 1)


@asynccontextmanager
async def carrying(protocol, path="v", host="c"):
    """A guest whose port has carried a byte each way; yields what sends one more."""
    async with guest_of(protocol, path) as guest:
        reader, writer = await asyncio.open_unix_connection(host)
        try:
            port = await guest.wait_port(name="p")
            guest_reader, guest_writer = await port.open()

            async def exchange():
                guest_writer.write(b"a")
                assert await reader.readexactly(1) == b"a"
                writer.write(b"b")
                assert await guest_reader.readexactly(1) == b"b"

            await exchange()
            yield exchange
        finally:
            writer.close()


async def serves(protocol, keeper):
    """The next frontend and the next client are served, and nothing went wrong unnamed."""
    async with asyncio.timeout(DEADLINE):
        while True:
            # The client before may leave late, and a service that begins anew pauses first.
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, ResourceError):
                async with carrying(protocol):
                    break
            await asyncio.sleep(PERIOD)
    assert await keeper.stop() == 0
    assert "Traceback" not in keeper.log


# --- descriptors


def notifier_of(worker):
    """The worker's socket to the keeper, taken out of it."""
    pidfd = os.pidfd_open(worker)
    try:
        for fd in os.listdir(f"/proc/{worker}/fd"):
            if os.readlink(f"/proc/{worker}/fd/{fd}").startswith("socket:"):
                taken = libc.syscall(PIDFD_GETFD, pidfd, int(fd), 0)
                if taken < 0:
                    pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
                sock = socket.socket(fileno=taken)
                if sock.type == socket.SOCK_SEQPACKET:
                    return sock
                sock.close()
    finally:
        os.close(pidfd)
    raise AssertionError("the worker has no socket to its keeper")


def store(worker, name, *fds):
    """Have the keeper hold descriptors for that worker, under a name."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    with notifier_of(worker) as sock:
        sock.sendmsg([f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode()], rights)


def wrong(kind):
    """A descriptor that is not what it should be."""
    if kind == "device":
        return os.open("/dev/null", os.O_RDWR)
    if kind == "file":
        return os.memfd_create("wrong")
    if kind == "directory":
        return os.open("/", os.O_RDONLY)
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


@pytest.mark.parametrize(
    ("protocol", "role", "kind", "said"),
    [
        ("vhost-user", "frontend-0/memory.0", "device", "its file has 0x0 bytes"),
        ("vhost-user", "frontend-0/kick.3", "file", "kick.3: its descriptor is not an eventfd"),
        ("vhost-user", "frontend-0/call.3", "file", "call.3: its descriptor is not an eventfd"),
        ("vhost-user", "frontend-0/peer", "directory", "kept of the frontend is no connection"),
        ("vhost-user", "frontend-0/listener", "socket", "does not listen; it is made anew"),
        (
            "vhost-user",
            "chardev-0/listener.0",
            "file",
            "chardev c: what was kept as listener.0 is no",
        ),
        (
            "vhost-user",
            "chardev-0/client.0",
            "device",
            "chardev c: what was kept as client.0 is no",
        ),
        ("vfio-user", "frontend-0/memory.0", "directory", "the region needs"),
        ("vfio-user", "frontend-0/kick.3", "socket", "kick.3: its descriptor is not an eventfd"),
        ("vfio-user", "frontend-0/irq.2.3", "device", "irq.2.3: its descriptor is not an eventfd"),
        ("vfio-user", "frontend-0/peer", "file", "kept of the client is no connection"),
    ],
)
async def test_a_wrong_descriptor_is_named(tmp_path, protocol, role, kind, said):
    async with kept(tmp_path, *PORTS, protocol=protocol) as keeper:
        async with carrying(protocol):
            fd = wrong(kind)
            store(keeper.worker, f"{role}#{10**8}", fd)  # the later of two counts
            os.close(fd)
            await keeper.kill_until_served()
            await keeper.logged(said)
        await serves(protocol, keeper)
    assert keeper.log.count("another one goes on") == 1


async def test_names_that_nobody_knows_are_told_and_dropped(tmp_path):
    async with kept(tmp_path, *PORTS) as keeper, carrying("vhost-user") as exchange:
        await keeper.kill_until_served()  # so that it holds all that it will
        before = keeper.held
        fd = wrong("file")
        names = ("nonsense#1", "frontend-0/nonsense#2", "controller-9/port-1/client.0#3")
        for name in (*names, "no number", "no-number#x", f"long#{'9' * 60}"):
            store(keeper.worker, name, fd)
        store(keeper.worker, "twice#7", fd, fd)
        os.close(fd)
        await keeper.kill_until_served()
        known = ", ".join(sorted(name.partition("#")[0] for name in names))
        await keeper.logged(f"left what nobody knows: {known}")
        await exchange()
        await keeper.kill_until_served()
        assert keeper.held == before
        await exchange()
        assert await keeper.stop() == 0
    assert "Traceback" not in keeper.log


# --- the journal


def journal_of(keeper):
    """The keeper's journal, as a file."""
    return next(
        fd for fd in Path(f"/proc/{keeper}/fd").iterdir() if "vring-journal" in os.readlink(fd)
    ).open("r+b", buffering=0)


def rewritten(state, change):
    """A saved state whose JSON was changed, and whose checksum is right."""
    body = json.loads(state[20:])
    change(body)
    text = json.dumps(body).encode()
    return state[:12] + struct.pack("<II", len(text), zlib.crc32(text)) + text


def set_version(body):
    body["version"] = 99


def set_kind(body):
    body["kind"] = "toaster"


def add_field(body):
    body["state"]["colour"] = "blue"


def more_ports(body):
    body["state"]["max_ports"] += 32


def port_beyond(body):
    body["state"]["ports"]["99"] = body["state"]["ports"].pop("1")


def strange_features(body):
    body["state"]["controller"]["features"] |= 1 << 50


def fewer_queues(body):
    body["state"]["vrings"] = body["state"]["vrings"][:4]


def memory_elsewhere(body):
    body["state"]["regions"][0]["mmap_offset"] = 1 << 40


def dma_elsewhere(body):
    for region in body["state"]["regions"]:
        region["offset"] = 1 << 40


def ring_elsewhere(body):
    body["state"]["vrings"][2]["address"]["descriptor"] = 1 << 60


def more_queues(body):
    body["state"]["num_queues"] = 66


def write_forged(keeper, section, change):
    """Change what the worker wrote, and kill it before it writes again; return its process id."""
    os.kill(keeper.worker, signal.SIGSTOP)
    with journal_of(keeper.process.pid) as file, Journal(file.fileno()) as journal:
        state = journal.read(section)
        assert state, journal.sections
        journal.write(section, change(state))
    return keeper.kill_now()


DEVICE, FRONTEND = "controller-0/console device", "frontend-0/session"
MAPPINGS = "frontend-0/regions.0"


@pytest.mark.parametrize(
    ("protocol", "section", "change", "said"),
    [
        ("vhost-user", FRONTEND, lambda state: state[: len(state) // 2], "it is torn"),
        ("vhost-user", FRONTEND, lambda state: rewritten(state, set_version), "version 99"),
        ("vhost-user", FRONTEND, lambda state: rewritten(state, set_kind), "toaster"),
        ("vhost-user", FRONTEND, lambda state: rewritten(state, add_field), "colour"),
        ("vhost-user", FRONTEND, lambda state: rewritten(state, fewer_queues), "it has 4 queues"),
        ("vhost-user", FRONTEND, lambda state: rewritten(state, memory_elsewhere), "0x10000000000"),
        ("vhost-user", FRONTEND, lambda state: rewritten(state, ring_elsewhere), "queue 2"),
        ("vhost-user", DEVICE, lambda state: state[:-1], "it is torn"),
        ("vhost-user", DEVICE, lambda state: rewritten(state, set_version), "version 99"),
        ("vhost-user", DEVICE, lambda state: rewritten(state, more_ports), "max_ports 63, not 31"),
        ("vhost-user", DEVICE, lambda state: rewritten(state, port_beyond), "it has ports [99]"),
        ("vhost-user", DEVICE, lambda state: rewritten(state, strange_features), "not offered"),
        ("vfio-user", MAPPINGS, lambda state: rewritten(state, dma_elsewhere), "0x10000000000"),
        ("vfio-user", "frontend-0/registers", lambda s: rewritten(s, more_queues), "66 queues"),
        ("vfio-user", "frontend-0/msix", lambda state: b"nonsense", "8 bytes are no saved state"),
    ],
)
async def test_a_forged_state_is_named(tmp_path, protocol, section, change, said):
    async with kept(tmp_path, *PORTS, protocol=protocol) as keeper:
        async with carrying(protocol):
            victim = write_forged(keeper, section, change)
            await keeper.replaced(victim)
            await until(lambda: keeper.log.count(SERVING) > 1, lambda: keeper.log)
            await until(lambda: said in keeper.log, lambda: keeper.log)
        await serves(protocol, keeper)
    if section != DEVICE:  # the session ends, and no worker
        assert keeper.log.count("another one goes on") == 1


async def test_a_forged_session_ends_and_another_vm_of_the_worker_goes_on(tmp_path):
    text = 'workers = "shared"\n'
    for name in "vw":
        text += f'[vm.{name}]\nvhost-user = ["{name}"]\n[vm.{name}.chardev.c]\n'
        text += f'backend = "socket"\npath = "c{name}"\nserver = true\nwait = false\n'
        text += f'[[vm.{name}.port]]\nchardev = "c"\nname = "p"\n'
    Path("vring.toml").write_text(text)
    async with (
        kept(tmp_path, protocol="config", socket="vring.toml") as keeper,
        carrying("vhost-user", "v", "cv"),
        carrying("vhost-user", "w", "cw") as exchange,
    ):
        write_forged(keeper, "0/frontend-0/session", lambda state: rewritten(state, fewer_queues))
        await keeper.logged("it has 4 queues, and the device has")
        await exchange()
        assert keeper.log.count("another one goes on") == 1


@pytest.mark.parametrize(
    ("at", "forged", "said"),
    [
        (8, struct.pack("<I", 2), "the journal has layout 2; 1 is known"),
        (64, b"\xff" * 64, "journal: entry 0"),
        (64, struct.pack("<Q", (1 << 40) << 8 | 12), "is damaged"),
        (135168, random.Random(1).randbytes(1 << 20), "is damaged"),
    ],
    ids=["layout", "directory", "extent", "extents"],
)
async def test_a_journal_that_is_none_any_more_is_named(tmp_path, at, forged, said):
    async with kept(tmp_path, *PORTS) as keeper:
        async with carrying("vhost-user"):
            os.kill(keeper.worker, signal.SIGSTOP)
            with journal_of(keeper.process.pid) as file:
                os.pwrite(file.fileno(), forged, at)
            keeper.kill_now()
            await keeper.logged(said)
            await keeper.logged(SERVING, 2)
        await serves("vhost-user", keeper)


async def test_nothing_that_a_forger_can_think_of_ends_the_service(tmp_path):
    """Numbers of the state are changed at random; whatever becomes of it, the next is served."""
    chance = random.Random(12)

    def change_one(state):
        body = json.loads(state[20:])
        places = []

        def look(value, key, holder):
            if isinstance(value, dict):
                for k, v in value.items():
                    look(v, k, value)
            elif isinstance(value, list):
                for k, v in enumerate(value):
                    look(v, k, value)
            elif isinstance(value, int):
                places.append((holder, key))

        look(body["state"], "state", body)
        for holder, key in chance.sample(places, min(3, len(places))):
            holder[key] = chance.choice([0, 1, -1, 5, 1 << 15, (1 << 16) - 1, 1 << 32, 1 << 63])
        return rewritten(state, lambda b: b.update(body))

    async with kept(tmp_path, *PORTS) as keeper:
        for number in range(8):
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, ResourceError):
                async with carrying("vhost-user"):
                    served = keeper.log.count(SERVING)
                    write_forged(keeper, DEVICE if number % 2 else FRONTEND, change_one)
                    await keeper.logged(SERVING, served + 1)
        await serves("vhost-user", keeper)


# --- the frontend, its memory, terminals and disks


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_frontend_that_has_left_meanwhile_is_gone(tmp_path, protocol):
    program = (
        "import asyncio, os\n"
        "from tests.service.test_bad_input import carrying\n"
        "async def main():\n"
        f"    async with carrying({protocol!r}):\n"
        "        print('there', flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    async with kept(tmp_path, *PORTS, protocol=protocol) as keeper:
        async with running(
            *(sys.executable, "-c", program), stdout=asyncio.subprocess.PIPE, env=environment
        ) as frontend:
            assert await frontend.stdout.readline() == b"there\n"
            os.kill(keeper.worker, signal.SIGSTOP)
            frontend.kill()
            await frontend.wait()
            await keeper.kill_until_served()
        peer = "frontend" if protocol == "vhost-user" else "client"
        await keeper.logged(f"{peer} gone")
        await serves(protocol, keeper)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("late", [False, True], ids=["before", "while it is put back"])
async def test_memory_that_was_cut_off_meanwhile_ends_the_session(tmp_path, protocol, late):
    async with kept(tmp_path, *PORTS, protocol=protocol) as keeper:
        async with carrying(protocol):
            ram = next(
                fd
                for fd in Path("/proc/self/fd").iterdir()
                if os.readlink(fd).startswith("/memfd:vring-guest")
            )
            copy = os.memfd_create("copy")  # the guest's cannot be cut off
            size = os.stat(ram).st_size
            os.truncate(copy, size)
            store(keeper.worker, f"frontend-0/memory.0#{10**8}", copy)
            victim = keeper.worker
            if not late:
                os.truncate(copy, size // 2)
            keeper.kill_now()
            if late:
                await keeper.replaced(victim)
                os.truncate(copy, 0)
            os.close(copy)
            await keeper.logged("connection closed")
        await serves(protocol, keeper)
    assert keeper.log.count("another one goes on") == 1


async def test_a_disk_that_is_full_stops_one_port_and_nothing_else(tmp_path):
    full = ("--chardev", "file,id=f,path=/dev/full", "--port", "chardev=f,nr=2,name=full")
    async with kept(tmp_path, *PORTS, *full) as keeper, carrying("vhost-user") as exchange:
        for served in range(1, 3):
            await keeper.kill_until_served()
            await exchange()
            assert keeper.log.count(SERVING) == served + 1
        assert await keeper.stop() == 0
    assert "Traceback" not in keeper.log


async def test_a_log_on_a_full_disk_stops_nothing(tmp_path):
    arguments = (*PORTS, "--log-file", "/dev/full")
    async with kept(tmp_path, *arguments, ready="") as keeper:
        await until(lambda: os.path.exists("v") and os.path.exists("c"))
        async with carrying("vhost-user") as exchange:
            await keeper.kill()
            await exchange()
        assert await keeper.stop() == 0


@asynccontextmanager
async def on_a_terminal(*arguments):
    """A service with a terminal that it controls; yields the process and the terminal's far end."""
    master, slave = os.openpty()

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    try:
        with open("log", "ab") as log:
            async with running(
                *(sys.executable, "-m", "vring_serial", "serve"),
                *("--vhost-user", "v", *arguments),
                stdin=slave,
                stdout=slave,
                stderr=log,
                start_new_session=True,
                preexec_fn=take_terminal,
            ) as process:
                os.close(slave)
                slave = -1
                yield process, master
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)


async def test_a_terminal_that_hangs_up_stops_the_service(tmp_path):
    """The worker is in its sandbox, a second one, and finds out what the SIGHUP was about."""
    console = ("--chardev", "stdio,id=s", "--port", "chardev=s,nr=1,name=p")
    log = tmp_path / "log"
    async with on_a_terminal(*console) as (process, master):
        await until_file_says(log, SERVING)
        worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(worker), signal.SIGKILL)
        await until_file_says(log, SERVING, 2)
        async with EmbeddedGuest("v", memory=RAM) as guest:
            port = await guest.wait_port(name="p")
            await port.wait_host()
            _, writer = await port.open()
            writer.write(b"to the terminal")
            await until(lambda: select.select([master], [], [], 0)[0])
            assert b"to the terminal" in os.read(master, 100)
            nothing = os.open("/dev/null", os.O_RDWR)
            os.dup2(nothing, master)  # the far end is closed
            os.close(nothing)
            async with asyncio.timeout(DEADLINE):
                assert await process.wait() == 0
    assert "Traceback" not in log.read_text()
    assert sorted(os.listdir()) == ["log"]
