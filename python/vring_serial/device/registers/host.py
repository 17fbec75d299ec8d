"""Where the device's own code runs when a driver accesses registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Host(Protocol):
    """Brings what a register access asks for into the event loop that serves the device.

    Devices watch descriptors and set timers, so starting and stopping their queues, resetting them
    and writing to their configuration must happen in their loop. All other accesses are plain
    memory and need nothing of this.
    """

    def run(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the event loop, and return when it has returned."""
        ...

    def notified(self) -> None:
        """Serve the queues that have a readable kick descriptor: a driver has notified one."""
        ...


class LoopThread(Host):
    """The host of accesses that come in the event loop's own thread."""

    def run(self, function: Callable[[], None]) -> None:
        function()

    def notified(self) -> None:
        pass
