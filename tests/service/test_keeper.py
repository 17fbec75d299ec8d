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
import time
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from vring_serial.service.aside import MOST
from vring_serial.service.descriptor_store import HEAR_SECONDS
from vring_serial.service.keeper import KILL_SECONDS, STOP_SECONDS
from vring_serial.service.succession import find_report, read_report

PROGRAM = Path(__file__).with_name("echo_keeper.py")


class Client:
    """Talks to one worker."""

    def __init__(self, path):
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise

    def give(self, fd):
        """Have the worker store a descriptor."""
        self.sock.sendall(b"f")
        socket.send_fds(self.sock, [b"."], [fd])
        self.ask(b"")

    def ask(self, said=b"."):
        self.sock.sendall(said)
        answer = self.sock.recv(24, socket.MSG_WAITALL)
        assert len(answer) == 24
        count, pid, self.version = struct.unpack("<QQQ", answer)
        return count, pid


@pytest.fixture
def start(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*names, **environment):
            (tmp_path / "version").write_text("1.0")
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


def next_life(client):
    """Kill the client's worker; the process id of the next one."""
    count, pid = client.ask()
    os.kill(pid, signal.SIGKILL)
    next_count, next_pid = client.ask()
    assert (next_count, next_pid != pid) == (count + 1, True)
    return next_pid


def ends_soon(keeper):
    """Tell the keeper to stop; what it logged."""
    begun = time.monotonic()
    keeper.send_signal(signal.SIGTERM)
    keeper.wait(30)
    assert time.monotonic() - begun < STOP_SECONDS + KILL_SECONDS + 3
    log = []
    os.set_blocking(keeper.stderr.fileno(), False)  # a worker that is left has it open
    with contextlib.suppress(BlockingIOError, TypeError):
        while data := os.read(keeper.stderr.fileno(), 1 << 16):
            log.append(data)
    return b"".join(log)


def test_a_worker_that_loops_or_is_stopped_holds_nobody_up(start, connect):
    keeper = start("one", "two", "three")
    one, two, three = (connect(name) for name in ("one", "two", "three"))
    one.sock.sendall(b"l")
    _, stopped = two.ask()
    os.kill(stopped, signal.SIGSTOP)
    three.ask()
    next_life(three)
    log = ends_soon(keeper)
    assert keeper.returncode == 1
    assert b"cannot be killed" not in log
    assert three.sock.recv(1) == b""


def test_a_flood_of_messages_of_one_worker_leaves_room_for_those_of_others(start, connect):
    keeper = start("one", "two")
    one, two = connect("one"), connect("two")
    one.ask()
    one.sock.sendall(b"F")
    for _ in range(3):
        next_life(two)  # after each, a listener and a peer are taken, and READY=1 is heard
    log = ends_soon(keeper)
    assert b"one: its worker has more descriptors than can be kept" in log


def test_a_file_that_nobody_can_close_is_its_workers_harm(start, connect, request):
    """The keeper does not wait for it, nor does another worker; and its own cannot be killed."""
    keeper = start("one", "two")
    one, two = connect("one"), connect("two")
    one.ask()
    two.ask()
    hostile_files = request.getfixturevalue("hostile_files")  # no child of ours must inherit them
    one.give(hostile_files.fuse)
    next_life(two)
    assert not any("hostile" in name for name in descriptors(keeper))
    log = ends_soon(keeper)
    assert b"one: its worker has a file that is not kept" in log
    assert b"one: process" in log
    assert b"cannot be killed, and is left" in log
    assert b"two" not in log.partition(b"cannot be killed")[2]
    assert keeper.returncode == 1
    assert two.sock.recv(1) == b""  # nothing of it is open in what was left
    assert not hostile_files.gone
    hostile_files.end()


def test_more_files_that_nobody_can_close_end_their_worker(start, connect, request):
    keeper = start("one", "two")
    one, two = connect("one"), connect("two")
    one.ask()
    hostile_files = request.getfixturevalue("hostile_files")
    for _ in range(MOST + 1):
        one.give(hostile_files.overlay)
    next_life(two)
    log = ends_soon(keeper)
    assert not hostile_files.gone
    hostile_files.end()
    assert b"one: its worker stores what cannot be closed" in log


def test_a_keeper_that_is_stopped_holds_no_worker_up(start, connect):
    """What it was not told in time cannot be gone on with: the next worker begins anew."""
    keeper = start("one")
    client = connect("one")
    client.ask()
    os.kill(keeper.pid, signal.SIGSTOP)
    begun = time.monotonic()
    for i in range(300):  # each time it drops one peer and keeps another one
        client.sock.close()
        client = connect("one")
        assert client.ask()[0] == 2 + i
    assert time.monotonic() - begun > HEAR_SECONDS
    os.kill(keeper.pid, signal.SIGCONT)
    client.sock.sendall(b"s")
    assert client.sock.recv(1) == b""
    Path(client.path).unlink()
    assert connect("one").ask()[0] == 1
    assert keeper.poll() is None
    assert b"sessions end here" in ends_soon(keeper)


def test_one_that_never_begins_ends_the_service_with_its_status(start, tmp_path):
    (tmp_path / "one").touch()
    keeper = start("one")
    _, log = keeper.communicate(timeout=30)
    assert keeper.returncode == 1
    assert b"Address already in use" in log


@pytest.fixture
def upgrade(tmp_path):
    """Have a keeper upgraded to what the file ``version`` is to say; return what it says then."""

    def upgrade(keeper, version):
        (tmp_path / "version").write_text(version)
        fd = find_report(keeper.pid)
        try:
            before = read_report(fd).upgrades
            keeper.send_signal(signal.SIGUSR2)
            wait_until(lambda: (report := read_report(fd)) and report.upgrades > before)
            return read_report(fd)
        finally:
            os.close(fd)

    return upgrade


def test_workers_and_keeper_are_replaced_and_a_death_afterwards_is_as_before(
    start, connect, upgrade
):
    keeper = start("one", "two")
    clients = [connect("one"), connect("two")]
    pids = [client.ask()[1] for client in clients]
    settled(keeper)
    before = descriptors(keeper)
    for number in range(2, 5):
        report = upgrade(keeper, f"1.{number}")
        assert (report.version, report.succeeded) == (f"1.{number}", True)
        answers = [client.ask() for client in clients]
        assert [count for count, _ in answers] == [number] * 2
        assert [client.version for client in clients] == [10 + number] * 2
        assert not set(pids) & {pid for _, pid in answers}
        pids += [pid for _, pid in answers]
    os.kill(pids[-1], signal.SIGKILL)
    assert clients[1].ask()[0] == 5
    settled(keeper)
    assert descriptors(keeper) == before
    keeper.send_signal(signal.SIGTERM)
    _, log = keeper.communicate(timeout=30)
    assert keeper.returncode == 0
    assert log.count(b"another one goes on") == 1


@pytest.mark.parametrize(("version", "stays"), [("1.1 two", False), ("2.0 two", True)])
def test_a_worker_that_was_handed_over_goes_back_if_another_one_fails(
    start, connect, upgrade, version, stays
):
    """Not if the old code does not know the formats of the new one."""
    keeper = start("one", "two")
    one, two = connect("one"), connect("two")
    pids = [one.ask()[1], two.ask()[1]]
    settled(keeper)
    before = descriptors(keeper)
    report = upgrade(keeper, version)
    assert not report.succeeded
    assert report.version == "1.0"
    assert "/two: its worker ended before it served" in report.text
    assert ("its workers stay" in report.text) == stays
    count, other = two.ask()
    assert (count, two.version) == (2, 10)
    assert other != pids[1]
    one.ask()
    if stays:
        assert one.version == 20
    else:
        wait_until(lambda: one.ask() and one.version == 10)
    settled(keeper)
    assert descriptors(keeper) == before
    assert upgrade(keeper, "1.2").succeeded
    assert two.ask()[0] == 3
    one.ask()
    assert (one.version, two.version) == (12, 12)
