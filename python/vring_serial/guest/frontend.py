"""The frontend's side of vhost-user: asks a backend to serve the guest's rings.

Only what the backend offers is negotiated: the protocol features (bit 30) and each of MQ,
LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS
and DEVICE_STATE are optional. The order of messages is that of User-Mode Linux and QEMU; a state is
moved as Cloud Hypervisor and crosvm move it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TypeVar

from vring_serial import unix_fds
from vring_serial.errors import RemoteProtocolError, ResourceError
from vring_serial.guest.channel import Channel
from vring_serial.guest.errors import (
    BackendClosedError,
    BackendError,
    BackendRefusedError,
    BackendTimeoutError,
)
from vring_serial.guest.memory import GuestRam
from vring_serial.guest.queue import DriverQueue
from vring_serial.proto import vhost_user as vu

log = logging.getLogger(__name__)

#: Seconds that a backend may take for one request.
DEFAULT_TIMEOUT = 10.0
#: Seconds without any reply after which the user is told that the backend is silent. Backends
#: serve one frontend at a time; the others wait in the backlog of the socket.
SILENCE_NOTICED = 1.0

BUSY = "it probably serves another frontend"

SUPPORTED = (
    vu.ProtocolFeature.MQ
    | vu.ProtocolFeature.LOG_SHMFD
    | vu.ProtocolFeature.REPLY_ACK
    | vu.ProtocolFeature.BACKEND_REQ
    | vu.ProtocolFeature.CONFIG
    | vu.ProtocolFeature.RESET_DEVICE
    | vu.ProtocolFeature.CONFIGURE_MEM_SLOTS
    | vu.ProtocolFeature.STATUS
    | vu.ProtocolFeature.INFLIGHT_SHMFD
    | vu.ProtocolFeature.DEVICE_STATE
)

T = TypeVar("T", bound=vu.Payload)


class Frontend:
    """One connection to a vhost-user backend.

    Attributes:
        path: of the backend's socket.
        offered: the device's feature bits as the backend offers them, without bit 30.
        protocol_features: those in use.
        max_queues: what GET_QUEUE_NUM answered, or None.
        closed: why the connection is over, or None.
        on_closed: called once when the backend is lost; not by :meth:`close`.
        on_config_change: the backend said that the configuration space changed.
    """

    def __init__(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.path = path
        self.offered = 0
        self.protocol_features = vu.ProtocolFeature(0)
        self.max_queues: int | None = None
        self.closed: Exception | None = None
        self.on_closed: Callable[[Exception], None] | None = None
        self.on_config_change: Callable[[], None] | None = None
        self._timeout = timeout
        self._channel: Channel | None = None
        self._backend_channel: Channel | None = None
        self._has_protocol_features = False
        self._answered = False
        self._lock = asyncio.Lock()
        self._waiting: tuple[vu.Request, asyncio.Future[vu.Message]] | None = None

    # --- the connection

    async def connect(self) -> None:
        """Connect to the backend. Raises ResourceError if nothing accepts there."""
        sock: socket.socket | None = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            async with asyncio.timeout(self._timeout):
                await asyncio.get_running_loop().sock_connect(sock, self.path)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if not isinstance(error, (OSError, TimeoutError)):
                raise
            why = getattr(error, "strerror", None) or str(error) or "nobody accepts"
            raise ResourceError(f"{self.path}: cannot connect to the backend: {why}") from error
        self.attach(sock)

    def attach(self, sock: socket.socket) -> None:
        """Use a connected socket, which then belongs to this object."""
        parser = vu.VhostUserParser(vu.Request, replies=True)
        self._channel = Channel(sock, parser, self._reply, self._lost)

    def close(self) -> None:
        """Close everything. Safe to call twice."""
        self._end(BackendClosedError(f"{self.path}: the connection was closed"))

    def fail(self, error: Exception) -> None:
        """Give the connection up because of something the backend did; ``on_closed`` is told."""
        if self._end(error) and self.on_closed is not None:
            self.on_closed(error)

    def _lost(self, error: Exception | None) -> None:
        if isinstance(error, RemoteProtocolError):
            self.fail(BackendError(f"{self.path}: {error}"))
        else:
            why = f": {error}" if error is not None else ""
            self.fail(BackendClosedError(f"{self.path}: the backend closed the connection{why}"))

    def _end(self, error: Exception) -> bool:
        if self.closed is not None:
            return False
        self.closed = error
        for channel in (self._channel, self._backend_channel):
            if channel is not None:
                channel.close()
        if self._waiting is not None and not self._waiting[1].done():
            self._waiting[1].set_exception(error)
            # Who waits may still be sending, and is told there.
            self._waiting[1].exception()
        return True

    # --- requests

    async def ask(
        self,
        kind: vu.Request,
        expected: type[T],
        payload: vu.Payload | None = None,
        fds: Sequence[int] = (),
    ) -> T:
        """Send a request that has a reply, and return that. Raises a kind of BackendError.

        The descriptors stay the caller's. A request whose caller is cancelled goes on to its end,
        and later ones wait for that.
        """
        message = await self._exchange(kind, payload, fds, reply=True, need_reply=False)
        assert message is not None
        return self._decode(message, expected)

    async def tell(
        self, kind: vu.Request, payload: vu.Payload | None = None, fds: Sequence[int] = ()
    ) -> None:
        """Send a request without a reply of its own, acknowledged where REPLY_ACK is in use.

        The descriptors stay the caller's. Raises BackendRefusedError, or another BackendError.
        """
        ack = vu.ProtocolFeature.REPLY_ACK in self.protocol_features
        message = await self._exchange(kind, payload, fds, reply=ack, need_reply=ack)
        if message is None:
            return
        value = self._decode(message, vu.U64).value
        if value:
            raise BackendRefusedError(f"{self.path}: the backend refused {kind.name} ({value})")

    def _decode(self, message: vu.Message, expected: type[T]) -> T:
        try:
            return message.decode_reply(expected)
        except RemoteProtocolError as error:
            unix_fds.close_all(message.fds)
            self._lost(error)
            raise self.closed or error from None

    async def _exchange(
        self,
        kind: vu.Request,
        payload: vu.Payload | None,
        fds: Sequence[int],
        *,
        reply: bool,
        need_reply: bool,
    ) -> vu.Message | None:
        await self._lock.acquire()
        try:
            exchange = await self._begin(kind, payload, fds, reply=reply, need_reply=need_reply)
        except BaseException:
            self._waiting = None
            self._lock.release()
            raise
        exchange.add_done_callback(self._exchanged)
        # Whoever is cancelled from here on leaves an exchange that goes on to its end.
        return await asyncio.shield(exchange)

    def _exchanged(self, exchange: asyncio.Task[vu.Message | None]) -> None:
        self._lock.release()
        if not exchange.cancelled():
            exchange.exception()  # nobody's, where whoever asked was cancelled: no error to log

    async def _begin(
        self,
        kind: vu.Request,
        payload: vu.Payload | None,
        fds: Sequence[int],
        *,
        reply: bool,
        need_reply: bool,
    ) -> asyncio.Task[vu.Message | None]:
        """Send the first bytes of a request, and all descriptors; returns what does the rest."""
        if self.closed is not None:
            raise self.closed
        assert self._channel is not None, "not connected"
        data = vu.request(kind, payload, need_reply=need_reply)
        answer: asyncio.Future[vu.Message] = asyncio.get_running_loop().create_future()
        self._waiting = (kind, answer) if reply else None
        with self._failing(kind, reply=False):
            async with asyncio.timeout(self._timeout):
                sent = await self._channel.send_some(data, fds)
        rest = self._finish(kind, data[sent:], answer if reply else None)
        return asyncio.get_running_loop().create_task(rest)

    async def _finish(
        self, kind: vu.Request, rest: bytes, answer: asyncio.Future[vu.Message] | None
    ) -> vu.Message | None:
        assert self._channel is not None
        try:
            with self._failing(kind, reply=answer is not None):
                async with asyncio.timeout(self._timeout):
                    await self._channel.send(rest)
                    return await answer if answer is not None else None
        except asyncio.CancelledError:
            # The loop ends. Nobody could go on behind half a request.
            self._end(BackendClosedError(f"{self.path}: {kind.name} was interrupted"))
            raise
        finally:
            self._waiting = None

    @contextlib.contextmanager
    def _failing(self, kind: vu.Request, *, reply: bool) -> Iterator[None]:
        """End the connection if anything goes wrong while a request is under way."""
        try:
            yield
        except TimeoutError:
            # The answer may still come, and nobody could tell which request it belongs to.
            what = "answer" if reply else "read"
            error = BackendTimeoutError(
                f"{self.path}: the backend did not {what} {kind.name} in {self._timeout:g} s"
                f"{'' if self._answered else f'; {BUSY}'}"
            )
            self.fail(error)
            raise error from None
        except OSError as error:
            if self.closed is None:
                self._lost(error)
            raise self.closed or error from None

    def _reply(self, message: vu.Message) -> None:
        waiting = self._waiting
        if waiting is not None and waiting[1].done():
            waiting = None
        if waiting is None or waiting[0] != message.kind:
            unix_fds.close_all(message.fds)
            expected = f"a reply to {waiting[0].name}" if waiting is not None else "nothing"
            raise BackendError(f"a reply to {message.name} where {expected} was expected")
        self._answered = True
        waiting[1].set_result(message)

    # --- the backend channel

    def _backend_request(self, message: vu.Message) -> None:
        result = 0
        try:
            message.decode()
            if message.kind == vu.BackendRequest.CONFIG_CHANGE_MSG:
                if self.on_config_change is not None:
                    self.on_config_change()
            else:
                raise vu.VhostUserError(message.name, "not expected from a console")
        except RemoteProtocolError as error:
            log.warning("%s: backend channel: %s", self.path, error)
            result = errno.EINVAL
        finally:
            unix_fds.close_all(message.fds)
        if message.need_reply and self._backend_channel is not None:
            self._backend_channel.send_now(vu.reply(message.kind, vu.U64(result)))

    def _backend_channel_lost(self, error: Exception | None) -> None:
        if isinstance(error, RemoteProtocolError):
            self.fail(BackendError(f"{self.path}: backend channel: {error}"))
        elif self._backend_channel is not None:
            self._backend_channel.close()

    async def _open_backend_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        parser = vu.VhostUserParser(vu.BackendRequest)
        self._backend_channel = Channel(
            ours, parser, self._backend_request, self._backend_channel_lost
        )
        with theirs:
            await self.tell(vu.Request.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))

    # --- what a driver does with it

    async def negotiate_protocol(self) -> None:
        """Own the session, learn what is offered, settle the protocol features."""
        await self.tell(vu.Request.SET_OWNER)
        loop = asyncio.get_running_loop()
        silence = loop.call_later(SILENCE_NOTICED, self._log_silence)
        try:
            offered = (await self.ask(vu.Request.GET_FEATURES, vu.U64)).value
        finally:
            silence.cancel()
        self._has_protocol_features = bool(offered >> vu.F_PROTOCOL_FEATURES & 1)
        self.offered = offered & ~(1 << vu.F_PROTOCOL_FEATURES)
        if not self._has_protocol_features:
            return
        possible = (await self.ask(vu.Request.GET_PROTOCOL_FEATURES, vu.U64)).value
        features = SUPPORTED & vu.ProtocolFeature(possible & SUPPORTED)
        await self.tell(vu.Request.SET_PROTOCOL_FEATURES, vu.U64(features))
        self.protocol_features = features
        if vu.ProtocolFeature.MQ in features:
            self.max_queues = (await self.ask(vu.Request.GET_QUEUE_NUM, vu.U64)).value
        if vu.ProtocolFeature.BACKEND_REQ in features:
            await self._open_backend_channel()

    def _log_silence(self) -> None:
        log.warning(
            "%s: the backend has not answered yet: %s; waiting for up to %g s",
            *(self.path, BUSY, self._timeout),
        )

    async def set_features(self, bits: int) -> None:
        """Tell the backend the driver's feature bits, a subset of ``offered``."""
        if self._has_protocol_features:
            bits |= 1 << vu.F_PROTOCOL_FEATURES
        await self.tell(vu.Request.SET_FEATURES, vu.U64(bits))

    async def set_status(self, status: int) -> None:
        """Tell the backend the device status, if it wants to know it."""
        if vu.ProtocolFeature.STATUS in self.protocol_features:
            await self.tell(vu.Request.SET_STATUS, vu.U64(status))

    async def get_status(self) -> int | None:
        """Return the device status, or None if the backend keeps none."""
        if vu.ProtocolFeature.STATUS not in self.protocol_features:
            return None
        return (await self.ask(vu.Request.GET_STATUS, vu.U64)).value

    @property
    def has_config(self) -> bool:
        """The backend has a configuration space."""
        return vu.ProtocolFeature.CONFIG in self.protocol_features

    async def read_config(self, offset: int, length: int) -> bytes | None:
        """Return a part of the configuration space, or None if the backend has none."""
        if not self.has_config:
            return None
        access = vu.ConfigAccess(offset, bytes(length))
        answer = await self.ask(vu.Request.GET_CONFIG, vu.ConfigAccess, access)
        if not answer.data:
            raise BackendRefusedError(
                f"{self.path}: the backend refused GET_CONFIG of {length} bytes at {offset}"
            )
        if (answer.offset, len(answer.data)) != (offset, length):
            error = BackendError(
                f"{self.path}: GET_CONFIG of {length} bytes at {offset} was answered with "
                f"{len(answer.data)} bytes at {answer.offset}"
            )
            self.fail(error)
            raise error
        return answer.data

    async def set_memory(self, ram: GuestRam) -> None:
        """Let the backend map the guest's RAM."""
        region = vu.MemoryRegion(ram.guest_addr, ram.size, ram.user_addr)
        if vu.ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol_features:
            slots = (await self.ask(vu.Request.GET_MAX_MEM_SLOTS, vu.U64)).value
            if slots < 1:
                raise BackendRefusedError(f"{self.path}: the backend maps no memory at all")
            await self.tell(vu.Request.ADD_MEM_REG, vu.SingleRegion(region), (ram.fd,))
        else:
            await self.tell(vu.Request.SET_MEM_TABLE, vu.MemoryTable((region,)), (ram.fd,))

    async def get_inflight(self, queues: int, queue_size: int) -> tuple[int, vu.Inflight] | None:
        """Ask for a region that outlives the backend ("Inflight I/O tracking").

        Args:
            queues: how many there are.
            queue_size: descriptors of each.

        Returns:
            The region's descriptor, which is the caller's, and its description; None if the backend
            offers no such thing.
        """
        if vu.ProtocolFeature.INFLIGHT_SHMFD not in self.protocol_features:
            return None
        wanted = vu.Inflight(0, 0, queues, queue_size)
        kind = vu.Request.GET_INFLIGHT_FD
        message = await self._exchange(kind, wanted, (), reply=True, need_reply=False)
        assert message is not None
        try:
            given = vu.Inflight.unpack(message.payload)
            if len(message.fds) != 1:
                raise RemoteProtocolError(f"{len(message.fds)} descriptors instead of 1")
        except RemoteProtocolError as error:
            unix_fds.close_all(message.fds)
            raise BackendError(f"{self.path}: reply to {kind.name}: {error}") from None
        return message.fds[0], given

    async def set_inflight(self, fd: int, given: vu.Inflight) -> None:
        """Have the backend use a region, which stays the caller's."""
        if vu.ProtocolFeature.INFLIGHT_SHMFD in self.protocol_features:
            await self.tell(vu.Request.SET_INFLIGHT_FD, given, (fd,))

    async def set_log(self, fd: int, size: int) -> None:
        """Have the backend mark pages in ``size`` bytes of a file, and no longer in the one before.

        It marks what it writes while SET_FEATURES has F_LOG_ALL. The descriptor stays the caller's.
        """
        kind = vu.Request.SET_LOG_BASE
        await self._accepted(kind, vu.LogArea(size), (fd,))

    async def save_state(self) -> bytes:
        """Return the device's own state; no ring runs meanwhile.

        Raises BackendRefusedError if the backend cannot give it, or offers no such thing.
        """
        with await self._state_channel(vu.DeviceStateTransfer.SAVE) as channel:
            state: bytes = await asyncio.to_thread(channel.read)
        await self._accepted(vu.Request.CHECK_DEVICE_STATE)
        return state

    async def load_state(self, state: bytes) -> None:
        """Give the backend what :meth:`save_state` returned of another one; no ring runs meanwhile.

        Raises BackendRefusedError if it does not fit there.
        """
        try:
            with await self._state_channel(vu.DeviceStateTransfer.LOAD) as channel:
                await asyncio.to_thread(channel.write, state)
        except OSError as error:
            raise BackendRefusedError(f"{self.path}: the state: {error.strerror}") from None
        await self._accepted(vu.Request.CHECK_DEVICE_STATE)

    async def _state_channel(self, direction: int) -> IO[bytes]:
        """Return our end of the channel that a state goes through, the caller's."""
        if vu.ProtocolFeature.DEVICE_STATE not in self.protocol_features:
            raise BackendRefusedError(f"{self.path}: the backend does not offer DEVICE_STATE")
        kind, params = vu.Request.SET_DEVICE_STATE_FD, vu.DeviceStateTransfer(direction)
        pair = os.pipe()  # for reading, for writing
        ours, theirs = pair if direction == params.SAVE else reversed(pair)
        try:
            message = await self._exchange(kind, params, (theirs,), reply=True, need_reply=False)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        assert message is not None
        fds = list(message.fds)
        try:
            value = vu.U64.unpack(message.payload).value
            if value & params.ERROR_MASK:
                raise BackendRefusedError(f"{self.path}: the backend refused {kind.name} ({value})")
            if len(fds) != (0 if value & params.NO_FD else 1):
                raise RemoteProtocolError(f"{len(fds)} descriptors with {value:#x}")
        except RemoteProtocolError as error:
            unix_fds.close_all([ours, *fds])
            raise BackendError(f"{self.path}: reply to {kind.name}: {error}") from None
        except BackendRefusedError:
            unix_fds.close_all([ours, *fds])
            raise
        if fds:
            os.close(ours)
            ours = fds[0]
        return open(ours, "rb" if direction == params.SAVE else "wb")

    async def _accepted(
        self, kind: vu.Request, payload: vu.Payload | None = None, fds: Sequence[int] = ()
    ) -> None:
        """Send a request whose reply says whether it was accepted. Raises BackendRefusedError."""
        value = (await self.ask(kind, vu.U64, payload, fds)).value
        if value:
            raise BackendRefusedError(f"{self.path}: the backend refused {kind.name} ({value})")

    async def set_queue(self, queue: DriverQueue, ram: GuestRam, base: int | None = None) -> None:
        """Describe one ring and start it; it still has to be enabled.

        It goes on at ``base``; None: behind the last buffer that was used.
        """
        index = queue.index
        base = queue.base if base is None else base
        await self.tell(vu.Request.SET_VRING_NUM, vu.VringState(index, queue.size))
        await self.tell(vu.Request.SET_VRING_BASE, vu.VringState(index, base))
        address = vu.VringAddress(
            index,
            0,
            descriptor=ram.user_address(queue.desc),
            used=ram.user_address(queue.used),
            available=ram.user_address(queue.avail),
        )
        await self.tell(vu.Request.SET_VRING_ADDR, address)
        descriptor = vu.VringDescriptor(index)
        await self.tell(vu.Request.SET_VRING_CALL, descriptor, (queue.call_fd,))
        await self.tell(vu.Request.SET_VRING_KICK, descriptor, (queue.kick_fd,))

    async def enable_queues(self, indices: Sequence[int], enable: bool = True) -> None:
        """Enable or disable rings. Without bit 30 they are always enabled."""
        if self._has_protocol_features:
            for index in indices:
                await self.tell(vu.Request.SET_VRING_ENABLE, vu.VringState(index, int(enable)))

    async def stop_queues(self, indices: Sequence[int]) -> dict[int, int]:
        """Disable and stop rings, the last one first; the backend then touches none of them.

        Returns where each goes on (``base`` of :meth:`set_queue`).
        """
        backwards = tuple(reversed(indices))
        await self.enable_queues(backwards, False)
        kind = vu.Request.GET_VRING_BASE
        return {i: (await self.ask(kind, vu.VringState, vu.VringState(i))).num for i in backwards}

    async def reset(self) -> None:
        """Reset the device in the ways that the backend knows."""
        await self.set_status(0)
        if vu.ProtocolFeature.RESET_DEVICE in self.protocol_features:
            await self.tell(vu.Request.RESET_DEVICE)
