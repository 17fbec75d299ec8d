"""`vring upgrade`: other code goes on, and whoever talks to the device notices nothing.

``VRING_UPGRADES`` says how often.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.keeper import kept, socket_ports
from tests.support.processes import running
from tests.support.streams import all_go_on, flowing
from tests.support.versions import Versions
from tests.support.vfio_guest import VfioGuest
from tests.support.waiting import until
from vring_serial import EmbeddedGuest

UPGRADES = int(os.environ.get("VRING_UPGRADES", "3"))
PORTS = 4
UPGRADE = "vring_serial/service/upgrade.py"
#: The patience of a test.
SHORT = {UPGRADE: ("HAND_OVER_SECONDS = 5.0", "HAND_OVER_SECONDS = 2.0")}


def vhost_user(packed):
    return EmbeddedGuest("v", memory=64 << 20, packed=packed)


def vfio_user(packed):
    return VfioGuest("v", PORTS, packed=packed)


@pytest.fixture
def versions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short socket paths
    found = Versions(tmp_path / "versions")
    found.make("1")
    found.make("2")
    found.install("1")
    return found


async def upgrade(*arguments):
    """Run `vring upgrade`; return its status and its text."""
    async with running(
        *(sys.executable, "-m", "vring_serial", "upgrade", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        text, _ = await process.communicate()
    return process.returncode, text.decode()


def memory_of(pid):
    """Bytes that a process has for itself."""
    status = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty: +(\d+) kB", status)[1]) << 10


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("make_guest", [vhost_user, vfio_user])
async def test_no_upgrade_is_noticed(tmp_path, versions, make_guest, packed):
    protocol = "vhost-user" if make_guest is vhost_user else "vfio-user"
    ports = range(1, PORTS + 1)
    arguments = [*socket_ports(ports), *(["--packed"] if packed else []), "--pid-file", "pid"]
    pauses = []
    async with (
        kept(tmp_path, *arguments, protocol=protocol, environment=versions.environment) as keeper,
        make_guest(packed) as guest,
    ):
        async with flowing(keeper, guest, ports, random.Random(UPGRADES)) as streams:
            for number in range(UPGRADES):
                old, new = (number % 2 + 1, 2 - number % 2)
                versions.install(str(new))
                worker = keeper.worker
                status, text = await upgrade("--pid-file", "pid")
                assert status == 0, keeper.log
                assert f"upgraded from {old} to {new}, with 1 of its workers" in text
                pauses.append(float(re.search(r"pause was ([\d.]+) ms", text)[1]))
                assert keeper.worker != worker
                await all_go_on(streams)
                if not number:
                    held, memory = keeper.held, memory_of(keeper.process.pid)
            assert keeper.held == held
            assert len(os.listdir(f"/proc/{keeper.process.pid}/task")) == 1
            assert memory_of(keeper.process.pid) < memory + (2 << 20)
            await keeper.kill()  # the new keeper knows what to do
            await all_go_on(streams)
            print("pauses", sorted(pauses), max(s.longest_pause for s in streams))
        assert await keeper.stop() == 0
    log = keeper.log
    assert log.count("another process goes on from here") == UPGRADES
    peer = "frontend" if make_guest is vhost_user else "client"
    assert log.count(f"{peer} connected") == 1
    assert log.partition("stopping")[0].count(f"{peer} gone") == 0
    assert log.count("opened by the guest") == PORTS
    assert "warning" not in log
    assert not os.path.exists("pid")
    assert not os.path.exists("v")


KEPT = "vring_serial/cli/kept.py"
HANGS = {KEPT: ("def _work(", "import signal\n\nsignal.pause()\n\n\ndef _work(")}
BROKEN = {
    "syntax": ({KEPT: ("def _work(", "def _work((")}, "SyntaxError"),
    "exit": ({KEPT: ("def _work(", "raise SystemExit(3)\n\n\ndef _work(")}, "it said nothing"),
    "crash": (
        {KEPT: ("def _work(", "os.kill(os.getpid(), 11)\n\n\ndef _work(")},
        "it said nothing",
    ),
    "state": (
        {"vring_serial/device/console/state.py": ('"console device", 1,', '"console device", 9,')},
        "state of 'console device' has version 1; versions 9 to 9 are known",
    ),
    "worker crashes": (
        {KEPT: ("    def work() -> None:\n", "    def work() -> None:\n        os.abort()\n")},
        "its worker ended before it served",
    ),
    "worker hangs": (
        {
            KEPT: (
                "    def work() -> None:\n",
                "    def work() -> None:\n        import signal\n\n        signal.pause()\n",
            )
        },
        "it did not serve within 2 s",
    ),
}


async def test_a_version_that_does_not_start_leaves_the_one_before(tmp_path, versions):
    versions.make("3", SHORT)
    for how, (changes, _) in BROKEN.items():
        versions.make(how, changes)
    versions.install("3")
    async with (
        kept(tmp_path, *socket_ports([1]), environment=versions.environment) as keeper,
        vhost_user(False) as guest,
        flowing(keeper, guest, [1], random.Random(1)) as streams,
    ):
        pid = str(keeper.process.pid)
        await keeper.kill()
        await all_go_on(streams)
        held = keeper.held
        for how, (_, why) in BROKEN.items():
            versions.install(how)
            status, text = await upgrade(pid)
            assert status == 1, how
            assert why in text, how
            assert "the version before goes on" in text
            await all_go_on(streams)
            assert keeper.held == held, how
        await keeper.kill()
        await all_go_on(streams)
        versions.install("2")
        status, text = await upgrade(pid)
        assert status == 0, text
        assert "from 3 to 2" in text
        await all_go_on(streams)
    assert keeper.log.count("frontend connected") == 1


async def test_a_version_that_does_not_end_its_loading_is_given_up(tmp_path, versions):
    versions.make("3", {UPGRADE: ("LOAD_SECONDS = 30.0", "LOAD_SECONDS = 3.0")})
    versions.make("4", HANGS)
    versions.install("3")
    async with kept(tmp_path, *socket_ports([1]), environment=versions.environment) as keeper:
        versions.install("4")
        status, text = await upgrade(str(keeper.process.pid))
        assert status == 1
        assert "it did not load within 3 s; the version before goes on" in text
        assert await keeper.stop() == 0


async def test_upgrades_and_deaths_at_once_are_not_noticed_either(tmp_path, versions):
    chance = random.Random(7)
    async with (
        kept(tmp_path, *socket_ports([1, 2]), environment=versions.environment) as keeper,
        vhost_user(True) as guest,
        flowing(keeper, guest, [1, 2], chance) as streams,
    ):
        pid = keeper.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        succeeded = 0
        for number in range(2 * UPGRADES):
            versions.install(str(2 - succeeded % 2))
            upgrading = asyncio.create_task(upgrade(str(pid)))
            while not upgrading.done():
                await asyncio.sleep(chance.random() * 0.7)
                found = children.read_text().split()
                if number % 2 and found:
                    with suppress(ProcessLookupError):  # a worker, or the one that is tried
                        os.kill(int(chance.choice(found)), signal.SIGKILL)
            status, text = await upgrading
            assert status == 0 or "the version before goes on" in text
            succeeded += not status
            await all_go_on(streams)
        assert succeeded >= UPGRADES
        assert "begins anew" not in keeper.log
        assert keeper.log.count("frontend connected") == 1


async def test_a_domain_on_standard_input_is_remembered(tmp_path, versions):
    domain = tmp_path / "domain.xml"
    domain.write_text(
        "<domain><devices><channel type='null'>"
        "<target type='virtio' name='org.example.a'/></channel></devices></domain>"
    )
    with domain.open("rb") as stdin:
        async with kept(
            tmp_path, "--domain", "-", stdin=stdin, environment=versions.environment
        ) as keeper:
            domain.write_text("no domain any more")
            versions.install("2")
            status, text = await upgrade(str(keeper.process.pid))
            assert status == 0, text
            async with EmbeddedGuest("v", memory=32 << 20) as guest:
                await guest.wait_port(name="org.example.a")


async def test_what_cannot_be_upgraded_is_told_and_lives_on(tmp_path):
    async with running("sleep", "60") as process:
        assert await upgrade(str(process.pid)) == (
            1,
            f"vring: process {process.pid} is no keeper of `vring serve`\n",
        )
        assert process.returncode is None
    (tmp_path / "pid").write_text("nonsense")
    for arguments, status, why in [
        (("--pid-file", str(tmp_path / "pid")), 1, "holds no process id"),
        (("--pid-file", str(tmp_path / "none")), 1, "No such file"),
        ((str(process.pid),), 1, f"there is no process {process.pid}"),
        ((), 2, "either a process id or --pid-file"),
    ]:
        found, text = await upgrade(*arguments)
        assert found == status
        assert why in text
        assert text.count("\n") == 1


async def test_a_keeper_that_stops_gives_up_an_upgrade(tmp_path, versions):
    versions.make("3", HANGS)
    async with kept(tmp_path, *socket_ports([1]), environment=versions.environment) as keeper:
        versions.install("3")
        upgrading = asyncio.create_task(upgrade(str(keeper.process.pid)))
        pid = keeper.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        await until(lambda: len(children.read_text().split()) == 2)
        assert await keeper.stop() == 0
        status, text = await upgrading
        assert status == 1
        assert f"process {pid} has ended" in text or "the service stops" in text


KEEPER = "vring_serial/service/keeper.py"
BEGINS = "        self._reporter.begin()\n"
HANDED = "                self._leaving.add(worker)\n"


def closing(at, seconds):
    """A change after a line of the keeper: a helper process begins to close for so long."""
    indent = at[: len(at) - len(at.lstrip())]
    lines = (
        "import mmap",
        "from vring_serial.service.aside import _Helper",
        f"helper = os.posix_spawnp('sleep', ['sleep', '{seconds}'], os.environ)",
        "helpers = self._workers[0].store.aside._helpers",
        "helpers.append(_Helper(helper, [], mmap.mmap(-1, 4)))",
    )
    return at, at + "".join(f"{indent}{line}\n" for line in lines)


@pytest.mark.parametrize("at", [BEGINS, HANDED], ids=["before it", "at its end"])
async def test_an_upgrade_waits_for_what_is_being_closed(tmp_path, versions, at):
    versions.make("3", {KEEPER: closing(at, 1)})
    versions.install("3")
    async with kept(tmp_path, *socket_ports([1]), environment=versions.environment) as keeper:
        versions.install("2")
        begun = time.monotonic()
        status, text = await upgrade(str(keeper.process.pid))
        assert status == 0, text
        assert "upgraded from 3 to 2" in text
        assert time.monotonic() - begun > 1
        assert await keeper.stop() == 0


@pytest.mark.parametrize("at", [BEGINS, HANDED], ids=["before it", "at its end"])
async def test_an_upgrade_does_not_wait_for_ever(tmp_path, versions, at):
    versions.make(
        "3",
        {KEEPER: closing(at, 4), UPGRADE: ("CLOSE_SECONDS = 5.0", "CLOSE_SECONDS = 0.2")},
    )
    versions.install("3")
    async with kept(tmp_path, *socket_ports([1]), environment=versions.environment) as keeper:
        versions.install("2")
        status, text = await upgrade(str(keeper.process.pid))
        assert status == 1
        assert "something that a worker stored cannot be closed" in text
        assert "the version before goes on" in text
        assert await keeper.stop() == 0


async def test_a_keeper_that_stops_does_not_wait_for_what_is_being_closed(tmp_path, versions):
    versions.make("3", {KEEPER: closing(BEGINS, 3)})
    versions.install("3")
    async with kept(tmp_path, *socket_ports([1]), environment=versions.environment) as keeper:
        upgrading = asyncio.create_task(upgrade(str(keeper.process.pid)))
        pid = keeper.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        await until(lambda: len(children.read_text().split()) == 2)
        assert await keeper.stop() == 0
        assert (await upgrading)[0] == 1
    assert "upgrade: the service stops; the version before goes on" in keeper.log


async def test_a_console_keeps_what_waits_in_it(tmp_path, versions):
    """Its guest never waits for whoever reads: the device has what the socket did not take."""
    console = ("--chardev", "socket,id=c,path=c,server=on,wait=off", "--console", "chardev=c,nr=1")
    said = random.Random(1).randbytes(900_000)
    async with (
        kept(tmp_path, *console, environment=versions.environment) as keeper,
        vhost_user(False) as guest,
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("c")
            port = await guest.wait_port(nr=1)
            await port.wait_host()
            _, writer = await port.open()
            writer.write(said)
            await writer.drain()
            versions.install("2")
            status, text = await upgrade(str(keeper.process.pid))
            assert status == 0, text
            client.settimeout(30)
            got = bytearray()
            while len(got) < len(said):
                got += await asyncio.to_thread(client.recv, 1 << 20)
            assert got == said
            writer.close()
        assert "dropped" not in keeper.log


async def test_all_vms_of_a_service_and_its_monitor_are_upgraded(tmp_path, versions):
    config = tmp_path / "vring.toml"
    config.write_text(
        'qmp = ["unix:qmp,server=on,wait=off"]\n'
        + "".join(
            f'[vm.{name}]\nvhost-user = ["{name}"]\n'
            f'[vm.{name}.chardev.c]\nbackend = "socket"\npath = "c{nr}"\n'
            "server = true\nwait = false\n"
            f'[[vm.{name}.port]]\nchardev = "c"\nname = "org.example.data{nr}"\n'
            for nr, name in enumerate(("a", "b"), 1)
        )
    )
    environment = versions.environment
    async with (
        kept(tmp_path, protocol="config", socket=config.name, environment=environment) as keeper,
        EmbeddedGuest("a", memory=32 << 20) as first,
        EmbeddedGuest("b", memory=32 << 20) as second,
        flowing(keeper, first, [1], random.Random(1)) as streams,
        flowing(keeper, second, [2], random.Random(2)) as others,
    ):
        config.write_text("an edit that is no configuration yet")
        for new in ("2", "1"):
            versions.install(new)
            status, text = await upgrade(str(keeper.process.pid))
            assert status == 0, text
            assert "with 3 of its workers" in text
            await all_go_on([*streams, *others])
        reader, writer = await asyncio.open_unix_connection("qmp")
        assert b'"QMP"' in await reader.readline()
        writer.close()
