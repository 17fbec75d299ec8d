"""Files that were copied in the guest, fetched by one of several clients."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.waiting import turns, until
from vring_serial import (
    HOST_CAPABILITIES,
    AgentGoneError,
    AgentTrouble,
    AgentUnsupportedError,
    FileTransferError,
    StreamSource,
)
from vring_serial.agent.router import guest_files as guest_files_module
from vring_serial.proto.agent import (
    FILES_FROM_GUEST,
    AgentFilter,
    Capability,
    ClipboardRequest,
    ClipboardType,
    FileList,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    Monitor,
)

TAKING = HOST_CAPABILITIES.with_(FILES_FROM_GUEST)


@pytest.fixture
async def bench(make_bench, make_file):
    """A router on a guest in which three files are copied."""
    bench = await make_bench()
    bench.files = [make_file(f"guest file {n}", size) for n, size in enumerate([0, 7, 9 << 20])]
    bench.guest.copy_files(bench.files)
    return bench


def same(paths, files):
    return [path.read_bytes() for path in paths] == [file.read_bytes() for file in files]


async def test_each_client_gets_the_files_that_it_asked_for(bench, tmp_path, make_file):
    clients = [await bench.client(capabilities=TAKING) for _ in range(3)]
    for client in clients:
        await client.wait_clipboard()
    up = make_file("up", 3 << 20)
    *got, _ = await asyncio.gather(
        *(c.get_files(tmp_path / f"in{n}") for n, c in enumerate(clients)), clients[0].send_file(up)
    )
    assert all(same(paths, bench.files) for paths in got)
    assert (bench.downloads / "up").read_bytes() == up.read_bytes()
    # And once more, with a turn for everybody.
    assert same(await clients[2].get_files(tmp_path / "again"), bench.files)
    assert not [e for e in bench.router_events if isinstance(e, AgentTrouble)]


async def test_a_client_that_takes_no_files_gets_the_list(bench, tmp_path):
    plain = await bench.client()
    taking = await bench.client(capabilities=TAKING)
    await plain.wait_clipboard()
    await taking.wait_clipboard()
    with pytest.raises(AgentUnsupportedError):
        await plain.get_files(tmp_path / "in")
    for _ in range(2):
        data = await plain.get_clipboard_data(ClipboardType.FILE_LIST)
        assert str(bench.files[0]).encode() in data
    assert same(await taking.get_files(tmp_path / "in"), bench.files)
    await until(lambda: not bench.router.load.guest_transfers)


async def test_a_client_that_leaves_in_the_middle_gives_up_its_turn(bench, tmp_path):
    leaver = await bench.raw_client()
    await leaver.greet(TAKING)
    stayer = await bench.client(capabilities=TAKING)
    await stayer.wait_clipboard()
    leaver.send(ClipboardRequest(0, ClipboardType.FILE_LIST))
    start = await leaver.receive(FileXferStart)
    waiting = asyncio.ensure_future(stayer.get_files(tmp_path / "in"))
    await turns()
    await stayer.set_monitors([Monitor(1, 1)])  # is answered after what it asked for before
    assert not waiting.done()
    leaver.send(FileXferStatus(start.id, FileXferResult.CAN_SEND_DATA))
    await leaver.aclose()
    assert same(await waiting, bench.files)


async def test_a_file_that_cannot_be_read_is_missed(bench, tmp_path):
    client = await bench.client(capabilities=TAKING)
    bench.guest.copy_files([bench.files[1], tmp_path / "gone", bench.files[2]])
    await client.wait_clipboard()
    with pytest.raises(FileTransferError, match="1 of 3 files did not come"):
        await client.get_files(tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())  # those that came are removed again
    bench.guest.copy_files(bench.files)
    await until(lambda: ClipboardType.FILE_LIST in client.clipboard_types())
    assert same(await client.get_files(tmp_path / "next"), bench.files)


async def test_a_guest_that_sends_nothing_loses_the_turn(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(guest_files_module, "IDLE", 0.05)
    clients = [await bench.client(capabilities=TAKING) for _ in range(2)]
    for client in clients:
        await client.wait_clipboard()
    asked = asyncio.Event()
    listed = FileList(tuple(map(str, bench.files))).pack()

    async def list_alone():
        yield listed
        asked.set()

    # An application that offers a list, and then no files.
    bench.guest.set_clipboard({ClipboardType.FILE_LIST: StreamSource(len(listed), list_alone)})
    await until(lambda: all(c.clipboard_types() == (ClipboardType.FILE_LIST,) for c in clients))
    getting = asyncio.ensure_future(clients[0].get_files(tmp_path / "none"))
    await asked.wait()
    bench.guest.copy_files(bench.files)
    await until(lambda: ClipboardType.UTF8_TEXT in clients[1].clipboard_types())
    assert same(await clients[1].get_files(tmp_path / "in"), bench.files)
    clients[0].link.fail(ConnectionResetError("had enough"))
    with pytest.raises(AgentGoneError):
        await getting


async def test_an_agent_that_goes_in_the_middle(bench, tmp_path):
    client = await bench.client(capabilities=TAKING)
    await client.wait_clipboard()
    getting = asyncio.ensure_future(client.get_files(tmp_path / "in"))
    await until(lambda: bench.router.load.guest_transfers)
    await bench.stop_guest()
    with pytest.raises(AgentGoneError):
        await getting
    await bench.start_guest()
    await client.wait_clipboard()
    assert same(await client.get_files(tmp_path / "after"), bench.files)


async def test_files_that_nobody_asked_for_are_refused(bench):
    client = await bench.client(capabilities=TAKING)
    await client.wait_clipboard()
    link = bench.guest.link
    for number in (1, 1 << 31):
        link.post(FileXferStart(number, b"[vdagent-file-xfer]\nname=z\nsize=9\n"))
    await until(lambda: len(bench.tap.of(FileXferStatus)) == 2)
    assert {s.result for s in bench.tap.of(FileXferStatus)} == {FileXferResult.CANCELLED}


async def test_the_filter_keeps_them_back(make_bench):
    bench = await make_bench(filter=AgentFilter(file_xfer=False))
    client = await bench.client(capabilities=TAKING)
    capabilities = await client.wait_ready()
    assert FILES_FROM_GUEST not in capabilities
    assert Capability.FILE_XFER_DISABLED in capabilities
    assert FILES_FROM_GUEST not in bench.guest.host
