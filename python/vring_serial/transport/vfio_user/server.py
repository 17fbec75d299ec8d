"""The vfio-user server: a virtio device as a PCI function, served to one client after another."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial

from vring import MemoryWatch
from vring_serial.callbacks import tell
from vring_serial.device.base import VirtioDevice
from vring_serial.device.pci import PciDevice
from vring_serial.errors import LocalProtocolError
from vring_serial.lifetime import Starting
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.door import (
    DESCRIPTORS_PER_QUEUE,
    HANDSHAKE_SECONDS,
    OTHER_DESCRIPTORS,
    Door,
)
from vring_serial.transport.lost_memory import make_watch
from vring_serial.transport.vfio_user.rings import RemoteRings
from vring_serial.transport.vfio_user.session import Session

log = logging.getLogger(__name__)


class VfioUserServer(Starting):
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
        on_client: called with "connected" and "gone".

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
        self.on_client: Callable[[str], None] | None = None
        self._path = path
        self._name = f"vfio-user {path}"
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
        self._door = Door(
            path,
            name=self._name,
            peer="client",
            came=self._serve,
            silent=self._silent,
            descriptors=DESCRIPTORS_PER_QUEUE * controller.num_queues + OTHER_DESCRIPTORS,
        )
        self._session: Session | None = None
        self._watch: MemoryWatch | None = None
        # One for all sessions: a client can come as often as it likes.
        self._said = RateLimitedLog(log, burst=60, seconds=20)
        self._started = False

    async def start(self) -> None:
        """Listen.

        Raises:
            ResourceError: the socket exists or cannot be made; the message names it and the reason.
            LocalProtocolError: started already.
        """
        if self._started:
            raise LocalProtocolError(f"{self._name} is started already")
        watch = make_watch(self._name)
        self._door.open()
        self._watch = watch
        self._started = True
        if self._pci is None:
            self._pci = self._make_pci()

    async def aclose(self) -> None:
        """Send the client away, remove the socket and leave the device. Safe to call twice."""
        self._started = False
        self._door.close()
        if self._session is not None:
            self._session.close()
            self._session = None
        self._watch = None
        if self._pci is not None:
            self._pci.close()
            self._pci = None

    def _serve(self, sock: socket.socket) -> None:
        assert self._pci is not None
        assert self._watch is not None
        self._session = Session(
            sock,
            self._pci,
            self._rings,
            name=self._name,
            said=self._said,
            watch=self._watch,
            closer=self._door.closer,
            greeted=self._door.greeted,
            ended=self._ended,
        )
        self._tell("connected")

    def _silent(self) -> None:
        if self._session is not None:
            self._session.send_away(
                f"no first words in {HANDSHAKE_SECONDS:g} s, and another one waits"
            )

    def _ended(self) -> None:
        self._session = None
        self._door.gone()
        self._tell("gone")

    def _tell(self, what: str) -> None:
        fields = {"socket": self._path, "state": what}
        extra = {"event": "client", "fields": fields}
        self._said.log(logging.INFO, "%s: client %s", self._name, what, extra=extra)
        tell(self._said, f"{self._name}: on_client", self.on_client, what)
