"""Completion in real shells on real terminals: a line is typed, Tab pressed, the line compared."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import end_now
from tests.support.waiting import DEADLINE
from vring_serial.chardev import kinds

#: Another complete word on the line, before the one that is completed.
DATA = "--chardev socket,id=data,path=/run/data.sock,server=on"
TAB = "\t"
#: readline: insert all completions.
ALL = "\x1b*"

BASH = """\
PS1=; bind 'set bell-style none'; bind 'set enable-bracketed-paste off'
eval "$(_VRING_COMPLETE=bash_source vring)"
eval "$(_VRING_VHOST_USER_COMPLETE=bash_source vring-vhost-user)"
tell() { printf '%s\\n' "$READLINE_LINE" > told; }
bind -x '"\\C-t": tell'
echo re""ady
"""
ZSH = """\
PS1=; unsetopt beep zle_bracketed_paste; autoload -Uz compinit; compinit -u -D
eval "$(_VRING_COMPLETE=zsh_source vring)"
eval "$(_VRING_VHOST_USER_COMPLETE=zsh_source vring-vhost-user)"
tell() { print -r -- $BUFFER > told }
zle -N tell; bindkey '^T' tell
echo re""ady
"""


class Shell:
    """An interactive shell in a directory, whose Ctrl-T writes its line to the FIFO ``told``."""

    def __init__(
        self, directory: Path, command: list[str], start: str, environment: dict[str, str]
    ):
        os.mkfifo(directory / "told")
        self._told = os.open(directory / "told", os.O_RDWR | os.O_NONBLOCK)
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        (directory / "start").write_text(start)
        self._type(". ./start\n")
        self.said = ""
        while "ready" not in self.said:
            self._read(self._master)

    def _type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def _read(self, *wanted: int) -> str:
        """Return what the FIFO says, if it does; what the terminal says is kept."""
        deadline = time.monotonic() + DEADLINE
        ready, _, _ = select.select(wanted, [], [], deadline - time.monotonic())
        assert ready, f"the shell does nothing: {self.said!r}"
        if self._master in ready:
            self.said += os.read(self._master, 1 << 16).decode(errors="replace")
        return os.read(self._told, 1 << 16).decode() if self._told in ready else ""

    def line(self, typed: str, key: str = TAB) -> str:
        """Return the line that the shell makes of what is typed, and ``key`` after it."""
        self._type(f"{typed}{key}\x14")
        told = ""
        while not told.endswith("\n"):
            told += self._read(self._master, self._told)
        self._type("\x05\x15")  # to its end, and all of it gone
        return told[:-1]

    def close(self) -> None:
        os.close(self._master)
        end_now(self._process)
        os.close(self._told)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A search path on which our programs are those under test."""
    programs = tmp_path_factory.mktemp("bin")
    python = shlex.quote(sys.executable)
    back_end = "from vring_serial.cli.vhost_user import main; main()"
    for name, run in (("vring", "-m vring_serial"), ("vring-vhost-user", f"-c '{back_end}'")):
        (programs / name).write_text(f'#!/bin/sh\nexec {python} {run} "$@"\n')
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(programs),
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        # As wide as any line here: the shell does not scroll it.
        "COLUMNS": "400",
    }


def shell(
    directory: Path, command: list[str], start: str, environment: dict[str, str]
) -> Iterator[Shell]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    (directory / "a, $b").mkdir()
    (directory / "a, $b" / "file").touch()
    (directory / "one.toml").touch()
    shell = Shell(directory, command, start, environment)
    try:
        yield shell
    finally:
        shell.close()


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Shell]:
    yield from shell(
        tmp_path_factory.mktemp("bash"), ["bash", "--norc", "--noprofile", "-i"], BASH, environment
    )


@pytest.fixture(scope="module")
def zsh(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Shell]:
    yield from shell(tmp_path_factory.mktemp("zsh"), ["zsh", "-f", "-i"], ZSH, environment)


#: What is typed, and the line after Tab. A space is there if the word is finished.
LINES = [
    ("vring ser", "vring serve "),
    ("vring config ch", "vring config check "),
    ("vring config check one", "vring config check one.toml "),
    ("vring serve --char", "vring serve --chardev "),
    ("vring serve --chardev so", "vring serve --chardev socket,"),
    ("vring serve --chardev=so", "vring serve --chardev=socket,"),
    ("vring serve --chardev socket,pa", "vring serve --chardev socket,path="),
    ("vring serve --chardev socket,id=x,serv", "vring serve --chardev socket,id=x,server="),
    ("vring serve --chardev ringbuf,s", "vring serve --chardev ringbuf,size="),
    ("vring serve --chardev pty,id=x,logf", "vring serve --chardev pty,id=x,logfile="),
    ("vring serve --chardev pty,path=on", "vring serve --chardev pty,path=one.toml "),
    (f"vring serve {DATA} --port ch", f"vring serve {DATA} --port chardev="),
    (f"vring serve {DATA} --port chardev=", f"vring serve {DATA} --port chardev=data "),
    ("vring serve --chardev=pty,id=a,mu", "vring serve --chardev=pty,id=a,mux="),
    ("vring serve --chardev=pty,id=a,mux=of", "vring serve --chardev=pty,id=a,mux=off "),
    (
        "vring serve --chardev pty,id=a,mux=on --port chardev=a --port chardev=",
        "vring serve --chardev pty,id=a,mux=on --port chardev=a --port chardev=a ",
    ),
    (f"vring serve {DATA} --console chardev=d", f"vring serve {DATA} --console chardev=data "),
    ("vring serve --sandbox on,la", "vring serve --sandbox on,landlock="),
    ("vring serve --sandbox landlock=of", "vring serve --sandbox landlock=off "),
    ("vring serve --spice disable-t", "vring serve --spice disable-ticketing="),
    ("vring serve --qmp u", "vring serve --qmp unix:"),
    ("vring serve --qmp unix:one", "vring serve --qmp unix:one.toml "),
    ("vring serve --chardev nosuch,pa", "vring serve --chardev nosuch,pa"),
]
#: The same of the program that management layers start.
BACK_END_LINES = [
    ("vring-vhost-user --socket-p", "vring-vhost-user --socket-path "),
    ("vring-vhost-user --socket-path one", "vring-vhost-user --socket-path one.toml "),
    ("vring-vhost-user --print-c", "vring-vhost-user --print-capabilities "),
    ("vring-vhost-user --chardev so", "vring-vhost-user --chardev socket,"),
    ("vring-vhost-user --chardev socket,pa", "vring-vhost-user --chardev socket,path="),
    (f"vring-vhost-user {DATA} --port ch", f"vring-vhost-user {DATA} --port chardev="),
]


@pytest.mark.parametrize(("typed", "completed"), [*LINES, *BACK_END_LINES])
def test_bash(bash: Shell, typed: str, completed: str) -> None:
    assert bash.line(typed) == completed


def test_bash_offers_all_that_there_is_to_choose(bash: Shell) -> None:
    def choices(typed: str) -> str:
        return bash.line(typed, ALL)

    everything = " ".join(f"{kind}," for kind in sorted(kinds()))
    assert choices("vring serve --chardev ") == f"vring serve --chardev {everything} "
    # What is given is not offered again. Behind a "=", bash has a word of its own.
    typed = "vring serve --chardev socket,id=x,reconnect=1,path=y,re"
    assert choices(typed) == f"{typed}connect-ms= "
    typed = f"vring serve {DATA} --chardev pty,id=more --chardev null,id=n --console chardev=n"
    assert choices(f"{typed} --port chardev=") == f"{typed} --port chardev=data more "
    assert choices("vring serve --sandbox seccomp=") == "vring serve --sandbox seccomp=on off "
    layers = "on off capabilities= landlock= seccomp= memory= descriptors= "
    assert choices("vring serve --sandbox ") == f"vring serve --sandbox {layers}"
    assert choices("vring config ") == "vring config check show "


def test_bash_quotes_what_names_of_files_hold(bash: Shell) -> None:
    """A comma is doubled for the option; what the shell would act on stays text."""
    assert bash.line("vring config check a") == r"vring config check a,\ \$b/"
    # Directories alone.
    assert bash.line("vring guest --downloads a") == r"vring guest --downloads a,\ \$b/"
    assert bash.line("vring guest --downloads o") == "vring guest --downloads o"
    typed = "vring serve --chardev file,id=x,path="
    first = bash.line(f"{typed}a")
    assert first == rf"{typed}a,,\ \$b/"
    assert bash.line(first) == f"{first}file "


def test_bash_completes_in_quotes_and_within_a_longer_line(bash: Shell) -> None:
    typed = 'FOO=1 vring serve --chardev "socket,pa'
    assert bash.line(typed) == f'{typed}th="'
    typed = "echo $HOME; vring serve --chardev socket,pa"
    assert bash.line(typed) == f"{typed}th="


@pytest.mark.parametrize(("typed", "completed"), [*LINES[1::3], *BACK_END_LINES[::2]])
def test_zsh(zsh: Shell, typed: str, completed: str) -> None:
    assert zsh.line(typed) == completed


def test_fish(tmp_path: Path, environment: dict[str, str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "one.toml").touch()
    lines = [*LINES[::4], *BACK_END_LINES[1::2]]
    sources = (
        "_VRING_COMPLETE=fish_source vring | source; "
        "_VRING_VHOST_USER_COMPLETE=fish_source vring-vhost-user | source"
    )
    asked = "; ".join(
        f"echo {shlex.quote(typed)}; complete -C {shlex.quote(typed)}" for typed, _ in lines
    )
    result = subprocess.run(
        ["fish", "--no-config", "-c", f"{sources}; {asked}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE * 2,
        check=True,
    )
    assert result.stderr == ""
    said = [line.partition("\t")[0] for line in result.stdout.splitlines()]
    wanted = []
    for typed, completed in lines:
        wanted += [typed, completed.split()[-1]]
    assert said == wanted
