"""The monitor's sockets and connections: many clients, each of which may be hostile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

from vring_serial.lifetime import Ending
from vring_serial.proto.qmp import (
    Negotiation,
    QmpError,
    Request,
    RequestParser,
    error_reply,
    event,
    greeting,
    reply,
)
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.service.qmp.monitor import Monitor

log = logging.getLogger(__name__)

#: Clients of one socket at a time.
CLIENTS_MAX = 32
#: Bytes of replies and events that a client may leave unread.
UNREAD_MAX = 4 << 20
#: Seconds that one has to read a reply, before it is sent away.
READ_SECONDS = 30.0
READ_BYTES = 64 << 10


class QmpServer(Ending):
    """Serves one monitor on a listening socket.

    Args:
        monitor: carries out the commands.
        sock: listening; not closed here.
        name: for log lines.
        package: our name and version, for the greeting.
        confined: set when the process has given up what it does not need; no client is greeted, and
            nothing of what it sent is looked at, before.
    """

    def __init__(
        self,
        monitor: Monitor,
        sock: socket.socket,
        name: str,
        package: str,
        confined: asyncio.Event,
    ) -> None:
        self.monitor = monitor
        self._confined = confined
        self._sock = sock
        self._name = name
        self._greeting = greeting(package)
        self._clients: set[_Client] = set()
        self._server: asyncio.Server | None = None
        self._log = RateLimitedLog(log, burst=20, seconds=60)

    async def start(self) -> None:
        """Accept clients from now on."""
        sock = self._sock.dup()  # asyncio closes its own
        if sock.family == socket.AF_UNIX:
            self._server = await asyncio.start_unix_server(self._serve, sock=sock)
        else:
            self._server = await asyncio.start_server(self._serve, sock=sock)

    async def aclose(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        tasks = [client.task for client in self._clients]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def tell(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell all clients of an event; it is lost for one that does not read."""
        line = event(name, data, time.time_ns() // 1000)
        for client in self._clients:
            client.tell(line)

    def tell_of(self, vm: str, name: str, data: Mapping[str, Any]) -> None:
        """Tell all clients, in QMP's words, what a VM's worker tells, if the monitor has the VM."""
        monitor = self.monitor
        if not monitor.has(vm):
            return
        with contextlib.suppress(KeyError):
            if name == "port":
                id = monitor.public_name(vm, data["device"])
                self.tell("VSERPORT_CHANGE", {"id": id, "open": data["open"]})
            elif name == "deleted":
                id = monitor.public_name(vm, data["device"])
                path = f"/machine/peripheral/{id}"
                self.tell("DEVICE_DELETED", {"device": id, "path": path})
            elif name == "frontend":
                id = monitor.public_name(vm, data["controller"])
                self.tell("X_VRING_FRONTEND", {"controller": id, "state": data["state"]})
            elif name == "worker":
                told = {"vm": vm, "restarts": data["restarts"], "reason": data["reason"]}
                self.tell("X_VRING_WORKER", told)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        client = _Client(self.monitor, reader, writer, task)
        if len(self._clients) >= CLIENTS_MAX:
            self._log.warning("%s: a client was sent away, %d are there", self._name, CLIENTS_MAX)
            writer.close()
            return
        self._clients.add(client)
        try:
            await self._confined.wait()
            await client.serve(self._greeting)
        except TimeoutError:
            self._log.warning("%s: a client was sent away: it does not read", self._name)
        except (ConnectionError, asyncio.CancelledError):
            await self._confined.wait()
        finally:
            self._clients.discard(client)
            writer.transport.abort() if client.abandoned else writer.close()


class _Client:
    """One connection."""

    def __init__(
        self,
        monitor: Monitor,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:
        self.task = task
        self.abandoned = False
        self._monitor = monitor
        self._reader = reader
        self._writer = writer
        self._parser = RequestParser()
        self._negotiation = Negotiation()

    async def serve(self, hello: bytes) -> None:
        """Answer one request after another; read no more while one is carried out."""
        await self._write(hello)
        while data := await self._reader.read(READ_BYTES):
            for request in self._parser.feed(data):
                await self._write(await self._answer(request))

    def tell(self, line: bytes) -> None:
        unread = self._writer.transport.get_write_buffer_size()
        if self._negotiation.done and unread < UNREAD_MAX:
            self._writer.write(line)

    async def _write(self, line: bytes) -> None:
        self._writer.write(line)
        try:
            async with asyncio.timeout(READ_SECONDS):
                await self._writer.drain()
        except TimeoutError:
            self.abandoned = True
            raise

    async def _answer(self, request: Request) -> bytes:
        try:
            self._negotiation.check(request, self._monitor.commands)
            value = await self._monitor.execute(request.command, request.arguments)
        except QmpError as error:
            return error_reply(request, error)
        except Exception as error:
            log.exception("QMP: %s failed", request.command)
            return error_reply(request, QmpError(f"internal error: {error}"))
        if request.command == "qmp_capabilities":
            self._negotiation.done = True
        return reply(request, value)
