"""Agent commands on a real terminal: bars, what is said while one waits, what a guest says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.terminals import Terminal, on_terminal
from vring_serial.agent.guest import GuestAgent
from vring_serial.proto.agent import Selection

#: Clears the screen, sets the title, and goes to the left.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\u009b1m\u202e"


class Place:
    """An agent at a socket, and terminals beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.agent = GuestAgent(downloads=directory)
        self.terminals: list[Terminal] = []

    async def run(self, *arguments: str | Path) -> Terminal:
        """Run ``vring agent`` on a terminal of 80 columns."""
        command = ("agent", "--socket", "a", *arguments)
        self.terminals.append(await on_terminal(self.directory, *command))
        return self.terminals[-1]


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path)
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(place.agent.protocol_factory, tmp_path / "a")
    yield place
    for terminal in place.terminals:
        await terminal.aclose()
    await place.agent.aclose()
    server.close()


async def test_an_interrupted_transfer_says_so_and_draws_no_bar_again(place: Place) -> None:
    large = place.directory / "from" / "large"
    large.parent.mkdir()
    with large.open("wb") as file:
        file.truncate(1 << 35)
    terminal = await place.run("send", large)
    await terminal.said(r"/32.0 GiB.* MB/s")
    terminal.interrupt()
    assert await terminal.status() == 130
    # What is after the last removal of the bars stays on the screen.
    *_, left = re.split(r"\x1b\[2K", terminal.text)
    left = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", left)
    assert left.split() == ["cancelled"]


async def test_setting_a_clipboard_says_what_it_waits_for_on_a_terminal(place: Place) -> None:
    terminal = await place.run("clipboard", "set", "text", "--selection", "secondary")
    await terminal.said(r"\n")
    assert terminal.text == "until something in the guest takes the secondary, or Ctrl-C\r\n"
    place.agent.set_clipboard("mine", Selection.SECONDARY)
    assert await terminal.status() == 0
    assert len(terminal.text.splitlines()) == 1


async def test_text_of_a_guest_drives_no_terminal(place: Place) -> None:
    place.agent.set_clipboard(f"first\tline\n{HOSTILE}last")
    terminal = await place.run("clipboard", "get")
    assert await terminal.status() == 0
    assert terminal.text == ("first\tline\r\n\\x1b[2J\\x1b]0;owned\\x07\\r\\x9b1m\\u202elast")


@pytest.mark.parametrize("null", [False, True])
async def test_paths_of_a_guest_forge_no_line(place: Place, null: bool) -> None:
    names = ["plain", f"a{HOSTILE}\nb"]
    for name in names:
        (place.directory / name).touch()
    place.agent.copy_files([place.directory / name for name in names])
    terminal = await place.run("clipboard", "get", "--type", "files", *["-0"] * null)
    assert await terminal.status() == 0
    escaped = "a\\x1b[2J\\x1b]0;owned\\x07\\r\\x9b1m\\u202e\\nb"
    if null:
        shown = "".join(f"{place.directory}/{name}\0" for name in names).replace("\n", "\r\n")
    else:
        shown = "".join(f"{place.directory}/{name}\r\n" for name in ("plain", escaped))
    assert terminal.text == shown


async def test_data_that_are_no_text_are_not_for_a_terminal(place: Place) -> None:
    terminal = await place.run("clipboard", "get", "--type", "png")
    assert await terminal.status() == 2
    assert terminal.text == "vring: --output: png data are not for a terminal: name a file\r\n"


async def test_a_shell_asks_and_remembers_and_outlives_interrupts_and_errors(place: Place) -> None:
    terminal = await place.run("shell")
    await terminal.said("vring agent> ")
    terminal.press(b"resize 800x600\r")
    await terminal.said(r"the guest took 800x600\+0\+0\r\n[^\n]*vring agent> $")
    terminal.press(b"nonsense\r")
    await terminal.said(r"vring: No such command 'nonsense'.*\r\n[^\n]*vring agent> $")
    terminal.press(b"clipboard watch --selection secondary\r")
    place.agent.set_clipboard("seen", Selection.SECONDARY)
    await terminal.said("secondary: text: 'seen'")
    terminal.interrupt()
    await terminal.said(r"\^C.*\r\n[^\n]*vring agent> $")
    # An interrupt of the prompt drops the line; three keys back is the first command.
    terminal.press(b"half")
    await terminal.said("half$")
    terminal.interrupt()
    await terminal.said(r"half.*\r\n[^\n]*vring agent> $")
    terminal.press(b"\x10\x10\x10\r")
    await terminal.said(r"(?s)(the guest took 800x600.*){2}vring agent> $")
    terminal.press(b"exit\r")
    assert await terminal.status() == 0


async def test_ctrl_d_ends_a_shell(place: Place) -> None:
    terminal = await place.run("shell")
    await terminal.said("vring agent> ")
    terminal.press(b"\x04")
    assert await terminal.status() == 0
