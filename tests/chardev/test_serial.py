"""serial: a line of the host, whose other end is a terminal's master."""

from __future__ import annotations

import os
import pty
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chardev_kinds import Guest
from tests.support.descriptors import read_exactly
from tests.support.waiting import LoopClock, turns
from vring_serial.chardev.serial import BREAK_SECONDS, SerialChardev, SerialOptions
from vring_serial.errors import ConfigError, ResourceError

pytestmark = pytest.mark.usefixtures("no_leak")


class Line:
    """A line, and the path at which it is plugged in.

    Attributes:
        master: its far end.
        slave: descriptor of its near one, in cooked mode until somebody changes that.
    """

    def __init__(self, path: Path) -> None:
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        path.unlink(missing_ok=True)
        path.symlink_to(os.ttyname(self.slave))

    def unplug(self) -> None:
        for fd in (self.master, self.slave):
            if fd >= 0:
                os.close(fd)
        self.master = self.slave = -1


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    line = Line(tmp_path / "line")
    yield line
    line.unplug()


def on(path: Path) -> SerialChardev:
    return SerialChardev("dut", SerialOptions(path=str(path)))


async def test_its_settings_are_those_of_qemu(tmp_path: Path, line: Line) -> None:
    async with on(tmp_path / "line"):
        iflag, oflag, cflag, lflag, ispeed, ospeed, _ = termios.tcgetattr(line.slave)
    assert (ispeed, ospeed) == (termios.B115200, termios.B115200)
    assert cflag & termios.CSIZE == termios.CS8
    assert not cflag & (termios.PARENB | termios.CSTOPB | termios.CRTSCTS)
    assert not oflag & termios.OPOST
    assert not lflag & (termios.ECHO | termios.ICANON | termios.ISIG)
    assert not iflag & (termios.IXON | termios.ICRNL | termios.ISTRIP)


async def test_it_is_tried_again_until_it_is_plugged_in_again(
    tmp_path: Path, line: Line, clock: LoopClock, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "line"
    chardev = on(path)
    guest = Guest(chardev)
    async with chardev:
        line.unplug()
        await guest.closed()
        assert "chardev dut: serial:" in caplog.text
        path.unlink()
        for _ in range(4):
            await clock.forward(10)
            assert guest.end is None
        again = Line(path)
        await clock.forward(30)
        await guest.opened()
        await guest.write(b"out")
        assert await read_exactly(again.master, 3) == b"out"
        again.unplug()
        await guest.closed()


async def test_a_break_ends_by_itself(tmp_path: Path, line: Line, clock: LoopClock) -> None:
    chardev = on(tmp_path / "line")
    guest = Guest(chardev)
    async with chardev:
        await guest.opened()
        chardev.send_break()
        chardev.send_break()  # the same one
        await clock.forward(BREAK_SECONDS)
        await turns()
        chardev.send_break()
    chardev.send_break()  # there is no line


async def test_what_is_no_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot open .*none: No such file"):
        await on(tmp_path / "none").start()
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"cannot open .*file: it is no terminal"):
        await on(tmp_path / "file").start()
    with pytest.raises(ConfigError, match="a path is needed"):
        SerialOptions()
