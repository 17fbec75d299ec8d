"""The group ``vring``: help, version, and how anything that goes wrong ends."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner, Result

from vring import VringError
from vring_serial.cli import COMMANDS, LazyCommand, vring
from vring_serial.errors import ConfigError, DependencyError, ResourceError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(vring, arguments)


def test_help_lists_the_commands_without_importing_them() -> None:
    script = (
        "import sys, vring_serial.cli as cli\n"
        "try: cli.vring.main(['--help'])\n"
        "except SystemExit as exit_: print(exit_.code)\n"
        "heavy = {'numpy', 'asyncio', 'lxml', 'rich', 'vring._core', 'vring_serial.cli.serve'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert all(f"  {name}  " in shown for name in COMMANDS)
    assert shown.endswith("0\n[]\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: vring {name} [OPTIONS]" in result.stdout


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("vring 0.")


def test_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "vring_serial", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert shown.stdout.startswith("vring 0.")


KNOWN = ", ".join(sorted(COMMANDS))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("serv",),
            f"vring: No such command 'serv'; did you mean serve? known: {KNOWN} (see vring --help)",
        ),
        (("zzz",), f"vring: No such command 'zzz'; known: {KNOWN} (see vring --help)"),
        (("--bad",), "vring: No such option '--bad'. (see vring --help)"),
    ],
)
def test_usage_errors_are_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (2, line + "\n")


# --- what a command raises


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A list: the command ``serve`` raises its one element."""
    errors: list[BaseException] = []

    @click.command()
    def fail() -> None:
        raise errors[0]

    monkeypatch.setitem(sys.modules, "vring_serial.cli.failing", SimpleNamespace(fail=fail))
    monkeypatch.setitem(COMMANDS, "serve", LazyCommand("failing", "fail", "Fail."))
    return errors


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("no such key", "--port x"), 2, "vring: --port x: no such key"),
        (ResourceError("/x: exists"), 1, "vring: /x: exists"),
        (DependencyError("install x"), 1, "vring: install x"),
        (VringError("broken"), 1, "vring: broken"),
        (OSError(13, "Permission denied", "/x"), 1, "vring: [Errno 13] Permission denied: '/x'"),
        (ConfigError("two\nlines"), 2, "vring: two lines"),
        (
            ZeroDivisionError("oops"),
            1,
            "vring: internal error: ZeroDivisionError: oops (vring --debug shows where)",
        ),
    ],
)
def test_errors_are_one_line(
    failing: list[BaseException], error: BaseException, status: int, line: str
) -> None:
    failing.append(error)
    result = run("serve")
    assert (result.exit_code, result.stderr, result.stdout) == (status, line + "\n", "")


def test_a_reader_that_left_is_nobody_to_tell(failing: list[BaseException]) -> None:
    failing.append(BrokenPipeError())
    result = run("serve")
    assert (result.exit_code, result.stderr) == (1, "")


def test_interrupted(failing: list[BaseException]) -> None:
    failing.append(KeyboardInterrupt())
    assert run("serve").exit_code == 130


def test_the_traceback_is_for_those_who_ask(failing: list[BaseException]) -> None:
    failing.append(ConfigError("wrong"))
    result = run("--debug", "serve")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.endswith("\nvring: wrong\n")


def test_no_traceback_in_the_terminal() -> None:
    """The whole way, in a process: an error of the command's own."""
    shown = subprocess.run(
        [sys.executable, "-m", "vring_serial", "serve", "--vhost-user", "x", "--domain", "/none"],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert shown.returncode == 1
    assert shown.stderr == "vring: /none: No such file or directory\n"
