"""The timers and watches of libspice-server on an asyncio loop (SpiceCoreInterface)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vring_serial.accept import Acceptor
from vring_serial.callbacks import tell
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.spice.admission import Admission
from vring_serial.spice.library import Library, callback_failed

log = logging.getLogger("vring_serial.spice")

_EVENT_READ = 1 << 0
_EVENT_WRITE = 1 << 1

_CHANNEL_MAIN = 1  # SPICE_CHANNEL_MAIN
_CHANNEL_INITIALIZED = 2
_CHANNEL_DISCONNECTED = 3
_FLAG_TLS = 1 << 0
_FLAG_ADDR_EXT = 1 << 1


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """A client came, or went.

    Attributes:
        address: where from, as text.
        tls: whether over TLS.
        connected: whether it came.
    """

    address: str
    tls: bool
    connected: bool


@dataclass(slots=True)
class _Timer:
    func: Any
    opaque: Any
    handle: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Watch:
    fd: int
    func: Any
    opaque: Any
    mask: int = 0
    listening: _Listening | None = None


@dataclass(frozen=True, slots=True)
class _Listening:
    """A socket that the library listens on itself; the library owns the descriptor."""

    socket: socket.socket
    acceptor: Acceptor

    def close(self) -> None:
        self.acceptor.close()
        self.socket.detach()


class CoreInterface:
    """One server's timers and watches, on the running loop; all its code runs in that thread.

    The library holds a number instead of a pointer for each of them, so that one that it uses
    after removing it is an error that we notice.

    Args:
        library: the loaded library.
        on_client: told about clients.

    Attributes:
        admission: limits connections that have not authenticated.
    """

    def __init__(self, library: Library, on_client: Callable[[ClientEvent], None]) -> None:
        self._ffi = library.ffi
        self._loop = asyncio.get_running_loop()
        self._on_client = on_client
        self._timers: dict[int, _Timer] = {}
        self._watches: dict[int, _Watch] = {}
        self._number = 0
        self._log = RateLimitedLog(log)
        self.admission = Admission()
        self._accepting = False
        self._turn_of = -1  # the descriptor whose watch is being called
        self.struct = self._make_struct()

    def _make_struct(self) -> Any:
        """Make the interface; it, and the callbacks in it, live as long as this object."""
        ffi = self._ffi
        struct = ffi.new("SpiceCoreInterface *")
        self._strings = [ffi.new("char[]", text) for text in (b"core", b"asyncio")]
        struct.base.type, struct.base.description = self._strings
        struct.base.major_version = 1
        struct.base.minor_version = 3
        fields = dict(ffi.typeof("SpiceCoreInterface").fields)
        self._callbacks = []
        for name in (
            *("timer_add", "timer_start", "timer_cancel", "timer_remove"),
            *("watch_add", "watch_update_mask", "watch_remove", "channel_event"),
        ):
            callback = ffi.callback(
                fields[name].type, getattr(self, f"_{name}"), onerror=callback_failed
            )
            self._callbacks.append(callback)
            setattr(struct, name, callback)
        return struct

    @contextlib.contextmanager
    def accepting(self) -> Iterator[None]:
        """Treat descriptors that the library starts to watch in this block as new connections."""
        self._accepting = True
        try:
            yield
        finally:
            self._accepting = False

    def close(self) -> list[int]:
        """Remove all timers and watches that the library left.

        Returns descriptors of unauthenticated connections, which the library did not close.
        """
        for timer in self._timers.values():
            _cancel(timer)
        self._timers.clear()
        for watch in self._watches.values():
            self._set_mask(watch, 0)
            if watch.listening is not None:
                watch.listening.close()
        watched = {watch.fd for watch in self._watches.values()}
        self._watches.clear()
        return [fd for fd in self.admission.close() if fd in watched]

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _key(self, pointer: Any) -> int:
        return int(self._ffi.cast("uintptr_t", pointer))

    # --- timers

    def _timer_add(self, func: Any, opaque: Any) -> Any:
        number = self._next()
        self._timers[number] = _Timer(func, opaque)
        return self._ffi.cast("SpiceTimer *", number)

    def _timer_start(self, pointer: Any, ms: int) -> None:
        timer = self._timers[self._key(pointer)]
        _cancel(timer)
        timer.handle = self._loop.call_later(ms / 1000, _fire, timer)

    def _timer_cancel(self, pointer: Any) -> None:
        _cancel(self._timers[self._key(pointer)])

    def _timer_remove(self, pointer: Any) -> None:
        if pointer != self._ffi.NULL:
            _cancel(self._timers.pop(self._key(pointer)))

    # --- watches

    def _watch_add(self, fd: int, mask: int, func: Any, opaque: Any) -> Any:
        number = self._next()
        watch = self._watches[number] = _Watch(fd, func, opaque)
        if self._accepting:
            self.admission.came(fd)
        elif _is_listening(fd):
            # For TLS the library listens, and accepts, itself.
            take = functools.partial(self._accept, watch)
            acceptor = Acceptor(name="SPICE with TLS", peer="client", yields=True, take=take)
            watch.listening = _Listening(socket.socket(fileno=fd), acceptor)
        self._set_mask(watch, mask)
        return self._ffi.cast("SpiceWatch *", number)

    def _watch_update_mask(self, pointer: Any, mask: int) -> None:
        self._set_mask(self._watches[self._key(pointer)], mask)

    def _watch_remove(self, pointer: Any) -> None:
        if pointer != self._ffi.NULL:
            watch = self._watches.pop(self._key(pointer))
            self._set_mask(watch, 0)
            if watch.listening is not None:
                watch.listening.close()
            self._loop.call_soon(self._forget, watch.fd)

    def _set_mask(self, watch: _Watch, mask: int) -> None:
        """Watch for what a mask says; the library has one watch for a descriptor at a time."""
        changed = watch.mask ^ mask
        watch.mask = mask
        if watch.listening is not None:
            if mask & _EVENT_READ:
                watch.listening.acceptor.open([watch.listening.socket])
            else:
                watch.listening.acceptor.close()
            return
        if changed & _EVENT_READ:
            if mask & _EVENT_READ:
                self._loop.add_reader(watch.fd, self._ready, watch, _EVENT_READ)
            else:
                self._loop.remove_reader(watch.fd)
        if changed & _EVENT_WRITE:
            if mask & _EVENT_WRITE:
                self._loop.add_writer(watch.fd, self._ready, watch, _EVENT_WRITE)
            else:
                self._loop.remove_writer(watch.fd)

    def _ready(self, watch: _Watch, event: int) -> None:
        self._turn_of = watch.fd
        try:
            watch.func(watch.fd, event, watch.opaque)
        finally:
            self._turn_of = -1

    def _accept(self, watch: _Watch, listening: socket.socket) -> None:
        # Raises OSError if none is free: the library would log an error and be called again.
        os.close(os.dup(listening.fileno()))
        with self.accepting():
            watch.func(watch.fd, _EVENT_READ, watch.opaque)

    def _forget(self, fd: int) -> None:
        """After a watch was removed: without another one the connection is closed."""
        if all(watch.fd != fd for watch in self._watches.values()):
            self.admission.left(fd)

    # --- clients

    def _channel_event(self, event: int, info: Any) -> None:
        """Note a channel that came or left; a client is there while its main channel is."""
        if event == _CHANNEL_INITIALIZED:
            self.admission.admitted(self._turn_of)
        if info.type != _CHANNEL_MAIN or event not in (
            _CHANNEL_INITIALIZED,
            _CHANNEL_DISCONNECTED,
        ):
            return
        address = "?"
        if info.flags & _FLAG_ADDR_EXT:
            size = min(info.plen_ext, self._ffi.sizeof("struct sockaddr_storage"))
            raw = self._ffi.buffer(self._ffi.addressof(info, "paddr_ext"), size)
            with contextlib.suppress(ValueError):
                address = _format_address(bytes(raw))
        connected = event == _CHANNEL_INITIALIZED
        tls = bool(info.flags & _FLAG_TLS)
        tell(self._log, "on_client", self._on_client, ClientEvent(address, tls, connected))


def _cancel(timer: _Timer) -> None:
    if timer.handle is not None:
        timer.handle.cancel()
        timer.handle = None


def _fire(timer: _Timer) -> None:
    timer.handle = None
    timer.func(timer.opaque)


def _is_listening(fd: int) -> bool:
    sock = socket.socket(fileno=fd)
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False
    finally:
        sock.detach()


def _format_address(raw: bytes) -> str:
    """Return a struct sockaddr as text. Raises ValueError if it is too short."""
    if len(raw) < 2:
        return "a unix socket"
    family = int.from_bytes(raw[:2], "little")
    port = int.from_bytes(raw[2:4], "big")
    if family == socket.AF_INET:
        return f"{ipaddress.IPv4Address(raw[4:8])}:{port}"
    if family == socket.AF_INET6:
        return f"[{ipaddress.IPv6Address(raw[8:24])}]:{port}"
    return "a unix socket"
