"""null: an end that is always connected, takes everything and gives nothing."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.chardev.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class NullOptions(Options):
    """null has no options."""


class NullChardev(Chardev):
    """Discards what the guest writes. No descriptors, so its end has -1 on both sides."""

    def __init__(self, id: str, options: NullOptions | None = None) -> None:
        super().__init__(id)

    async def start(self) -> None:
        if self.end is None:
            self._open_end(DescriptorEnd(read_fd=-1, write_fd=-1))

    async def aclose(self) -> None:
        self._close_end()

    @property
    def description(self) -> str:
        return "null"
