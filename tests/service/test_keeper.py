"""The keeper: workers die as they like, and whoever talks to them notices nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

PROGRAM = Path(__file__).with_name("echo_keeper.py")


class Client:
    """Talks to one worker."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise

    def ask(self, said=b"."):
        self.sock.sendall(said)
        answer = self.sock.recv(16, socket.MSG_WAITALL)
        assert len(answer) == 16
        return struct.unpack("<QQ", answer)


@pytest.fixture
def start(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*names, **environment):
            process = subprocess.Popen(
                [sys.executable, PROGRAM, *(tmp_path / name for name in names)],
                stderr=subprocess.PIPE,
                env=os.environ | environment,
                start_new_session=True,
            )
            stack.callback(end, process)
            return process

        yield start


@pytest.fixture
def connect(tmp_path):
    """Connect to the worker of that name as soon as it listens."""
    clients = []

    def connect(name):
        def connected():
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                clients.append(Client(tmp_path / name))
                return True

        wait_until(connected)
        return clients[-1]

    yield connect
    for client in clients:
        client.sock.close()


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def descriptors(process):
    directory = Path(f"/proc/{process.pid}/fd")
    return sorted(os.readlink(fd).partition(":")[0] for fd in directory.iterdir())


def settled(keeper):
    """Wait until the keeper has taken what its two workers told it: they serve before that.

    It has three pidfds, its own too, both ends of two channels, and a listener and a peer of each.
    """

    def has_all():
        found = descriptors(keeper)
        return (found.count("anon_inode"), found.count("socket")) == (3, 8)

    wait_until(has_all)


def test_a_client_notices_no_death_of_its_worker(start, connect):
    keeper = start("one", "two")
    one, two = connect("one"), connect("two")
    _, other = two.ask()
    one.ask()
    settled(keeper)
    before = descriptors(keeper)
    chance = random.Random(1)
    pids = set()
    for i in range(1, 41):
        count, pid = one.ask()
        assert count == 1 + i
        pids.add(pid)
        number = chance.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
        if i % 6 < 4:
            os.kill(pid, number)
    assert len(pids) > 10
    assert two.ask() == (2, other)
    settled(keeper)
    assert descriptors(keeper) == before
    keeper.send_signal(signal.SIGTERM)
    _, log = keeper.communicate(timeout=30)
    assert keeper.returncode == 0
    assert b"another one goes on" in log


def test_it_stops_by_a_signal(start, connect):
    keeper = start("one")
    client = connect("one")
    client.ask()
    keeper.send_signal(signal.SIGINT)
    assert keeper.wait(30) == 0
    assert client.sock.recv(1) == b""


def test_a_worker_that_dies_again_and_again_begins_anew(start, connect, tmp_path):
    keeper = start("one")
    client = connect("one")
    client.ask()
    client.sock.sendall(b"sssss")
    assert client.sock.recv(1) == b""  # it got no other worker
    (tmp_path / "one").unlink()
    assert connect("one").ask()[0] == 1
    assert keeper.poll() is None


def test_one_that_never_begins_ends_the_service_with_its_status(start, tmp_path):
    (tmp_path / "one").touch()
    keeper = start("one")
    _, log = keeper.communicate(timeout=30)
    assert keeper.returncode == 1
    assert b"Address already in use" in log
