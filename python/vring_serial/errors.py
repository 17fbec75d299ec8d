"""What vring_serial raises: configuration is the user's, protocol the peer's; each says where."""

from __future__ import annotations


class VringSerialError(Exception):
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


class DependencyError(VringSerialError):
    """An optional part is not installed; the message names the package that brings it."""
