"""Kick descriptors in the event loop: watched, and never read.

A peer has the descriptor too. It may make it blocking, empty it between a look and a read, or have
made it a semaphore, which a read makes smaller by one and which stays readable for as long as the
peer likes. So what counts is that somebody wrote to it, which an edge-triggered epoll tells once.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import weakref
from collections.abc import Callable

_EVENTS_AT_ONCE = 64


def _told_no_more() -> None:
    pass


class KickWatch:
    """Calls ``kicked`` in the event loop after somebody wrote to ``fd``, until :meth:`close`.

    Writes that come fast are told as one. What was written before is told too.

    Raises:
        OSError: ``fd`` cannot be watched.
    """

    def __init__(self, fd: int, kicked: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._kicked = kicked
        reference = _watchers.get(self._loop)
        self._watcher = reference() if reference is not None else None
        if self._watcher is None:
            self._watcher = _Watcher(self._loop)
        try:
            self._watcher.add(fd, kicked)
        except OSError:
            self._watcher.close_if_idle(self._loop)
            raise

    def close(self) -> None:
        """Watch no more; before the descriptor is closed. Safe to call twice."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.remove(self._fd, self._kicked)
            watcher.close_if_idle(self._loop)
            self._kicked = _told_no_more  # who is told mostly holds this object: no cycle is left


class _Watcher:
    """The epoll of one event loop, which keeps this alive for as long as anything is watched."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, list[Callable[[], None]]] = {}  # queues may share a descriptor
        loop.add_reader(self._epoll.fileno(), self._ready)
        _watchers[loop] = weakref.ref(self)

    def add(self, fd: int, kicked: Callable[[], None]) -> None:
        if fd in self._watched:
            self._epoll.modify(fd, select.EPOLLIN | select.EPOLLET)  # for what was written before
        else:
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        self._watched.setdefault(fd, []).append(kicked)

    def remove(self, fd: int, kicked: Callable[[], None]) -> None:
        self._watched[fd].remove(kicked)
        if not self._watched[fd]:
            del self._watched[fd]
            with contextlib.suppress(OSError):  # closed already
                self._epoll.unregister(fd)

    def close_if_idle(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._watched:
            loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            _watchers.pop(loop, None)

    def _ready(self) -> None:
        for fd, _ in self._epoll.poll(0, _EVENTS_AT_ONCE):
            for kicked in list(self._watched.get(fd, ())):
                # Each is told this once: what one of them raises must not cost the others theirs.
                try:
                    kicked()
                except Exception as error:
                    asyncio.get_running_loop().call_exception_handler(
                        {"message": f"a kick through descriptor {fd}", "exception": error}
                    )


_watchers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Watcher]] = (
    weakref.WeakKeyDictionary()
)
