"""null: an end that is always connected, discards all output and has no input."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.chardev.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class NullOptions(Options):
    """Options of null: none."""


class NullChardev(Chardev):
    """A chardev that discards the guest's output; both descriptors of its end are -1."""

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
