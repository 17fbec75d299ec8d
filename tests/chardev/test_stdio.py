"""stdio in processes of their own: terminals are real, and set back whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Sequence

import pytest

from tests.support.descriptors import read_some
from tests.support.waiting import DEADLINE, until
from vring_serial.chardev.stdio import StdioChardev
from vring_serial.errors import ResourceError

#: Runs in the child: says on standard error what happens, and obeys the guest's "input".
PROGRAM = """
import asyncio, fcntl, os, signal, sys, termios
from vring_serial.chardev.stdio import StdioChardev, StdioOptions

def say(text):
    os.write(2, text.encode() + b"\\n")

class User:
    def end_opened(self, end):
        say(f"opened {end.read_fd >= 0}")
        if end.read_fd >= 0:
            asyncio.get_running_loop().add_reader(end.read_fd, self.read, end)

    def read(self, end):
        try:
            data = os.read(end.read_fd, 4096)
        except OSError as error:
            return chardev.peer_gone(error)
        if not data:
            return chardev.peer_gone()
        say(f"input {data!r}")
        for command in data.decode(errors="replace").split():
            if command == "stop":
                done.set()
            elif command == "write":
                try:
                    os.write(end.write_fd, b"output")
                except OSError as error:
                    return chardev.peer_gone(error)
            elif command == "raise":
                asyncio.get_running_loop().stop()

    def end_closed(self):
        say("closed")
        if chardev.end.read_fd >= 0:
            asyncio.get_running_loop().remove_reader(chardev.end.read_fd)

    def end_resized(self, cols, rows):
        say(f"size {cols}x{rows}")

async def main():
    global chardev, done
    done = asyncio.Event()
    chardev = StdioChardev("dut", StdioOptions(signal="nosignal" not in sys.argv))
    chardev.attach(User())
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, done.set)
    await chardev.start()
    say(f"blocking {os.get_blocking(0)} {os.get_blocking(1)} {os.get_blocking(2)}")
    await done.wait()
    await chardev.aclose()
    say(f"blocking {os.get_blocking(0)} {os.get_blocking(1)} {os.get_blocking(2)}")

if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
if "terminal" in sys.argv:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
asyncio.run(main())
"""


class Child:
    """The program, with the other side of its standard streams."""

    def __init__(self, stdin: int, stdout: int, arguments: Sequence[str] = ()) -> None:
        self.log, log = os.pipe()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=log,
            start_new_session=True,
        )
        os.close(log)
        os.set_blocking(self.log, False)

    async def says(self, text: str) -> None:
        """Wait for a line that it says after those waited for before."""
        line = text.encode() + b"\n"
        async with asyncio.timeout(DEADLINE * 2):
            while line not in self.seen:
                more = await read_some(self.log)
                assert more, f"it ended after {self.seen!r}"
                self.seen += more
        self.seen = self.seen.partition(line)[2]

    async def ends(self) -> int:
        async with asyncio.timeout(DEADLINE):
            while more := await read_some(self.log):
                self.seen += more
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.log)


class Terminal(Child):
    """The program on a terminal of its own, which it controls."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        self.resize(80, 24)
        self.before = termios.tcgetattr(self.slave)
        super().__init__(self.slave, self.slave, ["terminal", *arguments])

    def resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    @property
    def settings(self) -> list[object]:
        return termios.tcgetattr(self.slave)

    def flag(self, index: int, flag: int) -> bool:
        value = self.settings[index]
        assert isinstance(value, int)
        return bool(value & flag)

    def close(self) -> None:
        super().close()
        os.close(self.slave)
        if self.master >= 0:
            os.close(self.master)


@pytest.fixture
async def terminal(request: pytest.FixtureRequest, no_leak: None) -> AsyncIterator[Terminal]:
    child = Terminal(getattr(request, "param", []))
    with contextlib.closing(child):
        await child.says("opened True")
        await child.says("size 80x24")
        await child.says("blocking True True True")
        yield child


async def test_the_terminal_is_raw_and_set_back(terminal: Terminal) -> None:
    assert not terminal.flag(3, termios.ICANON | termios.ECHO)
    assert not terminal.flag(0, termios.ICRNL | termios.IXON)
    assert terminal.flag(1, termios.OPOST), "our own lines still begin at the left"
    assert terminal.flag(3, termios.ISIG)
    os.write(terminal.master, b"\r\x11 write")
    await terminal.says(r"input b'\r\x11 write'")
    async with asyncio.timeout(DEADLINE):
        assert await read_some(terminal.master) == b"output"
    os.write(terminal.master, b"stop")
    await terminal.says("closed")
    await terminal.says("blocking True True True")
    assert await terminal.ends() == 0
    assert terminal.settings == terminal.before


async def test_it_is_set_back_when_the_program_ends_without_stop(terminal: Terminal) -> None:
    assert terminal.settings != terminal.before
    os.write(terminal.master, b"raise")
    assert await terminal.ends() == 1
    assert terminal.settings == terminal.before


async def test_ctrl_c_ends_the_program_and_the_terminal_is_set_back(terminal: Terminal) -> None:
    os.write(terminal.master, b"\x03")
    await terminal.ends()
    assert terminal.settings == terminal.before


@pytest.mark.parametrize("terminal", [["nosignal"]], indirect=True)
async def test_without_signals_ctrl_c_goes_to_the_guest(terminal: Terminal) -> None:
    assert not terminal.flag(3, termios.ISIG)
    os.write(terminal.master, b"\x03\x1a\x1c")
    await terminal.says(r"input b'\x03\x1a\x1c'")


async def test_a_change_of_size_is_told(terminal: Terminal) -> None:
    terminal.resize(132, 43)
    await terminal.says("size 132x43")


async def test_a_change_of_size_is_told_where_the_output_alone_is_a_terminal(no_leak: None) -> None:
    stdin, feed = os.pipe()
    master, slave = os.openpty()
    child = Child(stdin, slave)
    os.close(stdin)
    with contextlib.closing(child):
        await child.says("blocking True True True")  # and has told the size that it began with
        termios.tcsetwinsize(master, (43, 132))
        child.process.send_signal(signal.SIGWINCH)  # it does not control that terminal
        await child.says("size 132x43")
    for fd in (feed, master, slave):
        os.close(fd)


async def test_after_a_stop_and_a_continuation_it_is_raw_again(terminal: Terminal) -> None:
    os.kill(terminal.process.pid, signal.SIGSTOP)
    termios.tcsetattr(terminal.slave, termios.TCSANOW, terminal.before)  # what a shell does
    os.kill(terminal.process.pid, signal.SIGCONT)
    await until(lambda: not terminal.flag(3, termios.ICANON))


async def test_a_terminal_that_is_gone_closes_the_end(no_leak: None) -> None:
    """The process itself may go on, if it chose to outlive SIGHUP; nothing is left to set back."""
    child = Terminal(["nohup"])
    with contextlib.closing(child):
        await child.says("blocking True True True")
        os.close(child.master)
        child.master = -1
        await child.says("closed")
        await child.says("chardev dut: stdio: Input/output error")
        os.kill(child.process.pid, signal.SIGUSR1)
        await child.says("blocking True True True")
        assert await child.ends() == 0
        assert b"opened" not in child.seen


def pipes(arguments: Sequence[str] = ()) -> tuple[Child, int, int]:
    """A child on pipes, what feeds its input, and what takes its output."""
    stdin, feed = os.pipe()
    take, stdout = os.pipe()
    child = Child(stdin, stdout, arguments)
    os.close(stdin)
    os.close(stdout)
    return child, feed, take


async def test_the_end_of_the_input_leaves_the_output(no_leak: None) -> None:
    child, feed, take = pipes()
    with contextlib.closing(child):
        await child.says("opened True")
        os.close(feed)
        await child.says("closed")
        await child.says("opened False")
    os.close(take)


async def test_a_broken_output_closes_the_end(no_leak: None) -> None:
    child, feed, take = pipes()
    with contextlib.closing(child):
        await child.says("opened True")
        os.close(take)
        os.write(feed, b"write")
        await child.says("closed")
        await child.says("chardev dut: stdio: Broken pipe")
    os.close(feed)


async def test_a_socket_is_set_back_to_blocking(no_leak: None) -> None:
    """Sockets cannot be opened anew: what is set on them is set for all who share them."""
    ours, theirs = socket.socketpair()
    with contextlib.closing(Child(theirs.fileno(), theirs.fileno())) as child:
        await child.says("blocking False False True")
        ours.send(b"write stop")
        await child.says("blocking True True True")
        assert await child.ends() == 0
        assert ours.recv(10) == b"output"
    ours.close()
    theirs.close()


async def test_only_one_of_a_process(no_leak: None) -> None:
    first, second = StdioChardev("first"), StdioChardev("second")
    await first.start()
    with pytest.raises(ResourceError, match=r"second.*chardev first of this process has it"):
        await second.start()
    await second.aclose()
    with pytest.raises(ResourceError):
        await second.start()
    await first.aclose()
    await second.start()
    await second.aclose()


async def test_closed_standard_streams(no_leak: None) -> None:
    chardev = StdioChardev("dut")
    saved = os.dup(0)
    os.close(0)
    try:
        with pytest.raises(ResourceError, match=r"dut.*Bad file descriptor"):
            await chardev.start()
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    await chardev.start()
    await chardev.aclose()
