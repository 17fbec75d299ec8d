"""Files from the guest to the host: copied there, fetched here."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.support.waiting import until
from vring_serial import (
    HOST_CAPABILITIES,
    AgentGoneError,
    AgentTimeoutError,
    AgentTrouble,
    AgentUnsupportedError,
    FileTransferError,
    HostAgent,
)
from vring_serial.agent.guest import GUEST_CAPABILITIES
from vring_serial.proto.agent import (
    FILES_FROM_GUEST,
    Clipboard,
    ClipboardGrab,
    ClipboardRequest,
    ClipboardType,
    FileInfo,
    FileList,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    MessageError,
)


@pytest.fixture
async def pair_with_files(file_pair, tmp_path):
    """Both ends, the host willing to take files, and three files in the guest."""
    files = []
    for number, size in enumerate([0, 70_000, 4 << 20]):
        path = tmp_path / f"guest file {number}"
        path.write_bytes(os.urandom(size))
        files.append(path)
    await file_pair.disconnect()
    file_pair.host = HostAgent(
        on_event=file_pair.host_events.append,
        timeout=30,
        capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST),
    )
    await file_pair.connect()
    return file_pair, files


async def test_files_are_fetched(pair_with_files, tmp_path):
    pair, files = pair_with_files
    pair.guest.copy_files(files)
    await pair.host.wait_clipboard()
    assert ClipboardType.FILE_LIST in pair.host.clipboard_types()
    assert (await pair.host.get_clipboard()).splitlines() == [str(f) for f in files]
    for turn in ("first", "second"):
        got = await pair.host.get_files(tmp_path / turn)
        assert [p.read_bytes() for p in got] == [f.read_bytes() for f in files]
        assert sorted(p.name for p in (tmp_path / turn).iterdir()) == [f.name for f in files]
    assert not [e for e in pair.host_events if isinstance(e, AgentTrouble)]


async def test_both_directions_at_once(pair_with_files, tmp_path):
    pair, files = pair_with_files
    pair.guest.copy_files(files[2:])
    await pair.host.wait_clipboard()
    got, *_ = await asyncio.gather(
        pair.host.get_files(tmp_path / "in"), *(pair.host.send_file(f) for f in files)
    )
    assert got[0].read_bytes() == files[2].read_bytes()
    for file in files:
        assert (pair.downloads / file.name).read_bytes() == file.read_bytes()


async def test_all_files_come_or_none(pair_with_files, tmp_path):
    """Two of four cannot be read; what is there already under their names is not touched."""
    pair, files = pair_with_files
    pair.guest.copy_files([files[0], tmp_path / "missing", tmp_path, files[1]])
    await pair.host.wait_clipboard()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / files[0].name).write_text("mine")
    with pytest.raises(FileTransferError, match="2 of 4 files did not come"):
        await pair.host.get_files(tmp_path / "in")
    assert [p.name for p in (tmp_path / "in").iterdir()] == [files[0].name]
    assert (tmp_path / "in" / files[0].name).read_text() == "mine"


async def test_a_cancelled_copy_leaves_no_file(pair_with_files, tmp_path):
    pair, files = pair_with_files
    pair.guest.copy_files([*files, tmp_path / "missing"] * 20)
    await pair.host.wait_clipboard()
    getting = asyncio.ensure_future(pair.host.get_files(tmp_path / "in"))
    await until(lambda: len(list((tmp_path / "in").glob("*"))) > 3)
    getting.cancel()
    await asyncio.gather(getting, return_exceptions=True)
    assert not list((tmp_path / "in").iterdir())
    pair.guest.copy_files(files)
    await until(lambda: pair.host.clipboard_types())
    assert len(await pair.host.get_files(tmp_path / "again")) == len(files)


async def test_the_channel_closes(pair_with_files, tmp_path):
    pair, files = pair_with_files
    pair.guest.copy_files(files[2:] * 50)
    await pair.host.wait_clipboard()
    getting = asyncio.ensure_future(pair.host.get_files(tmp_path / "in"))
    await until(lambda: (tmp_path / "in").exists())
    await pair.disconnect()
    with pytest.raises(AgentGoneError, match="files missing"):
        await getting
    for path in (tmp_path / "in").iterdir():
        assert path.stat().st_size == 4 << 20


async def test_needs_both_ends(file_pair, tmp_path):
    with pytest.raises(AgentUnsupportedError, match="FILES_FROM_GUEST"):
        await file_pair.host.get_files(tmp_path)


async def test_a_guest_that_offers_files_unasked_or_lies(raw_agent, tmp_path):
    host = HostAgent(timeout=0.2, capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST))
    agent = await raw_agent(host)
    await agent.greet(GUEST_CAPABILITIES)
    await host.wait_ready()
    number = 1 << 31
    agent.send(FileXferStart(number, FileInfo("x", 5).pack()))
    assert await agent.receive(FileXferStatus) == FileXferStatus(number, FileXferResult.CANCELLED)
    agent.send(ClipboardGrab(0, (ClipboardType.FILE_LIST,)))
    await host.wait_clipboard(timeout=30)
    getting = asyncio.ensure_future(host.get_files(tmp_path / "in"))
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, ClipboardType.FILE_LIST, b"steal\0/x"))
    with pytest.raises(MessageError, match="neither copy nor cut"):
        await getting
    getting = asyncio.ensure_future(host.get_files(tmp_path / "in"))
    await agent.receive(ClipboardRequest)
    agent.send(Clipboard(0, ClipboardType.FILE_LIST, b"copy\0/x\0/y"))
    agent.send(FileXferStart(number + 1, FileInfo("../../x", 5).pack()))
    assert (await agent.receive(FileXferStatus)).result == FileXferResult.CAN_SEND_DATA
    with pytest.raises(AgentTimeoutError, match="file 1 of 2"):
        await getting
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize(
    ("data", "paths", "cut"),
    [
        (b"copy\0/a\0/b c", ("/a", "/b c"), False),
        (b"cut\0/a\0", ("/a",), True),
        (b"copy", (), False),
    ],
)
def test_file_lists(data, paths, cut):
    assert FileList.unpack(data) == FileList(paths, cut)
    assert FileList.unpack(FileList(paths, cut).pack()) == FileList(paths, cut)


@pytest.mark.parametrize("data", [b"", b"/a", b"copy\0\xff", b"copy" + b"\0/a" * 5000])
def test_file_lists_that_are_none(data):
    with pytest.raises(MessageError):
        FileList.unpack(data)
