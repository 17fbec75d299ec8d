"""All monitors of the service: those for all VMs, and those for one VM alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vring_serial.chardev.kept import KeptSockets
from vring_serial.chardev.socket import SocketOptions
from vring_serial.keeping import Keeping
from vring_serial.lifetime import Ending
from vring_serial.service.monitored import listen
from vring_serial.service.qmp.monitor import Monitor
from vring_serial.service.qmp.server import QmpServer


class Monitors(Ending):
    """Makes monitors, tells them of events, and ends them.

    Args:
        package: our name and version.
        confined: see QmpServer.
        keeping: of the process.
        on_listening: told a line for the log when one listens.
    """

    def __init__(
        self,
        package: str,
        confined: asyncio.Event,
        keeping: Keeping,
        on_listening: Callable[[str], None],
    ) -> None:
        self._package = package
        self._confined = confined
        self._keeping = keeping
        self._on_listening = on_listening
        # By the VM's name; "" for those of all VMs.
        self._servers: dict[str, list[QmpServer]] = {}
        self._ends: dict[str, contextlib.AsyncExitStack] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        ends = [*self._ends.values()]
        self._ends.clear()
        for servers in self._servers.values():
            _tell_of_end(servers, "host-signal")
        self._servers.clear()
        await asyncio.gather(*(end.aclose() for end in ends), *self._leaving)

    async def serve(
        self, monitor: Monitor, options: SocketOptions, role: str, where: str = "--qmp"
    ) -> None:
        """Serve a monitor at one address.

        Args:
            monitor: carries out the commands.
            options: the address.
            where: the address stands, for errors.
            role: what is kept for a successor is found by it; no other address has it.

        Raises ResourceError.
        """
        keeping = self._keeping.scoped(role)
        listener = await listen(where, options, keeping)
        stack = self._stack(monitor, keeping)
        stack.callback(listener.close)
        await self._serve(stack, monitor, listener.sockets, str(options.address))

    async def serve_on(
        self, monitor: Monitor, sockets: Sequence[socket.socket], addresses: str, role: str
    ) -> None:
        """Serve a monitor on sockets that the VM's worker has made, or a predecessor was given.

        Args:
            monitor: carries out the commands.
            sockets: they listen; taken over. A predecessor's are taken instead, if there are any.
            addresses: for the log.
            role: see :meth:`serve`.
        """
        keeping = self._keeping.scoped(role)
        kept = KeptSockets(keeping, f"--qmp {addresses}")
        if left := kept.take_listeners():
            sockets = left
        else:
            kept.keep_listeners(sockets)
        stack = self._stack(monitor, keeping)
        for sock in sockets:
            sock.setblocking(False)
            stack.callback(sock.close)
        await self._serve(stack, monitor, sockets, addresses)

    def _stack(self, monitor: Monitor, keeping: Keeping) -> contextlib.AsyncExitStack:
        stack = self._ends.setdefault(monitor.vm, contextlib.AsyncExitStack())
        stack.callback(keeping.clear)
        return stack

    async def _serve(
        self,
        stack: contextlib.AsyncExitStack,
        monitor: Monitor,
        sockets: Sequence[socket.socket],
        address: str,
    ) -> None:
        name = f"QMP{f' of {monitor.vm}' if monitor.vm else ''} at {address}"
        for sock in sockets:
            server = QmpServer(monitor, sock, name, self._package, self._confined)
            stack.push_async_callback(server.aclose)
            await server.start()
            self._servers.setdefault(monitor.vm, []).append(server)
        # A monitor's process may die between what it was handed and its keeping of that.
        lost = "" if sockets else ": its socket is lost, until the VM is removed and added again"
        self._on_listening(name + lost)

    def tell_of(self, vm: str, name: str, data: Mapping[str, Any]) -> None:
        """Tell the clients of all monitors that have the VM what its worker tells."""
        for server in (*self._servers.get("", ()), *self._servers.get(vm, ())):
            server.tell_of(vm, name, data)

    def vm_changed(self, vm: str, state: str) -> None:
        """Tell that a VM was added or removed; one that was removed has no monitors any more."""
        for server in self._servers.get("", ()):
            server.tell("X_VRING_VM", {"vm": vm, "state": state})
        if state == "removed" and vm in self._ends:
            _tell_of_end(self._servers.pop(vm, []), "host-qmp-quit")
            task = asyncio.get_running_loop().create_task(self._ends.pop(vm).aclose())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)


def _tell_of_end(servers: Iterable[QmpServer], reason: str) -> None:
    for server in servers:
        server.tell("SHUTDOWN", {"guest": False, "reason": reason})
