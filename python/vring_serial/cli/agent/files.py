"""``vring agent send``: send files to the guest, with progress bars."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vring_serial.agent.errors import AgentError
from vring_serial.agent.host import HostAgent
from vring_serial.cli import STATUS_ERROR, StatusError
from vring_serial.cli.agent.channel import Channel, json_option, print_json, status_for
from vring_serial.cli.completion.words import complete_files
from vring_serial.cli.plain import escaped
from vring_serial.errors import ConfigError

#: Maximum number of concurrent transfers; the Linux agent accepts 128.
AT_ONCE = 16


@click.command("send")
@click.argument("paths", metavar="FILE...", nargs=-1, required=True, shell_complete=complete_files)
@click.option("--quiet", is_flag=True, help="No progress bars.")
@json_option
@click.pass_obj
def send_command(channel: Channel, paths: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Put files into the guest's download directory.

    Several files are sent at once. Interrupting the command cancels unfinished files in the guest.
    """
    files = [_checked(path) for path in paths]
    as_json = as_json or channel.as_json
    failed: list[StatusError] = []
    cancelled: list[bool] = []

    async def work(agent: HostAgent) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=quiet or as_json) as progress:
            slots = asyncio.Semaphore(AT_ONCE)
            try:
                async with asyncio.TaskGroup() as group:
                    for file in files:
                        group.create_task(_send(agent, file, progress, slots, failed, as_json))
            except asyncio.CancelledError:
                progress.live.transient = True  # no bars once more
                cancelled.append(True)
                raise

    try:
        channel.run(work)
    finally:
        if cancelled:
            click.echo("cancelled", err=True)
    if failed:
        statuses = {error.status for error in failed}
        raise StatusError(
            "; ".join(map(str, failed)), statuses.pop() if len(statuses) == 1 else STATUS_ERROR
        )


def _checked(path: str) -> Path:
    """Return the path of a file that can be sent; raise ConfigError with the reason otherwise."""
    file = Path(path)
    try:
        if file.is_dir():
            raise ConfigError("is a directory: send its files, or an archive of it", path)
        if not file.is_file():
            file.stat()
            raise ConfigError("is no regular file, whose size is known", path)  # and may not end
        with file.open("rb"):
            return file
    except OSError as error:
        raise ConfigError(error.strerror or str(error), path) from None


async def _send(
    agent: HostAgent,
    file: Path,
    progress: Progress,
    slots: asyncio.Semaphore,
    failed: list[StatusError],
    as_json: bool,
) -> None:
    """Send one file; its failure does not stop the others."""
    name = escape(escaped(file.name))
    task: TaskID = progress.add_task(name, total=None)
    try:
        async with slots:
            await agent.send_file(
                file,
                on_progress=lambda sent, size: progress.update(task, completed=sent, total=size),
            )
    except AgentError as error:
        progress.update(task, description=f"[red]{name}[/]")
        text = str(error)
        status = status_for(error)
        failed.append(
            StatusError(text if text.startswith(f"{file}:") else f"{file}: {text}", status)
        )
        if as_json:
            print_json({"file": str(file), "sent": False, "status": status, "error": text})
    else:
        if as_json:
            print_json({"file": str(file), "sent": True})
