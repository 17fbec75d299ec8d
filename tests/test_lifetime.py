"""One vocabulary: whatever has a life is a context manager, and may be left on any path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vring_serial as vs
from tests.support.leaks import held
from tests.support.waiting import turns
from vring_serial.lifetime import Closing, Ending, Starting

STARTING = {
    "Controller",
    "EmbeddedGuest",
    "UmlGuest",
    "SpiceServer",
    "VhostUserBackend",
    "VfioUserServer",
    "Chardev",
    *(name for name in vs.__all__ if name.endswith("Chardev")),
}
ENDING = {"HostAgent", "AgentRouter", "GuestAgent"}
CLOSING = {
    "MmioDevice",
    "PciDevice",
    "PolledHost",
    "InProcessPci",
    "InProcessMmio",
    "EventStream",
    "GuestPort",
}
ALL = STARTING | ENDING | CLOSING

Make = Callable[[Path], Any]
MADE: dict[str, Make] = {
    "Controller": lambda path: vs.Controller(),
    "VhostUserBackend": lambda path: vs.VhostUserBackend(vs.Controller(), str(path / "s")),
    "VfioUserServer": lambda path: vs.VfioUserServer(vs.Controller(), str(path / "s")),
    "NullChardev": lambda path: vs.NullChardev("c", vs.NullOptions()),
    "RingbufChardev": lambda path: vs.RingbufChardev("c", vs.RingbufOptions()),
    "PtyChardev": lambda path: vs.PtyChardev("c", vs.PtyOptions(path=str(path / "tty"))),
    "FileChardev": lambda path: vs.FileChardev("c", vs.FileOptions(path=str(path / "out"))),
    "SocketChardev": lambda path: vs.SocketChardev(
        "c", vs.SocketOptions(path=str(path / "s"), server=True, wait=False)
    ),
    "ProtocolChardev": lambda path: vs.ProtocolChardev("c", asyncio.Protocol),
    "HostAgent": lambda path: vs.HostAgent(),
    "AgentRouter": lambda path: vs.AgentRouter(),
    "GuestAgent": lambda path: vs.GuestAgent(),
}
each = pytest.mark.parametrize("name", sorted(MADE))


def test_whatever_has_a_life_has_one_of_the_bases() -> None:
    for bases, names in ((Starting, STARTING), (Ending, ENDING), (Closing, CLOSING)):
        for name in names:
            assert issubclass(getattr(vs, name), bases), name
    for name in set(vs.__all__) - ALL:
        members = dir(getattr(vs, name))
        assert not {"start", "stop", "aclose", "__enter__", "__aenter__"} & set(members), name


def test_there_is_no_second_word_for_the_end() -> None:
    for name in ALL:
        members = set(dir(getattr(vs, name)))
        assert "stop" not in members, name
        assert not {"close", "aclose"} <= members, name


@each
async def test_leaving_ends_it(tmp_path: Path, name: str) -> None:
    before = held()
    async with MADE[name](tmp_path) as thing:
        pass
    await thing.aclose()
    assert held() == before
    assert not list(tmp_path.glob("s"))


@each
async def test_leaving_on_an_error_ends_it_and_hides_nothing(tmp_path: Path, name: str) -> None:
    before = held()
    with pytest.raises(ZeroDivisionError):
        async with MADE[name](tmp_path):
            raise ZeroDivisionError
    assert held() == before


@each
async def test_ending_what_never_began(tmp_path: Path, name: str) -> None:
    before = held()
    thing = MADE[name](tmp_path)
    await thing.aclose()
    await thing.aclose()
    assert held() == before


@each
async def test_a_cancelled_end_is_one(tmp_path: Path, name: str) -> None:
    before = held()
    inside = asyncio.Event()

    async def use() -> None:
        async with MADE[name](tmp_path):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(use())
    await inside.wait()
    for _ in range(3):  # in the block, then in what leaves it
        task.cancel()
        await turns(1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held() == before


async def test_what_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    before = held()
    (tmp_path / "s").mkdir()
    for make in (MADE["VhostUserBackend"], MADE["VfioUserServer"], MADE["SocketChardev"]):
        with pytest.raises(vs.ResourceError):
            async with make(tmp_path):
                pytest.fail("it started")
    assert held() == before


def test_hosts_and_fronts(tmp_path: Path) -> None:
    before = held()
    device = vs.Controller()
    with vs.PolledHost() as host:
        host.complete(device.start())
        with vs.InProcessPci(host, device, None, msi=lambda *_: None, intx=lambda _: None) as pci:
            assert pci.config.read(0, 2) == 0x1AF4
        with vs.InProcessMmio(host, device, None, interrupt=lambda _: None) as mmio:
            assert mmio.read(0, 4) == 0x74726976
        host.complete(device.aclose())
    host.close()
    with pytest.raises(vs.LocalProtocolError):
        host.poll()
    del pci, mmio
    assert held() == before


def test_a_polled_host_enters_what_is_asynchronous_elsewhere(tmp_path: Path) -> None:
    before = held()
    device = vs.Controller()
    with vs.PolledHost() as host:
        with host.using(device) as used:
            assert used is device
            assert device.started
        assert not device.started
        with pytest.raises(ZeroDivisionError), host.using(device):
            raise ZeroDivisionError
        assert not device.started
    with pytest.raises(vs.LocalProtocolError), host.using(device):
        pytest.fail("it was entered")
    assert held() == before
