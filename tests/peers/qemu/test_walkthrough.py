"""README's section on stock QEMU, to the letter, in terminals as a reader has them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.qemu_machine import ROOT as QEMU_ROOT

ROOT = Path(__file__).parents[3]
PROMPT = "reader$ "
GUEST_PROMPT = "# "

pytestmark = pytest.mark.peer("socat")


def blocks():
    """The indented blocks of the section, in their order."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## Stock QEMU\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", section[1], re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") for block in found]


class Terminal:
    """A shell in a pseudo-terminal."""

    def __init__(self, directory):
        self._fd, other = pty.openpty()
        self._output = ""
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"],
            cwd=directory,
            env=os.environ | {"PS1": PROMPT, "PS2": "", "TERM": "dumb"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(other)
        self.wait_for(PROMPT)

    def type(self, text):
        """Type lines; what was printed before is forgotten."""
        self._output = ""
        for line in text.splitlines():
            os.write(self._fd, f"{line}\n".encode())

    def interrupt(self):
        """Press Control and C."""
        self._output = ""
        os.write(self._fd, b"\x03")

    def wait_for(self, text, timeout=60):
        """Everything that is printed until ``text`` is."""
        deadline = time.monotonic() + timeout
        while text not in self._output:
            ready, _, _ = select.select([self._fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no {text!r} in:\n{self._output}"
            self._output += os.read(self._fd, 4096).decode(errors="replace").replace("\r", "")
        seen, _, self._output = self._output.partition(text)
        return seen

    def close(self):
        """Close the window: what runs in it is told so."""
        os.close(self._fd)
        self._process.kill()
        self._process.wait()


def _take_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminals(tmp_path):
    """Three terminals in a built checkout whose files in /tmp are the test's own."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    opened = [Terminal(tmp_path) for _ in range(3)]
    yield opened
    for terminal in opened:
        terminal.close()


def test_the_walkthrough(terminals, tmp_path):
    served, booted, client = terminals
    vhost_user, prepare, guest, vfio_user, attach = (
        block.replace("/tmp/", f"{tmp_path}/").replace("/var/cache/vring/qemu-root", str(QEMU_ROOT))
        for block in blocks()
    )
    prepare, vhost_attach = prepare.split("\nqemu -chardev")
    booted.type(prepare)
    booted.wait_for(PROMPT)
    for serve, qemu in ((vhost_user, f"qemu -chardev{vhost_attach}"), (vfio_user, attach)):
        served.type(serve)
        served.wait_for("serving")
        booted.type(qemu)
        booted.wait_for(GUEST_PROMPT)
        client.type(f"socat - UNIX-CONNECT:{tmp_path}/data.sock")
        ids, hello = guest.splitlines()
        booted.type(ids)
        booted.wait_for("0x1043\norg.example.data\n")
        booted.type(hello)
        client.wait_for("hello from QEMU\n")
        client.interrupt()
        client.wait_for(PROMPT)
        booted.wait_for(GUEST_PROMPT)
        booted.type("poweroff -f")
        booted.wait_for(PROMPT)
        served.interrupt()
        served.wait_for(PROMPT)
