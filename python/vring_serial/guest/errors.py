"""What the embedded guest raises about its backend and its ports."""

from __future__ import annotations

from vring_serial.errors import RemoteProtocolError, ResourceError, VringSerialError


class BackendError(RemoteProtocolError):
    """The vhost-user backend sent, or put into shared memory, what its protocols do not allow."""


class BackendRefusedError(BackendError):
    """The backend answered a request with an error, or does not offer what a console needs."""


class BackendTimeoutError(BackendError, TimeoutError):
    """The backend did not do in time what its protocols ask of it."""


class BackendClosedError(BackendError, ConnectionError):
    """The backend closed its socket, or died; every port of the guest is gone with it."""


class GuestMemoryError(ResourceError):
    """The guest's RAM has no room left for rings and buffers; start it with more."""


class GuestTimeoutError(ResourceError, TimeoutError):
    """A guest with a real kernel did not do in time what was asked of it."""


class GuestEndedError(ResourceError, ConnectionError):
    """The kernel of a guest ended; the message has its last lines."""


class PortBusyError(VringSerialError):
    """The port is open already; as with Linux's /dev/vport0p1, one opener at a time."""


class PortRemovedError(VringSerialError, ConnectionError):
    """The device took the port away (PORT_REMOVE), or the guest stopped."""
