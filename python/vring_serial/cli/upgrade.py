"""``vring upgrade``: a running service gets the code that is installed now."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import click

from vring_serial.cli import PATH
from vring_serial.errors import ResourceError
from vring_serial.service.succession import Report, find_report, read_report

#: Seconds from one look at what the keeper says to the next.
_PERIOD = 0.02


@click.command("upgrade")
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option(
    "--pid-file", type=PATH, metavar="FILE", help="The file that `vring serve` has its id in."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the end of the upgrade.",
)
def upgrade_command(pid: int | None, pid_file: str | None, timeout: float) -> None:
    """Replace the code of a running `vring serve` by the version that is installed now.

    Guests, frontends and clients notice a pause of milliseconds. A version that does not start
    leaves the one before as it is.

    \b
      vring upgrade --pid-file /run/vring.pid
      vring upgrade 1234
    """
    if (pid is None) == (pid_file is None):
        raise click.UsageError("Give either a process id or --pid-file.")
    if pid is None:
        assert pid_file is not None
        pid = _read_pid(pid_file)
    fd = find_report(pid)
    try:
        report = _upgrade(pid, fd, timeout)
    finally:
        os.close(fd)
    if not report.succeeded:
        raise ResourceError(report.text)
    click.echo(report.text)


def _read_pid(path: str) -> int:
    try:
        text = Path(path).read_text().strip()
    except OSError as error:
        raise ResourceError(f"--pid-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    if not text.isdecimal():
        raise ResourceError(f"--pid-file {path}: holds no process id")
    return int(text)


def _upgrade(pid: int, fd: int, timeout: float) -> Report:
    """Have it upgraded; return what it says afterwards."""
    before = _read(fd)
    if before.upgrading:
        raise ResourceError(f"process {pid} is being upgraded already")
    keeper = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(keeper, signal.SIGUSR2)
        poll = select.poll()
        poll.register(keeper, select.POLLIN)
        end = time.monotonic() + timeout
        while (report := _read(fd)).upgrades == before.upgrades:
            if poll.poll(_PERIOD * 1000):
                raise ResourceError(f"process {pid} has ended")
            if time.monotonic() > end:
                raise ResourceError(f"process {pid} was not upgraded within {timeout:g} s")
        return report
    except PermissionError as error:
        raise ResourceError(f"process {pid}: {error.strerror}") from None
    finally:
        os.close(keeper)


def _read(fd: int) -> Report:
    while (report := read_report(fd)) is None:
        time.sleep(_PERIOD)
    return report
