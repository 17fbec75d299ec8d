"""`vring attach` on real terminals, to a real service with a guest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.support.commands import run_vring
from tests.support.keeper import kept
from tests.support.processes import running
from tests.support.terminals import on_terminal
from tests.support.waiting import DEADLINE, until
from vring_serial import EmbeddedGuest
from vring_serial.cli.attach.keys import Command, Escape, EscapeKey, Keys
from vring_serial.cli.attach.screen import CUT, Screen

CONSOLE = ("--chardev", "console,id=con,path=c,scrollback=64K", "--console", "chardev=con,nr=1")
QMP = ("--qmp", "unix:qmp,server=on,wait=off")
LEAVE = b"\x1d."


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VRING_QMP", raising=False)


class Place:
    """A service, its guest's console, and people on terminals."""

    def __init__(self, directory, keeper, guest, port, reader, writer, stack):
        self.directory = directory
        self.keeper = keeper
        self.guest = guest
        self.port = port
        self.reader, self.writer = reader, writer
        self._stack = stack

    async def attach(self, *arguments):
        """Somebody's terminal, attached."""
        count = self.keeper.log.count("a client attached")
        terminal = await on_terminal(self.directory, "attach", *(arguments or ["./c"]))
        self._stack.push_async_callback(terminal.aclose)
        await self.keeper.logged("a client attached", count + 1)
        await terminal.said("attached to ")
        return terminal

    async def hears(self, data):
        async with asyncio.timeout(DEADLINE):
            assert await self.reader.readexactly(len(data)) == data


@asynccontextmanager
async def place_of(directory, *arguments):
    async with AsyncExitStack() as stack:
        keeper = await stack.enter_async_context(kept(directory, *CONSOLE, *arguments))
        guest = await stack.enter_async_context(EmbeddedGuest("v", memory=32 << 20))
        port = await guest.wait_port(nr=1)
        await port.wait_host()
        reader, writer = await port.open()
        yield Place(directory, keeper, guest, port, reader, writer, stack)
        writer.close()


async def test_people_watch_and_type_together_with_history(tmp_path):
    async with place_of(tmp_path, *QMP) as place:
        place.writer.write(b"booted\nlogin: ")
        ends = [
            await place.attach("--qmp", "qmp", "con"),
            await place.attach(),
            await place.attach("--read-only", "./c"),
        ]
        for i, terminal in enumerate(ends[:2]):
            terminal.press(b"%d\r" % i)
            await place.hears(b"%d\r" % i)
        ends[2].press(b"never")
        place.writer.write(b"motd\n$ ")
        for terminal in ends:
            await terminal.said(r"booted\nlogin: motd\n\$ ")
            terminal.press(LEAVE)
            assert await terminal.status() == 0
            assert terminal.left == terminal.found
        place.writer.write(b"x")
        ends[0] = await place.attach()
        ends[0].press(b"y")
        await place.hears(b"y")  # and nothing before it


LATE = """
[vm.late]
vhost-user = "w"
[vm.late.chardev.con]
backend = "console"
path = "late-c"
[[vm.late.console]]
chardev = "con"
"""


async def test_of_several_vms_the_name_says_whose_console_it_is(tmp_path):
    """As `vring ctl` has it: the VM that the service began with keeps its names."""
    (tmp_path / "late.toml").write_text(LATE)
    async with place_of(tmp_path, *QMP) as place:
        await place.keeper.logged("QMP at")
        added = await run_vring("ctl", "--qmp", "qmp", "vm", "add", "late.toml")
        assert added == (0, "", "")
        for name, path in (("con", "c"), ("late/con", "late-c")):
            terminal = await place.attach("--qmp", "qmp", name)
            await terminal.said(f"attached to .*/{path}[\r;]")
            terminal.press(LEAVE)
            assert await terminal.status() == 0
        assert await attach("--qmp", "qmp", "late/c") == (
            4,
            "vring: there is no port 'late/c'; did you mean late/con? known: con, late/con; "
            "a path begins with / or ., as in ./late/c\n",
        )
        # Nobody is there who knows names: it is a path.
        assert await attach("late/c") == (
            3,
            "vring: there is no server at late/c: No such file or directory\n",
        )


async def test_the_guest_has_the_size_of_the_terminal(tmp_path):
    async with place_of(tmp_path) as place:
        terminal = await place.attach()
        await until(lambda: place.port.size == (80, 24))
        terminal.resize(132, 43)
        await until(lambda: place.port.size == (132, 43))
        await place.keeper.kill_until_served()
        terminal.resize(100, 30)
        await until(lambda: place.port.size == (100, 30))


async def test_a_stopped_reader_holds_up_nobody_and_is_told_what_it_lost(tmp_path):
    total = 20 << 20
    async with place_of(tmp_path) as place:
        stopped, *others = [await place.attach() for _ in range(3)]
        at = [len(terminal.data) for terminal in others]
        os.kill(stopped.process.pid, signal.SIGSTOP)
        sent = bytearray()
        while len(sent) < total:
            lines = b"".join(b"%07d\n" % n for n in range(len(sent) // 8, len(sent) // 8 + 65536))
            place.writer.write(lines)
            sent += lines
            for terminal, begin in zip(others, at, strict=True):
                await terminal.shown(begin + len(sent))
        for terminal, begin in zip(others, at, strict=True):
            assert terminal.data[begin:] == sent
        os.kill(stopped.process.pid, signal.SIGCONT)
        await stopped.said(r"bytes are left out: this terminal was too slow")
        await stopped.said(f"{len(sent) // 8 - 1:07}\n")
        before, _, rest = bytes(stopped.data).partition(CUT + b"\r\n[vring: ")
        count, _, after = rest.partition(b" bytes are left out: this terminal was too slow]\r\n")
        assert sent.endswith(after)
        shown = before.rpartition(b"]\r\n")[2]
        assert sent.startswith(shown)
        assert len(shown) + int(count) + len(after) == len(sent)
        stopped.press(b"alive")
        await place.hears(b"alive")


async def test_a_killed_worker_cuts_off_nobody(tmp_path):
    async with place_of(tmp_path) as place:
        terminal = await place.attach()
        begin = len(terminal.data)
        sent = b""
        for turn in range(3):
            place.writer.write(piece := b"".join(b"%d %d\n" % (turn, n) for n in range(9999)))
            sent += piece
            await place.keeper.kill_until_served()
            terminal.press(b"%d" % turn)
            await terminal.shown(begin + len(sent))
        assert terminal.data[begin:] == sent
        await place.keeper.logged("a client attached", 4)
        assert await place.keeper.stop() == 0
        assert not (tmp_path / "c").exists()
        assert await terminal.status() == 3
        assert "the console was closed" in terminal.text
        assert terminal.left == terminal.found


@pytest.mark.parametrize("how", ["escape", "SIGTERM", "SIGHUP", "the service is killed"])
async def test_the_terminal_is_left_as_it_was(tmp_path, how):
    """Modes that the guest set and the program's own are put back, however it ends."""
    async with place_of(tmp_path) as place:
        terminal = await place.attach()
        place.writer.write(b"\x1b[?1049h\x1b[?25l\x1b[?1;1002;2004h\x1b[5;9r\x1b[31mvi\x1b]0;title")
        await terminal.said("title")
        if how == "escape":
            terminal.press(LEAVE)
        elif how == "the service is killed":
            keeper, worker = place.keeper.process.pid, place.keeper.worker
            os.kill(keeper, signal.SIGKILL)
            await place.keeper.logged("the keeper has ended")
            os.kill(worker, signal.SIGKILL)
        else:
            os.kill(terminal.process.pid, getattr(signal, how))
        wanted = {"escape": 0, "the service is killed": 3}.get(how, 130)
        assert await terminal.status() == wanted
        assert terminal.left == terminal.found
        undone = terminal.data.partition(b"title")[2]
        assert undone.startswith(CUT + b"\x1b[?1049l")
        for sequence in (b"\x1b[?25h", b"\x1b[?1l", b"\x1b[?1002l", b"\x1b[?2004l", b"\x1b[r"):
            assert sequence in undone
        if how == "the service is killed":
            assert "the connection was lost, and there is no server at ./c" in terminal.text


async def test_pipes_get_the_bytes_and_nothing_else(tmp_path):
    async with place_of(tmp_path) as place:
        place.writer.write(b"\x1b[c history\n")
        command = (sys.executable, "-m", "vring_serial", "attach", "./c")
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        async with running(*command, **pipes) as process:
            assert await process.stdout.readexactly(12) == b"\x1b[c history\n"
            process.stdin.write(LEAVE + b"\0\xff" * 50_000)
            await place.hears(LEAVE + b"\0\xff" * 50_000)
            process.stdin.close()
            place.writer.write(b"still\n")
            assert await process.stdout.readexactly(6) == b"still\n"
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert await process.stderr.read() == b""
        (tmp_path / "in").write_bytes(b"from a file")
        with (tmp_path / "in").open("rb") as file:
            async with running(*command, **pipes | {"stdin": file}) as process:
                await place.hears(b"from a file")


async def test_a_terminal_that_shows_nothing_can_still_be_left(tmp_path):
    """Its output is held (Ctrl-S, or a stopped multiplexer), and more comes."""
    async with place_of(tmp_path) as place:
        terminal = await place.attach()
        terminal.hold()
        place.writer.write(b"x" * 200_000)
        await place.writer.drain()
        terminal.press(b"?")
        await place.hears(b"?")
        terminal.press(LEAVE)
        async with asyncio.timeout(DEADLINE):
            assert await terminal.process.wait() == 0


async def attach(*arguments):
    command = (sys.executable, "-m", "vring_serial", "attach", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert out == b""
    return process.returncode, err.decode()


async def test_exit_statuses_tell_failures_apart(tmp_path):
    other = (
        "--chardev",
        "socket,id=s,path=s,server=on,wait=off",
        "--port",
        "chardev=s,nr=2,name=n",
    )
    async with kept(tmp_path, *CONSOLE, *other, *QMP) as keeper:
        await keeper.logged("QMP at")
        assert await attach("con") == (
            2,
            "vring attach: 'con' has no slash, so it is the name of a port, and needs --qmp or "
            "VRING_QMP. (see vring attach --help)\n",
        )
        assert await attach("./d") == (
            3,
            "vring: there is no server at ./d: No such file or directory\n",
        )
        assert await attach("--qmp", "nowhere", "con") == (
            3,
            "vring: no server at nowhere: No such file or directory\n",
        )
        assert await attach("--qmp", "qmp", "cob") == (
            4,
            "vring: there is no port 'cob'; did you mean con? known: con\n",
        )
        status, err = await attach("--qmp", "qmp", "n")
        assert status == 5
        assert "has no chardev of the kind console, but disconnected:unix:s,server=on" in err
        assert await attach("--timeout", "0.5", "./s") == (
            6,
            "vring: the server at ./s did not answer in 0.5 s\n",
        )
        status, err = await attach("--escape", "ab", "./c")
        assert (status, "'ab' is no key" in err) == (2, True)


async def test_what_is_no_console_is_named(tmp_path):
    async def greet(reader, writer):
        writer.write(b"SSH-2.0-x\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(greet, "strange"):
        assert await attach("./strange") == (5, "vring: ./strange: frame 83: unknown here\n")


# --- keys


@pytest.mark.parametrize("text", ["^]", "^A", "^a", "~", "none", "^?", "^_", "^"])
def test_keys_are_written_as_they_are_read(text):
    key = EscapeKey().convert(text, None, None)
    assert EscapeKey().convert(str(key), None, None) == key
    assert EscapeKey().convert(key, None, None) is key
    assert str(key) == text.replace("a", "A")


@pytest.mark.parametrize(
    ("escape", "typed", "passed", "commands"),
    [
        ("^]", b"ls\r\x1d.more", b"ls\r", [Command.LEAVE]),
        ("^]", b"\x1d\x1d\x1dx\x1d?y", b"\x1d\x1dxy", [Command.HELP]),
        ("~", b"a~.\r~.", b"a~.\r", [Command.LEAVE]),
        ("~", b"~~.\n~?~", b"~.\n", [Command.HELP]),
        ("none", b"\x1d.", b"\x1d.", []),
        ("^a", b"\x01\x04", b"", [Command.LEAVE]),
    ],
)
def test_the_escape_key_is_taken_out_however_it_is_cut(escape, typed, passed, commands):
    for cut in range(len(typed) + 1):
        keys = Keys(EscapeKey().convert(escape, None, None))
        first, asked = keys.feed(typed[:cut])
        if Command.LEAVE not in asked:
            second, more = keys.feed(typed[cut:])
            first, asked = first + second, asked + more
        assert (first, asked) == (passed, commands)
    assert Keys(Escape(b"")).feed(b"") == (b"", [])


# --- the screen


@pytest.mark.parametrize(
    "query",
    [
        *(b"\x05", b"\x1bZ", b"\x1b[c", b"\x1b[>c", b"\x1b[6n", b"\x1b[?6n", b"\x1b[5n", b"\x1b[x"),
        *(b"\x1b[?2004$p", b"\x1b[4$p", b"\x1b[>0q", b"\x1b[?u", b"\x1b[18t", b"\x1b[1;1;1*y"),
        *(b"\x1b]11;?\x07", b"\x1b]4;1;?;2;?\x1b\\", b"\x1bP+q544e\x1b\\", b"\x1bP$qm\x1b\\"),
    ],
)
def test_history_asks_the_terminal_nothing_however_it_is_cut(query):
    stream = b"one\x1b[1m" + query + b"\x1b[2;3Htwo\x1b]0;what?\x07\x1b[c"
    for cut in range(len(stream) + 1):
        screen = Screen()
        shown = screen.history(stream[:cut], last=False) + screen.history(stream[cut:], last=True)
        assert shown == b"one\x1b[1m\x1b[2;3Htwo\x1b]0;what?\x07", cut


@pytest.mark.parametrize(
    ("output", "undone"),
    [
        (b"plain \x1b[31mred", b""),
        (b"\x1b[?1049h\x1b[?7l", b"\x1b[?1049l\x1b[?7h"),
        (b"\x1b[?1049h\x1b[?1049l\x1b[?25l\x1b[?25h", b""),
        (b"\x1b[?1000;1006;9999h", b"\x1b[?1000l\x1b[?1006l"),
        (b"\x1b[?25l\x1b[1;2r\x1bc", b""),
        (b"\x1b[2;5r", b"\x1b7\x1b[r\x1b8"),
        (b"\x1b[2;5r\x1b[r", b""),
        (b"\x1b[>1u\x1b[>4;2m", b"\x1b[<16u\x1b[=0u\x1b[>4m"),
    ],
)
def test_what_output_changed_is_undone_however_it_is_cut(output, undone):
    for cut in range(len(output) + 1):
        screen = Screen()
        screen.live(output[:cut])
        screen.live(output[cut:])
        assert screen.undo == CUT + undone + b"\x1b[4l\x1b>"
    screen = Screen()
    screen.history(output, last=True)
    assert screen.undo == CUT + undone + b"\x1b[4l\x1b>"


def test_hostile_output_costs_little():
    """What a guest can make the terminal's side think about is bounded."""
    for piece in (
        b"\x1b]",
        b"\x1b];?",
        b"\x1b[",
        b"\x1b[?1;",
        b"\x1bP+q",
        b";?",
        b"\x1b[?" + b"1;" * 90,
    ):
        screen = Screen()
        for _ in range(4):
            screen.history(piece * (65536 // len(piece)), last=False)
            screen.live(piece * (65536 // len(piece)))
        assert len(screen.history(b"", last=True)) < 1024
