"""Whose event loop serves a device that an emulator has in its own process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from vring_serial.errors import LocalProtocolError
from vring_serial.lifetime import Closing

T = TypeVar("T")

#: At most so many turns of the loop in one poll: a guest must not keep its emulator from returning.
POLL_TURNS = 64


class PolledHost(Closing):
    """For emulators without asyncio: a loop that runs only while one of these methods does.

    Nothing happens in the background but the pump's copying. The emulator calls :meth:`poll` when
    :meth:`fileno` is readable, or whenever it likes; register accesses that change what the device
    does, and notifications, are done when they return.

    All methods, and all register accesses of the devices, belong to one thread.

    Args:
        synchronous: serve a queue within the access that notifies it, as a guest that spins until
            then needs it if nobody else polls. Without it, only :meth:`poll` serves.
    """

    def __init__(self, *, synchronous: bool = True) -> None:
        self._synchronous = synchronous
        self._selector = _SteppedSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._selector.idle = self._loop.stop

    def run(self, function: Callable[[], None]) -> None:
        """See ``device.host.Host``. What ``function`` raises comes out here."""
        self._check_open()
        if self._loop.is_running():
            function()
            return
        raised: list[BaseException] = []

        def call() -> None:
            try:
                function()
            except BaseException as error:
                raised.append(error)

        self._loop.call_soon(call)
        self.poll()
        if raised:
            raise raised[0]

    def notified(self) -> None:
        """See ``device.host.Host``."""
        if self._synchronous and not self._loop.is_running():
            self.poll()

    def poll(self) -> float | None:
        """Do all that can be done without waiting.

        Returns when to poll again at the latest, in seconds: 0 if there was more to do than one
        call should take, None if only :meth:`fileno` tells.

        Raises:
            LocalProtocolError: called from within itself, as an interrupt callback would, or after
                :meth:`close`.
        """
        self._check_open()
        if self._loop.is_running():
            raise LocalProtocolError("poll() is called from within poll()")
        self._selector.begin(POLL_TURNS)
        try:
            self._loop.run_forever()
        finally:
            self._selector.end()
        return self._selector.wait

    def fileno(self) -> int:
        """Readable when there is something to poll for: for select, epoll, GLib and their like.

        Raises:
            LocalProtocolError: after :meth:`close`.
        """
        self._check_open()
        return self._selector.fileno()

    def complete(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine, such as ``controller.start()``, to its end, waiting if it does.

        Raises:
            LocalProtocolError: after :meth:`close`.
        """
        if self._loop.is_closed():
            work.close()
        self._check_open()
        return self._loop.run_until_complete(work)

    @contextlib.contextmanager
    def using(self, thing: contextlib.AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Do with ``with`` what ``async with`` does elsewhere, for a Controller or an agent.

        Raises:
            LocalProtocolError: after :meth:`close`.
        """
        entered = self.complete(thing.__aenter__())
        try:
            yield entered
        except BaseException as error:
            if not self.complete(thing.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.complete(thing.__aexit__(None, None, None))

    def _check_open(self) -> None:
        if self._loop.is_closed():
            raise LocalProtocolError("this PolledHost was closed")

    def close(self) -> None:
        """Close the loop; devices are closed and stopped before. Safe to call twice."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


class LoopHost:
    """For emulators beside asyncio: the loop that runs where this is made.

    Registers may be accessed in the loop's thread and in any other; there an access that changes
    what the device does waits for the loop, and all others, notifications among them, do not. The
    loop's thread must therefore never wait for another one that may be in an access.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def run(self, function: Callable[[], None]) -> None:
        """See ``device.host.Host``. What ``function`` raises comes out here."""
        if threading.get_ident() == self._thread:
            function()
            return
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def call() -> None:
            try:
                function()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(call)
        done.result()

    def notified(self) -> None:
        """See ``device.host.Host``: the loop watches the descriptor itself."""


class _SteppedSelector(selectors.EpollSelector):
    """Lets a loop turn until it would wait, and says how long it would.

    Attributes:
        idle: called instead of waiting.
        wait: how long, in seconds; None: until a descriptor is ready.
    """

    def __init__(self) -> None:
        super().__init__()
        self.idle: Callable[[], None] = lambda: None
        self.wait: float | None = None
        self._stepping = False
        self._turns = 0

    def begin(self, turns: int) -> None:
        """Do not wait from now on, and turn at most so often."""
        self._stepping = True
        self._turns = turns

    def end(self) -> None:
        """Wait again."""
        self._stepping = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if not self._stepping:
            return super().select(timeout)
        ready = super().select(0)
        self._turns -= 1
        if self._turns <= 0:
            self.wait = 0.0
            self.idle()
        elif not ready and timeout != 0:
            self.wait = timeout
            self.idle()
        return ready
