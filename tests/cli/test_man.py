"""The man pages: one for every command, up to date, without a complaint of the formatter."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from vring_serial.cli import vring

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "man").glob("*.1"))


def names(command: click.Command, name: str) -> list[str]:
    found = [name]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for below in command.list_commands(context):
            child = command.get_command(context, below)
            assert child is not None
            found += names(child, f"{name}-{below}")
    return found


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    assert sorted(page.stem for page in PAGES) == sorted(names(vring, "vring"))


def test_the_pages_are_those_of_the_commands(tmp_path: Path) -> None:
    """If not: make man."""
    (tmp_path / "vring-gone.1").touch()  # of a command that is no more
    script = ROOT / "scripts" / "make-man"
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=60)
    made = {page.name: page.read_text() for page in tmp_path.iterdir()}
    assert made == {page.name: page.read_text() for page in PAGES}, "make man"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_say() -> None:
    result = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", *PAGES], capture_output=True, check=True, timeout=60
    )
    assert result.stderr == b""


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_a_page_shows_what_the_help_says() -> None:
    page = ROOT / "man" / "vring-vhost-user.1"
    result = subprocess.run(
        ["groff", "-man", "-Tascii", page], capture_output=True, text=True, check=True, timeout=60
    )
    shown = re.sub(".\b|\x1b\\[[0-9;]*m", "", result.stdout)
    assert (
        "vring vhost-user --fd 3 --chardev socket,id=c,path=/run/c.sock,server=on,wait=off \\"
        in (shown)
    )
    words = " ".join(shown.split())
    assert "vring-vhost-user - Serve one device as management layers start" in words
    assert "--fd FDNUM Serve on this inherited unix socket: one that listens" in words
    assert "SEE ALSO vring(1)" in words


def test_they_are_installed(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "install_data", "--install-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    installed = sorted((tmp_path / "share" / "man" / "man1").iterdir())
    assert [page.name for page in installed] == [page.name for page in PAGES]
