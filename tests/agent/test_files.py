"""Files from the host to the guest: every way in which that can go, on both ends."""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
from types import SimpleNamespace

import pytest

from tests.support.leaks import held
from tests.support.waiting import until
from vring_serial import (
    AgentGoneError,
    AgentTimeoutError,
    AgentTrouble,
    AgentUnsupportedError,
    FileRefusedError,
    FileTransferError,
    HostAgent,
)
from vring_serial.agent.channel import receiver as receiver_module
from vring_serial.agent.channel.receiver import FileReceiver, safe_name
from vring_serial.proto.agent import (
    FileInfo,
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    Monitor,
)


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 5 << 20])
async def test_a_file_arrives(file_pair, make_file, size):
    path = make_file("hello world.bin", size)
    progress = []
    await file_pair.host.send_file(path, on_progress=lambda *at: progress.append(at))
    assert (file_pair.downloads / "hello world.bin").read_bytes() == path.read_bytes()
    assert progress[0] == (0, size)
    assert progress[-1] == (size, size)
    await file_pair.host.send_file(path)
    assert (file_pair.downloads / "hello world (1).bin").read_bytes() == path.read_bytes()


async def test_several_at_once_and_one_is_cancelled(file_pair, make_file):
    paths = [make_file(f"file{n}", 3 << 20) for n in range(4)]
    started = asyncio.Event()
    sending = [
        asyncio.ensure_future(
            file_pair.host.send_file(
                path, on_progress=lambda sent, _: started.set() if sent else None
            )
        )
        for path in paths
    ]
    await started.wait()
    sending[1].cancel()
    results = await asyncio.gather(*sending, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert [results[0], results[2], results[3]] == [None] * 3
    await until(lambda: not (file_pair.downloads / "file1").exists())
    for path in [paths[0], *paths[2:]]:
        there = (file_pair.downloads / path.name).read_bytes()
        assert hashlib.sha256(there).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert not [e for e in file_pair.host_events if isinstance(e, AgentTrouble)]
    await file_pair.host.set_monitors([Monitor(1, 1)])


async def test_what_is_no_file_is_refused_clearly(file_pair, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, why in [
        (".", "is a directory; send the files in it"),
        ("missing", "No such file"),
        ("fifo", "not a regular file"),
    ]:
        with pytest.raises(FileTransferError, match=why):
            await file_pair.host.send_file(tmp_path / name)
    assert not file_pair.downloads.exists()


async def test_a_file_that_shrinks_is_cancelled(file_pair, make_file):
    path = make_file("shrinks", 1 << 20)

    def shrink(sent, _):
        if sent:
            os.truncate(path, 70_000)

    with pytest.raises(FileTransferError, match="became shorter"):
        await file_pair.host.send_file(path, on_progress=shrink)
    await until(lambda: not (file_pair.downloads / "shrinks").exists())


async def test_the_channel_closes_in_the_middle(file_pair, make_file):
    path = make_file("lost", 64 << 20)
    started = asyncio.Event()
    sending = asyncio.ensure_future(
        file_pair.host.send_file(path, on_progress=lambda sent, _: sent and started.set())
    )
    await started.wait()
    await file_pair.disconnect()
    with pytest.raises(AgentGoneError):
        await sending
    assert list(file_pair.downloads.iterdir()) == []
    await file_pair.connect()
    await file_pair.host.send_file(make_file("next", 100_000))
    assert (file_pair.downloads / "next").stat().st_size == 100_000


async def test_no_space(file_pair, make_file, monkeypatch):
    disk = SimpleNamespace(f_bavail=10, f_frsize=1000)
    monkeypatch.setattr(receiver_module.os, "statvfs", lambda _: disk)
    await file_pair.host.send_file(make_file("fits", 10_000))
    with pytest.raises(FileRefusedError, match="10000 bytes are free, 10001 are needed"):
        await file_pair.host.send_file(make_file("big", 10_001))
    assert [p.name for p in file_pair.downloads.iterdir()] == ["fits"]


async def test_a_guest_that_takes_no_files(pair, make_file):
    await pair.connect()
    with pytest.raises(AgentUnsupportedError, match="FILE_XFER_DISABLED"):
        await pair.host.send_file(make_file("x", 1))


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (FileXferStatus(1, FileXferResult.CANCELLED), "the guest cancelled it"),
        (FileXferStatus(1, FileXferResult.DISABLED), "does not take files"),
        (FileXferStatus(1, FileXferResult.SESSION_LOCKED), "locked"),
        (FileXferStatus(1, FileXferResult.VDAGENT_NOT_CONNECTED), "nobody is logged in"),
        (FileXferStatus(1, FileXferResult.ERROR), "failed to take it$"),
        (
            FileXferStatus(1, FileXferResult.ERROR, b"\0" + struct.pack("<I", 14)),
            "permission denied",
        ),
        (FileXferStatus(1, FileXferResult.NOT_ENOUGH_SPACE), "not enough space"),
        (FileXferStatus(1, FileXferResult.SUCCESS), "enough of it before its end"),
        (FileXferStatus(1, 77), "unknown status 77"),
    ],
)
async def test_refusals_are_explained(raw_agent, make_file, status, match):
    host = HostAgent(timeout=30)
    agent = await raw_agent(host)
    await agent.greet()
    await host.wait_ready()
    sending = asyncio.ensure_future(host.send_file(make_file("x", 10 << 20)))
    start = await agent.receive(FileXferStart)
    assert FileInfo.unpack(start.info) == FileInfo("x", 10 << 20)
    assert start.info.endswith(b"\0")
    agent.send(FileXferStatus(1, FileXferResult.CAN_SEND_DATA))
    assert len((await agent.receive(FileXferData)).data) == 65536
    agent.send(status)
    with pytest.raises(FileRefusedError, match=match):
        await sending


async def test_an_agent_that_does_not_answer_is_told_that_it_is_over(raw_agent, make_file):
    host = HostAgent(timeout=0.05)
    agent = await raw_agent(host)
    await agent.greet()
    await host.wait_ready()
    with pytest.raises(AgentTimeoutError, match="did not answer the offer"):
        await host.send_file(make_file("x", 1))
    assert await agent.receive(FileXferStatus) == FileXferStatus(1, FileXferResult.CANCELLED)
    sending = asyncio.ensure_future(host.send_file(make_file("y", 1)))
    await agent.receive(FileXferStart)
    agent.send(FileXferStatus(2, FileXferResult.CAN_SEND_DATA))
    with pytest.raises(AgentTimeoutError, match="did not confirm"):
        await sending
    agent.send(FileXferStatus(2, FileXferResult.SUCCESS))  # too late, and no trouble


async def test_a_status_for_a_transfer_that_never_was(raw_agent):
    events = []
    host = HostAgent(timeout=30, on_event=events.append)
    agent = await raw_agent(host)
    await agent.greet()
    agent.send(FileXferStatus(99, FileXferResult.SUCCESS))
    await host.wait_ready()
    await until(lambda: events and isinstance(events[-1], AgentTrouble))
    assert "transfer 99 does not exist" in str(events[-1].error)


# --- the guest's side by itself


class Receiver:
    def __init__(self, directory, detailed=True):
        self.directory = directory
        self.sent = []
        self.files = FileReceiver(directory, self.sent.append)
        self.files.detailed = detailed

    def start(self, number, name, size):
        self.files.start(FileXferStart(number, FileInfo(name, size).pack()))
        return self.sent.pop().result

    def names(self):
        return sorted(p.name for p in self.directory.iterdir())


@pytest.fixture
def receiver(tmp_path):
    receiver = Receiver(tmp_path / "in")
    yield receiver
    receiver.files.cancel_all()


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a.txt", "a.txt"),
        ("/etc/passwd", "passwd"),
        ("../../x", "x"),
        ("C:\\dir\\file.doc", "file.doc"),
        ("..", ""),
        (".", ""),
        ("", ""),
        ("dir/", ""),
        ("a\0b\nc", "abc"),
        ("\u202eevil", "evil"),
        (".hidden", "_hidden"),
        ("-rf", "_rf"),
        ("-", "_"),
        ("..x", "_.x"),
        (" .x", "_x"),
        ("dir/-x", "_x"),
        ("\x1b-x", "_x"),
        ("a-.b", "a-.b"),
        ("no dot", "no dot"),
    ],
)
def test_safe_names(name, safe):
    assert safe_name(name) == safe


def test_long_names_keep_their_suffix():
    assert safe_name("x" * 10_000 + ".tar") == "x" * 196 + ".tar"
    assert len(safe_name("é" * 10_000).encode()) == 200
    assert len(safe_name("x." + "y" * 10_000)) == 200


def test_names_cannot_leave_the_directory(receiver):
    assert receiver.start(1, "../../../escaped", 1) == FileXferResult.CAN_SEND_DATA
    receiver.files.data(1, b"x")
    assert receiver.names() == ["escaped"]
    assert receiver.sent == [FileXferStatus(1, FileXferResult.SUCCESS)]
    assert receiver.start(2, "..", 1) == FileXferResult.ERROR


def test_existing_files_and_links_are_left_alone(receiver, tmp_path):
    receiver.directory.mkdir()
    (receiver.directory / "there").write_text("precious")
    (receiver.directory / "link").symlink_to(tmp_path / "target")
    for number, name in enumerate(["there", "there", "link"]):
        assert receiver.start(number, name, 3) == FileXferResult.CAN_SEND_DATA
        receiver.files.data(number, b"new")
    assert receiver.names() == ["link", "link (1)", "there", "there (1)", "there (2)"]
    assert (receiver.directory / "there").read_text() == "precious"
    assert not (tmp_path / "target").exists()


def test_partial_files_are_removed(receiver):
    for end in (
        lambda: receiver.files.status(FileXferStatus(1, FileXferResult.CANCELLED)),
        lambda: receiver.files.status(FileXferStatus(1, FileXferResult.ERROR)),
        receiver.files.cancel_all,
        lambda: receiver.files.data(1, b"more than announced"),
    ):
        assert receiver.start(1, "partial", 10) == FileXferResult.CAN_SEND_DATA
        receiver.files.data(1, b"12345")
        assert receiver.names() == ["partial"]
        assert end() is None
        assert receiver.names() == []
        receiver.files.data(1, b"late")


def test_statuses_that_make_no_sense_are_named(receiver):
    assert "does not exist" in str(receiver.files.status(FileXferStatus(5, 1)))
    receiver.start(1, "x", 10)
    assert "for the receiver" in str(receiver.files.status(FileXferStatus(1, 3)))


def test_bounds_on_what_is_offered(receiver):
    assert receiver.start(1, "huge", 1 << 62) == FileXferResult.NOT_ENOUGH_SPACE
    receiver.files.start(FileXferStart(1, b"not a key file"))
    assert receiver.sent.pop().result == FileXferResult.ERROR
    for number in range(receiver_module.TRANSFERS_MAX):
        assert receiver.start(number, f"many {number}", 1) == FileXferResult.CAN_SEND_DATA
    assert receiver.start(1000, "one more", 1) == FileXferResult.ERROR
    assert receiver.start(5, "again", 1) == FileXferResult.ERROR


def test_promised_space_counts(receiver, monkeypatch):
    disk = SimpleNamespace(f_bavail=10, f_frsize=1)
    monkeypatch.setattr(receiver_module.os, "statvfs", lambda _: disk)
    assert receiver.start(1, "a", 8) == FileXferResult.CAN_SEND_DATA
    assert receiver.start(2, "b", 3) == FileXferResult.NOT_ENOUGH_SPACE
    assert receiver.start(3, "c", 2) == FileXferResult.CAN_SEND_DATA


def test_hosts_without_detailed_errors_get_the_older_ones(tmp_path):
    receiver = Receiver(tmp_path / "in", detailed=False)
    receiver.files.start(FileXferStart(1, FileInfo("x", 1 << 62).pack()))
    assert receiver.sent == [FileXferStatus(1, FileXferResult.ERROR)]
    closed = Receiver(None, detailed=False)
    assert closed.start(1, "x", 1) == FileXferResult.ERROR


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    receiver = Receiver(tmp_path / "file" / "in")
    assert receiver.start(1, "x", 1) == FileXferResult.ERROR


def descriptor_of(path):
    (fd,) = (fd for fd, file in held().descriptors.items() if file == str(path))
    return fd


def test_a_full_disk(receiver):
    receiver.start(1, "full", 10)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), descriptor_of(receiver.directory / "full"))
    receiver.files.data(1, b"12345")
    assert receiver.sent[-1].result == FileXferResult.NOT_ENOUGH_SPACE
    assert receiver.names() == []
