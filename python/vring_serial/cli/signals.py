"""The end of commands that run until a signal."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from vring_serial.cli import STATUS_INTERRUPTED

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do as ``asyncio.run``, without a warning if a signal arrives before ``work`` begins."""
    try:
        return asyncio.run(work)
    finally:
        if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
            work.close()


def run_until_signal(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``work()``; a signal cancels it, and its clean-up is awaited.

    Raises:
        SystemExit: STATUS_INTERRUPTED after a signal.
    """

    async def main() -> bool:
        return await finished_before(stop_on_signals(), work())

    if not run(main()):
        raise SystemExit(STATUS_INTERRUPTED)


def stop_on_signals(
    reload: Callable[[], None] | None = None, *, interrupt: bool = True
) -> asyncio.Event:
    """Return an event that SIGINT, SIGTERM or the terminal's hang-up sets.

    After the first, SIGINT and SIGTERM have their default effect, and SIGHUP is ignored, because
    both the kernel and the shell may send it.

    Args:
        reload: called on a SIGHUP that is not caused by the terminal's hang-up.
        interrupt: whether SIGINT counts too; if not, its handling stays as it is.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    # A process started with nohup outlives the terminal.
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    unbound = nohup or not _has_terminal()
    ends = (signal.SIGINT, signal.SIGTERM) if interrupt else (signal.SIGTERM,)

    def first_signal() -> None:
        for number in (*ends, signal.SIGHUP):
            loop.remove_signal_handler(number)
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop.set()

    def hangup() -> None:
        if reload is not None and (unbound or _has_terminal()):
            reload()
        else:
            first_signal()

    for number in ends:
        loop.add_signal_handler(number, first_signal)
    if reload is not None or not nohup:
        loop.add_signal_handler(signal.SIGHUP, hangup)
    return stop


def _has_terminal() -> bool:
    """Return whether the process has a controlling terminal that has not hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError as error:
        # A lack of descriptors is no evidence of a hang-up.
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return True


async def finished_before(stop: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Do ``work`` until ``stop`` is set, which cancels it; return whether it was finished.

    Raises what ``work`` raises.
    """
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
