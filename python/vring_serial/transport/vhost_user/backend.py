"""The vhost-user backend: any virtio device, served to one frontend after another."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from vring import MemoryWatch
from vring.errors import RingError
from vring_serial.callbacks import tell
from vring_serial.device.base import VirtioDevice, check_unserved
from vring_serial.errors import ConfigError, LocalProtocolError, ResourceError
from vring_serial.lifetime import Starting
from vring_serial.proto.vhost_user import ProtocolFeature
from vring_serial.ratelimit import RateLimitedLog
from vring_serial.transport.door import (
    DESCRIPTORS_PER_QUEUE,
    HANDSHAKE_SECONDS,
    OTHER_DESCRIPTORS,
    Door,
)
from vring_serial.transport.lost_memory import make_watch
from vring_serial.transport.vhost_user.session import Session

log = logging.getLogger(__name__)

#: What every frontend is offered.
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
#: Queues that the protocol can name (SET_VRING_KICK has 8 bits for the index).
MAX_QUEUES = 256


class VhostUserBackend(Starting):
    """Serves ``controller`` on the unix socket ``path``.

    One frontend at a time; the next one waits in the backlog until the first has gone. Whatever a
    frontend does, the device is then ready for the next: its queues are stopped and the guest's
    memory is unmapped, everything else is kept, since the same guest may come back and go on.

    Args:
        controller: the device.
        path: of the socket.
        listen: make the socket and wait for frontends; False: connect to a frontend that listens,
            trying again until it does, and again when it has gone.
        inband_notifications: offer kicks and calls as messages. Frontends that take this
            (User-Mode Linux does) lose much speed; it is meant for simulations.
        packed: offer packed rings.

    Attributes:
        on_frontend: called with "connected" and "gone".

    Raises:
        ConfigError: the device has more queues than the protocol can name.
    """

    def __init__(
        self,
        controller: VirtioDevice,
        path: str,
        *,
        listen: bool = True,
        inband_notifications: bool = False,
        packed: bool = False,
    ) -> None:
        if controller.num_queues > MAX_QUEUES:
            raise ConfigError(
                f"the device has {controller.num_queues} queues, vhost-user allows {MAX_QUEUES}"
            )
        self.on_frontend: Callable[[str], None] | None = None
        self._device = controller
        self._path = path
        self._name = f"vhost-user {path}"
        self._offered = PROTOCOL_FEATURES
        self._packed = packed
        if inband_notifications:
            self._offered |= ProtocolFeature.INBAND_NOTIFICATIONS
        self._door = Door(
            path,
            name=self._name,
            peer="frontend",
            listen=listen,
            came=self._serve,
            silent=self._silent,
            descriptors=DESCRIPTORS_PER_QUEUE * controller.num_queues + OTHER_DESCRIPTORS,
        )
        self._session: Session | None = None
        self._watch: MemoryWatch | None = None
        # One for all sessions: a frontend can come as often as it likes.
        self._said = RateLimitedLog(log, burst=60, seconds=20)
        self._started = False

    async def start(self) -> None:
        """Listen, or begin to connect.

        Raises:
            ResourceError: the socket exists or cannot be made; the message names it and the reason.
            LocalProtocolError: started already, or another front or server has the device.
        """
        if self._started:
            raise LocalProtocolError(f"{self._name} is started already")
        check_unserved(self._device)
        self._watch = make_watch(self._name)
        try:
            self._door.open()  # a frontend that listens already comes at once
        except ResourceError:
            self._watch = None
            raise
        self._started = True
        self._device.on_config_change = self._config_changed
        self._device.on_needs_reset = self._ring_broken

    async def aclose(self) -> None:
        """Send the frontend away and remove the socket. Safe to call twice."""
        if not self._started:
            return
        self._started = False
        self._device.on_config_change = None
        self._device.on_needs_reset = None
        self._door.close()
        if self._session is not None:
            self._session.close()
            self._session = None
        self._watch = None

    def _serve(self, sock: socket.socket) -> None:
        assert self._watch is not None
        self._session = Session(
            sock,
            self._device,
            offered=self._offered,
            packed=self._packed,
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
        extra = {"event": "frontend", "fields": fields}
        self._said.log(logging.INFO, "%s: frontend %s", self._name, what, extra=extra)
        tell(self._said, f"{self._name}: on_frontend", self.on_frontend, what)

    def _config_changed(self) -> None:
        if self._session is not None:
            self._session.config_changed()

    def _ring_broken(self, error: RingError) -> None:
        if self._session is not None:
            self._session.ring_broken(error)
