"""Metrics over HTTP, for scrapers that may be hostile: one request a connection, all bounded.

Workers are asked when somebody scrapes, and at most once in :data:`ROUND_SECONDS` however many do:
a flood of scrapes is served from few rounds, each of which began after the scrape that it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
from collections.abc import Sequence

import h11

from vring_serial.lifetime import Ending
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.service.link import CallError, CallTimeoutError
from vring_serial.service.metrics.families import OPENMETRICS, render
from vring_serial.service.metrics.readings import VmReading, read_vm
from vring_serial.service.qmp.vm import Vm

log = logging.getLogger(__name__)

#: Connections to one socket at a time.
CLIENTS_MAX = 16
#: Seconds that a client has for its request, and to read the answer.
REQUEST_SECONDS = 5.0
READ_SECONDS = 10.0
#: Seconds that it then has to hang up.
LINGER_SECONDS = 1.0
#: Seconds that a worker has to answer.
ANSWER_SECONDS = 5.0
#: Seconds between the beginnings of two rounds of questions to the workers.
ROUND_SECONDS = 0.2
#: Bytes of a request's head.
HEAD_MAX = 16 << 10
READ_BYTES = 4 << 10

PATH = "/metrics"


class Readings(Ending):
    """Asks the workers for their counters, for all servers of the process together.

    Args:
        vms: as they are at each time.
        version: ours, for the build's metric.
    """

    def __init__(self, vms: Sequence[Vm], version: str) -> None:
        self._vms = vms
        self._version = version
        self._next: asyncio.Task[Round] | None = None  # has not begun to ask
        self._rounds: set[asyncio.Task[Round]] = set()
        self._earliest = 0.0  # of the loop's clock: when it may

    async def aclose(self) -> None:
        self._next = None
        for task in self._rounds:
            task.cancel()
        await asyncio.gather(*self._rounds, return_exceptions=True)

    async def text(self, *, openmetrics: bool) -> tuple[bytes, str]:
        """Return metrics that are no older than this call, and the type of their contents."""
        if self._next is None:
            self._next = asyncio.create_task(self._ask())
            self._rounds.add(self._next)
            self._next.add_done_callback(self._rounds.discard)
        # One of those who wait may leave without harm to the others.
        return (await asyncio.shield(self._next)).text(openmetrics=openmetrics)

    async def _ask(self) -> Round:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._earliest - loop.time()))
        self._earliest = loop.time() + ROUND_SECONDS
        self._next = None  # who comes now gets what is asked after this
        return Round(await asyncio.gather(*map(_describe, self._vms)), self._version)


class Round:
    """What the workers answered at one time; the text is made once for all who asked."""

    def __init__(self, vms: Sequence[VmReading], version: str) -> None:
        self._vms = vms
        self._version = version
        self._texts: dict[bool, tuple[bytes, str]] = {}

    def text(self, *, openmetrics: bool) -> tuple[bytes, str]:
        """Return the metrics, and the type of their contents."""
        if openmetrics not in self._texts:
            self._texts[openmetrics] = render(self._vms, self._version, openmetrics=openmetrics)
        return self._texts[openmetrics]


async def _describe(vm: Vm) -> VmReading:
    try:
        answer = await vm.caller.call("describe", seconds=ANSWER_SECONDS)
    except (CallError, CallTimeoutError):
        answer = None
    return read_vm(vm.name, answer)


class MetricsServer(Ending):
    """Serves metrics on a listening socket.

    Args:
        readings: has them.
        sock: listening; not closed here.
        name: for log lines.
        confined: set when the process has given up what it does not need; nothing is read before.
    """

    def __init__(
        self, readings: Readings, sock: socket.socket, name: str, confined: asyncio.Event
    ) -> None:
        self._readings = readings
        self._sock = sock
        self._name = name
        self._confined = confined
        self._clients: set[asyncio.Task[None]] = set()
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
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= CLIENTS_MAX:
            self._log.warning("%s: a client was sent away, %d are there", self._name, CLIENTS_MAX)
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            await self._answer(reader, writer)
        except TimeoutError:
            self._log.warning("%s: a client was sent away: it is too slow", self._name)
        except (OSError, asyncio.CancelledError):
            pass
        except Exception:
            log.exception("%s: a scrape failed", self._name)
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        writer.transport.set_write_buffer_limits(0)  # drain waits until all is sent
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        headers = [("Connection", "close")]
        body, kind = b"", "text/plain; charset=utf-8"
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._confined.wait()
                request = await _request(connection, reader)
            if request is None:
                return
            status = _status(request)
        except h11.RemoteProtocolError as error:
            request, status = None, error.error_status_hint
        if status == 405:
            headers.append(("Allow", "GET, HEAD"))
        if status == 200 and request is not None:
            accepted = dict(request.headers).get(b"accept", b"").decode("latin-1")
            body, kind = await self._readings.text(openmetrics=OPENMETRICS in accepted)
        else:
            body = f"{status} {http.HTTPStatus(status).phrase}; metrics are at {PATH}\n".encode()
        headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
        reason = http.HTTPStatus(status).phrase
        answer = h11.Response(status_code=status, headers=headers, reason=reason)
        writer.write(connection.send(answer) or b"")
        if request is None or request.method != b"HEAD":
            writer.write(connection.send(h11.Data(data=body)) or b"")
        async with asyncio.timeout(READ_SECONDS):
            await writer.drain()
        writer.write_eof()
        # Closing with something unread would take the answer away from its reader.
        left = HEAD_MAX
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and (data := await reader.read(READ_BYTES)):
                    left -= len(data)


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Return the head of the request; None: the client left."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await reader.read(READ_BYTES))


def _status(request: h11.Request) -> int:
    if request.target.split(b"?")[0].decode("latin-1") != PATH:
        return 404
    return 200 if request.method in (b"GET", b"HEAD") else 405
