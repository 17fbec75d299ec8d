"""`vring serve --descriptor-store`: a service manager keeps what our own keeper would keep."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.keeper import socket_ports
from tests.support.leaks import held
from tests.support.service_manager import StoringManager
from tests.support.streams import all_go_on, flowing
from tests.support.vfio_guest import VfioGuest
from vring_serial import EmbeddedGuest
from vring_serial.service.journal import Journal
from vring_serial.service.manager_store import ManagerStore

COMMAND = ("-m", "vring_serial", "serve", "--descriptor-store")


async def connect(nr):
    return await asyncio.open_unix_connection(f"c{nr}")


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("protocol", ["vhost-user", "vfio-user"])
async def test_neither_deaths_nor_restarts_are_noticed(tmp_path, protocol):
    command = (*COMMAND, f"--{protocol}", "v", *socket_ports([1, 2]), "--pid-file", "pid")
    async with StoringManager(tmp_path, *command) as manager:
        vhost = protocol == "vhost-user"
        guest = EmbeddedGuest("v", memory=64 << 20) if vhost else VfioGuest("v", 2)
        flow = flowing(manager, guest, [1, 2], random.Random(1), connect)
        async with guest, flow as streams:
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGTERM):
                await manager.signal(number)
                await all_go_on(streams)
                assert Path("pid").read_text() == f"{manager.process.pid}\n"
        peer = "frontend" if vhost else "client"
        assert manager.log.count(f"{peer} connected") == 1
        assert manager.log.count(f"{peer} resumed") == 4
        assert manager.starts == 5
        assert "warning" not in manager.log
        assert "error" not in manager.log


async def test_what_cannot_be_gone_on_with_is_dropped_and_the_service_begins_anew(tmp_path):
    async with StoringManager(
        tmp_path, *COMMAND, "--vhost-user", "v", *socket_ports([1])
    ) as manager:
        journal = next(fd for name, fd in manager.store if name == "journal")
        os.pwrite(journal, b"nonsense", 0)
        await manager.signal(signal.SIGKILL)
        assert "cannot be gone on with: the journal does not begin as one" in manager.log
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            await guest.wait_port(name="org.example.data1")
        await manager.signal(signal.SIGKILL)
        assert manager.log.count("cannot be gone on with") == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "--descriptor-store: nobody keeps anything: there is no NOTIFY_SOCKET"),
        (("--keeper",), "Give either --keeper or --descriptor-store, and not both"),
    ],
)
def test_it_needs_a_manager_and_no_keeper(options, why):
    done = subprocess.run(
        [sys.executable, *COMMAND, "--vhost-user", "v", *socket_ports([1]), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert why in done.stderr


def test_one_file_in_several_roles_is_there_until_the_last_is_dropped():
    """systemd ignores what is stored again, and removes a file with its name."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    fd = Journal.create()
    event = os.eventfd(0)

    def told():
        found = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(theirs, 4096, 9)
            except BlockingIOError:
                return found
            for each in fds:
                os.close(each)
            found.append(data.decode().split("\n")[:2])

    before = held()
    with Journal(fd) as journal:
        store = ManagerStore(ours.dup(), journal, {})
        store.store("kick#1", event)
        store.store("call#2", event)
        store.store("kick#3", event)
        store.remove("kick#1")
        assert told() == [["FDSTORE=1", "FDNAME=kick#1"]]
        store.close()
        again = ManagerStore(ours.dup(), journal, {"kick#1": [os.dup(event)]})
        left = again.left
        assert sorted(left) == ["call#2", "kick#3"]
        for fds in left.values():
            os.close(*fds)
        again.remove("call#2")
        assert told() == []
        again.remove("kick#3")
        assert told() == [["FDSTOREREMOVE=1", "FDNAME=kick#1"]]
        again.close()
    assert held() == before
    for each in (fd, event):
        os.close(each)
    ours.close()
    theirs.close()
