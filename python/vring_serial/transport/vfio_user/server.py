"""The vfio-user server: a virtio device as a PCI function, served to one client after another."""

from __future__ import annotations

import logging
import socket
from functools import partial

from vring import RECORD_SIZE
from vring_serial.device.base import VirtioDevice
from vring_serial.device.pci import PciDevice
from vring_serial.device.pci.device import vectors_of
from vring_serial.errors import ConfigError, StateError
from vring_serial.keeping import Keeping
from vring_serial.transport.event_fds import check_kept
from vring_serial.transport.server import Server
from vring_serial.transport.session import SessionContext
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.session import KICK, ROLES, VfioUserSession
from vring_serial.transport.vfio_user.written import Left, read_left
from vring_serial.unix_fds import close_all


class VfioUserServer(Server[VfioUserSession]):
    """Serves ``controller`` as a PCI function on the unix socket ``path``.

    One client at a time; the next one waits in the backlog until the first has gone. Whatever a
    client does, the device is then ready for the next: it is reset, and nothing of the guest's
    memory stays mapped.

    Args:
        controller: the device.
        path: of the socket.
        transitional: drivers of before virtio 1.0 may use the device too.
        packed: offer packed rings.
        queue_size: of every queue, unless the driver chooses less; 0: see PciDevice.
        vectors: entries of the MSI-X table; None: see PciDevice.
        keeping: see :class:`Server`.

    Attributes:
        on_peer: called with "connected" and "gone"; see :class:`Server`.

    Raises:
        ConfigError: the device cannot be a PCI function so.
    """

    _session_roles = ROLES

    def __init__(
        self,
        controller: VirtioDevice,
        path: str,
        *,
        transitional: bool = False,
        packed: bool = False,
        queue_size: int = 0,
        vectors: int | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        super().__init__(
            path,
            protocol="vfio-user",
            peer="client",
            queues=controller.num_queues,
            keeping=keeping,
        )
        records = None
        # What a predecessor of this process left of its session, or why that is of no use.
        self._left: Left | StateError | None = None
        if keeping is not None:
            area = keeping.area("rings", controller.num_queues * RECORD_SIZE)
            cuts = range(0, len(area), RECORD_SIZE)
            records = [area[at : at + RECORD_SIZE] for at in cuts]
            try:
                self._left = read_left(
                    keeping, controller.num_queues, vectors_of(controller, vectors)
                )
            except StateError as error:
                self._left = error
        left = self._left if isinstance(self._left, Left) else None
        self._rings = RemoteRings(controller, None if left is None else left.rings)
        self._make_pci = partial(
            PciDevice,
            self._rings,
            transitional=transitional,
            packed=packed,
            queue_size=queue_size,
            vectors=vectors,
            records=records,
        )
        self._pci: PciDevice | None = None
        if left is not None and keeping is not None:
            self._pci = self._resume_pci(left, keeping)
        if self._pci is None:
            self._pci = self._make_pci()

    async def start(self) -> None:
        """See Server."""
        await super().start()
        # It refuses no migration, and asks for no state: nothing in QEMU would say so.
        text = (
            "%s: a client may migrate the device (DEVICE_FEATURE); QEMU 11.1 does not: "
            "do not migrate or save its machine"
        )
        self._log.log(logging.INFO, text, self._name)

    def _resume_pci(self, left: Left, keeping: Keeping) -> PciDevice | None:
        """Return the function as a predecessor left it; None if it was another one."""
        kicks = {
            index: fd
            for index in range(len(left.function.registers.queues))
            if (fd := keeping.take(KICK.format(index))) is not None
        }
        try:
            for index, fd in kicks.items():
                check_kept(fd, KICK.format(index), writable=False)
            return self._make_pci(state=left.function, kick_fds=kicks)
        except (ConfigError, StateError) as error:
            close_all(kicks.values())
            self._left = StateError(str(error))
            return None

    def _attach(self) -> None:
        if self._pci is None:
            self._pci = self._make_pci()

    def _detach(self) -> None:
        pci, self._pci = self._pci, None
        if pci is not None:
            pci.close()

    def _make_session(self, sock: socket.socket, context: SessionContext) -> VfioUserSession:
        assert self._pci is not None
        left = self._left if context.resumed else None
        self._left = None
        return VfioUserSession(sock, self._pci, self._rings, context, left)
