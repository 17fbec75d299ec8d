"""How commands that run until they are told end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT or SIGTERM sets; after the first, both do what they do by default."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def first_signal() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first_signal)
    return stop


async def finished_before(stop: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Do ``work`` unless ``stop`` is set first, which cancels it. Raises what ``work`` raises."""
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
