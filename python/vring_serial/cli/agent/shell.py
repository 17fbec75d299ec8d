"""``vring agent shell``: many commands over one connection, typed or from a script."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
import sys
from collections.abc import Iterator
from typing import BinaryIO

import click

from vring_serial.cli import PATH, STATUS_INTERRUPTED, status_of
from vring_serial.cli.agent.channel import Channel, json_option, told_by_status
from vring_serial.cli.agent.clipboard import clipboard_group
from vring_serial.cli.agent.conversation import Conversation
from vring_serial.cli.agent.files import send_command
from vring_serial.cli.agent.screen import caps_command, resize_command
from vring_serial.config.words import suggest
from vring_serial.errors import ConfigError

PROMPT = "vring agent> "
#: Bytes of a line of a script; no sane one is longer.
MAX_LINE = 1 << 20


class _Leave(BaseException):
    """The command ``exit``: no error, so that nobody tells it."""


@click.command("exit")
def exit_command() -> None:
    """End the shell."""
    raise _Leave


@click.command("help")
@click.pass_context
def help_command(ctx: click.Context) -> None:
    """List the commands; COMMAND --help tells more of one."""
    assert ctx.parent is not None
    click.echo(ctx.parent.get_help())


class Commands(click.Group):
    """What can be typed."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; for an unknown name, fail with the closest known one."""
        if args[0] == "monitor":
            ctx.fail("monitor has a connection of its own: run it outside the shell")
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}; {suggest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


COMMANDS = Commands(
    "shell",
    commands=[
        caps_command,
        resize_command,
        clipboard_group,
        send_command,
        help_command,
        exit_command,
    ],
    help="Commands of the shell; Ctrl-D ends it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@click.command("shell")
@click.option(
    "--script",
    type=PATH,
    metavar="FILE",
    help="Take commands from a file; - is standard input, as without the option if that is no "
    "terminal.",
)
@click.option("--keep-going", is_flag=True, help="Go on behind a command that failed.")
@json_option
@click.pass_context
def shell_command(ctx: click.Context, script: str | None, keep_going: bool, as_json: bool) -> None:
    """Run many commands over one connection: those of `vring agent`, but for monitor.

    On a terminal it asks for them. A script has one command a line, in the shell's quoting; lines
    that begin with # are comments. It stops at the first command that fails, whose line it names,
    and exits with that command's status; with --keep-going it goes on, and exits with the status of
    the first that failed.

    \b
      vring agent --socket /run/agent.sock shell
      printf 'resize 1920x1080\\nclipboard set --paste-once hello\\n' |
          vring agent --socket /run/agent.sock shell
    """
    channel: Channel = ctx.obj
    channel.check()
    asks = script is None and sys.stdin.isatty()
    debug = bool(ctx.find_root().params.get("debug"))
    with contextlib.ExitStack() as stack:
        # A script that cannot be read is found out before anybody is connected to.
        source = None if asks else stack.enter_context(_opened(script or "-"))
        stack.enter_context(_ended_by_signals())
        with told_by_status():
            conversation = stack.enter_context(Conversation(channel))
        shell = _Shell(
            dataclasses.replace(channel, as_json=as_json or channel.as_json, shared=conversation),
            debug,
        )
        if source is None:
            shell.ask()
        else:
            name = "standard input" if script in (None, "-") else str(script)
            status = shell.read(source, name, keep_going=keep_going)
            ctx.exit(status)


@contextlib.contextmanager
def _opened(script: str) -> Iterator[BinaryIO]:
    if script == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(script, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(error.strerror or str(error), f"--script {script}") from None
    with file:
        yield file


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and the terminal's hang-up end what is under way, as an interrupt does."""

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(STATUS_INTERRUPTED)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Shell:
    """What runs lines.

    Args:
        channel: what commands are given.
        debug: print tracebacks of errors.
    """

    def __init__(self, channel: Channel, debug: bool) -> None:
        self._channel = channel
        self._debug = debug

    def ask(self) -> None:
        """Run what is typed until Ctrl-D. What a command fails with is told, no more."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines with it, and remembers them
        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo()
                continue
            try:
                if self._run(line, "vring") == STATUS_INTERRUPTED:
                    click.echo()
            except _Leave:
                return

    def read(self, script: BinaryIO, name: str, *, keep_going: bool) -> int:
        """Run a script; return the status of the first command that failed, or 0."""
        first = 0
        number = 0
        while line := script.readline(MAX_LINE + 1):
            number += 1
            try:
                status = self._run(line, f"{name}, line {number}")
            except _Leave:
                break
            first = first or status
            if status == STATUS_INTERRUPTED or (status and not keep_going):
                break
            if len(line) > MAX_LINE:  # its rest is no command
                break
        return first

    def _run(self, line: str | bytes, where: str) -> int:
        """Run a line, tell an error, and return the status."""

        def work() -> None:
            words = _words(line)
            if words:
                with COMMANDS.make_context("", words, obj=self._channel) as context:
                    COMMANDS.invoke(context)

        return status_of(work, debug=self._debug, where=where)


def _words(line: str | bytes) -> list[str]:
    """Return the words of a line. Raises UsageError."""
    try:
        if len(line) > MAX_LINE:
            raise ValueError(f"longer than {MAX_LINE} bytes")
        text = line.decode() if isinstance(line, bytes) else line
        return [] if text.lstrip().startswith("#") else shlex.split(text)
    except UnicodeDecodeError:
        raise click.UsageError("it is no UTF-8") from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
