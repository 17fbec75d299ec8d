"""``vring agent clipboard``: get, set and watch the guest's clipboards."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import click

from vring_serial.agent.channel.clipboard import StreamSource
from vring_serial.agent.errors import AgentError, AgentGoneError, ClipboardEmptyError
from vring_serial.agent.events import AgentGone, ClipboardGrabbed, ClipboardReleased
from vring_serial.agent.host import HostAgent
from vring_serial.agent.host_capabilities import HOST_CAPABILITIES
from vring_serial.cli import PATH
from vring_serial.cli.agent.channel import Channel, json_option, print_json
from vring_serial.cli.background import in_background
from vring_serial.cli.plain import escaped
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.proto.agent import (
    FILES_FROM_GUEST,
    Buffer,
    ClipboardType,
    Selection,
    clipboard_type_name,
)
from vring_serial.proto.agent.filelist import FileList

TYPES = {
    "text": ClipboardType.UTF8_TEXT,
    "png": ClipboardType.IMAGE_PNG,
    "bmp": ClipboardType.IMAGE_BMP,
    "tiff": ClipboardType.IMAGE_TIFF,
    "jpg": ClipboardType.IMAGE_JPG,
    "files": ClipboardType.FILE_LIST,
}
NAMES: dict[int, str] = {kind: name for name, kind in TYPES.items()}
#: Maximum number of characters of a text that ``watch`` shows.
PREVIEW = 60
#: Bytes per read of a file that the guest fetches.
PIECE = 64 << 10

selection_option = click.option(
    "--selection",
    type=click.Choice([s.name.lower() for s in Selection]),
    default="clipboard",
    show_default=True,
    help="Which clipboard; primary is what X11 pastes with the middle button.",
)
type_option = click.option(
    "--type",
    "kind",
    type=click.Choice(list(TYPES)),
    default="text",
    show_default=True,
    help="What the data are.",
)


@click.group("clipboard")
def clipboard_group() -> None:
    """Get, set and watch the guest's clipboards."""


# --- get


@clipboard_group.command("get")
@selection_option
@type_option
@click.option(
    "--output",
    type=PATH,
    metavar="FILE|DIR",
    help="Where to write; for files, the directory to copy into.",
)
@click.option(
    "-0", "--null", "raw", is_flag=True, help="For files: end each with a NUL, unescaped."
)
@json_option
@click.pass_obj
def get_command(
    channel: Channel, selection: str, kind: str, output: str | None, raw: bool, as_json: bool
) -> None:
    """Print the contents of a clipboard of the guest, or write them to a file.

    For files, print their paths in the guest, or with --output copy them (agents that announce
    FILES_FROM_GUEST, such as the embedded guest's). Characters that break lines or control a
    terminal are escaped in paths, and in text on a terminal. With --json, data other than text
    are in base64.
    """
    as_json = as_json or channel.as_json
    if as_json and raw:
        raise click.UsageError("give either --json or --null")

    def tell(paths: Iterable[object]) -> None:
        if as_json:
            tell_json(paths=[str(path) for path in paths])
            return
        for path in paths:
            click.echo(f"{path}\0" if raw else escaped(str(path)), nl=not raw)

    def tell_json(**what: object) -> None:
        print_json({"selection": selection, "type": kind, **what})

    which = Selection[selection.upper()]
    on_terminal = sys.stdout.isatty() and not as_json
    if kind not in ("text", "files") and output is None and on_terminal:
        raise ConfigError(f"{kind} data are not for a terminal: name a file", "--output")

    async def work(agent: HostAgent) -> None:
        await _settle(agent, which)
        types = agent.clipboard_types(which)
        if types and TYPES[kind] not in types:
            raise ClipboardEmptyError(
                f"the {selection} clipboard holds no {kind}, only {', '.join(_names(types))}"
            )
        if kind == "text" and output is None:
            text = await agent.get_clipboard(which)
            if as_json:
                tell_json(text=text)
            elif on_terminal:
                click.echo(escaped(text, keep="\n\t"), nl=False)
            else:
                click.echo(text.encode(), nl=False)
        elif kind == "files" and output is not None:
            tell(await agent.get_files(Path(output), which))
        elif kind == "files":
            data = await agent.get_clipboard_data(ClipboardType.FILE_LIST, which)
            tell(FileList.unpack(data).paths)
        elif as_json and output is None:
            data = await agent.get_clipboard_data(TYPES[kind], which)
            tell_json(data=base64.b64encode(data).decode())
        else:
            size = 0
            stream = agent.stream_clipboard(TYPES[kind], which)
            async with contextlib.aclosing(stream):
                with _output(output) as file:
                    async for piece in stream:
                        size += file.write(piece)
            if as_json:
                tell_json(output=output, bytes=size)

    copied = kind == "files" and output is not None
    channel.run(
        work,
        # An agent sends files to any client that asks for their list and says so.
        capabilities=HOST_CAPABILITIES.with_(FILES_FROM_GUEST) if copied else HOST_CAPABILITIES,
    )


async def _settle(agent: HostAgent, selection: int) -> None:
    """Wait briefly for the clipboards, which an agent announces soon after its capabilities."""
    with contextlib.suppress(AgentError):
        await agent.wait_clipboard(selection, timeout=1.0)


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        # The contents may be a password.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            yield file
    except AgentError:
        raise
    except OSError as error:
        raise ResourceError(f"--output {path}: {error.strerror}") from None


# --- set


@clipboard_group.command("set")
@click.argument("text", required=False)
@selection_option
@type_option
@click.option(
    "--file", "path", type=PATH, metavar="FILE", help="Take the data from a file; - is stdin."
)
@click.option("--paste-once", is_flag=True, help="End when it has been pasted once.")
@click.option(
    "--background", is_flag=True, help="Return when the guest knows of it, and go on behind."
)
@json_option
@click.pass_obj
def set_command(
    channel: Channel,
    text: str | None,
    selection: str,
    kind: str,
    path: str | None,
    paste_once: bool,
    background: bool,
    as_json: bool,
) -> None:
    """Put TEXT, or a file's contents, on a clipboard of the guest.

    The guest fetches the data when a user pastes, so the command runs until a program in the guest
    takes the clipboard, or until it is interrupted. In a shell, --background goes on until the
    shell ends.
    """
    if (text is None) == (path is None):
        raise click.UsageError("give either TEXT or --file")
    if kind == "files":
        raise click.UsageError("files go to the guest with `vring agent send`")
    if path == "-" and channel.shared is not None:
        raise click.UsageError("--file -: the shell itself reads standard input")
    which = Selection[selection.upper()]
    as_json = as_json or channel.as_json
    pasted = asyncio.Event()
    source = _source(text, path, pasted)
    channel.check()
    left = in_background() if background and channel.shared is None else None

    def tell(what: str) -> None:
        if as_json:
            print_json({"event": what, "selection": selection, "type": kind, "bytes": source.size})

    async def work(agent: HostAgent) -> None:
        with agent.events() as events:
            await agent.set_clipboard({TYPES[kind]: source}, which)
            tell("offered")
            if background and left is None:
                return
            if left is not None:
                left()
            elif sys.stderr.isatty():
                click.echo(
                    f"until something in the guest takes the {selection}, or Ctrl-C", err=True
                )
            taken = asyncio.ensure_future(_taken(events, which))
            waiting = [taken]
            if paste_once:
                waiting.append(asyncio.ensure_future(_sent(pasted)))
            try:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                tell("taken" if taken in done else "pasted")
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
                if channel.shared is not None:  # where it does not end with the connection
                    with contextlib.suppress(AgentError):
                        await agent.clear_clipboard(which)

    channel.run(work)


def _source(text: str | None, path: str | None, pasted: asyncio.Event) -> StreamSource:
    """Return the source of the data, read when the guest fetches them; files are not cached."""
    if text is not None or path == "-":
        data = text.encode() if text is not None else sys.stdin.buffer.read()

        async def from_memory() -> AsyncIterator[Buffer]:
            yield data
            pasted.set()

        return StreamSource(len(data), from_memory)
    assert path is not None
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ConfigError(str(error.strerror), f"--file {path}") from None

    async def from_file() -> AsyncIterator[Buffer]:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                yield piece
        pasted.set()

    return StreamSource(size, from_file)


async def _taken(events: AsyncIterator[object], selection: int) -> None:
    """Return when the guest takes the clipboard. Raises AgentGoneError when the agent leaves."""
    async for event in events:
        match event:
            case ClipboardGrabbed(taken, _) if taken == selection:
                return
            case AgentGone(reason, closed=True):
                raise AgentGoneError(f"the agent went away{f': {reason}' if reason else ''}")


async def _sent(pasted: asyncio.Event) -> None:
    """Return when the data were pasted and their last bytes had time to be sent."""
    await pasted.wait()
    await asyncio.sleep(0.2)


# --- watch


@clipboard_group.command("watch")
@selection_option
@json_option
@click.pass_obj
def watch_command(channel: Channel, selection: str, as_json: bool) -> None:
    """Print each change of a clipboard of the guest, until interrupted."""
    which = Selection[selection.upper()]
    as_json = as_json or channel.as_json

    async def work(agent: HostAgent) -> None:
        with agent.events() as events:
            if types := agent.clipboard_types(which):
                await _tell(agent, which, types, as_json)
            async for event in events:
                match event:
                    case ClipboardGrabbed(changed, types) if changed == which:
                        await _tell(agent, which, types, as_json)
                    case ClipboardReleased(changed) if changed == which:
                        await _tell(agent, which, (), as_json)
                    case AgentGone(reason, closed=True):
                        because = f": {reason}" if reason else ""
                        raise AgentGoneError(f"the agent went away{because}")

    channel.run(work)


def _names(types: tuple[int, ...]) -> list[str]:
    """Return the names of types in ``--type``, or the protocol's names of others."""
    return [NAMES.get(number, clipboard_type_name(number)) for number in types]


async def _tell(
    agent: HostAgent, selection: Selection, types: tuple[int, ...], as_json: bool
) -> None:
    names = _names(types)
    text: str | None = None
    if ClipboardType.UTF8_TEXT in types:
        # The contents may be gone by the time they are fetched.
        with contextlib.suppress(AgentError):
            text = await agent.get_clipboard(selection)
    if as_json:
        print_json({"selection": selection.name.lower(), "types": names, "text": text})
        return
    shown = "" if text is None else f": {text[:PREVIEW]!r}{'…' * (len(text) > PREVIEW)}"
    click.echo(f"{selection.name.lower()}: {', '.join(names) or 'nothing'}{shown}")
