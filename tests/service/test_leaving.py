"""A worker in its sandbox tries every way out that we know, from inside."""

from __future__ import annotations

import contextlib
import os
import platform
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.test_sandbox import needs_filters, needs_landlock, needs_root

PROGRAM = Path(__file__).with_name("prisoner.py")
NOBODY = 65534

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of calls are x86-64's"),
    needs_filters,
    needs_landlock,
]


def outcomes(directory, sandbox, *ways, user):
    """What became of each way: what the worker said, and the keeper of its end."""
    os.chmod(directory, 0o777)
    secret = directory / "secret"
    secret.write_text("nobody's business")
    os.chmod(secret, 0o666)
    before = os.stat(secret)
    with contextlib.ExitStack() as stack:
        elsewhere = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        elsewhere.bind(str(directory / "elsewhere"))
        os.chmod(directory / "elsewhere", 0o777)
        master, slave = pty.openpty()
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        done = subprocess.run(
            [sys.executable, PROGRAM, sandbox, directory, str(user), *ways],
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
            start_new_session=True,
        )
        arrived = b""
        elsewhere.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            arrived = elsewhere.recv(100)
    assert done.returncode == 0, done.stdout
    after = os.stat(secret)
    unchanged = (
        sorted(os.listdir(directory)) == ["elsewhere", "secret"]
        and secret.read_text() == "nobody's business"
        and (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)
        and not arrived
    )
    pieces = re.split(r"^try (.*)\n", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True)), unchanged


@pytest.mark.parametrize("user", [os.getuid(), pytest.param(NOBODY, marks=needs_root)])
@pytest.mark.parametrize(
    ("sandbox", "ways", "least"),
    [
        ("on", ("paths", "calls"), 90),
        ("off,landlock=on", ("paths", "ptrace", "process_vm_writev", "connect"), 15),
        ("off,seccomp=on", ("calls",), 75),
    ],
    ids=["all layers", "landlock", "seccomp"],
)
def test_there_is_no_way_out(tmp_path, sandbox, ways, least, user):
    found, unchanged = outcomes(tmp_path, sandbox, *ways, user=user)
    assert len(found) >= least
    assert unchanged
    left = {
        way: said
        for way, said in found.items()
        if "went through" in said or not re.search(r"^refused \d|by SIGSYS", said, re.MULTILINE)
    }
    assert not left


def test_who_tries_is_named(tmp_path):
    found, _ = outcomes(tmp_path, "on", "ptrace", "signal by input", "TIOCSTI", user=os.getuid())
    for said, call in zip(found.values(), ("ptrace", "fcntl", "ioctl"), strict=True):
        assert re.search(rf" refused {call}\n.* by SIGSYS; another one goes on", said)


@needs_root
def test_without_a_sandbox_they_are_ways_out(tmp_path):
    ways = ("open", "open of the keeper's", "chmod", "pair of datagrams", "new mount namespace")
    found, unchanged = outcomes(tmp_path, "off", *ways, user=0)
    assert not unchanged
    assert [said.splitlines()[0] for said in found.values()] == ["went through"] * len(ways)
