"""The connection of ``vring ctl`` to a monitor, and what its exit statuses say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.protocol import ConnectError
from qemu.qmp.qmp_client import ExecuteError

from vring_serial.cli import (
    STATUS_NO_SERVER,
    STATUS_NOT_FOUND,
    STATUS_REFUSED,
    STATUS_TIMED_OUT,
    StatusError,
)
from vring_serial.cli.signals import run

T = TypeVar("T")

_NOT_FOUND = ("CommandNotFound", "DeviceNotFound", "DeviceNotActive")


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the monitor is, and how its answers are shown.

    Attributes:
        address: path of a unix socket, or HOST:PORT; "" for none.
        timeout: seconds that the monitor has for one answer.
        as_json: print JSON.
    """

    address: str
    timeout: float
    as_json: bool

    def run(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Connect, and return what ``work`` returns. Raises StatusError."""
        if not self.address:
            raise click.UsageError("Missing option '--qmp', or the variable VRING_QMP.")
        return run(self._run(work))

    async def _run(self, work: Callable[[Session], Awaitable[T]]) -> T:
        client = QMPClient("vring-ctl")
        host, colon, port = self.address.rpartition(":")
        tcp = colon and port.isdecimal() and "/" not in self.address
        try:
            async with asyncio.timeout(self.timeout):
                await client.connect((host.strip("[]"), int(port)) if tcp else self.address)
        except TimeoutError:
            raise self._timed_out() from None
        except (ConnectError, OSError) as error:
            cause = error.__cause__ or error
            text = getattr(cause, "strerror", None) or str(cause)
            raise StatusError(f"no server at {self.address}: {text}", STATUS_NO_SERVER) from None
        try:
            return await work(Session(client, self))
        except (QMPError, EOFError) as error:
            text = f"the server at {self.address} has gone: {error}"
            raise StatusError(text, STATUS_NO_SERVER) from None
        finally:
            # It may have gone meanwhile, which was told above.
            await asyncio.gather(client.disconnect(), return_exceptions=True)

    def _timed_out(self) -> StatusError:
        text = f"the server at {self.address} did not answer in {self.timeout:g} s"
        return StatusError(text, STATUS_TIMED_OUT)

    async def execute(self, client: QMPClient, command: str, arguments: dict[str, Any]) -> Any:
        """Return what a command answers. Raises StatusError."""
        try:
            async with asyncio.timeout(self.timeout):
                return await client.execute(command, arguments)
        except TimeoutError:
            raise self._timed_out() from None
        except ExecuteError as error:
            status = STATUS_NOT_FOUND if error.error_class in _NOT_FOUND else STATUS_REFUSED
            raise StatusError(str(error), status) from None


@dataclass(frozen=True, slots=True)
class Session:
    """A connected monitor.

    Attributes:
        client: the connection.
        connection: how it was made.
    """

    client: QMPClient
    connection: Connection

    async def execute(self, command: str, /, **arguments: Any) -> Any:
        """Return what a command answers; ``_`` in names of arguments is ``-`` on the wire."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.connection.execute(self.client, command, named)

    async def status(self) -> list[dict[str, Any]]:
        """Return every VM; see ``x-vring-status``."""
        found: list[dict[str, Any]] = await self.execute("x-vring-status")
        return found

    async def names(self) -> dict[str, str]:
        """Return names that other commands take, each with what it is: chardev or controller."""
        vms = await self.status()
        return {
            vm["prefix"] + name: kind
            for vm in vms
            for controller in vm["controllers"]
            for name, kind in [
                (controller["id"], "controller"),
                *((port["chardev"], "chardev") for port in controller["ports"]),
            ]
        }


def complete_name(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a chardev or controller, if a server says which there are."""
    return _complete(ctx, incomplete, Session.names)


def complete_vm(
    ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a VM, if a server says which there are."""

    async def names(session: Session) -> dict[str, str]:
        return {vm["name"]: "VM" for vm in await session.status()}

    return _complete(ctx, incomplete, names)


def _complete(
    ctx: click.Context, incomplete: str, names_of: Callable[[Session], Awaitable[dict[str, str]]]
) -> list[CompletionItem]:
    names = ask(ctx, names_of)
    return [
        CompletionItem(name, help=what)
        for name, what in (names or {}).items()
        if name.startswith(incomplete)
    ]


def ask(ctx: click.Context, work: Callable[[Session], Awaitable[T]]) -> T | None:
    """Return what ``work`` returns, for whoever completes a line; None if there is no server."""
    # While it completes, click calls no function of a command: the address is where it was parsed.
    above: click.Context | None = ctx
    while above is not None and "address" not in above.params:
        above = above.parent
    address = above.params["address"] if above is not None else None
    if not address:
        return None
    try:
        return Connection(address, 1.0, False).run(work)
    except StatusError:
        return None
