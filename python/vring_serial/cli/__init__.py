"""The command ``vring``: commands are imported when they run, errors are handled in one place."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from vring.errors import Error
from vring_serial.cli import limits
from vring_serial.cli.plain import escaped
from vring_serial.errors import ConfigError, VringSerialError

#: Exit statuses: invalid input of the user, and all other errors.
STATUS_USAGE = 2
STATUS_ERROR = 1
#: Of `vring ctl`, `attach` and `agent`: nobody is there or goes on, there is no such thing, the
#: other side refused, it did not answer in time.
STATUS_NO_SERVER = 3
STATUS_NOT_FOUND = 4
STATUS_REFUSED = 5
STATUS_TIMED_OUT = 6
#: Set by a shell that wants to complete a line, or the function for that: click's name for us.
COMPLETE = "_VRING_COMPLETE"
#: The shell's status of a command ended by SIGINT.
STATUS_INTERRUPTED = 130


class StatusError(VringSerialError):
    """A failure that scripts can tell from others.

    Attributes:
        status: the command's exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def interrupts_end_at_once() -> Iterator[None]:
    """Let SIGINT end the process silently within the block.

    For imports: a KeyboardInterrupt during one may turn into any other error, or be lost.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A command that is imported when it runs; its help line is here so that ``--help`` is fast.

    Attributes:
        module: name of its module in `vring_serial.cli`.
        attribute: name of the click command in that module.
        help: its line in ``vring --help``.
    """

    module: str
    attribute: str
    help: str


COMMANDS = {
    "serve": LazyCommand("serve", "serve_command", "Serve virtio-serial devices to guests."),
    "vhost-user": LazyCommand(
        "vhost_user", "vhost_user_command", "Serve a device as a vhost-user back-end of QEMU's."
    ),
    "upgrade": LazyCommand("upgrade", "upgrade_command", "Give a running service new code."),
    "config": LazyCommand("config", "config_command", "Check and write files of serve --config."),
    "libvirt": LazyCommand("libvirt", "libvirt_command", "Give a libvirt domain's ports to vring."),
    "guest": LazyCommand("guest", "guest_command", "Run the embedded guest against a device."),
    "bench": LazyCommand("bench", "bench_command", "Measure ports: throughput, latency, rings."),
    "agent": LazyCommand("agent", "agent_command", "Talk to the SPICE agent of a guest."),
    "ctl": LazyCommand("ctl", "ctl_command", "Look at a running service and change it."),
    "attach": LazyCommand("attach", "attach_command", "Watch a console, and type to it."),
    "demo": LazyCommand("demo", "demo_command", "Show the whole agent path at work."),
}


class CommandGroup(click.Group):
    """The group ``vring``. Every error of a command becomes one line on standard error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        limits.prepare()
        with interrupts_end_at_once():
            module = importlib.import_module(f"{__name__}.{lazy.module}")
        command = getattr(module, lazy.attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; for an unknown name, fail with the closest known one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from vring_serial.config.words import suggest

            ctx.fail(f"No such command {name!r}; {suggest(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run and exit: 0 for success, 2 for invalid input, 1 for any other error."""
        arguments = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in arguments[: _command_position(arguments)]
        extra["standalone_mode"] = False
        run = super().main
        if COMPLETE in os.environ:
            from vring_serial.cli.completion import shells

            shells.install()
        sys.exit(status_of(lambda: run(arguments, prog_name or "vring", **extra), debug=debug))


def status_of(work: Callable[[], object], *, debug: bool = False, where: str = "") -> int:
    """Do ``work``; print an error to standard error; return the exit status.

    Args:
        work: returns the status, or anything else for 0.
        debug: also print the traceback of an error.
        where: what an error begins with, instead of the command's name.
    """
    try:
        status = work()
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except click.ClickException as error:
        _show(error, where)
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = STATUS_INTERRUPTED
    except Exception as error:
        if debug:
            _say(traceback.format_exc().rstrip())
        status = _report(error, where or "vring")
    return status if isinstance(status, int) else 0


class PathName(click.ParamType[str]):
    """A path that is not empty: an empty one is probably an unset variable of a script."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("it is empty", param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete files, in the same way for every shell."""
        from vring_serial.cli.completion.words import complete_path

        return [CompletionItem(path) for path in complete_path(incomplete)]


PATH = PathName()


def _have_standard_descriptors() -> None:
    """Open closed standard descriptors, or the next file opened would be read or printed to."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        os.set_inheritable(fd, True)
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        # Print a message even if the encoding lacks a character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _command_position(arguments: Sequence[str]) -> int:
    """Return the index of the command's name; options before it belong to the group."""
    return next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))


def _show(error: click.ClickException, where: str) -> None:
    """Print a usage error as one line; for a group without a command, print its help."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if where:
        helpless = isinstance(error, click.exceptions.NoArgsIsHelpError)
        text = "Missing command." if helpless else " ".join(error.format_message().split())
        _say(f"{where}: {escaped(text)}")
        return
    if context is None or isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    text = " ".join(error.format_message().split())
    _say(f"{context.command_path}: {text} (see {context.command_path} --help)")


def _report(error: Exception, where: str) -> int:
    """Print one line about ``error`` to standard error; return the exit status."""
    if isinstance(error, BrokenPipeError):  # whoever read our output has gone: nobody to tell
        return STATUS_ERROR
    expected = isinstance(error, (Error, OSError))
    text = escaped(" ".join(str(error).split())) or type(error).__name__
    if (exhausted := limits.exhausted(error)) is not None:
        text = exhausted
    elif not expected:
        text = f"internal error: {type(error).__name__}: {text} (vring --debug shows where)"
    _say(f"{where}: {text}")
    if isinstance(error, StatusError):
        return error.status
    return STATUS_USAGE if isinstance(error, ConfigError) else STATUS_ERROR


def _say(text: str) -> None:
    """Print to standard error, after the log's lines if the command logs."""
    logs = sys.modules.get(f"{__name__}.logs")
    if logs is None:
        click.echo(text, err=True)
    else:
        logs.say(text)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"vring {version('vring')}")
        ctx.exit()


@click.command("vring", cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def vring(debug: bool) -> None:
    """A multiport virtio-serial device outside the emulator, and the SPICE agent channel on it."""  # noqa: D401


def main() -> NoReturn:
    """Run the command ``vring`` and exit. A KeyboardInterrupt exits with STATUS_INTERRUPTED."""
    _have_standard_descriptors()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the process began
            signal.signal(signal.SIGINT, signal.default_int_handler)
        vring.main()
    except KeyboardInterrupt:  # while another error was told
        sys.exit(STATUS_INTERRUPTED)
    finally:
        # Nothing is left to be put in order, and the interpreter would tell where it was.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
