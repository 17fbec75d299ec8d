"""VMs that come and go while the service runs, as the monitor sees them: configurations."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from vring_serial.config.toml_file import vm_from_text, vm_text
from vring_serial.config.vms import VmConfig, check_vms
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.lifetime import Closing
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.link import CallError, CallTimeoutError, LinkEnd
from vring_serial.service.qmp.option import parse_qmp
from vring_serial.service.qmp.vm import Vm
from vring_serial.service.roster import PIECE_MAX, TEXT_MAX, Changed
from vring_serial.unix_fds import stream_socket

#: Seconds that a new VM has to serve, or one to stop.
SECONDS = 8.0

_GENERIC = "GenericError"


class Vms(Closing):
    """The VMs of the service, and the way to the keeper, who alone can start and end their workers.

    Args:
        configured: those of the configuration.
        changed: how the VMs differ from those, at the start of this process.
        notifier: to the keeper; it answers on the same socket.
        make: returns a VM by its name and the monitor's end of its link, which it takes over.

    Attributes:
        known: the VMs; lists of others may be this one.
        configs: how they are configured, by name.
        on_change: told the name of a VM, and what became of it: ``added`` or ``removed``.
        on_sockets: given the listening sockets of a VM's own monitors, which it takes over, before
            whoever added the VM has his answer.
    """

    def __init__(
        self,
        configured: Sequence[VmConfig],
        changed: Changed,
        notifier: Notifier,
        make: Callable[[str, LinkEnd], Vm],
    ) -> None:
        self.known: list[Vm] = []
        self.on_change: Callable[[str, str], None] = lambda vm, state: None
        self.on_sockets: Callable[[str, list[socket.socket]], Awaitable[None]] | None = None
        self._sockets: dict[str, list[socket.socket]] = {}
        self.configs = {vm.name: vm for vm in configured if vm.name not in changed.removed}
        self.configs |= {name: vm_from_text(text) for name, text in changed.added.items()}
        self._notifier = notifier
        self._make = make
        self._orders: dict[str, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(notifier.fileno(), self._answered)

    def close(self) -> None:
        self._loop.remove_reader(self._notifier.fileno())
        for vm in self.known:
            vm.close()
        for name in list(self._sockets):
            self._close_sockets(name)

    async def add(self, name: str, table: dict[str, Any]) -> None:
        """Check a VM's table of a configuration file, and have it served.

        Raises CallError with the reason, CallTimeoutError.
        """
        try:
            text = vm_text(name, table)
            config = vm_from_text(text)
            self._check(name, config, len(text))
        except ConfigError as error:
            raise CallError(_GENERIC, str(error)) from None
        self.configs[name] = config  # others that come meanwhile are compared with it
        try:
            await self._order("add", name, text)
        except BaseException:
            del self.configs[name]
            raise
        if (sockets := self._sockets.pop(name, None)) and self.on_sockets is not None:
            await self.on_sockets(name, sockets)

    async def remove(self, name: str) -> None:
        """Have a VM's worker stop, and remove what it made. Raises as :meth:`add`."""
        if name not in self.configs:
            raise CallError("DeviceNotFound", f"VM '{name}' not found")
        await self._order("remove", name)
        self.configs.pop(name, None)

    def _check(self, name: str, config: VmConfig, length: int) -> None:
        if name in self.configs:
            raise ConfigError(f"there is a VM {name} already")
        if length > TEXT_MAX:
            raise ConfigError(f"its description has {length} characters; {TEXT_MAX} are allowed")
        for text in config.qmp:
            parse_qmp(text, config.where("qmp", text))
        for controller in config.topology.controllers:
            for port in controller.ports:
                if port.chardev.kind in ("stdio", "fd"):
                    why = f"{port.chardev.kind} is of the service's own process"
                    raise ConfigError(why, port.chardev.where)
        check_vms([*self.configs.values(), config])

    async def _order(self, order: str, name: str, text: str = "") -> None:
        if name in self._orders:
            raise CallError(_GENERIC, f"VM '{name}' is being added or removed already")
        future: asyncio.Future[None] = self._loop.create_future()
        self._orders[name] = future
        try:
            self._tell(order, name, text)
            async with asyncio.timeout(SECONDS):
                await future
        except ResourceError as error:
            raise CallError(_GENERIC, str(error)) from None
        except TimeoutError:
            if order == "add":  # or else it would be there, and nobody wants it any more
                self._tell("remove", name, "")
            raise CallTimeoutError(f"VM '{name}': nothing came of it in {SECONDS:g} s") from None
        finally:
            del self._orders[name]

    def _close_sockets(self, name: str) -> None:
        for sock in self._sockets.pop(name, ()):
            sock.close()

    def _tell(self, order: str, name: str, text: str) -> None:
        self._notifier.notify(f"VM={name}")
        for at in range(0, len(text), PIECE_MAX):
            self._notifier.notify(f"TEXT={text[at : at + PIECE_MAX]}")
        self._notifier.notify(f"DO={order}")

    def _answered(self) -> None:
        for _ in range(16):
            try:
                fields, fds = self._notifier.hear()
            except BlockingIOError:
                return
            except OSError:
                self._loop.remove_reader(self._notifier.fileno())
                return
            if not fields:  # the keeper has ended
                self._loop.remove_reader(self._notifier.fileno())
                return
            self._act(fields, fds)

    def _act(self, fields: dict[str, str], fds: list[int]) -> None:
        name, done = fields.get("VM", ""), fields.get("DONE")
        there = next((vm for vm in self.known if vm.name == name), None)
        if done == "add" and fds and there is None:
            end = LinkEnd(fileno=fds.pop(0))
            end.setblocking(False)
            found = [stream_socket(fd, listening=True) for fd in fds]
            fds.clear()
            self._sockets[name] = [sock for sock in found if sock is not None]
            self.known.append(self._make(name, end))
            self.on_change(name, "added")
        elif done == "remove" and there is not None:
            self.known.remove(there)
            there.close()
            self._close_sockets(name)
            self.on_change(name, "removed")
        for fd in fds:
            os.close(fd)
        future = self._orders.get(name)
        with contextlib.suppress(asyncio.InvalidStateError):
            if future is not None and done is not None:
                future.set_result(None)
            elif future is not None:
                future.set_exception(CallError(_GENERIC, fields.get("FAILED", "")))
