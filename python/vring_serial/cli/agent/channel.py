"""The connection of a command to an agent channel, and the exit statuses of what may go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import click

from vring_serial.agent.errors import (
    AgentError,
    AgentGoneError,
    AgentRefusedError,
    AgentTimeoutError,
    AgentUnsupportedError,
    ClipboardEmptyError,
    FileRefusedError,
)
from vring_serial.agent.events import AgentGone, EventStream
from vring_serial.agent.host import HostAgent
from vring_serial.agent.host_capabilities import HOST_CAPABILITIES
from vring_serial.cli import (
    STATUS_ERROR,
    STATUS_NO_SERVER,
    STATUS_NOT_FOUND,
    STATUS_REFUSED,
    STATUS_TIMED_OUT,
    StatusError,
)
from vring_serial.cli.signals import run_until_signal
from vring_serial.errors import ConfigError
from vring_serial.proto.agent import Capabilities

Work = Callable[[HostAgent], Coroutine[Any, Any, None]]

_STATUSES: tuple[tuple[type[AgentError], int], ...] = (
    (AgentGoneError, STATUS_NO_SERVER),
    (AgentTimeoutError, STATUS_TIMED_OUT),
    (AgentUnsupportedError, STATUS_NOT_FOUND),
    (ClipboardEmptyError, STATUS_NOT_FOUND),
    (AgentRefusedError, STATUS_REFUSED),
    (FileRefusedError, STATUS_REFUSED),
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one value a line.")


def status_for(error: AgentError) -> int:
    """Return the exit status that says what an agent failed with."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), STATUS_ERROR)


def print_json(value: object) -> None:
    """Print a JSON value on a line of its own."""
    click.echo(json.dumps(value))


@contextlib.contextmanager
def told_by_status() -> Iterator[None]:
    """Raise StatusError for an AgentError in the block."""
    try:
        yield
    except AgentError as error:
        raise StatusError(str(error), status_for(error)) from error


class Shared(Protocol):
    """A connection that several commands use, one after another."""

    def run(self, work: Work, capabilities: Capabilities) -> None:
        """Do ``work`` with the agent; an interrupt cancels it first, and is raised then."""


@dataclass(frozen=True, slots=True)
class Channel:
    """How to reach the agent.

    Attributes:
        address: address of the socket, as given to ``--socket``; "" if none was given.
        timeout: time limit for an answer, in seconds.
        as_json: commands print JSON, as if each had ``--json``.
        shared: the connection of a shell; None: each command makes its own.
    """

    address: str
    timeout: float
    as_json: bool = False
    shared: Shared | None = None

    def check(self) -> None:
        """Raise UsageError if there is no address."""
        if not self.address:
            raise click.UsageError(
                "Missing option '--socket' (or the variable VRING_AGENT_SOCKET).",
                click.get_current_context(silent=True),
            )

    async def open(self, factory: Callable[[], asyncio.BaseProtocol]) -> asyncio.Transport:
        """Connect a protocol and return its transport.

        Raises ConfigError for an invalid address, StatusError if it cannot connect.
        """
        loop = asyncio.get_running_loop()
        host, colon, port = self.address.rpartition(":")
        try:
            if colon and "/" not in self.address:
                if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
                    raise ConfigError(f"{port!r} is no TCP port", f"--socket {self.address}")
                there = host.strip("[]") or "localhost"
                transport, _ = await loop.create_connection(factory, there, int(port))
            else:
                transport, _ = await loop.create_unix_connection(factory, self.address)
        except OSError as error:
            text = f"--socket {self.address}: {error.strerror or error}"
            raise StatusError(text, STATUS_NO_SERVER) from None
        return transport

    @contextlib.asynccontextmanager
    async def agent(self, capabilities: Capabilities) -> AsyncIterator[HostAgent]:
        """Connect with our ``capabilities``, and yield the agent when it has announced its own.

        Raises AgentTimeoutError if it does not, AgentGoneError if the channel is closed before.
        """
        agent = HostAgent(timeout=self.timeout, capabilities=capabilities)
        transport = None
        try:
            transport = await self.connect(agent)
            yield agent
        finally:
            await agent.aclose()
            if transport is not None:
                await abort(transport)

    async def connect(self, agent: HostAgent) -> asyncio.Transport:
        """Connect ``agent``, wait until the guest's has announced itself, return the transport.

        Raises as :meth:`agent`.
        """
        with agent.events() as events:
            transport = await self.open(agent.protocol_factory)
            try:
                await self.wait_ready(agent, events)
            except BaseException:
                await abort(transport)
                raise
        return transport

    async def wait_ready(self, agent: HostAgent, events: EventStream) -> None:
        """Wait for the agent's announcement or the end of the connection, which ``events`` tell.

        Raises as :meth:`agent`.

        HostAgent would then wait for another connection, which a command does not make.
        """
        ready = asyncio.ensure_future(agent.wait_ready())
        closed = asyncio.ensure_future(_closed(events))
        try:
            await asyncio.wait((ready, closed), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise AgentGoneError(
                    f"--socket {self.address}: the connection was closed before an agent answered"
                    f"{closed.result()}"
                )
            try:
                ready.result()
            except AgentError as error:
                raise type(error)(f"--socket {self.address}: {error}") from None
        finally:
            ready.cancel()
            closed.cancel()
            await asyncio.gather(ready, closed, return_exceptions=True)

    def run(self, work: Work, *, capabilities: Capabilities = HOST_CAPABILITIES) -> None:
        """Do ``work`` with the agent. A first SIGINT or SIGTERM cancels it and ends the command.

        Raises StatusError for what the agent fails with.
        """
        self.check()

        async def on_agent() -> None:
            async with self.agent(capabilities) as agent:
                await work(agent)

        with told_by_status():
            if self.shared is not None:
                self.shared.run(work, capabilities)
            else:
                run_until_signal(on_agent)


async def abort(transport: asyncio.Transport) -> None:
    """Close a connection now: of a cancelled transfer something may wait that nobody reads."""
    transport.abort()
    await asyncio.sleep(0)


async def _closed(events: EventStream) -> str:
    """Wait for the end of the connection; return ": reason", or "" if it has none."""
    async for event in events:
        match event:
            case AgentGone(reason, closed=True):
                return f": {reason}" if reason else ""
    return ""
