"""A backend whose host ends are connected sockets that it was given: to be killed.

Usage: given_sockets.py PATH split|packed FD...: serves PATH, with port 1 at the first descriptor.
It makes the file PATH.ready when it listens.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from vring_serial.chardev.base import Chardev, DescriptorEnd
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.transport.vhost_user.backend import VhostUserBackend


class GivenSocket(Chardev):
    """A socket that somebody else has, too, and connected."""

    def __init__(self, fd: int) -> None:
        super().__init__(f"fd{fd}")
        self._fd = fd

    async def start(self) -> None:
        if self.end is None:
            self._open_end(DescriptorEnd(self._fd, self._fd))

    async def aclose(self) -> None:
        self._close_end()


async def main(path: str, layout: str, fds: list[int]) -> None:
    controller = Controller(max_ports=len(fds) + 1)
    for nr, fd in enumerate(fds, start=1):
        controller.add_port(Port(nr, f"p{nr}", GivenSocket(fd)))
    async with controller, VhostUserBackend(controller, path, packed=layout == "packed"):
        Path(f"{path}.ready").touch()
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], [int(fd) for fd in sys.argv[3:]]))
