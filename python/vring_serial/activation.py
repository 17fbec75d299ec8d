"""Sockets that whoever started the process listens on already (sd_listen_fds(3)).

They belong to the process as a whole, like its standard streams: whatever is about to listen at an
address looks here first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any

#: Address to descriptor; a unix socket's is its absolute path, or its name with a leading NUL.
_provided: dict[Any, int] = {}


def provide(sockets: Iterable[int]) -> list[str]:
    """Note listening stream sockets, which stay open as long as the process; return their names.

    Raises ValueError, with what is wrong, for a descriptor that is none.
    """
    names = []
    for fd in sockets:
        listens, kind, address = _look_at(fd)
        if not listens or kind != socket.SOCK_STREAM:
            raise ValueError(f"descriptor {fd} is no listening stream socket")
        _provided[_key(address)] = fd
        names.append(str(address))
    return names


def provide_as(address: str, fd: int) -> None:
    """Note a listening stream socket for whoever is about to listen at ``address``.

    It stays open as long as the process. The caller has checked that it listens.
    """
    _provided[_key(address)] = fd


def _look_at(fd: int) -> tuple[bool, int, Any]:
    """Return whether a descriptor is a listening socket, its type, and its address."""
    duplicate = os.dup(fd)
    try:
        sock = socket.socket(fileno=duplicate)
    except OSError:  # it is no socket
        os.close(duplicate)
        return False, 0, ""
    with sock:
        try:
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            listens = 0
        address = sock.getsockname()
        return (
            bool(listens),
            sock.type,
            (os.fsdecode(address) if isinstance(address, bytes) else address),
        )


def descriptors() -> list[int]:
    """Return the descriptors that were provided."""
    return list(_provided.values())


def is_provided(address: Any) -> bool:
    """Return whether somebody listens at this address for us."""
    return _key(address) in _provided


def take(address: Any) -> int | None:
    """Return a duplicate of the socket that listens there, the caller's; None if there is none."""
    fd = _provided.get(_key(address))
    return None if fd is None else os.dup(fd)


def _key(address: Any) -> Any:
    if isinstance(address, bytes):
        address = os.fsdecode(address)
    if isinstance(address, str):
        return address if address.startswith("\0") else os.path.abspath(address)
    return address[:2]
