"""One connection to an agent channel for the length of a command."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import click

from vring_serial.agent.errors import AgentError, AgentGoneError
from vring_serial.agent.events import AgentGone, EventStream
from vring_serial.agent.host import HostAgent
from vring_serial.agent.host_capabilities import HOST_CAPABILITIES
from vring_serial.cli.signals import run_until_signal
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.proto.agent import Capabilities


@dataclass(frozen=True, slots=True)
class Channel:
    """How to reach the agent.

    Attributes:
        address: address of the socket, as given to ``--socket``; "" if none was given.
        timeout: time limit for an answer, in seconds.
    """

    address: str
    timeout: float

    def check(self) -> None:
        """Raise UsageError if there is no address."""
        if not self.address:
            raise click.UsageError(
                "Missing option '--socket' (or the variable VRING_AGENT_SOCKET).",
                click.get_current_context(silent=True),
            )

    async def open(self, factory: Callable[[], asyncio.BaseProtocol]) -> asyncio.Transport:
        """Connect a protocol and return its transport.

        Raises ConfigError for an invalid address, ResourceError if it cannot connect.
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
            raise ResourceError(f"--socket {self.address}: {error.strerror or error}") from None
        return transport

    @contextlib.asynccontextmanager
    async def agent(self, capabilities: Capabilities) -> AsyncIterator[HostAgent]:
        """Connect with our ``capabilities``, and yield the agent when it has announced its own.

        Raises AgentTimeoutError if it does not, AgentGoneError if the channel is closed before.
        """
        agent = HostAgent(timeout=self.timeout, capabilities=capabilities)
        transport = None
        try:
            with agent.events() as events:
                transport = await self.open(agent.protocol_factory)
                await self._wait_ready(agent, events)
            yield agent
        finally:
            await agent.aclose()
            if transport is not None:
                transport.abort()  # of a cancelled transfer something may wait that nobody reads
                await asyncio.sleep(0)

    async def _wait_ready(self, agent: HostAgent, events: EventStream) -> None:
        """Wait for the agent's announcement or the end of the connection.

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

    def run(
        self,
        work: Callable[[HostAgent], Coroutine[Any, Any, None]],
        *,
        capabilities: Capabilities = HOST_CAPABILITIES,
    ) -> None:
        """Do ``work`` with the agent. A first SIGINT or SIGTERM cancels it and ends the command."""

        self.check()

        async def on_agent() -> None:
            async with self.agent(capabilities) as agent:
                await work(agent)

        run_until_signal(on_agent)


async def _closed(events: EventStream) -> str:
    """Wait for the end of the connection; return ": reason", or "" if it has none."""
    async for event in events:
        match event:
            case AgentGone(reason, closed=True):
                return f": {reason}" if reason else ""
    return ""
