"""What commands print, and where: helps, empty paths, what guests say on a terminal."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vring_serial.cli import COMMANDS, vring
from vring_serial.cli.background import in_background
from vring_serial.cli.plain import escaped

VRING = (sys.executable, "-m", "vring_serial")


def helps(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from helps(found, (*path, name))


def test_every_help_works_without_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VRING_AGENT_SOCKET", raising=False)
    every = list(helps(vring))
    assert len(every) > len(COMMANDS) + 8
    for path in every:
        with pytest.raises(SystemExit) as exit_:
            vring.main([*path, "--help"])
        out, err = capsys.readouterr()
        assert (exit_.value.code, err) == (0, ""), path
        assert out.startswith("Usage: "), path


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--vhost-user", "v", "--chardev", "null,id=n", "--agent-socket", ""),
        ("serve", "--vhost-user", "v", "--chardev", "null,id=n", "--pid-file", ""),
        ("serve", "--vhost-user", "v", "--chardev", "null,id=n", "--log-file", ""),
        ("serve", "--vhost-user", "v", "--channel-directory", ""),
        ("serve", "--vhost-user", "v", "--domain", ""),
        ("serve", "--vhost-user", ""),
        ("serve", "--vfio-user", ""),
        ("guest", "--list", "--vhost-user", ""),
        ("agent", "caps", "--socket", ""),
        ("agent", "--socket", "s", "monitor", "--listen", ""),
        ("agent", "--socket", "s", "clipboard", "get", "--output", ""),
        ("agent", "--socket", "s", "clipboard", "set", "--file", ""),
        ("bench", "rings", "--json", ""),
        ("bench", "rings", "--plot", ""),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_a_usage_error_that_names_the_option(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if words == ("agent", "caps", "--socket", ""):
        words = ("agent", "--socket", "", "caps")
    option = words[words.index("") - 1]
    with pytest.raises(SystemExit) as exit_:
        vring.main(list(words))
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert f"Invalid value for '{option}': it is empty" in err
    assert len(err.splitlines()) == 1


def test_an_agent_command_without_a_socket_names_the_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VRING_AGENT_SOCKET", raising=False)
    for words in (["caps"], ["clipboard", "set", "x"], ["monitor"], ["resize", "10x10"]):
        with pytest.raises(SystemExit) as exit_:
            vring.main(["agent", *words])
        assert exit_.value.code == 2
        assert "--socket" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_has_no_size_is_not_sent(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fifo" if kind == "fifo" else Path("/dev/zero")
    if kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(SystemExit) as exit_:
        vring.main(["agent", "--socket", "s", "send", str(path)])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.count(str(path)) == 1
    assert "is no regular file" in line


def test_text_of_others_drives_no_terminal() -> None:
    assert escaped("naïve café 日本") == "naïve café 日本"
    assert escaped("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
    assert escaped("a\x1b\n\tb", keep="\n\t") == "a\\x1b\n\tb"
    assert escaped("\u202e\x9b") == "\\u202e\\x9b"


def test_a_command_in_the_background_has_begun_and_no_terminal(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from vring_serial.cli.background import in_background\n"
        "left = in_background()\n"
        "if sys.argv[1] == 'fails':\n"
        "    sys.exit(3)\n"
        "left()\n"
        "ends = [os.path.samefile(f'/proc/self/fd/{fd}', '/dev/null') for fd in range(3)]\n"
        "with open('result', 'w') as file:\n"
        "    file.write(f'{all(ends)} {os.getsid(0) == os.getpid()}')\n"
        "os.rename('result', 'done')\n"
    )
    assert in_background.__doc__
    master, slave = pty.openpty()
    try:
        for word, status in (("fails", 3), ("begins", 0)):
            done = subprocess.run(
                [sys.executable, "-c", script, word],
                cwd=tmp_path,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                timeout=20,
                check=False,
            )
            assert done.returncode == status
        # It ends by itself, a moment later.
        with subprocess.Popen(
            ["sh", "-c", "until [ -e done ]; do sleep 0.01; done"], cwd=tmp_path
        ) as p:
            assert p.wait(20) == 0
        assert (tmp_path / "done").read_text() == "True True"
    finally:
        os.close(master)
        os.close(slave)


def test_the_output_of_a_clipboard_is_its_owners(tmp_path: Path) -> None:
    from vring_serial.cli.agent.clipboard import _output

    path = tmp_path / "copied"
    with _output(str(path)) as file:
        file.write(b"secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"secret"
