"""One connection to an agent for many commands, kept alive by a thread between them.

A guest pastes what it was offered, and an agent that is not read is sent away, also while a person
thinks at a prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import click

from vring_serial.agent.host import HostAgent
from vring_serial.agent.host_capabilities import HOST_CAPABILITIES
from vring_serial.cli.agent.channel import Channel, Work, abort
from vring_serial.proto.agent import Capabilities


class Conversation:
    """The connection of a shell, to be used inside ``with``, from the main thread.

    Args:
        channel: where the agent is.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._loop = asyncio.new_event_loop()
        # A daemon: who interrupts the closing as well need not wait for it.
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._agent: HostAgent | None = None
        self._transport: asyncio.Transport | None = None

    def __enter__(self) -> Self:
        """Connect. Raises as :meth:`Channel.agent`."""
        self._thread.start()
        try:
            self._do(self._begin)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        self._close()

    def run(self, work: Work, capabilities: Capabilities) -> None:
        """Do ``work`` with the agent, once it is there; connect again if the channel was closed.

        An exception of a signal's handler, such as KeyboardInterrupt, cancels it first. Work that
        needs to announce other capabilities gets a connection of its own.

        Raises AgentError, and what ``work`` raises.
        """
        self._do(lambda: self._on_agent(work, capabilities))

    async def _begin(self) -> None:
        self._agent = HostAgent(timeout=self._channel.timeout, capabilities=HOST_CAPABILITIES)
        self._transport = await self._channel.connect(self._agent)

    async def _on_agent(self, work: Work, capabilities: Capabilities) -> None:
        if capabilities != HOST_CAPABILITIES:
            async with self._channel.agent(capabilities) as other:
                await work(other)
            return
        agent = self._agent
        assert agent is not None
        if agent.link is None:
            self._transport = await self._channel.connect(agent)
            click.echo("the channel was closed: connected again", err=True)
        else:
            with agent.events() as events:
                await self._channel.wait_ready(agent, events)
        await work(agent)

    def _do(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do ``work()`` in the loop's thread, and wait for its end."""
        ended = threading.Event()
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work()))
            tasks[0].add_done_callback(lambda _: ended.set())

        self._loop.call_soon_threadsafe(begin)
        try:
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            ended.wait()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                tasks[0].result()
            raise
        tasks[0].result()

    def _close(self) -> None:
        self._do(self._end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        if self._agent is not None:
            await self._agent.aclose()
        if self._transport is not None:
            await abort(self._transport)
