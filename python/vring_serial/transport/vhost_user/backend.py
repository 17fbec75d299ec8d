"""The vhost-user backend: any virtio device, served to one frontend after another."""

from __future__ import annotations

import socket

from vring.errors import RingError
from vring_serial.device.base import VirtioDevice, check_unserved
from vring_serial.errors import ConfigError
from vring_serial.keeping import Keeping
from vring_serial.proto.vhost_user import ProtocolFeature, VringDescriptor
from vring_serial.transport.server import Server
from vring_serial.transport.session import SessionContext
from vring_serial.transport.vhost_user.session import ROLES, VhostUserSession

#: What every frontend is offered.
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.DEVICE_STATE
)
#: Queues that the protocol can name (SET_VRING_KICK).
MAX_QUEUES = VringDescriptor.INDEX_MASK + 1


class VhostUserBackend(Server[VhostUserSession]):
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
        connected: see :class:`Server`.
        keeping: see :class:`Server`.

    Attributes:
        on_peer: called with "connected" and "gone"; see :class:`Server`.

    Raises:
        ConfigError: the device has more queues than the protocol can name.
    """

    _session_roles = ROLES

    def __init__(
        self,
        controller: VirtioDevice,
        path: str,
        *,
        listen: bool = True,
        inband_notifications: bool = False,
        packed: bool = False,
        connected: socket.socket | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        if controller.num_queues > MAX_QUEUES:
            raise ConfigError(
                f"the device has {controller.num_queues} queues, vhost-user allows {MAX_QUEUES}"
            )
        super().__init__(
            path,
            protocol="vhost-user",
            peer="frontend",
            listen=listen,
            queues=controller.num_queues,
            connected=connected,
            keeping=keeping,
        )
        self._device = controller
        self._offered = PROTOCOL_FEATURES
        self._packed = packed
        if inband_notifications:
            self._offered |= ProtocolFeature.INBAND_NOTIFICATIONS

    def _check(self) -> None:
        check_unserved(self._device)

    def _attach(self) -> None:
        self._device.on_config_change = self._config_changed
        self._device.on_needs_reset = self._ring_broken

    def _detach(self) -> None:
        if self._device.on_config_change == self._config_changed:
            self._device.on_config_change = None
            self._device.on_needs_reset = None

    def _make_session(self, sock: socket.socket, context: SessionContext) -> VhostUserSession:
        return VhostUserSession(
            sock, self._device, context, offered=self._offered, packed=self._packed
        )

    def _config_changed(self) -> None:
        if self._session is not None:
            self._session.config_changed()

    def _ring_broken(self, error: RingError) -> None:
        if self._session is not None:
            self._session.ring_broken(error)
