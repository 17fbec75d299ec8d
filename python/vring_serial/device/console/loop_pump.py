"""A pump and the event loop that hears what happens to its flows."""

from __future__ import annotations

import asyncio

from vring import Pump
from vring_serial.lifetime import Closing


class LoopPump(Closing):
    """A pump whose events the running event loop dispatches, until :meth:`close`.

    Args:
        busy_poll_us: see ``vring.Pump``.

    Attributes:
        pump: the pump; its flows end with :meth:`close`.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(self, busy_poll_us: int = 0) -> None:
        self._loop = asyncio.get_running_loop()
        self.pump = Pump(busy_poll_us=busy_poll_us)
        self._loop.add_reader(self.pump.event_fd, self.pump.dispatch)
        self._closed = False

    def close(self) -> None:
        """End the pump's thread and its flows, in the event loop's thread. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self.pump.event_fd)
            self.pump.close()
