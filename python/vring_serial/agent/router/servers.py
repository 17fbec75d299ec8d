"""SPICE servers as clients of a router: connected while the agent is there, and only then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from vring_serial.agent.channel.link import AgentLink
from vring_serial.agent.router.client import RouterClient
from vring_serial.ratelimit import RateLimitedLog

SERVER_RETRY = 1.0
"""Seconds until a SPICE server that dropped the agent, or could not be connected, gets it again."""


class ServerConnections:
    """Connects SPICE servers whenever there is an agent.

    Args:
        connect: makes a server a client of the router; raises OSError if that cannot be.
        log: for why a server is not connected.
    """

    def __init__(
        self,
        connect: Callable[[asyncio.Protocol], Awaitable[RouterClient]],
        log: RateLimitedLog,
    ) -> None:
        self._connect = connect
        self._log = log
        self._tasks: list[asyncio.Task[None]] = []
        self._agent: AgentLink | None = None
        self._agent_there = asyncio.Event()

    def agent_came(self, link: AgentLink) -> None:
        """Connect the servers."""
        self._agent = link
        self._agent_there.set()

    def agent_left(self) -> None:
        """Connect no server until there is an agent again."""
        self._agent = None
        self._agent_there.clear()

    def add(self, device: asyncio.Protocol, closed: asyncio.Event) -> None:
        """Keep a server connected; ``closed`` is set when its end of a connection is lost."""
        self._tasks.append(asyncio.ensure_future(self._keep_connected(device, closed)))

    async def _keep_connected(self, device: asyncio.Protocol, closed: asyncio.Event) -> None:
        failed = ""
        while True:
            await self._agent_there.wait()
            agent = self._agent
            closed.clear()
            try:
                client = await self._connect(device)
            except OSError as error:  # no descriptor is left, most likely
                if (why := error.strerror or str(error)) != failed:
                    failed = why
                    self._log.warning("the SPICE server cannot be connected to the agent: %s", why)
                await asyncio.sleep(SERVER_RETRY)
                continue
            failed = ""
            await client.gone.wait()
            await closed.wait()
            if self._agent is agent:
                await asyncio.sleep(SERVER_RETRY)

    def stop(self) -> None:
        """Connect nothing any more."""
        for task in self._tasks:
            task.cancel()

    async def wait_stopped(self) -> None:
        """Wait, after :meth:`stop`, until nothing runs any more."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
