"""The vfio-user server: a virtio device as a PCI function, served to one client after another."""

from __future__ import annotations

import socket
from functools import partial

from vring_serial.device.base import VirtioDevice
from vring_serial.device.pci import PciDevice
from vring_serial.transport.server import Server
from vring_serial.transport.session import SessionContext
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.session import VfioUserSession


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

    Attributes:
        on_peer: called with "connected" and "gone"; see :class:`Server`.

    Raises:
        ConfigError: the device cannot be a PCI function so.
    """

    def __init__(
        self,
        controller: VirtioDevice,
        path: str,
        *,
        transitional: bool = False,
        packed: bool = False,
        queue_size: int = 0,
        vectors: int | None = None,
    ) -> None:
        super().__init__(path, protocol="vfio-user", peer="client", queues=controller.num_queues)
        self._rings = RemoteRings(controller)
        self._make_pci = partial(
            PciDevice,
            self._rings,
            transitional=transitional,
            packed=packed,
            queue_size=queue_size,
            vectors=vectors,
        )
        self._pci: PciDevice | None = self._make_pci()

    def _attach(self) -> None:
        if self._pci is None:
            self._pci = self._make_pci()

    def _detach(self) -> None:
        pci, self._pci = self._pci, None
        if pci is not None:
            pci.close()

    def _make_session(self, sock: socket.socket, context: SessionContext) -> VfioUserSession:
        assert self._pci is not None
        return VfioUserSession(sock, self._pci, self._rings, context)
