"""Ptys: links, who has the terminal open, its size and its settings."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.chardev_kinds import Guest
from tests.support.descriptors import read_exactly
from tests.support.waiting import LoopClock, until
from vring_serial.chardev.pty import PtyChardev, PtyOptions
from vring_serial.errors import ConfigError, ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")

#: Longer than from one look at the terminal to the next.
A_LOOK = 1.0


@pytest.fixture
async def pty(no_leak: None) -> AsyncIterator[tuple[PtyChardev, Guest]]:
    chardev = PtyChardev("dut")
    guest = Guest(chardev)
    await chardev.start()
    yield chardev, guest
    await chardev.aclose()


def open_slave(chardev: PtyChardev) -> int:
    return os.open(chardev.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)


def set_size(fd: int, cols: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


async def test_the_path_is_told(pty: tuple[PtyChardev, Guest]) -> None:
    chardev, _ = pty
    assert chardev.path.startswith("/dev/pts/")
    assert chardev.description == f"pty:{chardev.path}"
    await chardev.aclose()
    assert chardev.path == ""


async def test_nobody_has_it_open_at_first(pty: tuple[PtyChardev, Guest], clock: LoopClock) -> None:
    chardev, guest = pty
    await clock.forward(A_LOOK)
    assert guest.events == []
    slave = open_slave(chardev)
    await clock.forward(A_LOOK)
    assert guest.events == ["opened"], "one look is enough"
    os.close(slave)


async def test_every_byte_goes_through_both_ways(pty: tuple[PtyChardev, Guest]) -> None:
    chardev, guest = pty
    every = bytes(range(256))
    slave = open_slave(chardev)
    await guest.opened()
    os.write(slave, every)
    assert await guest.read(256) == every
    await guest.write(every)
    assert await read_exactly(slave, 256) == every
    os.close(slave)


async def test_closed_and_opened_again(pty: tuple[PtyChardev, Guest]) -> None:
    chardev, guest = pty
    for _ in range(2):
        slave = open_slave(chardev)
        await guest.opened()
        os.close(slave)
        await guest.closed()
    assert guest.events == ["opened", "closed"] * 2


async def test_a_program_that_comes_and_goes_at_once_is_heard(
    pty: tuple[PtyChardev, Guest],
) -> None:
    """``echo hello > /dev/pts/3`` is over long before anybody looks."""
    chardev, guest = pty
    slave = open_slave(chardev)
    os.write(slave, b"hello\n")
    os.close(slave)
    await guest.opened()
    assert await guest.read(6) == b"hello\n"
    with pytest.raises(OSError, match="Input/output error") as caught:
        os.read(guest.read_fd, 1)
    chardev.peer_gone(caught.value)
    assert guest.events == ["opened", "closed"]


async def test_two_programs_are_one_peer(pty: tuple[PtyChardev, Guest], clock: LoopClock) -> None:
    chardev, guest = pty
    first, second = open_slave(chardev), open_slave(chardev)
    await guest.opened()
    os.close(first)
    await clock.forward(A_LOOK)
    assert guest.events == ["opened"]
    os.close(second)
    await guest.closed()


async def test_the_size_and_its_changes_are_told(
    pty: tuple[PtyChardev, Guest], clock: LoopClock
) -> None:
    chardev, guest = pty
    slave = open_slave(chardev)
    set_size(slave, 80, 24)
    await until(lambda: guest.sizes == [(80, 24)])
    assert guest.events[0] == "opened"
    set_size(slave, 132, 43)
    await until(lambda: guest.sizes == [(80, 24), (132, 43)])
    await clock.forward(A_LOOK)
    assert len(guest.sizes) == 2, "the same size is told once"
    set_size(slave, 0, 0)  # nobody knows
    await clock.forward(A_LOOK)
    assert len(guest.sizes) == 2
    os.close(slave)
    await guest.closed()


async def test_the_size_is_told_again_when_the_end_opens_again(
    pty: tuple[PtyChardev, Guest],
) -> None:
    chardev, guest = pty
    for turn in (1, 2):
        slave = open_slave(chardev)
        set_size(slave, 80, 24)
        await until(lambda turn=turn: guest.sizes == [(80, 24)] * turn)
        os.close(slave)
        await guest.closed()


async def test_the_next_program_finds_the_terminal_raw(pty: tuple[PtyChardev, Guest]) -> None:
    chardev, guest = pty
    slave = open_slave(chardev)
    await guest.opened()
    settings = termios.tcgetattr(slave)
    settings[3] |= termios.ECHO | termios.ICANON
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    os.close(slave)
    await guest.closed()
    slave = open_slave(chardev)
    assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON)
    os.close(slave)


async def test_a_link_is_made_and_removed(tmp_path: Path) -> None:
    link = tmp_path / "console"
    chardev = PtyChardev("dut", PtyOptions(path=str(link)))
    await chardev.start()
    assert os.readlink(link) == chardev.path
    assert str(link) in chardev.description
    await chardev.aclose()
    assert not list(tmp_path.iterdir())


async def test_a_link_that_somebody_replaced_is_theirs(tmp_path: Path) -> None:
    link = tmp_path / "console"
    chardev = PtyChardev("dut", PtyOptions(path=str(link)))
    await chardev.start()
    link.unlink()
    link.symlink_to("/dev/null")
    await chardev.aclose()
    assert os.readlink(link) == "/dev/null"


async def test_links_that_a_killed_process_left(tmp_path: Path) -> None:
    link = tmp_path / "console"
    chardev = PtyChardev("dut", PtyOptions(path=str(link)))
    await chardev.start()
    number = chardev.path
    await chardev.aclose()
    for target in ("/dev/pts/99999", number):  # gone; or its number is ours now
        link.symlink_to(target)
        await chardev.start()
        assert os.readlink(link) == chardev.path
        await chardev.aclose()


async def test_a_link_of_a_killed_process_whose_terminal_is_somebody_elses_now(
    tmp_path: Path,
) -> None:
    link = tmp_path / "console"
    theirs, slave = os.openpty()
    link.symlink_to(os.ttyname(slave))
    chardev = PtyChardev("dut", PtyOptions(path=str(link)))
    await chardev.start()
    assert os.readlink(link) == chardev.path != os.ttyname(slave)
    await chardev.aclose()
    assert not link.is_symlink()
    os.close(slave)
    os.close(theirs)


async def test_a_link_of_a_process_that_lives_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "console"
    first = PtyChardev("first", PtyOptions(path=str(link)))
    await first.start()
    monkeypatch.chdir(tmp_path)
    for path in (str(link), "console", f"{tmp_path}/./console"):
        with pytest.raises(ResourceError, match="it exists already"):
            await PtyChardev("dut", PtyOptions(path=path)).start()
    assert os.readlink(link) == first.path
    await first.aclose()


@pytest.mark.parametrize("what", ["file", "link"])
async def test_what_exists_is_kept(tmp_path: Path, what: str) -> None:
    link = tmp_path / "console"
    if what == "file":
        link.write_text("precious")
    else:
        link.symlink_to("/dev/null")
    chardev = PtyChardev("dut", PtyOptions(path=str(link)))
    with pytest.raises(ResourceError, match=f"dut.*{link}.*exists already"):
        await chardev.start()
    assert chardev.path == ""
    assert link.read_bytes() == (b"precious" if what == "file" else b"")
    await chardev.aclose()
    assert link.exists()


async def test_a_link_in_a_missing_directory(tmp_path: Path) -> None:
    link = tmp_path / "missing" / "console"
    chardev = PtyChardev("dut", PtyOptions(path=str(link)))
    with pytest.raises(ResourceError, match=f"dut.*{link}.*No such file or directory"):
        await chardev.start()


def test_a_path_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as caught:
        PtyOptions(path="a\0b")
    assert caught.value.where == "path"
