"""What vring_serial raises, and how it belongs together with what vring raises.

Time-outs are a :class:`TimeoutError` too, and peers that have gone a :class:`ConnectionError`::

    Error                           whatever vring and vring_serial raise of their own
        VringError                  rings and guest memory (vring.errors)
            LocalMisuseError        a bug of the calling program
                QueueFullError
            MemoryMapError
            AddressError
            RingError               the other side broke the ring
                AvailableIndexError
                HeadError
                ChainError
                ChainOrderError
                IndirectError
                BufferAddressError
                DescriptorFlagsError
                MemoryLostError
                UsedRingError
                ClientMemoryError   a vfio-user client's memory could not be read or written
        VringSerialError            everything above the rings
            ConfigError             the user asked for something impossible
            ResourceError           something outside refused
                SocketPathError
                GuestMemoryError
                GuestTimeoutError   (TimeoutError)
                GuestEndedError     (ConnectionError)
            DependencyError         an optional part is not installed
            ProtocolError
                LocalProtocolError  a bug of the calling program
                RemoteProtocolError the peer did what its protocol does not allow
                    AgentProtocolError
                        ChunkError
                        MessageError
                    QmpError        a request of QMP is refused
                    BadMessageError
                        VhostUserError
                        VfioUserError
                    BackendError    the embedded guest's backend
                        BackendRefusedError
                        BackendTimeoutError (TimeoutError)
                        BackendClosedError  (ConnectionError)
            AgentError              an agent, or what shares it, did not do what was asked
                AgentGoneError      (ConnectionError)
                AgentTimeoutError   (TimeoutError)
                AgentUnsupportedError
                AgentRefusedError
                ClipboardEmptyError
                ClipboardTooLargeError
                FileTransferError
                    FileRefusedError
            StateError              a saved state cannot be gone on from
            CallError               another process of the service refused
            CallTimeoutError    (TimeoutError)
            StatusError             a failure of the command that scripts can tell from others
            PortBusyError
            PortRemovedError        (ConnectionError)
"""

from __future__ import annotations

from vring.errors import Error


class VringSerialError(Error):
    """Base of every error of this package; the command line prints it as one line, status 1."""


class ConfigError(VringSerialError):
    """The user asked for something impossible; the command line exits with status 2.

    Attributes:
        where: the place (file and line, option and key) or "" if the message names it.
        why: what is wrong and, where that helps, what would be right.
    """

    def __init__(self, why: str, where: str = "") -> None:
        super().__init__(f"{where}: {why}" if where else why)
        self.where = where
        self.why = why


class ResourceError(VringSerialError):
    """Something outside refused: a socket that exists, a file that cannot be opened, no memory."""


class ProtocolError(VringSerialError):
    """One side of a protocol did what it does not allow; the subclass says which."""


class RemoteProtocolError(ProtocolError):
    """Base of all remote misbehaviour: a peer sent what its protocol does not allow."""


class LocalProtocolError(ProtocolError):
    """Our side asked an object for what its state does not allow: a bug of the calling program."""


class StateError(VringSerialError):
    """A saved state is torn, forged, of an unknown version, or does not fit what it is put into."""


class DependencyError(VringSerialError):
    """An optional part is not installed; the message names the package that brings it."""
