"""The vhost-user backend: any virtio device, served to one frontend after another."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from vring.errors import RingError
from vring_serial.device.base import VirtioDevice
from vring_serial.errors import ConfigError, LocalProtocolError
from vring_serial.proto.vhost_user import ProtocolFeature
from vring_serial.transport.vhost_session import Session
from vring_serial.unix_socket import UnixListener, encode_path

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
#: Seconds between two attempts to connect.
RETRY_INTERVAL = 0.5
#: Seconds without accepting after the system refused a descriptor for a connection.
ACCEPT_PAUSE = 1.0


class VhostUserBackend:
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
    ) -> None:
        if controller.num_queues > MAX_QUEUES:
            raise ConfigError(
                f"the device has {controller.num_queues} queues, vhost-user allows {MAX_QUEUES}"
            )
        self.on_frontend: Callable[[str], None] | None = None
        self._device = controller
        self._path = path
        self._name = f"vhost-user {path}"
        self._listens = listen
        self._offered = PROTOCOL_FEATURES
        if inband_notifications:
            self._offered |= ProtocolFeature.INBAND_NOTIFICATIONS
        self._listener: UnixListener | None = None
        self._session: Session | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._last_failure = ""
        self._started = False

    async def start(self) -> None:
        """Listen, or begin to connect.

        Raises:
            ResourceError: the socket exists or cannot be made; the message names it and the reason.
            LocalProtocolError: started already.
        """
        if self._started:
            raise LocalProtocolError(f"{self._name} is started already")
        if self._listens:
            self._listener = UnixListener(self._path)
            log.info("%s: waiting for a frontend", self._name)
        else:
            encode_path(self._path)
        self._started = True
        self._device.on_config_change = self._config_changed
        self._device.on_needs_reset = self._ring_broken
        self._next_frontend()

    async def stop(self) -> None:
        """Send the frontend away and remove the socket. Safe to call twice."""
        if not self._started:
            return
        self._started = False
        self._device.on_config_change = None
        self._device.on_needs_reset = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.socket)
            self._listener.close()
            self._listener = None
        if self._session is not None:
            self._session.close()
            self._session = None

    def _next_frontend(self) -> None:
        if self._listener is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._listener.socket, self._accept, self._listener)
        else:
            self._connect()

    def _accept(self, listener: UnixListener) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("%s: cannot accept a frontend: %s", self._name, error.strerror)
            loop.remove_reader(listener.socket)
            self._retry = loop.call_later(ACCEPT_PAUSE, self._next_frontend)
            return
        loop.remove_reader(listener.socket)
        sock.setblocking(False)
        self._serve(sock)

    def _connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # A unix socket connects at once or not at all.
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            self._connect_later(error.strerror or str(error))
            return
        self._last_failure = ""
        self._serve(sock)

    def _connect_later(self, why: str) -> None:
        if why != self._last_failure:
            log.info("%s: no frontend yet: %s", self._name, why)
            self._last_failure = why
        loop = asyncio.get_running_loop()
        self._retry = loop.call_later(RETRY_INTERVAL, self._connect)

    def _serve(self, sock: socket.socket) -> None:
        self._session = Session(
            sock, self._device, offered=self._offered, name=self._name, ended=self._ended
        )
        self._tell("connected")

    def _ended(self) -> None:
        self._session = None
        self._tell("gone")
        if not self._started:
            return
        if self._listens:
            self._next_frontend()
        else:
            # Not at once: a frontend that closes every connection would keep the loop busy.
            self._connect_later("the last one has gone")

    def _tell(self, what: str) -> None:
        fields = {"socket": self._path, "state": what}
        log.info("%s: frontend %s", self._name, what, extra={"event": "frontend", "fields": fields})
        if self.on_frontend is not None:
            self.on_frontend(what)

    def _config_changed(self) -> None:
        if self._session is not None:
            self._session.config_changed()

    def _ring_broken(self, error: RingError) -> None:
        if self._session is not None:
            self._session.ring_broken(error)
