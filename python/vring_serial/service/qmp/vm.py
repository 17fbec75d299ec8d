"""A VM as the monitor knows it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any

from vring_serial.lifetime import Closing
from vring_serial.service.link import Caller, CallTimeoutError

#: Seconds that a worker has to answer; one that goes on from another needs less than a tenth.
ANSWER_SECONDS = 5.0

#: Told of an event: the VM's name, the event's and its data.
Tell = Callable[[str, str, Mapping[str, Any]], None]


class Vm(Closing):
    """The way to one VM's worker, whichever process that is.

    Args:
        name: of the VM.
        sock: the monitor's end of the link; closed with this.
        tell: told of what the worker tells.

    Attributes:
        name: of the VM.
        caller: to its worker.
    """

    def __init__(self, name: str, sock: socket.socket, tell: Tell) -> None:
        self.name = name
        self.caller = Caller(sock, self._heard, name)
        self._tell = tell
        self._restarts = 0
        self._replaced = asyncio.Event()

    def close(self) -> None:
        self.caller.close()

    async def restart(self) -> None:
        """Have the worker replaced, and wait until the next one serves.

        Raises:
            CallError: it does not serve yet, or nobody could go on from it.
            CallTimeoutError: there is no other one after ANSWER_SECONDS.
        """
        before = int(await self.caller.call("restart", seconds=ANSWER_SECONDS))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while self._restarts <= before:
                    self._replaced.clear()
                    await self._replaced.wait()
        except TimeoutError:
            text = f"no other worker of {self.name} serves after {ANSWER_SECONDS:g} s"
            raise CallTimeoutError(text) from None

    def _heard(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "worker" and isinstance(restarts := data.get("restarts"), int):
            self._restarts = restarts
            self._replaced.set()
        self._tell(self.name, name, data)
