"""What stands behind a chardev where a port is not what is tested."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vring_serial.chardev.base import DescriptorEnd, End


class User:
    """A chardev's user.

    Attributes:
        opened: set once the host end has been opened.
    """

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    def end_opened(self, end: End) -> None:
        self.opened.set()

    def end_replaced(self, end: DescriptorEnd, between: Callable[[], None]) -> None:
        between()

    def end_closed(self) -> None:
        pass

    def end_resized(self, cols: int, rows: int) -> None:
        pass
